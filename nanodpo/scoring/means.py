"""Tables made of tables: rewards of pairs, means over rows with their errors. Log-probs are in nats."""

import os

import numpy as np
import pandas

from ..stats import over_problems

KEYS = ["run", "phase", "checkpoint", "step", "dataset"]
MEASURES = ["argmax_logps", "entropy", "argmax_mass", "implausible_mass", "implausible_mass_start", "accuracy"]


def add_rewards(pairs: pandas.DataFrame, scores: pandas.DataFrame, runs: dict) -> pandas.DataFrame:
    """The pairs with the rewards that training has, against each run's reference, and with their weights. The reference
    is the run's own step 0, or the model of its --reference where that was scored on the same rows; else they are
    missing.

    `runs` are the settings of each run by name: beta, loss, label_smoothing and reference.
    """
    if pairs.empty:
        return pairs
    at, betas = ["run", "dataset", "row"], {run: settings.beta for run, settings in runs.items()}
    starts = _references(scores, runs)
    for side in ("chosen", "rejected"):
        here = scores[scores["response"] == side]
        start = starts[starts["response"] == side].set_index(at)["logps"].rename("start")
        joined = here.join(start, on=at).set_index([*at, "step"])
        reward = (joined["logps"] - joined["start"]) * joined.index.get_level_values("run").map(betas)
        pairs = pairs.join(reward.rename(f"rewards/{side}"), on=[*at, "step"])
    pairs["margin"] = pairs["rewards/chosen"] - pairs["rewards/rejected"]
    pairs["weight"] = np.nan
    for run, settings in runs.items():
        here = pairs["run"] == run
        pairs.loc[here, "weight"] = pair_weight(settings.loss, settings.label_smoothing, pairs["margin"][here])
    return pairs


def _references(scores: pandas.DataFrame, runs: dict) -> pandas.DataFrame:
    """The scores of each run's reference, under the name of that run."""
    other = {run: os.path.realpath(settings.reference) for run, settings in runs.items() if settings.reference}
    own = scores[(scores["step"] == 0) & ~scores["run"].isin(other)]
    places = scores["checkpoint"].map({path: os.path.realpath(path) for path in scores["checkpoint"].unique()})
    return pandas.concat([own, *(scores[places == place].assign(run=run) for run, place in other.items())])


def pair_weight(loss: str, smoothing: float, margin) -> np.ndarray:
    """-d loss / d margin, margins being of rewards: how hard the loss still pushes a pair apart; below 0, together.

    Missing for every loss that is no function of this margin: ipo, whose margin is one of means over tokens, and sft.
    """
    margin = np.asarray(margin, dtype=float)
    with np.errstate(invalid="ignore"):  # a missing margin has a missing weight
        wrong = np.exp(-np.logaddexp(0, margin))  # sigma(-margin)
    if loss == "dpo":
        return wrong - smoothing  # (1-e) sigma(-margin) - e sigma(margin)
    if loss == "robust":
        return wrong + smoothing / (1 - 2 * smoothing)  # ((1-e) sigma(-margin) + e sigma(margin)) / (1-2e)
    if loss == "hinge":
        return np.where(np.isnan(margin), np.nan, margin < 1)
    return np.full_like(margin, np.nan)


def summary(table: pandas.DataFrame, answers: pandas.DataFrame | None = None) -> pandas.DataFrame:
    """n, problems, mean, median and standard error of mean_logps over rows of one run, means of the measures; likewise
    of the gap. Where checkpoints answered, how many greedy answers there are and how many are right, in each line."""
    sides = table.pivot(index=[*KEYS, "row", "problem"], columns="response", values="mean_logps")
    if {"chosen", "rejected"} <= set(sides):
        gap = (sides["chosen"] - sides["rejected"]).dropna().reset_index(name="mean_logps").assign(response="gap")
        table = pandas.concat([table, gap], ignore_index=True)
    found = means(table, [*KEYS, "response"]).sort_values(["run", "dataset", "step"], kind="stable", ignore_index=True)
    if answers is None or answers.empty:
        return found
    counts = answers.groupby(KEYS)["correct"].agg(right_answers="sum", answers="count")
    return found.join(counts.astype("Int64"), on=KEYS)


def means(table: pandas.DataFrame, keys: list[str]) -> pandas.DataFrame:
    """n, problems, mean, median, standard error of mean_logps and the means of the measures, in each group."""
    groups, found = table.groupby(keys, sort=False), over_problems(table, keys, "mean_logps").set_index(keys)
    found["median"] = groups["mean_logps"].median()
    found = found[["n", "problems", "mean", "median", "sem"]]
    return found.join(groups[[name for name in MEASURES if name in table]].mean()).reset_index()


def show(table: pandas.DataFrame) -> str:
    """A summary for the screen, and below it what its columns are."""
    keys = ["run", "step", "dataset"]
    shown = table.pivot_table(index=keys, columns="response", values="mean", sort=False)
    shown = shown.map(lambda value: "" if np.isnan(value) else f"{value:.4f}")
    least, most = table["n"].min(), table["n"].max()
    notes = [f"mean log-prob, nats a token, over {least if least == most else f'{least} to {most}'} rows of one run"]
    along = table[table["response"] == "chosen"].set_index(keys).reindex(shown.index)
    if along["implausible_mass"].notna().any():
        shown["implausible"] = [f"{start:.2g} -> {here:.2g}" if here == here else "" for start, here in
                                zip(along["implausible_mass_start"], along["implausible_mass"])]
        notes.append("implausible: along chosen, the probability of tokens that step 0 or this step gives less than "
                     "0.001, at step 0 -> here")
    if "answers" in table:
        counts = table.drop_duplicates(keys).set_index(keys).reindex(shown.index)
        shown["right answers"] = ["" if pandas.isna(asked) else f"{right} of {asked}" for right, asked in
                                  zip(counts["right_answers"], counts["answers"])]
    return "\n".join([shown.to_string(), *(f"({note})" for note in notes)])
