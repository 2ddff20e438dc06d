"""The kernel against loops, identities and plain full-logits code; nothing here takes its own output for the truth."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import KeepDouble, naive_token_logps, random_groups, tiny
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from nanodpo.core.attention import LOOP
from nanodpo.core.logprobs import LogProbHead, SequenceLogProbs, chunk_logps, sum_by_sequence
from nanodpo.core.packing import pack, pad

N, D, V = 23, 12, 31
SETTINGS = [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)]  # scale and cap of the logits


def linear(bias=True, dtype=torch.float64, trainable=True, vocabulary=V, width=D, std=0.7):
    torch.manual_seed(1)
    layer = nn.Linear(width, vocabulary, bias=bias, dtype=torch.float64)
    for p in layer.parameters():
        nn.init.normal_(p, 0, std)
    return layer.to(dtype).requires_grad_(trainable)


def inputs(n=N, dtype=torch.float64, vocabulary=V, width=D):
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(n, width, generator=draw, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), torch.randint(vocabulary, (n,), generator=draw)


def by_hand(hidden, layer, targets, scale, cap) -> list[float]:
    """log softmax(logits)[target] with nothing but floats and loops."""
    weight, out = layer.weight.tolist(), []
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * len(weight)
    for h, y in zip(hidden.tolist(), targets.tolist()):
        logits = [scale * (sum(a * b for a, b in zip(row, h)) + c) for row, c in zip(weight, bias)]
        if cap is not None:
            logits = [cap * math.tanh(z / cap) for z in logits]
        out.append(logits[y] - math.log(sum(math.exp(z) for z in logits)))
    return out


@pytest.mark.parametrize("scale, cap", SETTINGS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, N, N + 1])
def test_kernel_is_the_loop(chunk, bias, scale, cap):
    """Token by token equal to Python floats, whatever the chunk; sums over ragged responses too."""
    layer, (hidden, targets) = linear(bias), inputs()
    truth = by_hand(hidden, layer, targets, scale, cap)
    logps = LogProbHead(layer, scale, cap, chunk)(hidden, targets)
    assert logps.tolist() == pytest.approx(truth, abs=1e-12)
    lengths = [1, 9, 2, 11]
    seq = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    starts = [0, 1, 10, 12]
    sums = [sum(truth[s:s + n]) for s, n in zip(starts, lengths)]
    assert sum_by_sequence(logps, seq, 4).tolist() == pytest.approx(sums, abs=1e-9)


def test_sums_of_many_responses_take_no_table_of_responses_by_tokens():
    """100,000 responses of 0 to 2 tokens: the sums and gradients of a loop, where such a table would be 20 GB."""
    lengths = torch.arange(100_000) % 3
    seq = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    logps = torch.randn(len(seq), generator=torch.Generator().manual_seed(3), requires_grad=True)
    sums = sum_by_sequence(logps, seq, len(lengths))
    (sums * torch.arange(len(lengths))).sum().backward()
    rest = iter(logps.detach().double().tolist())
    assert sums.tolist() == [sum(next(rest) for _ in range(n)) for n in lengths.tolist()]
    assert torch.equal(logps.grad, seq.float())


@pytest.mark.parametrize("vocabulary", [2, 1000, 152_064])
def test_uniform_logits_cost_ln_v_a_token(vocabulary):
    """-n ln V where the head is zero, at the default chunk size, in float32."""
    layer = nn.Linear(4, vocabulary)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    hidden, targets = inputs(250, torch.float32, vocabulary, 4)
    total = sum_by_sequence(LogProbHead(layer)(hidden, targets), torch.zeros(250, dtype=torch.long), 1)
    assert total.item() == pytest.approx(-250 * math.log(vocabulary), rel=1e-7)


def test_two_tokens_by_hand():
    """Logits (0, ln 3) mean probabilities 1/4 and 3/4."""
    layer = nn.Linear(1, 2, bias=False, dtype=torch.float64)
    layer.weight.data = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    logps = LogProbHead(layer)(torch.ones(2, 1, dtype=torch.float64), torch.tensor([0, 1]))
    assert logps.tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4)], abs=1e-15)


def test_all_answers_together_are_certain():
    """Every response of length 3 over 5 tokens, packed after one prompt: their probabilities sum to 1."""
    model = tiny("llama", vocab_size=5)
    model.set_attn_implementation(LOOP)
    responses = [[a, b, c] for a in range(5) for b in range(5) for c in range(5)]
    with torch.no_grad(), KeepDouble():
        logps = SequenceLogProbs(model)(pack([([3, 1, 4, 1], responses)]))
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert logps.exp().max() > 3 / 125  # and not because all are alike


@pytest.mark.parametrize("scale, cap", SETTINGS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_gradients_are_the_slopes(trainable, bias, scale, cap):
    """Analytic against finite differences in float64, by hidden states and, where the head is trained, its parameters.
    """
    layer = linear(bias, trainable=trainable, vocabulary=7, width=5)
    hidden, targets = inputs(6, width=5, vocabulary=7)
    head = LogProbHead(layer, scale, cap, chunk_size=4)
    names = [name for name, p in head.named_parameters()] if trainable else []

    def call(hidden, *parameters):
        return functional_call(head, dict(zip(names, parameters)), (hidden, targets))

    parameters = [p.detach().clone().requires_grad_() for p in head.parameters()] if trainable else []
    assert torch.autograd.gradcheck(call, (hidden, *parameters))


def test_a_bias_alone_may_be_trained():
    """The weight frozen, the bias not: its gradient is not lost, against finite differences in float64."""
    layer, (hidden, targets) = linear(vocabulary=7, width=5), inputs(6, width=5, vocabulary=7)
    layer.weight.requires_grad_(False)
    head = LogProbHead(layer, chunk_size=4)
    assert torch.autograd.gradcheck(lambda bias: functional_call(head, {"bias": bias}, (hidden, targets)), layer.bias)


@pytest.mark.parametrize("scale, cap", SETTINGS)
def test_backward_takes_the_weights_that_forward_took(scale, cap):
    """functional_call lends a head other weights, and gives it back its own before the backward pass."""
    layer, other, (hidden, targets) = linear(), linear(std=0.3), inputs()
    others = [p.detach().clone().requires_grad_() for p in (other.weight, other.bias)]
    head = LogProbHead(layer, scale, cap, chunk_size=5)
    found = functional_call(head, {"weight": others[0], "bias": others[1]}, (hidden, targets))
    logits = scale * F.linear(hidden, *others)
    truth = (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(1)[range(N), targets]
    slopes = torch.linspace(-1, 2, N, dtype=torch.float64)
    for mine, true in zip(*(torch.autograd.grad(logps @ slopes, (hidden, *others)) for logps in (found, truth))):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


def test_a_packed_batch_needs_an_attention_that_keeps_responses_apart():
    """The model's own would ignore the segments, and give log-probs that are nats off without a word."""
    model, groups = tiny("llama"), random_groups()
    with torch.no_grad(), pytest.raises(ValueError, match=r"needs model.set_attn_implementation.attention.LOOP."):
        SequenceLogProbs(model)(pack(groups))
    with torch.no_grad():
        plain = SequenceLogProbs(model)(pad(groups))
        model.set_attn_implementation(LOOP)
        torch.testing.assert_close(SequenceLogProbs(model)(pack(groups)), plain, rtol=0, atol=1e-3)


def test_a_second_derivative_is_refused():
    """The kept gradient is a constant to autograd; better an error than a curvature with half its terms."""
    hidden, targets = inputs()
    for trainable in (True, False):
        logps = LogProbHead(linear(trainable=trainable))(hidden, targets)
        for loss in ((logps**2).sum(), logps.sum()):  # of a plain sum the incoming gradient is a constant
            with pytest.raises(RuntimeError, match="no second derivative; leave create_graph=True out"):
                torch.autograd.grad(loss, hidden, create_graph=True)


def tied(model):
    model.config.tie_word_embeddings = True
    model.tie_weights()


@pytest.mark.parametrize("change, refused", [
    (lambda model: model.resize_token_embeddings(model.config.vocab_size + 8), True), (tied, True),
    (lambda model: model.load_state_dict(model.state_dict(), assign=True), True),
    (lambda model: nn.utils.parametrizations.weight_norm(model.lm_head), True),
    (lambda model: model.load_state_dict(model.state_dict()), False), (lambda model: model.float(), False),
    (lambda model: model.lm_head.requires_grad_(False), False)])
def test_another_output_layer_is_seen(change, refused):
    """The head shares the layer's weight. One that was put in its place later was not seen, and the log-probs stayed
    those of the first; what changes a weight in place is seen anyway."""
    model, row = tiny("llama", tie_word_embeddings=False), pad(random_groups())
    policy = SequenceLogProbs(model)
    change(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.9)
        if refused:
            with pytest.raises(ValueError, match="another weight than when SequenceLogProbs was made; make it anew"):
                policy(row)
        else:
            model.lm_head.weight.mul_(0.9)
            torch.testing.assert_close(policy(row), SequenceLogProbs(model)(row), rtol=0, atol=0)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("scale, cap", SETTINGS)
def test_inputs_come_back_bit_identical(scale, cap, trainable):
    """Nothing that goes in is written to, in forward or backward."""
    layer, (hidden, targets) = linear(trainable=trainable), inputs()
    grad = torch.randn(N, dtype=torch.float64)
    tensors = [hidden, targets, layer.weight, layer.bias, grad]
    before = [t.detach().clone() for t in tensors]
    LogProbHead(layer, scale, cap, chunk_size=7)(hidden, targets).backward(grad)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


class Largest(TorchDispatchMode):
    """The most elements of any tensor with a vocabulary dimension that is no weight (which has D beside it)."""

    def __init__(self, vocabulary, width):
        super().__init__()
        self.vocabulary, self.width, self.numel = vocabulary, width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and self.vocabulary in t.shape and self.width not in t.shape:
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("scale, cap", SETTINGS)
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, N])
def test_logits_never_exceed_a_chunk(chunk, trainable, scale, cap):
    """Forward and backward: no tensor of more than chunk x V elements, and one of just that."""
    layer, (hidden, targets) = linear(trainable=trainable), inputs()
    with Largest(V, D) as largest:
        LogProbHead(layer, scale, cap, chunk)(hidden, targets).sum().backward()
    assert largest.numel == chunk * V


def test_the_default_chunk_is_64_mib():
    """67,108,864 bytes of float32 logits, four times that where there is a GPU: 110 or 441 tokens at 152,064 words."""
    assert LogProbHead(nn.Linear(1, 152_064, device="meta")).chunk_size == (441 if torch.cuda.is_available() else 110)
    assert LogProbHead(nn.Linear(1, 2**25, device="meta")).chunk_size == 1


def errors(values, truth) -> torch.Tensor:
    d = (values.double() - truth).abs()
    return torch.stack([d.max(), d.mean()])


@pytest.mark.parametrize("trainable", [True, False])
def test_bfloat16_is_no_worse_than_full_logits(trainable):
    """Against float64 truth, values within the error of full float32 log_softmax, far within that of bfloat16.

    Gradients get half as much again: ours are rounded once more, as a kept product or as a chunk's share of dW.
    """
    size = {"vocabulary": 1000, "width": 64}
    layer = linear(False, torch.bfloat16, trainable, std=0.1, **size)
    hidden, targets = inputs(3000, torch.bfloat16, **size)
    weights = torch.linspace(-1, 1, 3000)

    def grads(logps):
        wanted = [hidden, layer.weight] if trainable else [hidden]
        return torch.autograd.grad((logps * weights.to(logps.dtype)).sum(), wanted)

    def naive(cast):
        return F.linear(cast[0](hidden), cast[0](layer.weight)).to(cast[1]).log_softmax(1).gather(
            1, targets[:, None]).squeeze(1)

    truth = naive((torch.Tensor.double, torch.float64))
    plain = naive((lambda t: t, torch.float32))
    coarse = naive((lambda t: t, torch.bfloat16))
    ours = LogProbHead(layer, chunk_size=64)(hidden, targets)
    assert ours.dtype == torch.float32
    assert (errors(ours, truth) <= errors(plain, truth) * 1.001).all()
    assert (errors(ours, truth) < errors(coarse, truth) / 5).all()
    for exact, usual, mine in zip(grads(truth), grads(plain), grads(ours)):
        assert mine.dtype == torch.bfloat16
        assert (errors(mine, exact) <= errors(usual, exact) * 1.5).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA multiplies bfloat16 into float32")
def test_on_a_gpu_logits_are_never_bfloat16():
    """From bfloat16 states and weights the log-probs are those of float64 to 1e-4 nats, with and without bias."""
    for bias in (False, True):
        layer = linear(bias, torch.bfloat16, trainable=False, std=3.0, vocabulary=1000, width=64).cuda()
        hidden, targets = (x.cuda() for x in inputs(3000, torch.bfloat16, vocabulary=1000, width=64))
        logits = F.linear(hidden.double(), layer.weight.double(), layer.bias.double() if bias else None)
        truth = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
        assert (LogProbHead(layer)(hidden, targets).double() - truth).abs().max() < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA multiplies bfloat16 into float32")
def test_on_a_gpu_a_trained_heads_gradient_is_summed_in_float32():
    """Products of bfloat16, several chunks: the weight's gradient is float64's to a hundredth, those of tokens that are
    hardly likely too, though each adds little to what is there."""
    layer = linear(False, torch.float32, trainable=True, std=0.3, vocabulary=1000, width=64).cuda()
    layer.product_dtype = torch.bfloat16
    hidden, targets = (x.cuda() for x in inputs(3000, torch.float32, vocabulary=1000, width=64))
    hidden = hidden.detach().requires_grad_()
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, layer.weight)]
    truth = F.linear(*exact).log_softmax(1).gather(1, targets[:, None]).sum()
    wanted = torch.autograd.grad(truth, exact)
    found = torch.autograd.grad(LogProbHead(layer, chunk_size=257)(hidden, targets).sum(), (hidden, layer.weight))
    for one, other in zip(found, wanted):
        assert one.dtype == torch.float32 and ((one - other).norm() / other.norm()).item() < 0.01
    each = (found[1] - wanted[1]).norm(dim=1) / wanted[1].norm(dim=1)
    assert each.max().item() < 0.02


@pytest.mark.parametrize("offset", [0.0, 24.0, 8192.0])
def test_a_log_prob_has_the_digits_of_its_own_size(offset):
    """Whatever the size of the logits: log softmax stays as it is where all of them grow by one number. The sum of two
    tokens' probabilities is 1, so the likelier one's log-prob is -log(1 + e^-d), which is 8e-7 for d = 14."""
    distances = [0.0, 2.0, 8.0, 14.0]
    logits = torch.tensor([[0.0, -d] for d in distances]) + offset  # exact in float32
    for target, gap in ((0, 0.0), (1, 1.0)):
        truth = [-gap * d - math.log1p(math.exp(-d)) for d in distances]
        logps = chunk_logps(logits.clone(), torch.full((4,), target)).logps
        assert logps.tolist() == pytest.approx(truth, rel=1e-6, abs=6e-8)  # abs: the step of float32 below 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("std", [0.1, 3.0, 300.0])
def test_no_log_prob_is_positive(std, dtype):
    """Flat, sharp and one-hot distributions; in the sharpest a sure token has log-prob 0 and not a bit more."""
    layer, (hidden, _) = linear(dtype=dtype, std=std), inputs(4000, dtype)
    # In float64: bfloat16's own best token may be another one.
    best = F.linear(hidden.double(), layer.weight.double(), layer.bias.double()).argmax(1)
    logps = LogProbHead(layer)(hidden, best)
    assert logps.max() <= 0 and logps.min() >= -math.log(V) - 1e-5
    assert std < 300 or logps.max() == 0


@pytest.mark.parametrize("scale", [2.0**-6, 2.0**-14])
def test_twenty_thousand_terms_lose_nothing(scale):
    """Bfloat16-sized terms sum exactly in float64, whatever the order; float32 and bfloat16 would be off."""
    draw = torch.Generator().manual_seed(0)
    terms = -torch.randint(1, 2**8, (20_000,), generator=draw) * scale - 7 * (torch.arange(20_000) % 3 == 0)
    seq = torch.arange(20_000) // 10_000
    expected = [math.fsum(side.tolist()) for side in terms.double().split(10_000)]
    assert sum_by_sequence(terms.float(), seq, 2).tolist() == expected
    order = torch.cat([torch.randperm(10_000, generator=draw) + start for start in (0, 10_000)])
    assert sum_by_sequence(terms.float()[order], seq, 2).tolist() == expected


def test_a_broken_token_spoils_its_own_response_alone():
    """A value that is not finite must not hide the response that has it."""
    token_logps = torch.tensor([-1.0, -math.inf, -2.0, math.nan, -3.0])
    sums = sum_by_sequence(token_logps, torch.tensor([0, 1, 1, 2, 3]), 4)
    assert sums[[0, 3]].tolist() == [-1.0, -3.0] and not sums[1:3].isfinite().any()


class PositionsOnly(nn.Module):
    """A model whose hidden states depend on the position alone: tokens count as labels, never as context."""

    def __init__(self):
        super().__init__()
        text = SimpleNamespace(_attn_implementation=LOOP)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.lm_head = linear(width=D)
        self.table = inputs(40)[0].detach()
        self.base_model = self.states

    def get_output_embeddings(self):
        return self.lm_head

    def states(self, input_ids, use_cache, position_ids=None, segments=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return SimpleNamespace(last_hidden_state=self.table[position_ids])


@pytest.mark.parametrize("layout", [pack, pad])
def test_only_response_tokens_are_labels(layout):
    """A prompt token as label changes nothing; any token of chosen or rejected changes its own sum alone."""
    model = PositionsOnly()
    prompt, chosen, rejected = [3, 14, 15], [9, 2, 6, 5], [30, 5, 8]
    logps = model.lm_head(model.table).log_softmax(1)

    def score(prompt, chosen, rejected):
        other = ([1, 1], [[4], [4, 4]])
        return SequenceLogProbs(model)(layout([other, (prompt, [chosen, rejected]), other]))[2:4].tolist()

    def expected(response):  # token k stands at position 3 + k, so position 2 + k predicts it
        return sum(logps[2 + k, y].item() for k, y in enumerate(response))

    base = score(prompt, chosen, rejected)
    assert base == pytest.approx([expected(chosen), expected(rejected)], abs=1e-12)
    for k in range(3):
        assert score(prompt[:k] + [7] + prompt[k + 1:], chosen, rejected) == base
    for k in range(4):
        changed = chosen[:k] + [7] + chosen[k + 1:]
        assert score(prompt, changed, rejected) == [pytest.approx(expected(changed), abs=1e-12), base[1]]
        assert abs(expected(changed) - base[0]) > 1e-3
    for k in range(3):
        changed = rejected[:k] + [7] + rejected[k + 1:]
        assert score(prompt, chosen, changed) == [base[0], pytest.approx(expected(changed), abs=1e-12)]
        assert abs(expected(changed) - base[1]) > 1e-3


def plain_dpo(model, groups, ref, beta=0.1):
    """DPO as a textbook writes it, sharing no line with the trainer."""
    logps = torch.stack([x.sum() for x in naive_token_logps(model, groups)]).view(-1, 2)
    return -F.logsigmoid(beta * ((logps[:, 0] - ref[:, 0]) - (logps[:, 1] - ref[:, 1]))).mean()


def our_dpo(model, groups, ref, beta=0.1):
    from nanodpo.core.losses import dpo

    logps = SequenceLogProbs(model, chunk_size=7)(pack(groups)).view(-1, 2)
    return dpo(*logps.T, *ref.T, beta).mean()


def trained(kind: str, dtype):
    """A tiny model of each kind of training. Llama's norms go through float32, so float64 takes another family."""
    family = "llama" if dtype == torch.float32 else "gpt_neox"
    if kind != "lora":
        return tiny(family, dtype, tie_word_embeddings=kind == "tied")
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(family, dtype), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
                           autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, 0, 0.1)  # zero, as LoRA starts, would leave lora_A without a gradient
    return model


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("kind", ["lora", "tied", "untied"])
def test_gradients_of_a_whole_model_are_those_of_plain_dpo(kind, checkpointing, dtype, tolerance):
    """Loss and the gradient of every parameter, frozen head and trained, tied and not, checkpointed or not."""
    model, groups = trained(kind, dtype), random_groups()
    model.train()
    inner = model.get_base_model() if kind == "lora" else model
    assert inner.get_output_embeddings().weight.requires_grad == (kind != "lora")
    tied = inner.get_output_embeddings().weight is inner.get_input_embeddings().weight
    assert tied == (kind == "tied")
    parameters = [p for p in model.parameters() if p.requires_grad]
    ref = -torch.linspace(20, 90, 8, dtype=torch.float64).view(4, 2)
    expected = plain_dpo(model, groups, ref)
    truth = torch.autograd.grad(expected, parameters)

    inner.set_attn_implementation(LOOP)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    loss = our_dpo(model, groups, ref)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for p, g in zip(parameters, truth):
        assert g.norm() > 0
        assert (p.grad - g).norm() <= tolerance * g.norm()


def test_an_adapted_output_layer_is_refused():
    """LoRA on the head would be ignored, since the kernel reads the base weight."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="output layer must be a plain linear layer"):
        SequenceLogProbs(model)


@pytest.mark.parametrize("name", ["cohere", "granite", "gemma2", "phi"])
def test_scaled_capped_and_biased_logits_are_the_models_own(name):
    """Token log-probs of models that multiply, divide or cap their logits, or add a bias, against their own logits."""
    model, groups = tiny(name), random_groups()
    with torch.no_grad(), KeepDouble():
        ours = SequenceLogProbs(model, chunk_size=7).token_logps(pad(groups))
        assert (ours - torch.cat(naive_token_logps(model, groups))).abs().max() < 1e-9
        bare = LogProbHead(nn.Linear(1, 1))
        head = SequenceLogProbs(model).head
        assert (head.scale, head.cap, head.bias is None) != (bare.scale, bare.cap, True)


def test_hidden_states_of_another_dtype_meet_the_heads():
    """Mamba's last hidden state is float32 under bfloat16 weights, and stays so here; a head in float32 gets states of
    its own dtype."""
    model, groups = tiny("mamba", torch.bfloat16), random_groups()
    with torch.no_grad():
        ours = SequenceLogProbs(model).token_logps(pad(groups))
        truth = torch.cat(naive_token_logps(model, groups))
    assert (ours - truth).abs().mean() < 0.01 and truth.std() > 1
    model = tiny("llama", torch.bfloat16)
    model.lm_head.float()
    with torch.no_grad():
        assert SequenceLogProbs(model).states(pad(groups)).dtype == torch.float32
