"""Models and adapters by their ids on the hub: the hub's cache is made by hand, as its own library lays it out, and
nothing is fetched."""

import hashlib
import json
import shutil

import oracle
import pandas
import pytest
import torch
from conftest import ROOT, launch, make_model, make_tokenizer
from huggingface_hub import constants

from nanodpo.errors import UserError
from nanodpo.folder.card import model_card
from nanodpo.model.source import base_of, open_source, place_of
from nanodpo.scoring.contents import Contents

STEP = ("--max_steps", "2", "--learning_rate", "1e-2", "--draw", "false")


def cached(home, repository: str, revisions: dict):
    """A folder of the cache: blobs, a snapshot of links to them for each {revision: (commit, folder)}, and refs."""
    place = home / "hub" / f"models--{repository.replace('/', '--')}"
    for part in ("blobs", "refs"):
        (place / part).mkdir(parents=True)
    for revision, (commit, folder) in revisions.items():
        snapshot = place / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
        (place / "refs" / revision).write_text(commit)


@pytest.fixture(scope="module")
def hub(tiny, tmp_path_factory):
    """A cache with a base of two revisions, and two adapters on it: the second names the base's older revision."""
    from peft import LoraConfig, get_peft_model

    home = tmp_path_factory.mktemp("home")
    old = home / "old"
    make_model(seed=7).save_pretrained(old)
    make_tokenizer().save_pretrained(old)
    cached(home, "org/base", {"main": ("a" * 40, tiny / "model"), "v1": ("b" * 40, old)})
    for seed, (name, base, revision) in enumerate((("one", tiny / "model", None), ("two", old, "v1"))):
        torch.manual_seed(seed)
        settings = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(oracle.load(base), settings)
        own = model.peft_config["default"]
        own.base_model_name_or_path, own.revision = "org/base", revision
        model.save_pretrained(home / name)
    cached(home, "org/adapter", {"main": ("c" * 40, home / "one"), "two": ("d" * 40, home / "two")})
    return home


@pytest.fixture
def offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub / "hub"))
    place_of.cache_clear()
    yield hub / "hub"
    place_of.cache_clear()


def test_names_and_their_places(offline, tiny):
    """A hub id stays as it is; with a revision, or of an adapter, it is a folder in the cache."""
    adapters, bases = (offline / f"models--org--{name}" / "snapshots" for name in ("adapter", "base"))
    assert place_of("org/base") == "org/base" and place_of("org/base@v1") == str(bases / ("b" * 40))
    assert place_of("org/base@" + "a" * 40) == str(bases / ("a" * 40))
    assert base_of("org/base@v1") == ("org/base@v1", None)
    assert base_of("org/adapter") == ("org/base", str(adapters / ("c" * 40)))
    assert base_of("org/adapter@two") == ("org/base@v1", str(adapters / ("d" * 40)))
    assert place_of(str(tiny / "model")) == str(tiny / "model") and place_of("no/such") == "no/such"
    assert open_source("org/adapter@two", False).base == "org/base@v1"
    keys = {Contents(name).key for name in ("org/base", "org/base@v1", "org/adapter", "org/adapter@two")}
    assert len(keys) == 4
    with pytest.raises(UserError, match="^model org/base@v9: can't be fetched from the hub: "):
        place_of("org/base@v9")


def test_a_card_names_the_base_without_its_revision(offline):
    facts = {"arguments": {"loss": "dpo", "train_file_path": "d", "eval_file_path": None}, "data_report": [],
             "steps": 1, "world_size": 1, "device": "cpu", "versions": {}}
    assert '\nbase_model: "org/base"\n' in model_card(facts, 1, [], "org/base@v1")


@pytest.mark.slow
def test_runs_and_scores_of_what_the_hub_has(hub, tiny, tmp_path, monkeypatch):
    """Trained on, as a reference and scored: the log-probs are those of plain PEFT on the base of the right revision. A
    fresh adapter on an old revision says so in the words of PEFT, and is opened on it."""
    monkeypatch.setenv("HF_HOME", str(hub))
    pairs = oracle.read_pairs(tiny / "train.jsonl")
    data = ("--train_file_path", tiny / "train.jsonl", "--eval_file_path", tiny / "train.jsonl", "--cache_dir",
            tmp_path / "cache")
    with torch.no_grad():
        truth = {name: sum(oracle.sequence_logp(oracle.load(*places).eval(), *pair[:2]).item() for pair in pairs) / 11
                 for name, places in {"two": (hub / "two", hub / "old"), "one": (hub / "one", tiny / "model"),
                                      "v1": (hub / "old",)}.items()}
    assert len({round(value, 3) for value in truth.values()}) == 3
    for run, model, more, start, ref in (
            ("on", "org/adapter@two", ("--reference", "org/adapter"), "two", "one"),
            ("fresh", "org/base@v1", (), "v1", "v1")):
        launch(ROOT / "train.py", "--model_name", model, "--output_dir", tmp_path / run, *data, *STEP, *more)
        lines = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        assert lines[0]["eval_logps/chosen"] == pytest.approx(truth[start], rel=1e-6)
        assert lines[0]["eval_ref_logps/chosen"] == pytest.approx(truth[ref], rel=1e-6)
        own = json.loads((tmp_path / run / "checkpoint-2" / "adapter_config.json").read_text())
        assert (own["base_model_name_or_path"], own["revision"]) == ("org/base", "v1")
        with torch.no_grad():
            model = oracle.load(tmp_path / run / "checkpoint-2", hub / "old").eval()
            moved = sum(oracle.sequence_logp(model, *pair[:2]).item() for pair in pairs) / 11
        assert lines[-1]["eval_logps/chosen"] == pytest.approx(moved, rel=1e-6)
    launch(ROOT / "score.py", "org/adapter@two", tmp_path / "fresh", "--dataset_path",
           f"t={tiny / 'train.jsonl'}", "--responses", "chosen", "--output_dir", tmp_path / "scores")
    table = pandas.read_parquet(tmp_path / "scores" / "scores.parquet")
    means = table.groupby(["run", "step"])["logps"].mean()
    assert means["adapter@two", 0] == pytest.approx(truth["two"], rel=1e-6)
    assert means["fresh", 0] == pytest.approx(truth["v1"], rel=1e-6)
    assert means["fresh", 2] == pytest.approx(moved, rel=1e-6)
