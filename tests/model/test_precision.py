"""--bf16: what is rounded and what is not, against models rounded by hand."""

import copy
import functools
import io
import json

import pandas
import pytest
import torch
from conftest import ROOT, launch, train
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import FAMILIES, naive_token_logps, random_groups, tiny

from nanodpo.core.attention import LOOP
from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.packing import pack, pad
from nanodpo.errors import UserError
from nanodpo.model import layers
from nanodpo.model.precision import Bf16Linear, FrozenProduct, mix_precision, product_dtype, storage_dtype
from nanodpo.model.recompute import FitToMemory, Recompute, sample_batch
from nanodpo.run import noise

CPU = torch.device("cpu")


def rounded(model, dtype=torch.float64):
    """A copy in which every weight is what bfloat16 holds of it."""
    return copy.deepcopy(model).bfloat16().to(dtype)


def mixed(model, product):
    model = copy.deepcopy(model).bfloat16()
    mix_precision(model, product)
    return model


def test_where_products_are_rounded():
    """On a GPU with --bf16; what is trained as a whole is never stored in bfloat16."""
    cuda = torch.device("cuda")
    found = [product_dtype(bf16, device) for bf16 in (False, True) for device in (CPU, cuda)]
    assert found == [torch.float32] * 3 + [torch.bfloat16]
    assert [storage_dtype(*how) for how in ((True, True), (True, False), (False, True))] == [
        torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "falcon_h1"])  # its head is refused
def test_a_cpu_rounds_nothing_but_frozen_weights(family):
    """Log-probs are float32's of the model with its weights rounded by hand, as near as any two float32 sums."""
    model, groups = tiny(family, torch.float32), random_groups()
    ours = SequenceLogProbs(mixed(model, torch.float32)).token_logps(pad(groups))
    exact = rounded(model, torch.float32)
    if family.startswith("gemma"):  # transformers scales its embeddings in their weight's dtype, as docs/gpu.md says
        exact.get_input_embeddings().register_forward_hook(lambda module, ids, states: (
            module.weight[ids[0]].bfloat16() * module.embed_scale.bfloat16()).float())
    truth = torch.cat(naive_token_logps(exact, groups))
    assert (ours - truth).abs().max() < 2e-4


def adapted(model):
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            p.data.copy_(0.2 * torch.randn(p.shape))  # the same in every dtype
    return model


def with_lora(base, product):
    """As train.py has it: loaded in bfloat16, adapter, mix, fuse, keep_less. In packed rows."""
    model = adapted(copy.deepcopy(base).bfloat16())
    mix_precision(model, product)
    layers.fuse_lora(model)
    layers.keep_less(model)
    model.get_base_model().set_attn_implementation(LOOP)
    return model


def gradients(model, row):
    logps = SequenceLogProbs(model)(row)
    logps.sum().backward()
    return logps.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "granite", "phi", "gpt2"])
def test_lora_stays_float32(family):
    """Log-probs and gradients of LoRA beside bfloat16 weights: on a CPU those of float64 to float32's last digits, with
    products in bfloat16, as a GPU has them, near; LoRA's weights and gradients are float32. (How near is a draw:
    granite's gradients are 0.1 to 0.6 away, by the adapter.)"""
    model = tiny(family, torch.float32)
    logps, truth = gradients(adapted(rounded(model)).double(), pad(random_groups()))
    for product, logp_limit, grad_limit in ((torch.float32, 1e-5, 1e-3), (torch.bfloat16, 0.02, 0.25)):
        ours = with_lora(model, product)
        assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in ours.parameters() if p.ndim > 1 and not p.requires_grad} >= {torch.bfloat16}
        found, grads = gradients(ours, pack(random_groups()))
        assert ((found - logps) / logps).abs().max() < logp_limit and grads.keys() == truth.keys()
        distance = sum((grads[name].double() - truth[name]).square().sum() for name in truth).sqrt()
        assert distance < grad_limit * sum(grad.square().sum() for grad in truth.values()).sqrt()
        assert {grad.dtype for grad in grads.values()} == {torch.float32}


@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
def test_a_copy_computes_with_its_own_weights(product):
    """deepcopy and torch.save, as one makes a reference of a policy: a copy stays where it was while the first model
    is trained on."""
    policy, row = SequenceLogProbs(mixed(tiny("llama", torch.float32), product)), pad(random_groups())
    file = io.BytesIO()
    torch.save(policy, file)
    file.seek(0)
    copies, before = (copy.deepcopy(policy), torch.load(file, weights_only=False)), policy(row).detach()
    for p in policy.parameters():
        p.data.mul_(1.5)
    assert all(again(row).equal(before) for again in copies) and not policy(row).equal(before)


def test_a_layer_held_in_bfloat16_can_be_trained_later():
    """Unfrozen, whole or its bias alone, as with PEFT's bias="all": gradients are autograd's, rounded to bfloat16 for
    the weight. They were missing, without a word."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 5).bfloat16()
    layer.__class__ = Bf16Linear
    layer.bias.data = layer.bias.data.float()
    x, slopes = torch.randn(2, 4, 3), torch.randn(2, 4, 5)
    weight, bias = (p.detach().float().requires_grad_() for p in (layer.weight, layer.bias))
    truth = torch.autograd.grad((torch.nn.functional.linear(x, weight, bias) * slopes).sum(), (weight, bias))
    for trained in ([layer.bias], [layer.weight, layer.bias], [layer.weight]):
        layer.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
        for mine, p in zip(torch.autograd.grad((layer(x) * slopes).sum(), trained), trained):
            wanted = truth[0].bfloat16() if p is layer.weight else truth[1]
            torch.testing.assert_close(mine, wanted, rtol=1e-2 if p is layer.weight else 1e-6, atol=1e-6)


def test_a_frozen_product_has_its_second_derivative():
    """Finite differences in float64, of the gradient of its inputs and of a bias."""
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3), (5, 3), (5,)))
    weight = weight.bfloat16()
    assert torch.autograd.gradgradcheck(lambda x, bias: FrozenProduct.apply(x, weight, bias, torch.Tensor.to).square(),
                                        (x.requires_grad_(), bias.requires_grad_()))


def test_what_adds_up_from_layer_to_layer_is_float32():
    """Also where products are bfloat16: layers take and give float32, their norms' outputs are rounded once for all
    that read them, and the last one's are not."""
    model, seen = mixed(tiny("llama", torch.float32), torch.bfloat16), {}
    inner = model.model
    places = {"layer": inner.layers[1], "norm": inner.layers[0].input_layernorm, "last": inner.norm,
              "product": inner.layers[0].self_attn.q_proj}
    for name, module in places.items():
        module.register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: (args[0].dtype, out.dtype)}))
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert seen == {"layer": (torch.float32, torch.float32), "norm": (torch.float32, torch.bfloat16),
                    "last": (torch.float32, torch.float32), "product": (torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU")])])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_logits_of_a_models_own_forward_are_not_rounded(family, device):
    """Where products are bfloat16 too: those of the head's rounded factors in float64, with a bias or a cap, so that no
    two tokens have one logit. They are what greedy answers choose from."""
    model, states = mixed(tiny(family, torch.float32).to(device), torch.bfloat16), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, out: states.append((given[0].detach(), out.detach())))
    logits = model(input_ids=torch.arange(5, device=device)[None]).logits
    (given, out), = states
    truth = given.bfloat16().double() @ head.weight.bfloat16().double().T
    truth = truth if head.bias is None else truth + head.bias.double()
    assert out.dtype == logits.dtype == torch.float32 and (out - truth).abs().max() < 1e-5 * truth.abs().max()
    assert all(len(set(line)) == len(line) for line in out[0].tolist())


def test_less_noise_than_in_bfloat16_throughout():
    """The same model and pairs under a change of a part in a million: float32 products leave nothing of it, rounded
    ones less than a model that is bfloat16 throughout is off."""
    model, groups = tiny("llama", torch.float32, num_hidden_layers=8), random_groups()
    truth = torch.cat(naive_token_logps(rounded(model), groups))

    def error(module):
        with torch.no_grad():
            return (SequenceLogProbs(module).token_logps(pad(groups)) - truth).square().mean().sqrt().item()

    old, gpu, cpu = error(model.bfloat16()), error(mixed(model, torch.bfloat16)), error(mixed(model, torch.float32))
    assert cpu < 1e-3 * old and gpu < 0.9 * old


def test_held_layers_keep_no_wider_copy():
    """Of a product with a frozen weight nothing is kept for backward but the weight itself."""
    layer = torch.nn.Linear(3, 5).bfloat16().requires_grad_(False)
    layer.bias.data = layer.bias.data.float()
    layer.__class__ = Bf16Linear
    x, kept = torch.randn(2, 3, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr()] and kept[0].dtype == torch.bfloat16
    y.backward(torch.ones(2, 5))
    assert torch.allclose(y, x @ layer.weight.float().T + layer.bias) and x.grad.equal(
        torch.ones(2, 5) @ layer.weight.float())


@pytest.mark.parametrize("more", [(), ("--use_lora", "false")], ids=["lora", "full"])
def test_scores_are_what_training_logged(more, tiny, tmp_path):
    """score.py under checkpoint-k gives the means that step k logged, over the same pairs, to float32's last digits."""
    flags = ("--learning_rate", "1e-3", "--max_steps", "3", "--save_steps", "1", "--per_device_train_batch_size", "11")
    lines = train(tiny, tmp_path / "run", *flags, "--bf16", *more)
    launch(ROOT / "score.py", tmp_path / "run", "--output_dir", tmp_path / "scores", "--dataset_path",
           f"all={tiny / 'train.jsonl'}", launcher="fork")
    scores = pandas.read_parquet(tmp_path / "scores" / "scores.parquet").groupby(["step", "response"])["logps"].mean()
    for line in lines:
        for side in ("chosen", "rejected"):
            assert scores[line["step"], side] == pytest.approx(line[f"logps/{side}"], rel=1e-6)
    (weights,) = (tmp_path / "run" / "checkpoint-3").glob("*model.safetensors")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float32}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["noise"].keys() == {"rewards/margins", "logps_per_token/chosen", "logps_per_token/rejected"}
    assert all(0 < value < 1e-4 for value in record["noise"].values())


def test_noise_by_hand():
    """A stand-in for a model whose log-probs are 1,000 times its embedding: a part in 2**20 moves them by known
    amounts. Margins: beta times the difference of two sides; the mean is of squares, over pairs."""
    model, lengths = Stub(), torch.tensor([[2, 4], [5, 10]])
    found = noise.measure(model, model.score, [([0, 1], 1.0), ([0], 0.0)], lambda indices: lengths[indices], 0.1)
    moved = 1000 * 2.0**-20 * torch.tensor([[1.0, 3], [2, 8]], dtype=torch.float64)  # of pair 0 and pair 1
    margin = 0.1 * (moved[:, 0] - moved[:, 1])
    truth = {"rewards/margins": margin, "logps_per_token/chosen": moved[:, 0] / lengths[:, 0],
             "logps_per_token/rejected": moved[:, 1] / lengths[:, 1]}
    truth = {name: value.square().mean().sqrt().item() for name, value in truth.items()}
    assert found == pytest.approx(truth, rel=1e-6)
    assert model.training and not model.embedding._forward_hooks
    sft = noise.measure(model, lambda i: model.score(i)[:, :1], [([0], 1.0)], lambda i: lengths[i][:, :1], None)
    assert sft == pytest.approx({"logps_per_token/chosen": moved[0, 0].item() / 2}, rel=1e-6)


class Stub(torch.nn.Module):
    """An engine, the module in it and its model, in one."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained(torch.tensor([[1.0, 3], [2, 8]], dtype=torch.float64))

    @property
    def module(self):
        return self

    model = module

    def get_input_embeddings(self):
        return self.embedding

    def score(self, indices):
        assert not self.training
        return 1000 * self.embedding(torch.tensor(indices))


def test_noise_costs_little_and_is_said():
    """Two passes over at most 8 pairs; of a run of 100 pairs or more at most 2% of passes, of which training takes
    three and its reference one."""
    assert all(2 * noise.count(n) <= 0.02 * 4 * n for n in range(100, 2000)) and noise.count(1) == 2
    assert noise.count(10**6) == 8
    line = noise.describe({"rewards/margins": 0.0123, "logps_per_token/chosen": 1e-3}, 16)
    assert line == ("bfloat16 noise: rewards/margins +-0.01 for one pair, +-0.003 in a step's mean of 16; a change "
                    "below that means nothing")
    assert "logps_per_token/chosen +-0.001 for one pair; a" in noise.describe({"logps_per_token/chosen": 1e-3}, 1)


@pytest.mark.parametrize("size, steps, said", [(1.9, 40, True), (0.0, 10, True), (2.1, 40, False), (1.9, 8, False)])
def test_margins_within_noise_to_the_end_are_nothing_learned(size, steps, said):
    """Noise of 0.06 for one pair is 0.03 for the mean of 4. The last half counts, in which margins of either sign are
    this many times as large; what went before may be anything, and lines of evaluations are none of it."""
    margins = [5.0 if i < steps // 2 else 0.03 * size * (-1) ** i for i in range(steps)]
    lines = [line for x in margins for line in ({"rewards/margins": x}, {"eval_rewards/margins": 7.0})]
    line = noise.nothing_learned(lines, {"rewards/margins": 0.06}, 4, 1e-9)
    assert (line is not None) == said
    if said:
        assert line.startswith(f"nothing is learned: rewards/margins of the last {steps // 2} steps")
        assert "noise of 0.03 for a step's mean. --learning_rate 1e-09 may be too small" in line
    assert noise.nothing_learned(lines, {}, 4, 1e-9) is None  # a run in float32


@pytest.mark.parametrize("rate, said", [("1e-12", True), ("1e-2", False)])
def test_a_run_says_at_its_end_that_nothing_is_learned(rate, said, tiny, tmp_path):
    done = launch(ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl",
                  "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--draw", "false", "--bf16",
                  "--max_steps", "10", "--learning_rate", rate, launcher="fork")
    assert (done.stdout.count("nothing is learned: ") == 1) == said
    assert f"--learning_rate {rate} may be too small" in done.stdout or not said


@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
def test_what_is_computed_again_rounds_alike(product):
    """Layers that backward computes again, with products in either dtype, change no bit of a gradient; and rows' memory
    is measured."""
    model = tiny("llama", torch.float32)
    model, row = with_lora(model, product), pack(random_groups())
    found, recompute = [], Recompute(model)
    for mode in ("keep", "full"):
        recompute.use(mode)
        model.train().zero_grad()
        found.append(gradients(model, row))
    (kept, truth), (again, grads) = found
    assert again.equal(kept) and all(grads[name].equal(truth[name]) for name in truth) and len(truth) > 20
    sample = functools.partial(sample_batch, "packed", model.config, CPU)
    per_token = FitToMemory(recompute, SequenceLogProbs(model), sample, 1e6).per_token
    assert 0 < per_token["full"] < per_token["keep"]


def test_noise_of_a_record_is_numbers_or_refused():
    """One function reads it for the verdict and for figures. A record of a run in float32 has none."""
    assert noise.of_record({}, "run.json") == noise.of_record({"noise": None}, "run.json") == {}
    right = {"rewards/margins": 0.5, "logps_per_token/chosen": 0}
    assert noise.of_record({"noise": right}, "run.json") == right
    for wrong in ([], [1], "x", 3, False, *({"rewards/margins": x} for x in (-1, "x", None, True, 1e999, 10**400))):
        with pytest.raises(UserError, match="^run.json: is not what train.py writes: noise is "):
            noise.of_record({"noise": wrong}, "run.json")
