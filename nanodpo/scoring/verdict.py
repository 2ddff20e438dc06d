"""Says in names and numbers what became of a run: simple rules over the first and the last scored checkpoint.

A number is a mean over rows of one run with its 95% interval (estimates.py); a change is taken row by row. A rise is a
change whose interval lies above 0, a fall one whose interval lies below. NOTABLE keeps the names for what matters: with
many rows the interval of any change leaves 0 out. Such an interval says what other rows would show, of this run;
another seed may lie far outside. Of runs that differ in their seed alone a line of its own says what they have in
common: the same rules, over the runs' numbers and their 95% interval over runs.

The numbers are those of changes.py.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pandas

from ..run.noise import of_seeds
from . import risers
from .changes import of_answers, of_pairs, of_scores, worst_tenth
from .estimates import over_runs

NOTABLE = 0.01  # nats a token: one percent of a token's probability
SPREAD = 2  # times what the start gave the same tokens; noise moves it up and down alike
AT_LEAST = 0.001  # rise of the implausible mass: of a thousand tokens one more
SATURATED = 0.2  # of the weight that the loss gave a pair at the start
SURE = 0.9  # reward accuracy of a run that believes in itself
LOOPS = 0.1  # rise of the repetition rate
RISERS = 3  # tokens that gained most, named
SILENT = 0.1  # rise of the share of answers that give no answer


class Numbers(dict):
    """{name: {"mean", "low", "high", "n"}}. A number that is missing neither falls nor rises, nor does one within its
    "noise"."""

    def of(self, name: str, what: str = "mean") -> float:
        return self.get(name, {}).get(what, math.nan)

    def falls(self, name: str, by: float = 0.0) -> bool:
        return self.of(name, "high") < 0 and self.of(name) <= -by and not self.is_noise(name)

    def rises(self, name: str, by: float = 0.0) -> bool:
        return self.of(name, "low") > 0 and self.of(name) >= by and not self.is_noise(name)

    def is_noise(self, name: str) -> bool:
        return abs(self.of(name)) <= self.of(name, "noise")


@dataclasses.dataclass(frozen=True)
class Rule:
    name: str
    words: str
    fires: Callable[[Numbers], bool]
    shown: tuple[str, ...]  # the numbers that the sentence has
    alone: bool = False  # for runs that no other rule names; the first of these that fires


FALLING = ("change of chosen", "change of rejected", "change of other")
BOTH = ("change of chosen", "change of gap")
# Counts divided by rows, and changes of them, with the smallest and the largest value that they can have.
COUNTS = {name: (0, 1) for name in ("right answers at the start", "right answers", "reward accuracy")}
COUNTS |= {"change of answer length": (-math.inf, math.inf)}
COUNTS |= {name: (-1, 1) for name in ("change of answer accuracy", "change of answers without one")}
RULES = [
    Rule("displacement", f"the chosen responses' log-prob falls, by {NOTABLE} nats a token or more",
         lambda of: of.falls("change of chosen", NOTABLE), ("change of chosen", "change of chosen there")),
    Rule("squeezing", "chosen, rejected and, where scored, the response other fall, and there, where chosen loses "
         f"most, the argmax token's log-prob rises by {NOTABLE} nats a token or more",
         lambda of: all(of.falls(side) for side in FALLING if side in of or side != "change of other")
         and of.rises("change of argmax there", NOTABLE), ("change of argmax there",)),
    Rule("spreading", "along chosen and rejected, the probability of tokens that the start or the end gives less than "
         f"0.001 rises by {AT_LEAST} or more, and to {SPREAD} times or more",
         lambda of: of.rises("change of implausible mass", AT_LEAST)
         and of.of("implausible mass") >= SPREAD * of.of("implausible mass at the start") > 0, ("implausible mass",)),
    Rule("narrowing", f"the gap of chosen to rejected falls, by {NOTABLE} nats a token or more",
         lambda of: of.falls("change of gap", NOTABLE), ("change of gap",)),
    Rule("saturation", "the weight that the dpo loss still gives a pair, beta (sigma(-margin) - label smoothing), is "
         f"below {SATURATED} of what it was at the start",
         lambda of: of.of("weight", "high") < SATURATED * of.of("weight at the start"), ("weight",)),
    Rule("over-confidence", f"greedy answers are right less often, while the reward accuracy is {SURE} or more",
         lambda of: of.falls("change of answer accuracy") and of.of("reward accuracy") >= SURE,
         ("change of answer accuracy", "reward accuracy")),
    Rule("wrong answers", f"greedy answers are right less often, and the reward accuracy is below {SURE} or not there",
         lambda of: of.falls("change of answer accuracy") and not of.of("reward accuracy") >= SURE,
         ("change of answer accuracy",)),
    Rule("breaking off", f"greedy answers that end without an answer become more frequent, by {SILENT} or more",
         lambda of: of.rises("change of answers without one", SILENT),
         ("change of answers without one", "change of answer length")),
    Rule("collapse", f"the repetition rate of greedy answers rises by {LOOPS} or more",
         lambda of: of.rises("change of repetition", LOOPS), ("change of repetition",)),
    Rule("healthy", f"none of these, chosen's log-prob does not fall, its interval lies above -{NOTABLE} nats a token, "
         f"and it or the gap to rejected rises, by {NOTABLE} or more",
         lambda of: not of.falls("change of chosen") and of.of("change of chosen", "low") > -NOTABLE
         and any(of.rises(name, NOTABLE) for name in BOTH), BOTH, alone=True),
    Rule("wider gap", f"the gap of chosen to rejected rises, by {NOTABLE} nats a token or more, and chosen's log-prob "
         "falls by less, or may fall", lambda of: of.rises("change of gap", NOTABLE), BOTH, alone=True),
    Rule("no notable change", f"none of these, and the intervals of both changes lie between -{NOTABLE} and {NOTABLE} "
         "nats a token", lambda of: all(-NOTABLE < of.of(name, "low") and of.of(name, "high") < NOTABLE
                                        for name in BOTH if name in of or name != "change of gap"), BOTH, alone=True),
    Rule("unclear", "none of these: the changes may be notable or not", lambda of: True, BOTH, alone=True)]

# A number in words; the names in braces are the fields that `_phrase` fills in.
WORDS = {"change of chosen": "chosen {change} nats a token", "change of chosen there": "in {there} {change}",
         "change of argmax there": "argmax token {change} nats a token in {there}",
         "implausible mass": "along chosen and rejected, probability of implausible tokens grew to {ratio:.3g} "
                             "times the start's ({start:.2g} -> {mean:.2g})",
         "change of gap": "gap of chosen to rejected {change} nats a token",
         "weight": "a pair's weight in the loss is {ratio:.2g} of the start's ({start:.2g} -> {mean:.2g})",
         "change of answer accuracy": "right answers {counts}, change {change}",
         "reward accuracy": "reward accuracy {level}",
         "change of answers without one": "share of answers that stop before they answer {change}",
         "change of answer length": "length {change} tokens",
         "change of repetition": "share of repeated word groups in answers {change}"}
STANDARD = {*WORDS, *FALLING, "change of shuffled", "change of implausible mass"}  # all others: own responses


def judge(scores: pandas.DataFrame, pairs: pandas.DataFrame, answers: pandas.DataFrame, tenths: pandas.DataFrame,
          recipes: dict[str, tuple[str, int]] | None = None, noises: dict[str, dict] | None = None,
          rising: pandas.DataFrame | None = None) -> list[dict]:
    """A verdict for each run and data set with two checkpoints or more: names, numbers, rules, and a sentence. Then one
    for each group of runs that differ in their seed alone.

    `tenths`: lines of the chosen responses' tenths, row by row. `recipes`: of runs by name, what they were made with
    beside their seed, and the seed (runs.py). `noises`: of runs in bfloat16 by name, what rounding alone does to one
    pair's metrics, nats (run/noise.py). `rising`: lines of risers.csv, where there are some; over all rows.
    """
    found = []
    for (run, phase, dataset), table in scores.groupby(["run", "phase", "dataset"], sort=False):
        first, last = table["step"].min(), table["step"].max()
        if first == last:
            continue
        here = [part[(part["run"] == run) & (part["dataset"] == dataset)] if len(part) else part
                for part in (pairs, answers, tenths)]
        place, there = worst_tenth(here[2], first, last)
        numbers = of_scores(table, first, last) | there | of_pairs(here[0], last, phase)
        numbers |= of_answers(here[1], first, last)
        numbers = {name: {key: int(value) if key in ("n", "problems") else float(value) for key, value in stats.items()}
                   | {"over": _over(stats)} for name, stats in numbers.items() if stats["n"]}
        _add_noise(numbers, (noises or {}).get(run, {}))
        rows = next(iter(numbers.values()), {"over": "no rows of one run"})["over"]
        line = {"run": run, "phase": phase, "dataset": dataset, "first": int(first), "last": int(last), "over": rows,
                "there": place if "change of chosen there" in numbers else None}
        found.append(_named(line | {"risers": _risers(rising, [line]), "numbers": numbers}))
    return found + _over_seeds(found, recipes or {}, rising)


def _add_noise(numbers: dict[str, dict], noise: dict[str, float]) -> None:
    """Gives changes of log-probs their "noise": twice the standard deviation that rounding alone gives such a mean."""
    sides = {side: noise.get(f"logps_per_token/{side}") for side in ("chosen", "rejected")}
    of = {f"change of {side}": value for side, value in sides.items()}
    of["change of gap"] = None if None in sides.values() else math.hypot(*sides.values())
    for name in (name for name, value in of.items() if value and name in numbers):
        numbers[name]["noise"] = 2 * of[name] / math.sqrt(numbers[name]["n"])


def _risers(rising: pandas.DataFrame | None, lines: list[dict]) -> str | None:
    """The tokens that gained most along chosen, each run's there, and by how much, in words. Of several runs those that
    are among the first of each, by their means; None where the risers of one are not known."""
    tables = []
    for line in lines:
        here = {"run": line["run"], "dataset": line["dataset"], "step": line["last"], "response": "chosen",
                "section": line["there"]}
        if rising is None or not len(rising) or not (its := (rising[[*here]] == pandas.Series(here)).all(axis=1)).any():
            return None
        tables.append(rising[its & (rising["place"] > 0)])
    tokens = pandas.concat(tables).groupby("id").agg(token=("token", "first"), change=("change", "mean"),
                                                     runs=("change", "size"))
    tokens = tokens[tokens["runs"] == len(lines)].sort_values("change", ascending=False, kind="stable")
    return risers.top(tokens.assign(place=np.arange(1, len(tokens) + 1)), 1, RISERS) or "none"


def _over_seeds(lines: list[dict], recipes: dict, rising: pandas.DataFrame | None) -> list[dict]:
    """A line for each group of lines of one recipe, with two seeds or more; a number is over the runs' means."""
    groups = {}
    for line in (line for line in lines if line["run"] in recipes):
        key = recipes[line["run"]][0], line["phase"], line["dataset"], line["first"], line["last"]
        groups.setdefault(key, []).append(line)
    found = []
    for (_, phase, dataset, first, last), group in groups.items():
        names = [line["run"] for line in group]
        if len(group) < 2 or len({recipes[name][1] for name in names}) < len(group):  # one seed twice says nothing new
            continue
        over = f"{len(group)} runs of one recipe"
        shared = [name for name in group[0]["numbers"] if all(name in line["numbers"] for line in group)]
        numbers = {name: over_runs([line["numbers"][name] for line in group], COUNTS.get(name)) | {"over": over}
                   for name in shared}
        for name, stats in numbers.items():
            if any(each := [line["numbers"][name].get("noise", 0.0) for line in group]):
                stats["noise"] = of_seeds(each)
        place = " or ".join(dict.fromkeys(line["there"] for line in group if line["there"])) or None
        found.append(_named({"runs": names, "phase": phase, "dataset": dataset, "first": first, "last": last,
                             "over": over, "there": place, "risers": _risers(rising, group), "numbers": numbers}))
    return found


def _named(line: dict) -> dict:
    """The line with the names of the rules that fire, their words, and the verdict as a sentence."""
    numbers = Numbers(line["numbers"])
    rules = [rule for rule in RULES if not rule.alone and rule.fires(numbers)]
    rules = rules or [next(rule for rule in RULES if rule.alone and rule.fires(numbers))]
    line = line | {"names": [rule.name for rule in rules], "rules": {rule.name: rule.words for rule in rules}}
    head, *parts = _words(line)
    return line | {"text": f"{head}: {'; '.join(parts)}"}


def show(line: dict) -> str:
    """A verdict for the screen: a heading, and a line for each name with its numbers."""
    head, *parts = _words(line)
    return "\n    ".join([f"{head}:", *parts])


def _words(line: dict) -> list[str]:
    """A heading (run, data set, steps, rows), then each of the verdict's names with the numbers behind it, and how far
    responses moved that no rule is about: columns of the user's own, the model's greedy answer."""
    who = line["run"] if "run" in line else ", ".join(line["runs"])
    words = [f"{who} on {line['dataset']}, step {line['first']} to {line['last']}, over {line['over']}"]
    for rule in (rule for rule in RULES if rule.name in line["names"]):
        shown = [_phrase(name, Numbers(line["numbers"]), line) for name in rule.shown if name in line["numbers"]]
        if rule.name == "squeezing" and line.get("risers"):
            where = "there" if "run" in line else "there in every run"
            shown.append(f"tokens that gained most probability {where}: {line['risers']}")
        words.append(f"{rule.name} ({'; '.join(shown)})" if shown else rule.name)
    own = [f"{name.removeprefix('change of ')} {_number(stats, '+')}" for name, stats in line["numbers"].items()
           if name.startswith("change of ") and name not in STANDARD]
    return words + [f"besides, {', '.join(own)} nats a token"] * bool(own)


def _over(stats: dict) -> str:
    """The rows that an interval is over, in words."""
    rows = f"{stats['n']} row{'s' * (stats['n'] > 1)}"
    return rows + f" ({stats['problems']} problems)" * (stats["problems"] < stats["n"]) + " of one run"


def _phrase(name: str, numbers: Numbers, line: dict) -> str:
    """A number of the line in words, with its interval; and over what, where that is not what the line says."""
    stats, start = numbers[name], numbers.of(f"{name} at the start")
    ratio = numbers.of(name) / start if start else math.nan
    ends = [numbers.of(what) for what in ("right answers at the start", "right answers")]
    asked = numbers.get("right answers", {}).get("n", 0)
    counts = [f"{end * asked:.0f} of {asked}" if "run" in line else f"{end:.3g}" for end in ends]
    text = WORDS[name].format(change=_number(stats, "+"), level=_number(stats), mean=stats["mean"], start=start,
                              there=line["there"], ratio=ratio, counts=" -> ".join(counts))
    if numbers.is_noise(name):
        text += f", within bfloat16's noise of {stats['noise']:.2g}"
    rows, problems = stats["n"], stats.get("problems", stats["n"])
    over = f"{problems} problems" if problems < rows else f"{rows} rows"
    return text + f", over {over}" * (stats["over"] != line["over"])


def _number(stats: dict, sign: str = "") -> str:
    mean, low, high = (format(stats.get(name, math.nan), f"{sign}.3g") for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" if math.isfinite(stats.get("low", math.nan)) else mean
