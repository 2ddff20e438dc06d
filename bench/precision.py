"""Measures what bfloat16 does to the first steps of training: how far the margins are from those in float32, how far
rounding alone moves them, and the costs. The same real pairs, LoRA, learning rate and optimizer for all.

    python bench/precision.py --model_name SmolLM2-135M --train_file_path pairs.parquet
    python bench/precision.py --model_name SmolLM2-135M --train_file_path pairs.parquet --seen 10
                        instead: how much of what an adapter does to 10 other pairs is left in bfloat16

A CPU without bfloat16 instructions multiplies in it many times slower than in float32. Margins are therefore taken
within `Widen`: products of bfloat16 matrices computed in float32 and rounded, which is what the slow kernel does as
well. Time and memory are those of steps without it, on the shortest pair, in a fresh process each, in turns; of what
can be run on this machine.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import contenders
import measure
import torch
from peft.tuners.lora.layer import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

LOW, FULL = torch.bfloat16, torch.float32
# What a row of the table is called: (contender, settings).
ROWS = {"nanodpo, float32": ("nanodpo", {}), "nanodpo --bf16, CPU": ("nanodpo", {"mixed": FULL}),
        "nanodpo --bf16, as on a GPU": ("nanodpo", {"mixed": LOW}), "nanodpo, bfloat16 throughout": (
            "nanodpo", {"dtype": LOW}),
        "trl, float32": ("trl", {}), "trl, float32 weights, autocast": ("trl", {"mixed": LOW}),
        "trl, bfloat16 weights": ("trl", {"dtype": LOW})}
UNTIMED = {"nanodpo --bf16, as on a GPU", "nanodpo, bfloat16 throughout"}  # no flag of train.py does that on a CPU
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
ADDED = torch.ops.aten.addmm_.default  # in place


class Widen(TorchDispatchMode):
    """Products of bfloat16 matrices in float32, rounded once."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in PRODUCTS and any(arg.dtype == LOW for arg in args):
            return op(*(arg.float() for arg in args), **(kwargs or {})).to(LOW)
        if op is ADDED and args[0].dtype == LOW:
            return args[0].copy_(torch.addmm(*(arg.float() for arg in args), **(kwargs or {})))
        return op(*args, **(kwargs or {}))


class Probe:
    """A contender whose steps give their margin."""

    def __init__(self, name: str, work: contenders.Work, widen: bool, rate: float):
        self.mode = Widen() if widen else contextlib.nullcontext()
        contenders.RATE = rate
        with self.mode:
            self.contender = contenders.build(name, work)
        self.start_afresh()

    @torch.no_grad()
    def start_afresh(self) -> None:
        """LoRA as it is before training, the same in every dtype: A random, B zero."""
        for k, (name, p) in enumerate(sorted(self.contender.model.named_parameters())):
            if p.requires_grad:
                draw = torch.Generator().manual_seed(k)
                p.copy_(0.02 * torch.randn(p.shape, generator=draw) * ("lora_A" in name))
        for p, twin in zip(self.contender.trained, self.contender.twins):
            twin.copy_(p)

    def step(self, k: int) -> float:
        """The margin, beta times nats, of the k-th pair before its update; it is read off the DPO loss."""
        with self.mode:
            loss, _ = self.contender.step(k)
        return -torch.tensor(loss, dtype=torch.float64).expm1().log().item()

    def noise(self, k: int) -> float | None:
        """Returns how far the k-th pair's margin moves when the embeddings change by a part in a million; None where
        they hold no such change, or the contender gives no log-probs."""
        work = self.contender.work
        if work.dtype == LOW or not hasattr(self.contender, "logps"):
            return None
        with self.mode, torch.no_grad():
            first = self._margin(k)
            hook = self.contender.model.get_input_embeddings().register_forward_hook(
                lambda module, args, states: states.float() * (1 + 2.0**-20))
            second = self._margin(k)
        hook.remove()
        return second - first

    def _margin(self, k: int) -> float:
        chosen, rejected = self.contender.logps(self.contender.batch(k)).double()[0]
        return contenders.BETA * (chosen - rejected).item()


    def take(self, other: "Probe", peft: bool) -> None:
        """Takes the other's adapter. `peft`: its layers are PEFT's own from now on."""
        its = dict(other.contender.model.named_parameters())
        for name, p in self.contender.model.named_parameters():
            if p.requires_grad:
                p.data.copy_(its[name])
        for layer in self.contender.model.modules():
            if peft and isinstance(layer, LoraLayer):
                vars(layer).pop("forward", None)

    @torch.no_grad()
    def moved(self, pairs: list) -> torch.Tensor:
        """(P, 2): the log-probs of chosen and rejected with the adapter minus those without it, nats."""
        found, one = [], self.contender
        one.model.eval()
        with self.mode:
            for pair in pairs:
                policy = one.logps([pair])
                with one.model.disable_adapter():
                    found.append((policy - one.logps([pair])).double())
        return torch.cat(found)


def seen(work: contenders.Work, others: list, args) -> str:
    """A table of how far an adapter, trained in float32, moves other pairs: its own float32, and in bfloat16."""
    ways = {"float32": FULL, "--bf16, as on a GPU": LOW, "the same with PEFT's layers": LOW}
    probes = {row: Probe("nanodpo", dataclasses.replace(work, mixed=mixed, cached=mixed == FULL), True,
                         args.learning_rate) for row, mixed in ways.items()}
    exact, *_ = probes.values()
    for k in range(args.steps):
        exact.step(k)
    lines, truth = [], exact.moved(others)
    for row, probe in probes.items():
        if probe is not exact:
            probe.take(exact, "PEFT" in row)
        here = probe.moved(others)
        share, off = (here * truth).sum() / truth.square().sum(), (here - truth).square().mean().sqrt()
        lines.append([row, *(f"{x:.2f}" for x in (*here.mean(0), (here[:, 0] - here[:, 1]).mean(), off, share))])
    return measure.table(["products", "chosen moved, nats", "rejected", "their difference", "off, root mean square",
                          "share of float32's"], lines)


def those_that_run(only: list[str] | None) -> list[str]:
    return [row for row in only or ROWS if ROWS[row][0] != "trl" or measure.can_run("trl")]


def follow(work: contenders.Work, args) -> dict[str, dict]:
    """name -> margins of the steps and what rounding moves them by; all contenders at once, since no time is taken."""
    def one(row: str) -> dict:
        name, settings = ROWS[row]
        worker = measure.Worker(Probe, args.threads, name=name, work=dataclasses.replace(work, **settings), widen=True,
                                rate=args.learning_rate)
        moved = [worker.call("noise", k)[0] for k in range(args.steps)]
        found = {"margins": [worker.call("step", k)[0] for k in range(args.steps)],
                 "noise": None if None in moved else math.sqrt(sum(x * x for x in moved) / len(moved))}
        worker.close()
        print(row, found, flush=True)
        return found

    rows = those_that_run(args.only)
    with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:
        found = dict(zip(rows, pool.map(one, rows)))
    truth = next(iter(found.values()))["margins"]
    for line in found.values():
        line["distance"] = [abs(a - b) for a, b in zip(line["margins"], truth)][1:]
    return found


def cost(work: contenders.Work, args) -> dict[str, dict]:
    """name -> seconds of a step and MiB above the loaded model, without `Widen`, in turns."""
    workers = {row: measure.Worker(Probe, args.threads, name=ROWS[row][0], widen=False, rate=args.learning_rate,
                                   work=dataclasses.replace(work, **ROWS[row][1]))
               for row in those_that_run(args.only) if row not in UNTIMED}
    return measure.contest(workers, [("step", k) for k in range(args.rounds + 1)])


def table(results: dict[str, dict], timed: bool) -> str:
    """A line a contender: margins' distances and noise, and where it was timed its time and processor time as ratios to
    the first one's, its peak memory and how much of that is above the loaded model."""
    header, rows = ["contender", "margins' distance from float32, by step", "noise of a pair"], []
    header += ["time / float32", "processor time / float32", "peak MiB", "of it above the model"] * timed
    base = next(iter(results.values()))
    for row, one in results.items():
        cells = [row, " ".join(f"{x:.2g}" for x in one.get("distance", []))]
        cells += ["" if one.get("noise") is None else f"{one['noise']:.2g}"]
        if timed and "seconds" in one:
            cells += [measure.ratio(one, base), measure.ratio(one, base, "cpu_seconds"),
                      one["loaded_mib"] + one["mib_above_loaded"], one["mib_above_loaded"]]
        rows.append(cells + [""] * (len(header) - len(cells)))
    return measure.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True, help="folder or hub id")
    parser.add_argument("--train_file_path", required=True, help="real pairs")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=5, help="0: no margins, and times of pairs of any length")
    parser.add_argument("--rounds", type=int, default=1, help="timed steps, after one that is not; 0: no times")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--seen", type=int, default=0, metavar="N", help="pairs behind those of the steps")
    parser.add_argument("--only", nargs="*", choices=ROWS, metavar="ROW",
                        help="of the table; distances are from the first one's margins")
    parser.add_argument("--json", help="default: bench/results/precision.json")
    args = parser.parse_args()
    pairs = contenders.real_pairs(args.model_name, args.train_file_path, args.max_length)
    work = contenders.Work(pairs[: args.steps or args.rounds + 1], args.model_name)
    if args.seen:
        torch.set_num_threads(args.threads or torch.get_num_threads())
        return print(seen(work, pairs[args.steps : args.steps + args.seen], args))
    results = follow(work, args) if args.steps else {}
    # Slow kernels take minutes for longer ones.
    timed = [min(pairs, key=lambda pair: sum(map(len, pair)))] if args.steps else work.pairs
    costs = cost(dataclasses.replace(work, pairs=timed), args) if args.rounds else {}
    results = {row: results.get(row, {}) | costs.get(row, {}) for row in results or costs}
    print(table(results, bool(costs)))
    tokens = [sum(map(len, pair)) for pair in timed]
    measure.write("precision", args.json, vars(args) | {"timed_tokens": tokens}, results)


if __name__ == "__main__":
    main()
