"""How time and memory of a step grow: with tokens, pairs, the vocabulary and ranks. A table, JSON and a figure.

    python bench/growth.py

One factor moves at a time, on a random Qwen2 of two layers: tokens of a pair's sequence, pairs in a micro-batch, size
of the vocabulary. Plain full-logits DPO stands beside nanodpo. Ranks are whole runs of train.py on the shipped example,
the same 16 pairs a step on 1 rank and on 2, one thread each.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import contenders
import measure

ROOT = Path(__file__).resolve().parent.parent
FACTORS = {"tokens": [256, 512, 1024, 2048, 4096], "pairs": [1, 2, 4, 8],
           "vocabulary": [8_000, 32_000, 128_000, 256_000]}
BASE = {"tokens": 512, "pairs": 1, "vocabulary": 32_000}
LABELS = {"tokens": "tokens of a sequence", "pairs": "pairs in a micro-batch", "vocabulary": "tokens in the vocabulary",
          "ranks": "ranks"}


def point(args, **factor) -> dict:
    """One setting: contender -> seconds and MiB."""
    size = BASE | factor
    response = size["tokens"] - size["tokens"] // 8
    pairs = contenders.random_pairs(size["pairs"], size["tokens"] // 8, response, response, size["vocabulary"])
    work = contenders.Work(pairs, contenders.tiny_wide(args.hidden, vocabulary=size["vocabulary"]), batch=size["pairs"])
    workers = {name: measure.Worker(contenders.build, 1, name=name, work=dataclasses.replace(work))
               for name in ("nanodpo", "plain")}
    return measure.contest(workers, [("step", k) for k in range(args.rounds + 1)])


def ranks(count: int, steps: int) -> dict:
    """train.py on the shipped example: seconds a step, and MiB of the first rank's process, all it loaded included."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port",
                   str(29_600 + count), str(ROOT / "train.py"), "--max_steps", str(steps), "--eval_steps", "0",
                   "--save_steps", "0", "--per_device_train_batch_size", str(16 // count), "--output_dir",
                   f"{folder}/run", "--cache_dir", f"{folder}/cache"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"train.py on {count} ranks failed:\n{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "perf/step_seconds" in line]
    return {"nanodpo": {"seconds": measure.spread([line["perf/step_seconds"] for line in lines[1:]]),
                        "peak_mib": round(lines[-1]["mem/peak_gib"] * 1024)}}


def draw(results: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(results), figsize=(3 * len(results), 5), squeeze=False)
    for column, (factor, points) in enumerate(results.items()):
        # Processor time where there is one process; several ranks wait for each other, so theirs is the wall's.
        seconds = ("seconds", "seconds a step") if factor == "ranks" else ("cpu_seconds", "processor seconds a step")
        memory = ("peak_mib", "MiB of rank 0, all included") if factor == "ranks" else ("mib_above_loaded", "MiB")
        for line, (key, label) in enumerate((seconds, memory)):
            axis = axes[line][column]
            for name, marker in (("nanodpo", "o-"), ("plain", "s--")):
                own = [(x, one[name]) for x, one in points.items() if name in one]
                values = [one[key]["median"] if key == seconds[0] else one[key] for _, one in own]
                if own:
                    axis.plot([x for x, _ in own], values, marker, label=name, markersize=4)
            axis.set_xlabel(LABELS[factor])
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
            if factor == "ranks":
                axis.set_xticks(list(points))
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    for kind in ("png", "svg"):
        figure.savefig(file.with_suffix(f".{kind}"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", nargs="*", choices=[*FACTORS, "ranks"], default=[*FACTORS, "ranks"])
    parser.add_argument("--most", type=float, default=float("inf"), help="leave out larger values of any factor")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of the runs with ranks")
    parser.add_argument("--json", help="default: bench/results/growth.json, the figure beside it")
    args = parser.parse_args()
    results, rows = {}, []
    for factor in args.factors:
        values = [value for value in FACTORS.get(factor, [1, 2]) if value <= args.most]
        results[factor] = {x: ranks(x, args.steps) if factor == "ranks" else point(args, **{factor: x}) for x in values}
        for x, one in results[factor].items():
            rows += [[factor, f"{x:,}", name, measure.show(own["seconds"]),
                      own["peak_mib" if factor == "ranks" else "mib_above_loaded"]]
                     for name, own in one.items()]
    print(measure.table(["factor", "value", "contender", "seconds a step", "MiB"], rows))
    file = Path(args.json) if args.json else measure.RESULTS / "growth.json"
    measure.write("growth", args.json, vars(args) | {"base": BASE}, results)
    draw(results, file)


if __name__ == "__main__":
    main()
