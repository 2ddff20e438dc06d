"""--bf16: large matrices in bfloat16; trained weights, norms, and the sums from layer to layer in float32.

A change of the weights far below bfloat16's last place moves every rounding of a forward pass, and with it a response's
log-prob by tenths of a nat: as much as the first steps of training (noise.py measures it). So as little as possible is
rounded. On a GPU these are the inputs and outputs of matrix products, which are many times as fast in bfloat16; on a
CPU, where they are not, only the frozen matrices. Full fine-tuning freezes none: there --bf16 changes nothing on a CPU.
"""

import functools

import torch
from torch import Tensor, nn

from .sharding import cast, shape_of


def product_dtype(bf16: bool, device: torch.device) -> torch.dtype:
    """The dtype in which matrices are multiplied."""
    return torch.bfloat16 if bf16 and device.type == "cuda" else torch.float32


def storage_dtype(bf16: bool, frozen: bool) -> torch.dtype:
    """The dtype in which a base's weights are loaded: bfloat16 for frozen ones with --bf16, float32 for trained
    ones."""
    return torch.bfloat16 if bf16 and frozen else torch.float32


def mix_precision(model: nn.Module, product: torch.dtype) -> None:
    """Sets the dtypes within a model that was loaded in that of `storage_dtype`, with its adapter. `product`: that of
    `product_dtype`."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    held = [layer for layer in _plain_linears(model) if layer.weight.dtype == torch.bfloat16]
    kept = {id(layer.weight) for layer in [*held, model.get_input_embeddings()]}
    for tensor in [*model.parameters(), *model.buffers()]:
        wider = len(shape_of(tensor)) < 2 or (product == torch.float32 and id(tensor) not in kept)
        if wider and tensor.dtype == torch.bfloat16:
            cast(tensor, torch.float32)
    model.get_input_embeddings().register_forward_hook(functools.partial(_converted, torch.float32))
    if product == torch.float32:
        for layer in held:
            layer.__class__ = Bf16Linear
        return
    from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import

    head = model.get_output_embeddings()
    head.product_dtype = product  # LogProbHead, which works outside of autocast, looks here
    head.forward = functools.partial(_wide_logits, head)  # of greedy answers, and of the check of layouts
    for part in {model, model.base_model}:
        own = part.forward
        part.forward = functools.update_wrapper(functools.partial(_in_autocast, model, product, own), own)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for name, norm in layer.named_children():
                if name.endswith(("norm", "layernorm")):  # else each matrix after it makes, and keeps, a copy
                    norm.register_forward_hook(functools.partial(_converted, product))


def _wide_logits(head: nn.Linear, states: Tensor) -> Tensor:
    """(..., D) -> (..., V), float32, of the factors that LogProbHead multiplies. In bfloat16 the two likeliest tokens
    often have one logit, and the first of them would be the answer."""
    with torch.autocast(states.device.type, enabled=False):
        states, weight = states.to(head.product_dtype), head.weight.to(head.product_dtype)
        if states.is_cuda:
            logits = torch.mm(states.flatten(0, -2), weight.T, out_dtype=torch.float32).unflatten(0, states.shape[:-1])
        else:  # whose products of bfloat16 are bfloat16
            logits = states.float() @ weight.float().T
        return logits if head.bias is None else logits + head.bias


def _plain_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that the model calls. A state space layer, which has a convolution, reads the weights of its
    linear layers without a call."""
    uncalled = set()
    for module in model.modules():
        if any(isinstance(child, nn.Conv1d) for child in module.children()):
            uncalled |= {*map(id, module.modules())}
    return [layer for layer in model.modules() if type(layer) is nn.Linear and id(layer) not in uncalled]


# These two are bound by functools.partial, which a copy of the model binds anew: a function made in place, as a lambda
# is, would let the copy compute with the weights of the model that it was copied from, and can't be saved with it.
def _converted(dtype: torch.dtype, module, args, states: Tensor) -> Tensor:
    return states.to(dtype)


def _in_autocast(model: nn.Module, product: torch.dtype, forward, *args, **kwargs):
    with torch.autocast(model.device.type, product):
        return forward(*args, **kwargs)


class Bf16Linear(nn.Linear):
    """A layer that holds its weight in bfloat16 and multiplies in the dtype of its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:  # it was frozen when it became this layer
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, self.weight.to(x.dtype), bias)
        return FrozenProduct.apply(x, self.weight, self.bias, Tensor.to)


class FrozenProduct(torch.autograd.Function):
    """W x + b, (..., out), of a frozen W that is held in another form, `weight`. Keeps that form for backward, which
    makes W again: matrix(weight, dtype)."""

    @staticmethod
    def forward(ctx, x, weight, bias, matrix):
        ctx.save_for_backward(weight)
        ctx.matrix = matrix
        return nn.functional.linear(x, matrix(weight, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        d_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad @ ctx.matrix(weight, grad.dtype), None, d_bias, None
