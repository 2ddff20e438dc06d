"""Recomputing against keeping: the same bits, and only as much again as was said."""

from types import SimpleNamespace

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
from nanodpo.recompute import _keep, recompute

R = 2
FLAGS = {"keep": (False, False), "selective": (False, True), "full": (True, False)}


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
    full, selective = FLAGS[mode]
    fuse(model, in_place=not selective)  # as training has it
    recompute(model, SimpleNamespace(gradient_checkpointing=full, selective_checkpointing=selective, use_lora=lora,
                                     lora_r=R if lora else 1000), 0)  # a default that no layer has
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
    for mode in FLAGS:
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
    """Of llama's seven linear layers selective recomputes LoRA's second product, full all three and attention. In both
    transformers also lets the embeddings have a gradient, so that the first layer's q, k and v are differentiated by
    their input: 2 x 3 more.
    """
    row, counts = pack(random_groups()), {}
    for mode in FLAGS:
        model = prepared("llama", mode)
        model.get_base_model().set_attn_implementation(LOOP)
        with Count() as counts[mode]:
            gradients(model, row)
    layers, sequences = 2, row.n_sequences
    more = {mode: (count.products - counts["keep"].products, count.attention) for mode, count in counts.items()}
    assert more == {"keep": (0, layers * sequences), "selective": (layers * 7 + 6, layers * sequences),
                    "full": (layers * 3 * 7 + 6, 2 * layers * sequences)}


@pytest.mark.parametrize("kernel", ["grouped_mm", "eager"])
def test_products_of_experts_are_kept(kernel):
    """A layer's experts are two products (or two for each expert that is asked), with either kernel of transformers."""
    row, counts = pack(random_groups()), {}
    for mode in FLAGS:
        model = prepared("qwen3_moe", mode, lora=False)
        model.set_attn_implementation(LOOP)
        model.set_experts_implementation(kernel)
        with Count("aten::_grouped_mm", "transformers::grouped_mm_fallback", "aten::mm") as counts[mode]:
            gradients(model, row)
    keep, selective, full = (counts[mode].products for mode in FLAGS)
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
    """One line, whichever was asked for."""
    model = tiny("llama")
    model.supports_gradient_checkpointing = False
    for full, flag in ((True, "--gradient_checkpointing"), (False, "--selective_checkpointing")):
        args = SimpleNamespace(gradient_checkpointing=full, selective_checkpointing=not full, use_lora=False, lora_r=0)
        with pytest.raises(UserError, match=f"{flag}: LlamaForCausalLM does not support .*Leave it out"):
            recompute(model, args, 0)
