"""LoRA in one product against its formula, and against PEFT's own three passes."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from peft.utils import get_peft_model_state_dict
from tiny_models import random_groups, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.packing import pad
from nanodpo.model.layers import fuse_lora, fuse_norms
from nanodpo.model.ready import exchange_layers, make_ready


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


def fused_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Linear) and "forward" in vars(module)]


def test_by_hand():
    """W x + s B A x: W = (1 2; 3 4), A = (1 1), B = (1; 2), s = 2, x = (1 1): (3 7) + 2 * 2 * (1 2) = (7 15).

    With g = (1 10) coming back: d x = W^T g + s A^T B^T g = (31 42) + 2 * 21 * (1 1), d B = s g (A x) = 4 g,
    d A = s (B^T g) x = 42 x.
    """
    model = layer()
    fuse_lora(model)
    inner = model.base_model.model[0]
    assert fused_layers(model) == [inner]
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


def test_no_gradient_is_copied_where_a_layer_has_a_bias():
    """A layer with a bias gives a view of its product. Added to in place, autograd would copy the gradient of the whole
    output into new memory and out of it again; a layer without a bias has no such copies either."""
    class Copies(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.seen += [op.overloadpacket.__name__] * (op.overloadpacket.__name__ in ("copy_", "clone", "as_strided"))
            return op(*args, **(kwargs or {}))

    for bias in (False, True):
        model = layer(bias=bias)
        fuse_lora(model)
        y = model(torch.ones(1, 3, 2, dtype=torch.float64, requires_grad=True))
        with Copies() as copies:
            y.backward(torch.ones(1, 3, 2, dtype=torch.float64))
        assert copies.seen == [], f"bias {bias}"


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_a_norm_in_one_pass_is_the_models_own(eps):
    """x w / sqrt(mean(x^2) + eps), outputs and gradients, against the formula in float64 and the module as it was; of x
    = (3 4) with w = (1 2) and eps = 0.5: mean 12.5, so x / sqrt(13)."""
    norm = LlamaRMSNorm(2, eps).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2]))
    fused = copy.deepcopy(norm)
    fuse_norms(fused)
    x = torch.tensor([[3.0, 4]], dtype=torch.float64)
    assert fused(x)[0].tolist() == pytest.approx([3 / (12.5 + eps) ** 0.5, 8 / (12.5 + eps) ** 0.5], rel=1e-12)
    found = []
    for module in (norm.float(), fused.float()):  # Llama's own works in float32
        torch.manual_seed(0)
        x = torch.randn(5, 2, requires_grad=True)
        y = module(x)
        found.append((y, *torch.autograd.grad(y.square().sum() + y.sum(), (x, module.weight))))
    for theirs, ours in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)


def test_norms_of_other_families_stay():
    """Gemma's multiplies by 1 + w, Olmo2's rounds after it; a layer norm is none."""
    for family, fits in (("llama", True), ("qwen2", True), ("gemma2", False), ("gpt2", False)):
        model = tiny(family)
        fuse_norms(model)
        found = [module for module in model.modules() if "forward" in vars(module)]
        assert bool(found) == fits and all(type(module).__name__.endswith("RMSNorm") for module in found), family


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_kernels_give_the_layers_own_numbers():
    """LoRA with bfloat16 inputs under float32 weights, and norms, against float64: weight gradients are sums in
    float32."""
    torch.manual_seed(0)
    norm, x = LlamaRMSNorm(512).cuda(), torch.randn(64, 512, device="cuda", requires_grad=True)
    fused = copy.deepcopy(norm)
    fuse_norms(fused)
    for theirs, ours in zip((norm(x), *torch.autograd.grad(norm(x).square().sum(), x)),
                            (fused(x), *torch.autograd.grad(fused(x).square().sum(), x))):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    model = layer(torch.float32, r=2).cuda()
    inner = model.base_model.model[0]
    nn.init.normal_(inner.lora_B["default"].weight)
    exact = copy.deepcopy(model).double()
    inner.base_layer.weight.data = inner.base_layer.weight.data.bfloat16()
    exact.base_model.model[0].base_layer.weight.data = inner.base_layer.weight.data.double()
    fuse_lora(model)
    x, g = torch.randn(2, 1, 4096, 2, device="cuda").bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        y = model(x)
    y.backward(g)
    exact(x.double()).backward(g.double())
    ours, truth = (m.base_model.model[0].lora_B["default"].weight.grad for m in (model, exact))
    assert ours.dtype == torch.float32 and (ours - truth).norm() < 1e-2 * truth.norm()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen3_moe", "phi"])
def test_as_peft_has_it(family):
    """Log-probs and every gradient of whole models: biased layers, Conv1D, layers beside experts."""
    peft, row = adapted(tiny(family)), pad(random_groups())
    fused = copy.deepcopy(peft)
    fuse_lora(fused)
    (logps, truth), (theirs, grads) = gradients(peft, row), gradients(fused, row)
    layers = [module for module in fused.modules() if isinstance(module, Linear)]
    assert len(layers) > 3 and fused_layers(fused) == layers
    assert (theirs / logps - 1).abs().max() < 1e-12 and grads.keys() == truth.keys()
    for name, grad in truth.items():
        assert (grads[name] - grad).norm() < 1e-12 * grad.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_adds_nothing(dtype):
    """B = 0: the last bit of W x stays, so that policy and reference agree at step 0."""
    model, x = layer(dtype, bias=True), torch.randn(3, 5, 2, dtype=dtype)
    fuse_lora(model)
    with model.disable_adapter():
        base = model(x)
    assert model(x).equal(base)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_fresh_policy_is_its_reference(family, bf16):
    """Whole models, with biases and transposed layers, and with frozen weights in bfloat16: to the last bit."""
    model = get_peft_model(tiny(family, torch.bfloat16 if bf16 else torch.float32), LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    make_ready(model, bf16, torch.device("cpu"))
    assert len(fused_layers(model)) > 3
    with torch.no_grad():
        policy = SequenceLogProbs(model)(pad(random_groups()))
        with model.disable_adapter():
            assert SequenceLogProbs(model)(pad(random_groups())).equal(policy)


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


class RoundedOnce(TorchDispatchMode):
    """Products of bfloat16 as a GPU has them, whatever the CPU: sums in float32, rounded at their end."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        low = args and isinstance(args[-1], torch.Tensor) and args[-1].dtype == torch.bfloat16 and not args[-1].is_cuda
        if not low or op.overloadpacket.__name__ not in ("mm", "addmm", "addmm_"):
            return op(*args, **(kwargs or {}))
        product = getattr(torch.ops.aten, op.overloadpacket.__name__.strip("_")).default
        out = product(*(x.float() for x in args), **(kwargs or {})).bfloat16()
        return args[0].copy_(out) if op.overloadpacket.__name__ == "addmm_" else out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device")])])
@pytest.mark.parametrize("bias", [False, True])
def test_in_bfloat16_an_adapters_small_change_is_not_lost(bias, device):
    """What LoRA adds is some 2^-13 of W x, far below half of bfloat16's last place. Rounding hides it in each number,
    but not in their sum: outputs with the adapter minus those without it are what it adds, on average. PEFT rounds W x
    first, and of what it then adds next to nothing is left."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 256, bias=bias)), LoraConfig(r=4, target_modules=["0"]))
    inner = model.base_model.model[0]
    nn.init.normal_(inner.lora_B["default"].weight, 0, 5e-5)
    x = torch.randn(4000, 64, device=device).bfloat16()
    peft = model.to(device).bfloat16()
    fused, exact = copy.deepcopy(peft), copy.deepcopy(peft).double()
    fuse_lora(fused)

    def added(model, x):
        with torch.no_grad(), RoundedOnce():
            policy = model(x).double()
            with model.disable_adapter():
                return policy - model(x).double()

    truth = added(exact, x.double())
    assert truth.square().mean().sqrt() < 2**-12 * exact(x.double()).square().mean().sqrt()
    ours, pefts = ((added(model, x) * truth).sum() / truth.square().sum() for model in (fused, peft))
    assert abs(ours - 1) < 0.15 and pefts < 0.5, (ours, pefts)


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
    assert fused_layers(model) == [] and model.base_model.model[0].lora_variant == before


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_base_that_is_unfrozen_later_has_gradients(part):
    """Outputs and all gradients are those of PEFT's own forward."""
    model, x = layer(bias=True), torch.randn(4, 2, dtype=torch.float64)
    fuse_lora(model)
    inner, found = model.base_model.model[0], []
    getattr(inner.base_layer, part).requires_grad_(True)
    for _ in range(2):
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        vars(inner).pop("forward", None)  # and once more by PEFT's own
    assert len(found[0]) == 4
    for ours, peft in zip(*found):
        torch.testing.assert_close(ours, peft, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_copy_has_its_own_weights(family):
    """deepcopy and torch.save of a fused model: the copy's log-probs follow the copy's weights alone."""
    policy, row = SequenceLogProbs(adapted(tiny(family))), pad(random_groups())
    exchange_layers(policy.model, torch.device("cpu"))
    before, file = policy(row).detach(), io.BytesIO()
    torch.save(policy, file)
    file.seek(0)
    for again in (copy.deepcopy(policy), torch.load(file, weights_only=False)):
        assert again(row).equal(before)
        for name, p in again.named_parameters():
            p.data.mul_(2) if "lora_B" in name else p
        truth = copy.deepcopy(again)
        for module in truth.modules():
            vars(module).pop("forward", None)
        torch.testing.assert_close(again(row), truth(row), rtol=1e-12, atol=0)
        assert policy(row).equal(before) and not again(row).equal(before)


def test_what_is_saved_stays():
    """The same names and tensors; and merged, or with its adapter off, a model is what PEFT makes of it."""
    model, row = adapted(tiny("llama")), pad(random_groups())
    names = [name for name, _ in model.named_parameters()]
    before = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    fuse_lora(model)
    after = get_peft_model_state_dict(model)
    assert [name for name, _ in model.named_parameters()] == names and before.keys() == after.keys()
    assert all(after[name].equal(before[name]) for name in before)
    with torch.no_grad():
        ours = SequenceLogProbs(model)(row)
        with model.disable_adapter():
            assert SequenceLogProbs(model)(row).equal(SequenceLogProbs(tiny("llama"))(row))
        for safe in (False, True):
            model.merge_adapter(safe_merge=safe)
            assert (SequenceLogProbs(model)(row) / ours - 1).abs().max() < 1e-12
            model.unmerge_adapter()


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


def test_a_second_derivative_is_refused():
    """Its terms by A and B were missing: d/dx is W + s B A, which depends on them."""
    model, x = layer(), torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    fuse_lora(model)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


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
