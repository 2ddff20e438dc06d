"""A training step against plain full-logits DPO and TRL: time, and memory above the loaded model. The same pairs, LoRA,
precision and optimizer for all; the losses of the first step must agree, or there is nothing to compare.

    python bench/step.py                                  a tiny model with a vocabulary of 152k, 2 x 512 tokens a pair
    python bench/step.py --model_name M --train_file_path pairs.parquet --max_length 512

TRL takes part where it is installed: pip install -e .[bench]
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import contenders
import measure

# Between contenders at the first step: the loss in nats (TRL adds up sums of 10,000 nats in float32, so to 1e-3, times
# beta), the gradient norm relative.
LOSS_TOLERANCE, NORM_TOLERANCE = 5e-4, 1e-3
SETTINGS = {"cached": {}, "online": {"cached": False},
            "cached, checkpointing": {"checkpointing": "full"}, "cached, 4 pairs": {"batch": 4},
            "online, checkpointing": {"cached": False, "checkpointing": "full"},
            (LONG := "cached, checkpointing, 4 pairs"): {"checkpointing": "full", "batch": 4}}


def contest(names: list[str], work: contenders.Work, rounds: int, threads: int) -> dict:
    """One setting: name -> seconds a step, MiB above the loaded model, first loss and gradient norm."""
    workers = {name: measure.Worker(contenders.build, threads, name=name, work=work) for name in names}
    results = measure.contest(workers, [("step", k) for k in range(rounds + 1)])
    for found in results.values():
        values = found.pop("values")
        found["first_loss"], found["first_norm"] = values[0]
        found["losses"] = [loss for loss, _ in values]
    check_agreement(results)
    return results


def check_agreement(results: dict) -> None:
    first, *others = results.values()
    for name, other in list(results.items())[1:]:
        for what, tolerance in (("first_loss", LOSS_TOLERANCE), ("first_norm", NORM_TOLERANCE)):
            scale = first[what] if what == "first_norm" else 1
            if not abs(other[what] - first[what]) <= tolerance * scale:
                raise SystemExit(f"void: {what} is {first[what]} for {next(iter(results))}, {other[what]} for {name}")
    if abs(first["first_loss"] - 0.6931) < 1e-3:
        raise SystemExit(f"void: a loss of {first['first_loss']:.4f}, ln 2, agrees with anything")


def report(setting: str, results: dict, against: str) -> list[list]:
    rows, base = [], results[against]
    for name, found in results.items():
        memory = found["mib_above_loaded"]
        rows.append([setting, name, measure.show(found["seconds"]), measure.ratio(found, base),
                     measure.ratio(found, base, "cpu_seconds"), memory, f"{memory / base['mib_above_loaded']:.2f}",
                     f"{found['first_loss']:.6f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", help="folder or hub id; default: two layers, a vocabulary of 151,936")
    parser.add_argument("--train_file_path", help="real pairs; default: random ones")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--hidden", type=int, default=64, help="of the tiny model")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=[name for name in SETTINGS if name != LONG],
                        help=f"default: all but {LONG!r}, which takes as long as two others")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--json", help="default: bench/results/step-<model>.json")
    args = parser.parse_args()
    model, spread = args.model_name or contenders.tiny_wide(args.hidden), 0.02 if args.model_name else 0.05
    if args.train_file_path:
        pairs = contenders.real_pairs(args.model_name, args.train_file_path, args.max_length)
    else:  # prompt, chosen and rejected: of 64, 448 and 448 tokens where --max_length is 512
        n = args.max_length
        pairs = contenders.random_pairs(8, n // 8, n - n // 8, n - n // 8, 49_152 if args.model_name else 151_936)
    names = ["nanodpo", "plain"] + ["trl"] * (measure.can_run("trl"))
    results, rows = {}, []
    for setting in args.settings:
        work = contenders.Work(pairs, model, spread=spread, **SETTINGS[setting])
        steps = min(len(pairs) // work.batch, args.rounds + 1)
        work = dataclasses.replace(work, pairs=pairs[: work.batch * steps])
        results[setting] = contest(names, work, args.rounds, args.threads)
        rows += report(setting, results[setting], names[-1])
        header = ["setting", "contender", "seconds a step", f"/ {names[-1]}", "processor time", "MiB above the model",
                  f"/ {names[-1]}", "first loss"]
        print(measure.table(header, rows[-len(names):]), flush=True)
    print(f"\nfirst losses agree to {LOSS_TOLERANCE} nats, gradient norms to {NORM_TOLERANCE} relative\n")
    print(measure.table(header, rows))
    kind = "tiny" if args.model_name is None else Path(args.model_name).name
    measure.write(f"step-{kind}", args.json, vars(args) | {"model": str(model), "pairs": len(pairs)}, results)


if __name__ == "__main__":
    main()
