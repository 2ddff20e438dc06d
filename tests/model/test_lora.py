"""LoRA in one product against its formula, and against PEFT's own three passes."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from peft.utils import get_peft_model_state_dict
from tiny_models import random_groups, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.packing import pad
from nanodpo.model.layers import Added, fuse_lora

PLACES = pytest.mark.parametrize("in_place", [True, False])


def adapted(model: nn.Module, dtype=torch.float64, **settings) -> nn.Module:
    """A PEFT model whose adapters are not zero."""
    config = LoraConfig(r=2, lora_alpha=3, **{"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
    model = get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype)
    torch.manual_seed(1)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            nn.init.normal_(p, 0, 0.3)
    return model


def layer(dtype=torch.float64, r=1, alpha=2, bias=False, **settings) -> nn.Module:
    """One adapted layer, 2 -> 2."""
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2, bias=bias)), LoraConfig(
        r=r, lora_alpha=alpha, target_modules=["0"], **settings), autocast_adapter_dtype=False)
    return model.to(dtype)


@PLACES
def test_by_hand(in_place):
    """W x + s B A x: W = (1 2; 3 4), A = (1 1), B = (1; 2), s = 2, x = (1 1): (3 7) + 2 * 2 * (1 2) = (7 15).

    With g = (1 10) coming back: d x = W^T g + s A^T B^T g = (31 42) + 2 * 21 * (1 1), d B = s g (A x) = 4 g,
    d A = s (B^T g) x = 42 x.
    """
    model = layer()
    fuse_lora(model, in_place)
    inner = model.base_model.model[0]
    assert isinstance(inner.lora_B["default"], Added)
    with torch.no_grad():
        inner.base_layer.weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
        inner.lora_A["default"].weight.copy_(torch.tensor([[1.0, 1]]))
        inner.lora_B["default"].weight.copy_(torch.tensor([[1.0], [2]]))
    x = torch.ones(1, 1, 2, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.backward(torch.tensor([[[1.0, 10]]], dtype=torch.float64))
    assert y.tolist() == [[[7, 15]]] and x.grad.tolist() == [[[73, 84]]]
    assert inner.lora_B["default"].weight.grad.tolist() == [[4], [40]]
    assert inner.lora_A["default"].weight.grad.tolist() == [[42, 42]]
    with model.disable_adapter():
        assert model(x).tolist() == [[[3, 7]]]


def gradients(model, row):
    logps = SequenceLogProbs(model)(row)
    logps.sum().backward()
    return logps.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@PLACES
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen3_moe", "phi"])
def test_as_peft_has_it(family, in_place):
    """Log-probs and every gradient of whole models: biased layers, Conv1D, layers beside experts."""
    peft, row = adapted(tiny(family)), pad(random_groups())
    fused = copy.deepcopy(peft)
    fuse_lora(fused, in_place)
    (logps, truth), (theirs, grads) = gradients(peft, row), gradients(fused, row)
    kinds = [type(module) for module in fused.modules()]
    assert kinds.count(Added) == kinds.count(Linear) > 3
    assert (theirs / logps - 1).abs().max() < 1e-12 and grads.keys() == truth.keys()
    for name, grad in truth.items():
        assert (grads[name] - grad).norm() < 1e-12 * grad.norm(), name


@PLACES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_adds_nothing(dtype, in_place):
    """B = 0: the last bit of W x stays, so that policy and reference agree at step 0."""
    model, x = layer(dtype, bias=True), torch.randn(3, 5, 2, dtype=dtype)
    fuse_lora(model, in_place)
    with model.disable_adapter():
        base = model(x)
    assert model(x).equal(base)


def test_bfloat16_rounds_once():
    """The sum is rounded once, not at each of three passes: no further from float64 than PEFT's own."""
    torch.manual_seed(0)
    exact = layer(r=2)
    nn.init.normal_(exact.base_model.model[0].lora_B["default"].weight)
    peft = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(peft.state_dict())
    fused = copy.deepcopy(peft)
    fuse_lora(fused)
    x = torch.randn(1000, 2, dtype=torch.bfloat16)
    ours, theirs = ((model(x) - exact(x.double())).abs().mean() for model in (fused, peft))
    assert 0 < ours < 0.9 * theirs


def test_dropout_stays():
    """The same draws as in PEFT's own forward."""
    peft, x = layer(lora_dropout=0.5, r=2), torch.randn(4, 2, dtype=torch.float64)
    nn.init.ones_(peft.base_model.model[0].lora_B["default"].weight)
    fused = copy.deepcopy(peft)
    fuse_lora(fused)
    found = []
    for model, trains in ((peft, True), (fused, True), (peft, False), (fused, False)):
        torch.manual_seed(3)
        found.append(model.train(trains)(x))
    train, again, still, unmoved = found
    assert torch.allclose(train, again, atol=1e-14) and torch.allclose(still, unmoved, atol=1e-14)
    assert not torch.allclose(train, still)


@pytest.mark.parametrize("more", ["use_dora", "lora_bias", "float32"])
def test_what_is_more_stays_pefts(more):
    """DoRA, biased LoRA, an adapter of another dtype: y has other terms, or needs casts."""
    model = layer(bias=True, **({} if more == "float32" else {more: True}))
    if more == "float32":
        model.base_model.model[0].lora_A.float()
    before = dict(model.base_model.model[0].lora_variant)
    fuse_lora(model)
    assert not any(isinstance(module, Added) for module in model.modules())
    assert model.base_model.model[0].lora_variant == before


def test_what_is_saved_stays():
    """The same names and tensors; and a model that runs fused is not the one to merge, which PEFT could do silently
    wrong."""
    model = adapted(tiny("llama"))
    names = [name for name, _ in model.named_parameters()]
    before = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    fuse_lora(model)
    after = get_peft_model_state_dict(model)
    assert [name for name, _ in model.named_parameters()] == names and before.keys() == after.keys()
    assert all(after[name].equal(before[name]) for name in before)
    for safe in (False, True):
        with pytest.raises(NotImplementedError):
            model.merge_adapter(safe_merge=safe)


class Written(TorchDispatchMode):
    """Numbers written by sums and scalings as wide as a layer's output."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.count = width, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.name().partition(".")[0] in ("aten::mul", "aten::add") and out.shape[-1] == self.width:
            self.count += out.numel()
        return out


def test_passes_that_are_saved():
    """Forward and backward of PEFT's sum: s * (B h), its addition to y, s * grad; here none."""
    peft = get_peft_model(nn.Sequential(nn.Linear(3, 7)), LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    fused, x = copy.deepcopy(peft), torch.randn(5, 3)
    fuse_lora(fused)
    counts = []
    for model in (peft, fused):
        with Written(7) as written:
            model(x).backward(torch.ones(5, 7))
        counts.append(written.count)
    assert counts == [3 * 5 * 7, 0]
