"""Prepared data on disk: the same rows and words with it and without, made once, and never taken for other data's."""

import dataclasses
import datetime
import functools
import json
import multiprocessing
import os
import resource
import signal
import tempfile
from pathlib import Path

import datasets
import pytest
import tiny_tokenizers
import torch
from conftest import train, without_times
from safetensors.torch import load_file, save_file
from test_resume import BREAKS

from nanodpo.data import prepared
from nanodpo.data.prepared import Reading
from nanodpo.data.template import read_template
from nanodpo.data.tokens import load_dataset
from nanodpo.errors import RunStopped, UserError
from nanodpo.folder import data_cache

LIMIT = 60


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A few rows are as many as a large file's, and prepared by two forks."""
    monkeypatch.setattr(data_cache, "SMALL", 0)
    monkeypatch.setattr(prepared, "MANY", 0)
    monkeypatch.setattr(prepared, "AT_ONCE", 3)
    monkeypatch.setattr(prepared, "cores", lambda alone: 2)


def said(text, role="assistant"):
    return [{"role": role, "content": text}]


def pairs() -> list[dict]:
    """Rows of every fate: kept, equal sides, too long, empty, half a character, repeated; links between questions."""
    rows = [{"prompt": said(f"{i}?", "user"), "chosen": said("4" * (i % 5)), "rejected": said("five" * (i % 3)),
             "question": f"q{i}", "relevant-question": f"q{i // 3}", "input": "x" * (i == 3), "third": "or 6"}
            for i in range(20)]
    rows[7]["chosen"] = said("y" * 70)
    rows[8]["chosen"] = said("\ud800")
    return [*rows, rows[1]]


def conversations() -> list[dict]:
    """Of several answers, of which not all tokens are scored."""
    return [{"messages": [*said("2?", "user"), *said("4" * i), *said("3?", "user"), *said("9" * (i % 4))]}
            for i in range(13)]


def write(folder: Path, rows: list[dict]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def load(path, cache=None, tokenizer=None, pairs=True, more=(), **arguments):
    """All that a run learns of a data set, or the error that stops it."""
    template = read_template(tokenizer or tiny_tokenizers.chatml())
    keep = cache and functools.partial(data_cache.keep, str(cache))
    try:
        data = load_dataset(path, template, tiny_tokenizers.DataArguments(**arguments), LIMIT, pairs, more, keep)
    except UserError as error:
        return str(error)
    scored = [getattr(example.chosen, "scored", None) for example in data.examples]
    return vars(data) | {"scored": scored, "problems": [e.problem for e in data.examples], "report": data.report()}


def entry(cache: Path) -> Path:
    """The only file in the folder, on its own: who has the one that was here in memory keeps it."""
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole)
    return file


@pytest.mark.parametrize("overlong", ["error", "drop", "truncate"])
@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
@pytest.mark.parametrize("kind", ["pairs", "sft", "more"])
def test_rows_and_words_are_the_same_with_and_without(kind, on_bad_row, overlong, tmp_path, monkeypatch):
    """Ids, places, problems, notes, reasons and their order: by one process at once, by two in parts, written, and read
    again."""
    how = {"on_bad_row": on_bad_row, "overlong": overlong, "more": ("third",) * (kind == "more")}
    if kind == "sft":
        how |= {"loss": "sft", "train_on": "all", "pairs": False}
    path = write(tmp_path, conversations() if kind == "sft" else pairs())
    made, read = (load(path, tmp_path / "cache", **how) for _ in range(2))
    assert entry(tmp_path / "cache").name.startswith("data-")
    forked = load(path, **how)
    monkeypatch.setattr(prepared, "cores", lambda alone: 1)
    monkeypatch.setattr(prepared, "AT_ONCE", 1000)
    truth = load(path, **how)
    assert made == read == forked == truth
    if on_bad_row == "error":
        assert "row 0: chosen is empty; row" in truth if kind != "sft" else "row 0: " in truth
    elif overlong == "drop" and kind == "pairs":
        assert [row["row"] for row in truth["dropped"]] == [0, 3, 5, 6, 7, 8, 9, 10, 12, 15, 18]


def test_rows_are_prepared_once_and_their_ids_lie_in_the_file(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, pairs())
    first = load(path, tmp_path / "cache", on_bad_row="drop", overlong="drop")
    monkeypatch.setattr(data_cache, "prepare", None)
    assert load(path, tmp_path / "cache", on_bad_row="drop", overlong="drop") == first
    file = entry(tmp_path / "cache")
    assert capsys.readouterr().out.splitlines() == [
        "data: 21 rows prepared, kept in", f"  {file}", "data: 21 rows prepared before, from the cache", f"  {file}"]
    found = data_cache.keep(str(tmp_path / "cache"), path, read_template(tiny_tokenizers.chatml()),
                            Reading.of(tiny_tokenizers.DataArguments(), True))
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(file.name)]
    assert mapped and found.examples()[0].compact()[0].ids.obj is found.ids.obj


def test_limits_are_applied_to_what_is_kept(tmp_path, monkeypatch):
    """Other limits, and another word on bad rows, take the same entry; ids by hand."""
    path = write(tmp_path, [{"prompt": "2?", "chosen": "four", "rejected": "x"}])
    load(path, tmp_path / "cache", tiny_tokenizers.plain())
    monkeypatch.setattr(data_cache, "prepare", None)
    template, keep = read_template(tiny_tokenizers.plain()), functools.partial(data_cache.keep, str(tmp_path / "cache"))
    args = tiny_tokenizers.DataArguments(overlong="truncate", on_bad_row="drop", max_prompt_length=2)
    (example,) = load_dataset(path, template, args, 4, True, (), keep).examples
    assert (example.prompt, example.chosen, example.rejected, example.cut) == ([*b"2?"], [*b"fo"], [*b"x", 258],
                                                                               (True, False))
    assert "over --max_length 4" in load_error(path, template, keep, 4)


def load_error(path, template, keep, limit) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset(path, template, tiny_tokenizers.DataArguments(), limit, True, (), keep)
    return str(caught.value)


def changed(**arguments):
    return lambda template, how: (template, how._replace(**arguments))


def other_template(**arguments):
    return lambda template, how: (dataclasses.replace(template, **arguments), how)


def other_tokenizer(change):
    def changes(template, how):
        tokenizer = tiny_tokenizers.chatml()
        change(tokenizer)
        return dataclasses.replace(template, tokenizer=tokenizer), how
    return changes


@pytest.mark.parametrize("change", [
    *(changed(**{name: "other"}) for name in Reading._fields), other_template(date="2026-01-01"),
    other_template(header="<h>"), other_template(options={"a": 1}),
    other_tokenizer(lambda t: setattr(t, "chat_template", t.chat_template + " ")),
    other_tokenizer(lambda t: t.add_tokens(["new"])),
    other_tokenizer(lambda t: setattr(t, "eos_token", "<|endoftext|>")),
    other_tokenizer(lambda t: setattr(t.backend_tokenizer, "normalizer", tiny_tokenizers.normalizers.Lowercase()))])
def test_whatever_the_ids_follow_from_has_an_entry_of_its_own(change, tmp_path):
    """Each setting of Reading, the date, header, options and text of the template, and each part of the tokenizer; the
    same again has the same."""
    files = data_cache.contents(write(tmp_path, pairs()))
    template, how = read_template(tiny_tokenizers.chatml()), Reading.of(tiny_tokenizers.DataArguments(), True)
    known = data_cache.fingerprint(files, template, how)
    assert known == data_cache.fingerprint(files, read_template(tiny_tokenizers.chatml()), how)
    assert known != data_cache.fingerprint(files, *change(template, how))


def test_other_contents_libraries_and_programs_have_entries_of_their_own(tmp_path, monkeypatch):
    """A file is known by what is in it: one byte of it, another split, the order of two; not by its folder."""
    template, how = read_template(tiny_tokenizers.chatml()), Reading.of(tiny_tokenizers.DataArguments(), True)

    def of(path):
        return data_cache.fingerprint(data_cache.contents(str(path)), template, how)

    path = write(tmp_path, pairs())
    (tmp_path / "twice").mkdir()
    copy = write(tmp_path / "twice", pairs())
    known = of(path)
    assert of(copy) == known
    (tmp_path / "second.jsonl").write_text(Path(path).read_text().replace("five", "Five"))
    second = tmp_path / "second.jsonl"
    found = [known, of(second), of(f"{path},{second}"), of(f"{second},{path}"), of(f"{path}::train")]
    version = data_cache.importlib.metadata.version
    monkeypatch.setattr(data_cache.importlib.metadata, "version", lambda name: version(name) + "1" * (name == "jinja2"))
    found.append(of(path))
    monkeypatch.undo()
    monkeypatch.setattr(data_cache, "file_facts", lambda file: {"sha256": "another"})
    found.append(of(path))
    assert len({*found}) == len(found)


@pytest.mark.parametrize("damage", sorted({*BREAKS} - {"a folder"}))
def test_a_damaged_entry_is_made_again(damage, tmp_path, capsys):
    path, how = write(tmp_path, pairs()), {"on_bad_row": "drop", "overlong": "drop"}
    truth = load(path, tmp_path / "cache", **how)
    file = entry(tmp_path / "cache")
    whole = file.read_bytes()
    BREAKS[damage](file)
    assert load(path, tmp_path / "cache", **how) == truth
    assert ("preparing the rows again" in capsys.readouterr().out) == (damage != "removed")
    assert entry(tmp_path / "cache").read_bytes() == whole


def test_a_copy_of_another_entry_is_not_taken_for_this_ones(tmp_path, capsys):
    """Whole, and of other rows."""
    (tmp_path / "other").mkdir()
    path, other = write(tmp_path, pairs()[:6]), write(tmp_path / "other", pairs()[3:6])
    how = {"on_bad_row": "drop", "overlong": "drop"}
    truth = load(path, tmp_path / "cache", **how)
    load(other, tmp_path / "other-cache", **how)
    file, copy = entry(tmp_path / "cache"), entry(tmp_path / "other-cache")
    whole = file.read_bytes()
    os.replace(copy, file)
    assert load(path, tmp_path / "cache", **how) == truth and entry(tmp_path / "cache").read_bytes() == whole
    assert f"{file} is damaged (not what was written)" in capsys.readouterr().out


def test_no_byte_that_flips_is_taken_for_data(tmp_path):
    """Of the header, the ids and the rest, every seventh byte: what is read is what was written, or nothing is."""
    path = write(tmp_path, pairs()[:6])
    template, how = read_template(tiny_tokenizers.chatml()), Reading.of(tiny_tokenizers.DataArguments(), True)
    truth = vars(data_cache.keep(str(tmp_path / "cache"), path, template, how)) | {"ids": None}
    file = entry(tmp_path / "cache")
    whole, refused = file.read_bytes(), 0
    ids = load_file(file)["ids"].tolist()
    for at in range(0, len(whole), 7):
        file.unlink()  # the old one is mapped
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        found = data_cache._load(file)
        refused += found is None
        assert found is None or (found.ids.tolist(), vars(found) | {"ids": None}) == (ids, truth)
    assert refused >= (len(whole) - 300) // 7


def test_an_entry_of_other_types_is_no_entry(tmp_path):
    """Somebody else's file under this name, with the same bytes."""
    path = write(tmp_path, pairs())
    load(path, tmp_path / "cache")
    file = entry(tmp_path / "cache")
    tensors = load_file(file)
    with data_cache.safe_open(file, "pt") as opened:
        about = opened.metadata()
    for other in ({"ids": tensors["ids"].view(torch.float32)}, {"ids": tensors["ids"].view(1, -1)}, {"rows": None}):
        save_file({name: tensor for name, tensor in (tensors | other).items() if tensor is not None}, file, about)
        assert data_cache._load(file) is None


def test_what_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    """Its name would be that of the content before."""
    path, prepare = write(tmp_path, pairs()), data_cache.prepare

    def slowly(path, *rest):
        found = prepare(path, *rest)
        write(tmp_path, pairs()[1:])
        return found

    monkeypatch.setattr(data_cache, "prepare", slowly)
    assert load(path, tmp_path / "cache", on_bad_row="drop", overlong="drop") == load(
        write(tmp_path, pairs()), on_bad_row="drop", overlong="drop")
    assert not [*(tmp_path / "cache").iterdir()]


def test_of_many_that_start_at_once_one_prepares(tmp_path, monkeypatch):
    """The others wait for it and read what it has made: ranks of a run, or runs."""
    path, prepare = write(tmp_path, pairs()), data_cache.prepare
    truth, counts = load(path, on_bad_row="drop", overlong="drop"), tmp_path / "counts"
    monkeypatch.setattr(prepared, "cores", lambda alone: 1)  # processes of a pool have no children

    def counted(*given):
        with counts.open("a") as file:
            file.write("x")
        return prepare(*given)

    monkeypatch.setattr(data_cache, "prepare", counted)
    global start  # forks find it by its name

    def start(i):
        return load(path, tmp_path / "cache", on_bad_row="drop", overlong="drop") == truth

    with multiprocessing.get_context("fork").Pool(6) as pool:
        assert pool.map(start, range(6), chunksize=1) == [True] * 6
    assert counts.read_text() == "x" and entry(tmp_path / "cache")


def test_who_was_killed_while_it_prepared_blocks_nobody(tmp_path):
    """Its lock is gone with it, and what it had written is cleared away; of an entry that nobody makes again, after a
    day."""
    path = write(tmp_path, pairs())
    load(path, tmp_path / "cache")
    file = entry(tmp_path / "cache")
    os.rename(file, data_cache.aside(file, 12345))
    data_cache.aside(file, "lock").touch()
    other = file.with_name(".data-other.safetensors.1.partial")
    other.touch()
    os.utime(other, (0, 0))
    load(path, tmp_path / "cache")
    assert entry(tmp_path / "cache") == file


def test_a_folder_that_takes_no_file_stops_no_run(tmp_path, capsys):
    """It is said, and the rows are as good."""
    path = write(tmp_path, pairs())
    (tmp_path / "cache").write_text("a file")
    assert load(path, tmp_path / "cache", on_bad_row="drop", overlong="drop") == load(path, on_bad_row="drop",
                                                                                    overlong="drop")
    assert "can't be written" in capsys.readouterr().out


def test_a_full_folder_for_temporary_files_is_named(tmp_path, monkeypatch):
    """There the tokenizer is saved, from whose files the name of an entry follows. Here a file can't be longer than 100
    bytes."""
    rows, limits = write(tmp_path, pairs()), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(RunStopped, match=f"^{tmp_path}/[^/]+: can't be written .*File too large"):
            load(rows, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_entry_that_can_not_be_read_is_named(tmp_path):
    path = write(tmp_path, pairs())
    load(path, tmp_path / "cache")
    file = entry(tmp_path / "cache")
    file.unlink()
    file.mkdir()
    assert load(path, tmp_path / "cache").startswith(f"--cache_dir: {file}: can't be read")
    file.rmdir()
    os.mkfifo(file)
    assert "is a pipe, not a file" in load(path, tmp_path / "cache")


@pytest.mark.parametrize("name", ["org/pairs", "org/pairs@main:default:train", "file://{}/rows.jsonl",
                                  "org/pairs,{}/rows.jsonl"])
def test_data_of_the_hub_and_of_urls_is_known_by_what_is_in_it(name, tmp_path, monkeypatch):
    """One character of it makes another entry, under the same name; under another name the same rows have the same.
    Days, bytes and columns that nobody reads are part of it."""
    rows = [row | {"day": datetime.datetime(2026, 1, 31), "raw": b"\xff"} for row in pairs()]
    rows.pop(8)  # half a character is none in Arrow
    calls, how = [], {"on_bad_row": "drop", "overlong": "drop"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **_: datasets.Dataset.from_list(rows))
    monkeypatch.setattr(data_cache, "prepare", lambda *args: calls.append(args) or prepared.prepare(*args))
    path = name.format(tmp_path)

    def written():
        write(tmp_path, [{key: str(value) if key in ("day", "raw") else value for key, value in row.items()}
                         for row in rows])

    written()
    truth = load(path, **how)
    assert truth["examples"] and load(path, tmp_path / "cache", **how) == truth and len(calls) == 1
    assert load(path, tmp_path / "cache", **how) == truth and len(calls) == 1
    entry(tmp_path / "cache")
    if path == "org/pairs":
        assert load("org/copy", tmp_path / "cache", **how)["examples"] == truth["examples"] and len(calls) == 1
    for k, (column, value) in enumerate((("rejected", said("another")), ("day", datetime.datetime(2026, 2, 1)),
                                         ("raw", b"\xfe")), 2):
        rows[2] = rows[2] | {column: value}
        written()
        assert load(path, tmp_path / "cache", **how) == load(path, **how) and len(calls) == k
    assert load(path, **how) != truth and len([*(tmp_path / "cache").iterdir()]) == 4


def test_rows_that_no_hash_can_be_made_of_have_no_entry(tmp_path, monkeypatch):
    """A picture is read anew each time: who knows what is in it?"""
    rows = [row | {"picture": object()} for row in pairs()]
    monkeypatch.setattr(data_cache, "read_places", lambda path, here=None: [rows])
    monkeypatch.setattr(prepared, "read_places", lambda path, here=None: [rows])
    assert load("org/pairs", tmp_path / "cache", on_bad_row="drop", overlong="drop") == load(
        "org/pairs", on_bad_row="drop", overlong="drop")
    assert not (tmp_path / "cache").exists()


def test_small_data_and_what_can_not_be_read_have_no_entry(tmp_path, monkeypatch):
    """What can't be read is refused as without a cache."""
    path = write(tmp_path, pairs())
    assert data_cache.contents("org/name") is None and data_cache.contents(str(tmp_path / "*.parquet")) is None
    for name in ("org/name/data.parquet", str(tmp_path / "none.jsonl"), f"file://{tmp_path}/none.jsonl"):
        assert load(name, tmp_path / "cache") == load(name)
    monkeypatch.setattr(data_cache, "SMALL", 2**20)
    for name in (path, f"file://{path}"):
        load(name, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_ranks_of_a_run_share_one_entry(tiny, tmp_path):
    """A column that nobody reads makes a large file. The steps are those without a cache, to the last bit, in a first
    run and in one that finds the entry."""
    def steps(name, *more):
        return without_times(train(tiny, tmp_path / name, "--max_steps", "2", *more, ranks=2))

    rows = [json.loads(line) | {"junk": "x" * 100_000} for line in (tiny / "train.jsonl").read_text().splitlines()]
    large = ("--train_file_path", write(tmp_path, rows))
    plain, made = steps("plain"), steps("made", *large)
    (file,) = (tmp_path / "cache").glob("data-*")
    written = file.stat().st_mtime_ns, file.stat().st_ino
    assert plain == made == steps("read", *large)
    assert written == (file.stat().st_mtime_ns, file.stat().st_ino)
    assert not [*(tmp_path / "cache").glob(".*")]


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path):
    """As where a folder has no locks, nobody is waited for: opened, a pipe waits for ever for its other end."""
    file = tmp_path / "entry"
    os.mkfifo(data_cache.aside(file, "lock"))
    with data_cache._alone(file) as others_wait:
        assert not others_wait
