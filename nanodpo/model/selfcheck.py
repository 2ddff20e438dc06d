"""Chooses, before training, the layout of batches that gives the model's own log-probs.

A few random sequences go through the unchanged model, one at a time, with its full logits; then through the kernel in
each layout. Packed batches are wrong for layers that carry state or bias past attention (convolution, SSM, alibi,
sinks), and every batch is for a head that is more than one matrix: both are found here.
"""

import math

import torch

from ..core.attention import LOOP, VARLEN, loop_attention, varlen_attention
from ..core.packing import LAYOUTS, Group, pack
from ..errors import RunStopped, UserError, first_line
from ..ranks.distributed import lost_peers_reported, say, sum_over_ranks
from ..ranks.gpu import changes_bits
from ..screen import folded
from .sharding import is_sharded
from .ulysses import shared

# The error of a token's log-prob, in standard deviations of the log-probs: those of a freshly drawn model vary by a
# tenth of a nat, those of a trained one by several. In float32 the largest error counts: in right layouts it was 6e-6,
# in wrong ones 6e-4 and more. In bfloat16 single tokens are far off in any layout, by 0.2 and once by 1.3, but in a
# wrong layout many are: the 95th percentile of SmolLM2's errors was up to 0.06 in right layouts, 0.21 and more in wrong
# ones.
TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 0.1}
QUANTILE = {torch.float32: 1.0, torch.bfloat16: 0.95}
# Settings that say how many keys a query sees: the last ones, or those that the model chooses.
WINDOWS = ("sliding_window", "attention_chunk_size", "index_topk", "keep_window_size", "indexer_budget")
REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, ImportError, LookupError,
            AssertionError)


@torch.no_grad()
def choose_layout(module, device: torch.device, dtype: torch.dtype, demand_flash: bool, longest: int = 0,
                  to_train: bool = False) -> tuple:
    """The fastest (layout, attention implementation) that gives the model's own log-probs; sets it on the model.

    `module` is a SequenceLogProbs; where ranks share a batch, so do they here. `dtype` is that of matrix products;
    `longest`: tokens of the run's longest sequence; `to_train`: training mode, without dropout, is compared as well.
    Prints why it passes over a faster one. Raises UserError where none is right, where the flash kernel was demanded
    and fails, and where the model is another one in training mode.
    """
    model = module.model.get_base_model() if hasattr(module.model, "get_base_model") else module.model
    own, ranks = model.config._attn_implementation, module.parallel.size
    candidates = _candidates(model.config, own, device, dtype)
    if ranks > 1:  # a model's own attention is not exchanged
        candidates = [found for found in candidates if found[0] == "packed"]
    if demand_flash and candidates[0][1] != VARLEN:
        raise UserError("--use_flash_attention: the flash kernel needs a CUDA device, --bf16 and a model without "
                        "attention softcap; leave the flag out")
    was_training = module.training
    module.eval()
    try:
        groups = _random_groups(model.config.get_text_config(), longest)
        truth = _full_logits(module.model, groups, device)  # with all that an adapter does
        if not truth.isfinite().all():
            raise UserError(f"{model.config.name_or_path}: its log-probs are not finite: weights of it, or of its "
                            "adapter, are broken")
        errors = {}
        for layout, attention in candidates:
            # One that can't be set stays the model's own, and fails the comparison.
            model.set_attn_implementation(shared(attention, ranks))
            batch = LAYOUTS[layout](groups).to(device)
            errors[attention] = _over_ranks(device, _error, module, batch, truth, QUANTILE[dtype])
            if attention == VARLEN and errors[attention] <= TOLERANCE[dtype]:
                errors[attention] = _over_ranks(device, _backward_error, model.config.get_text_config(), groups, device,
                                                dtype)
            if errors[attention] <= TOLERANCE[dtype]:
                if to_train:
                    _check_training_mode(module, batch, truth, device, dtype)
                return layout, attention
            why = (", since this model's own log-probs are other ones (by "
                   f"{errors[attention]:.2g} standard deviations of a token's)")  # of a refusal it is there already
            say(folded(f"not used{why * (errors[attention] < math.inf)}:\n  {describe(layout, attention, ranks)}"))
            if attention == VARLEN and demand_flash:
                raise UserError("--use_flash_attention: the flash kernel does not give this model's own log-probs "
                                f"(error {errors[attention]:.2g} standard deviations); leave the flag out")
    finally:
        module.train(was_training)
    raise _refusal(module.model, errors[LOOP if ranks > 1 else own], ranks)


def _adapter_of(model) -> str:
    """Words for an adapter on the model that is none of LoRA, since the reason may lie in it; else an empty text."""
    kind = model.active_peft_config.peft_type.value if hasattr(model, "peft_config") else "LORA"
    return f" with its {kind} adapter" * (kind != "LORA")


def _refusal(model, error: float, ranks: int) -> UserError:
    """The error where no layout gives the model's own log-probs, by the error of the last one."""
    name, adapter = model.config.name_or_path, _adapter_of(model)
    if ranks > 1:
        return UserError(f"--sequence_parallel_size {ranks}: ranks that share a batch do not get this model's own "
                         f"log-probs (error {error:.2g} standard deviations): layers other than attention look "
                         "at other positions, or its heads can't be exchanged; leave the flag out")
    if error == math.inf:
        return UserError(f"{name}{adapter}: this kind of model can't be trained or scored: it refuses batches, for the "
                         "reason above")
    if adapter:
        return UserError(f"{name}{adapter}: can't be scored: batches of texts do not get the log-probs that PEFT's own "
                         f"forward pass gives each text (error {error:.2g} standard deviations)")
    return UserError("this model's output layer is not understood: log-probs differ from those of its own logits "
                     f"(error {error:.2g} standard deviations)")


def _check_training_mode(module, batch, truth: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where training mode does not give `truth`, the log-probs of this batch in eval mode: another
    model would be trained than the one that is evaluated, saved and scored."""
    error = _over_ranks(device, _error, module.train(), batch, truth, QUANTILE[dtype])
    if error > TOLERANCE[dtype]:
        how = f"by {error:.2g} standard deviations of a token's" if error < math.inf else "it fails there"
        raise UserError(f"{module.model.config.name_or_path}: this kind of model can't be trained: in training mode "
                        f"its log-probs are not those of evaluation ({how})")


def describe(layout: str, attention: str, ranks: int = 1) -> str:
    """Lines for the screen: how batches are laid out, the attention, and how many ranks share a batch."""
    how = ("packed, without padding, each prompt once" if layout == "packed" else
           "plain, a line for each response, padded to one length")
    attention = {LOOP: "sequence by sequence, in PyTorch", VARLEN: "the flash kernel"}.get(
        attention, f"the model's own ({attention})")
    across = f"\n  {ranks} ranks share each batch: part of its tokens, part of attention's heads" if ranks > 1 else ""
    return f"batches: {how}\n  attention: {attention}{across}"


def _candidates(config, own: str, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str]]:
    text = config.get_text_config()
    if getattr(text, "attn_temperature_tuning", None):  # llama 4 scales queries by their place in the batch, but only
        return [("plain", own)]  # beyond thousands of tokens, where no short check sees it
    capped = getattr(text, "attn_logit_softcapping", None)
    flash = device.type == "cuda" and dtype == torch.bfloat16 and not capped
    return [*([("packed", VARLEN)] if flash else []), ("packed", LOOP), ("plain", own)]


def memory_is_linear(config, attention: str, longest: int) -> bool:
    """Whether attention's memory is in proportion to a batch's length, without a mask or scores of length x length."""
    window = getattr(config, "sliding_window", None)
    masked = getattr(config, "attn_logit_softcapping", None) or (window and window < longest)
    return attention == VARLEN or (attention == LOOP and not masked)


def _random_groups(config, longest: int) -> list[Group]:
    """Groups of random token ids: short and long, of unequal lengths, prompts and responses of one token, two responses
    to a prompt; and longer than the model's attention window, where the run's longest sequence is. None is longer than
    the model's context."""
    draw = torch.Generator().manual_seed(0)
    shape = [(9, [14, 5]), (1, [7, 7]), (16, [3, 1]), (40, [24, 33])]
    windows = {getattr(config, name, None) for name in WINDOWS}
    windows.add((getattr(config, "index_block_size", None) or 0) * (getattr(config, "index_topk_blocks", None) or 0))
    shape += [(window - 8, [24, 24]) for window in windows if window and 8 < window < longest]
    context = getattr(config, "max_position_embeddings", None) or math.inf
    shape = [(max(1, min(p, context - max(rs))), [min(r, context - 1) for r in rs]) for p, rs in shape]
    return [(torch.randint(config.vocab_size, (p,), generator=draw).tolist(),
             [torch.randint(config.vocab_size, (r,), generator=draw).tolist() for r in rs]) for p, rs in shape]


def _full_logits(model, groups: list[Group], device) -> torch.Tensor:
    """(N,) log-probs of the responses' tokens, nats, by the model's own forward pass over one sequence at a time: full
    logits, log_softmax, gather."""
    logps = []
    for prompt, responses in groups:
        for response in responses:
            ids = torch.tensor([prompt + response], device=device)
            try:
                with lost_peers_reported():
                    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            except REFUSALS as error:
                if _of_the_machine(error):
                    raise
                zero3 = ("; it may read a weight that stage 3 of ZeRO has not gathered: try a stage of 0 to 2"
                         ) * is_sharded(model)
                raise UserError(f"{model.config.name_or_path}{_adapter_of(model)}: its own forward pass fails: "
                                f"{first_line(error)}{zero3}") from error
            logps.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt):, None]).squeeze(1))
    return torch.cat(logps)


def _of_the_machine(error: Exception) -> bool:
    """Whether an error is not about the model: memory is short, another rank is lost, the order of sums varies."""
    return isinstance(error, (torch.OutOfMemoryError, RunStopped)) or changes_bits(error)


def _over_ranks(device, measure, *args) -> float:
    """The mean over all ranks of the error that `measure` returns; infinite where the model or the kernel raises.

    All ranks measure the same sequences. With the mean of their errors they also decide the same.
    """
    try:
        error = measure(*args)
    except REFUSALS as refusal:
        if _of_the_machine(refusal):
            raise
        say(f"the model refuses such a batch: {first_line(refusal)}")
        error = math.inf
    sums = torch.tensor([error, 1.0], dtype=torch.float64, device=device).nan_to_num(torch.inf, torch.inf)
    total, ranks = sum_over_ranks(sums).tolist()
    return total / ranks


def _error(module, batch, truth: torch.Tensor, quantile: float) -> float:
    """This quantile of the errors of all tokens, in standard deviations of `truth`, (N,) nats."""
    spread = truth.std().double().clamp(min=0.01)  # 0 for an output layer of zeros
    return ((module.token_logps(batch) - truth).abs().double().quantile(quantile) / spread).item()


@torch.enable_grad()
def _backward_error(config, groups: list[Group], device, dtype: torch.dtype) -> float:
    """The distance of the flash kernel's gradients from the loop's, relative to their norm, for random q, k and v of
    the model's shape. Without the model, since its backward pass would leave gradients in DeepSpeed's buffers.
    """
    draw = torch.Generator().manual_seed(0)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    batch = pack(groups).to(device)
    q, k, v = (torch.randn(1, h, batch.input_ids.shape[1], size, generator=draw).to(device, dtype).requires_grad_()
               for h in (heads, key_heads, key_heads))
    window, gradients = getattr(config, "sliding_window", None), []
    for attend in (loop_attention, varlen_attention):
        out, _ = attend(None, q, k, v, None, scaling=size**-0.5, segments=batch.segments, sliding_window=window)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(out.float().square().sum(), (q, k, v))]))
    return ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
