"""Layers that compute the same with less time or memory, their backward passes written by hand. Every step of a
run with LoRA, or of a model with gated MLPs, goes through them. Slow to import, with PEFT and transformers.

`fuse_lora`: LoRA's term is added to a layer's output in one product. PEFT multiplies, scales and adds: three passes
over tensors as large as that output, which leave memory fragmented. y = W x + s B A x, arXiv 2106.09685, Eq. 3.

`keep_less`: gated MLPs keep two large tensors for backward instead of four: the gate before its activation, and up.
The activation, and its product with up, are as large, and cheap to compute again. y = W_down (act(gate) * up), arXiv
2002.05202, section 2.

Shapes: (..., I) inputs, (..., O) outputs, R rank of LoRA; (..., F) within an MLP of inner size F.
"""

import functools

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import LlamaMLP


def fuse_lora(model: nn.Module, in_place: bool = True) -> None:
    """Lets every plain LoRA layer of a PEFT model add in one product; names, weights and what is saved stay the same.

    A layer that is more than W x + s B A x (DoRA, a bias of B) stays PEFT's own. `in_place`: adds into W x itself; not
    under ZeRO-3, whose hooks still hold that tensor.
    """
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer) and type(module).__name__ in
                  ("Linear", "Linear4bit", "Linear8bitLt")]:  # the last two are there with bitsandbytes alone
        for name, second in layer.lora_B.items():
            dtypes = {linear.weight.dtype for linear in (layer.lora_A[name], second)}
            base = layer.get_base_layer().weight.dtype
            # A and B have one dtype: the base's, or float32 beside a base in bfloat16 or a quantised one.
            beside = torch.float32 if base in (torch.bfloat16, torch.uint8, torch.int8) else base
            fits = len(dtypes) == 1 and dtypes <= {base, beside}
            if name not in layer.lora_variant and second.bias is None and fits:
                layer.cast_input_dtype_enabled = False  # PEFT's cast of x; autocast takes mixed dtypes
                layer.lora_B[name] = Added(second, in_place)
                layer.lora_variant[name] = OneProduct


class Added(nn.Module):
    """PEFT's lora_B, called with h and y: y + B h. A module, and called as one, because ZeRO-3 gathers a
    sharded weight when the module that holds it is called.
    """

    def __init__(self, linear: nn.Linear, in_place: bool):
        super().__init__()
        self.weight, self.in_place = linear.weight, in_place  # (O, R)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """(..., R), (..., O) -> (..., O): y + B h."""
        return _AddedProduct.apply(y, h, self.weight, self.in_place)


class OneProduct(LoraVariant):
    """LoRA on a layer in one product: PEFT calls `forward` for the output of a layer with this variant."""

    merge_unsafe = LoraVariant.merge_safe  # which raises; PEFT's own merge_unsafe does nothing, without a word

    @staticmethod
    def forward(module, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        """(..., I), (..., O) -> (..., O); `result` is W x."""
        h = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x)) * module.scaling[active_adapter]
        return module.lora_B[active_adapter](h, result)


class _AddedProduct(torch.autograd.Function):
    """y + B h. Keeps B itself: what autograd keeps of addmm is a view, which outlives the weight that ZeRO-3 frees."""

    @staticmethod
    def forward(ctx, y, h, weight, in_place):
        ctx.save_for_backward(h, weight)
        lines, product = y.flatten(0, -2), (h.flatten(0, -2), weight.T.to(h.dtype))
        if not in_place:
            return torch.addmm(lines, *product).view(y.shape)
        ctx.mark_dirty(y)
        lines.addmm_(*product)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, weight = ctx.saved_tensors
        d_weight = grad.flatten(0, -2).T @ h.flatten(0, -2) if ctx.needs_input_grad[2] else None
        return grad, grad @ weight.to(grad.dtype), None if d_weight is None else d_weight.to(weight.dtype), None


def keep_less(model: nn.Module) -> None:
    """MLPs with Llama's forward keep fewer tensors for backward; others are unchanged. No bit of a number changes.

    Set a module's `keeps_less` to False in a layer that is checkpointed: its hooks would keep what checkpointing drops.
    """
    llama = _bytecode(LlamaMLP)
    for module in model.modules():
        if llama and _bytecode(type(module)) == llama:
            module.keeps_less, module.forward = True, functools.partial(_gated_forward, module)


def _bytecode(kind: type) -> tuple | None:
    """The instructions of a class's forward, with the names and numbers in them. Model families write Llama's MLP under
    names of their own, so the name of the class does not tell."""
    code = getattr(kind.forward, "__code__", None)  # a forward that is no plain function has none
    return code and (code.co_code, code.co_names, code.co_consts)


def _gated_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    if not (mlp.keeps_less and torch.is_grad_enabled()):
        return type(mlp).forward(mlp, x)
    gate, up, act = mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn.forward  # without the hooks of a module's call
    y = _Gated.apply(gate, up, act)
    # down_proj, where it is trained, and its lora_A save their input y for backward. Here they save its shape, and y is
    # computed again. The two functions below outlive this call, so they must not hold y themselves.
    gate, up, storage, numbers = gate.detach(), up.detach(), y.untyped_storage()._cdata, y.numel()

    def save(tensor: Tensor) -> Tensor | torch.Size:
        # y, or all of it in another shape, but not in another order.
        same = tensor.untyped_storage()._cdata == storage and tensor.numel() == numbers and tensor.is_contiguous()
        return tensor.shape if same else tensor

    def restore(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else (act(gate) * up).view(kept)

    with saved_tensors_hooks(save, restore):
        return mlp.down_proj(y)


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
