"""A scoring for human eyes: the table on the screen, right answers, and answers side by side."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from nanodpo.scoring import means, side_by_side

KEY = {"run": "r", "phase": "dpo", "checkpoint": "c", "dataset": "d"}


def said(*rows) -> pandas.DataFrame:
    """answers.parquet of (row, step, right, text)."""
    return pandas.DataFrame([KEY | {"row": row, "problem": str(row), "step": step, "correct": right, "expected": "7",
                                    "found": "7" if right else None, "prompt_end": f"What is\n{row}?", "text": text}
                             for row, step, right, text in rows])


def test_answers_of_the_first_and_the_last_checkpoint_stand_side_by_side():
    """Of six rows all were right and none is; the step between is left out; what would act on a terminal is shown."""
    table = said(*((row, step, step < 9, f"so\n{step}\x1b[2J") for row in range(6) for step in (0, 5, 9)))
    text = side_by_side.to_file(table)
    assert text.startswith("answers of r on d: 6 of 6 right at step 0, 0 of 6 right at step 9\n\n")
    assert text.count("step 5") == 0 and text.count("expected 7") == 6
    assert ("row 4, expected 7\n  asked: What is 4?\n  step 0: RIGHT, answers 7: so 0\\x1b[2J\n"
            "  step 9: WRONG, no answer: so 9\\x1b[2J\n") in text


def test_rows_are_counted_that_were_answered_at_both_ends():
    """Four at the start and two of them at the end, as where a later call asked for fewer answers."""
    table = said(*((row, 0, True, "x") for row in range(4)), *((row, 9, row == 0, "y") for row in range(2)))
    text = side_by_side.to_file(table)
    assert text.startswith("answers of r on d: 2 of 2 right at step 0, 1 of 2 right at step 9\n")
    assert "row 1," in text and "row 3," not in text


def test_a_file_of_texts_is_utf_8_whatever_the_locale(tmp_path):
    """Answers in French and Chinese, written where the locale is ASCII, as on many clusters."""
    code = "import sys; from nanodpo.scoring.tables import write_text; from pathlib import Path; " \
           "write_text(Path(sys.argv[1]), '\\xe9 \\u4e2d')"
    env = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "answers.txt"], check=True, env=env,
                   cwd=Path(__file__).parents[2])
    assert (tmp_path / "answers.txt").read_bytes() == "\xe9 \u4e2d".encode()


def test_the_screen_shows_three_and_first_those_that_went_wrong():
    """Row 4 went wrong and row 2 became right, the others stay; of a long text the end is shown."""
    right = {0: (True, True), 1: (True, True), 2: (False, True), 4: (True, False)}
    table = said(*((row, step, ends[step], "x" * 500 + " end") for row, ends in right.items() for step in (0, 1)))
    same = table[table["row"] < 2].assign(run="another")
    other, head, *shown, last = side_by_side.to_screen(pandas.concat([same, table], ignore_index=True))
    assert other == "answers of another on d: 2 of 2 right at step 0, 2 of 2 right at step 1"  # nothing to see there
    assert last == "answers.txt has all of them"
    assert head == "answers of r on d: 3 of 4 right at step 0, 3 of 4 right at step 1"
    assert [text.partition(",")[0] for text in shown] == ["row 4", "row 2", "row 0"]
    assert all("... xxx" in text and text.endswith("x end") and len(text) < 700 for text in shown)
    assert side_by_side.to_screen(pandas.DataFrame()) == [] and side_by_side.to_file(pandas.DataFrame()) == ""


def test_right_answers_and_implausible_mass_are_in_the_summary_and_on_the_screen():
    """Two of three right at step 0, none at step 9, on every line; without answers there is no such column."""
    scores = pandas.DataFrame([KEY | {"step": step, "row": row, "problem": str(row), "response": side,
                                      "mean_logps": -1.0 - row, "implausible_mass": 0.001 + step / 1000,
                                      "implausible_mass_start": 0.001}
                               for step in (0, 9) for row in range(4) for side in ("chosen", "rejected")])
    answers = said(*((row, step, step == 0 and row > 0, "x") for row in range(3) for step in (0, 9)))
    found = means.summary(scores, answers).set_index(["step", "response"])
    assert found.loc[[(0, "chosen"), (9, "gap")], ["right_answers", "answers"]].values.tolist() == [[2, 3], [0, 3]]
    assert found.loc[(9, "chosen"), "implausible_mass"] == pytest.approx(0.01)
    shown = means.show(means.summary(scores, answers))
    assert "2 of 3" in shown and "0 of 3" in shown and "0.001 -> 0.01" in shown and "-2.5000" in shown
    assert "over 4 rows of one run; gap: chosen - rejected)" in shown and "nan" not in shown.lower()
    alone = means.show(means.summary(scores[scores["response"] == "chosen"]))
    assert "over 4 rows of one run)" in alone and "gap" not in alone
    model = means.show(means.summary(scores[scores["step"] == 0].assign(phase="")))
    assert re.search(r"r +- +d .*-2.5000 +-2.5000 .* 0.001\n", model) and "0.001 ->" not in model
    bare = scores.assign(implausible_mass=float("nan"), implausible_mass_start=float("nan"))
    assert not [word for word in ("implausible", "right", "nan") if word in means.show(means.summary(bare)).lower()]
