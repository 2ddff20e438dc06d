"""Models, adapters, the reference policy, and what is saved of them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny
from tiny_tokenizers import base_chatml

from nanodpo.data.example import Example
from nanodpo.errors import RunStopped, UserError
from nanodpo.folder import checkpoint
from nanodpo.folder import record as run_record
from nanodpo.model import loading
from nanodpo.model.adapters import open_base
from nanodpo.model.source import check_ids, open_source
from nanodpo.run import lifecycle


def args(**changes):
    flags = {"bf16": False, "load_in_4bit": False, "load_in_8bit": False, "trust_remote_code": False, "seed": 0,
             "random_init": False, "use_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
             "lora_target_modules": "all-linear", "allow_dropout": False}
    return SimpleNamespace(**flags | changes)


def load(tiny, **changes):
    return loading.load_model(open_source(str(tiny / "model"), False), args(**changes))


def test_the_papers_lora_is_expressible(tiny):
    """r 256, alpha 512 and dropout .05 on all seven projections, counted by hand: r (in + out) each, two layers."""
    seven = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    model = load(tiny, lora_r=256, lora_alpha=512, lora_dropout=0.05, lora_target_modules=seven, allow_dropout=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Hidden 32, key and value 16, inner 64.
    assert trained == 2 * 256 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 2 * (32 + 64) + (64 + 32))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (256, 512, 0.05)
    assert "LoRA on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in loading.describe(model)


@pytest.mark.parametrize("names, words", [
    ("q_proj,w_proj", "no module w_proj; its linear layers are down_proj"), ("lm_head", "output layer"),
    ("embed_tokens", "only LoRA on linear layers")])
def test_modules_that_cannot_be_adapted(tiny, names, words, recwarn):
    """The reason is one line: PEFT's own warnings about a tied layer are not printed beside it."""
    with pytest.raises(UserError, match=words):
        load(tiny, lora_target_modules=names)
    assert [str(warning.message) for warning in recwarn if warning.category is UserWarning] == []


def test_dropout_is_off_unless_allowed(tiny):
    """Modules, and the rates that attention layers hold."""
    for allowed in (False, True):
        model = load(tiny, lora_dropout=0.5, allow_dropout=allowed).train()
        rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
        assert (0.5 in rates) == allowed
        assert ("\n  dropout in training passes, with rates 0.5" in loading.describe(model)) == allowed
        ids = torch.tensor([[1, 2, 3]])
        for name, p in model.named_parameters():  # a LoRA that does something
            if "lora_B" in name:
                p.data.fill_(0.5)
        same = torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        assert same != allowed


def test_the_reference_is_left_as_it_was_found(tiny):
    """Adapters on again and the mode restored, also where the pass raised."""
    model = load(tiny).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.fill_(0.1)
    ids = torch.tensor([[5, 6, 7]])
    on = model(input_ids=ids).logits
    base = make_model().eval()
    with loading.reference_policy(model, adapter_off=True):
        assert not model.training
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    with pytest.raises(KeyError), loading.reference_policy(model, adapter_off=True):
        raise KeyError
    assert model.training and torch.equal(model(input_ids=ids).logits, on) and not torch.equal(on, base(ids).logits)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_the_fingerprint_sees_every_weight_and_setting(tiny):
    """One changed number, or another rope, is another reference; another fresh LoRA is the same one."""
    model = load(tiny)
    first = loading.weights_hash(model, fresh_lora=True)
    assert loading.weights_hash(load(tiny, seed=7, lora_r=2), fresh_lora=True) == first
    weight = model.get_input_embeddings().weight
    weight.data[200, 3] += 1e-3
    assert loading.weights_hash(model, fresh_lora=True) != first
    weight.data[200, 3] = make_model().get_input_embeddings().weight.data[200, 3]
    assert loading.weights_hash(model, fresh_lora=True) == first
    model.get_base_model().config.rope_parameters["rope_theta"] = 5e5
    assert loading.weights_hash(model, fresh_lora=True) != first


def test_a_checkpoint_is_verified_before_it_counts(tmp_path):
    """A checkpoint is read back and compared with memory; a difference, a NaN or a hole leaves no folder behind."""
    model, tokenizer = make_model(), make_tokenizer()
    state = checkpoint.gather(model, only_trained=False)
    checkpoint.save(model, tokenizer, state, tmp_path / "checkpoint-1", {"step": 1})
    assert oct((tmp_path / "checkpoint-1" / "model.safetensors").stat().st_mode & 0o777) != "0o600"
    broken = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for spoil in (lambda t: t.fill_(torch.nan), lambda t: t.add_(1.0)):
        wrong = {key: spoil(value.clone()) if key == name else value for key, value in broken.items()}
        save_file(wrong, tmp_path / "checkpoint-1" / "model.safetensors")
        with pytest.raises(RunStopped, match=name):
            checkpoint.verify(tmp_path / "checkpoint-1", state)
    save_file({key: value for key, value in broken.items() if key != name}, tmp_path / "checkpoint-1/model.safetensors")
    with pytest.raises(RunStopped, match=f"{name} was not written"):
        checkpoint.verify(tmp_path / "checkpoint-1", state)
    state[name].fill_(torch.nan)
    with pytest.raises(RunStopped, match="not finite"):
        checkpoint.save(model, tokenizer, state, tmp_path / "checkpoint-2", {"step": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_adapter_that_learned_nothing_is_refused():
    """One B that is not zero is enough; a fresh adapter has none, a whole model has no B at all."""
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    checkpoint.check_trained({"a.lora_A.default.weight": one, "a.lora_B.default.weight": zero,
                              "b.lora_B.default.weight": one})
    checkpoint.check_trained({"a.weight": zero})
    with pytest.raises(RunStopped, match="every lora_B is zero"):
        checkpoint.check_trained({"a.lora_A.default.weight": one, "a.lora_B.default.weight": zero})


def test_modules_are_written_in_order(tiny, tmp_path):
    """PEFT has them in a set, whose order is another one in each process; checkpoints are the same to the last byte."""
    model = load(tiny)
    checkpoint.save(model, make_tokenizer(), checkpoint.gather(model, True), tmp_path / "checkpoint-1", {"step": 1})
    names = json.loads((tmp_path / "checkpoint-1" / "adapter_config.json").read_text())["target_modules"]
    assert len(names) == 14 and names == sorted(names)


def test_merging_adds_the_adapter_in_the_dtype_asked_for(tiny, tmp_path):
    """W + (alpha / r) B A, with the tokenizer of the adapter, whose chat template may be another than the base's."""
    model, tokenizer = load(tiny), make_tokenizer()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.fill_(0.25)
    name, tokenizer.chat_template = "model.layers.1.self_attn.q_proj", "another"
    layer = model.get_base_model().get_submodule(name)
    truth = layer.base_layer.weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    checkpoint.save(model, tokenizer, checkpoint.gather(model, True), tmp_path / "checkpoint-1", {"step": 1})
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        checkpoint.merge(tmp_path / "checkpoint-1", tmp_path / "merged", dtype, False)
        merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
        assert merged.dtype == dtype and torch.allclose(merged.float(), truth, atol=tolerance)
    assert not torch.allclose(layer.base_layer.weight, truth, atol=0.05)
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "another"


def test_a_base_that_has_changed_is_not_merged_into(tiny, tmp_path):
    """Of a finished run: other weights, or another config, under the same name are refused and nothing is written; with
    what it was trained on put back it is merged. In bfloat16 too, as run.json has the hashes."""
    base = tmp_path / "base"
    for bf16 in (False, True):
        run = tmp_path / f"run-{bf16}"
        run.mkdir()
        shutil.copytree(tiny / "model", base, dirs_exist_ok=True)
        model = loading.load_model(open_source(str(base), False), args(bf16=bf16))
        record = {"arguments": {"loss": "dpo", "train_file_path": "pairs.jsonl", "eval_file_path": None,
                                "logging_steps": 1, "eval_steps": 0, "save_steps": 0}, "world_size": 1, "steps": 1,
                  "finished": True, "device": "cpu",
                  "data_report": [], "versions": run_record.versions(),
                  "weights": loading.weights_hash(model, fresh_lora=True)}
        (run / "run.json").write_text(json.dumps(record))
        (run / "metrics.jsonl").touch()
        checkpoint.save(model, make_tokenizer(), checkpoint.gather(model, True), run / "checkpoint-1", {"step": 1})
        make_model(seed=1).save_pretrained(base)
        with pytest.raises(UserError, match="base: holds other weights than those that .* was trained on; put back"):
            lifecycle.merge(run, 1, bf16, False)
        shutil.copy(tiny / "model" / "model.safetensors", base)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
        with pytest.raises(UserError, match="base: its config.json is not the one that"):
            lifecycle.merge(run, 1, bf16, False)
        assert sorted(place.name for place in run.iterdir()) == ["checkpoint-1", "metrics.jsonl", "run.json"]
        shutil.copy(tiny / "model" / "config.json", base)
        lifecycle.merge(run, 1, bf16, False)
        assert (run / "merged" / "model.safetensors").is_file()


def test_an_adapter_that_is_damaged_is_not_merged(tiny, tmp_path):
    model = load(tiny)
    checkpoint.save(model, make_tokenizer(), checkpoint.gather(model, True), tmp_path / "checkpoint-1", {"step": 1})
    (tmp_path / "checkpoint-1" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="checkpoint-1: adapter_config.json has 2 bytes of "):
        lifecycle.merge(tmp_path, 1, False, False)
    assert not (tmp_path / "merged").exists()


def test_a_merged_weight_is_rounded_once(tiny, tmp_path):
    """In bfloat16 W + (alpha / r) B A is computed in float32, and the sum alone is rounded."""
    model = loading.load_model(open_source(str(tiny / "model"), False), args(bf16=True))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    checkpoint.save(model, make_tokenizer(), checkpoint.gather(model, True), tmp_path / "checkpoint-1", {"step": 1})
    checkpoint.merge(tmp_path / "checkpoint-1", tmp_path / "merged", torch.bfloat16, False)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            a, b = (side["default"].weight.float() for side in (layer.lora_A, layer.lora_B))
            truth = (layer.base_layer.weight.float() + (b @ a) * 2).bfloat16()
            assert torch.equal(merged[f"{name}.weight"], truth), name


def test_buffers_are_saved_as_the_model_means_it(tmp_path):
    """One that belongs to the model's state, and one that is made anew when it is opened."""
    model = make_model()
    model.model.register_buffer("kept", torch.tensor([1.0, 2.0]))
    model.model.register_buffer("made", torch.tensor([3.0]), persistent=False)
    checkpoint.save(model, make_tokenizer(), checkpoint.gather(model, False), tmp_path / "checkpoint-1", {"step": 1})
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert saved["model.kept"].tolist() == [1.0, 2.0] and "model.made" not in saved


def test_sampling_settings_do_not_lose_a_model(tmp_path):
    """A generation config that transformers refuses to save is mended, not the end of the run."""
    model = make_model()
    model.generation_config.temperature = 0.5  # without do_sample
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path / "plain")
    checkpoint.save(model, make_tokenizer(), checkpoint.gather(model, False), tmp_path / "checkpoint-1", {"step": 1})
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


@pytest.mark.parametrize("wrong", [{"early_stopping": True, "length_penalty": 2.0}, {"pad_token_id": -1},
                                   {"max_new_tokens": 0}, {"temperature": 0.5, "cache_implementation": "no such"}])
def test_generation_settings_beyond_mending_are_left_out(wrong, tmp_path, capsys):
    """Said, and the weights are saved."""
    model = make_model()
    vars(model.generation_config).update(wrong)
    checkpoint.save(model, make_tokenizer(), checkpoint.gather(model, False), tmp_path / "checkpoint-1", {"step": 1})
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
    assert "the model's generation config is left out, since transformers refuses it: " in capsys.readouterr().out


def test_adapters_that_can_not_be_used_say_why_and_what_to_do(tiny, tmp_path):
    """A base that has moved, a vocabulary that was grown, embeddings among the layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def adapter(name, *layers):
        base = AutoModelForCausalLM.from_pretrained(tiny / "untied")
        get_peft_model(base, LoraConfig(r=2, target_modules=list(layers))).save_pretrained(tmp_path / name)
        return tmp_path / name

    moved, grown = adapter("moved", "q_proj"), adapter("grown", "q_proj")
    embeds = adapter("embeds", "q_proj", "embed_tokens")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/content/base"}))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(9)])  # 268 entries, and the base has 264
    tokenizer.save_pretrained(grown)
    for folder, words in ((moved, f"If the base has moved, write its place into {moved / 'adapter_config.json'}"),
                          (grown, "an adapter of a model whose vocabulary was grown must be merged where"),
                          (embeds, "target_modules or modules_to_save name embeddings or a head"), (embeds, "merge")):
        with pytest.raises(UserError) as caught:
            source = open_source(str(folder), False)
            check_ids(source, "d", [Example(0, [65], [max(source.tokenizer.get_vocab().values())], None)])
            loading.load_model(source, args())
        assert words in str(caught.value)


@pytest.mark.parametrize("known, written", [
    (258, [258, 260]), ([258, 7], [258, 7, 260]), (None, [258, 260]), (260, 260)])
def test_what_ends_a_turn_ends_generation(known, written, tmp_path):
    """A base model with ChatML: its eos is 258, and it is trained to stop with 260. Its generation config gets both."""
    model = make_model()
    model.generation_config.eos_token_id = known
    checkpoint.save(model, base_chatml(), checkpoint.gather(model, False), tmp_path / "checkpoint-1", {"step": 1})
    config = json.loads((tmp_path / "checkpoint-1" / "generation_config.json").read_text())
    assert config["eos_token_id"] == written


def test_an_adapter_can_not_say_what_ends_a_turn_so_the_run_does(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert "turns end with <|im_end|>" in checkpoint.say_ends(model, base_chatml())
    assert "eos_token_id=[258, 260]" in checkpoint.say_ends(model, base_chatml())
    assert checkpoint.say_ends(model, make_tokenizer()) == checkpoint.say_ends(make_model(), base_chatml()) == ""
    checkpoint.save(model, base_chatml(), checkpoint.gather(model, True), tmp_path / "checkpoint-1", {"step": 1})
    assert not (tmp_path / "checkpoint-1" / "generation_config.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_saved_as_it_is_published(family, tmp_path):
    """Transformers saves some families under other names than they have in memory (gpt_neox, experts); what it
    opens again is the model, to the last bit."""
    from transformers import AutoModelForCausalLM

    model = tiny(family, torch.float32)
    checkpoint.save(model, make_tokenizer(), checkpoint.gather(model, False), tmp_path / "checkpoint-1", {"step": 1})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1", dtype=torch.float32).state_dict()
    assert [name for name, tensor in model.state_dict().items() if not again[name].equal(tensor)] == []
    open_base(str(tmp_path / "checkpoint-1"), torch.float32, False)  # no weight is one too many


def test_tables_of_old_files_are_no_weights(tmp_path):
    """Causal masks and rotations that old releases saved with the weights; one bias more is a weight, and refused."""
    model = make_model()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        state |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4),
                  f"model.layers.{layer}.attn.bias": torch.ones(1, 1, 8, 8).tril(),
                  f"model.layers.{layer}.attention.masked_bias": torch.tensor(-1e9)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    again = open_base(str(tmp_path), torch.float32, False).state_dict()
    assert all(again[name].equal(tensor) for name, tensor in model.state_dict().items())
    save_file(state | {"model.layers.0.mlp.up_proj.bias": torch.ones(64)}, tmp_path / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(UserError, match="has 1 weights .* no place for, such as model.layers.0.mlp.up_proj.bias"):
        open_base(str(tmp_path), torch.float32, False)


def test_a_run_takes_no_folder_that_holds_anything(tmp_path):
    """New, empty, or left by a process that was killed in its first moment; another program's file is not ours."""
    for name in (".run.json.partial", "notes.txt"):
        run_record.claim(tmp_path / "run")
        (tmp_path / "run").mkdir(exist_ok=True)
        run_record.claim(tmp_path / "run")
        (tmp_path / "run" / name).touch()
    with pytest.raises(UserError, match="run: is in use; name a new folder"):
        run_record.claim(tmp_path / "run")


def test_rotation_keeps_the_start_and_what_is_not_its_own(tmp_path):
    """Names that a run does not write: words, zeros in front, other digits, a copy, a space at the end."""
    others = ["checkpoint-007", "checkpoint-2 (copy)", "checkpoint-2 ", "checkpoint--3", "checkpoint-1.0",
              "checkpoint-best", "checkpoint-\u0661\u0662", "merged"]
    for name in ("checkpoint-0", "checkpoint-2", "checkpoint-10", "checkpoint-20", *others):
        (tmp_path / name).mkdir()
    checkpoint.rotate(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 12
    checkpoint.rotate(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["checkpoint-0", "checkpoint-10", "checkpoint-20", *others])


def test_rotation_takes_a_link_and_leaves_what_it_points_to(tmp_path, capsys):
    """Checkpoints that were moved to another disk, one of which is gone there; and a file in a checkpoint's place."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    (disk / "old").mkdir(parents=True)
    (disk / "old" / "weights").write_text("precious")
    (run / "checkpoint-9").mkdir(parents=True)
    (run / "checkpoint-2").symlink_to(disk / "old")
    (run / "checkpoint-4").symlink_to(disk / "gone")
    (run / "checkpoint-6").write_text("")
    checkpoint.rotate(run, 1)
    assert [place.name for place in run.iterdir()] == ["checkpoint-9"]
    assert (disk / "old" / "weights").read_text() == "precious"
    said = capsys.readouterr().out
    assert f"checkpoint-2: is a link; it is removed, and {disk / 'old'} stays" in said


def test_a_checkpoint_takes_the_place_of_a_link(tmp_path):
    """One that is damaged where it was moved to is made again here, and that place is left alone."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "disk")
    model = make_model()
    checkpoint.save(model, make_tokenizer(), checkpoint.gather(model, False), tmp_path / "checkpoint-1", {"step": 1})
    assert not (tmp_path / "checkpoint-1").is_symlink() and (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
    assert list((tmp_path / "disk").iterdir()) == []


def test_weights_that_ranks_share_are_counted_whole(tiny):
    """Under ZeRO-3 a weight on a rank is empty, and `ds_shape` is its true shape."""
    model = load(tiny, use_lora=False)
    said = loading.describe(model)
    for weight in model.parameters():
        weight.ds_shape, weight.data = weight.shape, weight.new_empty(0)
    assert loading.describe(model) == said and " of them trained (100.00%)" in said
