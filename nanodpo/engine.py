"""The DeepSpeed engine around the log-prob module, and its update."""

import math

import torch

from . import selfcheck
from .distributed import say
from .logprobs import SequenceLogProbs


def build(model, args, settings: dict, device, longest: int):
    """(DeepSpeed engine around the log-prob module, layout of rows, name of the attention)."""
    import deepspeed  # slow to import, and --help and wrong input don't need it

    if args.gradient_checkpointing:
        # ZeRO-3 frees weights between forward and backward, which the newer, hook-based checkpointing takes for an
        # error; the older one runs backward only where the inputs have a gradient.
        reentrant = settings.get("zero_optimization", {}).get("stage") == 3
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=args.learning_rate,
                                  betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, fused=True)
    module = SequenceLogProbs(model)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    layout, attention = selfcheck.choose_layout(module, device, dtype, args.use_flash_attention, longest)
    say(f"rows: {layout}, attention {attention}")
    return engine, layout, attention


def take_step(engine) -> tuple[float, bool]:
    """(the gradient's global norm before clipping, over all ranks; whether the update was made)."""
    if engine.zero_optimization_stage():
        engine.step()  # leaves weights and moments as they are where the norm is not finite
        return float(engine.get_global_grad_norm()), engine.was_step_applied()
    # Without ZeRO DeepSpeed keeps no norm, and steps whatever it is.
    grads = [p.grad.double().square().sum() for p in engine.module.parameters() if p.grad is not None]
    norm = torch.stack(grads).sum().sqrt().item()
    engine.step() if math.isfinite(norm) else engine.zero_grad()
    return norm, math.isfinite(norm)
