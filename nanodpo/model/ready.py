"""Makes a model ready to give log-probs: a policy, a checkpoint to be scored, or a reference, all in the same way; and
takes those of pairs."""

from collections.abc import Sequence

import torch
from torch import nn

from ..core.logprobs import OneRank, SequenceLogProbs
from ..core.packing import make_batch
from ..errors import UserError
from .adapters import adapted
from .precision import mix_precision, product_dtype
from .quantised import multiply_dequantised
from .sharding import gather_in_forward, is_sharded


def make_ready(model: nn.Module, bf16: bool, device: torch.device, zero3: bool = False) -> torch.dtype:
    """Sets the precision of a model that was loaded in the dtype of `storage_dtype`, and exchanges its layers.
    `zero3` as in `layers.fuse_lora`. Returns the dtype of matrix products. Raises UserError for an adapter that
    bfloat16 would round away, or that ZeRO-3 has no weights for."""
    product = product_dtype(bf16, device)
    if bf16:
        mix_precision(model, product)
    _check_adapted_tensors(model, zero3)
    exchange_layers(model, device, zero3)
    return product


def _check_adapted_tensors(model: nn.Module, zero3: bool) -> None:
    """Raises UserError for LoRA on a tensor that is held in bfloat16, or that stage 3 of ZeRO shards. PEFT adds it to
    the tensor itself: W + s B A in place of W x + s B A x. In bfloat16 most of that sum is W again, and it is made
    outside of the layer's call, for which stage 3 gathers W."""
    layers, tensors = adapted(model)
    only = f", or train linear layers alone: --lora_target_modules {','.join(layers)}" * bool(layers)
    if tensors and zero3:
        raise UserError(f"LoRA on {', '.join(tensors)} reads these weights where stage 3 of ZeRO has not gathered "
                        f"them; use a stage of 0 to 2{only}")
    if any(layer.get_param().dtype == torch.bfloat16 for layer in model.modules() if hasattr(layer, "parameter_name")):
        raise UserError(f"--bf16: rounds what LoRA adds to {', '.join(tensors)}; leave it out{only}")


def exchange_layers(model: nn.Module, device: torch.device, zero3: bool = False) -> None:
    """Puts layers that compute the same with less in the place of the model's own."""
    from . import layers  # slow to import, with transformers' models

    multiply_dequantised(model)
    layers.fuse_lora(model, zero3)
    layers.keep_less(model)
    if device.type == "cuda":
        layers.fuse_norms(model)
        layers.fuse_rotations(model)


def freeze(model: nn.Module, bf16: bool, device: torch.device, longest: int, parallel: OneRank,
           settings: dict | None = None, recompute: bool = False) -> tuple[SequenceLogProbs, str, str]:
    """(the model's log-probs on `device` in eval mode, the layout of batches, its attention), as training has them,
    without being trained. `longest`: tokens of the longest sequence; `parallel`: the ranks that share a batch;
    `settings`: DeepSpeed's, for a model whose weights the ranks share; `recompute`: in training mode, and only there,
    backward computes the layers again. Raises UserError for a model that can't."""
    from . import selfcheck  # slow to import, with transformers' models

    product = make_ready(model, bf16, device, zero3=is_sharded(model))
    model.requires_grad_(False)
    if recompute:
        from .recompute import Recompute  # as slow

        Recompute(model).use("full")
    module = SequenceLogProbs(model).to(device).eval()
    module.parallel = parallel
    if is_sharded(model):
        gather_in_forward(module, settings)
    return module, *selfcheck.choose_layout(module, device, product, False, longest, recompute)


@torch.no_grad()
def response_logps(model, examples: list, sides: Sequence[str], layout: str, device: torch.device) -> torch.Tensor:
    """(P, R) float64: log pi(y|x) of each response, summed over its tokens, nats; without gradients.
    `model` is a SequenceLogProbs or DeepSpeed's engine around one."""
    batch, index = make_batch(examples, sides, layout, device)
    return model(batch)[index]
