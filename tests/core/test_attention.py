"""Packed batches against separate forward passes, by family; the CUDA path against a slow one; the self-check."""

import heapq
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, KeepDouble, V, naive_token_logps, random_groups, tiny
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nanodpo.core import attention
from nanodpo.core.attention import LOOP, VARLEN, loop_attention, varlen_attention
from nanodpo.core.logprobs import SequenceLogProbs, sum_by_sequence
from nanodpo.core.packing import LAYOUTS, pack, pad
from nanodpo.errors import UserError
from nanodpo.model import selfcheck
from nanodpo.model.selfcheck import choose_layout

CPU = torch.device("cpu")
PACKED = ["llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox",
          "gpt2", "cohere", "granite", "phi"]
PLAIN = ["bloom", "lfm2", "mamba", "gpt_oss"]


def logps_and_gradients(model, token_logps):
    """Token log-probs and the gradient of an uneven weighting of them by every parameter."""
    weights = torch.linspace(-1, 2, len(token_logps), dtype=token_logps.dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad((token_logps * weights).sum(), parameters, allow_unused=True)
    return token_logps.detach(), torch.cat([(p * 0 if g is None else g).flatten() for p, g in zip(parameters, grads)])


def compare(model, layout, attention_name, groups):
    """(largest error of a token's log-prob, relative error of the gradient) against separate forward passes."""
    truth, true_grad = logps_and_gradients(model, torch.cat(naive_token_logps(model, groups)))
    model.set_attn_implementation(attention_name)
    logps, grad = logps_and_gradients(model, SequenceLogProbs(model, chunk_size=50).token_logps(layout(groups)))
    assert truth.std() > 0.3 and true_grad.norm() > 1
    return (logps - truth).abs().max().item(), ((grad - true_grad).norm() / true_grad.norm()).item()


@pytest.mark.parametrize("name", PACKED)
def test_packed_is_separate(name, record_property):
    """In float64 to 1e-12, in float32 to 1e-5 nats a token and 1e-5 of the gradient; four groups in a batch."""
    with KeepDouble():
        exact = compare(tiny(name), pack, LOOP, random_groups())
    single = compare(tiny(name, torch.float32), pack, LOOP, random_groups())
    record_property("errors", (exact, single))
    assert max(exact) < 1e-12
    assert max(single) < 1e-5


@pytest.mark.parametrize("name", [*PACKED, "bloom", "lfm2", "mamba"])
def test_plain_is_separate(name):
    """A sequence a line, padded on the right, under the model's own attention; to 1e-12 in float64."""
    model = tiny(name)
    with KeepDouble():
        assert max(compare(model, pad, model.config._attn_implementation, random_groups())) < 1e-12


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_a_response_is_blind_to_its_siblings_and_neighbours(name):
    """Tokens of one response, or of a whole other group, change: every other sum stays the same to the last bit."""
    model, groups = tiny(name, torch.float32), random_groups()
    model.set_attn_implementation(LOOP)
    module = SequenceLogProbs(model)

    def other(ids):
        return [(i + 1) % V for i in ids]

    with torch.no_grad():
        base = module(pack(groups))
        for g, (prompt, responses) in enumerate(groups):
            for side in (0, 1):
                changed = [other(r) if i == side else r for i, r in enumerate(responses)]
                moved = module(pack(groups[:g] + [(prompt, changed)] + groups[g + 1:])) != base
                assert moved.nonzero().flatten().tolist() == [2 * g + side]
            moved = module(pack(groups[:g] + [(other(prompt), [*map(other, responses)])] + groups[g + 1:])) != base
            assert moved.nonzero().flatten().tolist() == [2 * g, 2 * g + 1]


def test_other_groups_of_a_batch_come_and_go_unnoticed():
    """Alone, in front, behind, as one pair of many: the same sums to 1e-12 in float64."""
    model, groups = tiny("llama"), random_groups()
    model.set_attn_implementation(LOOP)
    module = SequenceLogProbs(model)
    with torch.no_grad(), KeepDouble():
        together, backwards = module(pack(groups)).view(-1, 2), module(pack(groups[::-1])).view(-1, 2)
        alone = torch.stack([module(pack([group])) for group in groups])
        single = torch.stack([module(pack([(p, [r])])).squeeze() for p, rs in groups for r in rs]).view(-1, 2)
    for way in (backwards.flip(0), alone, single):
        assert (together - way).abs().max() < 1e-12


def slow_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scaling, window):
    """The variable-length kernel as it is documented, a sequence, a head and a query at a time."""
    assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
    out, share = [], q.shape[1] // k.shape[1]
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
        ahead = (k1 - k0) - (q1 - q0)  # the last query stands at the last key
        for i in range(q1 - q0):
            first = max(0, int(ahead) + i - window) if window >= 0 else 0
            seen = slice(int(k0) + first, int(k0 + ahead) + i + 1)
            heads = []
            for h in range(q.shape[1]):
                scores = scaling * (k[seen, h // share] @ q[int(q0) + i, h])
                heads.append(scores.softmax(0) @ v[seen, h // share])
            out.append(torch.stack(heads))
    return torch.stack(out)


def attend(function, segments, length, window, kv_heads=2, dtype=torch.float64, device="cpu", size=8):
    """Output and gradients of one attention call on random heads."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, 4, length, size), (1, kv_heads, length, size), (1, kv_heads, length, size)]
    qkv = [torch.randn(s, generator=draw).to(device, dtype).requires_grad_() for s in shapes]
    out, _ = function(None, *qkv, None, scaling=0.3, segments=segments, sliding_window=window)
    weights = torch.randn(out.shape, generator=draw).to(device, dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), qkv)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 45, 46, 1000])
def test_varlen_is_the_loop(monkeypatch, window, kv_heads):
    """Forward and gradients to 1e-12; windows shorter than, as long as and longer than the longest sequence of 45."""
    monkeypatch.setattr(attention, "varlen_call", slow_varlen)
    batch = pack(random_groups())
    length = batch.input_ids.shape[1]
    loop, varlen = (attend(f, batch.segments, length, window, kv_heads) for f in (loop_attention, varlen_attention))
    for a, b in zip(loop, varlen):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2", "gemma2"])
def test_varlen_in_a_model_is_separate(monkeypatch, name):
    """The CUDA path with a slow kernel in place of its own: to 1e-12. Gemma 2 caps its scores, so it takes the loop."""
    calls = []
    monkeypatch.setattr(attention, "varlen_call", lambda *a: calls.append(1) or slow_varlen(*a))
    with KeepDouble():
        assert max(compare(tiny(name), pack, VARLEN, random_groups())) < 1e-12
    assert len(calls) == (0 if name == "gemma2" else 2)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_scores_are_scaled_and_capped_by_hand(cap):
    """q . k is 8 for the first key and 0 for the second, scaling 1/4 and not the root's 1/2: a score of 2, 2 tanh(1)
    under a cap of 2. The first value is 1 and the second 0, so the output is the sigmoid of that score."""
    segments = pack([([1], [[2]])]).segments
    query, key, value = (torch.zeros(1, 1, 2, 4, dtype=torch.float64) for _ in range(3))
    query[0, 0, 1, 0], key[0, 0, 0, 0], value[0, 0, 0] = 2, 4, 1
    out, _ = loop_attention(None, query, key, value, None, scaling=0.25, segments=segments, softcap=cap)
    score = 2 * math.tanh(1) if cap else 2
    assert out[0, 1, 0].tolist() == pytest.approx([1 / (1 + math.exp(-score))] * 4, rel=1e-6)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("function", [loop_attention, varlen_attention])
def test_dropout_is_on_the_weights(function, cap, monkeypatch):
    """A prompt of one token sees itself alone, with weight 1: dropped it is 0, kept it is doubled. The variable-length
    kernel knows no dropout and is not asked."""
    monkeypatch.setattr(attention, "varlen_call", None)
    torch.manual_seed(0)
    ones = torch.ones(1, 1, 60, 4)
    segments = pack([([1], [[2]])] * 30).segments
    out, _ = function(None, ones, ones, ones, None, 0.5, segments=segments, softcap=cap)
    assert {*out[0, ::2].flatten().tolist()} == {0.0, 2.0}


def test_how_the_kernel_is_called(monkeypatch):
    """The model's scaling, and no key after a query: a right window of 0, the left one as given."""
    seen = []
    monkeypatch.setattr(attention, "_kernel", lambda: lambda *args, **settings: seen.append((args, settings)))
    attention.varlen_call(*"qkvab", 5, 6, 0.3, 2)
    assert seen == [((*"qkvab", 5, 6), {"scale": 0.3, "window_size": (2, 0)})]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a CUDA device")
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("window", [None, 3, 45])
def test_cuda_kernel_is_as_exact_as_the_loop(window, kv_heads):
    """PyTorch's kernel in bfloat16 against float64, its error within twice the loop's own, output and gradients.
    """
    batch = pack(random_groups()).to(torch.device("cuda"))
    length = batch.input_ids.shape[1]
    call = {"segments": batch.segments, "length": length, "window": window, "kv_heads": kv_heads, "size": 64,
            "device": "cuda"}
    # The truth starts from what bfloat16 can hold, so that it differs by arithmetic alone.
    truth = attend(lambda m, *a, **k: loop_attention(m, *(x if x is None else x.bfloat16().double() for x in a), **k),
                   **call)
    loop = attend(loop_attention, dtype=torch.bfloat16, **call)
    varlen = attend(varlen_attention, dtype=torch.bfloat16, **call)
    for exact, usual, ours in zip(truth, loop, varlen):
        assert (ours - exact).abs().max() <= 2 * (usual - exact).abs().max()
        assert (ours - exact).abs().mean() <= 2 * (usual - exact).abs().mean()


@pytest.mark.parametrize("lengths, heads, processors, empty", [
    ((900, 900), 28, 132, 1),  # 3 parts of each head: 168, two rounds of a third; with one more 2: 112, one of a half
    ((900, 900), 32, 132, 1),  # 3: 192, two rounds of a third; 2: 128, one of a half
    ((900, 900), 14, 132, 1),  # 5: 140, two of a fifth; 4: 112, one of a quarter; with two more 3: 84, one of a third
    ((900, 900), 32, 108, 0),  # 2: 128, two of a half; 2 again; 1: 64, one whole
    ((900,) * 8, 28, 132, 0),  # 1: 224, two whole
    ((900, 225), 28, 132, 0),  # the second has a sixteenth of the work: 3 parts are one round of a third
    ((900, 720), 28, 132, 1),  # two thirds of it: 3 parts are more than one round
])
def test_how_many_empty_sequences_make_attentions_backward_pass_fastest(lengths, heads, processors, empty):
    """The GPU's processors are handed the parts in turn, as the kernel lists them: by part, sequence and head. With so
    many empty sequences the last one is done first, or within a tenth of it."""
    segments = pack([([1], [[2] * (n - 1)]) for n in lengths]).segments
    assert attention.empty_sequences(segments, heads, processors) == empty
    parts = [math.ceil(processors / (heads * (len(lengths) + n))) for n in range(3)]
    times = [done_by(lengths, heads, processors, n) for n in parts]
    assert times[empty] <= 1.1 * min(times), times


def done_by(lengths, heads, processors, parts) -> float:
    """Products until the last processor is done: of a part of the keys, in blocks of 128, with the queries behind."""
    free = [0.0] * processors
    for length in lengths * heads:
        work = [0] * parts
        for block in range(math.ceil(length / 128)):
            work[block % parts] += length - 128 * block
        for each in work:
            heapq.heapreplace(free, free[0] + each)
    return max(free)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a CUDA device")
def test_empty_sequences_change_gradients_by_rounding_alone(monkeypatch):
    """Without them, with one and with two: as far from float64 as one another, and each the same bits again."""
    batch = pack([([*range(1, 70)], [[5] * 700, [7] * 900])]).to(torch.device("cuda"))
    call = {"segments": batch.segments, "length": batch.input_ids.shape[1], "window": None, "size": 64,
            "device": "cuda"}
    truth = attend(lambda m, *a, **k: loop_attention(m, *(x if x is None else x.bfloat16().double() for x in a), **k),
                   **call)
    torch.use_deterministic_algorithms(True)
    try:
        errors = []
        for empty in range(3):
            monkeypatch.setattr(attention, "empty_sequences", lambda *sizes, empty=empty: empty)
            one, again = (attend(varlen_attention, dtype=torch.bfloat16, **call) for _ in range(2))
            assert all(map(torch.equal, one, again))
            errors.append([((x.double() - y).norm() / y.norm()).item() for x, y in zip(one, truth)])
        assert all(max(each) <= 1.05 * min(each) < 0.01 for each in zip(*errors)), errors
    finally:
        torch.use_deterministic_algorithms(False)


class Square(TorchDispatchMode):
    """Counts tensors whose last two dimensions both reach `length`."""

    def __init__(self, length):
        super().__init__()
        self.length, self.count = length, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.ndim >= 2 and min(t.shape[-2:]) >= self.length:
                self.count += 1
        return out


class Numbers(TorchDispatchMode):
    """Counts the numbers that operations fill, views apart."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, given = func(*args, **(kwargs or {})), {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(args)
                                                     if isinstance(t, torch.Tensor)}
        self.count += sum(t.numel() for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)
                          and t.untyped_storage().data_ptr() not in given)
        return out


def test_attention_grows_with_the_tokens_and_not_with_their_product_with_the_sequences():
    """Forward and backward, 4 pairs and 16 like them: four times the numbers. Were each sequence's gradient as large as
    the batch it would be near sixteen times."""
    counts = []
    for pairs in (4, 16):
        batch = pack(random_groups(sizes=[(20, [30, 31])] * pairs))
        with Numbers() as numbers:
            attend(loop_attention, batch.segments, batch.input_ids.shape[1], None)
        counts.append(numbers.count)
    assert 3.9 < counts[1] / counts[0] < 4.1


@pytest.mark.parametrize("sizes", [((20, [120, 110]), (30, [9, 140])), ((20, [150]),)])
def test_no_square_of_a_batchs_length_is_ever_built(sizes):
    """Forward and backward of packed batches: no T x T mask or score matrix, even for one sequence that fills it."""
    model, groups = tiny("llama", torch.float32), random_groups(sizes=sizes)
    batch = pack(groups)
    length = batch.input_ids.shape[1]
    model.set_attn_implementation(LOOP)
    with Square(length) as seen:
        SequenceLogProbs(model, chunk_size=64)(batch).sum().backward()
    assert seen.count == 0
    model.set_attn_implementation("eager")
    with Square(length) as seen:
        model(input_ids=batch.input_ids)
    assert seen.count > 0  # the counter counts


@pytest.mark.parametrize("prompt, response, masked", [(700, 512, True), (700, 513, False), (511, 512, False)])
def test_a_mask_is_built_for_a_short_response_alone(prompt, response, masked):
    """One as long as its prompt and 512 tokens at most, so that masks grow in proportion to batches; and not for the
    one that brings the prompt along."""
    segments = pack([([1] * prompt, [[2] * 900, [3] * response])]).segments
    with Square(512) as seen:
        attend(loop_attention, segments, prompt + 900 + response, None)
    assert bool(seen.count) == masked


@pytest.mark.parametrize("std", [0.3, None])
@pytest.mark.parametrize("name", [*PACKED, *PLAIN])
def test_self_check_knows_which_models_can_be_packed(name, std):
    """Convolution, SSM, alibi and attention sinks get padded batches, even in a new model of faint effects."""
    model = tiny(name, torch.float32, std)
    own, module = model.config._attn_implementation, SequenceLogProbs(model).train()
    expected = ("packed", LOOP) if name in PACKED else ("plain", own)
    assert choose_layout(module, CPU, torch.float32, demand_flash=False) == expected
    assert model.config._attn_implementation == expected[1]
    assert module.training and model.training  # given back as it came


@pytest.mark.parametrize("name", [*PACKED, *PLAIN])
def test_self_check_in_bfloat16(name):
    """bfloat16's own noise is no wrong layout, and hides none."""
    model = tiny(name, torch.bfloat16)
    own = model.config._attn_implementation
    expected = ("packed", LOOP) if name in PACKED else ("plain", own)
    assert choose_layout(SequenceLogProbs(model), CPU, torch.bfloat16, demand_flash=False) == expected


@pytest.mark.parametrize("name", PLAIN[:3])
def test_padded_batches_after_the_self_check_are_right(name):
    """For a model that was sent to padded batches, sums and gradients are those of separate forward passes."""
    model, groups = tiny(name, torch.float32), random_groups(7)
    module = SequenceLogProbs(model)
    truth = naive_token_logps(model, groups)
    sums = torch.stack([t.double().sum() for t in truth])
    _, true_grad = logps_and_gradients(model, torch.cat(truth))
    layout, _ = choose_layout(module, CPU, torch.float32, demand_flash=False)
    batch = LAYOUTS[layout](groups)
    logps, grad = logps_and_gradients(model, module.token_logps(batch))
    assert (sum_by_sequence(logps, batch.sequence_ids, 8) - sums).abs().max() < 1e-4
    assert (grad - true_grad).norm() < 1e-4 * true_grad.norm()


def test_self_check_refuses_an_output_layer_it_does_not_know():
    """HyperCLOVA X multiplies its logits by the setting by which others divide them."""
    model = tiny("hyperclovax", torch.float32, logits_scaling=0.5)
    with pytest.raises(UserError, match="output layer is not understood"):
        choose_layout(SequenceLogProbs(model), CPU, torch.float32, demand_flash=False)


HEADS = {"falcon_h1": {}, "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32,
                                              "attention_window_size": 7, "logits_soft_cap": 3.0}}


@pytest.mark.parametrize("name", HEADS)
def test_heads_whose_settings_have_other_names(name):
    """Factors and caps: log-probs are those of full logits, in float32."""
    model, groups = tiny(name, torch.float32, **HEADS[name]), random_groups()
    with torch.no_grad():
        truth = torch.cat(naive_token_logps(model, groups))
        module = SequenceLogProbs(model)
        layout, _ = choose_layout(module, CPU, torch.float32, demand_flash=False)
        assert truth.std() > 0.3 and (module.token_logps(LAYOUTS[layout](groups)) - truth).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_models_without_dropout_are_the_same_in_training_mode(name):
    module, other = (SequenceLogProbs(tiny(name, torch.float32)) for _ in range(2))
    without = choose_layout(other, CPU, torch.float32, demand_flash=False)
    assert choose_layout(module, CPU, torch.float32, demand_flash=False, to_train=True) == without
    assert module.training, "as before"


@pytest.mark.parametrize("change, words", [
    (lambda module, args, out: 1.5 * out if module.training else out, r"by \d\.?\d* standard deviations"),
    (lambda module, args, out: out.view(-1, 7) if module.training else out, "it fails there")])
def test_a_model_that_is_another_in_training_mode_is_refused(change, words):
    """One whose training mode draws, clamps or rescales would be evaluated and saved as another than is trained."""
    model, other = (tiny("llama", torch.float32) for _ in range(2))
    for one in (model, other):
        one.model.layers[0].mlp.register_forward_hook(change)
    with pytest.raises(UserError, match=f"can't be trained: in training mode its log-probs are not .* \\(.*{words}"):
        choose_layout(SequenceLogProbs(model), CPU, torch.float32, demand_flash=False, to_train=True)
    assert choose_layout(SequenceLogProbs(other), CPU, torch.float32, demand_flash=False) == ("packed", LOOP)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("error", [IndexError, AssertionError, KeyError])
def test_a_model_whose_own_code_fails_is_named(error, sharded):
    """As those do that read a weight without calling its layer, where the ranks share it: it has no number then."""
    def fail(*_):
        raise error("no such dimension")

    model = tiny("llama", torch.float32)
    model.model.layers[0].mlp.register_forward_hook(fail)
    if sharded:
        model.model.norm.weight.ds_id = 0
    why = "its own forward pass fails: .*no such dimension" + "'?$" * (not sharded)
    with pytest.raises(UserError, match=why + ".*stage 3 of ZeRO has not gathered: try a stage of 0 to 2" * sharded):
        choose_layout(SequenceLogProbs(model), CPU, torch.float32, demand_flash=False)


def test_self_check_accepts_a_head_of_almost_zeros():
    """Log-probs that are all but alike have no spread to measure an error by."""
    model = tiny("llama", torch.float32, tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight, 0, 1e-7)
    assert choose_layout(SequenceLogProbs(model), CPU, torch.float32, False) == ("packed", LOOP)


def test_self_check_is_as_strict_on_many_ranks_as_on_one(monkeypatch):
    """64 ranks with the same small error have that error, not 64 times it; one failing rank fails all."""
    monkeypatch.setattr(selfcheck, "sum_over_ranks", lambda values: values * 64)
    module = SequenceLogProbs(tiny("gemma2", torch.bfloat16))
    assert choose_layout(module, CPU, torch.bfloat16, False) == ("packed", LOOP)
    monkeypatch.setattr(selfcheck, "sum_over_ranks", lambda values: values * 63 + torch.tensor([torch.inf, 1]))
    with pytest.raises(UserError, match="it refuses batches, for the reason above"):
        choose_layout(SequenceLogProbs(tiny("gemma2", torch.bfloat16)), CPU, torch.bfloat16, False)


def test_packed_attention_without_segments_says_so():
    """A model left in packed mode and called with tokens alone fails by name, instead of attending across answers."""
    model = tiny("llama", torch.float32)
    for name in (LOOP, VARLEN):
        model.set_attn_implementation(name)
        with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'segments'"):
            model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_flash_attention_on_demand_only_where_it_can_run():
    """--use_flash_attention without CUDA stops with one line, before any forward pass."""
    model = tiny("llama", torch.float32)
    model.forward = None  # would fail if called
    with pytest.raises(UserError, match="--use_flash_attention: the flash kernel needs a CUDA device"):
        choose_layout(SequenceLogProbs(model), CPU, torch.bfloat16, demand_flash=True)


@pytest.mark.parametrize("dtype, cap, offered", [(torch.bfloat16, None, True), (torch.float32, None, False),
                                                 (torch.bfloat16, 50.0, False)])
def test_flash_attention_is_offered_where_the_kernel_can_do_it(dtype, cap, offered):
    """On CUDA it comes first for bfloat16 models that don't cap their scores, and is left out for others."""
    config = tiny("gemma2", attn_logit_softcapping=cap).config
    found = selfcheck._candidates(config, "sdpa", torch.device("cuda"), dtype)
    assert found == [("packed", VARLEN)] * offered + [("packed", LOOP), ("plain", "sdpa")]


def test_a_window_hidden_in_the_mask_is_caught():
    """qwen2_moe keeps its window in the mask alone, where packed batches do not look: right below it, wrong past it."""
    model = tiny("qwen2_moe", torch.float32)
    module = SequenceLogProbs(model)
    assert choose_layout(module, CPU, torch.float32, False, longest=50) == ("packed", LOOP)
    model.set_attn_implementation("sdpa")
    assert choose_layout(module, CPU, torch.float32, False, longest=200) == ("plain", "sdpa")


def test_a_tensor_that_packed_attention_does_not_know_is_refused():
    """Blocks that a layer chose, sinks, a bias: without them attention would be another one. Positions it has from the
    segments."""
    segments, (query, key, value) = pack([([1], [[2]])]).segments, torch.ones(3, 1, 1, 2, 4)
    for function in (loop_attention, varlen_attention):
        with pytest.raises(TypeError, match="block_indices"):
            function(None, query, key, value, None, segments=segments, block_indices=torch.zeros(1), softcap=None)
    loop_attention(None, query, key, value, None, segments=segments, position_ids=torch.arange(2), block_indices=None)


SPARSE = {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": 2, "index_head_dim": 8,
          "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "index_block_size": 16,
          "index_topk_blocks": 6, "moe_intermediate_size": 16, "dense_intermediate_size": 48,
          "shared_intermediate_size": 16, "rotary_dim": 4}


def test_attention_to_chosen_blocks_is_not_packed():
    """minimax_m3 looks at 6 blocks of 16 tokens, more than the self-check has: in its layout a sequence of 130 is that
    of a separate pass all the same."""
    model, groups = tiny("minimax_m3_vl_text", torch.float32, **SPARSE), random_groups(sizes=[(60, [50, 70])])
    with torch.no_grad():
        truth = torch.cat(naive_token_logps(model, groups))
        module = SequenceLogProbs(model)
        layout, _ = choose_layout(module, CPU, torch.float32, demand_flash=False)
        assert layout == "plain" and (module.token_logps(LAYOUTS[layout](groups)) - truth).abs().max() < 1e-3


@pytest.mark.parametrize("settings, length", [
    ({"sliding_window": 100}, 116), ({"index_topk": 100}, 116), ({"keep_window_size": 100}, 116),
    ({"indexer_budget": 100}, 116), ({"index_topk_blocks": 5, "index_block_size": 20}, 116),
    ({"index_topk": 300}, 73), ({"sliding_window": 5}, 73), ({"index_topk_blocks": 5}, 73)])
def test_sequences_of_the_self_check_are_longer_than_any_window(settings, length):
    """Than a number of keys that a model chooses, too, where the run's longest sequence, of 200 tokens, is."""
    config = SimpleNamespace(vocab_size=V, **settings)
    found = selfcheck._random_groups(config, 200)
    assert max(len(prompt) + len(response) for prompt, responses in found for response in responses) == length


def test_a_kernel_without_a_backward_is_passed_over(monkeypatch, capsys):
    """It says so, and the loop takes its place."""
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError("no backward for this head size")

    monkeypatch.setattr(attention, "varlen_call", lambda *args: Refuses.apply(slow_varlen(*args)))
    monkeypatch.setattr(selfcheck, "_candidates", lambda *args: [("packed", VARLEN), ("packed", LOOP)])
    module = SequenceLogProbs(tiny("llama", torch.float32))
    assert choose_layout(module, CPU, torch.float32, False) == ("packed", LOOP)
    said = capsys.readouterr().out
    assert "no backward for this head size" in said and "not used:\n" in said
    assert "attention: the flash kernel" in said


def test_layout_and_attention_are_said_in_words():
    """Not by the names under which transformers finds them; of a model's own there is no other name."""
    names = ("packed", LOOP), ("packed", VARLEN), ("plain", "sdpa")
    said = [selfcheck.describe(layout, name) for layout, name in names]
    assert [line.rpartition("attention: ")[2] for line in said] == [
        "sequence by sequence, in PyTorch", "the flash kernel", "the model's own (sdpa)"]
    assert "each prompt once" in said[0] and "padded to one length" in said[2]


@pytest.mark.parametrize("wrong", [False, True])
def test_the_kernels_gradients_are_compared_too(wrong, monkeypatch):
    """A kernel with the right output and gradients off by a tenth is found out."""
    def call(*args):
        out = slow_varlen(*args)
        return out + 0.1 * (out - out.detach()) if wrong else out

    monkeypatch.setattr(attention, "varlen_call", call)
    config = tiny("mistral").config
    error = selfcheck._backward_error(config, random_groups(), CPU, torch.float64)
    assert (0.05 < error < 0.2) if wrong else error < 1e-12


def test_queries_and_keys_take_the_dtype_of_the_values():
    """Rotary embeddings may return float32 beside values in bfloat16; the kernels take one dtype."""
    batch = pack(random_groups())
    query, key, value = (torch.randn(1, 4, batch.input_ids.shape[1], 8) for _ in range(3))
    out, _ = loop_attention(None, query, key, value.bfloat16(), None, scaling=0.3, segments=batch.segments)
    assert out.dtype == torch.bfloat16
