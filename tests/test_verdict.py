"""Each rule of the verdict fires on the case made for it and on no other."""

import json

import pandas
import pytest

from nanodpo.scoring import verdict
from nanodpo.scoring.verdict import RULES, judge

KEY = {"run": "r", "phase": "dpo", "dataset": "d"}
# What a healthy run does from step 0 to step 9, a token: chosen up, rejected down, the rest as it was.
HEALTHY = {"chosen": 0.05, "rejected": -0.05, "other": 0.0, "argmax": 0.0, "mass": 1.0, "weight": 0.4, "correct": 1.0,
           "repetition": 0.0}
CASES = {"healthy": {}, "displacement": {"chosen": -0.05, "rejected": -0.2},
         "squeezing": {"chosen": -0.005, "rejected": -0.2, "other": -0.1, "argmax": 0.05},
         "spreading": {"mass": 4.0}, "narrowing": {"chosen": 0.02, "rejected": 0.06},
         "saturation": {"weight": 0.05}, "over-confidence": {"correct": 0.5},
         "collapse": {"repetition": 0.4}, "no change": {"chosen": 0.0, "rejected": 0.0}}


def tables(rows=40, **changes):
    """Scores, pairs and answers of two checkpoints; rows differ a little and evenly, so that intervals are small."""
    values, scores, pairs, answers = HEALTHY | changes, [], [], []
    for step in (0, 9):
        for row in range(rows):
            noise = 1e-3 * (row % 5 - 2)
            for kind in ("chosen", "rejected", "other"):
                moved = (values[kind] + noise) * (step > 0)
                scores.append(KEY | {"step": step, "row": row, "response": kind, "mean_logps": -1.0 + moved,
                                     "argmax_logps": -0.5 + (values["argmax"] + noise) * (step > 0),
                                     "implausible_mass": 1e-3 * (values["mass"] + noise if step else 1)})
            margin = 1.0 if step else 0.0
            pairs.append(KEY | {"step": step, "row": row, "margin": margin,
                                "weight": values["weight"] + noise if step else 0.5})
            right = row < rows * values["correct"] if step else True
            answers.append(KEY | {"step": step, "row": row, "correct": right,
                                  "repetition": (values["repetition"] + abs(noise)) * (step > 0)})
    return [pandas.DataFrame(lines) for lines in (scores, pairs, answers)]


@pytest.mark.parametrize("case", CASES)
def test_each_rule_fires_on_its_case_alone(case):
    """R-I4."""
    (found,) = judge(*tables(**CASES[case]))
    assert found["names"] == [case]
    assert set(found["rules"]) == {case} & set(RULES)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["text"].startswith(f"r on d, step 0 to 9: {case}")


def test_numbers_by_hand():
    """Changes 2, 3, 4 over three rows: mean 3, sem 1/sqrt(3), interval 3 +- t(2) / sqrt(3), t(2) in closed form."""
    scores = pandas.DataFrame([KEY | {"step": step, "row": row, "response": "chosen", "mean_logps": change * step,
                                      "argmax_logps": 0.0, "implausible_mass": 0.0}
                               for row, change in enumerate((2.0, 3.0, 4.0)) for step in (0, 1)])
    (found,) = judge(scores, pandas.DataFrame(), pandas.DataFrame())
    reach = 0.95 * (2 / (1 - 0.95**2)) ** 0.5 / 3**0.5
    assert found["numbers"]["change of chosen"] == {"mean": 3.0, "low": pytest.approx(3 - reach),
                                                    "high": pytest.approx(3 + reach), "n": 3}
    assert found["names"] == ["healthy"] and "change of chosen +3 [" in found["text"]


def test_small_changes_and_missing_numbers_name_nothing():
    """A fall of 0.002 nats a token is sure with such rows, and small; without answers nothing is said of answers."""
    scores, pairs, _ = tables(chosen=-0.002, rejected=-0.002, correct=0.0)
    (found,) = judge(scores, pairs, pandas.DataFrame())
    assert found["numbers"]["change of chosen"]["high"] < 0 and found["names"] == ["no change"]
    (found,) = judge(*tables(rows=1, chosen=-1.0))
    assert "displacement" not in found["names"]  # one row has no interval


def test_failed_rows_and_single_checkpoints():
    """A row without a number at one end is in no change; one checkpoint alone gets no verdict."""
    scores, pairs, answers = tables()
    scores.loc[(scores["row"] == 3) & (scores["step"] == 9), "mean_logps"] = float("nan")
    (found,) = judge(scores, pairs, answers)
    assert found["numbers"]["change of chosen"]["n"] == 39
    assert judge(scores[scores["step"] == 0], pairs, answers) == []


def test_sft_is_not_judged_by_preferences():
    scores, pairs, answers = (table.assign(phase="sft") for table in tables(weight=0.01))
    (found,) = judge(scores, pairs, answers)
    assert found["names"] == ["healthy"] and "weight" not in found["numbers"]


def test_an_accuracy_has_wilsons_interval():
    """8 of 10: (.8 + z^2/20 +- z sqrt(.016 + z^2/400)) / (1 + z^2/10), 0.4902 to 0.9433; 10 of 10: 0.7225 to 1."""
    for right, low, high in ((8, 0.4902, 0.9433), (10, 0.7225, 1.0)):
        found = verdict._share(pandas.Series([True] * right + [False] * (10 - right)))
        assert (found["mean"], found["n"]) == (right / 10, 10)
        assert (found["low"], found["high"]) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
