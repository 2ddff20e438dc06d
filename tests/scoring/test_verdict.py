"""Each rule of the verdict fires on the case made for it and on no other."""

import json
import math

import numpy as np
import pandas
import pytest

from nanodpo.folder.same_run import recipe
from nanodpo.run.noise import of_seeds
from nanodpo.scoring.changes import choose_place, worst_tenth
from nanodpo.scoring.verdict import RULES, Numbers, judge
from nanodpo.stats import over_problems, t_quantile

KEY = {"run": "r", "phase": "dpo", "dataset": "d"}
NAMES = {rule.name for rule in RULES}
# What a healthy run does from step 0 to step 9, a token: chosen up, rejected down, the rest as it was.
HEALTHY = {"chosen": 0.05, "rejected": -0.05, "other": 0.0, "argmax": 0.0, "mass": 1.0, "weight": 0.4, "correct": 1.0,
           "repetition": 0.0, "silent": 0.0, "reward": 1.0}
CASES = {"healthy": {}, "displacement": {"chosen": -0.05, "rejected": -0.2},
         "squeezing": {"chosen": -0.005, "rejected": -0.2, "other": -0.1, "argmax": 0.05},
         "spreading": {"mass": 4.0}, "narrowing": {"chosen": 0.02, "rejected": 0.06},
         "saturation": {"weight": 0.05}, "over-confidence": {"correct": 0.5},
         "wrong answers": {"correct": 0.5, "reward": 0.8}, "breaking off": {"silent": 0.3},
         "collapse": {"repetition": 0.4}, "no notable change": {"chosen": 0.0, "rejected": 0.0},
         "wider gap": {"chosen": -0.005, "rejected": -0.2, "argmax": 0.0}}


def tables(rows=40, **changes):
    """Scores, pairs, answers and chosen's tenths of two checkpoints; rows differ a little and evenly, so that intervals
    are small. What chosen and argmax do they do in the third tenth alone, ten times as much there."""
    values, scores, pairs, answers, tenths = HEALTHY | changes, [], [], [], []
    for step in (0, 9):
        for row in range(rows):
            noise, here = 1e-3 * (row % 5 - 2), KEY | {"step": step, "row": row, "problem": str(row)}
            for kind in ("chosen", "rejected", "other"):
                moved = (values[kind] + noise) * (step > 0)
                scores.append(here | {"response": kind, "mean_logps": -1.0 + moved,
                                      "argmax_logps": -0.5 + (values["argmax"] / 10 + noise) * (step > 0),
                                      "implausible_mass": 1e-3 * (values["mass"] + noise if step else 1),
                                      "implausible_mass_start": 1e-3})
            for i in range(10):
                share = 10 * (i == 2) * (step > 0)
                tenths.append(here | {"section": f"tenth {i + 1}", "tokens": 9,
                                      "mean_logps": -1.0 + share * values["chosen"] + noise * (step > 0),
                                      "argmax_logps": -0.5 + (share > 0) * values["argmax"] + noise * (step > 0)})
            margin = (1.0 if row < rows * values["reward"] else -1.0) if step else 0.0
            weight = values["weight"] + noise if step else 0.5
            pairs.append(here | {"margin": margin, "weights/chosen": weight, "weights/rejected": weight})
            right = row < rows * values["correct"] if step else True
            silent = step and row < rows * values["silent"]
            answers.append(here | {"correct": right, "tokens": 20, "ended": True, "found": None if silent else "7",
                                   "repetition": (values["repetition"] + abs(noise)) * (step > 0)})
    return [pandas.DataFrame(lines) for lines in (scores, pairs, answers, tenths)]


def test_an_answer_that_was_cut_at_its_limit_has_not_stopped():
    """It went on, and so has no answer yet."""
    scores, pairs, answers, tenths = tables(**CASES["breaking off"])
    (found,) = judge(scores, pairs, answers.assign(ended=answers["found"].notna()), tenths)
    assert "breaking off" not in found["names"] and found["numbers"]["change of answers without one"]["mean"] == 0


@pytest.mark.parametrize("case", CASES)
def test_each_rule_fires_on_its_case_alone(case):
    (found,) = judge(*tables(**CASES[case]))
    assert found["names"] == [case]
    assert set(found["rules"]) == {case} <= NAMES
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["text"].startswith(f"r on d, step 0 to 9, over 40 rows of one run: {case} (")
    assert {stats["over"] for stats in found["numbers"].values()} == {f"{n} rows of one run" for n in (20, 40)}


def test_numbers_by_hand():
    """Changes 2, 3, 4 over three rows: mean 3, sem 1/sqrt(3), interval 3 +- t(2) / sqrt(3), t(2) in closed form."""
    scores = pandas.DataFrame([KEY | {"step": step, "row": row, "problem": str(row), "response": "chosen",
                                      "mean_logps": change * step, "argmax_logps": 0.0, "implausible_mass": 0.0}
                               for row, change in enumerate((2.0, 3.0, 4.0)) for step in (0, 1)])
    (found,) = judge(scores, *[pandas.DataFrame()] * 3)
    reach = 0.95 * (2 / (1 - 0.95**2)) ** 0.5 / 3**0.5
    assert found["numbers"]["change of chosen"] == {"mean": 3.0, "low": pytest.approx(3 - reach),
                                                    "high": pytest.approx(3 + reach), "n": 3, "problems": 3,
                                                    "over": "3 rows of one run"}
    assert found["names"] == ["healthy"] and "chosen +3 [+0.516, +5.48] nats a token" in found["text"]


def test_small_changes_and_missing_numbers_name_nothing():
    """A fall of 0.002 nats a token is sure with such rows, and small; without answers nothing is said of answers."""
    scores, pairs, *_ = tables(chosen=-0.002, rejected=-0.002, correct=0.0)
    (found,) = judge(scores, pairs, pandas.DataFrame(), pandas.DataFrame())
    assert found["numbers"]["change of chosen"]["high"] < 0 and found["names"] == ["no notable change"]
    (found,) = judge(*tables(chosen=-0.009, rejected=-0.012))  # a gap that grows by 0.003 is not health
    assert found["numbers"]["change of gap"]["low"] > 0 and found["names"] == ["no notable change"]
    (found,) = judge(*tables(rows=1, chosen=-1.0))
    assert found["names"] == ["unclear"]  # one row has no interval
    scores = tables(rows=3, rejected=0.0)[0]
    scores.loc[scores["step"] == 9, "mean_logps"] = -1 + (scores["row"] - 1) / 50  # by -0.02, 0 and 0.02
    (found,) = judge(scores, *[pandas.DataFrame()] * 3)
    assert found["names"] == ["unclear"] and found["numbers"]["change of gap"]["mean"] == 0
    (found,) = judge(*(table.assign(phase="sft") for table in tables(chosen=0.0)))
    assert found["names"] == ["healthy"]  # its gap, by 0.05
    scores = tables(chosen=0.0)[0]
    (found,) = judge(scores[scores["response"] == "chosen"].assign(phase="sft"), *[pandas.DataFrame()] * 3)
    assert found["names"] == ["no notable change"]  # of SFT without rejected, chosen alone


@pytest.mark.parametrize("name, changes", [
    ("spreading", {"mass": 1.9}), ("breaking off", {"rows": 200, "silent": 0.05}), ("squeezing", {
        "chosen": -0.005, "rejected": -0.2, "argmax": 0.05}), ("saturation", {"rows": 2, "weight": 0.0995}),
    ("healthy", {"chosen": -0.004}), ("collapse", {"repetition": 0.09}), ("over-confidence", {
        "correct": 0.5, "reward": 0.875})])
def test_just_short_of_a_rule(name, changes):
    """1.9 times the mass, not 2; a sure rise of 5%, not 10; other responses that stay; a mean below a fifth of
    the start's 0.5 with an interval that is not; a chosen that falls, surely and little, beside a gap that rises; 9%
    more repetition; a reward accuracy of 0.875, not 0.9."""
    (found,) = judge(*tables(**changes))
    assert name not in found["names"]
    if name == "breaking off":
        assert found["numbers"]["change of answers without one"]["low"] > 0
    if name == "saturation":
        assert found["numbers"]["weight"]["mean"] < 0.1 < found["numbers"]["weight"]["high"]


@pytest.mark.parametrize("name, changes", [
    ("spreading", {"mass": 2.1}), ("breaking off", {"rows": 200, "silent": 0.11}), ("saturation", {"weight": 0.095}),
    ("collapse", {"repetition": 0.11}), ("over-confidence", {"correct": 0.5, "reward": 0.9}),
    ("displacement", {"chosen": -0.012, "rejected": -0.02})])
def test_just_past_a_rules_threshold(name, changes):
    """Those of docs/scoring.md: 2 times the mass, 0.1 of the answers, 0.2 of the start's weight of 0.5, and so on."""
    (found,) = judge(*tables(**changes))
    assert name in found["names"]


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
    tenths = pandas.DataFrame([KEY | {"step": step, "row": row, "problem": str(row), "section": section,
                                      "tokens": tokens, "mean_logps": -1.0 - lost * (step > 0), "argmax_logps": -0.5}
                               for step in (0, 9) for row in range(3)
                               for section, tokens, lost in (("tenth 1", 1, 3.0), ("tenth 2", 9, 1.0))])
    (found,) = judge(scores, pandas.DataFrame(), pandas.DataFrame(), tenths)
    assert found["there"] == "tenth 2" and found["numbers"]["change of chosen there"]["mean"] == -1.0


def test_a_start_without_implausible_mass_has_no_multiple():
    scores, *others = tables(chosen=0.05)
    scores["implausible_mass"], scores["implausible_mass_start"] = 0.01 * (scores["step"] == 9), 0.0
    (found,) = judge(scores, *others)
    assert found["numbers"]["change of implausible mass"]["mean"] == pytest.approx(0.01)
    assert found["names"] == ["healthy"]


def test_failed_rows_and_single_checkpoints():
    """A row without a number at one end is in no change; one checkpoint alone gets no verdict."""
    scores, *others = tables()
    scores.loc[(scores["row"] == 3) & (scores["step"] == 9), "mean_logps"] = float("nan")
    (found,) = judge(scores, *others)
    assert found["numbers"]["change of chosen"]["n"] == 39
    assert judge(scores[scores["step"] == 0], *others) == []
    pairs, answers, tenths = others
    tenths = tenths[(tenths["row"] < 5) == (tenths["step"] == 9)]  # no row has both ends
    (found,) = judge(scores, pairs, answers, tenths)
    assert found["there"] is None and "change of chosen there" not in found["numbers"]


def test_the_mass_of_a_pair_needs_both_sides_at_both_ends():
    """Chosen has 0.001 and rejected 0.010 at both steps. Half of the rejected failed at the end: nothing changed."""
    scores, *others = tables()
    mass = ["implausible_mass", "implausible_mass_start"]
    scores[mass[0]] = scores[mass[1]] = (scores["response"] == "rejected") * 0.009 + 0.001
    gone = (scores["response"] == "rejected") & (scores["step"] == 9) & (scores["row"] < 20)
    scores.loc[gone, mass] = float("nan")
    (found,) = judge(scores, *others)
    assert found["names"] == ["healthy"]
    same = {"n": 20, "problems": 20, "over": "20 rows of one run"}
    assert found["numbers"]["change of implausible mass"] == {"mean": 0.0, "low": 0.0, "high": 0.0} | same
    assert found["numbers"]["implausible mass"]["mean"] == pytest.approx(0.0055)
    assert found["numbers"]["implausible mass at the start"]["n"] == 20


def test_responses_of_ones_own_are_told_beside_the_rules():
    """A column `rephrased` that rises by 0.3 where other stays; over seeds too. No rule is about it."""
    def with_rephrased(scores, *rest):
        own = scores[scores["response"] == "other"].assign(response="rephrased")
        own["mean_logps"] += 0.3 * (own["step"] == 9)
        return [pandas.concat([scores, own], ignore_index=True), *rest]

    (found,) = judge(*with_rephrased(*tables()))
    assert found["names"] == ["healthy"]
    assert found["text"].endswith("; besides, rephrased +0.3 [+0.3, +0.3] nats a token")
    parts, recipes = seeds({}, {})
    *_, together = judge(*with_rephrased(*parts), recipes)
    assert "besides, rephrased +0.3 [" in together["text"] and "besides" not in judge(*tables())[0]["text"]


def test_what_happens_at_one_place_is_seen_there():
    """All that chosen loses it loses in the third tenth, where the argmax rises by 0.05: a tenth of that on the whole,
    which no rule would call notable."""
    (found,) = judge(*tables(**CASES["squeezing"]))
    assert found["there"] == "tenth 3"
    assert found["numbers"]["change of chosen there"]["mean"] == pytest.approx(10 * -0.005)
    assert found["numbers"]["change of argmax there"]["mean"] == pytest.approx(0.05)
    assert "squeezing (argmax token +0.05 [" in found["text"]
    assert "] nats a token in tenth 3, over 20 rows)" in found["text"]


def test_sft_is_not_judged_by_preferences_but_by_its_answers():
    (found,) = judge(*(table.assign(phase="sft") for table in tables(weight=0.01)))
    assert found["names"] == ["healthy"] and "weight" not in found["numbers"]
    (found,) = judge(*(table.assign(phase="sft") for table in tables(correct=0.5)))
    assert found["names"] == ["wrong answers"]


def test_saturation_is_measured_by_the_start():
    """With label smoothing 0.45 a pair begins with a weight of 0.05: 0.045 is no saturation, 0.005 is."""
    for weight, names in ((0.045, ["healthy"]), (0.005, ["saturation"])):
        scores, pairs, *others = tables(weight=weight)
        pairs.loc[pairs["step"] == 0, "weights/rejected"] = 0.05
        (found,) = judge(scores, pairs, *others)
        assert found["names"] == names
    assert "a pair's weight in the loss is 0.1 of the start's (0.05 -> 0.005)" in found["text"]


def test_spreading_in_words_and_its_floor():
    """From 0.0007 to 0.0082 is 11.7 times; from 0.00001 to 0.00003 three times, and nothing that matters."""
    for start, end, names in ((7e-4, 8.2e-3, ["spreading"]), (1e-5, 3.1e-5, ["healthy"])):
        scores, *others = tables()
        scores["implausible_mass_start"] = start
        scores["implausible_mass"] = start + (end - start) * (scores["step"] == 9)
        (found,) = judge(scores, *others)
        assert found["names"] == names
        if names == ["spreading"]:
            assert ("spreading (along chosen and rejected, probability of implausible tokens grew to 11.7 times the "
                    "start's (0.0007 -> 0.0082))" in found["text"])


def test_noise_between_start_and_end_is_no_spreading():
    """2,000 runs of 25 rows, whose heavy-tailed masses at start and end are exchangeable: none is called spreading but
    by chance, though many have twice the start's."""
    random = np.random.default_rng(0)
    start, end = np.exp(random.normal(-4, 2, (2, 2000, 25)))
    (rule,) = (rule for rule in RULES if rule.name == "spreading")

    def rates(start, end):
        run, row = (index.ravel() for index in np.indices(start.shape))
        table = pandas.DataFrame({"run": run, "problem": row, "now": end.ravel(), "then": start.ravel()})
        table["moved"] = table["now"] - table["then"]
        found = [over_problems(table, ["run"], name).to_dict("records") for name in ("now", "then", "moved")]
        names = ("implausible mass", "implausible mass at the start", "change of implausible mass")
        numbers = [Numbers(zip(names, lines)) for lines in zip(*found)]
        return [np.mean([test(line) for line in numbers]) for test in (
            rule.fires, lambda line: line.of(names[0]) > 2 * line.of(names[1]))]

    called, larger = rates(start, end)
    assert called <= 0.025 < 0.05 < larger
    spread = start + 0.8 * np.exp(random.normal(0, 0.5, start.shape))
    assert rates(start, spread)[0] > 0.9  # a real one is called


def test_the_worst_tenth_is_not_worse_by_being_picked():
    """400 runs whose tenths moved by noise alone: the interval of the tenth that seems to lose most lies below 0 in 2.5
    of 100, as an interval should. Chosen and told by the same rows it would in about 20."""
    moved = np.random.default_rng(0).normal(size=(400, 40, 10))
    problems = np.array([f"{row * 2654435761 % 2**32:08x}" for row in range(40)])

    def high(values):
        return values.mean() + t_quantile(len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5

    chosen = [choose_place(run, problems) for run in moved]
    assert all(telling.sum() == 20 for _, telling in chosen)
    below = [high(run[telling, place]) < 0 for run, (place, telling) in zip(moved, chosen)]
    assert 0.005 < np.mean(below) < 0.05
    assert np.mean([high(run[:, run.mean(0).argmin()]) < 0 for run in moved]) > 0.15


def test_the_worst_tenth_is_told_by_the_problems_that_did_not_choose_it():
    """Of problems a, b, c and d the first and the third lose 5 nats a token in the second tenth, the others gain 1
    there and lose 3 in the fifth: the second is the worst for those that choose, and +1 is what the others tell."""
    moves = {("a", 2): -5.0, ("c", 2): -5.0, ("b", 2): 1.0, ("d", 2): 1.0, ("b", 5): -3.0, ("d", 5): -3.0}
    table = pandas.DataFrame([{"step": step, "row": row, "problem": problem, "section": f"tenth {i}", "tokens": 2,
                               "mean_logps": step * moves.get((problem, i), 0.0), "argmax_logps": 0.25 * step}
                              for step in (0, 1) for row, problem in enumerate("dcba") for i in range(1, 11)])
    place, numbers = worst_tenth(table, 0, 1)
    assert place == "tenth 2" and [numbers["change of chosen there"][key] for key in ("mean", "n")] == [1.0, 2]
    assert numbers["change of argmax there"]["mean"] == 0.25
    assert worst_tenth(table[table["problem"] == "a"], 0, 1) == ("tenth 2", {
        f"change of {name} there": {"mean": pytest.approx(float("nan"), nan_ok=True), "n": 0}
        for name in ("chosen", "argmax")})


def seeds(*changes):
    """Tables of runs s0, s1 ... with these changes, and their recipes: one, with another seed each."""
    parts = [[table.assign(run=f"s{i}") for table in tables(**change)] for i, change in enumerate(changes)]
    recipes = {f"s{i}": ("one", i) for i in range(len(changes))}
    return [pandas.concat(found, ignore_index=True) for found in zip(*parts)], recipes


def test_runs_of_several_seeds_are_judged_together():
    """Chosen falls by 0.05, 0.06 and 0.07: mean 0.06, sem 0.01 / sqrt(3), t(2) in closed form; displacement holds over
    seeds. Spreading is there in one of three alone, and is no name of the recipe."""
    parts, recipes = seeds(*({"chosen": -0.05 - i / 100, "rejected": -0.3, "mass": 1 + 9 * (i == 1)} for i in range(3)))
    *each, together = judge(*parts, recipes)
    assert [line["names"] for line in each] == [["displacement"], ["displacement", "spreading"], ["displacement"]]
    reach = 0.95 * (2 / (1 - 0.95**2)) ** 0.5 * 0.01 / 3**0.5
    assert together["names"] == ["displacement"] and together["runs"] == ["s0", "s1", "s2"]
    assert together["numbers"]["change of chosen"] == {
        "mean": pytest.approx(-0.06), "low": pytest.approx(-0.06 - reach), "high": pytest.approx(-0.06 + reach), "n": 3,
        "over": "3 runs of one recipe"}
    assert together["text"].startswith("s0, s1, s2 on d, step 0 to 9, over 3 runs of one recipe: displacement (chosen "
                                       "-0.06 [-0.0848, -0.0352] nats a token; in tenth 3 -0.6 [")
    assert json.loads(json.dumps(together, allow_nan=False)) == together


def test_a_name_that_flips_from_seed_to_seed_is_none_of_the_recipe():
    """Two seeds are healthy, one is displaced: over seeds chosen's change, 0.05, 0.05 and -0.05, has no sign."""
    parts, recipes = seeds({}, {}, {"chosen": -0.05, "rejected": -0.2})
    *each, together = judge(*parts, recipes)
    assert [line["names"] for line in each] == [["healthy"], ["healthy"], ["displacement"]]
    assert together["numbers"]["change of chosen"]["low"] < 0 < together["numbers"]["change of chosen"]["high"]
    assert together["names"] == ["wider gap"]  # its gap rises in every seed, and chosen may fall


def test_a_recipe_is_not_healthy_for_want_of_seeds():
    """Chosen falls by 0.05 in one run and by 0.06 in the other. Of two numbers the interval, 12.7 standard errors
    either way, holds 0 all the same: that is no evidence of health."""
    parts, recipes = seeds({"chosen": -0.05, "rejected": -0.3}, {"chosen": -0.06, "rejected": -0.31})
    *each, together = judge(*parts, recipes)
    assert [line["names"] for line in each] == [["displacement"]] * 2
    assert together["numbers"]["change of chosen"]["high"] > 0 and together["names"] == ["wider gap"]


def test_answers_that_agree_by_chance_over_seeds_prove_nothing():
    """Two seeds of which each loses one of 40 right answers. By the two alone the loss of 1/40 would be certain; but a
    share of 40 rows is a multiple of 1/40, and its standard deviation no less than that of such a rounding, 1/40 by the
    root of 12: -0.025 -+ t(1) / sqrt(2) / 40 / sqrt(12). A loss of one half is sure even so. No share leaves 0 to 1."""
    parts, recipes = seeds({"correct": 39 / 40}, {"correct": 39 / 40})
    *_, together = judge(*parts, recipes)
    reach = math.tan(math.pi * 0.475) / math.sqrt(2) / 40 / math.sqrt(12)
    assert together["names"] == ["healthy"] and together["numbers"]["change of answer accuracy"] == {
        "mean": pytest.approx(-0.025), "low": pytest.approx(-0.025 - reach), "high": pytest.approx(-0.025 + reach),
        "n": 2, "over": "2 runs of one recipe"}
    assert together["numbers"]["reward accuracy"]["high"] == 1
    parts, recipes = seeds({"correct": 0.5}, {"correct": 0.5})
    assert judge(*parts, recipes)[-1]["names"] == ["over-confidence"]


def test_answer_lengths_that_agree_over_seeds_are_not_known_exactly():
    """Of 40 answers one is 2 tokens longer in each seed: +0.05, a multiple of 1/40, as a share is. The interval has the
    width that such a rounding gives it, and no ends."""
    (scores, pairs, answers, tenths), recipes = seeds({}, {})
    answers["tokens"] += 2 * ((answers["step"] == 9) & (answers["row"] == 7))
    length = judge(scores, pairs, answers, tenths, recipes)[-1]["numbers"]["change of answer length"]
    reach = math.tan(math.pi * 0.475) / math.sqrt(2) / 40 / math.sqrt(12)
    assert [length[name] for name in ("mean", "low", "high")] == pytest.approx([0.05, 0.05 - reach, 0.05 + reach])


def test_saturation_is_of_the_preference_loss_alone():
    """With --sft_weight 1 and 20 tokens chosen's weight has 0.05 more, from first to last: the dpo loss pushes rejected
    with 0.4% of what it did."""
    scores, pairs, *others = tables(weight=0.0002)
    pairs["weights/rejected"] = np.where(pairs["step"] == 0, 0.05, 0.0002)
    pairs["weights/chosen"] = pairs["weights/rejected"] + 0.05
    (found,) = judge(scores, pairs, *others)
    assert found["names"] == ["saturation"] and "(0.05 -> 0.0002)" in found["text"]


def test_right_answers_are_counted_over_the_same_rows():
    """At the start 40 rows were answered, 20 of them right, at the end the first 20, 13 of them right: all of these 20
    were right before."""
    scores, pairs, answers, tenths = tables(chosen=0.0, rejected=-0.1)
    answers["correct"] = answers["row"] < np.where(answers["step"] == 0, 20, 13)
    answers = answers[(answers["step"] == 0) | (answers["row"] < 20)]
    (found,) = judge(scores, pairs, answers, tenths)
    assert "over-confidence (right answers 20 of 20 -> 13 of 20, change -0.35 [" in found["text"]
    (found,) = judge(scores, pairs, answers[answers["step"] == 0], tenths)
    assert not [name for name in found["numbers"] if "answer" in name or name == "change of repetition"]


def test_only_seeds_of_one_recipe_are_judged_together():
    """Not one seed twice, not another recipe, and nothing of runs of which nothing is known."""
    parts, recipes = seeds({}, {})
    recipes["s1"] = "one", 0
    assert len(judge(*parts, recipes)) == 2
    recipes["s1"] = "another", 1
    assert len(judge(*parts, recipes)) == len(judge(*parts)) == 2


def test_what_a_recipe_is():
    """All of run.json that makes a run but its seed: not where it was written, and not what the seed itself drew."""
    given = {"seed": 1, "output_dir": "a", "learning_rate": 1e-4, "eval_size": 0, "random_init": False}
    record = {"arguments": given, "steps": 9, "weights": "w", "data": ["d"], "command": "train.py"}

    def changed(arguments=None, **facts):
        return recipe(record | facts | {"arguments": given | (arguments or {})})

    same, seed = changed()
    assert seed == 1 and changed({"seed": 2, "output_dir": "b"}, command="x") == (same, 2)
    assert changed({"train_on": "all"})[0] == same, "a record of an earlier version lacks flags that came later"
    assert changed({"train_on": "last"})[0] != same
    assert changed({"eval_steps": 30, "save_steps": 2})[0] == same, "how often it is looked at makes no other run"
    assert all(changed(*other[:1], **dict(other[1:]))[0] != same for other in (
        [{"learning_rate": 2e-4}], [{}, ("steps", 8)], [{}, ("weights", "v")], [{}, ("data", ["e"])]))
    forks = [changed({"seed": seed}, fork={"run": f"r{seed}", "step": step, "changed": beta})[0]
             for seed, step, beta in ((1, 4, {}), (2, 4, {}), (2, 5, {}), (2, 4, {"--beta": [0.1, 0.3]}), (2, 0, {}))]
    assert {forks[0], forks[1], forks[2], forks[4]} == {same}, "with nothing changed it is the run that it goes on from"
    forks = [changed({"seed": seed}, fork={"run": f"r{seed}", "step": step, "changed": flags})[0]
             for seed, step, flags in (
                 (1, 4, {"--beta": [0.1, 0.3]}), (2, 4, {"--beta": [0.1, 0.3], "--save_steps": [9, 1]}),
                 (2, 5, {"--beta": [0.1, 0.3]}), (2, 4, {"--beta": [0.2, 0.3]}))]
    assert forks[0] == forks[1] and len({*forks, same}) == 4, "of two seeds, changed alike at one step"
    # What the run had changed that was forked counts, too, back to a fork at 0, which began anew.
    again = [changed({"seed": 2}, fork={"run": "b", "step": 4, "changed": {}, "of": {
        "run": "a", "step": step, "changed": beta, "of": of}})[0] for step, beta, of in (
            (2, {"--beta": [0.3, 0.1]}, None), (3, {"--beta": [0.3, 0.1]}, None), (0, {"--beta": [0.3, 0.1]}, None),
            (0, {}, {"run": "r", "step": 2, "changed": {"--beta": [0.3, 0.1]}}))]
    assert len({*again}) == 3 and again[2] == again[3] == same
    for flag, fact in (({"eval_size": 5}, {"data": ["e"]}), ({"random_init": True}, {"weights": "v"})):
        assert changed(flag)[0] == changed(flag, **fact)[0] != same


def test_a_change_within_bfloat16s_noise_is_no_change():
    """One pair moves by 0.19 nats a token by rounding alone, a mean over 40 rows by 0.03; twice that is 0.06. Chosen
    falls by 0.05, rejected by 0.2: rejected alone falls, and the gap, whose noise is sqrt(2) times as large, rises."""
    noise = {"r": {"logps_per_token/chosen": 0.19, "logps_per_token/rejected": 0.19, "rewards/margins": 3.0}}
    (plain,), (found,) = (judge(*tables(chosen=-0.05, rejected=-0.2), None, noises) for noises in ({}, noise))
    assert plain["names"] == ["displacement"] and "noise" not in plain["numbers"]["change of chosen"]
    numbers = found["numbers"]
    assert numbers["change of chosen"]["noise"] == pytest.approx(2 * 0.19 / 40**0.5)
    assert numbers["change of gap"]["noise"] == pytest.approx(2 * 2**0.5 * 0.19 / 40**0.5)
    assert found["names"] == ["wider gap"]  # by 0.15; whether chosen fell can't be told from the rounding
    assert "chosen -0.05 [" in found["text"] and "within bfloat16's noise of 0.06" in found["text"]
    (still,) = judge(*tables(chosen=-0.05, rejected=-0.1), None, noise)
    assert still["names"] == ["unclear"] and still["text"].count("within bfloat16's noise") == 2
    (louder,) = judge(*tables(chosen=-0.07, rejected=-0.2), None, noise)
    assert louder["names"] == ["displacement"] and "noise" not in louder["text"]


def test_seeds_share_the_noise_of_their_start():
    """Of a change half of the noise's variance, s^2, is the end's, a run's own, and half the start's, the same in every
    seed: their mean has s^2 / 2 + s^2 / 2 / 3. Drawn so, with nothing learned, the interval over three runs leaves 0
    out in about 16 of 100 recipes; beyond the noise, too, is what lies so in less than 5."""
    draws = np.random.default_rng(0).normal(size=(4000, 4))
    moved, noise = draws[:, 1:] - draws[:, :1], 2 * of_seeds([math.sqrt(2)] * 3)
    assert noise / 2 == pytest.approx(moved.mean(1).std(), rel=0.05)
    sure = np.abs(moved.mean(1)) > t_quantile(2) * moved.std(1, ddof=1) / math.sqrt(3)
    assert sure.mean() > 0.12 and (sure & (np.abs(moved.mean(1)) > noise)).mean() < 0.05
    parts, recipes = seeds(*({"chosen": -0.05 - i / 100, "rejected": -0.3} for i in range(3)))
    for one, name in ((0.2, "displacement"), (0.3, "wider gap")):  # 0.052 and 0.077, where the mean change is -0.06
        noises = {run: {"logps_per_token/chosen": one, "logps_per_token/rejected": one} for run in recipes}
        together = judge(*parts, recipes, noises)[-1]
        assert together["names"] == [name] and ("within bfloat16's noise" in together["text"]) == (one == 0.3)
        assert together["numbers"]["change of chosen"]["noise"] == pytest.approx(2 * one * math.sqrt(2 / 3 / 40))
        assert together["numbers"]["change of gap"]["noise"] == pytest.approx(2 * one * math.sqrt(4 / 3 / 40))
