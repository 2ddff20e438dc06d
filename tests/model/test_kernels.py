"""A GPU's kernels of a gate against torch in float64: on a GPU as they are, elsewhere their C++ read as Python."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import random_groups, tiny

from nanodpo.core.attention import LOOP
from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.packing import pack
from nanodpo.model import kernels, layers
from nanodpo.model.layers import keep_less

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                                      reason="needs a CUDA device")])


def as_python(code: str, outputs: int):
    """The one C++ function of a kernel, line by line in Python on tensors."""
    head, body = re.fullmatch(r"template <typename T> \w+ \w+\((.*?)\) \{(.*)\}", code, re.DOTALL).groups()
    names = [part.split()[-1] for part in head.split(",")]
    body = body.replace("T(1)", "1").replace("::exp", "torch.exp").replace("T s", "s")

    def run(*given):
        known = dict(zip(names, given, strict=outputs == 1)) | {"torch": torch}
        for line in filter(None, map(str.strip, body.split(";"))):
            name, _, value = line.replace("return", "y =").partition("=")
            known[name.strip()] = eval(value, known)
        found = [known[name] for name in (names[-outputs:] if outputs > 1 else ["y"])]
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
    if (device.type, dtype) == ("cpu", torch.bfloat16):
        return  # its Python rounds each operation
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
