"""Layers that compute the same with less time or memory, their backward passes written by hand. Every step of a
run with LoRA, or of a model with gated MLPs, goes through them. Slow to import, with PEFT and transformers.

`fuse_lora`: LoRA's term is added to a layer's output in one product. PEFT multiplies, scales and adds: three passes
over tensors as large as that output, which leave memory fragmented. y = W x + s B A x, arXiv 2106.09685, Eq. 3.

`keep_less`: gated MLPs keep two large tensors for backward instead of four: the gate before its activation, and up.
The activation, and its product with up, are as large, and cheap to compute again. y = W_down (act(gate) * up), arXiv
2002.05202, section 2.

`fuse_norms`: on a GPU an RMSNorm is one pass, PyTorch's own.

Shapes: (..., I) inputs, (..., O) outputs, R rank of LoRA; (..., F) within an MLP of inner size F.
"""

import functools

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


def fuse_lora(model: nn.Module, in_place: bool = True) -> None:
    """Lets every plain LoRA layer of a PEFT model add in one product; names, weights and what is saved stay the same.

    A layer that is more than W x + s B A x (DoRA, a bias of B) stays PEFT's own. `in_place`: adds into W x itself; not
    under ZeRO-3, whose hooks still hold that tensor.
    """
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer) and type(module).__name__ in
                  ("Linear", "Linear4bit", "Linear8bitLt")]:  # the last two are there with bitsandbytes alone
        for name, second in layer.lora_B.items():
            weights = layer.lora_A[name].weight, second.weight
            dtypes, base = {weight.dtype for weight in weights}, layer.get_base_layer().weight.dtype
            # A and B have one dtype: the base's, or float32 beside a base in bfloat16 or a quantised one.
            beside = torch.float32 if base in (torch.bfloat16, torch.uint8, torch.int8) else base
            fits = len(dtypes) == 1 and dtypes <= {base, beside}
            if name not in layer.lora_variant and second.bias is None and fits:
                layer.cast_input_dtype_enabled = False  # PEFT's cast of x; the product takes mixed dtypes
                layer.lora_variant[name], layer.adds_in_place = OneProduct, in_place
                if not in_place:  # ZeRO-3 gathers a sharded weight when a module is called that it is registered with
                    import deepspeed  # slow to import

                    for weight in weights:
                        deepspeed.zero.register_external_parameter(layer, weight)


class OneProduct(LoraVariant):
    """LoRA on a layer in one product: PEFT calls `forward` for the output of a layer with this variant."""

    merge_unsafe = LoraVariant.merge_safe  # which raises; PEFT's own merge_unsafe does nothing, without a word

    @staticmethod
    def forward(module, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        """(..., I), (..., O) -> (..., O); `result` is W x."""
        x, kind = module.lora_dropout[active_adapter](x), x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        weights = (layers[active_adapter].weight for layers in (module.lora_A, module.lora_B))
        # In place on a view, as a layer with a bias gives it, autograd would copy all of its gradient twice.
        in_place = module.adds_in_place and not result._is_view()
        return _Added.apply(result, x, *weights, module.scaling[active_adapter], in_place)


class _Added(torch.autograd.Function):
    """y + s B A x, for (..., O), (..., I), (R, I), (O, R). Keeps A and B themselves: a view of one, as autograd keeps
    it, would outlive the weight that ZeRO-3 frees."""

    @staticmethod
    def forward(ctx, y, x, a, b, scale, in_place):
        h, lines = x.flatten(0, -2) @ a.T.to(x.dtype), y.flatten(0, -2)
        ctx.save_for_backward(x, h, a, b)
        ctx.scale = scale
        if not in_place:
            return torch.addmm(lines, h, b.T.to(h.dtype), alpha=scale).view(y.shape)
        ctx.mark_dirty(y)
        lines.addmm_(h, b.T.to(h.dtype), alpha=scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, h, a, b), lines = ctx.saved_tensors, grad.flatten(0, -2)
        # addmm with beta=0 ignores its first argument. It scales a product at no cost, which mm can't.
        d_h = torch.addmm(lines.new_empty(()), lines, b.to(grad.dtype), beta=0, alpha=ctx.scale)
        d_x = (d_h @ a.to(grad.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        d_a = _weight_grad(d_h, x.flatten(0, -2), a.dtype) if ctx.needs_input_grad[2] else None
        d_b = _weight_grad(lines, h, b.dtype).mul_(ctx.scale) if ctx.needs_input_grad[3] else None
        return grad, d_x, d_a, d_b, None, None


def _weight_grad(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, O), (T, I) -> (O, I): the sum of grad x^T over all tokens, in `dtype`. Of bfloat16 factors a GPU gives the
    sum in float32, a CPU its rounding to bfloat16."""
    wider = grad.is_cuda and grad.dtype == torch.bfloat16 and dtype == torch.float32
    return torch.mm(grad.T, x, out_dtype=dtype) if wider else (grad.T @ x).to(dtype)


def fuse_norms(model: nn.Module) -> None:
    """RMSNorms with Llama's forward go through PyTorch's own kernel: one pass, not seven. For a GPU, where a pass costs
    more than its arithmetic. arXiv 1910.07467, Eq. 4."""
    for module in _with_forward_of(LlamaRMSNorm, model):
        module.forward = functools.partial(_rms_norm, module)


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    if x.dtype != norm.weight.dtype:  # of queries and keys in bfloat16: there is no such kernel
        return type(norm).forward(norm, x)
    return nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def keep_less(model: nn.Module) -> None:
    """MLPs with Llama's forward keep fewer tensors for backward; others are unchanged. No bit of a number changes.

    Set a module's `keeps_less` to False in a layer that is checkpointed: its hooks would keep what checkpointing drops.
    """
    for module in _with_forward_of(LlamaMLP, model):
        module.keeps_less, module.forward = True, functools.partial(_gated_forward, module)


def _with_forward_of(kind: type, model: nn.Module) -> list[nn.Module]:
    """The modules of a model whose forward is that of this class of Llama's, under whatever name."""
    llama = _bytecode(kind)
    return [module for module in model.modules() if llama and _bytecode(type(module)) == llama]


def _bytecode(kind: type) -> tuple | None:
    """The instructions of a class's forward, with the names and numbers in them. Model families write Llama's layers
    under names of their own, so the name of the class does not tell."""
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
