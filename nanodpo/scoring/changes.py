"""The numbers of a verdict: how a run's log-probs, pairs and answers changed from its first to its last checkpoint.

"There" is the tenth of the chosen responses from which most log-prob went: where a model breaks at one place, a mean
over all tokens hides it. One half of the problems chooses the tenth, the other half tells its numbers. Chosen and told
by the same rows, the worst of ten would seem to fall where nothing but noise moved.
"""

import numpy as np
import pandas

from .estimates import ROW, at_both, change, change_of_share, mean, share


def of_scores(table: pandas.DataFrame, first, last) -> dict[str, dict]:
    """How far each response moved, and the gap, nats a token; the implausible tokens' probability."""
    sides = {kind: part for kind, part in table.groupby("response")}
    numbers = {f"change of {kind}": change(part, "mean_logps", first, last) for kind, part in sides.items()}
    if {"chosen", "rejected"} <= sides.keys():
        columns = ["mean_logps", "implausible_mass", "implausible_mass_start"]
        chosen, rejected = (sides[kind].set_index([*ROW, "step"])[columns] for kind in ("chosen", "rejected"))
        numbers["change of gap"] = change((chosen - rejected).reset_index(), "mean_logps", first, last)
        # What the end gives the tokens that are implausible to either, and what the start gave the same tokens.
        ends = ((chosen + rejected)[columns[1:]] / 2).xs(last, level="step").dropna()
        now, before = (ends[name] for name in columns[1:])
        numbers |= {"implausible mass": mean(now), "implausible mass at the start": mean(before),
                    "change of implausible mass": mean(now - before)}
    return numbers


def worst_tenth(tenths: pandas.DataFrame, first, last) -> tuple[str | None, dict[str, dict]]:
    """(the tenth of chosen from which most log-prob went, its numbers); see `choose_place`."""
    if not len(tenths) or not {first, last} <= set(tenths["step"]):
        return None, {}
    columns = {"chosen": "mean_logps", "argmax": "argmax_logps"}
    wide = tenths.pivot(index=ROW, columns=["step", "section"], values=["tokens", *columns.values()])
    moved = {name: wide[column, last] - wide[column, first] for name, column in columns.items()}
    lost = moved["chosen"] * wide["tokens", last]
    problems = lost.index.get_level_values("problem").to_numpy()
    place, telling = choose_place(lost.to_numpy(), problems)
    section = lost.columns[place]
    return section, {f"change of {name} there": mean(change[section][telling]) for name, change in moved.items()}


def choose_place(lost: np.ndarray, problems: np.ndarray) -> tuple[int, np.ndarray]:
    """(rows, places) nats by which the log-prob changed, NaN where that is not known, and (rows,) the rows' problems ->
    the place that lost most in every other problem, and which rows are of the rest."""
    choosing = np.isin(problems, np.unique(problems)[::2])  # hashes: their order has nothing to do with the rows
    return int(np.nansum(lost[choosing], axis=0).argmin()), ~choosing


def of_pairs(pairs: pandas.DataFrame, last, phase: str) -> dict[str, dict]:
    """Reward accuracy at the end, and for dpo a pair's weight in the loss at start and end; nothing of sft."""
    if phase in ("", "sft") or not len(pairs):
        return {}
    numbers, end = {}, pairs[pairs["step"] == last].set_index(ROW)
    if phase == "dpo":  # other losses weigh a pair differently
        # Rejected's: chosen's has the part of --sft_weight in it.
        numbers = {"weight": mean(end["weights/rejected"]),
                   "weight at the start": mean(pairs[pairs["step"] == 0].set_index(ROW)["weights/rejected"])}
    return numbers | {"reward accuracy": share(end["margin"].dropna() > 0)}


def of_answers(answers: pandas.DataFrame, first, last) -> dict[str, dict]:
    """Of greedy answers the right ones, those that stop without an answer, lengths and repetition; of rows that were
    answered at both steps."""
    if not len(answers) or not len(answers := at_both(answers, first, last)):
        return {}
    # An answer that reached --max_new_tokens has not stopped.
    answers = answers.assign(silent=answers["found"].isna() & answers["ended"].astype(bool))
    right = {name: share(answers[answers["step"] == step].set_index(ROW)["correct"])
             for name, step in (("right answers at the start", first), ("right answers", last))}
    return right | {"change of answer accuracy": change_of_share(answers, "correct", first, last),
                    "change of answers without one": change_of_share(answers, "silent", first, last),
                    "change of answer length": change(answers, "tokens", first, last),
                    "change of repetition": change(answers, "repetition", first, last)}
