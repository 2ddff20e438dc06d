"""A base in 4 or 8 bits by bitsandbytes: its matrices decoded by hand, runs against plain PEFT, and what is refused."""

import functools
import importlib.metadata
import importlib.util
import json
import shutil

import oracle
import pandas
import pytest
import torch
from conftest import ROOT, launch, make_model, make_tokenizer, train, without_times, zero
from safetensors.torch import load_file
from tiny_models import naive_token_logps, random_groups
from tiny_models import tiny as tiny_family

import train as trainer
from nanodpo.core import attention  # noqa: F401, registers the name
from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.packing import pack
from nanodpo.data.schedule import pairs_of_step
from nanodpo.errors import UserError
from nanodpo.model import layers, quantised
from nanodpo.model.adapters import open_base

pytestmark = pytest.mark.slow
installed = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"),
                               reason="bitsandbytes is not installed: pip install bitsandbytes")
BITS = pytest.mark.parametrize("bits", [4, 8])
STEPS = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_steps", "3",
         "--learning_rate", "1e-3", "--lora_r", "4")
WINDOWS = [pairs_of_step(11, 4, 42, step) for step in range(3)]
# The 16 numbers of NF4, by appendix E of the QLoRA paper.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def plain(folder, bits: int, quantise: bool = True):
    """A model as anyone would open it in so many bits; or as the matrices that those stand for."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} if bits == 4 else
           {"load_in_8bit": True})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 quantization_config=BitsAndBytesConfig(**how))
    return model if quantise else model.dequantize()


def by_hand(weight) -> torch.Tensor:
    """(out, in), float64: the matrix that the bits of a bitsandbytes weight stand for, from its tables."""
    if type(weight).__name__ == "Int8Params":  # a row is scaled so that its largest number is 127
        return weight.data.double() * weight.SCB.double()[:, None] / 127
    state = weight.quant_state
    double = state.state2  # the blocks' largest numbers are in 8 bits, themselves in blocks, about their mean
    blocks = torch.arange(state.absmax.numel()) // double.blocksize
    largest = double.code.double()[state.absmax.long()] * double.absmax.double()[blocks] + state.offset.double()
    both = torch.stack([weight.data.flatten() >> 4, weight.data.flatten() & 15], 1).flatten().long()
    numbers = torch.tensor(NF4, dtype=torch.float64)[both]
    return (numbers.view(-1, state.blocksize) * largest[:, None]).view(state.shape)


def adapted(folder, bits: int):
    """A quantised model with a LoRA that does something."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(open_base(str(folder), torch.float32, False, bits), LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False))


def lora_gradients(model, x) -> dict:
    model.zero_grad()
    out = model(input_ids=x).logits
    out.square().mean().backward()
    return {"out": out.detach()} | {name.replace(".weight", ""): p.grad.clone() for name, p in model.named_parameters()
                                    if p.requires_grad}


@installed
@BITS
@pytest.mark.parametrize("wide", [False, True], ids=["rows that end within a block", "rows of whole blocks"])
def test_a_product_is_that_of_the_matrix_that_the_bits_stand_for(bits, wide, tmp_path):
    """Decoded by hand in float64: W x, and W^T g for the gradient; and so is what an adapter is merged into."""
    make_model(width=64 if wide else 32).save_pretrained(tmp_path)
    model = open_base(str(tmp_path), torch.float32, False, bits)
    own = {name: layer for name, layer in model.named_modules() if layer in quantised.quantised_layers(model)}
    assert len(own) == 14 and "lm_head" not in own
    matrices = {name: by_hand(layer.weight) for name, layer in own.items()}
    quantised.multiply_dequantised(model)
    base = dict(oracle.load(tmp_path).named_modules())
    for name, layer in own.items():
        exact = matrices[name]
        assert 1e-4 < (exact - base[name].weight).abs().max() < 0.2 * exact.abs().max()  # rounded, and no more
        x, g = torch.randn(2, 3, layer.in_features, requires_grad=True), torch.randn(2, 3, layer.out_features)
        for layer.training in (True, False):
            y = layer(x)
            (gradient,) = torch.autograd.grad(y, x, g)
            assert (y - x.double() @ exact.T).abs().max() < 2e-6 * y.abs().max()
            assert (gradient - g.double() @ exact).abs().max() < 2e-6 * gradient.abs().max()
    merged = dict(quantised.without_bits(open_base(str(tmp_path), torch.float32, False, bits), torch.float32
                                         ).named_modules())
    for name, exact in matrices.items():
        torch.testing.assert_close(merged[name].weight.double(), exact, rtol=1e-6, atol=1e-7)


class OnAGpu(torch.Tensor):
    """Stands for a tensor on a GPU: it has a device, and all that can be done with it is to copy it to the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function == torch.Tensor.device.__get__:
                return args[0].device
            assert function in (torch.Tensor.cpu, torch.Tensor.to), "Expected all tensors to be on the same device"
            return args[0].as_subclass(torch.Tensor).clone()


@installed
def test_scales_of_8_bits_come_to_the_cpu_with_their_weights(tmp_path):
    """They are an attribute of the weight, which a module's own `cpu` does not see: a merge after training on a GPU
    found them there."""
    make_model(width=64).save_pretrained(tmp_path)
    model = open_base(str(tmp_path), torch.float32, False, 8)
    exact = [by_hand(layer.weight) for layer in quantised.quantised_layers(model)]
    for layer in quantised.quantised_layers(model):
        layer.weight.SCB = layer.weight.SCB.as_subclass(OnAGpu)
    places = [name for name, layer in model.named_modules() if layer in quantised.quantised_layers(model)]
    merged = dict(quantised.without_bits(model, torch.float32).named_modules())
    for name, matrix in zip(places, exact, strict=True):
        torch.testing.assert_close(merged[name].weight.double(), matrix, rtol=1e-6, atol=1e-7)


@installed
@BITS
def test_lora_in_one_product_is_pefts_own_layer(bits, tiny):
    """Outputs and gradients of every A and B, against PEFT's layers on those of bitsandbytes, in training, where these
    do not round inputs."""
    x = torch.randint(200, (2, 9), generator=torch.Generator().manual_seed(0))
    truth = lora_gradients(adapted(tiny / "model", bits).train(), x)
    model = adapted(tiny / "model", bits).train()
    quantised.multiply_dequantised(model)
    layers.fuse_lora(model)
    assert sum("forward" in vars(module) and hasattr(module, "lora_A") for module in model.modules()) == 14
    ours = lora_gradients(model, x)
    assert ours.keys() == truth.keys() and len(ours) == 29
    for name, value in truth.items():
        assert value.abs().max() > 0 and (ours[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


@installed
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3"])
def test_families(family, tmp_path):
    """Linear layers that gpt2 holds transposed, with a bias, and others: packed log-probs are those of a model with the
    matrices that are decoded by hand, one sequence at a time."""
    tiny_family(family, torch.float32).save_pretrained(tmp_path)
    groups, decoded = random_groups(), tiny_family(family, torch.float32).eval()
    held = plain(tmp_path, 4)
    with torch.no_grad():
        for name, layer in held.named_modules():
            if layer in quantised.quantised_layers(held):
                weight, matrix = decoded.get_submodule(name).weight, by_hand(layer.weight)
                weight.copy_(matrix.T if type(decoded.get_submodule(name)).__name__ == "Conv1D" else matrix)
        truth = torch.cat(naive_token_logps(decoded, groups))
        model = open_base(str(tmp_path), torch.float32, False, 4).eval()
        quantised.multiply_dequantised(model)
        model.set_attn_implementation("nanodpo_loop")
        found = SequenceLogProbs(model).token_logps(pack(groups))
    exact = torch.cat(naive_token_logps(tiny_family(family, torch.float32), groups))
    assert (found - truth).abs().max() < 1e-4 < 1e-2 < (found - exact).abs().max()


@pytest.fixture(scope="module")
def tiny(tiny, tmp_path_factory):
    """The same, with weights so large that quantisation moves log-probs by a tenth of a nat, and with rows of 64 and
    128 numbers: with others the layers of bitsandbytes, to which much is compared here, are wrong on some CPUs."""
    folder = tmp_path_factory.mktemp("large")
    for name, seed in (("model", 0), ("untied", 1)):
        model = make_model(seed, tied=name == "model", width=64)
        with torch.no_grad():
            for p in model.model.layers.parameters():
                p.mul_(8 if p.ndim > 1 else 1)
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    shutil.copy(tiny / "train.jsonl", folder)
    return folder


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A run in so many bits, made once: (folder, lines)."""
    folder = tmp_path_factory.mktemp("quantised")

    @functools.cache
    def made(bits: int):
        flags = (*STEPS, "--eval_file_path", tiny / "train.jsonl", "--save_steps", "2", "--merge_weights")
        return folder / f"{bits}", train(tiny, folder / f"{bits}", *flags, f"--load_in_{bits}bit")
    return made


@installed
def test_nothing_is_said_of_a_kernel_that_is_not_used(tiny):
    """bitsandbytes warns of it when it is imported, as PEFT does in every command, on a CPU with bfloat16
    instructions."""
    opened = f"from nanodpo.model.source import open_source; open_source({str(tiny / 'model')!r}, False)"
    done = launch("-c", f"{opened}; import bitsandbytes")
    assert done.stdout + done.stderr == ""


def steps(lines: list[dict]) -> list[dict]:
    return without_times([line for line in lines if "loss" in line])


@installed
@BITS
def test_a_run_is_that_of_plain_peft_on_the_dequantised_base(bits, tiny, runs):
    """Loss, gradient norm and log-probs of each step, and what is saved; run.json says how the base was quantised."""
    from peft import PeftModel

    folder, lines = runs(bits)
    model = PeftModel.from_pretrained(plain(tiny / "model", bits, quantise=False), folder / "checkpoint-0",
                                      is_trainable=True)
    expected = oracle.train(model, oracle.read_pairs(tiny / "train.jsonl"), WINDOWS)
    for line, truth in zip(steps(lines), expected, strict=True):
        for key, value in truth.items():
            assert line[key] == pytest.approx(value, rel=1e-5), (line["step"], key)
    saved, start = (load_file(folder / f"checkpoint-{k}" / "adapter_model.safetensors") for k in (3, 0))
    for name, value in model.named_parameters():
        if value.requires_grad:
            name = name.replace(".default.", ".")
            assert (saved[name] - value).norm() <= 1e-3 * (value - start[name]).norm() + 1e-7, name
    record = json.loads((folder / "run.json").read_text())
    assert record["quantisation"] == quantised.QUANTISATION[bits] and record["versions"]["bitsandbytes"]
    assert f'`{{"load_in_{bits}bit": true' in (folder / "checkpoint-3" / "README.md").read_text()
    assert "bitsandbytes quantises it" not in (folder / "merged" / "README.md").read_text()


@installed
@BITS
def test_a_checkpoint_in_plain_peft_and_merged_has_the_log_probs_of_the_run(bits, tiny, runs):
    """Opened in the same way, and as merged/, which has no quantised weight. The layers of bitsandbytes are told to
    train: else they round inputs, with 8 bits, and on some CPUs with 4."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, lines = runs(bits)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    assert merged.dtype == torch.float32 and not hasattr(merged.config, "quantization_config")
    pairs = oracle.read_pairs(tiny / "train.jsonl")
    for model in (PeftModel.from_pretrained(plain(tiny / "model", bits), folder / "checkpoint-3").train(), merged):
        for place, side in ((1, "chosen"), (2, "rejected")):
            with torch.no_grad():
                logps = [oracle.sequence_logp(model, pair[0], pair[place]).item() for pair in pairs]
            assert lines[-1][f"eval_logps/{side}"] == pytest.approx(sum(logps) / 11, rel=1e-6)


@installed
@BITS
def test_a_killed_run_goes_on_to_the_last_bit(bits, tiny, runs, tmp_path):
    flags = ("--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl", "--output_dir",
             tmp_path / "run", "--cache_dir", tmp_path / "cache", "--draw", "false", *STEPS, "--eval_file_path",
             tiny / "train.jsonl", "--save_steps", "2", "--merge_weights", f"--load_in_{bits}bit")
    assert launch(ROOT / "tests" / "faulty.py", "kill@2", *flags, check=False, launcher="fork").returncode == 137
    launch(ROOT / "train.py", *flags, launcher="fork")
    folder, lines = runs(bits)
    again = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps(again) == steps(lines) and len(steps(again)) == 3
    for name in ("checkpoint-3/adapter_model", "merged/model"):
        assert (tmp_path / "run" / f"{name}.safetensors").read_bytes() == (folder / f"{name}.safetensors").read_bytes()


@installed
@BITS
def test_scores_are_the_log_probs_of_the_run(bits, tiny, runs, tmp_path):
    """score.py learns of the bits from run.json; a bare adapter needs the flag, and without it has other numbers."""
    folder, lines = runs(bits)
    bare = shutil.copytree(folder / "checkpoint-3", tmp_path / "bare")
    data, found = ("--dataset_path", f"t={tiny / 'train.jsonl'}", "--responses", "chosen", "rejected"), {}
    for name, *which in (("run", folder), ("flag", bare, f"--load_in_{bits}bit"), ("none", bare)):
        launch(ROOT / "score.py", *which, *data, "--output_dir", tmp_path / name, launcher="fork")
        table = pandas.read_parquet(tmp_path / name / "scores.parquet")
        last = table[(table["step"] == table["step"].max()) & (table["response"] == "chosen")]
        found[name] = last.sort_values("row")["logps"].tolist()
    truth = lines[-1]["eval_logps/chosen"]
    assert sum(found["run"]) / 11 == pytest.approx(truth, rel=1e-6) and found["flag"] == found["run"]
    assert max(abs(x - y) for x, y in zip(found["run"], found["none"])) > 0.01


@installed
def test_the_base_is_another_one_in_full_precision(tiny, runs, tmp_path):
    """A run on the same base without the flag is another run; so is what was a checkpoint of one on weights that have
    changed since."""
    folder, _ = runs(4)
    refused = launch(ROOT / "train.py", "--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl",
                     "--output_dir", folder, *STEPS, check=False, launcher="fork")
    assert refused.returncode == 2 and "--load_in_4bit: true -> false" in refused.stderr
    base, copy = tmp_path / "base", tmp_path / "copy"
    make_model(seed=3, width=64).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("merged"))
    for config in copy.glob("checkpoint-*/adapter_config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
        (config.parent / "manifest.json").unlink()
    done = launch(ROOT / "score.py", copy, "--dataset_path", f"t={tiny / 'train.jsonl'}", "--output_dir",
                  tmp_path / "scores", check=False, launcher="fork")
    assert done.returncode == 2 and "holds other weights than those" in done.stderr, done.stderr


@installed
@pytest.mark.parametrize("bits, more", [(4, ("zero2",)), (8, ("zero1", "--gradient_checkpointing")),
                                        (4, ("zero0", "--activation_memory", "0.0001")),
                                        (4, ("--sequence_parallel_size", "2", "--gradient_accumulation_steps", "2")),
                                        (8, ("--sequence_parallel_size", "2", "--gradient_accumulation_steps", "2"))])
def test_ranks_zero_and_recomputation_change_nothing(bits, more, tiny, runs, tmp_path):
    flags = [item for word in more for item in (("--deepspeed", zero(tmp_path, int(word[4:]))) if "zero" in word else
                                                (word,))]
    lines = train(tiny, tmp_path / "run", *STEPS, "--gradient_accumulation_steps", "1", *flags,
                  f"--load_in_{bits}bit", ranks=2)
    for line, truth in zip(lines, steps(runs(bits)[1]), strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
            assert line[name] == pytest.approx(truth[name], rel=2e-5, abs=1e-7), (line["step"], name)


@installed
@BITS
def test_a_base_that_is_stored_quantised(bits, tiny, runs, tmp_path):
    """Saved by transformers, which keeps the very bits: the run is that with the flag, and score.py opens it."""
    _, lines = runs(bits)
    stored = tmp_path / "stored"
    plain(tiny / "model", bits).save_pretrained(stored)
    make_tokenizer().save_pretrained(stored)
    again = train(tiny, tmp_path / "run", "--model_name", stored, *STEPS)
    assert steps(again) == steps(lines)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["quantisation"][f"load_in_{bits}bit"] and not record["arguments"][f"load_in_{bits}bit"]
    launch(ROOT / "score.py", tmp_path / "run", "--responses", "chosen", "rejected", launcher="fork")
    table = pandas.read_parquet(tmp_path / "run" / "scores.parquet")
    chosen = table[(table["step"] == 3) & (table["response"] == "chosen")]["logps"].mean()
    assert chosen == pytest.approx(lines[-1]["eval_logps/chosen"], rel=1e-6)
    for words, flags in ((f"is stored in {bits} bits", (f"--load_in_{12 - bits}bit",)), ("its weights are quantised: ",
                                                                     ("--use_lora", "false"))):
        done = launch(ROOT / "train.py", "--model_name", stored, "--train_file_path", tiny / "train.jsonl",
                      "--output_dir", tmp_path / "no", *flags, check=False, launcher="fork")
        assert done.returncode == 2 and words in done.stderr and not (tmp_path / "no").exists(), done.stderr


@installed
def test_bfloat16_an_adapter_trained_on_and_another_reference(tiny, runs, tmp_path):
    """With --bf16 what is not quantised is in bfloat16, and the policy starts at its reference. An adapter goes on from
    where it was, and the model of --reference is quantised like the policy."""
    folder, lines = runs(4)
    flags = (*STEPS, "--load_in_4bit")
    for name, more in (("bf16", ("--bf16",)), ("on", ("--model_name", folder / "checkpoint-3")),
                       ("reference", ("--reference", tiny / "untied"))):
        first = train(tiny, tmp_path / name, *flags, *more)[0]
        if name != "reference":
            assert first["loss"] == pytest.approx(0.6931472, abs=1e-7)
    done = launch(ROOT / "train.py", "--model_name", folder / "checkpoint-3", "--train_file_path", tiny / "train.jsonl",
                  "--dry_run", launcher="fork")
    assert f"{folder / 'checkpoint-3'}: was trained with --load_in_4bit; here its base is another one" in done.stdout
    other = plain(tiny / "untied", 4, quantise=False).eval()
    pairs = [oracle.read_pairs(tiny / "train.jsonl")[i] for i in WINDOWS[0]]
    with torch.no_grad():
        mean = sum(oracle.sequence_logp(other, *pair[:2]).item() for pair in pairs) / 4
    assert first["ref_logps/chosen"] == pytest.approx(mean, rel=1e-6)


@installed
def test_dora_in_plain_peft_has_the_log_probs_of_the_run(tiny, tmp_path):
    from peft import PeftModel

    (tmp_path / "peft.json").write_text(json.dumps({"use_dora": True}))
    lines = train(tiny, tmp_path / "run", *STEPS, "--load_in_4bit", "--peft_config", tmp_path / "peft.json",
                  "--eval_file_path", tiny / "train.jsonl")
    assert steps(lines)[0]["loss"] == pytest.approx(0.6931472, abs=1e-7)
    model = PeftModel.from_pretrained(plain(tiny / "model", 4), tmp_path / "run" / "checkpoint-3").train()
    with torch.no_grad():
        logps = [oracle.sequence_logp(model, *pair[:2]).item() for pair in oracle.read_pairs(tiny / "train.jsonl")]
    assert lines[-1]["eval_logps/chosen"] == pytest.approx(sum(logps) / 11, rel=1e-6)


@installed
def test_weights_that_are_not_as_their_config_says(tiny, tmp_path):
    """Full ones that are called quantised, a quantised output layer, and a model without linear layers."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    shutil.copytree(tiny / "untied", tmp_path / "named")
    file = tmp_path / "named" / "config.json"
    for bits in (4, 8):
        file.write_text(json.dumps(json.loads(file.read_text()) | {
            "quantization_config": {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}}))
        with pytest.raises(UserError, match="named: its config.json says that its weights are quantised, and they are"):
            open_base(str(tmp_path / "named"), torch.float32, False)
    head = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["q_proj"])
    AutoModelForCausalLM.from_pretrained(tiny / "untied", quantization_config=head).save_pretrained(tmp_path / "head")
    with pytest.raises(UserError, match="head: its output layer is stored quantised"):
        open_base(str(tmp_path / "head"), torch.float32, False)
    with pytest.raises(UserError, match="--load_in_8bit: here has no linear layer"):
        quantised.check_loaded(torch.nn.Sequential(), "here", 8)


# What is refused: in one line, before weights are read. For this bitsandbytes need not be there.


def refuse(monkeypatch, tiny, *flags, there: bool = True):
    """The message, where the package is there or not."""
    find, version = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "bitsandbytes" else version(name))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: (
        there or None) if name == "bitsandbytes" else find(name, *more))
    monkeypatch.setattr("nanodpo.model.loading.load_model", lambda *args: pytest.fail("the weights are read"))
    with pytest.raises(UserError) as error:
        trainer.main(["--model_name", str(tiny / "model"), "--train_file_path", str(tiny / "train.jsonl"), *flags])
    return str(error.value)


@BITS
def test_a_missing_package_is_named(bits, tiny, monkeypatch):
    said = refuse(monkeypatch, tiny, f"--load_in_{bits}bit", there=False)
    assert said == (f"--load_in_{bits}bit: the package bitsandbytes is not installed; install it (pip install "
                    "bitsandbytes)")


@pytest.mark.parametrize("flags, words", [
    (("--load_in_4bit", "--load_in_8bit"), "--load_in_4bit and --load_in_8bit: give one of them"),
    (("--load_in_4bit", "--use_lora", "false"), "--load_in_4bit: quantised weights can't be trained, only LoRA on"),
    (("--load_in_8bit", "--lora_r", "0"), "--load_in_8bit: quantised weights can't be trained, only LoRA on them"),
    (("--load_in_4bit", "--deepspeed", "zero3"), "--load_in_4bit: stage 3 of ZeRO"),
    (("--use_qlora",), "--use_qlora: it is --load_in_4bit here"),
    (("--bnb_4bit_quant_type", "fp4"), "it is --load_in_4bit (nf4, double quantisation")])
def test_what_can_not_be_quantised(flags, words, tiny, tmp_path, monkeypatch):
    assert words in refuse(monkeypatch, tiny, *(str(zero(tmp_path, 3)) if flag == "zero3" else flag for flag in flags))


@pytest.mark.parametrize("stored, flags, words", [
    ({"load_in_4bit": True}, ("--use_lora", "false"), "quantised: quantised weights can't be trained, only LoRA"),
    ({"load_in_4bit": True}, ("--load_in_8bit",), "is stored in 4 bits; leave the flag out"),
    ({"load_in_8bit": True}, ("--load_in_4bit",), "is stored in 8 bits; leave the flag out"),
    ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, (), "are not supported; name the model"),
    ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, (), "are not supported; name the model"),
    ({"quant_method": "gptq"}, ("--load_in_4bit",), "only those of bitsandbytes are supported")])
def test_what_is_stored_otherwise(stored, flags, words, tiny, tmp_path, monkeypatch):
    """By the config.json of the base, also of that of --reference."""
    shutil.copytree(tiny / "model", tmp_path / "stored")
    file = tmp_path / "stored" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {
        "quantization_config": {"quant_method": "bitsandbytes"} | stored}))
    assert words in refuse(monkeypatch, tiny, *flags, "--model_name", str(tmp_path / "stored"))
    if "use_lora" not in str(flags):
        assert words in refuse(monkeypatch, tiny, *flags, "--reference", str(tmp_path / "stored"))
    assert "the package bitsandbytes is not installed" in refuse(
        monkeypatch, tiny, "--model_name", str(tmp_path / "stored"), there=False) or stored.get("quant_method")
