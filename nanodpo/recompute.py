"""What backward computes again instead of keeping: nothing, the cheap part of each layer, or all of it.

The numbers are the same to the last bit in all three; memory and time are not (bench/README.md).
"""

import functools

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .errors import UserError, first_line

# Products of matrices, and which argument of each holds the hidden states.
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1,
            "aten::_grouped_mm": 0, "transformers::grouped_mm_fallback": 0}  # of experts


def recompute(model: nn.Module, args, zero_stage: int) -> None:
    """Sets the model's layers up for --gradient_checkpointing or --selective_checkpointing.

    Raises UserError where the model has no such layers.
    """
    if not (args.gradient_checkpointing or args.selective_checkpointing):
        return
    # ZeRO-3 frees weights between forward and backward, which the newer, hook-based checkpointing takes for an error;
    # the older one runs backward only where the inputs have a gradient.
    settings = {"use_reentrant": zero_stage == 3}
    if args.selective_checkpointing:
        keep = functools.partial(_keep, rank=args.lora_r if args.use_lora else 0)
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep)
    try:
        model.gradient_checkpointing_enable(settings)
    except ValueError as error:
        flag = "selective" if args.selective_checkpointing else "gradient"
        raise UserError(f"--{flag}_checkpointing: {first_line(error)} Leave it out") from error
    if zero_stage == 3:
        model.enable_input_require_grads()


def _keep(context, op, *args, rank: int, **kwargs) -> CheckpointPolicy:
    """Keeps attention and large products; norms, activations and what LoRA adds to a product cost little.

    LoRA's second product sums over no more than its rank, and is as large as the one it is added to.
    """
    name = op.name().partition(".")[0]
    large = name in PRODUCTS and args[PRODUCTS[name]].shape[-1] > rank
    if large or "attention" in name or "attn" in name:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
