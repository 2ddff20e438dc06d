"""Makes a model ready to give log-probs without being trained: a checkpoint to be scored, or a reference."""

import torch
from torch import nn

from ..core.logprobs import SequenceLogProbs
from .precision import mix_precision, product_dtype


def freeze(model: nn.Module, bf16: bool, device: torch.device, longest: int) -> tuple[SequenceLogProbs, str, str]:
    """(the model's log-probs on `device` in eval mode, the layout of batches, its attention), as training has them. The
    model was loaded in the dtype of `storage_dtype`. `longest`: tokens of the longest sequence."""
    from . import layers, selfcheck  # slow to import, with transformers' models

    product = product_dtype(bf16, device)
    if bf16:
        mix_precision(model, product)
    layers.fuse_lora(model)
    layers.keep_less(model)
    model.requires_grad_(False)
    module = SequenceLogProbs(model).to(device).eval()
    return module, *selfcheck.choose_layout(module, device, product, False, longest)
