"""Shows all that a machine with a GPU can, unattended, in one table and one JSON file.

    python bench/on_gpu.py                          needs CUDA and no network
    python bench/on_gpu.py --minutes 90 --model_name M --train_file_path D      a real model and its pairs as well
    python bench/on_gpu.py --toy                    the same on CPU at toy size, to see that it runs

A part that fails, or takes longer than what is left of --minutes, is named, and the next one begins. Where a number was
counted before it was measured, both stand side by side. The table and the JSON file are written after every part.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ("loss", "logps/chosen", "logps/rejected")


class Failed(Exception):
    """A part did not do what it should; says in a line what it did."""


class Parts:
    """Each method that PARTS names is a part: it returns (what was measured, what was counted), in words."""

    def __init__(self, args, folder: Path):
        self.args, self.folder, self.end = args, folder, time.monotonic() + 60 * args.minutes
        self.below = ""
        self.steps = ("--max_steps", "2", "--eval_steps", "0", "--eval_file_path", "") if args.toy else ()

    def call(self, *argv, cpu: bool = False, good: tuple = (0,)) -> str:
        """Runs a command; returns what it printed. Raises Failed."""
        env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
        left = max(1.0, self.end - time.monotonic())
        try:
            done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=env, capture_output=True, text=True,
                                  timeout=left)
        except subprocess.TimeoutExpired as error:
            raise Failed(f"stopped after {left:.0f} s: --minutes were over") from error
        if done.returncode not in good:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise Failed(f"exit code {done.returncode}: {said[:200]}")
        return done.stdout

    def train(self, name: str, *flags, cpu: bool = False, settings: dict | None = None) -> tuple:
        """(lines of steps, run.json, seconds) of a run of train.py."""
        more = self.steps
        if settings:
            file = self.folder / f"{name}.json"
            file.write_text(json.dumps({"zero_optimization": settings}))
            more += ("--deepspeed", file)
        began = time.monotonic()
        self.call(ROOT / "train.py", "--output_dir", self.folder / name, "--cache_dir", self.folder / f"{name}-cache",
                  "--draw", "false", *more, *flags, cpu=cpu)
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        facts = json.loads((self.folder / name / "run.json").read_text())
        return [line for line in lines if "loss" in line], facts, time.monotonic() - began

    def tests(self):
        some = ["tests/core/test_attention.py"] if self.args.toy else []
        said = self.call("-m", "pytest", "-m", "gpu", "-n", "0", *some, good=(0, 5))
        return said.strip().splitlines()[-1].strip("= "), ""

    def default_run(self):
        here, facts, seconds = self.train("default")
        there, _, slow = self.train("default-cpu", cpu=True)
        return f"{apart(here, there)}; {seconds:.0f} s, CPU {slow:.0f} s ({facts['device']})", "the CPU's, to float32"

    def bfloat16(self):
        here, facts, _ = self.train("bf16", "--bf16")
        there, _, _ = self.train("bf16-cpu", "--bf16", cpu=True)
        if not self.args.toy and "varlen" not in facts["attention"]:
            raise Failed(f"attention is {facts['attention']}, not the varlen kernel")
        return f"{apart(here, there)}; attention {facts['attention']}", f"noise of a pair {noise(facts)}"

    def real_model(self):
        if not self.args.model_name:
            return "left out: no --model_name", ""
        flags = ["--model_name", self.args.model_name, "--max_steps", "2", "--eval_file_path", "", "--bf16",
                 "--per_device_train_batch_size", "1", "--max_length", "2048", "--overlong", "truncate"]
        flags += ["--train_file_path", self.args.train_file_path] if self.args.train_file_path else []
        here, facts, seconds = self.train("real", *flags)
        there, _, slow = self.train("real-cpu", *flags, cpu=True)
        return f"{apart(here, there)}; {seconds:.0f} s, CPU {slow:.0f} s", f"noise of a pair {noise(facts)}"

    def by_need(self):
        same = ["--bf16", "--gradient_checkpointing"], ["--bf16", "--activation_memory", "0.001" if self.args.toy else
                                                        "-1"]
        (one, *_), (two, *_) = (self.train(f"need-{i}", *flags) for i, flags in enumerate(same))
        return f"{apart(one, two)} between --gradient_checkpointing and --activation_memory", "0"

    def offload(self):
        cpu = {"device": "cpu", "pin_memory": not self.args.toy}
        plain, *_ = self.train("stage-3", settings={"stage": 3})
        found = [self.train(f"offload-{stage}", settings={"stage": stage, "offload_optimizer": cpu} | more)[0]
                 for stage, more in ((2, {}), (3, {"offload_param": cpu}))]
        return "; ".join(f"stage {stage} {apart(plain, one)}" for stage, one in zip((2, 3), found)), "0, to float32"

    def rows(self):
        toy = ["--toy"] if self.args.toy else []
        self.call(ROOT / "bench" / "gpu.py", "--count", *toy, "--json", self.folder / "count.json")
        found = json.loads((self.folder / "count.json").read_text())["results"]["rows"]
        longest = ", ".join(f"{mode} {one['longest_row']:,}" for mode, one in found.items())
        return "see the next line", f"{longest} tokens"

    def contest(self):
        """gpu.py's whole table goes below this one."""
        toy = ["--toy", "--pairs", "2"] if self.args.toy else []
        file = self.folder / "gpu.json"
        more = ["--only", *self.args.only] if self.args.only else []
        said = self.call(ROOT / "bench" / "gpu.py", *toy, "--rounds", self.args.rounds, *more, "--json", file)
        self.below = said[said.index("| contender"):]
        found = json.loads(file.read_text())["results"]
        return (f"ceiling {found['ceiling'] / 1e12:.3g} TFLOP/s; longest pair 2 x {found['longest_pair']:,} tokens",
                "peaks in brackets below")


PARTS = {"tests marked gpu": Parts.tests, "default run, against the CPU's": Parts.default_run,
         "the same with --bf16, the varlen kernel": Parts.bfloat16, "a real model, --bf16": Parts.real_model,
         "--activation_memory": Parts.by_need, "offloading, pinned": Parts.offload, "longest rows": Parts.rows,
         "against TRL": Parts.contest}


def apart(one: list[dict], other: list[dict]) -> str:
    """The largest distance between two runs' numbers, by name, over all steps. Raises Failed for other steps."""
    if len(one) != len(other):
        raise Failed(f"{len(one)} steps, and {len(other)} steps")
    found = {name: max(abs(a[name] - b[name]) for a, b in zip(one, other)) for name in NUMBERS if name in one[0]}
    return "distance of " + ", ".join(f"{name} {value:.1e}" for name, value in found.items())


def noise(facts: dict) -> str:
    """The noise of a pair's numbers by rounding, as run.json has it, in words."""
    return ", ".join(f"{name} {value:.1e}" for name, value in (facts.get("noise") or {}).items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size on CPU: a check of this program, no measurement")
    parser.add_argument("--minutes", type=float, default=120, help="for all parts together")
    parser.add_argument("--rounds", type=int, default=3, help="of bench/gpu.py")
    parser.add_argument("--model_name", help="a folder with a real model, for the part that compares it with the CPU")
    parser.add_argument("--train_file_path", help="pairs for that model")
    parser.add_argument("--only", nargs="*", help="contenders of bench/gpu.py")
    parser.add_argument("--json", help="default: bench/results/on_gpu.json; the table goes beside it, as .md")
    args = parser.parse_args()
    import torch

    if not args.toy and not torch.cuda.is_available():
        sys.exit("bench/on_gpu.py: no CUDA device here; --toy runs the same code on CPU at toy size, without measuring")
    file, found = Path(args.json or measure.RESULTS / "on_gpu.json"), {}
    with TemporaryDirectory() as place:
        parts = Parts(args, Path(place))
        for name, part in PARTS.items():
            began = time.monotonic()
            try:
                if began > parts.end:
                    raise Failed("not begun: --minutes were over")
                measured, counted = part(parts)
                found[name] = {"result": "ran", "measured": measured, "counted": counted}
            except (Failed, OSError, ValueError, LookupError, TypeError) as error:  # the next one may do better
                found[name] = {"result": f"FAILED: {error}", "measured": "", "counted": ""}
            found[name]["seconds"] = time.monotonic() - began
            rows = [[name, one["result"], f"{one['seconds']:.0f}", one["measured"], one["counted"]]
                    for name, one in found.items()]
            text = "TOY SIZE ON CPU: a check of the program, no measurement\n\n" * args.toy + measure.table(
                ["part", "result", "seconds", "measured", "counted"], rows) + f"\n\n{parts.below}"
            measure.write("on_gpu", str(file), vars(args), {"toy": args.toy, "parts": found})
            file.with_suffix(".md").write_text(text)
    print(text)
    return int(any(one["result"] != "ran" for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
