"""Tables made of tables: rewards of pairs, means over rows with their errors. Log-probs are in nats."""

import math
import os

import numpy as np
import pandas
import torch
from torch import Tensor

from ..core.losses import LOSSES, pair_weights, rewards_without_reference
from ..data.example import SIDES
from ..flags.loss import bind
from ..stats import over_problems
from .measures import MEASURES

KEYS = ["run", "phase", "checkpoint", "step", "dataset"]
REWARDS, WEIGHTS = [f"rewards/{side}" for side in SIDES], [f"weights/{side}" for side in SIDES]


def add_rewards(pairs: pandas.DataFrame, scores: pandas.DataFrame, runs: dict) -> pandas.DataFrame:
    """The pairs with the rewards that training has, and with their weights in each run's loss.

    The reference is the run's own step 0, or the model of its --reference where that was scored on the same rows; else
    rewards are missing. Step 0 is also that of sft and of a function of the user's own.

    `runs` are the settings of each run by name.
    """
    if pairs.empty:
        return pairs
    at, starts = ["run", "dataset", "row"], _references(scores, runs)
    for side in SIDES:
        here = scores[scores["response"] == side].set_index([*at, "step"])
        start = starts[starts["response"] == side].set_index(at)["logps"].rename(f"start {side}")
        pairs = pairs.join(here[["logps", "tokens"]].add_suffix(f" {side}"), on=[*at, "step"]).join(start, on=at)
    pairs[[*REWARDS, "margin", *WEIGHTS]] = np.nan
    for run, settings in runs.items():
        here = pairs["run"] == run
        logps, start, lengths = (torch.from_numpy(pairs.loc[here, [f"{name} {side}" for side in SIDES]].to_numpy(float))
                                 for name in ("logps", "start", "tokens"))
        pairs.loc[here, REWARDS] = _rewards(settings, logps, start, lengths).numpy()
        pairs.loc[here, WEIGHTS] = _weights(settings, logps, start, lengths).numpy()
    pairs["margin"] = pairs["rewards/chosen"] - pairs["rewards/rejected"]
    pairs = pairs.drop(columns=[f"{name} {side}" for name in ("logps", "tokens", "start") for side in SIDES])
    return pairs.join(_band(pairs)) if "grad_cosine" in pairs else pairs


def _rewards(settings, logps: Tensor, start: Tensor, lengths: Tensor) -> Tensor:
    """(P, 2) rewards of these pairs in their run, as `pair_metrics` of run/metrics.py has them."""
    free = rewards_without_reference(LOSSES.get(settings.loss), logps, lengths, settings.beta)
    return settings.beta * (logps - start) if free is None else free


def _weights(settings, logps: Tensor, start: Tensor, lengths: Tensor) -> Tensor:
    """(P, 2) weights of these pairs in the loss of their run; NaN for sft, and for a loss that is the user's own
    function, unless --trust_remote_code has run its file: no code is run because a record names it."""
    loss = bind(LOSSES[settings.loss], settings) if settings.loss in LOSSES else settings.function
    if loss is None or settings.loss == "sft":
        return torch.full_like(logps, math.nan)
    return pair_weights(loss, logps, start, lengths, settings.sft_weight)


def _band(pairs: pandas.DataFrame) -> pandas.DataFrame:
    """The disentanglement band of each pair (arXiv 2604.18239), from its gradients g of chosen and rejected.

    A small step along weights/chosen g(chosen) - weights/rejected g(rejected) lowers rejected and does not lower chosen
    exactly where the ratio of the weights is between cos |g(rejected)|/|g(chosen)| and |g(rejected)|/(cos |g(chosen)|);
    with cos <= 0, always. That is for weights above 0; past the margin that a loss wants one or both are
    negative, and in_band is right there, too. Columns: weight_ratio, band_low, band_high, in_band.
    """
    names = ("norm_chosen", "norm_rejected", "cosine")
    chosen, rejected, cosine = (pairs[f"grad_{name}"].astype(float) for name in names)
    up, down, dot = (pairs[name].astype(float) for name in ("weights/chosen", "weights/rejected", "grad_dot"))
    size, ratio = rejected / chosen, up / down
    inside = (up * chosen**2 >= down * dot) & (up * dot < down * rejected**2)
    low, high = (cosine * size).clip(lower=0), (size / cosine).where(cosine > 0, np.inf)
    known = ratio.notna() & low.notna()
    return pandas.DataFrame({"weight_ratio": ratio, "band_low": low, "band_high": high,
                             "in_band": inside.astype(object).where(known, None)})


def _references(scores: pandas.DataFrame, runs: dict) -> pandas.DataFrame:
    """The scores of each run's reference, under the name of that run."""
    other = {run: os.path.realpath(settings.reference) for run, settings in runs.items() if settings.reference}
    own = scores[(scores["step"] == 0) & ~scores["run"].isin(other)]
    places = scores["checkpoint"].map({path: os.path.realpath(path) for path in scores["checkpoint"].unique()})
    return pandas.concat([own, *(scores[places == place].assign(run=run) for run, place in other.items())])


def summary(table: pandas.DataFrame, answers: pandas.DataFrame | None = None) -> pandas.DataFrame:
    """n, problems, mean, median and standard error of mean_logps over rows of one run, means of the measures; likewise
    of the gap. Where checkpoints answered, how many greedy answers there are and how many are right, in each line."""
    found = pandas.concat([_summary(part) for _, part in table.groupby(KEYS, sort=False)])
    found = found.sort_values(["run", "dataset", "step"], kind="stable", ignore_index=True)
    if answers is None or answers.empty:
        return found
    counts = answers.groupby(KEYS)["correct"].agg(right_answers="sum", answers="count")
    return found.join(counts.astype("Int64"), on=KEYS)


def _summary(table: pandas.DataFrame) -> pandas.DataFrame:
    """The same of one checkpoint and data set."""
    sides = table.pivot(index=[*KEYS, "row", "problem"], columns="response", values="mean_logps")
    if {"chosen", "rejected"} <= set(sides):
        gap = (sides["chosen"] - sides["rejected"]).dropna().reset_index(name="mean_logps").assign(response="gap")
        table = pandas.concat([table, gap], ignore_index=True)
    return means(table, [*KEYS, "response"])


def means(table: pandas.DataFrame, keys: list[str]) -> pandas.DataFrame:
    """n, problems, mean, median, standard error of mean_logps and the means of the measures, in each group."""
    groups, found = table.groupby(keys, sort=False), over_problems(table, keys, "mean_logps").set_index(keys)
    found["median"] = groups["mean_logps"].median()
    found = found[["n", "problems", "mean", "median", "sem"]]
    return found.join(groups[[name for name in MEASURES if name in table]].mean()).reset_index()


def show(table: pandas.DataFrame) -> str:
    """A summary for the screen, and below it what its columns are. A model that is no run's has no step, nor a start
    with which it could be compared."""
    keys, is_run = ["run", "step", "dataset"], table["phase"] != ""
    table = table.assign(step=table["step"].astype(str).where(is_run, "-"))
    shown = table.pivot_table(index=keys, columns="response", values="mean", sort=False)
    shown = shown.map(lambda value: "" if np.isnan(value) else f"{value:.4f}")
    least, most = table["n"].min(), table["n"].max()
    notes = [f"mean log-prob, nats a token, over {least if least == most else f'{least} to {most}'} "
             f"row{'s' if most != 1 else ''} of one run" + "; gap: chosen - rejected" * ("gap" in shown)]
    along = table[table["response"] == "chosen"].set_index(keys).reindex(shown.index)
    if along["implausible_mass"].notna().any():
        start = [f"{value:.2g} -> " * (step != "-") for value, step in
                 zip(along["implausible_mass_start"], along.index.get_level_values("step"))]
        shown["implausible"] = [f"{before}{here:.2g}" if here == here else "" for before, here in
                                zip(start, along["implausible_mass"])]
        notes.append("implausible: along chosen, the probability of tokens that "
                     + ("step 0 or this step gives less than 0.001, at step 0 -> here" if is_run.any() else
                        "the model gives less than 0.001"))
    if "answers" in table:
        counts = table.drop_duplicates(keys).set_index(keys).reindex(shown.index)
        shown["right answers"] = ["" if pandas.isna(asked) else f"{right} of {asked}" for right, asked in
                                  zip(counts["right_answers"], counts["answers"])]
    return "\n".join([shown.to_string(), *(f"({note})" for note in notes)])


def band_to_screen(pairs: pandas.DataFrame) -> list[str]:
    """A line for each run and data set whose pairs' gradients were measured: how many are in the disentanglement band,
    see `_band`, at each step."""
    if "in_band" not in pairs:
        return []
    lines = []
    for (run, dataset), table in pairs.dropna(subset="in_band").groupby(["run", "dataset"], sort=False):
        steps = [f"{part['in_band'].astype(bool).sum()} of {len(part)} at step {step}"
                 for step, part in table.groupby("step")]
        lines.append(f"pairs of {run} on {dataset} in the disentanglement band: {', '.join(steps)}")
    return lines
