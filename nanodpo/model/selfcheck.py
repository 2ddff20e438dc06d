"""Before anything is trained: is this model right in packed rows, and is the head its head? Measured, not believed.

A few random sequences go through the model as it came, one to a line, with its own full logits; then through the kernel
in each layout. Layers that carry state or bias past attention (convolution, SSM, alibi, sinks) fail packed rows here.
"""

import math

import torch

from ..core.attention import LOOP, VARLEN, loop_attention, varlen_attention
from ..core.packing import LAYOUTS, Group, pack
from ..errors import UserError, first_line
from ..ranks.distributed import say, sum_over_ranks

# Error of a token's log-prob, in standard deviations of the log-probs: a freshly drawn model's vary by a tenth of a
# nat, a trained one's by several. In float32 the largest one: right layouts measured 6e-6, wrong ones from 6e-4. In
# bfloat16 single tokens are far off in any layout, by 0.2 and once by 1.3, but a wrong one is off in many: of
# SmolLM2's 95th percentiles right ones measured up to 0.06, wrong ones from 0.21.
TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 0.1}
QUANTILE = {torch.float32: 1.0, torch.bfloat16: 0.95}


@torch.no_grad()
def choose_layout(module, device: torch.device, dtype: torch.dtype, demand_flash: bool, longest: int = 0) -> tuple:
    """(layout, attention implementation) that reproduces the plain model, the fastest that does; sets it on the model.

    `module` is a SequenceLogProbs, `longest` the tokens of the run's longest sequence. Says why what it passed over
    was passed over. Raises UserError where none does, or where the flash kernel was demanded and fails.
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
        groups = _random_groups(model.config.get_text_config(), longest)
        truth = _full_logits(model, groups, device)
        if not truth.isfinite().all():
            raise UserError(f"{model.config.name_or_path}: its log-probs are not finite: weights of it, or of its "
                            "adapter, are broken")
        errors = {}
        for layout, attention in candidates:
            _use(model, attention)
            row = LAYOUTS[layout](groups).to(device)
            errors[attention] = _agreed(device, _error, module, row, truth, QUANTILE[dtype])
            if attention == VARLEN and errors[attention] <= TOLERANCE[dtype]:
                errors[attention] = _agreed(device, _backward_error, model.config.get_text_config(), groups, device,
                                            dtype)
            if errors[attention] <= TOLERANCE[dtype]:
                return layout, attention
            say(f"{layout} rows with {attention} are wrong for this model (error {errors[attention]:.2g} standard "
                "deviations of a token's log-prob)")
            if attention == VARLEN and demand_flash:
                raise UserError("--use_flash_attention: the flash kernel does not give this model's own log-probs "
                                f"(error {errors[attention]:.2g} standard deviations); leave the flag out")
    finally:
        module.train(was_training)
    raise UserError("this model's output layer is not understood: log-probs differ from those of its own logits "
                    f"(error {errors[own]:.2g} standard deviations)")


def describe(layout: str, attention: str) -> str:
    """How rows are computed, for the screen."""
    how = "packed, without padding, each prompt once" if layout == "packed" else "one a response, padded to one length"
    return f"rows: {how}; attention: {attention}"


def _candidates(config, own: str, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str]]:
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    flash = device.type == "cuda" and dtype == torch.bfloat16 and not capped
    return [*([("packed", VARLEN)] if flash else []), ("packed", LOOP), ("plain", own)]


def grows_with_rows(config, attention: str, longest: int) -> bool:
    """Whether attention's memory is in proportion to a row's length: no mask of it by itself, no matrix of scores."""
    window = getattr(config, "sliding_window", None)
    masked = getattr(config, "attn_logit_softcapping", None) or (window and window < longest)
    return attention == VARLEN or (attention == LOOP and not masked)


def _use(model, attention: str) -> None:
    """Switches the attention of a model by name; one that can't switch keeps its own and fails the comparison."""
    model.set_attn_implementation(attention)


def _random_groups(config, longest: int) -> list[Group]:
    """Short and long, ragged, with one-token and shared-prompt cases, and past any window that the run goes past."""
    draw = torch.Generator().manual_seed(0)
    shape = [(9, [14, 5]), (1, [7, 7]), (16, [3, 1]), (40, [24, 33])]
    windows = {getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")}
    shape += [(window - 8, [24, 24]) for window in windows if window and 8 < window < longest]
    return [(torch.randint(config.vocab_size, (p,), generator=draw).tolist(),
             [torch.randint(config.vocab_size, (r,), generator=draw).tolist() for r in rs]) for p, rs in shape]


def _full_logits(model, groups: list[Group], device) -> torch.Tensor:
    """(N,): the model's own forward pass over one sequence at a time, its full logits, log_softmax, gather."""
    logps = []
    for prompt, responses in groups:
        for response in responses:
            ids = torch.tensor([prompt + response], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            logps.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt):, None]).squeeze(1))
    return torch.cat(logps)


def _agreed(device, measure, *args) -> float:
    """The error that `measure` finds, infinite where the model or the kernel refuses: the mean over ranks.

    All ranks look at the same sequences; with the mean of their errors they also decide the same.
    """
    try:
        error = measure(*args)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, ImportError) as refusal:
        say(f"the model refuses such a row: {first_line(refusal)}")
        error = math.inf
    found = torch.tensor([error, 1.0], dtype=torch.float64, device=device).nan_to_num(torch.inf, torch.inf)
    total, ranks = sum_over_ranks(found).tolist()
    return total / ranks


def _error(module, row, truth: torch.Tensor, quantile: float) -> float:
    """This quantile of the errors of all tokens, as TOLERANCE counts them."""
    spread = truth.std().double().clamp(min=0.01)  # an output layer of zeros has none
    return ((module.token_logps(row) - truth).abs().double().quantile(quantile) / spread).item()


@torch.enable_grad()
def _backward_error(config, groups: list[Group], device, dtype: torch.dtype) -> float:
    """How far the flash kernel's gradients are from the loop's, relative to their norm, on random heads of this shape.

    The kernel alone: a backward pass through the model would leave gradients in DeepSpeed's buffers.
    """
    draw = torch.Generator().manual_seed(0)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    row = pack(groups).to(device)
    q, k, v = (torch.randn(1, h, row.input_ids.shape[1], size, generator=draw).to(device, dtype).requires_grad_()
               for h in (heads, shared, shared))
    window, found = getattr(config, "sliding_window", None), []
    for attend in (loop_attention, varlen_attention):
        out, _ = attend(None, q, k, v, None, scaling=size**-0.5, segments=row.segments, sliding_window=window)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(out.float().square().sum(), (q, k, v))]))
    return ((found[0] - found[1]).norm() / found[0].norm()).item()
