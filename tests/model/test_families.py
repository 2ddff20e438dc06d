"""Families whose code does something of its own on the way from the weights to the log-probs, in a mode or at a length
that others do not know; the truth is transformers alone, a sequence at a time, in eval mode."""

import pytest
import torch
from conftest import make_tokenizer
from test_models import args
from tiny_models import naive_token_logps, random_groups, tiny
from transformers import AutoModelForCausalLM, Trainer

from nanodpo.core.attention import LOOP
from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.packing import LAYOUTS
from nanodpo.errors import UserError
from nanodpo.model import loading
from nanodpo.model.decay import is_decayed
from nanodpo.model.ready import make_ready
from nanodpo.model.selfcheck import choose_layout
from nanodpo.model.source import open_source

CPU = torch.device("cpu")
PHIMOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.3}
LAYERDROP = {"layerdrop": 0.5, "dropout": 0.0, "attention_dropout": 0.0, "ffn_dim": 48, "word_embed_proj_dim": 32}


def saved(folder, name: str, **changes) -> str:
    """A tiny model of this family on disk."""
    tiny(name, torch.float32, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def load(path: str, **changes):
    return loading.load_model(open_source(path, False), args(**{"use_lora": False} | changes))


def own_logps(path: str, groups, **changes) -> torch.Tensor:
    """By transformers alone."""
    with torch.no_grad():
        return torch.cat(naive_token_logps(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **changes),
                                           groups))


def our_logps(model, groups, train: bool = False) -> torch.Tensor:
    """By our kernel, in the layout that the self-check chooses."""
    module = SequenceLogProbs(model).eval()
    layout, _ = choose_layout(module, CPU, torch.float32, False)
    with torch.no_grad():
        return module.train(train).token_logps(LAYOUTS[layout](groups))


def test_a_threshold_that_is_named_after_noise_stays(tmp_path):
    """phimoe's router_jitter_noise is a threshold of its routing in eval mode too: at 0 another model would be
    trained."""
    path, groups = saved(tmp_path, "phimoe", **PHIMOE), random_groups()
    found, truth = our_logps(load(path), groups), own_logps(path, groups)
    assert (found - truth).abs().max() < 1e-4


@pytest.mark.parametrize("family, rates", [
    ("opt", LAYERDROP), ("dbrx", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "resid_pdrop": 0.5,
                                  "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
                                  "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}})])
def test_whole_layers_that_are_dropped_are_dropout(family, rates, tmp_path):
    """OPT's layerdrop and DBRX's resid_pdrop are 0 in training, too, unless --allow_dropout; then they are said."""
    model = tiny(family, torch.float32, **rates)
    for module in model.modules():
        for name in ("layerdrop", "resid_pdrop"):
            if name in vars(module):
                setattr(module, name, 0.5)
    assert "dropout in training passes, with rates 0.5" in loading.describe(model)
    for module, name in loading._dropouts(model):
        setattr(module, name, 0.0)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        truth = model(input_ids=ids).logits
        assert all(torch.equal(model.train()(input_ids=ids).logits, truth) for _ in range(8))


def test_several_ranks_do_not_drop_different_layers(tmp_path, monkeypatch):
    """A rank that skips a layer has no gradient of it, and ZeRO would add up gradients of different layers."""
    path, how = saved(tmp_path, "opt", **LAYERDROP), args(allow_dropout=True, use_lora=False, model_name="M")
    assert loading.load_model(open_source(path, False), how).model.decoder.layerdrop == 0.5
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="^--allow_dropout: layerdrop of M leaves out other layers on each rank"):
        loading.load_model(open_source(path, False), how)


def test_an_evaluation_leaves_rwkvs_weights_alone(tmp_path):
    """transformers halves those of later layers in its first pass in eval mode, until the next one in training: a
    checkpoint that was saved in between had other weights."""
    path = saved(tmp_path, "rwkv", num_hidden_layers=4, rescale_every=1, attention_hidden_size=32)
    model, groups = load(path), random_groups()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = our_logps(model, groups)
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert (found - own_logps(path, groups, rescale_every=0)).abs().max() < 1e-4


LLAMA4 = {"intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8, "interleave_moe_layer_step": 2,
          "attention_chunk_size": 32, "floor_scale": 20, "num_experts_per_tok": 1, "num_hidden_layers": 4}


def test_llama_4_in_plain_batches(tmp_path):
    """Its decoder is not where base_model_prefix says. Some of its layers scale queries by the place in the batch: past
    floor_scale tokens, longer than the self-check's, a packed batch would be wrong, so none is tried."""
    path, groups = saved(tmp_path, "llama4_text", **LLAMA4), random_groups()
    model = load(path)
    assert (our_logps(model, groups) - own_logps(path, groups)).abs().max() < 1e-4
    module = SequenceLogProbs(load(path, random_init=True))
    assert choose_layout(module, CPU, torch.float32, False)[0] == "plain"
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).state_dict()
    assert all(again[name].equal(tensor) for name, tensor in model.state_dict().items())


GEMMA3N = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "laurel_rank": 4, "head_dim": 8,
           "sliding_window": 7, "num_kv_shared_layers": 0, "intermediate_size": [48, 48], "altup_coef_clip": 0.1,
           "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]}


@pytest.mark.parametrize("bf16", [False, True])
def test_gemma_3n_is_the_same_model_in_training(bf16, tmp_path):
    """With altup_coef_clip it cuts coefficients off in training mode, and reads weights past the LoRA on them."""
    path, groups = saved(tmp_path, "gemma3n_text", **GEMMA3N), random_groups()
    model = load(path, use_lora=True, bf16=bf16)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.1)
    make_ready(model, bf16, CPU)
    with torch.no_grad():
        truth = torch.cat(naive_token_logps(model.eval(), groups))
    assert (our_logps(model, groups, train=True) - truth).abs().max() < 1e-3
    assert model.get_base_model().config.altup_coef_clip == 0.1


@pytest.mark.parametrize("family, changes, router", [("phimoe", PHIMOE, "router"), ("llama4_text", LLAMA4, "router")])
def test_a_layer_that_is_linear_in_name_alone_gets_no_lora(family, changes, router, tmp_path):
    """A router that returns several tensors is an nn.Linear by class. All others of the default have LoRA."""
    path = saved(tmp_path, family, **changes)
    model = load(path, use_lora=True)
    plain = {name for name, layer in AutoModelForCausalLM.from_pretrained(path).named_modules()
             if type(layer) is torch.nn.Linear and name != "lm_head"}
    adapted = {name.removeprefix("base_model.model.") for name, layer in model.named_modules()
               if hasattr(layer, "lora_A")}
    assert adapted == plain and len(plain) > 7
    our_logps(model, random_groups())
    with pytest.raises(UserError, match=f"{tmp_path}: its own forward pass fails: .*object has no attribute"):
        our_logps(load(path, use_lora=True, lora_target_modules=router), random_groups())


def test_falcons_own_linear_layer_is_one(tmp_path):
    """A subclass with a forward of its own that returns what a linear layer returns."""
    model = load(saved(tmp_path, "falcon"), use_lora=True)
    assert {name.split(".")[-1] for name, layer in model.named_modules() if hasattr(layer, "lora_A")} == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_mambas_refusal_names_the_flag(tmp_path):
    """PEFT refuses its default for mamba, by the name of a setting of its own. It lists the others."""
    with pytest.raises(UserError, match="^--lora_target_modules all-linear: .* remove it from --lora_target_modules .* "
                                        "The model's linear layers are dt_proj, in_proj, out_proj, x_proj.$"):
        load(saved(tmp_path, "mamba", state_size=4), use_lora=True)


def test_a_text_model_beside_an_eye_is_packed():
    """got_ocr2's outer config keeps the attention that it came with; that of its text model is set, and decides."""
    from transformers import GotOcr2Config

    eye = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16, "image_size": 64,
           "patch_size": 16, "output_channels": 8, "window_size": 2, "global_attn_indexes": [0]}
    text = {"model_type": "qwen2", "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GotOcr2Config(vision_config=eye, text_config=text))
    groups = random_groups()
    with torch.no_grad():
        truth = torch.cat(naive_token_logps(model.eval(), groups))
    assert (our_logps(model, groups) - truth).abs().max() < 1e-4
    assert model.config.get_text_config()._attn_implementation == LOOP != model.config._attn_implementation


@pytest.mark.parametrize("family, changes", [("gpt_oss", {}), ("cohere", {"use_qk_norm": True}), ("gpt2", {}),
                                             ("lfm2", {}), ("phi", {})])
def test_weight_decay_shrinks_the_matrices_that_transformers_shrinks(family, changes):
    """Neither biases of experts and norms of heads, which are stacked, nor vectors of other names, like gpt_oss' sinks.
    """
    weights = dict((model := tiny(family, **changes)).named_parameters())
    theirs = {name for name in Trainer.get_decay_parameter_names(None, model) if name in weights}  # a head may be tied
    assert {name for name, weight in weights.items() if is_decayed(name, weight)} == {
        name for name in theirs if weights[name].ndim > 1}
