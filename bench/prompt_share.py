"""Measures the gain of sharing a prompt and of leaving out padding: training steps in three layouts of the same pairs.

    python bench/prompt_share.py                          prompts of 5, 30 and 60% of a sequence
    python bench/prompt_share.py --model_name M --length 1024

shared: as in training, each prompt once, no padding. alone: packed, each response with a prompt of its own. padded: one
sequence a line, as long as the longest. Responses are ragged: the shorter side of a pair has half the longer's tokens.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import contenders
import measure

WAYS = ("nanodpo", "alone", "padded")  # of contenders.py; nanodpo shares prompts


def ragged_pairs(count: int, length: int, share: float, vocabulary: int) -> list[contenders.Pair]:
    """Pairs whose longer sequence has `length` tokens, `share` of them prompt; sides take turns at being shorter."""
    prompt = max(1, round(length * share))
    sides = [length - prompt, (length - prompt) // 2]
    pairs = contenders.random_pairs(count, prompt, *sides, vocabulary)
    return [(prompt, *(ys if i % 2 else ys[::-1])) for i, (prompt, *ys) in enumerate(pairs)]


def contest(args, share: float) -> dict:
    model = args.model_name or contenders.tiny_wide(args.hidden, vocabulary=args.vocabulary)
    pairs = ragged_pairs(args.pairs * (args.rounds + 1), args.length, share, args.vocabulary)
    work = contenders.Work(pairs, model, batch=args.pairs)
    workers = {name: measure.Worker(contenders.build, args.threads, name=name, work=work) for name in WAYS}
    results = measure.contest(workers, [("step", k) for k in range(args.rounds + 1)])
    for found in results.values():
        found["first_loss"] = found.pop("values")[0][0]
    losses = [one["first_loss"] for one in results.values()]
    if max(losses) - min(losses) > 1e-5:
        raise SystemExit(f"void: the layouts' losses are {losses}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", help="folder or hub id; default: a random model of --hidden")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--share", type=float, nargs="*", default=[0.05, 0.3, 0.6])
    parser.add_argument("--length", type=int, default=512, help="tokens of a pair's longer sequence")
    parser.add_argument("--pairs", type=int, default=4, help="in a micro-batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--json", help="default: bench/results/prompt_share.json")
    args = parser.parse_args()
    results, rows = {}, []
    for share in args.share:
        found = results[str(share)] = contest(args, share)
        for name, one in found.items():
            rows.append([f"{share:.0%}", name, measure.show(one["seconds"]), measure.ratio(one, found["padded"]),
                         measure.ratio(one, found["padded"], "cpu_seconds"), one["mib_above_loaded"]])
    header = ["prompt", "layout", "seconds a step", "/ padded", "processor time", "MiB above the model"]
    print(measure.table(header, rows))
    measure.write("prompt_share", args.json, vars(args), results)


if __name__ == "__main__":
    main()
