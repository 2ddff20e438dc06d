"""Under ZeRO-3 a model is shared by the ranks while it is read, and is the same model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import launch, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny

from nanodpo.errors import UserError
from nanodpo.folder import checkpoint
from nanodpo.model import loading
from nanodpo.model.adapters import open_base
from nanodpo.model.sharding import is_sharded, shape_of, shared_weights, whole
from nanodpo.ranks import distributed

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}


@pytest.fixture(scope="module")
def one_rank():
    """A run of one rank, whose part is all of a weight."""
    with distributed.process_restored():
        distributed.join_ranks(0)
        yield


def both(folder, dtype=torch.float32) -> tuple:
    """The model of a folder, opened whole and shared."""
    return tuple(open_base(str(folder), dtype, False, None, shared) for shared in (None, SETTINGS))


def test_a_weight_of_one_rank_needs_no_deepspeed(monkeypatch):
    """score.py imported it to hash a model, which took a second and printed a warning about a GPU."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # an import raises ImportError
    with whole(weight := torch.ones(2)):
        assert weight.tolist() == [1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_as_without_zero(family, one_rank, tmp_path):
    """No weight is whole, all have their shapes, and gathered they are the same to the last bit; so is their hash,
    which run.json keeps and score.py verifies without ZeRO."""
    tiny(family).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        plain, shared = both(tmp_path, dtype)
        for (name, one), (other, two) in zip(plain.named_parameters(), shared.named_parameters(), strict=True):
            assert name == other and one.dtype == two.dtype and one.requires_grad == two.requires_grad
            assert is_sharded(two) and two.numel() == 0 and shape_of(two) == one.shape == shape_of(one)
        assert loading.base_hashes(shared) == loading.base_hashes(plain)
        assert loading.base_hashes(shared, as_read=True) != loading.base_hashes(plain)
        gathered = checkpoint.gather(shared, only_trained=False)
        assert all(gathered[name].equal(weight) for name, weight in plain.named_parameters())


@pytest.mark.parametrize("same", [True, False])
def test_tied_weights_that_are_there_twice(same, one_rank, tmp_path):
    """config.json ties them. Transformers ties what is equal, and leaves apart what is not: so does a shared model,
    though empty parts are all equal."""
    make_model(tied=True).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone() + (0 if same else 1)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for model in both(tmp_path):
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == same
    plain, shared = both(tmp_path)
    assert loading.base_hashes(shared) == loading.base_hashes(plain)


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "lacks 1 of the model's weights, such as model.layers.1"),
    (lambda w: w.update({"model.norm.weight": torch.zeros(7)}), r"model.norm.weight is \[7\] in the weights"),
    (lambda w: w.update(stranger=torch.zeros(7)), "has 1 weights that its config.json has no place for, such as stra")])
def test_wrong_files_are_the_same_errors(change, words, one_rank, tmp_path):
    """A weight too few, of another shape, too many."""
    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for shared in (None, SETTINGS):
        with pytest.raises(UserError, match=words):
            open_base(str(tmp_path), torch.float32, False, None, shared)


def test_who_shares():
    """Stage 3 alone."""
    assert shared_weights(SETTINGS) is SETTINGS
    for zero_optimization in ({}, {"stage": 2}):
        assert shared_weights({"zero_optimization": zero_optimization}) is None
    offloaded = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    assert shared_weights(offloaded) is offloaded


@pytest.mark.slow
def test_two_ranks_hold_half_each(tmp_path):
    """A model of 446 MiB, read and hashed: the peak of each of two ranks is below 0.6 of that of one alone, which holds
    all of it."""
    launch(ROOT / "bench" / "sharding.py", "--layers", "9", "--loading", "--json", tmp_path / "found.json",
           launcher="fork")
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    one, two = (found["model"][n]["peaks_mib"] for n in "12")
    assert one[0] > found["model_mib"] > 400
    assert max(two) < 0.6 * one[0], (one, two)
