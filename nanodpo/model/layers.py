"""Layers that compute the same with less time or memory, their backward passes written by hand. Every step of a
run with LoRA, or of a model with gated MLPs, goes through them. Slow to import, with PEFT and transformers.

`fuse_lora`: a layer and its LoRA are one function. PEFT multiplies, scales and adds: three passes over tensors as large
as the output, and one as large as the input in backward. y = W x + b + s B A x, arXiv 2106.09685, Eq. 3. And PEFT
rounds W x before it adds to it: in bfloat16 what is below half of the last place is lost, as is most of what the first
steps change. Here W x is added to s B A x before it is rounded, and so what LoRA adds is there on average.

`keep_less`: gated MLPs keep two large tensors for backward instead of four: the gate before its activation, and up.
The activation, and its product with up, are as large, and cheap to compute again. y = W_down (act(gate) * up), arXiv
2002.05202, section 2.

`fuse_norms`: on a GPU an RMSNorm is one pass, PyTorch's own.

`fuse_rotations`: on a GPU rotary positions are one kernel, where products are bfloat16. arXiv 2104.09864, section 3.

Shapes: (..., I) inputs, (..., O) outputs, R rank of LoRA; (..., F) within an MLP of inner size F; B, T tokens, H heads
of size E.
"""

import functools
import types
from collections.abc import Callable

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb, rotate_half
from transformers.pytorch_utils import Conv1D

from ..core.logprobs import NO_SECOND
from . import kernels
from .precision import Bf16Linear
from .quantised import dequantised, is_quantised

SILU = nn.SiLU, SiLUActivation


def fuse_lora(model: nn.Module, zero3: bool = False) -> None:
    """Lets every plain LoRA layer of a PEFT model be one function; names, weights and what is saved stay the same.

    PEFT's own stays a layer that is more than W x + b + s B A x (DoRA, a bias of B, a second adapter), or whose W is
    trained, or is unfrozen later, or not a linear layer's; and each layer while its adapter is disabled or merged.
    Hooks of a layer are called, those of the layers within it are not. `zero3`: stage 3 of ZeRO shards weights, and
    gathers one when a module is called that it is registered with.
    """
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer) and type(module).__name__ in
                  ("Linear", "Linear4bit", "Linear8bitLt")]:  # the last two are there with bitsandbytes alone
        base, (name, *others) = layer.get_base_layer(), layer.lora_B
        a, b, matrix = layer.lora_A[name].weight, layer.lora_B[name], _matrix_of(base)
        held = base.weight.dtype
        # A and B have one dtype: the base's, or float32 beside a base in bfloat16 or a quantised one.
        beside = torch.float32 if held in (torch.bfloat16, torch.uint8, torch.int8) else held
        plain = not others and name not in layer.lora_variant and b.bias is None and matrix is not None
        frozen = not any(p.requires_grad for p in base.parameters())
        if plain and frozen and a.dtype == b.weight.dtype and a.dtype in (held, beside):
            layer.forward = functools.partial(_lora_forward, layer, name, matrix)
            if zero3:
                import deepspeed  # slow to import

                for weight in (a, b.weight, *base.parameters()):
                    deepspeed.zero.register_external_parameter(layer, weight)


def _matrix_of(base: nn.Module) -> Callable | None:
    """A function (weight, dtype) -> (O, I) matrix of a linear layer; None for a layer that may be something else."""
    if isinstance(base, nn.Linear) and is_quantised(base.weight):
        return functools.partial(dequantised, base)
    if type(base) in (nn.Linear, Bf16Linear):
        return Tensor.to
    return _transposed if type(base) is Conv1D else None


def _transposed(weight: Tensor, dtype: torch.dtype) -> Tensor:  # no lambda, with which no model can be saved
    return weight.T.to(dtype)


def _lora_forward(layer: nn.Module, name: str, matrix: Callable, x: Tensor, *args, **kwargs) -> Tensor:
    """(..., I) -> (..., O)."""
    base, kind = layer.get_base_layer(), x.device.type
    trained = base.weight.requires_grad or base.bias is not None and base.bias.requires_grad  # unfrozen later
    if trained or layer.merged or layer.active_adapters != [name] or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    if layer.disable_adapters:
        if x.dtype != torch.bfloat16:
            return type(layer).forward(layer, x)
        # By the product below, so that an adapter of zero changes no bit.
        weight, lines = matrix(base.weight, x.dtype), x.flatten(0, -2)
        return _with_bias(lines.new_zeros(len(lines), len(weight)).addmm_(lines, weight.T), base.bias, x)
    dropped = layer.lora_dropout[name](x)
    return _LoraProduct.apply(x, None if dropped is x else dropped, base.weight, base.bias, layer.lora_A[name].weight,
                              layer.lora_B[name].weight, layer.scaling[name], matrix)


class _LoraProduct(torch.autograd.Function):
    """W x + b + s B A z for (..., I) x and z, (O, I), (O,), (R, I), (O, R): (..., O). z is x after dropout, or None for
    x itself; W = matrix(weight, dtype). Keeps weights themselves: a view of one, as autograd keeps it, would outlive
    the weight that ZeRO-3 frees."""

    @staticmethod
    def forward(ctx, x, z, weight, bias, a, b, scale, matrix):
        ctx.same, z = z is None, x if z is None else z
        h, w = z.flatten(0, -2) @ a.T.to(x.dtype), matrix(weight, x.dtype)
        # addmm with beta=0 ignores its first argument. It scales a product at no cost, which mm can't.
        if x.dtype == torch.bfloat16:
            more = torch.addmm(h.new_empty(()), h, b.T.to(h.dtype), beta=0, alpha=scale)
            y = _with_bias(more.addmm_(x.flatten(0, -2), w.T), bias, x)
        else:
            y = nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
            y.flatten(0, -2).addmm_(h, b.T.to(h.dtype), alpha=scale)
        ctx.save_for_backward(z, h, weight, a, b)
        ctx.scale, ctx.matrix = scale, matrix
        return y

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(NO_SECOND)
        (z, h, weight, a, b), lines = ctx.saved_tensors, grad.flatten(0, -2)
        for_x, for_z, _, _, for_a, for_b, *_ = ctx.needs_input_grad
        a_low, w = a.to(grad.dtype), ctx.matrix(weight, grad.dtype) if for_x else None
        d_h = torch.addmm(lines.new_empty(()), lines, b.to(grad.dtype), beta=0, alpha=ctx.scale)
        if not (for_x and ctx.same):
            d_x = lines @ w if for_x else None
        elif grad.dtype == torch.bfloat16:  # what is small first, as above
            d_x = (d_h @ a_low).addmm_(lines, w)
        else:
            d_x = (lines @ w).addmm_(d_h, a_low)
        d_z = (d_h @ a_low).view(z.shape) if for_z else None
        d_a = _weight_grad(d_h, z.flatten(0, -2), a.dtype) if for_a else None
        d_b = _weight_grad(lines, h, b.dtype).mul_(ctx.scale) if for_b else None
        return None if d_x is None else d_x.view(z.shape), d_z, None, None, d_a, d_b, None, None


def _with_bias(y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """(T, O), (O,) -> (..., O), as x is shaped: y + b."""
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y.add_(bias)


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


def fuse_rotations(model: nn.Module) -> None:
    """Layers that turn queries and keys by Llama's function do it by a GPU's kernel."""
    for module in model.modules():
        forward, name = type(module).forward, apply_rotary_pos_emb.__name__
        code = getattr(forward, "__code__", None)
        if code and name in code.co_names and _turns_as_llama(forward.__globals__.get(name)):
            module.forward = functools.partial(_rotating_forward, module)


def _turns_as_llama(function: Callable) -> bool:
    half, llama = getattr(function, "__globals__", {}).get(rotate_half.__name__), _bytecode(apply_rotary_pos_emb)
    return llama is not None and llama == _bytecode(function) and _bytecode(half) == _bytecode(rotate_half)


def _rotating_forward(module: nn.Module, *args, **kwargs):
    return _with_kernel(type(module).forward)(module, *args, **kwargs)


@functools.cache
def _with_kernel(forward: Callable) -> Callable:
    """The same function with `_rotated` in the place of transformers' own."""
    known = forward.__globals__ | {apply_rotary_pos_emb.__name__: _rotated}
    copy = types.FunctionType(forward.__code__, known, None, forward.__defaults__, forward.__closure__)
    return functools.update_wrapper(copy, forward)


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """(B, H, T, E) x 2, (B, T, E) x 2 -> (B, H, T, E) x 2."""
    if not query.dtype == key.dtype == torch.bfloat16 or unsqueeze_dim != 1:
        return apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim)
    for x in (cos, sin):
        if not hasattr(x, "parts"):  # once for all layers, which are given the same two tensors
            x.parts = kernels.in_three(x.chunk(2, -1)[0].unsqueeze(2).float())  # the second half is the same
    return _Rotation.apply(query, cos.parts, sin.parts), _Rotation.apply(key, cos.parts, sin.parts)


class _Rotation(torch.autograd.Function):
    """(B, H, T, E) turned by the angles of its tokens, each number with the one half a head further."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.cos, ctx.sin = cos, sin
        a, b = x.transpose(1, 2).chunk(2, -1)  # laid out as attention reads it
        return torch.cat(kernels.rotate(a, b, cos, sin), -1).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(NO_SECOND)
        a, b = grad.transpose(1, 2).chunk(2, -1)
        b, a = kernels.rotate(b, a, ctx.cos, ctx.sin)  # the two exchanged are turned back
        return torch.cat((a, b), -1).transpose(1, 2), None, None


def keep_less(model: nn.Module) -> None:
    """MLPs with Llama's forward keep fewer tensors for backward; others are unchanged. No bit of a number changes.

    Set a module's `keeps_less` to False in a layer that is checkpointed: its hooks would keep what checkpointing drops.
    """
    for module in _with_forward_of(LlamaMLP, model):
        module.keeps_less, module.forward = True, functools.partial(_gated_forward, module)


def _with_forward_of(kind: type, model: nn.Module) -> list[nn.Module]:
    """The modules of a model whose forward is that of this class of Llama's, under whatever name."""
    llama = _bytecode(kind.forward)
    return [module for module in model.modules() if llama and _bytecode(type(module).forward) == llama]


def _bytecode(function: Callable) -> tuple | None:
    """The instructions of a function, with the names and numbers in them. Model families write Llama's layers under
    names of their own, so the name of a class does not tell."""
    code = getattr(function, "__code__", None)  # only a plain function has some
    return code and (code.co_code, code.co_names, [one for one in code.co_consts if one != function.__doc__])


def _gated_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    """(..., I) -> (..., O): W_down y with y = act(gate) * up."""
    gate, up, act = mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn.forward  # without the hooks of a module's call
    kernel = kernels.silu_gate if gate.is_cuda and isinstance(mlp.act_fn, SILU) else None
    y = _Gated.apply(gate, up, act, kernel)
    if not (mlp.keeps_less and torch.is_grad_enabled()):
        return mlp.down_proj(y)
    # down_proj, where it is trained, and its lora_A save their input y for backward. Here they save its shape, and y is
    # computed again. The two functions below outlive this call, so they must not hold y themselves.
    gate, up, storage, numbers = gate.detach(), up.detach(), y.untyped_storage()._cdata, y.numel()

    def save(tensor: Tensor) -> Tensor | torch.Size:
        # y, or all of it in another shape, but not in another order.
        same = tensor.untyped_storage()._cdata == storage and tensor.numel() == numbers and tensor.is_contiguous()
        return tensor.shape if same else tensor

    def restore(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else (kernel(gate, up) if kernel else act(gate) * up).view(kept)

    with saved_tensors_hooks(save, restore):
        return mlp.down_proj(y)


class _Gated(torch.autograd.Function):
    """act(gate) * up, from which backward has both factors. `kernel`: a GPU's for this, or None."""

    @staticmethod
    def forward(ctx, gate, up, act, kernel):
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.kernel = act, kernel
        return kernel(gate, up) if kernel else act(gate) * up

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(NO_SECOND)
        gate, up = ctx.saved_tensors
        if ctx.kernel:
            return *kernels.silu_gate_gradients(grad, gate, up), None, None
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.act(gate)
        (d_gate,) = torch.autograd.grad(active, gate, grad * up)
        return d_gate, grad * active.detach(), None, None
