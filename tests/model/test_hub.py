"""Models and adapters by their ids on the hub: the hub's cache is made by hand, as its own library lays it out, and
nothing is fetched but from a server of this machine that stands in for the hub."""

import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import threading
import time

import datasets
import huggingface_hub
import oracle
import pandas
import pytest
import torch
import transformers
from conftest import ROOT, launch, make_model, make_tokenizer
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from nanodpo.data.rows import read_rows
from nanodpo.data.urls import look_for_hub
from nanodpo.errors import UserError
from nanodpo.folder.card import license_of, model_card
from nanodpo.model.adapters import open_base
from nanodpo.model.hub import place_of
from nanodpo.model.source import absolute, base_of, name_and_revision, open_source
from nanodpo.scoring.contents import Contents

STEP = ("--max_steps", "2", "--learning_rate", "1e-2", "--draw", "false")


def cached(home, repository: str, revisions: dict, **licenses: str):
    """A folder of the cache: blobs, a snapshot of links to them for each {revision: (commit, folder)}, and refs; with a
    model card where a revision has a license."""
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
        if revision in licenses:
            (snapshot / "README.md").write_text(f"---\nlicense: {licenses[revision]}\n---\n# A model\n")


@pytest.fixture(scope="module")
def hub(tiny, tmp_path_factory):
    """A cache with a base of two revisions, and two adapters on it: the second names the base's older revision."""
    from peft import LoraConfig, get_peft_model

    home = tmp_path_factory.mktemp("home")
    old = home / "old"
    make_model(seed=7).save_pretrained(old)
    make_tokenizer().save_pretrained(old)
    cached(home, "org/base", {"main": ("a" * 40, tiny / "model"), "v1": ("b" * 40, old)}, main="mit", v1="llama3.2")
    cached(home, "org/bare", {"main": ("e" * 40, tiny / "model")})
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
    # As an adapter_config.json names them: by the commit, since a hub id alone may be another model tomorrow.
    for name, commit in (("org/base", "a" * 40), ("org/base@v1", "v1"), ("no/such", None), ("not a name", None)):
        assert name_and_revision(name) == (name.partition("@")[0], commit)
    assert absolute("org/base") == "org/base@" + "a" * 40
    keys = {Contents(name).key for name in ("org/base", "org/base@v1", "org/adapter", "org/adapter@two")}
    assert len(keys) == 4
    with pytest.raises(UserError, match="^model org/base@v9: can't be fetched from the hub: "):
        place_of("org/base@v9")


@pytest.mark.parametrize("there, fetched", [
    ({"model-00001-of-2.safetensors", "model-00002-of-2.safetensors", "pytorch_model-00001-of-2.bin", "tf_model.h5",
      "consolidated.safetensors", "original/consolidated.00.pth", "coreml/weight.bin", "onnx/model.safetensors"},
     {"model-00001-of-2.safetensors", "model-00002-of-2.safetensors"}),
    ({"pytorch_model.bin", "tf_model.h5", "training_args.bin"}, {"pytorch_model.bin"}),
    ({"adapter_model.safetensors", "adapter_model.bin", "optimizer.bin"}, {"adapter_model.safetensors"}),
    ({"adapter_model.bin"}, {"adapter_model.bin"})])
def test_weights_are_fetched_once(tmp_path, monkeypatch, there, fetched):
    """Of a model that is there in several kinds of files, of 14 GB each, those that are read."""
    texts = {"config.json", "tokenizer.model", "qwen.tiktoken", "modeling.py", "additional_chat_templates/tool.jinja"}

    def snapshot_download(repository, revision, **patterns):
        assert (repository, revision) == ("org/many", "v1")
        for name in filter_repo_objects(sorted(there | texts), **patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    place_of.cache_clear()
    assert place_of("org/many@v1") == str(tmp_path)
    place_of.cache_clear()
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()} == fetched | texts


def test_a_card_names_the_base_without_its_revision(offline):
    facts = {"arguments": {"loss": "dpo", "train_file_path": "d", "eval_file_path": None}, "data_report": [],
             "steps": 1, "world_size": 1, "device": "cpu", "versions": {}}
    assert '\nbase_model: "org/base"\n' in model_card(facts, 1, [], "org/base@v1")


def test_the_license_is_that_of_the_revision_in_the_cache(offline):
    """Its model card is there; without one, and where the hub may not be asked, nothing is said."""
    assert license_of("org/base") == "mit" and license_of("org/base@v1") == "llama3.2"
    assert license_of("org/base@" + "b" * 40) == "llama3.2"
    for unknown in ("org/bare", "org/base@v9", "no/such", "gpt2", "not a name", "/no/such/folder"):
        assert license_of(unknown) is None


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub says of its models. `asked` are the paths of all requests."""

    answers = {"/api/models/org/bare": (200, {"id": "org/bare", "cardData": {"license": "apache-2.0"}}),
               "/api/models/org/bare/revision/v2": (200, {"id": "org/bare", "cardData": {"license": "other"}}),
               "/api/models/gpt2": (200, {"id": "openai-community/gpt2", "cardData": {"license": "mit"}}),
               "/api/models/no/card": (200, {"id": "no/card"}), "/api/models/no/json": (200, None),
               "/api/models/org/gated": (403, {"error": "no"}), "/api/models/org/broken": (500, {"error": "no"})}
    asked = []
    busy = []  # of the next requests for a file's head: the codes by which a server says so

    def do_HEAD(self):
        self.asked.append(self.path)
        self.send_response(self.busy.pop() if self.busy else 401)
        self.end_headers()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked += [path] * (path != "/api/agent-harnesses")  # the library's own question, once a process
        code, said = self.answers.get(path, (404, {}))
        body = json.dumps(said).encode() if said is not None else b"<html>Please log in</html>"
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def online(offline, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        Hub.asked.clear()
        yield server
        server.shutdown()


def test_the_hub_is_asked_for_a_license_that_the_cache_does_not_have(online, monkeypatch):
    """Once, and not where it is known. A hub that has none, or errors, or is another server, is no trouble."""
    assert license_of("org/base") == "mit" and not Hub.asked
    assert license_of("org/bare") == "apache-2.0" and Hub.asked == ["/api/models/org/bare"]
    assert license_of("org/bare@v2") == "other" and license_of("gpt2") == "mit"
    for unknown in ("no/card", "no/json", "no/such", "org/gated", "org/broken"):
        Hub.asked.clear()
        assert license_of(unknown) is None and len(Hub.asked) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    Hub.asked.clear()
    assert license_of("org/bare") is None and not Hub.asked


def test_a_hub_that_does_not_answer_costs_a_few_seconds(online, monkeypatch):
    """It takes the call, and says nothing; or there is none."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert license_of("org/bare") is None and time.monotonic() - start < 6
    assert license_of("org/bare") is None  # the connection is refused


def test_a_hub_that_is_not_there_is_looked_for_once(online, hub, monkeypatch, capsys):
    """Its library would ask six times for each of ten files, half a minute each; what is cached needs none of it. A hub
    that answers, with whatever, is asked as always."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    answered = constants.ENDPOINT
    look_for_hub("org/base")
    assert not constants.HF_HUB_OFFLINE and capsys.readouterr().out == ""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    start = time.monotonic()
    source = open_source("org/base", False)
    assert source.config.vocab_size == open_source(str(hub / "old"), False).config.vocab_size
    said = capsys.readouterr().out
    assert said.startswith("the Hugging Face hub can't be reached (") and said.count("\n") == 1
    with pytest.raises(UserError, match="^model org/none: config.json can't be opened: there is no folder org/none, "):
        open_source("org/none", False)
    with pytest.raises(UserError, match="^org/data: can't be read as a data set: "):
        list(read_rows("org/data"))
    assert time.monotonic() - start < 10 and capsys.readouterr().out == ""
    monkeypatch.setattr(constants, "ENDPOINT", answered)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_of_the_cache_is_named(offline, monkeypatch, number):
    """The home directory's, mostly, of whose quota nobody thinks."""
    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    for owner, name in ((huggingface_hub, "snapshot_download"), (datasets, "load_dataset"),
                        (transformers.AutoModelForCausalLM, "from_pretrained")):
        monkeypatch.setattr(owner, name, full)
    for fetch in (lambda: place_of("org/base@v1"), lambda: open_base("org/base", torch.float32, False),
                  lambda: list(read_rows("org/data"))):
        with pytest.raises(UserError, match=rf"{os.strerror(number)}; the hub's cache is in {constants.HF_HOME}: "):
            fetch()


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_hub_is_asked_three_times_and_not_for_every_file(online, monkeypatch, capsys, code):
    """Of each file its library would ask six times, too. It is asked for a file of the model: the limits of the hub are
    others for its pages."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    Hub.busy[:] = [code] * 2
    look_for_hub("org/base")  # the third answer serves
    assert not constants.HF_HUB_OFFLINE and slept == [1, 2] and capsys.readouterr().out == ""
    Hub.busy[:] = [code] * 100
    Hub.asked.clear()
    place_of.cache_clear()
    open_source("org/base", False)
    assert Hub.asked == ["/org/base/resolve/main/README.md"] * 3 and sum(slept) == 6
    assert re.match(rf"the Hugging Face hub can't be reached \(.*\b{code}\b", capsys.readouterr().out)
    Hub.busy.clear()


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "ftp://127.0.0.1:1", "http://[::1", "http://127.0.0.1:1"])
def test_a_proxy_that_does_not_serve_is_named_as_the_reason(online, monkeypatch, capsys, proxy):
    """One whose package is not installed, of an unknown kind, misspelt, and one that is not there."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    huggingface_hub.utils.close_session()  # the next one reads the environment
    assert license_of("org/bare") is None
    look_for_hub("org/base")
    huggingface_hub.utils.close_session()
    assert constants.HF_HUB_OFFLINE and "hub can't be reached (" in capsys.readouterr().out and not Hub.asked


@torch.no_grad()
def mean_logp(pairs: list, *places) -> float:
    """The mean log-prob of the chosen responses, nats, by plain PEFT."""
    model = oracle.load(*places).eval()
    return sum(oracle.sequence_logp(model, *pair[:2]).item() for pair in pairs) / len(pairs)


@pytest.mark.slow
def test_runs_and_scores_of_what_the_hub_has(hub, tiny, tmp_path, monkeypatch):
    """Trained on, as a reference and scored: the log-probs are those of plain PEFT on the base of the right revision. A
    fresh adapter on an old revision says so in the words of PEFT, and is opened on it; one on the newest is opened on
    that also when the hub has a newer one. In new processes, which read HF_HOME when they start."""
    monkeypatch.setenv("HF_HOME", str(hub))
    pairs = oracle.read_pairs(tiny / "train.jsonl")
    data = ("--train_file_path", tiny / "train.jsonl", "--eval_file_path", tiny / "train.jsonl", "--cache_dir",
            tmp_path / "cache")
    truth = {name: mean_logp(pairs, *places)
             for name, places in {"two": (hub / "two", hub / "old"), "one": (hub / "one", tiny / "model"),
                                  "v1": (hub / "old",)}.items()}
    assert len({round(value, 3) for value in truth.values()}) == 3
    runs = [("on", "org/adapter@two", ("--reference", "org/adapter"), "two", "one"),
            ("fresh", "org/base@v1", (), "v1", "v1")]
    cells = [("train", ["--model_name", model, "--output_dir", tmp_path / run, *data, *STEP, *more], False)
             for run, model, more, _, _ in runs]
    main = hub / "hub" / "models--org--base" / "refs" / "main"
    cells += [("train", ["--model_name", f"org/{name}", "--output_dir", tmp_path / run, *data, *STEP], False)
              for run, name in (("newest", "base"), ("further", "adapter"))]
    done = launch(ROOT / "tests" / "notebook.py", json.dumps(cells, default=str))
    assert done.stdout.count("cell: done\n") == 4, done.stdout
    main.write_text("b" * 40)  # the hub has other weights by now: those of v1
    cells = [("score", ["org/adapter@two", tmp_path / "fresh", tmp_path / "newest", "--dataset_path",
                        f"t={tiny / 'train.jsonl'}", "--responses", "chosen", "--output_dir", tmp_path / "scores"],
              False)]
    done = launch(ROOT / "tests" / "notebook.py", json.dumps(cells, default=str))
    assert done.stdout.count("cell: done\n") == 1, done.stdout
    main.write_text("a" * 40)
    for run, _, _, start, ref in runs:
        lines = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        assert lines[0]["eval_logps/chosen"] == pytest.approx(truth[start], rel=1e-6)
        assert lines[0]["eval_ref_logps/chosen"] == pytest.approx(truth[ref], rel=1e-6)
        own = json.loads((tmp_path / run / "checkpoint-2" / "adapter_config.json").read_text())
        assert (own["base_model_name_or_path"], own["revision"]) == ("org/base", "v1")
        assert '\nlicense: "llama3.2"\n' in (tmp_path / run / "checkpoint-2" / "README.md").read_text()
        moved = mean_logp(pairs, tmp_path / run / "checkpoint-2", hub / "old")
        assert lines[-1]["eval_logps/chosen"] == pytest.approx(moved, rel=1e-6)
    table = pandas.read_parquet(tmp_path / "scores" / "scores.parquet")
    means = table.groupby(["run", "step"])["logps"].mean()
    assert means["adapter@two", 0] == pytest.approx(truth["two"], rel=1e-6)
    assert means["fresh", 0] == pytest.approx(truth["v1"], rel=1e-6)
    assert means["fresh", 2] == pytest.approx(moved, rel=1e-6)
    newest, further = (json.loads((tmp_path / run / "checkpoint-2" / "adapter_config.json").read_text())["revision"]
                       for run in ("newest", "further"))
    record = json.loads((tmp_path / "newest" / "run.json").read_text())
    assert newest == further == "a" * 40 and record["base"] == "org/base@" + "a" * 40
    moved = mean_logp(pairs, tmp_path / "newest" / "checkpoint-2", tiny / "model")
    assert means["newest", 2] == pytest.approx(moved, rel=1e-6)


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_says_both(tmp_path, monkeypatch):
    """A misspelt name of a folder looks like a hub id, and the hub's own words say nothing of folders. A folder that is
    there is not looked for on the hub."""
    monkeypatch.chdir(tmp_path)
    for name in ("smolm2", "models/smolm2"):
        with pytest.raises(UserError, match=f"^model {name}: config.json can't be opened: there is no folder {name}, "
                                            "and on the hub: "):
            open_source(name, trust_remote_code=False)
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match="opened: models has no smolm2$"):
        open_source("models/smolm2", trust_remote_code=False)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(UserError) as caught:
        open_source("broken", trust_remote_code=False)
    assert "the hub" not in str(caught.value)
