"""One pass of a GPU in the place of several of torch's own operations: a gate with SiLU, its gradients, rotary
positions. Arithmetic is float32, rounded once. Shapes: F, the inner size of an MLP; B, T tokens, H heads of size E.

torch.cuda.jiterator compiles each when it is first called.
"""

import functools

from torch import Tensor

# silu(gate) * up, arXiv 2002.05202, section 2. d silu(x) / dx = s (1 + x (1 - s)), s the logistic function of x.
GATE = "template <typename T> T silu_gate(T gate, T up) { return gate / (T(1) + ::exp(-gate)) * up; }"
GATE_GRADIENTS = """template <typename T> void silu_gate_gradients(T grad, T gate, T up, T& d_gate, T& d_up) {
    T s = T(1) / (T(1) + ::exp(-gate));
    d_gate = grad * up * s * (T(1) + gate * (T(1) - s));
    d_up = grad * gate * s;
}"""

# arXiv 2104.09864, Eq. 34, for the numbers a and b of a plane. A kernel's inputs have one dtype, so a cosine and a sine
# of float32 come as three numbers of bfloat16 each, which add up to them.
ROTATE = """template <typename T> void rotate(T a, T b, T c0, T c1, T c2, T s0, T s1, T s2, T& first, T& second) {
    T c = c0 + c1 + c2;
    T s = s0 + s1 + s2;
    first = a * c - b * s;
    second = b * c + a * s;
}"""


@functools.cache
def compiled(code: str, outputs: int):
    """The kernel of a C++ function: from tensors of one shape to so many of that shape."""
    from torch.cuda import jiterator

    if outputs == 1:
        return jiterator._create_jit_fn(code)
    return jiterator._create_multi_output_jit_fn(code, outputs)


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """(..., F) x 2 -> (..., F): silu(gate) * up."""
    return compiled(GATE, 1)(gate, up)


def silu_gate_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(..., F) x 3 -> (..., F) x 2: the gradients of gate and up, from that of silu(gate) * up."""
    return compiled(GATE_GRADIENTS, 2)(grad, gate, up)


def in_three(x: Tensor) -> list[Tensor]:
    """Three tensors of bfloat16 that add up to x, float32, to its last bit."""
    parts = []
    for _ in range(3):  # each has the next eight of its 24 bits
        parts.append(x.bfloat16())
        x = x - parts[-1]
    return parts


def rotate(a: Tensor, b: Tensor, cos: list[Tensor], sin: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T, H, E/2) x 2, (B, T, 1, E/2) in three parts x 2 -> (B, T, H, E/2) x 2: a cos - b sin, and b cos + a sin."""
    return compiled(ROTATE, 2)(a, b, *cos, *sin)
