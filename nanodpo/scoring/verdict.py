"""What became of a run, in names and numbers: simple rules over the first and the last checkpoint that were scored.

A number is a mean over rows with its 95% interval (estimates.py); a change is taken row by row. A rise is a change
whose interval lies above 0, a fall one whose interval lies below. NOTABLE keeps the names for what matters: with many
rows the interval of any change leaves 0 out. "There" is the tenth of the chosen responses from which most log-prob
went: where a model breaks at one place, a mean over all tokens hides it.
"""

import math

import pandas

from .estimates import change, change_of_share, mean, share

NOTABLE = 0.01  # nats a token: one percent of a token's probability
SPREAD = 3  # times the implausible mass of the start; what SFT moves to a new style is mostly below twice
SATURATED = 0.1  # of the loss's gradient; it starts with half
SURE = 0.9  # reward accuracy of a run that believes in itself
LOOPS = 0.1  # rise of the repetition rate
SILENT = 0.1  # rise of the share of answers that give no answer

RULES = {
    "displacement": f"the chosen responses' log-prob falls, by {NOTABLE} nats a token or more",
    "squeezing": f"chosen, rejected and, where scored, other responses fall, and there, where chosen loses most, the "
                 f"argmax token's log-prob rises by {NOTABLE} nats a token or more",
    "spreading": "the probability of tokens that the start gave less than 0.001, along chosen and rejected, rises to "
                 f"{SPREAD} times or more",
    "narrowing": f"the gap of chosen to rejected falls, by {NOTABLE} nats a token or more",
    "saturation": f"the weight that the dpo loss still gives a pair, sigma(-margin) less the label smoothing, is below "
                  f"{SATURATED}; without smoothing it starts at 0.5",
    "over-confidence": f"greedy answers are right less often, while the reward accuracy is {SURE} or more",
    "wrong answers": "greedy answers are right less often, and the reward accuracy is lower than that or not there",
    "breaking off": f"greedy answers that end without an answer become more frequent, by {SILENT} or more",
    "collapse": f"the repetition rate of greedy answers rises by {LOOPS} or more",
    "healthy": f"none of these, and chosen's log-prob or the gap to rejected rises, by {NOTABLE} nats a token or more",
}


def judge(scores: pandas.DataFrame, pairs: pandas.DataFrame, answers: pandas.DataFrame,
          tenths: pandas.DataFrame) -> list[dict]:
    """A verdict for each run and data set with two checkpoints or more: names, numbers, rules, and a sentence.

    `tenths`: lines of the chosen responses' tenths, row by row.
    """
    found = []
    for (run, phase, dataset), table in scores.groupby(["run", "phase", "dataset"], sort=False):
        first, last = table["step"].min(), table["step"].max()
        if first == last:
            continue
        here = [part[(part["run"] == run) & (part["dataset"] == dataset)] if len(part) else part
                for part in (pairs, answers, tenths)]
        place, there = _place(here[2], first, last)
        numbers = _of_scores(table, first, last) | there | _of_pairs(here[0], last, phase) | _of_answers(
            here[1], first, last)
        numbers = {name: {key: int(value) if key == "n" else float(value) for key, value in stats.items()}
                   for name, stats in numbers.items() if stats["n"]}
        names = [name for name in RULES if name != "healthy" and _fires(name, numbers)]
        rose = any(_low(numbers, name) > 0 and _mean(numbers, name) >= NOTABLE
                   for name in ("change of chosen", "change of gap"))
        names = names or ["healthy"] * rose or ["no change"]
        line = {"run": run, "phase": phase, "dataset": dataset, "first": int(first), "last": int(last), "there": place,
                "names": names, "numbers": numbers, "rules": {name: RULES[name] for name in names if name in RULES}}
        found.append(line | {"text": _sentence(line)})
    return found


def _of_scores(table, first, last) -> dict[str, dict]:
    sides = {kind: part for kind, part in table.groupby("response")}
    numbers = {f"change of {kind}": change(part, "mean_logps", first, last) for kind, part in sides.items()}
    if {"chosen", "rejected"} <= sides.keys():
        gaps = [sides[kind].set_index(["row", "step"])["mean_logps"] for kind in ("chosen", "rejected")]
        numbers["change of gap"] = change((gaps[0] - gaps[1]).reset_index(), "mean_logps", first, last)
        mass = [sides[kind].set_index(["row", "step"])["implausible_mass"] for kind in ("chosen", "rejected")]
        wide = ((mass[0] + mass[1]) / 2).unstack("step")
        if {first, last} <= set(wide):
            wide = wide[[first, last]].dropna()  # a row without one of the four numbers is in neither mean
            numbers["change of implausible mass"] = mean(wide[last] - wide[first])
            if wide[first].mean() > 0:
                times = {"mean": wide[last].mean() / wide[first].mean(), "n": len(wide)}
                numbers["implausible mass, times the start's"] = times
    return numbers


def _place(tenths, first, last) -> tuple[str | None, dict[str, dict]]:
    """(the tenth of chosen from which most log-prob went, its numbers)."""
    if not len(tenths) or not {first, last} <= set(tenths["step"]):
        return None, {}
    total = tenths.assign(logps=tenths["mean_logps"] * tenths["tokens"])
    total = total.groupby(["section", "step"])["logps"].sum().unstack("step")
    place = (total[last] - total[first]).idxmin()
    here = tenths[tenths["section"] == place]
    return place, {f"change of {name} there": change(here, column, first, last)
                   for name, column in (("chosen", "mean_logps"), ("argmax", "argmax_logps"))}


def _of_pairs(pairs, last, phase: str) -> dict[str, dict]:
    if phase in ("", "sft") or not len(pairs):
        return {}
    end = pairs[pairs["step"] == last]
    weight = {"weight": mean(end["weight"])} if phase == "dpo" else {}  # other losses weigh a pair otherwise
    return weight | {"reward accuracy": share(end["margin"].dropna() > 0)}


def _of_answers(answers, first, last) -> dict[str, dict]:
    if not len(answers):
        return {}
    silent = answers.assign(silent=answers["found"].isna())
    return {"change of answer accuracy": change_of_share(answers, "correct", first, last),
            "change of answers without one": change_of_share(silent, "silent", first, last),
            "change of answer length": change(answers, "tokens", first, last),
            "change of repetition": change(answers, "repetition", first, last)}


def _low(numbers: dict, name: str) -> float:
    return numbers.get(name, {}).get("low", -math.inf)


def _high(numbers: dict, name: str) -> float:
    return numbers.get(name, {}).get("high", math.inf)


def _mean(numbers: dict, name: str) -> float:
    return numbers.get(name, {}).get("mean", math.nan)


def _falls(numbers: dict, name: str, by: float = 0.0) -> bool:
    return _high(numbers, name) < 0 and _mean(numbers, name) <= -by


def _rises(numbers: dict, name: str, by: float = 0.0) -> bool:
    return _low(numbers, name) > 0 and _mean(numbers, name) >= by


def _fires(name: str, numbers: dict) -> bool:
    """Does the rule name what these numbers say? Never, where a number that it asks for is missing."""
    if name == "displacement":
        return _falls(numbers, "change of chosen", NOTABLE)
    if name == "squeezing":
        sides = ["chosen", "rejected", *(["other"] if "change of other" in numbers else [])]
        return (all(_falls(numbers, f"change of {side}") for side in sides)
                and _rises(numbers, "change of argmax there", NOTABLE))
    if name == "spreading":
        return (_rises(numbers, "change of implausible mass")
                and _mean(numbers, "implausible mass, times the start's") >= SPREAD)
    if name == "narrowing":
        return _falls(numbers, "change of gap", NOTABLE)
    if name == "saturation":
        return _high(numbers, "weight") < SATURATED
    if name in ("over-confidence", "wrong answers"):
        sure = _mean(numbers, "reward accuracy") >= SURE
        return _falls(numbers, "change of answer accuracy") and sure == (name == "over-confidence")
    if name == "breaking off":
        return _rises(numbers, "change of answers without one", SILENT)
    return _rises(numbers, "change of repetition", LOOPS)


SHOWN = {"displacement": ["change of chosen", "change of chosen there"],
         "squeezing": ["change of argmax there"], "spreading": ["implausible mass, times the start's"],
         "narrowing": ["change of gap"], "saturation": ["weight"],
         "over-confidence": ["change of answer accuracy", "reward accuracy"],
         "wrong answers": ["change of answer accuracy"],
         "breaking off": ["change of answers without one", "change of answer length"],
         "collapse": ["change of repetition"], "healthy": ["change of chosen", "change of gap"],
         "no change": ["change of chosen", "change of gap"]}


def _sentence(line: dict) -> str:
    """The verdict in words, each name with its numbers."""
    parts = []
    for name in line["names"]:
        shown = [f"{what} {_number(line['numbers'][what], what)}" for what in SHOWN[name] if what in line["numbers"]]
        parts.append(f"{name} ({', '.join(shown)})" if shown else name)
    text = f"{line['run']} on {line['dataset']}, step {line['first']} to {line['last']}: {'; '.join(parts)}"
    return text.replace(" there ", f" in {line['there']} ")


def _number(stats: dict, what: str) -> str:
    sign = "+" if what.startswith("change") else ""
    mean, low, high = (format(stats.get(name, math.nan), f"{sign}.3g") for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" if math.isfinite(stats.get("low", math.nan)) else mean
