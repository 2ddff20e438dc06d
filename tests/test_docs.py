"""The pages of docs/ are true: their code runs, and prints what they show."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from conftest import launch

from nanodpo.run.metrics import pair_metrics

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return BLOCK.findall((ROOT / "docs" / page).read_text())


def same_but_for_rounding(printed: str, shown: str) -> bool:
    """The same text, whose numbers may differ as much as another processor's rounding makes them."""
    number = r"-?\d+\.\d+"
    values = [[float(value) for value in re.findall(number, text)] for text in (printed, shown)]
    return (re.sub(number, "#", printed) == re.sub(number, "#", shown)
            and values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-3))


def test_one_step_prints_what_it_shows_and_is_what_training_does(tmp_path, monkeypatch):
    """The page's own update of one pair, and train.py's, give the same numbers."""
    monkeypatch.chdir(ROOT)
    names, page = {}, blocks("one_step.md")
    for (kind, code), (below, shown) in zip(page, page[1:]):
        if kind == "python":
            assert not below, "a block of Python without what it prints"
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "one_step.md", "exec"), names)
            assert same_but_for_rounding(out.getvalue(), shown), out.getvalue()
    ((_, command),) = [block for block in page if block[0] == "bash"]
    row = {"prompt": names["prompt"]} | names["texts"]
    (tmp_path / "pair.jsonl").write_text(json.dumps(row) + "\n")
    flags = command.replace("\\\n", " ").split()[2:]
    flags = [str(tmp_path / flag) if flag in ("pair.jsonl", "run") else flag for flag in flags]
    launch(ROOT / "train.py", *flags, "--cache_dir", tmp_path / "cache", "--draw", "false", launcher="fork")
    first, second = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] == pytest.approx(names["losses"].item(), abs=1e-6)
    assert first["grad_norm"] == pytest.approx(names["norm"], rel=1e-4)
    expected = pair_metrics(names["after"], names["ref"], names["tokens"], names["beta"])
    for name in expected.keys() - {"ref_gap"}:
        assert second[name] == pytest.approx(expected[name].item(), rel=1e-3, abs=1e-4), name
