"""Tables made of tables: rewards of pairs, means over rows with their errors. Log-probs are in nats."""

import numpy as np
import pandas

KEYS = ["run", "phase", "checkpoint", "step", "dataset"]
MEASURES = ["argmax_logps", "entropy", "argmax_mass", "implausible_mass", "accuracy"]


def add_rewards(pairs: pandas.DataFrame, scores: pandas.DataFrame, betas: dict[str, float]) -> pandas.DataFrame:
    """The pairs with the rewards that training has, against each run's own step 0."""
    if pairs.empty:
        return pairs
    at = ["run", "dataset", "row"]
    for side in ("chosen", "rejected"):
        here = scores[scores["response"] == side]
        start = here[here["step"] == 0].set_index(at)["logps"].rename("start")
        joined = here.join(start, on=at).set_index([*at, "step"])
        reward = (joined["logps"] - joined["start"]) * joined.index.get_level_values("run").map(betas)
        pairs = pairs.join(reward.rename(f"rewards/{side}"), on=[*at, "step"])
    pairs["margin"] = pairs["rewards/chosen"] - pairs["rewards/rejected"]
    with np.errstate(invalid="ignore"):  # a missing margin has a missing weight
        pairs["weight"] = np.exp(-np.logaddexp(0, pairs["margin"]))
    return pairs


def summary(table: pandas.DataFrame) -> pandas.DataFrame:
    """n, mean, median and standard error of mean_logps over rows, means of the measures; likewise of the gap."""
    sides = table.pivot(index=[*KEYS, "row"], columns="response", values="mean_logps")
    if {"chosen", "rejected"} <= set(sides):
        gap = (sides["chosen"] - sides["rejected"]).dropna().reset_index(name="mean_logps").assign(response="gap")
        table = pandas.concat([table, gap], ignore_index=True)
    return means(table, [*KEYS, "response"]).sort_values(["run", "dataset", "step"], kind="stable", ignore_index=True)


def means(table: pandas.DataFrame, keys: list[str]) -> pandas.DataFrame:
    """n, mean, median, standard error of mean_logps and the means of the measures, in each group."""
    groups = table.groupby(keys, sort=False)
    found = groups["mean_logps"].agg(n="count", mean="mean", median="median", sem="sem")
    return found.join(groups[[name for name in MEASURES if name in table]].mean()).reset_index()


def show(table: pandas.DataFrame) -> str:
    """A table for the screen."""
    shown = table.pivot_table(index=["run", "step", "dataset"], columns="response", values="mean", sort=False)
    return f"{shown.to_string(float_format='%.4f')}\n(mean log-prob, nats a token)"
