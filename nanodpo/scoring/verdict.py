"""What became of a run, in names and numbers: simple rules over the first and the last checkpoint that were scored.

A number is a mean over rows with its 95% interval, mean +- Student's t standard errors, Wilson's for an accuracy (JASA
22, 1927); a change is taken row by row. A rise
is a change whose interval lies above 0, a fall one whose interval lies below. NOTABLE keeps the names for what matters:
with many rows the interval of any change leaves 0 out.
"""

import math

import pandas

from ..student import t_quantile

NOTABLE = 0.01  # nats a token: one percent of a token's probability
SPREAD = 3  # times the implausible mass of the start; what SFT moves to a new style is mostly below twice
SATURATED = 0.1  # of the loss's gradient; it starts with half
SURE = 0.9  # reward accuracy of a run that believes in itself
LOOPS = 0.1  # rise of the repetition rate

RULES = {
    "displacement": f"the chosen responses' log-prob falls, by {NOTABLE} nats a token or more",
    "squeezing": f"the argmax token's log-prob along chosen rises by {NOTABLE} nats or more, while chosen, rejected "
                 "and, where scored, other responses fall",
    "spreading": "the probability of tokens that the start gave less than 0.001, along chosen and rejected, rises to "
                 f"{SPREAD} times or more",
    "narrowing": f"the gap of chosen to rejected falls, by {NOTABLE} nats a token or more",
    "saturation": f"sigma(-margin), the weight that the dpo loss still gives a pair, is below {SATURATED} (it starts "
                  "at 0.5)",
    "over-confidence": f"greedy answers are right less often, while the reward accuracy is {SURE} or more",
    "collapse": f"the repetition rate of greedy answers rises by {LOOPS} or more",
    "healthy": "none of these, and the chosen responses' log-prob or the gap to the rejected rises",
}


def judge(scores: pandas.DataFrame, pairs: pandas.DataFrame, answers: pandas.DataFrame) -> list[dict]:
    """A verdict for each run and data set with two checkpoints or more: names, numbers, rules, and a sentence."""
    found = []
    for (run, phase, dataset), table in scores.groupby(["run", "phase", "dataset"], sort=False):
        first, last = table["step"].min(), table["step"].max()
        if first == last:
            continue
        here = [part[(part["run"] == run) & (part["dataset"] == dataset)] if len(part) else part
                for part in (pairs, answers)]
        numbers = _numbers(table, *here, first, last, phase)
        names = [name for name in RULES if name != "healthy" and _fires(name, numbers)]
        rose = any(_low(numbers, name) > 0 for name in ("change of chosen", "change of gap"))
        names = names or ["healthy"] * rose or ["no change"]
        line = {"run": run, "phase": phase, "dataset": dataset, "first": int(first), "last": int(last), "names": names,
                "numbers": numbers, "rules": {name: RULES[name] for name in names if name in RULES}}
        found.append(line | {"text": _sentence(line)})
    return found


def _numbers(table, pairs, answers, first, last, phase: str) -> dict[str, dict]:
    """{what: {"mean", "low", "high", "n"}} of everything that a rule asks for and that was scored."""
    sides = {kind: part for kind, part in table.groupby("response")}
    numbers = {}
    for kind in sides:
        numbers[f"change of {kind}"] = _change(sides[kind], "mean_logps", first, last)
    if "chosen" in sides:
        numbers["change of argmax"] = _change(sides["chosen"], "argmax_logps", first, last)
    if {"chosen", "rejected"} <= sides.keys():
        gaps = [sides[kind].set_index(["row", "step"])["mean_logps"] for kind in ("chosen", "rejected")]
        numbers["change of gap"] = _change((gaps[0] - gaps[1]).reset_index(), "mean_logps", first, last)
        both = table[table["response"].isin(["chosen", "rejected"])]
        mass = both.groupby(["row", "step"])["implausible_mass"].mean().reset_index()
        numbers["change of implausible mass"] = _change(mass, "implausible_mass", first, last)
        means = mass.groupby("step")["implausible_mass"].mean()
        if means[first] > 0:
            times = {"mean": means[last] / means[first], "n": mass["row"].nunique()}
            numbers["implausible mass, times the start's"] = times
    if phase not in ("", "sft") and len(pairs):
        end = pairs[pairs["step"] == last]
        if phase == "dpo":  # other losses weigh a pair otherwise
            numbers["weight"] = _stats(end["weight"])
        numbers["reward accuracy"] = _share(end["margin"].dropna() > 0)
    if len(answers):
        for name, column in (("change of answer accuracy", "correct"), ("change of repetition", "repetition")):
            numbers[name] = _change(answers.assign(value=answers[column].astype(float)), "value", first, last)
    return {name: {key: int(value) if key == "n" else float(value) for key, value in stats.items()}
            for name, stats in numbers.items() if stats["n"]}


def _change(table, column: str, first, last) -> dict:
    wide = table.pivot(index="row", columns="step", values=column)
    return _stats(wide[last] - wide[first]) if {first, last} <= set(wide) else _stats(pandas.Series(dtype=float))


def _stats(values: pandas.Series) -> dict:
    values = values.dropna()
    mean, reach = values.mean(), t_quantile(len(values) - 1) * values.sem()
    if len(values) < 2:  # a single row has no interval
        return {"mean": mean, "n": len(values)}
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "n": len(values)}


def _share(hits: pandas.Series) -> dict:
    """A share of rows with Wilson's interval, which stays between 0 and 1 and has a width at either end."""
    n = len(hits)
    if not n:
        return {"mean": math.nan, "n": 0}
    share, z = hits.mean(), 1.959964
    centre, reach = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = ((centre + side * reach) / (1 + z * z / n) for side in (-1, 1))
    return {"mean": share, "low": low, "high": high, "n": n}


def _low(numbers: dict, name: str) -> float:
    return numbers.get(name, {}).get("low", -math.inf)


def _high(numbers: dict, name: str) -> float:
    return numbers.get(name, {}).get("high", math.inf)


def _mean(numbers: dict, name: str) -> float:
    return numbers.get(name, {}).get("mean", math.nan)


def _fires(name: str, numbers: dict) -> bool:
    """Does the rule name what these numbers say? Never, where a number that it asks for is missing."""
    falls = {kind: _high(numbers, f"change of {kind}") < 0 for kind in ("chosen", "rejected", "other")
             if kind != "other" or "change of other" in numbers}
    if name == "displacement":
        return falls["chosen"] and _mean(numbers, "change of chosen") <= -NOTABLE
    if name == "squeezing":
        return (all(falls.values()) and _low(numbers, "change of argmax") > 0
                and _mean(numbers, "change of argmax") >= NOTABLE)
    if name == "spreading":
        return (_low(numbers, "change of implausible mass") > 0
                and _mean(numbers, "implausible mass, times the start's") >= SPREAD)
    if name == "narrowing":
        return _high(numbers, "change of gap") < 0 and _mean(numbers, "change of gap") <= -NOTABLE
    if name == "saturation":
        return _high(numbers, "weight") < SATURATED
    if name == "over-confidence":
        return _high(numbers, "change of answer accuracy") < 0 and _mean(numbers, "reward accuracy") >= SURE
    return _low(numbers, "change of repetition") > 0 and _mean(numbers, "change of repetition") >= LOOPS


SHOWN = {"displacement": ["change of chosen"], "squeezing": ["change of argmax", "change of chosen"],
         "spreading": ["implausible mass, times the start's"], "narrowing": ["change of gap"], "saturation": ["weight"],
         "over-confidence": ["change of answer accuracy", "reward accuracy"], "collapse": ["change of repetition"],
         "healthy": ["change of chosen", "change of gap"], "no change": ["change of chosen", "change of gap"]}


def _sentence(line: dict) -> str:
    """The verdict in words, each name with its numbers."""
    parts = []
    for name in line["names"]:
        shown = [f"{what} {_number(line['numbers'][what], what)}" for what in SHOWN[name] if what in line["numbers"]]
        parts.append(f"{name} ({', '.join(shown)})" if shown else name)
    return f"{line['run']} on {line['dataset']}, step {line['first']} to {line['last']}: {'; '.join(parts)}"


def _number(stats: dict, what: str) -> str:
    sign = "+" if what.startswith("change") else ""
    mean, low, high = (format(stats.get(name, math.nan), f"{sign}.3g") for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" if math.isfinite(stats.get("low", math.nan)) else mean
