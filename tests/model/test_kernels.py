"""A GPU's kernels against torch in float64: on a GPU as they are, elsewhere their C++ read as Python."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import random_groups, tiny
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nanodpo.core.attention import LOOP
from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.packing import pack
from nanodpo.model import kernels, layers
from nanodpo.model.layers import keep_less

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                                      reason="needs a CUDA device")])


def as_python(code: str, outputs: int):
    """The one C++ function of a kernel, line by line in Python on tensors; those of bfloat16 are rounded last."""
    head, body = re.fullmatch(r"template <typename T> \w+ \w+\((.*?)\) \{(.*)\}", code, re.DOTALL).groups()
    names = [part.split()[-1] for part in head.split(",")]
    body = re.sub(r"T (\w) =", r"\1 =", body.replace("T(1)", "1").replace("::exp", "torch.exp"))

    def run(*given):
        (dtype,) = {x.dtype for x in given}
        given = [x.float() if dtype == torch.bfloat16 else x for x in given]
        known = dict(zip(names, given, strict=outputs == 1)) | {"torch": torch}
        for line in filter(None, map(str.strip, body.split(";"))):
            name, _, value = line.replace("return", "y =").partition("=")
            known[name.strip()] = eval(value, known)
        found = [known[name].to(dtype) for name in (names[-outputs:] if outputs > 1 else ["y"])]
        return found if outputs > 1 else found[0]
    return run


@pytest.fixture(params=["cpu", GPU])
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(kernels, "compiled", as_python)
    return torch.device(request.param)


def apart(found, truth) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


# float64; float32; bfloat16, rounded once: a part in 2^9 at the most, 2^-9 / sqrt(3) on average
ROUNDING = pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-6),
                                                    (torch.bfloat16, 2e-3)])


@ROUNDING
def test_gate_and_its_gradients(device, dtype, limit):
    """silu(gate) * up, against torch's own in float64. At gate = 0: 0, and gradients up / 2 and 0."""
    gate, up, grad = (3 * torch.randn(3, 64, 33, device=device)).to(dtype)
    gate[0, 0] = 0
    exact = [x.double().requires_grad_() for x in (gate, up)]
    truth = F.silu(exact[0]) * exact[1]
    found, wanted = kernels.silu_gate_gradients(grad, gate, up), torch.autograd.grad(truth, exact, grad.double())
    assert found[0][0, 0] == grad[0, 0] * up[0, 0] / 2 and found[1][0, 0] == 0
    assert apart(kernels.silu_gate(gate, up), truth) < limit
    assert all(one.dtype == dtype and apart(one, other) < limit for one, other in zip(found, wanted))


@pytest.mark.parametrize("far", [-200.0, -90.0, 90.0, 200.0])
def test_gates_far_out(device, far):
    """Where exp overflows, silu is 0 or x, and its slope 0 or 1."""
    x = torch.full((4,), far, device=device)
    one = torch.ones_like(x)
    d_gate, d_up = kernels.silu_gate_gradients(one, x, one)
    assert kernels.silu_gate(x, one).tolist() == pytest.approx([max(far, 0)] * 4, abs=1e-30)
    assert d_up.tolist() == pytest.approx([max(far, 0)] * 4, abs=1e-30)
    assert d_gate.tolist() == pytest.approx([float(far > 0)] * 4, abs=1e-30)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_models_with_these_kernels(family, device, monkeypatch):
    """Log-probs and gradients of whole models in packed batches, whether a layer keeps less or is computed again, are
    those of transformers' own MLPs."""
    if device.type == "cpu":
        own = layers._Gated  # with the kernel that a CPU would not be given
        monkeypatch.setattr(layers, "_Gated", SimpleNamespace(
            apply=lambda gate, up, act, kernel: own.apply(gate, up, None, kernels.silu_gate)))
    found, batch = [], pack(random_groups()).to(device)
    for keeps_less in (None, True, False):
        model = tiny(family).to(device)
        model.set_attn_implementation(LOOP)
        if keeps_less is not None:
            keep_less(model)
        for module in model.modules():
            if hasattr(module, "keeps_less"):
                module.keeps_less = keeps_less
        logps = SequenceLogProbs(model)(batch)
        found.append((logps.detach(), *torch.autograd.grad(logps.sum(), [*model.parameters()], allow_unused=True)))
    for theirs, *ours in zip(*found, strict=True):
        assert all(theirs is one is None or (theirs - one).norm() <= 1e-10 * theirs.norm() for one in ours)


def angles(tokens: int, size: int, device):
    """(1, T, E) x 2: cosines and sines as transformers has them, up to position 130,000."""
    inverse = 1e6 ** (-torch.arange(0, size, 2, device=device) / size)
    turns = torch.linspace(0, 130_000, tokens, device=device).round()[:, None] * inverse
    return (torch.cat([one, one], 1)[None].float() for one in (turns.cos(), turns.sin()))


def test_three_bfloat16_numbers_are_one_of_float32(device):
    """They add up to it, to the last bit, from the first to the last or the other way round."""
    x = torch.cat([*angles(200, 64, device)]).flatten()
    one, two, three = (part.float() for part in kernels.in_three(x))
    assert torch.equal((one + two) + three, x) and torch.equal((three + two) + one, x)


def test_rotary_positions_and_their_gradients(device):
    """Of queries and keys in bfloat16: transformers' function in float64, rounded once; laid out as it was given."""
    cos, sin = angles(50, 64, device)
    given = [torch.randn(1, 50, heads, 64, device=device).bfloat16().transpose(1, 2) for heads in (4, 2)]
    grads = [torch.randn(1, 50, heads, 64, device=device).bfloat16().transpose(1, 2) for heads in (4, 2)]
    exact = [x.double().requires_grad_() for x in given]
    truth = apply_rotary_pos_emb(*exact, cos.double(), sin.double())
    wanted = [*truth, *torch.autograd.grad(truth, exact, [grad.double() for grad in grads])]
    mine = [x.requires_grad_() for x in given]
    found = layers._rotated(*mine, cos, sin)
    for one, other in zip([*found, *torch.autograd.grad(found, mine, grads)], wanted, strict=True):
        assert one.dtype == torch.bfloat16 and one.transpose(1, 2).is_contiguous()
        assert ((one.double() - other).abs() <= 2**-8 * other.abs() + 1e-6).all()


@pytest.mark.parametrize("family, turned", [("llama", True), ("qwen2", True), ("qwen3", True), ("mistral", True),
                                            ("gemma2", True), ("cohere", False), ("phi3", False), ("gpt2", False)])
def test_which_models_have_their_positions_from_the_kernel(family, turned, device, monkeypatch):
    """Those that turn them by Llama's function: in bfloat16 no further from float64 than with transformers' own. A copy
    of the model computes with its own weights."""
    model, calls = tiny(family, torch.bfloat16).to(device), []
    ids = torch.arange(1, 20, device=device)[None]
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(input_ids=ids).logits
        own = apart(model(input_ids=ids).logits, exact)
    layers.fuse_rotations(model)
    rotation = layers._Rotation.apply
    monkeypatch.setattr(layers._Rotation, "apply", lambda *args: calls.append(1) or rotation(*args))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        fused = twin(input_ids=ids).logits
        assert len(calls) == 2 * turned * model.config.get_text_config().num_hidden_layers
        assert apart(fused, exact) <= (1.5 if turned else 1) * own < 0.05
        for p in model.parameters():
            p.zero_()
        assert torch.equal(twin(input_ids=ids).logits, fused)


def test_rotations_of_float32_are_transformers_own(device):
    q, k = torch.randn(2, 1, 2, 9, 8, device=device)
    cos, sin = angles(9, 8, device)
    assert all(map(torch.equal, layers._rotated(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)))
