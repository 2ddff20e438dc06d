"""Kills training again and again, and checks that nothing shows in what it leaves.

    python bench/faults.py --kills 100 --seed 0 --output faults.json
    python bench/faults.py --kills 10 --launcher torchrun

Each configuration (SFT and DPO, ZeRO 0, 2 and 3, one rank and two) is run once undisturbed. Then it is started again
and, at instants drawn from the seed, one rank or all of them get SIGKILL (sometimes SIGTERM): while the process starts,
in the reference pass, in steps, in the midst of a save, at the end. The same command goes on until the run is done, and
every checkpoint byte and every number of metrics.jsonl, times and memory aside, is compared with the undisturbed run.
Ranks that a dead one leaves behind must end within 30 seconds; `told` are those that waited for its start, and ended
when they got the SIGTERM that launchers send.

The ranks are real processes that run train.py, on CPU. `fork`, the default, makes them from one that has imported the
libraries already, which saves ten seconds a kill; `torchrun` and `python` start as a user would. Exit code 1 where
anything differs.
"""

import argparse
import importlib
import itertools
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PILES = ROOT / "examples" / "piles"
STEPS, PATIENCE = 10, 30
EXITS: dict[int, int] = {}  # of the processes that have ended
PHASES = ("start", "reference", "step", "save", "end")
FLAGS = ("--model_name", PILES / "sft", "--train_file_path", PILES / "train.parquet", "--eval_size", 4, "--max_steps",
         STEPS, "--save_steps", 2, "--resume_steps", 1, "--eval_steps", 4, "--learning_rate", "1e-3", "--lora_dropout",
         "0.1", "--allow_dropout", "--warmup_steps", 3, "--draw", "false")


def configurations(folder: Path) -> list[dict]:
    """The matrix; precision and full fine-tuning take turns in it."""
    found = []
    for i, (stage, ranks, loss) in enumerate(itertools.product((0, 2, 3), (1, 2), ("sft", "dpo"))):
        settings = folder / f"zero{stage}.json"
        settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        full, bf16 = i % 3 == 1, stage > 0 and i % 4 == 2
        flags = ["--loss", loss, "--deepspeed", settings, "--per_device_train_batch_size", 2,
                 "--gradient_accumulation_steps", 2 // ranks]
        flags += (["--use_lora", "false"] if full else []) + (["--bf16"] if bf16 else [])
        name = f"{loss} zero{stage} {ranks} rank{'s' * (ranks > 1)}{' full' * full}{' bf16' * bf16}"
        found.append({"name": name, "ranks": ranks, "flags": flags, "folder": folder / name.replace(" ", "-")})
    return found


def command(config: dict, run: str) -> list[str]:
    # Each of the two runs has its own references: a cache would leave nothing to kill there.
    folder = config["folder"]
    return [str(x) for x in (*FLAGS, *config["flags"], "--output_dir", folder / run, "--cache_dir",
                             folder / f"{run}-cache")]


def start(config: dict, run: str, launcher: str) -> list[int]:
    """The process ids of the ranks, or of the launcher, each the head of its own group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    log = config["folder"] / f"{run}.log"
    EXITS.clear()
    if launcher == "fork":
        argv = [str(ROOT / "train.py"), *command(config, run)]
        return [fork(argv, log, rank, config["ranks"], port) for rank in range(config["ranks"])]
    head = [sys.executable]
    if launcher == "torchrun":
        head += ["-m", "torch.distributed.run", "--nproc_per_node", str(config["ranks"]), "--master_port", port]
    with log.open("a") as out:
        return [subprocess.Popen([*head, str(ROOT / "train.py"), *command(config, run)], stdout=out, stderr=out,
                                 start_new_session=True, env=os.environ | {"PYTHONPATH": str(ROOT)}).pid]


def fork(argv: list[str], log: Path, rank: int, world: int, port: str) -> int:
    """A rank that runs the script argv[0], made from this process and what it has imported."""
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
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:  # whatever it was, this copy of the harness ends here
        if (error := sys.exception()) and not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def phase_of(config: dict, run: str) -> str:
    """What a run is doing, as its folder shows it."""
    folder = config["folder"] / run
    if any(folder.glob(".*.partial")) or any(folder.glob("resume/.*.partial")):
        return "save"
    if not (folder / "run.json").exists():
        return "start"
    if (folder / f"checkpoint-{STEPS}").exists():
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
    pids, began = start(config, "killed", launcher), time.monotonic()
    folder = config["folder"] / "killed"
    lines = count_lines(folder)
    if dice["phase"] == "start":
        wait_until(pids, lambda: time.monotonic() - began > dice["delay"] * (1.5 if launcher == "fork" else 8))
    else:
        more = lines + dice["steps"]
        wait_until(pids, lambda: phase_of(config, "killed") == dice["phase"]
                   and (dice["phase"] not in ("step", "save") or count_lines(folder) >= more))
        time.sleep(dice["delay"] * {"save": 0.01, "end": 0.02, "reference": 0.3}.get(dice["phase"], 0.1))
    if None not in ended(pids):
        return finish_off(config, pids) or None
    observed = phase_of(config, "killed")
    victims = pids if dice["all"] else [draw.choice(pids)]
    for pid in victims:
        try:
            os.killpg(pid, dice["signal"])
        except ProcessLookupError:
            pass
    hit = time.monotonic()
    wait_until(pids, lambda: None not in ended(pids), 5)
    told = [pid for pid, code in zip(pids, ended(pids)) if code is None and launcher == "fork"]
    for pid in told:  # what a launcher does that has lost a rank
        os.killpg(pid, signal.SIGTERM)
    wait_until(pids, lambda: None not in ended(pids), PATIENCE - 5)
    seconds, hanging = time.monotonic() - hit, [pid for pid, code in zip(pids, ended(pids)) if code is None]
    for pid in hanging:
        os.killpg(pid, signal.SIGKILL)
    wait_until(pids, lambda: None not in ended(pids))
    return {"config": config["name"], "phase": observed, "signal": dice["signal"].name, "all": dice["all"],
            "seconds_to_end": round(seconds, 2), "told": bool(told), "hung": bool(hanging), "exit_codes": ended(pids),
            "step": count_lines(folder)}


def finish_off(config: dict, pids: list[int]) -> None:
    codes = ended(pids)
    if any(codes):
        log = (config["folder"] / "killed.log").read_text()
        raise SystemExit(f"{config['name']}: did not go on, exit codes {codes}\n{log[-3000:]}")


def wait_until(pids: list[int], true, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not true() and None in ended(pids) and time.monotonic() < end:
        time.sleep(0.001)


def count_lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two runs' folders: names of files, and steps and columns of metrics.jsonl."""
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


def roll(draw: random.Random) -> dict:
    return {"phase": draw.choice(PHASES), "all": draw.random() < 0.5, "delay": draw.random(),
            "steps": draw.randrange(1, 6), "signal": signal.SIGTERM if draw.random() < 0.15 else signal.SIGKILL}


def try_one(config: dict, kills: int, launcher: str, draw: random.Random) -> tuple[list[dict], list[str]]:
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
            hit = disturb(config, launcher, draw, roll(draw)) if len(hits) < kills else None
            if hit is None and not (run / "run.json").exists() or len(hits) >= kills:
                pids = start(config, "killed", launcher)
                wait_until(pids, lambda: None not in ended(pids))  # noqa: B023
                finish_off(config, pids)
            hits += [hit] if hit else []
            record = run / "run.json"
            done = record.exists() and json.loads(record.read_text()).get("finished", False)
        found += differences(config["folder"] / "undisturbed", run)
    return hits, found


def warm_up() -> None:
    """Imports what train.py will, so that the ranks made by fork need not."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.path.insert(0, str(ROOT))
    for name in ("torch", "transformers", "peft", "deepspeed", "datasets", "safetensors.torch", "tqdm"):
        importlib.import_module(name)
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM  # noqa: F401, its parts are imported by use


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=("fork", "python", "torchrun"), default="fork")
    parser.add_argument("--only", default="", help="configurations whose name holds this word")
    parser.add_argument("--minutes", type=float, default=60, help="stop after the configuration that takes longer")
    parser.add_argument("--output", default=None, help="JSON of every kill")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if args.launcher == "fork":
        warm_up()
    draw, hits, wrong, began = random.Random(args.seed), [], {}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        configs = [config for config in configurations(Path(folder)) if args.only in config["name"]]
        if args.launcher == "python":
            configs = [config for config in configs if config["ranks"] == 1]
        for i, config in enumerate(configs):
            config["folder"].mkdir()
            pids = start(config, "undisturbed", args.launcher)
            wait_until(pids, lambda: None not in ended(pids))  # noqa: B023
            if any(ended(pids)):
                raise SystemExit(f"{config['name']}: {(config['folder'] / 'undisturbed.log').read_text()[-3000:]}")
            new, found = try_one(config, (args.kills * (i + 1)) // len(configs) - len(hits), args.launcher, draw)
            hits, wrong = hits + new, wrong | {config["name"]: found}
            phases = ", ".join(f"{p} {n}" for p in PHASES if (n := sum(hit["phase"] == p for hit in new)))
            print(f"{config['name']:<28} {len(new):>3} kills ({phases}), {len(found)} differences", flush=True)
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
