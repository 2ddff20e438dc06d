"""Does to training what happens to it, again and again, and checks that nothing shows in what it leaves.

    python bench/faults.py --kills 100 --seed 0 --output faults.json
    python bench/faults.py --kills 10 --launcher torchrun
    python bench/faults.py --kills 30 --kinds file damage --minutes 3

Each configuration (SFT and DPO, ZeRO 0, 2 and 3, one rank and two) is run once undisturbed. Then it is started again
and, at instants drawn from the seed, one rank or all of them get SIGKILL (sometimes SIGTERM): while the process starts,
in the reference pass, in steps, in the midst of a save, at the end. The same command goes on until the run is done, and
every checkpoint byte and every number of metrics.jsonl, times and memory aside, is compared with the undisturbed run.
Ranks that a dead one leaves behind must end within 30 seconds; `told` are those that waited for its start, and ended
when they got the SIGTERM that launchers send. --kinds, all of them if not said:

    kill      at an instant
    file      rank 0, right before one of its first 60 files or folders is renamed, linked or removed
    pause     SIGSTOP, SIGCONT within 3 seconds, and then a kill: what was paused must have gone on
    stop      one rank gets SIGSTOP and the others SIGTERM: they must end all the same
    damage    after one of these a bit of a checkpoint, a state or the cache flips, or half a line is in metrics.jsonl:
              it is made again, or passed over, or named on the screen
    base      after one of these the model has other weights: refused, nothing changes, and with the weights put back
              the run goes on
    ranks     after one of these the last rank gets another learning rate: refused likewise

The ranks are real processes that run train.py, on CPU. `fork`, the default, makes them from one that has imported the
libraries already, which saves ten seconds a kill; `torchrun` and `python` start as a user would. Exit code 1 where
anything differs.
"""

import argparse
import gc
import importlib
import itertools
import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parent.parent
PILES = ROOT / "examples" / "piles"
PATIENCE, ROWS = 30, 200
EXITS: dict[int, int] = {}  # of the processes that have ended
PHASES = ("start", "reference", "step", "save", "end")
RUNNING, DOWN = ("kill", "file", "pause", "stop"), ("damage", "base", "ranks")
EVENTS = ("os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree")
FLAGS = ("--eval_size", 4, "--save_steps", 2, "--resume_steps", 1, "--eval_steps", 4, "--learning_rate", "1e-3",
         "--lora_dropout", "0.1", "--allow_dropout", "--warmup_steps", 3, "--save_total_limit", 3, "--draw", "false")


def configurations(folder: Path, steps: int) -> list[dict]:
    """The matrix; precision and full fine-tuning take turns in it."""
    found, data = [], folder / "train.parquet"
    pandas.read_parquet(PILES / "train.parquet").head(ROWS).to_parquet(data)
    for i, (stage, ranks, loss) in enumerate(itertools.product((0, 2, 3), (1, 2), ("sft", "dpo"))):
        settings = folder / f"zero{stage}.json"
        settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        full, bf16 = i % 3 == 1, stage > 0 and i % 4 == 2
        flags = ["--train_file_path", data, "--max_steps", steps, "--loss", loss, "--deepspeed", settings,
                 "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2 // ranks]
        flags += (["--use_lora", "false"] if full else []) + (["--bf16"] if bf16 else [])
        name = f"{loss} zero{stage} {ranks} rank{'s' * (ranks > 1)}{' full' * full}{' bf16' * bf16}"
        found.append({"name": name, "ranks": ranks, "steps": steps, "flags": flags,
                      "folder": folder / name.replace(" ", "-")})
    return found


def command(config: dict, run: str) -> list[str]:
    # Each of the two runs has its own references: a cache would leave nothing to kill there.
    folder = config["folder"]
    return [str(x) for x in ("--model_name", folder / "model", *FLAGS, *config["flags"], "--output_dir", folder / run,
                             "--cache_dir", folder / f"{run}-cache")]


def start(config: dict, run: str, launcher: str, event: int = 0, last: tuple = ()) -> list[int]:
    """The process ids of the ranks, or of the launcher, each the head of its own group. By fork rank 0 can be killed at
    a file event of this number, and the last rank have these flags besides."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    log = config["folder"] / f"{run}.log"
    EXITS.clear()
    if launcher == "fork":
        argv = [str(ROOT / "train.py"), *command(config, run)]
        ranks = range(config["ranks"])
        return [fork([*argv, *(last if rank == ranks[-1] else ())], log, rank, len(ranks), port, not rank and event)
                for rank in ranks]
    head = [sys.executable]
    if launcher == "torchrun":
        head += ["-m", "torch.distributed.run", "--nproc_per_node", str(config["ranks"]), "--master_port", port]
    with log.open("a") as out:
        return [subprocess.Popen([*head, str(ROOT / "train.py"), *command(config, run)], stdout=out, stderr=out,
                                 start_new_session=True, env=os.environ | {"PYTHONPATH": str(ROOT)}).pid]


def fork(argv: list[str], log: Path, rank: int, world: int, port: str, event: int = 0) -> int:
    """A rank that runs the script argv[0], made from this process and what it has imported; killed at a file event of
    its output folder where `event` is above 0."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=port)
        sys.argv = argv
        if event:
            sys.addaudithook(killer(event, str(log.parent)))
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:  # whatever it was, this copy of the harness ends here
        if (error := sys.exception()) and not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def killer(event: int, folder: str):
    """An audit hook that ends the process right before the file event of this number in `folder`."""
    left = itertools.count(event - 1, -1)

    def hear(name: str, what: tuple) -> None:
        # Within shutil.rmtree names are relative to an open folder.
        if name in EVENTS and (str(what[0]).startswith(folder) or "/" not in str(what[0])) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return hear


def phase_of(config: dict, run: str) -> str:
    """The phase of a run, by the files in its folder."""
    folder = config["folder"] / run
    if any(folder.glob(".*.partial")) or any(folder.glob("resume/.*.partial")):
        return "save"
    if not (folder / "run.json").exists():
        return "start"
    if (folder / f"checkpoint-{config['steps']}").exists():
        return "end"
    # A process that goes on is in its reference pass, or loads its state, until it writes.
    return "step" if (folder / "metrics.jsonl").exists() else "reference"


def ended(pids: list[int]) -> list[int | None]:
    """Exit codes by process, a signal n as 128 + n; None where one still runs."""
    for pid in (pid for pid in pids if pid not in EXITS):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            EXITS[pid] = code if code >= 0 else 128 - code
    return [EXITS.get(pid) for pid in pids]


def disturb(config: dict, launcher: str, draw: random.Random, dice: dict) -> dict | None:
    """Starts the run once and kills it as the dice say; None where it came to its end instead."""
    kind = dice["kind"]
    pids, began = start(config, "killed", launcher, dice["event"] if kind == "file" else 0), time.monotonic()
    folder = config["folder"] / "killed"
    lines = count_lines(folder)
    if kind == "file":
        wait_until(pids[:1], lambda: False)  # rank 0, which the last save keeps longer than the others
        if ended(pids)[0] != 128 + signal.SIGKILL:
            wait_until(pids, lambda: None not in ended(pids))
            return finish_off(config, pids) or None
    elif dice["phase"] == "start":
        wait_until(pids, lambda: time.monotonic() - began > dice["delay"] * (1.5 if launcher == "fork" else 8))
    else:
        more = lines + dice["steps"]
        wait_until(pids, lambda: phase_of(config, "killed") == dice["phase"]
                   and (dice["phase"] not in ("step", "save") or count_lines(folder) >= more))
        time.sleep(dice["delay"] * {"save": 0.01, "end": 0.02, "reference": 0.3}.get(dice["phase"], 0.1))
    if kind != "file" and None not in ended(pids):
        return finish_off(config, pids) or None
    observed = phase_of(config, "killed")
    victims = pids if dice["all"] and kind != "stop" else [draw.choice(pids)]
    if kind == "pause":
        send(victims, signal.SIGSTOP)
        time.sleep(0.5 + 2.5 * dice["delay"])
        send(victims, signal.SIGCONT)
        wait_until(pids, lambda: any(ended(pids)), 1)
        if any(ended(pids)) or None not in ended(pids):
            return finish_off(config, pids) or None
    if kind != "file":
        send(victims, signal.SIGSTOP if kind == "stop" else dice["signal"])
    hit, left = time.monotonic(), [pid for pid in pids if kind != "stop" or pid not in victims]
    wait_until(left, lambda: None not in ended(left), 5)
    told = [pid for pid, code in zip(left, ended(left)) if code is None and launcher == "fork"]
    send(told, signal.SIGTERM)  # what a launcher does that has lost a rank
    wait_until(left, lambda: None not in ended(left), PATIENCE - 5)
    seconds, hanging = time.monotonic() - hit, [pid for pid, code in zip(left, ended(left)) if code is None]
    send([pid for pid, code in zip(pids, ended(pids)) if code is None], signal.SIGKILL)
    wait_until(pids, lambda: None not in ended(pids))
    return {"config": config["name"], "kind": kind, "phase": observed, "signal": dice["signal"].name,
            "all": dice["all"], "seconds_to_end": round(seconds, 2), "told": bool(told), "hung": bool(hanging),
            "exit_codes": ended(pids), "step": count_lines(folder)}


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            pass


def damage(config: dict, draw: random.Random) -> None:
    """Flips a bit of a file that a run can do without, or knows to name, or leaves half a line in metrics.jsonl."""
    from nanodpo.folder.atomic import BESIDE  # a checkpoint's card and log, which anybody may change

    run, cache = config["folder"] / "killed", config["folder"] / "killed-cache"
    states = sorted(run.glob("resume/step-*"), key=lambda state: int(state.name.removeprefix("step-")))
    # Without states, as right before its end, a run can't make its checkpoints again, but for the first.
    checkpoints = [place for place in run.glob("checkpoint-*") if states or place.name == "checkpoint-0"]
    files = [file for place in (*checkpoints, *states[1:][-1:], cache) for file in place.glob("*")
             if file.is_file() and file not in config["damaged"] and file.name not in BESIDE]
    if not files or draw.random() < 0.15:
        with (run / "metrics.jsonl").open("a") as out:
            out.write('{"step": 3, "lo')
        return
    file = draw.choice(sorted(files))
    content = bytearray(file.read_bytes())
    config["damaged"][file] = bytes(content)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def mend(config: dict) -> None:
    """Puts back what was damaged in the run's last folder, where a run has said that it can't make it again."""
    said = (config["folder"] / "killed.log").read_text()
    for file, content in config["damaged"].items():
        if file.is_file() and file.read_bytes() != content and f"resume: {file.parent}: " in said:
            file.write_bytes(content)
    config["damaged"].clear()


def refused(config: dict, kind: str) -> list[str]:
    """Starts the run with another base, or with a rank that was given something else; what is wrong in how it ends."""
    run, weights = config["folder"] / "killed", config["folder"] / "model" / "model.safetensors"
    log, kept = config["folder"] / "killed.log", weights.read_bytes()
    size, before = log.stat().st_size, contents(run)
    if kind == "base":
        shutil.copy(PILES / "base" / "model.safetensors", weights)
    pids = start(config, "killed", "fork", last=("--learning_rate", "2e-3") if kind == "ranks" else ())
    wait_until(pids, lambda: any(code is not None for code in ended(pids)))
    wait_until(pids, lambda: None not in ended(pids), PATIENCE)
    codes, said = ended(pids), log.read_bytes()[size:].decode()
    send([pid for pid, code in zip(pids, codes) if code is None], signal.SIGKILL)
    wait_until(pids, lambda: None not in ended(pids))
    weights.write_bytes(kept)
    word = "weights: " if kind == "base" else "--learning_rate"
    wrong = {f"exit codes {codes}": codes != [2] * len(codes), "a traceback": "Traceback" in said,
             f"no line that names {word}": not any(line.startswith("error: ") and word in line
                                                   for line in said.splitlines()),
             "files are others now": contents(run) != before}
    return [f"{kind}: {what}" for what, is_so in wrong.items() if is_so]


def contents(run: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and ".partial" not in str(file)}


def finish_off(config: dict, pids: list[int]) -> None:
    codes = ended(pids)
    if any(codes):
        log = (config["folder"] / "killed.log").read_text()
        raise SystemExit(f"{config['name']}: did not go on, exit codes {codes}\n{log[-3000:]}")


def wait_until(pids: list[int], true, seconds: float = 600, pause: float = 0.001) -> None:
    end = time.monotonic() + seconds
    while not true() and None in ended(pids) and time.monotonic() < end:
        time.sleep(pause)


def count_lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def differences(one: Path, other: Path) -> list[str]:
    """The differences between two runs' folders: names of files, and steps and columns of metrics.jsonl."""
    found = []
    a, b = ([{k: v for k, v in json.loads(line).items() if not k.startswith(("perf/", "mem/"))}
             for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other))
    if len(a) != len(b):
        found.append(f"metrics.jsonl: {len(a)} and {len(b)} lines")
    found += [f"metrics.jsonl: step {x['step']}: {k}" for x, y in zip(a, b) for k in x | y if x.get(k) != y.get(k)]
    names = [{str(f.relative_to(run)) for f in run.rglob("*") if f.is_file()} for run in (one, other)]
    found += [f"{name}: only in one" for name in sorted(names[0] ^ names[1])]
    same = (name for name in sorted(names[0] & names[1]) if name.startswith("checkpoint-"))
    return found + [name for name in same if (one / name).read_bytes() != (other / name).read_bytes()]


def roll(draw: random.Random, kinds: list[str], ranks: int) -> dict:
    kinds = [kind for kind in RUNNING if kind in kinds and (ranks > 1 or kind != "stop")]
    return {"kind": draw.choice(kinds), "event": draw.randrange(1, 61),
            "phase": draw.choice(PHASES), "all": draw.random() < 0.5, "delay": draw.random(),
            "steps": draw.randrange(1, 6), "signal": signal.SIGTERM if draw.random() < 0.15 else signal.SIGKILL}


def go_wrong(config: dict, kinds: list[str], draw: random.Random) -> tuple[str | None, list[str]]:
    """Does something to a run that has begun and is not under way, now and then: (what, what was wrong then)."""
    kinds = [kind for kind in DOWN if kind in kinds and (config["ranks"] > 1 or kind != "ranks")]
    if not kinds or not (config["folder"] / "killed" / "run.json").exists() or draw.random() < 0.5:
        return None, []
    kind = draw.choice(kinds)
    return kind, damage(config, draw) or [] if kind == "damage" else refused(config, kind)


def try_one(config: dict, kills: int, launcher: str, kinds: list[str], draw: random.Random
            ) -> tuple[list[dict], list[str]]:
    """(kills that hit, differences): kills and goes on until the run is done, and once more from the start if it must
    be to have had so many kills."""
    hits, found, again = [], [], 0
    while len(hits) < kills and again < 5:
        run, again = config["folder"] / "killed", again + 1
        for old in (run, config["folder"] / "killed-cache"):
            if old.exists():
                old.rename(old.with_name(f"{old.name}-{again}"))
        done = False
        while not done:
            hit = disturb(config, launcher, draw, roll(draw, kinds, config["ranks"])) if len(hits) < kills else None
            if hit is None and not (run / "run.json").exists() or len(hits) >= kills:
                pids = start(config, "killed", launcher)
                wait_until(pids, lambda: None not in ended(pids))  # noqa: B023
                finish_off(config, pids)
            hits += [hit] if hit else []
            record = run / "run.json"
            done = record.exists() and json.loads(record.read_text()).get("finished", False)
            if hit and not done:
                hit["then"], wrong = go_wrong(config, kinds, draw)
                found += wrong
        mend(config)
        found += differences(config["folder"] / "undisturbed", run)
    return hits, found


def count(hits: list[dict], key: str, values: tuple) -> str:
    return ", ".join(f"{value} {n}" for value in values if (n := sum(hit.get(key) == value for hit in hits)))


def warm_up() -> None:
    """Imports what train.py, score.py and plot.py will, so that the ranks made by fork need not."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.path.insert(0, str(ROOT))
    for name in ("torch", "transformers", "peft", "deepspeed", "datasets", "safetensors.torch", "tqdm", "pandas",
                 "matplotlib.backends.backend_pdf", "matplotlib.backends.backend_svg", "train", "score", "plot"):
        importlib.import_module(name)
    # Parts of transformers are imported by use: these models are the harness's and most tests'.
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("qwen2")  # compiles patterns for all models, 0.3 s, and keeps them
    gc.freeze()  # a fork that collects garbage would write to, and so copy, all that is imported


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10, help="of a run")
    parser.add_argument("--launcher", choices=("fork", "python", "torchrun"), default="fork")
    parser.add_argument("--kinds", nargs="+", choices=(*RUNNING, *DOWN), default=[*RUNNING, *DOWN])
    parser.add_argument("--only", default="", help="configurations whose name holds this word")
    parser.add_argument("--minutes", type=float, default=60, help="stop after the configuration that takes longer")
    parser.add_argument("--output", default=None, help="JSON of every kill")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if args.launcher == "fork":
        warm_up()
    else:  # the launcher is hit, and starts ranks that are all alike
        args.kinds = [kind for kind in args.kinds if kind in ("kill", "pause", "damage")]
    if not set(args.kinds) & set(RUNNING):
        parser.error(f"--kinds: {', '.join(args.kinds)} comes after another: {', '.join(RUNNING)}")
    draw, hits, wrong, began = random.Random(args.seed), [], {}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        configs = [config for config in configurations(Path(folder), args.steps) if args.only in config["name"]]
        if args.launcher == "python":
            configs = [config for config in configs if config["ranks"] == 1]
        for i, config in enumerate(configs):
            config["folder"].mkdir()
            shutil.copytree(PILES / "sft", config["folder"] / "model")
            config["damaged"] = {}  # what was in a file
            pids = start(config, "undisturbed", args.launcher)
            wait_until(pids, lambda: None not in ended(pids))  # noqa: B023
            if any(ended(pids)):
                raise SystemExit(f"{config['name']}: {(config['folder'] / 'undisturbed.log').read_text()[-3000:]}")
            new, found = try_one(config, (args.kills * (i + 1)) // len(configs) - len(hits), args.launcher,
                                 args.kinds, draw)
            hits, wrong = hits + new, wrong | {config["name"]: found}
            print(f"{config['name']:<28} {len(new):>3} kills ({count(new, 'phase', PHASES)}; "
                  f"{count(new, 'kind', RUNNING)}; then {count(new, 'then', DOWN) or 'nothing'}), {len(found)} "
                  "differences", *(f"\n  {line}" for line in found[:8]), flush=True)
            if time.monotonic() - began > 60 * args.minutes:
                break
    hung = sum(hit["hung"] for hit in hits)
    total = sum(map(len, wrong.values()))
    slowest = max((hit["seconds_to_end"] for hit in hits), default=0)
    print(f"{len(hits)} kills, {total} differences, {hung} hung, slowest end {slowest} s, "
          f"{time.monotonic() - began:.0f} s in all")
    if args.output:
        Path(args.output).write_text(json.dumps({"seed": args.seed, "launcher": args.launcher, "kills": hits,
                                                 "differences": wrong}, indent=1))
    return int(bool(total or hung or not hits))


if __name__ == "__main__":
    sys.exit(main())
