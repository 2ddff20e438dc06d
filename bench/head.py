"""The output layer alone: hidden states in, log-probs out, the gradient back. Time, and memory above the inputs.

    python bench/head.py                                  1k to 8k tokens, V = 32k, 152k and 256k, hidden size 896
    python bench/head.py --tokens 10000 20000 --vocabulary 151936 --only nanodpo

Contenders: nanodpo's LogProbHead; torch's own linear and cross_entropy, which hold (tokens, V); TRL's chunked function
where TRL is installed, asked for log-probs alone. All must give the same mean log-prob and the same norm of the
gradient. A contender that would need more than --limit GiB is left out, which is said.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import measure

TOLERANCE = 1e-4  # relative: of the mean log-prob, and of the gradient's norm


class Head:
    """A frozen layer, hidden states with a gradient, random targets: the same for all."""

    def __init__(self, name: str, tokens: int, vocabulary: int, width: int, dtype: torch.dtype):
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(width, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
        self.hidden = torch.randn(tokens, width, dtype=dtype).requires_grad_()
        self.targets = torch.randint(vocabulary, (tokens,))
        self.call = getattr(self, name)
        if name == "nanodpo":
            from nanodpo.core.logprobs import LogProbHead

            self.head = LogProbHead(self.layer)
        elif name == "trl":
            from trl.kernels import ChunkedLogProbFunction

            self.chunked = ChunkedLogProbFunction

    def nanodpo(self):
        return self.head(self.hidden, self.targets)

    def torch(self):
        logits = self.layer(self.hidden)
        return -torch.nn.functional.cross_entropy(logits.float(), self.targets, reduction="none")

    def trl(self):  # a tile of 32,768 tokens of the vocabulary is what its trainers use
        return self.chunked.apply(self.hidden, self.layer.weight, None, self.targets, 1.0, 32768, None, 1.0, ())[0]

    def step(self):
        """Forward and backward; (mean log-prob, norm of the gradient)."""
        self.hidden.grad = None
        logps = self.call()
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        return logps.detach().mean().item(), self.hidden.grad.norm().item()


def gib_needed(name: str, tokens: int, vocabulary: int) -> float:
    """Logits, their log_softmax and the gradients of both, for torch; next to nothing for the others."""
    return (3 if name == "torch" else 0) * tokens * vocabulary * 4 / 2**30


def contest(names: list[str], args, tokens: int, vocabulary: int) -> dict:
    can = [name for name in names if gib_needed(name, tokens, vocabulary) <= args.limit]
    workers = {name: measure.Worker(Head, args.threads, name=name, tokens=tokens, vocabulary=vocabulary,
                                    width=args.hidden, dtype=torch.float32) for name in can}
    results = measure.contest(workers, [("step",)] * (args.rounds + 1))
    for name, found in results.items():
        found["values"] = found["values"][0]
        for value, other in zip(found["values"], results[can[0]]["values"]):
            if abs(value / other - 1) > TOLERANCE:
                raise SystemExit(f"void: {name} gives {value}, {can[0]} {other}")
    return {name: results.get(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[32_000, 151_936, 256_000])
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--only", nargs="*", help="contenders; default: nanodpo, torch, and trl where installed")
    parser.add_argument("--limit", type=float, default=8.0, help="GiB that a contender may need")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--json", help="default: bench/results/head.json")
    args = parser.parse_args()
    names = args.only or ["nanodpo", "torch"] + ["trl"] * (measure.can_run("trl"))
    results, rows = {}, []
    for vocabulary in args.vocabulary:
        for tokens in args.tokens:
            found = results[f"{vocabulary} {tokens}"] = contest(names, args, tokens, vocabulary)
            for name, one in found.items():
                line = [measure.show(one["seconds"]), measure.ratio(one, found["nanodpo"], "cpu_seconds"),
                        one["mib_above_loaded"]] if one else [f"over {args.limit:g} GiB", "-", "-"]
                rows.append([f"{vocabulary:,}", f"{tokens:,}", name, *line])
                print(rows[-1], flush=True)
    print(measure.table(["vocabulary", "tokens", "head", "seconds", "processor time / nanodpo's",
                         "MiB above the inputs"], rows))
    measure.write("head", args.json, vars(args), results)


if __name__ == "__main__":
    main()
