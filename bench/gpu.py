"""Qwen2.5-7B's shape on one GPU: tokens/s, peak memory, share of the matmul ceiling, and the longest pair that fits.

    python bench/gpu.py                 nanodpo, and TRL where it is installed; needs CUDA and no network
    python bench/gpu.py --count         what a row takes, counted, and how long rows may be; needs no GPU
    python bench/gpu.py --toy           the same code at toy size on CPU, to see that it runs; its numbers mean nothing

Weights are random, the base in bf16, LoRA r=256 on all seven projections in float32, as train.py --bf16 and TRL with
bf16 have them; references cached, AdamW. Pairs have the lengths of reasoning traces (rows.py). TRL has PyTorch's own
attention with padding and its mask: flash-attn may not be there, and kernels from a hub need a network. Every contender
runs with and without checkpointing, nanodpo also with what each row needs, in turn, `--rounds` times; each contender
has a process of its own, and the GPU to itself. A pair that runs out of memory is left out and listed; the pair of 20k
tokens is told apart from the mix. Tokens/s count a pair's own tokens: prompt + chosen, prompt + rejected. `--profile`
says which operations take a step's time.
"""

import argparse
import collections
import dataclasses
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import contenders
import measure
from rows import QWEN_7B, TOY, by_mode, flops, mixed_pairs, show_count, sized, tokens_of

SHORT_OF_MEMORY = ("OutOfMemory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED",
                   "the worker died")  # the operating system's own answer to too much
# nanodpo's operations are deterministic, as in train.py, but in the way that says so; TRL's are not.
LOOSE = ", --deterministic false"
MODES = [("nanodpo", "by need"), ("nanodpo", "by need" + LOOSE), ("nanodpo", "full"), ("nanodpo", "keep"),
         ("trl", "full"), ("trl", "keep")]


class OnDevice:
    """A contender whose steps end when the device has done them, and tell its peak memory."""

    def __init__(self, name: str, work: contenders.Work):
        from nanodpo.ranks.gpu import round_alike, use_expandable_segments

        use_expandable_segments()  # for all contenders, as in training
        self.sure = name == "nanodpo"
        if self.sure:
            round_alike()
        self.cuda, self.short = work.device == "cuda", False
        self.contender = contenders.build(name, work)

    def use(self, checkpointing: str) -> None:
        """From the next step on; the adapter is the one that each way begins with."""
        from nanodpo.ranks.gpu import be_deterministic

        mode, _, loose = checkpointing.partition(",")
        self.contender.recompute_by(mode)
        self.contender.begin()
        torch.use_deterministic_algorithms(False)
        if self.sure and not loose:
            be_deterministic()
        self.short = True

    def step(self, k: int) -> dict | None:
        """Time and memory of the k-th pair's step; None where it ran out of memory."""
        from nanodpo.run.memory import out_of_memory

        if self.short and self.cuda:
            torch.cuda.empty_cache()  # of a pair that did not fit; after others training keeps it too
        self.short = False
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        try:
            loss, _ = self.contender.step(k)  # reads the loss, and so waits for the device
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self.contender.drop_gradients()
            self.short = True
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0
        return {"seconds": time.perf_counter() - began, "loss": loss, "peak_gib": peak,
                "modes": collections.Counter(self.contender.modes(k))}

    def long_pair(self, length: int) -> dict | None:
        """A step on a pair of 2 x `length` tokens; None where it ran out of memory. Its references are 0: they change
        neither memory nor time."""
        part = length // 20
        self.contender.work.pairs = contenders.random_pairs(1, part, length - part, length - part, 1000)
        self.contender.cache = {0: torch.zeros(1, 2, dtype=torch.float64, device=self.contender.work.device)}
        return self.step(0)

    def profile(self, k: int) -> str:
        """The operations that take most of the k-th pair's step."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        with profile(activities=kinds) as seen:
            took = self.step(k)
        by = "self_cuda_time_total" if self.cuda else "self_cpu_time_total"
        return f"{took}\n" + seen.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=70)


def run(worker: measure.Worker | str, work: contenders.Work, checkpointing: str) -> list[dict | None] | str:
    """Every pair once, after a warm-up on the shortest; or why not one of them."""
    if isinstance(worker, str):
        return worker
    try:
        worker.call("use", checkpointing)
        worker.call("step", min(range(len(work.pairs)), key=lambda k: tokens_of(work.pairs[k])))
        return [worker.call("step", k)[0] for k in range(len(work.pairs))]
    except (RuntimeError, OSError) as error:  # the pipe of a process that has died raises the second
        return why(error)


def started(name: str, work: contenders.Work) -> measure.Worker | str:
    """A contender's process, or why there is none."""
    work = dataclasses.replace(work, checkpointing="by need" if name == "nanodpo" else "full")
    try:
        return measure.Worker(OnDevice, resident_memory=False, name=name, work=work)
    except RuntimeError as error:
        return why(error)


def why(error: Exception) -> str:
    """Words for the table: the others go on."""
    short = any(sign in str(error) for sign in SHORT_OF_MEMORY)
    return "out of memory before the first step" if short else f"FAILED: {error}"


class Ceiling:
    """A large square matmul in bf16, in a process of its own, which leaves nothing on the device."""

    def __init__(self, device: str, size: int):
        self.a = torch.randn(size, size, device=device, dtype=torch.bfloat16)

    def flops(self) -> float:
        """FLOP/s, the best of ten times twenty products."""
        best, out = math.inf, torch.empty_like(self.a)
        for _ in range(10):
            out[0, 0].item()  # waits for the device
            began = time.perf_counter()
            for _ in range(20):
                torch.mm(self.a, self.a, out=out)
            out[0, 0].item()
            best = min(best, (time.perf_counter() - began) / 20)
        return 2 * len(self.a) ** 3 / best


def longest_pair(worker: measure.Worker | str, scale: float, lengths: list[int]) -> dict:
    """{tokens a side: a step's time and memory} of pairs that nanodpo trains on at its leanest, up to the first that
    does not fit."""
    found = {}
    for length in (round(1024 * k * scale) for k in lengths) if isinstance(worker, measure.Worker) else ():
        try:
            worker.call("use", "offload")
            found[length], *_ = worker.call("long_pair", length)
        except (RuntimeError, OSError) as error:
            found[length] = why(error)
        if not isinstance(found[length], dict):
            break
    return found


def profiled(worker: measure.Worker, k: int) -> str:
    """The operations that take most of the k-th pair's step, or why they are not known."""
    try:
        worker.call("use", "full")
        return worker.call("profile", k)[0]
    except (RuntimeError, OSError) as error:
        return why(error)


def summarise(name: str, checkpointing: str, runs: list, work: contenders.Work, top: float, counted: tuple) -> dict:
    """Of all rounds of one contender: the mix, the pair after it, and what did not fit, in tokens. `counted`: bytes
    beside any row, and of a token by mode."""
    one = {"name": name, "checkpointing": checkpointing, "result": "ran"}
    if failed := [found for found in runs if isinstance(found, str)]:
        return one | {"result": failed[0]}
    fit = [k for k in range(len(work.pairs)) if all(found[k] for found in runs)]
    last = len(work.pairs) - 1
    return one | {"did_not_fit": sorted(tokens_of(pair) for k, pair in enumerate(work.pairs) if k not in fit),
                  "mix": _part(name, [k for k in fit if k < last], last, runs, work, top, counted),
                  "longest": _part(name, [k for k in fit if k == last], 1, runs, work, top, counted),
                  "losses": [found["loss"] if found else None for found in runs[0]],
                  "tokens": [tokens_of(pair) for pair in work.pairs],
                  "seconds": [[found["seconds"] if found else None for found in one_run] for one_run in runs]}


def _part(name: str, pairs: list[int], count: int, runs: list, work: contenders.Work, top: float, counted: tuple
          ) -> dict | None:
    """Of those of `count` pairs that fit; None where none did."""
    if not pairs:
        return None
    seconds = measure.spread([sum(found[k]["seconds"] for k in pairs) for found in runs])
    done = sum(flops(name, work.pairs[k], work.model, work.rank, runs[0][k]["modes"]) for k in pairs)
    beside, by_token = counted
    rows = [sum(map(len, work.pairs[k])) * sum(by_token[mode] * layers for mode, layers in runs[0][k]["modes"].items())
            / work.model["num_hidden_layers"] for k in pairs] if name == "nanodpo" else []
    return {"fit": len(pairs), "of": count, "seconds": seconds, "counted_gib": (beside + max(rows)) / 2**30
            if rows else None, "modes": [runs[0][k]["modes"] for k in pairs],
            "tokens_per_second": sum(tokens_of(work.pairs[k]) for k in pairs) / seconds["median"],
            "share_of_ceiling": done / seconds["median"] / top,
            "peak_gib": max(found[k]["peak_gib"] for found in runs for k in pairs)}


def line(one: dict) -> list[str]:
    """Of the table."""
    if one["result"] != "ran":
        return [one["name"], one["checkpointing"], one["result"], *"-----"]
    cells = [one["name"], one["checkpointing"]]
    for part in (one["mix"], one["longest"]):
        cells += [f"{part['fit']} of {part['of']}", f"{part['tokens_per_second']:,.0f}",
                  f"{part['share_of_ceiling']:.2f}", f"{part['peak_gib']:.1f}" + (
                      f" ({part['counted_gib']:.1f})" if part["counted_gib"] else "")] if part else ["none", *"---"]
    return cells[:6] + cells[7:] + ["-" if one["losses"][0] is None else f"{one['losses'][0]:.4f}"]


HEADER = ["contender", "recomputes", "pairs that fit", "tokens/s", "share of ceiling", "peak GiB (counted)",
          "20k pair: tokens/s", "share", "peak GiB (counted)", "first loss"]


def best(results: list[dict], name: str) -> dict | None:
    """A contender's fastest way through the whole mix."""
    found = [one["mix"] for one in results if one["name"] == name and one.get("mix")]
    whole = [mix for mix in found if mix["fit"] == mix["of"]]
    return max(whole, key=lambda mix: mix["tokens_per_second"], default=None)


def contest(args, work: contenders.Work, top: float, counted: tuple, scale: float) -> dict:
    """Every contender's ways through the pairs, one process after the other; all that was found. It is written down all
    the while: what is cut off has said something."""
    names = args.only or ["trl"] * measure.can_run("trl") + ["nanodpo"]
    modes = [(name, mode) for name, mode in MODES if name in names and mode in (args.modes or [mode])]
    runs = {mode: [] for mode in modes}
    found = {"toy": args.toy, "ceiling": top, "longest_pair": {}, "profile": {}}

    def keep() -> None:
        found["contenders"] = [summarise(*mode, some, work, top, counted) for mode, some in runs.items() if some]
        measure.write("gpu-toy" if args.toy else "gpu", args.json, vars(args), found)

    for name in names:
        worker = started(name, work)
        for _, mode in [one for one in modes if one[0] == name] * args.rounds:
            runs[name, mode].append(run(worker, work, mode))
            print(*line(summarise(name, mode, runs[name, mode], work, top, counted)), sep=" | ", flush=True)
            keep()
            if isinstance(runs[name, mode][-1], str) and isinstance(worker, measure.Worker):  # its process has ended
                worker.close()
                worker = started(name, work)
        if args.profile and isinstance(worker, measure.Worker):
            found["profile"][name] = profiled(worker, len(work.pairs) // 2)
        if name == "nanodpo":
            found["longest_pair"] = longest_pair(worker, scale, args.lengths)
            print(*found["longest_pair"].items(), sep="\n", flush=True)
            keep()
        if isinstance(worker, measure.Worker):
            worker.close()  # its memory must be free before the next one starts
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size on CPU: a check of this program, no measurement")
    parser.add_argument("--count", action="store_true", help="count what rows take, on tensors without data; no GPU")
    parser.add_argument("--pairs", type=int, default=16, help="of the mix, one a step; one of 20k tokens follows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="nanodpo, trl; default: both where installed")
    parser.add_argument("--modes", nargs="*", choices=sorted({mode for _, mode in MODES}), metavar="MODE",
                        help="of recomputation: 'by need', full, keep; default: all")
    parser.add_argument("--lengths", nargs="*", type=int, default=[16, 32, 64, 80, 96, 128],
                        help="of the long pairs: 1024 tokens a side each")
    parser.add_argument("--profile", action="store_true", help="also write down which operations take a step's time")
    parser.add_argument("--json", help="default: bench/results/gpu.json")
    args = parser.parse_args()
    if args.count:
        return show_count(args)
    if not args.toy and not torch.cuda.is_available():
        sys.exit("bench/gpu.py: no CUDA device here; --toy runs the same code on CPU at toy size, without measuring")
    device, scale = ("cpu", 0.01) if args.toy else ("cuda", 1.0)
    shape = TOY if args.toy else QWEN_7B
    work = contenders.Work(mixed_pairs(args.pairs, shape["vocab_size"], scale), shape, rank=8 if args.toy else 256,
                           device=device, dtype=torch.float32 if args.toy else torch.bfloat16, spread=0.0002,
                           mixed=None if args.toy else torch.bfloat16, activation_memory=0.0045 if args.toy else -1)
    worker = measure.Worker(Ceiling, resident_memory=False, device=device, size=256 if args.toy else 8192)
    top, *_ = worker.call("flops")
    worker.close()
    _, sizes, beside = sized(shape, work.rank)
    counted = beside, by_mode(sizes, shape)
    found = contest(args, work, top, counted, scale)
    for name, text in found["profile"].items():
        print(f"{name}, a step:\n{text}")
    if args.toy:
        print("TOY SIZE ON CPU: a check of the program; none of these numbers says anything about speed or memory\n")
    print(measure.table(HEADER, [line(one) for one in found["contenders"]]))
    ours, theirs = (best(found["contenders"], name) for name in ("nanodpo", "trl"))
    if ours and theirs:
        ratios = {name: ours[name] / theirs[name] for name in ("tokens_per_second", "peak_gib") if theirs[name]}
        print("\nthe whole mix, each as fast as it can, nanodpo / trl:", {k: round(v, 2) for k, v in ratios.items()})
    fits = max((length for length, one in found["longest_pair"].items() if isinstance(one, dict)), default=0)
    print(f"\nceiling: {top / 1e12:.3g} TFLOP/s in bf16; longest pair: 2 x {fits:,} tokens")


if __name__ == "__main__":
    main()
