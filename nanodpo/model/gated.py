"""Gated MLPs that keep two large tensors for backward instead of four: the gate and what it gates. The activation of
the first and the product of both are as large, and cheap to compute again. Slow to import, with transformers.

Shapes: (..., F) within an MLP of inner size F. y = W_down (act(gate) * up), section 2 of arXiv 2002.05202.
"""

import functools

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import LlamaMLP


def keep_less(model: nn.Module) -> None:
    """Lets every MLP keep less whose forward is Llama's, instruction for instruction; any other stays as it is. No bit
    of a number changes. Set a module's `keeps_less` to False within a layer that is computed again as a whole: its
    hooks would keep what those of the checkpoint throw away."""
    llama = _instructions(LlamaMLP)
    for module in model.modules():
        if llama and _instructions(type(module)) == llama:
            module.keeps_less, module.forward = True, functools.partial(_forward, module)


def _instructions(kind: type) -> tuple | None:
    code = getattr(kind.forward, "__code__", None)  # a forward that is no plain function has none
    return code and (code.co_code, code.co_names, code.co_consts)


def _forward(mlp: nn.Module, x: Tensor) -> Tensor:
    if not (mlp.keeps_less and torch.is_grad_enabled()):
        return type(mlp).forward(mlp, x)
    gate, up, act = mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn.forward  # without the hooks of a module's call
    y = _Gated.apply(gate, up, act)
    # LoRA's first product keeps its input, and so does a layer that is trained. The closures below outlive this call,
    # and must not keep y themselves.
    place, gate, up = _place(y), gate.detach(), up.detach()

    def keep(tensor: Tensor) -> Tensor | torch.Size:
        # y, or all of it in another shape, but not in another order.
        return tensor.shape if _place(tensor) == place and tensor.is_contiguous() else tensor

    def again(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else (act(gate) * up).view(kept)

    with saved_tensors_hooks(keep, again):
        return mlp.down_proj(y)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Which storage, and how much of it; also of tensors without data."""
    return tensor.untyped_storage()._cdata, tensor.numel()


class _Gated(torch.autograd.Function):
    """act(gate) * up, from which backward has both factors."""

    @staticmethod
    def forward(ctx, gate, up, act):
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.act(gate)
        (d_gate,) = torch.autograd.grad(active, gate, grad * up)
        return d_gate, grad * active.detach(), None
