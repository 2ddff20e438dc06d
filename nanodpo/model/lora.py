"""LoRA's term added to a layer's output in one product. PEFT multiplies, scales and adds: three passes over tensors as
large as that output, and holes in memory where they were. Slow to import, with PEFT.

Shapes: (..., I) inputs, (..., O) outputs, R rank. y = W x + s B A x, arXiv 2106.09685, equation 3.
"""

import torch
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fuse(model: nn.Module, in_place: bool = True) -> None:
    """Lets every plain LoRA layer of a PEFT model add in one product; names, weights and what is saved stay the same.

    A layer that is more than W x + s B A x (DoRA, biases) stays PEFT's own. Not `in_place` where
    somebody else holds W x: ZeRO-3 does.
    """
    for layer in [module for module in model.modules() if type(module) is Linear]:
        for name, second in layer.lora_B.items():
            dtypes = {linear.weight.dtype for linear in (layer.lora_A[name], second)}
            base = layer.get_base_layer().weight.dtype  # bfloat16 beside LoRA's float32 with --bf16
            fits = len(dtypes) == 1 and dtypes <= {base, torch.float32 if base == torch.bfloat16 else base}
            if name not in layer.lora_variant and second.bias is None and fits:
                layer.cast_input_dtype_enabled = False  # would copy inputs that autocast takes as they are
                layer.lora_B[name] = Added(second, in_place)
                layer.lora_variant[name] = OneProduct


class Added(nn.Module):
    """PEFT's lora_B, called with what its product is added to. A module, and called as one, because ZeRO-3 gathers a
    sharded weight when the module that holds it is called.
    """

    def __init__(self, linear: nn.Linear, in_place: bool):
        super().__init__()
        self.weight, self.in_place = linear.weight, in_place  # (O, R)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """(..., R), (..., O) -> (..., O): y + B h."""
        return _AddedProduct.apply(y, h, self.weight, self.in_place)


class OneProduct(LoraVariant):
    """What PEFT asks for the output of a layer with this variant."""

    merge_unsafe = LoraVariant.merge_safe  # raises NotImplementedError, where PEFT's own would do nothing

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
