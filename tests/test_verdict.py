"""Each rule of the verdict fires on the case made for it and on no other."""

import json

import pandas
import pytest

from nanodpo.scoring import estimates
from nanodpo.scoring.verdict import RULES, judge

KEY = {"run": "r", "phase": "dpo", "dataset": "d"}
# What a healthy run does from step 0 to step 9, a token: chosen up, rejected down, the rest as it was.
HEALTHY = {"chosen": 0.05, "rejected": -0.05, "other": 0.0, "argmax": 0.0, "mass": 1.0, "weight": 0.4, "correct": 1.0,
           "repetition": 0.0, "silent": 0.0, "reward": 1.0}
CASES = {"healthy": {}, "displacement": {"chosen": -0.05, "rejected": -0.2},
         "squeezing": {"chosen": -0.005, "rejected": -0.2, "other": -0.1, "argmax": 0.05},
         "spreading": {"mass": 4.0}, "narrowing": {"chosen": 0.02, "rejected": 0.06},
         "saturation": {"weight": 0.05}, "over-confidence": {"correct": 0.5},
         "wrong answers": {"correct": 0.5, "reward": 0.8}, "breaking off": {"silent": 0.3},
         "collapse": {"repetition": 0.4}, "no change": {"chosen": 0.0, "rejected": 0.0}}


def tables(rows=40, **changes):
    """Scores, pairs, answers and chosen's tenths of two checkpoints; rows differ a little and evenly, so that intervals
    are small. What chosen and argmax do they do in the third tenth alone, ten times as much there."""
    values, scores, pairs, answers, tenths = HEALTHY | changes, [], [], [], []
    for step in (0, 9):
        for row in range(rows):
            noise = 1e-3 * (row % 5 - 2)
            for kind in ("chosen", "rejected", "other"):
                moved = (values[kind] + noise) * (step > 0)
                scores.append(KEY | {"step": step, "row": row, "response": kind, "mean_logps": -1.0 + moved,
                                     "argmax_logps": -0.5 + (values["argmax"] / 10 + noise) * (step > 0),
                                     "implausible_mass": 1e-3 * (values["mass"] + noise if step else 1)})
            for i in range(10):
                share = 10 * (i == 2) * (step > 0)
                tenths.append(KEY | {"step": step, "row": row, "section": f"tenth {i + 1}", "tokens": 9,
                                     "mean_logps": -1.0 + share * values["chosen"] + noise * (step > 0),
                                     "argmax_logps": -0.5 + (share > 0) * values["argmax"] + noise * (step > 0)})
            margin = (1.0 if row < rows * values["reward"] else -1.0) if step else 0.0
            pairs.append(KEY | {"step": step, "row": row, "margin": margin,
                                "weight": values["weight"] + noise if step else 0.5})
            right = row < rows * values["correct"] if step else True
            silent = step and row < rows * values["silent"]
            answers.append(KEY | {"step": step, "row": row, "correct": right, "tokens": 20,
                                  "found": None if silent else "7",
                                  "repetition": (values["repetition"] + abs(noise)) * (step > 0)})
    return [pandas.DataFrame(lines) for lines in (scores, pairs, answers, tenths)]


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
    (found,) = judge(scores, *[pandas.DataFrame()] * 3)
    reach = 0.95 * (2 / (1 - 0.95**2)) ** 0.5 / 3**0.5
    assert found["numbers"]["change of chosen"] == {"mean": 3.0, "low": pytest.approx(3 - reach),
                                                    "high": pytest.approx(3 + reach), "n": 3}
    assert found["names"] == ["healthy"] and "change of chosen +3 [" in found["text"]


def test_small_changes_and_missing_numbers_name_nothing():
    """A fall of 0.002 nats a token is sure with such rows, and small; without answers nothing is said of answers."""
    scores, pairs, *_ = tables(chosen=-0.002, rejected=-0.002, correct=0.0)
    (found,) = judge(scores, pairs, pandas.DataFrame(), pandas.DataFrame())
    assert found["numbers"]["change of chosen"]["high"] < 0 and found["names"] == ["no change"]
    (found,) = judge(*tables(chosen=-0.009, rejected=-0.012))  # a gap that grows by 0.003 is not health
    assert found["numbers"]["change of gap"]["low"] > 0 and found["names"] == ["no change"]
    (found,) = judge(*tables(rows=1, chosen=-1.0))
    assert "displacement" not in found["names"]  # one row has no interval


@pytest.mark.parametrize("name, changes", [
    ("spreading", {"mass": 2.5}), ("breaking off", {"rows": 200, "silent": 0.05}), ("squeezing", {
        "chosen": -0.005, "rejected": -0.2, "argmax": 0.05}), ("saturation", {"rows": 2, "weight": 0.0995})])
def test_just_short_of_a_rule(name, changes):
    """2.5 times the mass, not 3; a sure rise of 5%, not 10; other responses that stay; a mean below 0.1 with an
    interval that is not."""
    (found,) = judge(*tables(**changes))
    assert name not in found["names"]
    if name == "breaking off":
        assert found["numbers"]["change of answers without one"]["low"] > 0
    if name == "saturation":
        assert found["numbers"]["weight"]["mean"] < 0.1 < found["numbers"]["weight"]["high"]


def test_runs_and_data_sets_are_judged_apart():
    """Each of four as it is alone: a healthy run and one that is sure of itself and wrong, on two data sets."""
    cases = {(run, dataset): {"correct": 0.5, "weight": 0.05, "mass": 4.0} if run + dataset == "se" else {}
             for run in "rs" for dataset in "de"}
    parts = [[table.assign(run=run, dataset=dataset) for table in tables(**changes)]
             for (run, dataset), changes in cases.items()]
    alone = [judge(*part)[0] for part in parts]
    assert judge(*(pandas.concat(tables, ignore_index=True) for tables in zip(*parts))) == alone
    assert [found["names"] for found in alone] == [["healthy"]] * 3 + [["spreading", "saturation", "over-confidence"]]


def test_reward_accuracy_and_weight_are_of_the_end():
    """Margins 1, 0, -1 and one that is missing: a tie is no success, and what is missing is no failure."""
    scores, pairs, *_ = tables(rows=4)
    pairs.loc[pairs["step"] == 9, "margin"] = [1.0, 0.0, -1.0, float("nan")]
    (found,) = judge(scores, pairs, pandas.DataFrame(), pandas.DataFrame())
    assert found["numbers"]["reward accuracy"]["mean"] == pytest.approx(1 / 3)
    assert found["numbers"]["reward accuracy"]["n"] == 3
    assert found["numbers"]["weight"]["mean"] == pytest.approx(0.4 + 1e-3 * (-2 - 1 + 0 + 1) / 4)
    pairs["margin"] = float("nan")  # a bare model, without a start to compare with
    (found,) = judge(scores, pairs, pandas.DataFrame(), pandas.DataFrame())
    assert "reward accuracy" not in found["numbers"]
    for phase in ("ipo", "hinge", "robust"):  # saturation is a rule of dpo's loss alone
        (found,) = judge(*(table.assign(phase=phase) for table in tables(weight=0.01)))
        assert found["names"] == ["healthy"] and "weight" not in found["numbers"]


def test_the_place_is_where_most_nats_went():
    """Of two tenths one loses 3 nats over 1 token, the other 1 nat a token over 9."""
    scores, *_ = tables(rows=3)
    tenths = pandas.DataFrame([KEY | {"step": step, "row": row, "section": section, "tokens": tokens,
                                      "mean_logps": -1.0 - lost * (step > 0), "argmax_logps": -0.5}
                               for step in (0, 9) for row in range(3)
                               for section, tokens, lost in (("tenth 1", 1, 3.0), ("tenth 2", 9, 1.0))])
    (found,) = judge(scores, pandas.DataFrame(), pandas.DataFrame(), tenths)
    assert found["there"] == "tenth 2" and found["numbers"]["change of chosen there"]["mean"] == -1.0


def test_a_start_without_implausible_mass_has_no_multiple():
    scores, *others = tables(chosen=0.05)
    scores["implausible_mass"] = 0.01 * (scores["step"] == 9)
    (found,) = judge(scores, *others)
    assert found["numbers"]["change of implausible mass"]["mean"] == pytest.approx(0.01)
    assert "implausible mass, times the start's" not in found["numbers"] and found["names"] == ["healthy"]


def test_a_single_row_has_no_interval_and_none_no_number():
    assert estimates.mean(pandas.Series([2.0, float("nan")])) == {"mean": 2.0, "n": 1}
    assert estimates.share(pandas.Series(dtype=bool))["n"] == 0


def test_failed_rows_and_single_checkpoints():
    """A row without a number at one end is in no change; one checkpoint alone gets no verdict."""
    scores, *others = tables()
    scores.loc[(scores["row"] == 3) & (scores["step"] == 9), "mean_logps"] = float("nan")
    (found,) = judge(scores, *others)
    assert found["numbers"]["change of chosen"]["n"] == 39
    assert judge(scores[scores["step"] == 0], *others) == []


def test_the_mass_of_a_pair_needs_both_sides_at_both_ends():
    """Chosen has 0.001 and rejected 0.010 at both steps. Half of the rejected failed at the start: nothing changed."""
    scores, *others = tables()
    scores["implausible_mass"] = (scores["response"] == "rejected") * 0.009 + 0.001
    gone = (scores["response"] == "rejected") & (scores["step"] == 0) & (scores["row"] < 20)
    scores.loc[gone, "implausible_mass"] = float("nan")
    (found,) = judge(scores, *others)
    assert found["names"] == ["healthy"]
    assert found["numbers"]["change of implausible mass"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 20}
    assert found["numbers"]["implausible mass, times the start's"] == {"mean": 1.0, "n": 20}


def test_what_happens_at_one_place_is_seen_there():
    """All that chosen loses it loses in the third tenth, where the argmax rises by 0.05: a tenth of that on the whole,
    which no rule would call notable."""
    (found,) = judge(*tables(**CASES["squeezing"]))
    assert found["there"] == "tenth 3"
    assert found["numbers"]["change of chosen there"]["mean"] == pytest.approx(10 * -0.005)
    assert found["numbers"]["change of argmax there"]["mean"] == pytest.approx(0.05)
    assert "squeezing (change of argmax in tenth 3 +0.05 [" in found["text"]


def test_sft_is_not_judged_by_preferences_but_by_its_answers():
    (found,) = judge(*(table.assign(phase="sft") for table in tables(weight=0.01)))
    assert found["names"] == ["healthy"] and "weight" not in found["numbers"]
    (found,) = judge(*(table.assign(phase="sft") for table in tables(correct=0.5)))
    assert found["names"] == ["wrong answers"]


@pytest.mark.parametrize("before, after, mean, low, high", [
    # (up - down) / (n + 2) +- 1.96 sqrt(up + down + 1 - (up - down)^2 / (n + 2)) / (n + 2)
    ((1,) * 10, (1,) * 10, 0.0, -1.959964 / 12, 1.959964 / 12),
    ((1, 1), (0, 0), -1.0, -0.5 - 1.959964 * 2**0.5 / 4, -0.5 + 1.959964 * 2**0.5 / 4),
    ((1, 1, 1, 0), (0, 0, 1, 1), -0.25, (-1 - 1.959964 * (23 / 6) ** 0.5) / 6, (-1 + 1.959964 * (23 / 6) ** 0.5) / 6),
])
def test_a_change_of_a_share_has_agresti_and_mins_interval(before, after, mean, low, high):
    """By hand; two rows that both go wrong are not yet a sure fall, and no change at all has an interval too."""
    table = pandas.DataFrame([{"row": row, "step": step, "correct": bool(value)}
                              for step, values in enumerate((before, after)) for row, value in enumerate(values)])
    found = estimates.change_of_share(table, "correct", 0, 1)
    assert found == {"mean": mean, "low": pytest.approx(low), "high": pytest.approx(high), "n": len(before)}


def test_an_accuracy_has_wilsons_interval():
    """8 of 10: (.8 + z^2/20 +- z sqrt(.016 + z^2/400)) / (1 + z^2/10), 0.4902 to 0.9433; 10 of 10: 0.7225 to 1."""
    for right, low, high in ((8, 0.4902, 0.9433), (10, 0.7225, 1.0)):
        found = estimates.share(pandas.Series([True] * right + [False] * (10 - right)))
        assert (found["mean"], found["n"]) == (right / 10, 10)
        assert (found["low"], found["high"]) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
