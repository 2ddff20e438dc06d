"""Gated MLPs that keep two tensors: the same bits as transformers' own, and what they keep, counted by hand."""

import pytest
import torch
from test_recompute import gradients, prepared, rows_of
from tiny_models import random_groups
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from nanodpo.core.attention import LOOP
from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.packing import pack
from nanodpo.model.layers import keep_less
from nanodpo.model.recompute import MODES, peak_bytes

T, D, F = 6, 4, 7


def mlp(dtype=torch.float64, kind=LlamaMLP) -> nn.Module:
    torch.manual_seed(0)
    return kind(LlamaConfig(hidden_size=D, intermediate_size=F, mlp_bias=True, num_attention_heads=1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family, lora, thinned", [
    *((family, lora, 2) for family in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "olmo2")
      for lora in (True, False)), ("phi3", True, 0), ("gpt2", False, 0), ("qwen3_moe", False, 0)])
def test_to_the_last_bit(family, lora, thinned, dtype):
    """Log-probs and every gradient are those of the MLP as it came. Another kind of MLP stays as it came."""
    row, found = pack(random_groups()), []
    for whole in (True, False):
        model = prepared(family, "keep", lora).to(dtype)
        (model.get_base_model() if lora else model).set_attn_implementation(LOOP)
        layers = [module for module in model.modules() if hasattr(module, "keeps_less")]
        assert len(layers) == thinned
        for layer in layers if whole else ():
            del layer.forward
        found.append(gradients(model, row))
    (logps, truth), (same, grads) = found
    assert len(truth) > 3 and all(g.norm() > 0 for g in truth.values())
    assert same.equal(logps) and [name for name in truth if not grads[name].equal(truth[name])] == []


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_gradients_are_finite_differences(act):
    """Of inputs and of all weights, in float64; torch's own check, to 1e-6."""
    module = mlp()
    module.act_fn = {"silu": nn.SiLU(), "gelu_pytorch_tanh": nn.GELU("tanh")}[act]
    keep_less(module)
    names, weights = zip(*module.named_parameters())
    x = torch.randn(2, T // 2, D, dtype=torch.float64, requires_grad=True)

    def whole(x, *weights):
        return torch.func.functional_call(module, dict(zip(names, weights)), (x,))

    assert torch.autograd.gradcheck(whole, (x, *weights), rtol=1e-6, atol=1e-9)


def kept(module, x) -> set[int]:
    """Addresses of the (T, F) tensors that live on for backward; none does after it."""
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() == T * F:
                made.append((StorageWeakRef(out.untyped_storage()), out.untyped_storage()._cdata))
            return out

    with Watch():
        y = module(x)
    alive = {address for storage, address in made if not storage.expired()}
    y.sum().backward()
    del y
    assert all(storage.expired() for storage, _ in made)
    return alive


@pytest.mark.parametrize("trained, as_it_came", [("down_proj", 4), ("gate_proj", 3)])
def test_two_tensors_are_kept(trained, as_it_came):
    """By hand: of gate, up, activation and product the last is kept where the layer after it is trained."""
    for thinned in (False, True):
        module = mlp()
        if thinned:
            keep_less(module)
        for name, p in module.named_parameters():
            p.requires_grad_(trained in name or "gate_proj.bias" in name or "up_proj.bias" in name)
        assert len(kept(module, torch.randn(T, D, dtype=torch.float64))) == (2 if thinned else as_it_came)


def test_a_transposed_product_is_no_product_of_that_shape():
    """A last layer that multiplies from the other side keeps the product with its lines as columns."""
    class Left(nn.Linear):
        def forward(self, x):
            return (self.weight @ x.t()).t()

    found = []
    for thinned in (False, True):
        module = mlp()
        module.down_proj = Left(F, D, bias=False, dtype=torch.float64)
        torch.nn.init.constant_(module.down_proj.weight, 0.1)
        keep_less(module) if thinned else None
        module(torch.arange(T * D, dtype=torch.float64).view(T, D).cos()).square().sum().backward()
        found.append(module.down_proj.weight.grad)
    assert found[0].norm() > 0 and found[1].equal(found[0])


def test_a_second_derivative_is_refused():
    """It lacked terms: what the function keeps is a constant to autograd."""
    module, x = mlp(), torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    keep_less(module)
    for trained in (True, False):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(module.requires_grad_(trained)(x).sum(), x, create_graph=True)


def test_nothing_is_kept_without_a_gradient():
    """Evaluation and the reference pass are transformers' own forward."""
    module = mlp()
    truth = module(torch.ones(T, D, dtype=torch.float64))
    keep_less(module)
    with torch.no_grad(), saved_tensors_hooks(lambda x: pytest.fail("kept"), lambda x: x):
        assert module(torch.ones(T, D, dtype=torch.float64)).equal(truth)


def test_another_forward_stays_as_it_is():
    """Llama's, but for one instruction, a name or a number."""
    class Sum(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    class Swapped(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    class Scaled(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2

    class Inherited(LlamaMLP):
        pass

    for kind, thinned in ((Sum, False), (Swapped, False), (Scaled, False), (Inherited, True), (LlamaMLP, True)):
        module = mlp(kind=kind)
        truth = module(torch.ones(1, D, dtype=torch.float64))
        keep_less(module)
        assert hasattr(module, "keeps_less") == thinned and module(torch.ones(1, D, dtype=torch.float64)).equal(truth)


def test_off_where_a_layer_is_computed_again():
    """Hooks of its own would keep what a checkpoint's throw away."""
    for mode in MODES:
        model = prepared("llama", mode)
        less = [module.keeps_less for module in model.modules() if hasattr(module, "keeps_less")]
        assert less == [mode == "keep"] * 2


def test_what_a_token_takes():
    """Two numbers less for each of the MLP's 48, float32, in both layers; or in one, while those of the other are there
    again."""
    found = []
    for thinned in (False, True):
        model = prepared("llama", "keep")
        model.get_base_model().set_attn_implementation(LOOP)
        for module in model.modules():
            if hasattr(module, "keeps_less") and not thinned:
                del module.forward
        module, rows = SequenceLogProbs(model), [rows_of(tokens) for tokens in (256, 512)]
        found.append((peak_bytes(module, rows[1]) - peak_bytes(module, rows[0])) / 256)
    assert 4 * 2 * 48 <= found[0] - found[1] <= 2 * 4 * 2 * 48
