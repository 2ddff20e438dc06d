"""A gate with SiLU in one pass on a GPU, and its gradients in another: torch's own operations take two passes and five
over tensors as wide as an MLP. Arithmetic is float32, rounded once. Shapes: F, the inner size of an MLP.

torch.cuda.jiterator compiles both when they are first called.
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
