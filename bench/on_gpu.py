"""Shows all that a machine with a GPU can, unattended, in one table and one JSON file.

    python bench/on_gpu.py                          needs CUDA and no network
    python bench/on_gpu.py --minutes 90 --model_name M --train_file_path D      a real model and its pairs as well
    python bench/on_gpu.py --parts resumed scored   some parts alone
    python bench/on_gpu.py --toy                    the same on CPU at toy size, to see that it runs

Parts that compare numbers run beside one another, on one GPU, then those that measure, each alone. A part that fails,
or takes longer than what is left of --minutes, is named, and the others go on. Where a number was counted before it
was measured, both stand side by side. The table and the JSON file are written after every part, and what a failed
command said goes to a file beside them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ("loss", "logps/chosen", "logps/rejected", "grad_norm")
STEPS = 12  # of a run that is compared with another one, but for the default run


class Failed(Exception):
    """A part did not do what it should; says in a line what it did."""


class Parts:
    """Each method that BESIDE or ALONE names is a part: it returns (what was measured, what was counted), in words."""

    def __init__(self, args, folder: Path, log: Path):
        self.args, self.folder, self.log, self.end = args, folder, log, time.monotonic() + 60 * args.minutes
        self.below = []
        self.lock = threading.Lock()

    def call(self, *argv, cpu: bool = False, good: tuple = (0,), until=None) -> str:
        """Runs a command; returns what it printed. `until`: the command is killed once this returns true. Raises
        Failed, also where it ended before."""
        env = os.environ | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"} if cpu else {})
        left = max(1.0, self.end - time.monotonic())
        process, killed = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE, text=True, start_new_session=True), []
        if until:
            threading.Thread(target=kill_when, args=(process, until, killed), daemon=True).start()
        try:
            out, err = process.communicate(timeout=left)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            process.communicate()
            raise Failed(f"stopped after {left:.0f} s: --minutes were over") from error
        if until and not killed:
            raise Failed(f"ended before it could be killed: exit code {process.returncode}")
        if process.returncode not in good and not killed:
            with self.lock, self.log.open("a") as log:
                print(*argv, f"\nexit code {process.returncode}", out[-4000:], err[-6000:], "", sep="\n", file=log)
            said = (err.strip() or out.strip() or "nothing").splitlines()[-1]
            raise Failed(f"exit code {process.returncode}: {said[:200]}")
        return out

    def train(self, name: str, *flags, cpu: bool = False, stage: dict | None = None, until=None,
              steps: int | None = STEPS) -> "Ran":
        """A run of train.py, or what there is of it once `until` was true."""
        more = ["--max_steps", steps] if steps else []
        if self.args.toy:
            more = ["--max_steps", 2, "--eval_file_path", "", "--eval_steps", 0]
        if stage:
            file = self.folder / f"{name}.json"
            file.write_text(json.dumps({"zero_optimization": stage}))
            more += ["--deepspeed", file]
        folder, began = self.folder / name, time.monotonic()
        self.call(ROOT / "train.py", "--output_dir", folder, "--cache_dir", self.folder / f"{name}-cache",
                  "--draw", "false", *more, *flags, cpu=cpu, until=until)
        return Ran(folder, time.monotonic() - began)

    def tests(self):
        some = ["tests/core/test_attention.py"] if self.args.toy else []
        said = self.call("-m", "pytest", "-m", "gpu", "-n", "0", *some, good=(0, 5))
        return said.strip().splitlines()[-1].strip("= "), ""

    def default_run(self):
        here, there = self.train("default", steps=None), self.train("default-cpu", cpu=True, steps=None)
        return (f"{apart(here, there)}; {here.seconds:.0f} s, CPU {there.seconds:.0f} s ({here.facts['device']})",
                "the CPU's, to float32")

    def bfloat16(self):
        here, there = self.train("bf16", "--bf16"), self.train("bf16-cpu", "--bf16", cpu=True)
        if not self.args.toy and "varlen" not in here.facts["attention"]:
            raise Failed(f"attention is {here.facts['attention']}, not the varlen kernel")
        return (f"{apart(here, there)}; attention {here.facts['attention']}",
                f"5e-3, 1e-2, 7e-2, 3e-2: what products in bfloat16 do on a CPU; noise of a pair {noise(here.facts)}")

    def full(self):
        same = ["--use_lora", "false", "--learning_rate", "1e-5"]
        here, there = self.train("full", *same), self.train("full-cpu", *same, cpu=True)
        return apart(here, there), "the CPU's, to float32"

    def full_bf16(self):
        """A CPU multiplies trained weights in float32 even so."""
        same = ["--use_lora", "false", "--learning_rate", "1e-5", "--bf16"]
        here, there = self.train("full-bf16", *same), self.train("full-bf16-cpu", *same, cpu=True)
        return apart(here, there), f"what products in bfloat16 do; noise of a pair {noise(here.facts)}"

    def sft(self):
        same = ["--loss", "sft", "--bf16"]
        here, there = self.train("sft", *same), self.train("sft-cpu", *same, cpu=True)
        return apart(here, there), "the CPU's, to bfloat16's rounding"

    def real_model(self):
        if not self.args.model_name:
            return "left out: no --model_name", ""
        flags = ["--model_name", self.args.model_name, "--eval_file_path", "", "--bf16",
                 "--per_device_train_batch_size", "1", "--max_length", "2048", "--overlong", "truncate"]
        flags += ["--train_file_path", self.args.train_file_path] if self.args.train_file_path else []
        here, there = self.train("real", *flags, steps=2), self.train("real-cpu", *flags, steps=2, cpu=True)
        return (f"{apart(here, there)}; {here.seconds:.0f} s, CPU {there.seconds:.0f} s",
                f"noise of a pair {noise(here.facts)}")

    def by_need(self):
        limit = "0.001" if self.args.toy else "-1"
        one = self.train("need-full", "--bf16", "--gradient_checkpointing")
        two = self.train("need-room", "--bf16", "--activation_memory", limit)
        return f"{apart(one, two)} between --gradient_checkpointing and --activation_memory", "0"

    def stages(self):
        plain, *others = (self.train(f"stage-{k}", stage={"stage": k}) for k in range(4))
        return "; ".join(f"stage {k} {apart(plain, one)}" for k, one in enumerate(others, 1)), "0, to float32"

    def offload(self):
        cpu = {"device": "cpu", "pin_memory": not self.args.toy}
        plain = self.train("offload-none", stage={"stage": 3})
        found = [self.train(f"offload-{stage}", stage={"stage": stage, "offload_optimizer": cpu} | more)
                 for stage, more in ((2, {}), (3, {"offload_param": cpu}))]
        return "; ".join(f"stage {stage} {apart(plain, one)}" for stage, one in zip((2, 3), found)), "0, to float32"

    def resumed(self, *flags):
        """A run that nothing disturbs, the same again, and one that is killed and goes on."""
        name, flags = "-".join(("resumed", *flags)), [*flags, "--resume_steps", 1 if self.args.toy else 3]
        one, two = (self.train(f"{name}-{k}", *flags) for k in "ab")
        killed = self.folder / f"{name}-killed"
        self.train(killed.name, *flags, until=lambda: lines_in(killed) >= (1 if self.args.toy else 8))
        three = self.train(killed.name, *flags)
        return (f"again {same_bytes(one, two)}, {apart(one, two)}; killed and resumed {same_bytes(one, three)}, "
                f"{apart(one, three)}", "the same bytes")

    def resumed_bf16(self):
        return self.resumed("--bf16")

    def scored(self, *flags):
        """A run's last checkpoint, scored on the GPU and on the CPU."""
        run, tables = self.train("-".join(("scored", *flags)), *flags), []
        for cpu in (False, True):
            place = self.folder / f"{run.folder.name}-{cpu}"
            self.call(ROOT / "score.py", run.folder / f"checkpoint-{run.facts['steps']}", "--responses", "chosen",
                      "rejected", "--output_dir", place, cpu=cpu)
            tables.append(logps_of(place / "scores.parquet"))
        if tables[0].keys() != tables[1].keys():
            raise Failed("other rows were scored on the GPU than on the CPU")
        most = max(abs(tables[0][key] - value) for key, value in tables[1].items())
        return f"{len(tables[0])} responses, most apart {most:.1e} nats", "the CPU's, to the rounding of each"

    def scored_bf16(self):
        return self.scored("--bf16")

    def gradients(self):
        """score.py's gradients of pairs, with the layers computed again and without."""
        import pyarrow.parquet

        run, tables, rows = self.train("graded", "--bf16"), [], self.folder / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(ROOT / "examples/piles/test.parquet").slice(0, 20), rows)
        for more in ([], ["--gradient_checkpointing"]):
            place = self.folder / f"graded-{len(tables)}"
            self.call(ROOT / "score.py", run.folder / f"checkpoint-{run.facts['steps']}", "--gradients", *more,
                      "--responses", "chosen", "rejected", "--dataset_path", rows, "--output_dir", place)
            tables.append(read_table(place / "pairs.parquet"))
        one, two = ([row["grad_dot"] for row in rows] for rows in tables)
        return (f"{len(one)} pairs, most apart {max(abs(a / b - 1) for a, b in zip(one, two, strict=True)):.1e} of the "
                "inner product", "0: the same bits")

    def bits(self):
        """4 and 8 bits a number, trained, and merged at the end."""
        if not measure.can_run("bitsandbytes"):
            return "left out: bitsandbytes is not installed", ""
        found = []
        for name in ("load_in_4bit", "load_in_8bit"):
            flags = f"--{name}", "--merge_weights"
            found.append(f"{name} {apart(self.train(name, *flags), self.train(f'{name}-cpu', *flags, cpu=True))}")
        return "; ".join(found), "the CPU's, to float32, but for how a matrix is quantised there"

    def launcher(self):
        """DeepSpeed's own, as the README's first command has it; over NCCL, though of one rank."""
        folder, steps = self.folder / "launched", 2 if self.args.toy else 4
        self.call("-m", "deepspeed.launcher.runner", "--num_gpus", 1, ROOT / "train.py", "--output_dir", folder,
                  "--cache_dir", self.folder / "launched-cache", "--draw", "false", "--max_steps", steps)
        alone = self.train("alone", steps=steps)
        return f"{apart(Ran(folder, 0), alone)} from plain python", "0"

    def rows(self):
        toy = ["--toy"] if self.args.toy else []
        self.call(ROOT / "bench" / "gpu.py", "--count", *toy, "--json", self.folder / "count.json")
        found = json.loads((self.folder / "count.json").read_text())["results"]["rows"]
        longest = ", ".join(f"{mode} {one['longest_row']:,}" for mode, one in found.items())
        return "see the next line", f"{longest} tokens"

    def contest(self):
        """gpu.py's whole table goes below this one, and layer.py's."""
        toy = ["--toy", "--pairs", "2"] if self.args.toy else []
        file = self.folder / "gpu.json"
        more = ["--only", *self.args.only] if self.args.only else []
        said = self.call(ROOT / "bench" / "gpu.py", *toy, "--rounds", self.args.rounds, *more, "--json", file)
        self.below.append(said[said.index("| contender"):])
        found = json.loads(file.read_text())["results"]
        longest = max((int(n) for n, one in found["longest_pair"].items() if isinstance(one, dict)), default=0)
        return (f"ceiling {found['ceiling'] / 1e12:.3g} TFLOP/s; longest pair 2 x {longest:,} tokens",
                "peaks in brackets below")

    def layer(self):
        said = self.call(ROOT / "bench" / "layer.py", *["--toy"] * self.args.toy, "--json", self.folder / "layer.json")
        self.below.append(said[said.index("| part"):])
        return "see below", ""


BESIDE = {"tests marked gpu": Parts.tests, "default run, against the CPU's": Parts.default_run,
          "the same with --bf16, the varlen kernel": Parts.bfloat16, "all weights": Parts.full,
          "all weights, --bf16": Parts.full_bf16, "SFT, --bf16": Parts.sft,
          "a real model, --bf16": Parts.real_model, "--activation_memory": Parts.by_need, "ZeRO 1, 2, 3": Parts.stages,
          "offloading, pinned": Parts.offload, "again, killed and resumed": Parts.resumed,
          "the same with --bf16": Parts.resumed_bf16, "scored, against the CPU's": Parts.scored,
          "scored, --bf16": Parts.scored_bf16, "gradients of pairs, layers computed again": Parts.gradients,
          "4 and 8 bits": Parts.bits, "DeepSpeed's launcher": Parts.launcher,
          "longest rows": Parts.rows}
ALONE = {"against TRL": Parts.contest, "parts of a step": Parts.layer}


class Ran:
    """A run folder as a finished command left it."""

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds = folder, seconds
        file = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        self.lines = [line for line in lines if "loss" in line]
        self.facts = json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else {}


def lines_in(folder: Path) -> int:
    """Of metrics.jsonl: steps that are done."""
    file = folder / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def kill_when(process: subprocess.Popen, ready, killed: list) -> None:
    """Kills the process, as losing a machine would, once ready() is true, and puts it into `killed`."""
    while process.poll() is None:
        if ready():
            killed.append(process)
            return os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.02)


def same_bytes(one: Ran, other: Ran) -> str:
    """Whether the last adapters of two runs are the same, in words."""
    name = f"checkpoint-{one.facts['steps']}/adapter_model.safetensors"
    same = (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
    return "the same bytes" if same else "other bytes"


def logps_of(file: Path) -> dict[tuple, float]:
    """Of each response in a table of scores: its log-prob, by what names it."""
    return {tuple(row[name] for name in ("step", "dataset", "row", "response")): row["logps"]
            for row in read_table(file)}


def read_table(file: Path) -> list[dict]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(file).to_pylist()


def apart(one: Ran, other: Ran) -> str:
    """The largest distance between two runs' numbers, by name, over all steps. Raises Failed for other steps."""
    if len(one.lines) != len(other.lines) or not one.lines:
        raise Failed(f"{len(one.lines)} steps, and {len(other.lines)} steps")
    found = {name: max(abs(a[name] - b[name]) for a, b in zip(one.lines, other.lines))
             for name in NUMBERS if name in one.lines[0]}
    return "distance of " + ", ".join(f"{name} {value:.1e}" for name, value in found.items())


def noise(facts: dict) -> str:
    """The noise of a pair's numbers by rounding, as run.json has it, in words."""
    return ", ".join(f"{name} {value:.1e}" for name, value in (facts.get("noise") or {}).items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size on CPU: a check of this program, no measurement")
    parser.add_argument("--minutes", type=float, default=120, help="for all parts together")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // 3),
                        help="parts that run at one time, of those that measure no time")
    parser.add_argument("--parts", nargs="*", choices=[name_of(part) for part in (BESIDE | ALONE).values()],
                        metavar="PART", help="default: all; a wrong one lists them")
    parser.add_argument("--rounds", type=int, default=3, help="of bench/gpu.py")
    parser.add_argument("--model_name", help="a folder with a real model, for the part that compares it with the CPU")
    parser.add_argument("--train_file_path", help="pairs for that model")
    parser.add_argument("--only", nargs="*", help="contenders of bench/gpu.py")
    parser.add_argument("--json", help="default: bench/results/on_gpu.json; the table goes beside it, as .md")
    args = parser.parse_args()
    import torch

    if not args.toy and not torch.cuda.is_available():
        sys.exit("bench/on_gpu.py: no CUDA device here; --toy runs the same code on CPU at toy size, without measuring")
    file, found, text = Path(args.json or measure.RESULTS / "on_gpu.json"), {}, ""
    log = file.with_suffix(".log")
    log.unlink(missing_ok=True)
    with TemporaryDirectory() as place:
        parts = Parts(args, Path(place), log)
        for group, workers in ((BESIDE, args.workers), (ALONE, 1)):
            chosen = {name: part for name, part in group.items() if name_of(part) in (args.parts or [name_of(part)])}
            with ThreadPoolExecutor(workers) as pool:
                begun = {pool.submit(outcome, part, parts): name for name, part in chosen.items()}
                for future in as_completed(begun):
                    found[begun[future]] = future.result()
                    text = report(file, args, parts, found)
    print(text)
    return int(any(one["result"] != "ran" for one in found.values()))


def name_of(part) -> str:
    return part.__name__


def outcome(part, parts: Parts) -> dict:
    """Calls a part; returns what it found, or why it did not."""
    began, one = time.monotonic(), {"result": "ran", "measured": "", "counted": ""}
    try:
        if began > parts.end:
            raise Failed("not begun: --minutes were over")
        one["measured"], one["counted"] = part(parts)
    except (Failed, OSError, ValueError, LookupError, TypeError) as error:  # the others may do better
        one["result"] = f"FAILED: {error}"
    return one | {"seconds": time.monotonic() - began}


def report(file: Path, args, parts: Parts, found: dict) -> str:
    """Writes the table and the JSON file; returns the table."""
    rows = [[name, (one := found[name])["result"], f"{one['seconds']:.0f}", one["measured"], one["counted"]]
            for name in (*BESIDE, *ALONE) if name in found]
    text = "TOY SIZE ON CPU: a check of the program, no measurement\n\n" * args.toy + measure.table(
        ["part", "result", "seconds", "measured", "counted"], rows) + "\n\n" + "\n".join(parts.below)
    measure.write("on_gpu", str(file), vars(args), {"toy": args.toy, "parts": found})
    file.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    sys.exit(main())
