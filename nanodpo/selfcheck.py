"""Before anything is trained: is this model right in packed rows, and is the head its head? Measured, not believed.

A few random sequences go through the model as it came, one to a line, with its own full logits; then through the kernel
in each layout. Layers that carry state or bias past attention (convolution, SSM, alibi, sinks) fail packed rows here.
"""

import torch

from .attention import LOOP, VARLEN
from .distributed import sum_over_ranks
from .errors import UserError
from .packing import LAYOUTS, Group

# Largest error of a token's log-prob, in standard deviations of the log-probs: a freshly drawn model's vary by a tenth
# of a nat, a trained one's by several. Right layouts measured 6e-6 and 0.03, wrong ones from 6e-4 and mostly above 0.2.
TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 0.1}


@torch.no_grad()
def choose_layout(module, device: torch.device, dtype: torch.dtype, demand_flash: bool) -> tuple[str, str]:
    """(layout, attention implementation) that reproduces the plain model, the fastest that does; sets it on the model.

    `module` is a SequenceLogProbs. Raises UserError where none does, or where the flash kernel was demanded and fails.
    """
    model = module.model.get_base_model() if hasattr(module.model, "get_base_model") else module.model
    own = model.config._attn_implementation
    candidates = _candidates(model.config, own, device, dtype)
    if demand_flash and candidates[0][1] != VARLEN:
        raise UserError("--use_flash_attention: the flash kernel needs a CUDA device, --bf16 and a model without "
                        "attention softcap; leave the flag out")
    was_training = module.training
    module.eval()
    try:
        groups = _random_groups(model.config.get_text_config().vocab_size)
        truth = _full_logits(model, groups, device)
        errors = {}
        for layout, attention in candidates:
            _use(model, attention)
            errors[attention] = _error(module, LAYOUTS[layout](groups).to(device), truth)
            if errors[attention] <= TOLERANCE[dtype]:
                return layout, attention
            if attention == VARLEN and demand_flash:
                raise UserError("--use_flash_attention: the flash kernel does not give this model's own log-probs "
                                f"(error {errors[attention]:.2g} standard deviations); leave the flag out")
    finally:
        module.train(was_training)
    raise UserError("this model's output layer is not understood: log-probs differ from those of its own logits "
                    f"(error {errors[own]:.2g} standard deviations)")


def _candidates(config, own: str, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str]]:
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    flash = device.type == "cuda" and dtype == torch.bfloat16 and not capped
    return [*([("packed", VARLEN)] if flash else []), ("packed", LOOP), ("plain", own)]


def _use(model, attention: str) -> None:
    """Switches the attention of a model by name; one that can't switch keeps its own and fails the comparison."""
    model.set_attn_implementation(attention)


def _random_groups(vocabulary: int) -> list[Group]:
    """Short and long, ragged, with one-token and shared-prompt cases."""
    draw = torch.Generator().manual_seed(0)
    shape = [(9, [14, 5]), (1, [7, 7]), (16, [3, 1]), (40, [24, 33])]
    return [(torch.randint(vocabulary, (p,), generator=draw).tolist(),
             [torch.randint(vocabulary, (r,), generator=draw).tolist() for r in rs]) for p, rs in shape]


def _full_logits(model, groups: list[Group], device) -> torch.Tensor:
    """(N,): the model's own forward pass over one sequence at a time, its full logits, log_softmax, gather."""
    logps = []
    for prompt, responses in groups:
        for response in responses:
            ids = torch.tensor([prompt + response], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            logps.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt):, None]).squeeze(1))
    return torch.cat(logps)


def _error(module, row, truth: torch.Tensor) -> float:
    """The largest error, as TOLERANCE counts it; infinite where the model refuses the row."""
    spread = truth.std().double().clamp(min=0.01)  # an output layer of zeros has none
    try:
        error = (module.token_logps(row) - truth).abs().max().double() / spread
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, ImportError):
        error = torch.full_like(spread, torch.inf)
    # All ranks looked at the same sequences; with the mean of their errors they also decide the same.
    total, ranks = sum_over_ranks(torch.stack([error.nan_to_num(torch.inf, torch.inf), torch.ones_like(error)]))
    return (total / ranks).item()
