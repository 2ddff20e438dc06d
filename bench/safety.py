"""Measures the cost of safety: seconds and bytes of a checkpoint and of a state to resume from, and its share of a
step.

    python bench/safety.py                                          the default run, its first 60 steps
    python bench/safety.py --model_name M --train_file_path D ...   any flags of train.py
    torchrun --nproc_per_node=2 bench/safety.py ...
    python bench/safety.py --json FILE ...

Runs train.py in a folder that is removed, with a state before every other step and a checkpoint every twenty. A save
is timed whole: gathering, writing, flushing, reading back, hashing, renaming. What safety does within a step is timed
call by call: asking all ranks whether to stop (the answer of several waits for the last of them, as the gradients
would), remembering what is not finite, keeping the random numbers, handing a line of metrics to the system. Its share
of a step is the sum of these, those of evaluations included, over the time of the steps alone. And since writing could
slow down what comes after it, the speed of steps right after a save is compared with that of the others, as medians of
tokens a second.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from nanodpo.errors import run_script
from nanodpo.folder import state
from nanodpo.ranks import distributed
from nanodpo.run import guards, lifecycle

FLAGS = {"--max_steps": "60", "--resume_steps": "2", "--save_steps": "20", "--eval_steps": "0", "--draw": "false"}
# Where it is, its name, and what it is called in the table.
SAVES = [(lifecycle, "save_checkpoint", "checkpoint"), (lifecycle, "save_state", "state")]
WITHIN = [(distributed, "ask", "asking whether to stop"),
          (guards.StepGuard, "nan_where_nonfinite", "remembering what is not finite"),
          (state, "random_state", "random numbers"),
          (lifecycle, "append_line", "a line of metrics")]


def timed(place, name: str, seconds: dict, key: str) -> None:
    """Every call of place.name adds its time to seconds[key], a list."""
    whole = getattr(place, name)

    def call(*args, **kwargs):
        began = time.perf_counter()
        try:
            return whole(*args, **kwargs)
        finally:
            seconds.setdefault(key, []).append(time.perf_counter() - began)

    setattr(place, name, call)


def weighed(sizes: dict) -> None:
    """sizes["state"] will be the bytes of the last state, which the run's end removes."""
    whole = lifecycle.save_state

    def call(run):
        whole(run)
        if distributed.is_main() and run.step:
            sizes["state"] = size(run.folder / "resume" / f"step-{run.step}")

    lifecycle.save_state = call


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def report(run: Path, seconds: dict, sizes: dict) -> dict:
    """The measurements by name, seconds each, bytes, shares."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "perf/step_seconds" in line][2:]  # the first ones warm up
    step = statistics.median(line["perf/step_seconds"] for line in lines)
    steps = len(lines) + 2
    sizes["checkpoint"] = size(run / f"checkpoint-{steps}")
    after = [line["perf/tokens_per_second"] for line in lines if line["step"] % 2 == 0]
    others = [line["perf/tokens_per_second"] for line in lines if line["step"] % 2]
    found = {"steps": steps, "step_seconds": step, "after_a_save": statistics.median(after) / statistics.median(others)}
    for _, _, name in SAVES:
        calls = [s for s in seconds[name] if s > 1e-3]  # those that wrote
        found[name] = {"seconds": statistics.median(calls), "most": max(calls), "bytes": sizes[name],
                       "times": len(calls), "steps": statistics.median(calls) / step}
    found["within"] = {name: sum(seconds[name]) / steps for _, _, name in WITHIN if name in seconds}
    found["share"] = sum(found["within"].values()) / step
    return found


def show(found: dict) -> None:
    print(f"a step: {found['step_seconds'] * 1e3:.1f} ms, of which safety {found['share']:.2%}:")
    for name, seconds in found["within"].items():
        print(f"    {name:<32} {seconds * 1e3:8.3f} ms")
    print(f"speed right after a save: {found['after_a_save']:.3f} of the other steps'")
    for _, _, name in SAVES:
        save = found[name]
        print(f"a {name}: {save['seconds'] * 1e3:.1f} ms, as long as {save['steps']:.2f} steps (at most "
              f"{save['most'] * 1e3:.1f}, {save['times']} times), {save['bytes'] / 2**20:.2f} MiB")


def main(argv: list[str]) -> None:
    output = argv.pop(argv.index("--json") + 1) if "--json" in argv else None
    argv = [flag for flag in argv if flag != "--json"]
    for name, value in FLAGS.items():
        argv += [] if name in argv else [name, value]
    seconds, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        for place, name, key in [*SAVES, *WITHIN]:
            timed(place, name, seconds, key)
        weighed(sizes)
        train.main([*argv, "--output_dir", str(run), "--cache_dir", str(Path(folder) / "cache")])
        if distributed.is_main():
            found = report(run, seconds, sizes)
            show(found)
            if output:
                Path(output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_script(main))
