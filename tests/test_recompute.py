"""Recomputing against keeping: the same bits, and only as much again as was said."""

import pytest
import torch
from tiny_models import random_groups, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from nanodpo.attention import LOOP
from nanodpo.errors import UserError
from nanodpo.logprobs import SequenceLogProbs
from nanodpo.lora import fuse
from nanodpo.packing import pack, pad
from nanodpo.recompute import MODES, ByNeed, Recompute, _keep, kept_bytes

R = 2


def prepared(family: str, mode: str, lora: bool = True):
    """A model in training mode, with weights that do not depend on the mode."""
    from peft import LoraConfig, get_peft_model

    model = tiny(family, torch.float32)
    if lora:
        model = get_peft_model(model, LoraConfig(r=R, target_modules="all-linear", task_type="CAUSAL_LM"))
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, 0, 0.1)
    else:
        model.requires_grad_(True)
    fuse(model)
    Recompute(model, R if lora else 0).use(mode)
    return model.train()


def gradients(model, row):
    logps = SequenceLogProbs(model, chunk=7)(row)
    logps.sum().backward()
    return logps.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family, lora", [
    *((family, True) for family in ("llama", "qwen2", "qwen3_moe", "gemma2", "phi", "olmo2")),
    *((family, False) for family in ("llama", "qwen3_moe", "gpt2", "mamba"))])
def test_to_the_last_bit(family, lora):
    """R-G5: log-probs and every gradient, whatever is kept: biased and Conv1D layers, experts, caps, no attention."""
    row, found = (pad if family == "mamba" else pack)(random_groups()), {}
    for mode in MODES:
        model = prepared(family, mode, lora)
        if family != "mamba":
            (model.get_base_model() if lora else model).set_attn_implementation(LOOP)
        found[mode] = gradients(model, row)
    (logps, truth), others = found["keep"], [found["selective"], found["full"]]
    assert len(truth) > 3 and all(g.norm() > 0 for g in truth.values())
    for theirs, grads in others:
        assert theirs.equal(logps) and grads.keys() == truth.keys()
        assert [name for name in truth if not grads[name].equal(truth[name])] == []


class Count(TorchDispatchMode):
    """Products of matrices (of these names) and attention calls, forward and again."""

    def __init__(self, *names: str):
        super().__init__()
        self.names, self.products, self.attention = names or ("aten::mm", "aten::addmm", "aten::addmm_"), 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.products += op.name().partition(".")[0] in self.names
        self.attention += op.name() == "aten::_scaled_dot_product_flash_attention_for_cpu"
        return op(*args, **(kwargs or {}))


def test_what_is_computed_again():
    """Of llama's seven linear layers selective recomputes LoRA's second product, full all three and attention."""
    row, counts = pack(random_groups()), {}
    for mode in MODES:
        model = prepared("llama", mode)
        model.get_base_model().set_attn_implementation(LOOP)
        with Count() as counts[mode]:
            gradients(model, row)
    layers, sequences = 2, row.n_sequences
    more = {mode: (count.products - counts["keep"].products, count.attention) for mode, count in counts.items()}
    assert more == {"keep": (0, layers * sequences), "selective": (layers * 7, layers * sequences),
                    "full": (layers * 3 * 7, 2 * layers * sequences)}


@pytest.mark.parametrize("kernel", ["grouped_mm", "eager"])
def test_products_of_experts_are_kept(kernel):
    """A layer's experts are two products (or two for each expert that is asked), with either kernel of transformers."""
    row, counts = pack(random_groups()), {}
    for mode in MODES:
        model = prepared("qwen3_moe", mode, lora=False)
        model.set_attn_implementation(LOOP)
        model.set_experts_implementation(kernel)
        with Count("aten::_grouped_mm", "transformers::grouped_mm_fallback", "aten::mm") as counts[mode]:
            gradients(model, row)
    keep, selective, full = (counts[mode].products for mode in MODES)
    assert keep == selective < full


def test_the_flash_kernel_of_packed_rows_is_kept():
    """The op that CUDA runs, by its name: here it can't."""
    from torch.nn.attention import varlen  # noqa: F401 - registers it

    x = torch.zeros(4, 8)
    for op, kept in ((torch.ops.torch_attn._varlen_attn.default, True), (torch.ops.aten.silu.default, False),
                     (torch.ops.aten._scaled_dot_product_efficient_attention.default, True),
                     (torch.ops.aten._scaled_dot_product_flash_attention.default, True)):
        assert (_keep(None, op, x, rank=R) == CheckpointPolicy.MUST_SAVE) == kept, op


def test_a_model_without_such_layers():
    """One line."""
    model = tiny("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="LlamaForCausalLM can't compute its layers again .* Leave out --gradient"):
        Recompute(model, 0)


def test_kept_bytes_by_hand():
    """exp keeps its result, (3, 5) float64; the product before it is gone, the input and the weight were there."""
    weight, row = torch.ones(4, 5, dtype=torch.float64, requires_grad=True), torch.ones(3, 4, dtype=torch.float64)
    module = torch.nn.Module()
    module.forward = lambda row: (row @ weight).exp().sum()
    assert kept_bytes(module.eval(), row) == 3 * 5 * 8 + 8
    assert not module.training
    module.forward = lambda row: torch.utils.checkpoint.checkpoint(lambda x: (x @ weight).exp(), row * 2,
                                                                   use_reentrant=False).sum()
    assert kept_bytes(module, row) == 3 * 4 * 8 + 8  # what goes in


@pytest.mark.parametrize("mode", MODES)
def test_kept_bytes_of_a_model(mode):
    """Kept whole: what autograd's own hooks see saved, each storage once. Recomputed: at least each layer's input, at
    most a few other vectors a token; selective in between."""
    row, module = pack([([1] * 40, [[2] * 30, [3] * 50])]), SequenceLogProbs(prepared("llama", mode), chunk=7)
    module.model.get_base_model().set_attn_implementation(LOOP)
    known = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}
    known |= {x.untyped_storage().data_ptr() for x in (row.input_ids, row.position_ids, row.rows, row.targets, row.seq)}
    saved = {}

    def pack_hook(x):
        if x.untyped_storage().data_ptr() not in known:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    found = kept_bytes(module, row)
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x):
        logps = module(row)
    bytes_saved = sum(x.untyped_storage().nbytes() for x in saved.values())
    inputs = 2 * 120 * 32 * 4  # two layers, 120 tokens, 32 wide, float32
    assert logps.requires_grad
    if mode == "keep":
        assert bytes_saved <= found < 1.05 * bytes_saved
    else:
        keep = kept_bytes_of("keep", row)
        assert inputs < found < (0.75 if mode == "selective" else 0.4) * keep


def kept_bytes_of(mode, row):
    module = SequenceLogProbs(prepared("llama", mode), chunk=7)
    module.model.get_base_model().set_attn_implementation(LOOP)
    return kept_bytes(module, row)


def test_each_row_keeps_what_fits():
    """Limits by hand from the measured bytes; rows of every length get the fastest mode that fits, and the bits of a
    run that keeps everything, in turns."""
    model = prepared("llama", "keep")
    model.get_base_model().set_attn_implementation(LOOP)
    module, sample = SequenceLogProbs(model, chunk=7), pack([([1] * 40, [[2] * 30, [3] * 50])])
    kept = {mode: kept_bytes_of(mode, sample) / 120 for mode in MODES}
    layer = 2 * kept["keep"] / 2
    choose = ByNeed(Recompute(model, R), module, sample, room=100 * (kept["selective"] + layer))
    assert choose.limits == {mode: int(100 * (kept["selective"] + layer) / (kept[mode] + layer)) for mode in MODES}
    assert choose.limits["keep"] < choose.limits["selective"] == 100 < choose.limits["full"]
    whole = prepared("llama", "keep")
    whole.get_base_model().set_attn_implementation(LOOP)
    for tokens, mode in ((choose.limits["keep"], "keep"), (100, "selective"), (101, "full"), (5, "keep"),
                         (10**6, "full"), (99, "selective")):
        assert choose(tokens) == mode
        truth, here = gradients(whole, random_row(tokens)), gradients(model, random_row(tokens))
        assert here[0].equal(truth[0]) and all(here[1][name].equal(g) for name, g in truth[1].items())
        model.zero_grad()
        whole.zero_grad()


def random_row(tokens: int):
    draw = torch.Generator().manual_seed(tokens)
    ids = torch.randint(90, (min(tokens, 128),), generator=draw).tolist()
    return pack([(ids[:2], [ids[2:]])])
