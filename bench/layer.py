"""The parts of a step at Qwen2.5-7B's shape, each alone on a GPU: milliseconds, and TFLOP/s or GB/s.

    python bench/layer.py               needs CUDA and no network
    python bench/layer.py --toy         the same code at toy size on CPU, to see that it runs; its numbers mean nothing

Products of bfloat16, with torch's leave to round their sums halfway and without it, as train.py has them; a gate by
torch's operations and by nanodpo's kernels; a norm and rotary positions as transformers has them; attention in the
varlen kernel, its backward pass with sums in any order and in one, and with empty sequences behind the batch, which
change how that pass is cut; the head, frozen and trained, by the size of its chunks.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import measure
from rows import QWEN_7B, TOY

from nanodpo.core import attention
from nanodpo.core.logprobs import LogProbHead
from nanodpo.model import kernels, layers
from nanodpo.ranks.gpu import be_deterministic, rounding_restored

# Of attention's backward pass: the order of its sums, and the empty sequences behind the batch.
WAYS = ("any order", 0), ("one order", 0), ("one order, 1 empty sequence", 1), ("one order, 2 empty sequences", 2)


class Parts:
    """Each method but `seconds` yields (name, seconds, operations, bytes): 0 for the one that does not count."""

    def __init__(self, shape: dict, tokens: int, lengths: list[int], toy: bool):
        self.shape, self.tokens, self.lengths, self.toy = shape, tokens, lengths, toy
        self.width, self.inner, self.vocabulary = (
            shape[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
        self.heads, self.groups = shape["num_attention_heads"], shape["num_key_value_heads"]
        self.size = self.width // self.heads
        self.draw = functools.partial(torch.randn, device="cpu" if toy else "cuda", dtype=torch.bfloat16)

    def seconds(self, call, times: int = 10) -> float:
        """Of a call, the median, after two that are not counted. All are begun before one is waited for."""
        if self.toy:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        for _ in range(2):
            call()
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        ends[0].record()
        for end in ends[1:]:
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in zip(ends, ends[1:])) / 1e3

    def products(self):
        for halfway in (True, False):
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = halfway
            for i, o in ((self.width, self.width), (self.width, self.inner), (self.inner, self.width)):
                x, w, g = self.draw(self.tokens, i), self.draw(o, i), self.draw(self.tokens, o)
                how, flops = ", may round halfway" * halfway, 2 * self.tokens * i * o
                yield f"product {i} -> {o}{how}", self.seconds(functools.partial(F.linear, x, w)), flops, 0
                yield f"its gradient{how}", self.seconds(functools.partial(torch.mm, g, w)), flops, 0

    def gate(self):
        gate, up, grad = self.draw(3, self.tokens, self.inner)

        def gradients():  # as autograd has them
            with torch.enable_grad():
                z = gate.detach().requires_grad_()
                active = F.silu(z)
            return torch.autograd.grad(active, z, grad * up), grad * active.detach()

        size = 2 * gate.numel()
        yield "gate, torch", self.seconds(lambda: F.silu(gate) * up), 0, 3 * size
        yield "its gradients, torch", self.seconds(gradients), 0, 5 * size
        if gate.is_cuda:
            yield "gate, kernel", self.seconds(lambda: kernels.silu_gate(gate, up)), 0, 3 * size
            own = functools.partial(kernels.silu_gate_gradients, grad, gate, up)
            yield "its gradients, kernel", self.seconds(own), 0, 5 * size

    def norm_and_positions(self):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        x, w = self.draw(self.tokens, self.width).float().requires_grad_(), self.draw(self.width).float()
        q, k = (self.draw(1, self.tokens, n, self.size).transpose(1, 2).requires_grad_()
                for n in (self.heads, self.groups))
        cos, sin = self.draw(2, 1, self.tokens, self.size).float()

        def norm():
            return [F.rms_norm(x, (self.width,), w, 1e-6).bfloat16()]

        def positions():
            return [one.bfloat16() for one in apply_rotary_pos_emb(q, k, cos, sin)]

        def positions_by_kernel():
            return layers._rotated(q, k, cos, sin)

        by_kernel = [(positions_by_kernel, [q, k], 4 * (q.numel() + k.numel()))] * q.is_cuda
        for call, given, size in ((norm, [x], 6 * x.numel()), (positions, [q, k], 4 * (q.numel() + k.numel())),
                                  *by_kernel):
            yield call.__name__, self.seconds(call), 0, size
            yield f"{call.__name__} and gradients", self.seconds(lambda call=call, given=given: torch.autograd.grad(
                out := call(), given, [torch.ones_like(one) for one in out])), 0, 3 * size

    def attention(self):
        """Of two responses without a prompt. Backward is what both passes take beyond the forward pass."""
        for length in () if self.toy else self.lengths:
            q, k, v = (self.draw(2 * length, n, self.size).requires_grad_()
                       for n in (self.heads, self.groups, self.groups))
            grad, flops, forward = torch.randn_like(q), 2 * 4 * length**2 / 2 * self.width, None
            for way, empty in WAYS:
                torch.use_deterministic_algorithms(way != "any order")
                ends = torch.tensor([0, length] + [2 * length] * (1 + empty), device=q.device, dtype=torch.int32)
                call = functools.partial(attention.varlen_call, q, k, v, ends, ends, length, length, None, -1)
                if forward is None:
                    forward = self.seconds(call, 5)
                    yield f"attention, 2 x {length:,}", forward, flops, 0
                both = self.seconds(lambda call=call, given=(q, k, v), grad=grad: torch.autograd.grad(
                    call(), given, grad), 5)
                yield f"its gradients, sums in {way}", both - forward, 2.5 * flops, 0

    def head(self):
        hidden = self.draw(self.tokens, self.width).float()
        targets = torch.randint(self.vocabulary, (self.tokens,), device=hidden.device)
        for trained in (False, True):
            layer = torch.nn.Linear(self.width, self.vocabulary, bias=False, device=hidden.device,
                                    dtype=torch.float32 if trained else torch.bfloat16).requires_grad_(trained)
            layer.product_dtype = torch.bfloat16
            for mib in (256, 1024):
                head = LogProbHead(layer, chunk_size=mib * 2**20 // (4 * self.vocabulary))
                x = hidden.clone().requires_grad_()
                given = [x, head.weight] if trained else [x]
                seconds = self.seconds(lambda head=head, x=x, given=given: torch.autograd.grad(
                    head(x, targets).sum(), given), 3)
                yield (f"head, {'trained' if trained else 'frozen'}, chunks of {mib} MiB", seconds,
                       (8 if trained else 4) * self.tokens * self.width * self.vocabulary, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy size on CPU: a check of this program, no measurement")
    parser.add_argument("--tokens", type=int, default=4096, help="of all parts but attention")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2300, 9000, 20_000],
                        help="of attention's two responses")
    parser.add_argument("--json", help="default: bench/results/layer.json")
    args = parser.parse_args()
    if not args.toy and not torch.cuda.is_available():
        sys.exit("bench/layer.py: no CUDA device here; --toy runs the same code on CPU, without measuring")
    parts, found = Parts(TOY if args.toy else QWEN_7B, 64 if args.toy else args.tokens, args.lengths, args.toy), []
    with rounding_restored():
        be_deterministic()
        for part in (parts.products, parts.gate, parts.norm_and_positions, parts.attention, parts.head):
            for name, seconds, flops, size in part():
                rate = f"{flops / seconds / 1e12:.0f} TFLOP/s" if flops else f"{size / seconds / 1e9:.0f} GB/s"
                found.append([name, f"{seconds * 1e3:.3f}", rate])
                print(*found[-1], sep=" | ", flush=True)
    print("TOY SIZE ON CPU: a check of the program, no measurement\n" * args.toy)
    print(measure.table(["part", "ms", "rate"], found))
    measure.write("layer-toy" if args.toy else "layer", args.json, vars(args), found)


if __name__ == "__main__":
    main()
