"""Before anything is trained: is this model right in packed rows, and is the head its head? Measured, not believed.

A few random sequences go through the model as it came, one to a line, with its own full logits; then through the kernel
in each layout. Layers that carry state or bias past attention (convolution, SSM, alibi, sinks) fail packed rows here.
"""

import torch

from .attention import LOOP, VARLEN
from .distributed import sum_over_ranks
from .errors import UserError
from .packing import Group, pack, pad

# Largest error of a token's log-prob, nats. A wrong layout is off by tenths and more; bfloat16's own noise reaches 0.1.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.3}
LAYOUTS = {"packed": pack, "plain": pad}


@torch.no_grad()
def choose_layout(module, device: torch.device, dtype: torch.dtype, demand_flash: bool) -> tuple[str, str]:
    """(layout, attention implementation) that reproduces the plain model, the fastest that does; sets it on the model.

    `module` is a SequenceLogProbs. Raises UserError where none does, or where the flash kernel was demanded and fails.
    """
    model = module.model.get_base_model() if hasattr(module.model, "get_base_model") else module.model
    own = model.config._attn_implementation
    was_training = module.training
    module.eval()
    try:
        groups = _random_groups(model.config.get_text_config().vocab_size)
        truth = _full_logits(model, groups, device)
        errors = {}
        for layout, attention in _candidates(own, device):
            _use(model, attention)
            errors[attention] = _error(module, LAYOUTS[layout](groups).to(device), truth)
            if errors[attention] <= TOLERANCE[dtype]:
                return layout, attention
            if attention == VARLEN and demand_flash:
                raise UserError(f"--use_flash_attention: the flash kernel is off by {errors[attention]:.2g} nats a "
                                "token here, or does not run; leave the flag out")
    finally:
        module.train(was_training)
    raise UserError(f"this model's output layer is not understood: log-probs off by {errors[own]:.2g} nats a token "
                    "from the model's own logits")


def _candidates(own: str, device: torch.device) -> list[tuple[str, str]]:
    flash = [("packed", VARLEN)] if device.type == "cuda" else []
    return [*flash, ("packed", LOOP), ("plain", own)]


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
    """The largest error over all ranks; infinite where the model refuses the row."""
    try:
        error = (module.token_logps(row) - truth).abs().max().double()
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, ImportError):
        error = torch.tensor(torch.inf, dtype=torch.float64, device=truth.device)
    return sum_over_ranks(error.nan_to_num(torch.inf)).item()
