"""Recomputing against keeping: the same bits, and only as much again as was said."""

import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, environment
from tiny_models import random_groups, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nanodpo.core.attention import LOOP, VARLEN
from nanodpo.core.logprobs import CHUNK_BYTES, SequenceLogProbs
from nanodpo.core.packing import pack, pad
from nanodpo.errors import UserError
from nanodpo.model import recompute
from nanodpo.model.layers import fuse_lora, keep_less
from nanodpo.model.recompute import MODES, FitToMemory, Recompute, _Live, peak_bytes, sample_batch
from nanodpo.model.selfcheck import choose_layout, memory_is_linear
from nanodpo.ranks.gpu import use_expandable_segments

R, CPU = 2, torch.device("cpu")


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
    fuse_lora(model)
    keep_less(model)
    Recompute(model).use(mode)
    return model.train()


def gradients(model, row):
    logps = SequenceLogProbs(model, chunk_size=7)(row)
    logps.sum().backward()
    return logps.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family, lora", [
    *((family, True) for family in ("llama", "qwen2", "qwen3_moe", "gemma2", "phi", "olmo2")),
    *((family, False) for family in ("llama", "qwen3_moe", "gpt2", "mamba"))])
def test_to_the_last_bit(family, lora):
    """Log-probs and every gradient, whatever is kept: biased and Conv1D layers, experts, caps, no attention."""
    row, found = (pad if family == "mamba" else pack)(random_groups()), {}
    for mode in MODES:
        model = prepared(family, mode, lora)
        if family != "mamba":
            (model.get_base_model() if lora else model).set_attn_implementation(LOOP)
        found[mode] = gradients(model, row)
    (logps, truth), *others = found.values()
    assert len(truth) > 3 and all(g.norm() > 0 for g in truth.values())
    for theirs, grads in others:
        assert theirs.equal(logps) and grads.keys() == truth.keys()
        assert [name for name in truth if not grads[name].equal(truth[name])] == []


class Count(TorchDispatchMode):
    """Products of matrices and attention calls, forward and again."""

    def __init__(self):
        super().__init__()
        self.products, self.attention = 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.products += op.name().partition(".")[0] in ("aten::mm", "aten::addmm", "aten::addmm_")
        self.attention += op.name() == "aten::_scaled_dot_product_flash_attention_for_cpu"
        return op(*args, **(kwargs or {}))


def test_what_is_computed_again():
    """Of llama's seven linear layers all three products, and attention; kept, nothing of either."""
    row, counts = pack(random_groups()), {}
    for mode in MODES:
        model = prepared("llama", mode)
        model.get_base_model().set_attn_implementation(LOOP)
        with Count() as counts[mode]:
            gradients(model, row)
    layers, sequences = 2, row.n_sequences
    more = {mode: (count.products - counts["keep"].products, count.attention) for mode, count in counts.items()}
    assert more == {"keep": (0, layers * sequences), "full": (layers * 3 * 7, 2 * layers * sequences),
                    "offload": (layers * 3 * 7, 2 * layers * sequences)}


def test_a_model_without_such_layers():
    """One line."""
    model = tiny("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="LlamaForCausalLM can't compute its layers again .* Leave out --gradient"):
        Recompute(model)


class Chain(torch.nn.Module):
    """Five exponentials in a row, each of which keeps its result."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def states(self, row):
        x = row.input_ids * self.weight
        for _ in range(5):
            x = checkpoint(torch.exp, x, use_reentrant=False) if self.training and row.again else x.exp()
        return x


@pytest.mark.parametrize("again, tensors", [(False, 6), (True, 7)])
def test_peak_bytes_by_hand(again, tensors):
    """Five results, and a gradient as large. Computed again: five inputs, and when the last one's exponential is there
    once more, the gradient it is multiplied with."""
    row, module = SimpleNamespace(input_ids=torch.zeros(1, 1000, dtype=torch.float64), again=again), Chain()
    assert 0 <= peak_bytes(module.eval(), row) - tensors * 8000 < 200
    assert not module.training and module.weight.grad is None


def rows_of(tokens: int):
    """A random row, and the same ids wherever it is cut."""
    draw = torch.Generator().manual_seed(tokens)
    ids = torch.randint(90, (tokens,), generator=draw).tolist()
    return pack([(ids[:9], [ids[9 : tokens // 2], ids[tokens // 2:]])])


def packed(mode: str):
    model = prepared("llama", mode)
    model.get_base_model().set_attn_implementation(LOOP)
    return model, SequenceLogProbs(model, chunk_size=7)


class Everything(_Live):
    """Of what lives, without the gradients that stay."""

    def most(self, module, row) -> int:
        with self:
            module(row).sum().backward()
        return self.peak - sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_row_takes_what_was_measured(mode):
    """Per token as between two shorter rows; against a whole backward pass with all gradients, at the length that a
    room allows: never more than that room, and not much less."""
    model, module = packed(mode)
    need = FitToMemory(Recompute(model), module, rows_of, budget=20e6)
    need.recompute.use(mode)
    tokens = need.limits[mode]
    assert tokens > 1500
    most = Everything(torch.device("cpu")).most(module, rows_of(tokens))
    assert 0.85 * 20e6 < most <= 20e6 * 1.02


def keep(saved: list, x):
    saved.append(x)
    return x


def test_what_keeping_takes_is_what_autograd_says():
    """Kept whole, a token takes at least what autograd's own hooks see saved for it, each storage once."""
    model, module = packed("keep")
    need, seen = FitToMemory(Recompute(model), module, rows_of, budget=1.0), []
    need.recompute.use("keep")
    for tokens in (256, 512):
        saved, row = [], rows_of(tokens)
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(keep, saved), lambda x: x):
            logps = module(row)
        seen.append(sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}.values()))
        assert logps.requires_grad
    assert 1 <= need.per_token["keep"] / ((seen[1] - seen[0]) / 256) < 1.2
    assert need.per_token["full"] < 0.7 * need.per_token["keep"]


@pytest.mark.parametrize("lora", [True, False])
def test_the_head_hides_nothing(lora):
    """A token of a model with 30,000 words takes what it takes with 100, whatever its head does meanwhile, trained or
    not: a peak in the head's chunks would not grow with the row."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    found = []
    for words in (100, 30_000):
        config = LlamaConfig(vocab_size=words, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=4, tie_word_embeddings=False)
        model = LlamaForCausalLM(config)
        if lora:
            model = get_peft_model(model, LoraConfig(r=R, target_modules="all-linear", task_type="CAUSAL_LM"))
            fuse_lora(model)
        keep_less(model)
        (model.get_base_model() if lora else model).set_attn_implementation(LOOP)
        found.append(FitToMemory(Recompute(model), SequenceLogProbs(model), rows_of, 1.0).per_token)
    assert found[0] == pytest.approx(found[1], rel=1e-9) and found[0]["full"] > 2 * 32 * 4


@pytest.mark.parametrize("attention, more, grows", [
    (LOOP, {}, True), (VARLEN, {"sliding_window": 10}, True), (LOOP, {"sliding_window": 10}, False),
    (LOOP, {"sliding_window": 200}, True), (LOOP, {"attn_logit_softcapping": 50.0}, False), ("eager", {}, False)])
def test_what_can_be_foreseen(attention, more, grows):
    """A row's memory in proportion to its length: no mask of a window within it, no scores kept for a cap."""
    assert memory_is_linear(SimpleNamespace(**more), attention, longest=100) == grows


def test_each_row_keeps_what_fits():
    """Modes by hand for 4 layers that take 10, 6 and 2 bytes a token, by the bytes that a token may have."""
    need = FitToMemory.__new__(FitToMemory)
    need.recompute, need.per_token = SimpleNamespace(layers=[0] * 4), {"keep": 10.0, "full": 6.0, "offload": 2.0}
    need.budget = 1200
    for tokens, modes in ((1, "kkkk"), (120, "kkkk"), (121, "fkkk"), (133, "fkkk"), (134, "ffkk"), (199, "ffff"),
                          (200, "ffff"), (201, "offf"), (300, "ooff"), (599, "oooo"), (600, "oooo"), (10**6, "oooo")):
        assert "".join(mode[0] for mode in need.modes(tokens)) == modes, tokens


def test_ranks_choose_by_the_one_with_the_least_memory(monkeypatch):
    """Where they share a batch, all must compute the same layers again: each exchanges states with the others."""
    model, module = packed("keep")
    own = FitToMemory(Recompute(model), module, rows_of, budget=2e6).per_token
    other = {mode: size * 2 for mode, size in own.items()}
    monkeypatch.setattr(recompute, "gather_or_raise", lambda error, fact: [fact, (1e6, other)])
    fit = FitToMemory(Recompute(model), module, rows_of, budget=2e6)
    assert (fit.budget, fit.per_token) == (1e6, other) and fit.limits["keep"] == int(1e6 / other["keep"])


def test_rows_in_turns_have_the_same_bits():
    """Whatever each row's layers keep, log-probs and gradients are those of a model that keeps everything."""
    model, module = packed("keep")
    need = FitToMemory(Recompute(model), module, rows_of, budget=2e6)
    whole, seen = packed("keep")[0], set()
    for tokens in (150, 20, need.limits["keep"], need.limits["keep"] + 2, 900, 30, need.limits["full"] - 1):
        seen.add(tuple(need(tokens)))
        truth, here = gradients(whole, rows_of(tokens)), gradients(model, rows_of(tokens))
        assert here[0].equal(truth[0]) and [name for name, g in truth[1].items() if not here[1][name].equal(g)] == []
        model.zero_grad()
        whole.zero_grad()
    assert seen == {("keep",) * 2, ("full", "keep"), ("full",) * 2}


def test_what_is_offloaded(monkeypatch):
    """Each layer's input, and nothing else, goes to the CPU's memory and is back when its layer is computed again."""
    gone = []

    def save_on_cpu(pin_memory):
        def away(x):
            gone.append(tuple(x.shape))
            return x.clone()

        return torch.autograd.graph.saved_tensors_hooks(away, lambda x: x)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", save_on_cpu)
    truth = gradients(packed("keep")[0], rows_of(100))[1]
    found = gradients(packed("offload")[0], rows_of(100))[1]
    gone = [shape for shape in gone if shape != (0,)]  # which torch 2.11 has beside them
    assert gone == [(1, 100, 32)] * 2 and all(found[name].equal(g) for name, g in truth.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_a_row_takes_what_was_measured_on_a_gpu(mode):
    """By the allocator's own count, in bfloat16 with the flash kernel: a row as long as a room allows stays within it,
    but for the head's chunks and 8%."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=150_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
                         num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2**17)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear")).cuda().bfloat16()
    fuse_lora(model)
    keep_less(model)
    model.get_base_model().set_attn_implementation(VARLEN)
    module, room = SequenceLogProbs(model).train(), 2.0 * 2**30
    need = FitToMemory(Recompute(model), module, lambda tokens: rows_of(tokens).to(torch.device("cuda")), room)
    need.recompute.use(mode)
    row = rows_of(need.limits[mode]).to(torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    module(row).sum().backward()
    most = torch.cuda.max_memory_allocated() - before
    assert 0.7 * room < most < room / 0.92 + 3 * CHUNK_BYTES


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_users_own_allocator_settings_stay(name, monkeypatch):
    """Under the name of newer releases of torch and the one before."""
    for key in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    use_expandable_segments()
    assert {k: v for k, v in os.environ.items() if k.endswith("_ALLOC_CONF")} == {name: "max_split_size_mb:512"}


STARTS_CUDA = """
import importlib, os, sys, torch

def cuda_starts():
    print("CUDA starts with", os.environ.get("PYTORCH_ALLOC_CONF"), flush=True)
    os._exit(0)

torch.cuda.is_available, torch.cuda.device_count, torch.cuda._lazy_init = lambda: True, lambda: 1, cuda_starts
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "score"])
def test_the_allocator_is_told_before_cuda_starts(script, tiny):
    """It reads its settings when CUDA starts, which already happens when the GPU is asked for its name."""
    flags = {"train": ["--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl"],
             "score": [tiny / "model", "--dataset_path", f"t={tiny / 'train.jsonl'}"]}[script]
    clean = {name: value for name, value in environment().items() if not name.endswith("_ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", STARTS_CUDA, script, *flags], capture_output=True, text=True,
                          timeout=300, env=clean, cwd=ROOT)
    assert done.stdout == "CUDA starts with expandable_segments:True\n", done.stderr[-2000:]


HOLES = """
import torch
from nanodpo.ranks.gpu import use_expandable_segments
use_expandable_segments()
for tokens in (5001, 7003, 9007, 11003, 6007, 10007, 8009):  # rows, and what their layers keep
    kept = [torch.empty(tokens, width, device="cuda") for _ in range(10) for width in (512, 1024, 512, 2048)]
    del kept
print(torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated())
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_of_all_lengths_leave_no_holes():
    """The allocator holds little more than the largest row took."""
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.05


@pytest.mark.parametrize("family, name", [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
def test_a_table_of_positions_may_be_shorter_than_what_is_tried(family, name):
    """The self-check and --activation_memory make up batches; of a model that has learned 16 positions none is longer,
    and a token takes what it takes where there are 1024."""
    found = {}
    for context in (16, 1024):
        model = tiny(family, torch.float32, **{name: context, "max_position_embeddings": context}).requires_grad_(True)
        module = SequenceLogProbs(model)
        assert choose_layout(module, CPU, torch.float32, False) == ("packed", LOOP)
        sample = functools.partial(sample_batch, "packed", model.config, CPU)
        assert sample(512).position_ids.max() < context
        found[context] = FitToMemory(Recompute(model), module, sample, 1e6).per_token
    assert found[16] == pytest.approx(found[1024], rel=0.05)
