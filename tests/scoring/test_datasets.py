"""Data sets as score.py reads them."""

import json
from types import SimpleNamespace

import pytest
import tiny_tokenizers

from nanodpo.scoring.datasets import Reader, Wanted, open_dataset
from nanodpo.scoring.recorded import BARE_MODEL, NOT_A_RUN

START, END = 259, 260  # of tiny_tokenizers.chatml


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


@pytest.mark.parametrize("train_on, said", [
    ("all", ["d: 1 of 2 rows have several answers; the run was trained on all of them (--train_on all), and the last "
             "one is scored, after all that is before it"]), ("last", [])])
def test_of_several_answers_the_last_is_scored_and_more_training_is_said(train_on, said, tmp_path, capsys):
    """Ids by hand: all of the conversation before it is its prompt, whatever the run was trained on."""
    rows = [[turn("user", "1"), turn("assistant", "one"), turn("user", "2"), turn("assistant", "two")],
            [turn("user", "3"), turn("assistant", "three")]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=300))
    source = SimpleNamespace(tokenizer=tiny_tokenizers.chatml(), context=100, config=config)
    settings = SimpleNamespace(**BARE_MODEL | NOT_A_RUN | {"loss": "sft", "train_on": train_on, "max_length": 100})
    reader = Reader(str(tmp_path / "rows.jsonl"), source, set())
    data = open_dataset("d", reader, settings, Wanted(["chosen"], 0, 0, None))
    head = [START, *b"user\n1", END, *b"\n", START, *b"assistant\none", END, *b"\n", START, *b"user\n2", END, *b"\n",
            START, *b"assistant\n"]
    (prompt, first), (_, second) = data.groups
    assert (prompt, first["chosen"], second["chosen"]) == (head, [*b"two", END], [*b"three", END])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("d: ")] == said
