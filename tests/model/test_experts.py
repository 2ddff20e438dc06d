"""LoRA on tensors that no linear layer holds, such as a mixture's experts, which transformers stacks in one tensor. Of
many families PEFT adapts them with `all-linear`. The truth is W + s B A, made by hand, in plain transformers."""

import json

import pytest
import torch
from conftest import ROOT, launch, make_tokenizer
from safetensors.torch import save_file
from test_families import load, our_logps, own_logps, saved
from test_models import args
from tiny_models import random_groups
from transformers import AutoModelForCausalLM

from nanodpo.errors import UserError
from nanodpo.folder import checkpoint
from nanodpo.model import loading, ready
from nanodpo.model.adapters import add_adapter, exchange_adapter, open_base
from nanodpo.model.source import open_source

CPU = torch.device("cpu")
STACKS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def moving(model):
    """The same, with an adapter that does something."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.1)
    return model


def by_hand(model, path: str):
    """The base as transformers opens it, with s B A added to each weight that has LoRA."""
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights = dict(plain.named_parameters())
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        weight = weights[f"{name}.{getattr(layer, 'parameter_name', 'weight')}"]
        a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
        scale, experts = layer.scaling["default"], len(weight) if weight.dim() == 3 else 1
        for e in range(experts):  # rows of A lie expert by expert, columns of B rank by rank
            rank = len(a) // experts
            delta = scale * b[:, e::experts] @ a[e * rank : (e + 1) * rank]
            whole = weight.data if weight.dim() == 2 else weight.data[e]
            whole += delta if delta.shape == whole.shape and not getattr(layer.get_base_layer(), "is_transposed", False
                                                                         ) else delta.T
    return plain


@pytest.mark.parametrize("family, lora, names", [
    ("qwen3_moe", {}, "k_proj, o_proj, q_proj, v_proj, experts.down_proj, experts.gate_up_proj, gate.weight"),
    ("gpt_oss", STACKS, "k_proj, o_proj, q_proj, v_proj, experts.down_proj, experts.gate_up_proj")])
def test_log_probs_and_hashes_are_those_of_the_sum(family, lora, names, tmp_path):
    """And the base has one hash, whatever is around its weights: else a run could be neither merged nor scored."""
    path, groups = saved(tmp_path, family), random_groups()
    settings = args(use_lora=True, lora_r=4, lora_alpha=8, peft_config="lora.json", merge_weights=False)
    model = moving(loading.load_model(open_source(path, False), settings, lora))
    assert " ".join(loading.describe(model).split()).endswith(f"LoRA on {names}")
    truth = by_hand(model, path)
    truth.save_pretrained(tmp_path / "sum")
    expected, base = own_logps(str(tmp_path / "sum"), groups), own_logps(path, groups)
    assert (expected - base).abs().max() > 0.1
    bare = open_base(path, torch.float32, False)
    assert loading.base_hashes(model) == loading.base_hashes(bare)
    ready.make_ready(model, False, CPU)
    assert (our_logps(model, groups) - expected).abs().max() < 1e-4


def test_bfloat16_does_not_round_it_away(monkeypatch, tmp_path):
    """On a CPU such tensors are held in float32, and their LoRA is drawn as without --bf16. A GPU refuses them."""
    path, groups = saved(tmp_path, "qwen3_moe"), random_groups()
    drawn, model = (load(path, use_lora=True, lora_r=4, bf16=bf16) for bf16 in (False, True))
    lora = {name: p for name, p in drawn.named_parameters() if ".lora_" in name}
    assert all(p.equal(lora[name]) for name, p in model.named_parameters() if ".lora_" in name) and len(lora) > 12
    moving(model)
    open_base(path, torch.bfloat16, False).save_pretrained(tmp_path / "rounded")
    truth = by_hand(model, str(tmp_path / "rounded"))
    truth.save_pretrained(tmp_path / "sum")
    ready.make_ready(model, True, CPU)
    assert (our_logps(model, groups) - own_logps(str(tmp_path / "sum"), groups)).abs().max() < 1e-4
    monkeypatch.setattr(ready, "product_dtype", lambda bf16, device: torch.bfloat16)
    with pytest.raises(UserError, match="^--bf16: rounds what LoRA adds to experts.down_proj, experts.gate_up_proj, "
                                        "gate.weight; leave it out, or train linear layers alone: "
                                        "--lora_target_modules k_proj,o_proj,q_proj,v_proj$"):
        ready.make_ready(load(path, use_lora=True, bf16=True), True, CPU)
    ready.make_ready(load(path, use_lora=True, bf16=True, lora_target_modules="q_proj,v_proj"), True, CPU)


def test_merged_experts_are_rounded_once(tmp_path):
    """In bfloat16 W + s B A is rounded, and s B A not before, which loses most where it all but cancels W."""
    path = saved(tmp_path / "base", "qwen3_moe")
    model = moving(load(path, use_lora=True, lora_r=4, bf16=True))
    tokenizer = make_tokenizer()
    checkpoint.save(model, tokenizer, checkpoint.gather(model, True), tmp_path / "checkpoint-1", {"step": 1})
    checkpoint.merge(tmp_path / "checkpoint-1", tmp_path / "merged", torch.bfloat16, False)
    open_base(path, torch.bfloat16, False).save_pretrained(tmp_path / "rounded")
    merged = dict(open_base(str(tmp_path / "merged"), torch.bfloat16, False).named_parameters())
    for name, truth in by_hand(model, str(tmp_path / "rounded")).named_parameters():
        assert ((merged[name].float() - truth).abs() <= truth.abs() * 2**-8 * 1.001).all(), name


def test_stage_3_is_refused(tmp_path):
    """It gathers the weights of a layer when the layer is called, and PEFT reads these before. Some families fail then;
    of others what is gathered is left from another read."""
    path = saved(tmp_path, "qwen3_moe")
    with pytest.raises(UserError, match="^LoRA on experts.down_proj, .*, gate.weight reads these weights where stage 3 "
                                        "of ZeRO .*; use a stage of 0 to 2, or .* --lora_target_modules k_proj,o_proj"):
        ready.make_ready(load(path, use_lora=True), False, CPU, zero3=True)
    ready.make_ready(load(path, use_lora=True, lora_target_modules="q_proj"), False, CPU, zero3=True)


def test_a_name_that_no_weight_has(tmp_path):
    path = saved(tmp_path, "qwen3_moe")
    with pytest.raises(UserError, match="target_parameters has 'experts.w', which is no weight of the model"):
        loading.load_model(open_source(path, False), args(use_lora=True, peft_config="lora.json", merge_weights=False),
                           {"target_parameters": ["experts.w"]})


def of_transformers_4(path: str, folder, seed: int, **settings):
    """An adapter as PEFT wrote it beside transformers 4, where each expert had linear layers; and its sum by hand."""
    rank, alpha, names = 4, 6, ("gate_proj", "up_proj", "down_proj")
    plain, weights = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), {}
    draw = torch.Generator().manual_seed(seed)
    for number, layer in enumerate(plain.model.layers):
        stack, inner = layer.mlp.experts, layer.mlp.experts.down_proj.shape[-1]
        parts = {f"self_attn.{name}": getattr(layer.self_attn, name).weight.data for name in ("q_proj", "o_proj")}
        for e, (both, down) in enumerate(zip(stack.gate_up_proj.data, stack.down_proj.data)):
            parts |= {f"mlp.experts.{e}.{name}": w for name, w in zip(names, (both[:inner], both[inner:], down))}
        for name, weight in parts.items():
            rows, columns = weight.shape
            b, a = (torch.randn(shape, generator=draw) / 10 for shape in ((rows, rank), (rank, columns)))
            weight += alpha / rank * b @ a
            for side, matrix in (("A", a), ("B", b)):
                weights[f"base_model.model.model.layers.{number}.{name}.lora_{side}.weight"] = matrix
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    own = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": path, "r": rank,
           "lora_alpha": alpha, "target_modules": ["q_proj", "o_proj", *names]} | settings
    (folder / "adapter_config.json").write_text(json.dumps(own))
    plain.save_pretrained(folder.with_name(f"{folder.name}-sum"))
    return own_logps(f"{folder}-sum", random_groups())


def test_adapters_of_transformers_4_are_what_they_were(tmp_path):
    """PEFT joins the layers of all experts when it opens one. Its names in the file were compared with those of today,
    and a good adapter was said to lack weights."""
    path, groups = saved(tmp_path / "base", "qwen3_moe"), random_groups()
    first, second = (of_transformers_4(path, tmp_path / str(seed), seed) for seed in (1, 2))
    assert (first - own_logps(path, groups)).abs().max() > 0.1 and (first - second).abs().max() > 0.1
    model = add_adapter(open_base(path, torch.float32, False), str(tmp_path / "1"))
    exchange_adapter(model, str(tmp_path / "2"))
    assert (our_logps(model, groups) - second).abs().max() < 1e-4
    model = add_adapter(open_base(path, torch.float32, False), str(tmp_path / "1"))
    assert (our_logps(model, groups) - first).abs().max() < 1e-4


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"alpha_pattern": {"up_proj": 60}}])
def test_scales_that_peft_does_not_carry_over_are_refused(settings, tmp_path):
    """PEFT joins gate_proj and up_proj by twice the rank and twice lora_alpha: with rank-stabilised LoRA that scale is
    not the one before, and an alpha_pattern of theirs is passed over."""
    path = saved(tmp_path / "base", "qwen3_moe")
    of_transformers_4(path, tmp_path / "old", 1, **settings)
    with pytest.raises(UserError, match=f"old: is of transformers 4, .* scales .*{[*settings][0]}.*name the merged"):
        add_adapter(open_base(path, torch.float32, False), str(tmp_path / "old"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_from_sft_to_dpo_to_scores_and_a_merged_model(family, tiny, tmp_path):
    """The adapter of one run is the start of the next; merged, it is the same model, and as PEFT opens it."""
    path, groups = saved(tmp_path / "base", family, vocab_size=264), random_groups()
    (tmp_path / "lora.json").write_text(json.dumps({"target_modules": ["q_proj"]} | STACKS))
    common = ("--train_file_path", tiny / "train.jsonl", "--learning_rate", "1e-2", "--max_steps", "2", "--save_steps",
              "1", "--draw", "false", "--cache_dir", tmp_path / "cache", "--merge_weights")
    given = ("--peft_config", tmp_path / "lora.json") if family == "gpt_oss" else ()
    launch(ROOT / "train.py", "--model_name", path, "--loss", "sft", "--lora_r", "4", *given, "--output_dir",
           tmp_path / "sft", *common, launcher="fork")
    dpo = tmp_path / "dpo"
    launch(ROOT / "train.py", "--model_name", tmp_path / "sft" / "checkpoint-2", "--output_dir", dpo, *common,
           launcher="fork")
    launch(ROOT / "score.py", dpo, "--dataset_path", tiny / "train.jsonl", launcher="fork")
    assert (dpo / "scores.parquet").is_file()
    names = json.loads((tmp_path / "sft" / "checkpoint-2" / "adapter_config.json").read_text())["target_parameters"]
    assert names == (STACKS["target_parameters"] if given else ["down_proj", "gate.weight", "gate_up_proj"])  # no set's
    adapted = add_adapter(open_base(path, torch.float32, False), str(dpo / "checkpoint-2")).eval()
    merged = own_logps(str(dpo / "merged"), groups)
    assert (our_logps(adapted, groups) - merged).abs().max() < 1e-4
    assert (own_logps(path, groups) - merged).abs().max() > 0.1
