"""Puts a ledger into a table, a sentence for each probe, and a line on the pairs that did most."""

import math

import numpy as np
import pandas
from torch import Tensor

from .history import History
from .probes import Probe
from .sweeps import DECAY, Found

SOURCES = ("chosen", "rejected", "weight_decay")
PAIR = ["pair", "chosen_answer", "rejected_answer"]  # the row, and the numbers of the answers in its lists
WORST = 3  # pairs that are named
UNRELIABLE = 0.05  # of the change a residual, and of all that the steps moved the part that was not foreseen
OVERDONE = 30  # times what all steps moved: the sizes of all shares
BEGINNING = 0.5  # of these sizes: the part of the first update


def to_table(history: History, probes: list[Probe], found: Found) -> pandas.DataFrame:
    """A line for each probe, step, pair and side of it. A pair is named by its row, and where that has lists of answers
    by the numbers of its two in them."""
    step, index, side = (found.lines[name].numpy() for name in ("step", "index", "side"))
    names = np.array([(example.row, *example.answer_numbers) for example in history.examples])
    names = pandas.DataFrame(names[np.maximum(index, 0)], columns=PAIR, dtype="Int64")
    names[side == DECAY] = pandas.NA
    order = np.lexsort((side, index, step))
    tables = []
    for m, probe in enumerate(probes):
        table = pandas.DataFrame({
            "run": history.run, "dataset": probe.dataset,
            "row": pandas.array([probe.row] * len(step), dtype="Int64"), "response": probe.response, "step": step,
            **names, "side": np.array(SOURCES)[side], "share": found.lines["share"][:, m].numpy(),
            "effect": found.lines["effect"][:, m].numpy()})
        tables.append(table.iloc[order])
    return pandas.concat(tables, ignore_index=True)


def to_record(history: History, probes: list[Probe], found: Found) -> list[dict]:
    """The entries of ledger.json, one a probe: its change, nats a token, the sums of the shares that made it,
    and the reasons not to rely on these."""
    side, lines = found.lines["side"], found.lines["share"]
    rebuilt = [value for value in found.rebuilt.tolist() if value == value]
    records = []
    for m, probe in enumerate(probes):
        start, end = found.levels[[0, -1], m].tolist()
        parts = {name: lines[side == i, m].sum().item() for i, name in enumerate(SOURCES) if (side == i).any()}
        rest = end - start - sum(parts.values())
        moved, sizes = found.levels[:, m].diff(), lines[side != DECAY, m].abs()
        first = found.lines["step"][side != DECAY] == found.lines["step"].min()
        record = probe._asdict() | {
            "run": history.run, "steps": history.steps, "start": start, "end": end,
            "change": end - start, "from": parts, "residual": rest / (end - start) if end != start else 0.0,
            "moved": moved.abs().sum().item(), "missed": (moved - found.predicted[:, m]).abs().sum().item(),
            "sizes": sizes.sum().item(), "sizes_of_the_first_update": sizes[first].sum().item(),
            "levels": found.levels[:, m].tolist(), "updates_rebuilt": {
                "median": float(np.median(rebuilt)), "largest": max(rebuilt)} if rebuilt else None}
        records.append(record | {"doubts": doubts(record)})
    return records


def sentence(record: dict) -> str:
    """How a probe changed and what made it, in one line, and one more where that is not to be relied on."""
    mean = f"mean of {(n := record['rows'])} row{'s' * (n > 1)}"
    whose = mean if record["row"] is None else f"row {record['row']}"
    names = {"chosen": "from chosen halves", "rejected": "from rejected halves", "weight_decay": "from weight decay"}
    digits = decimals(record["change"])
    parts = "".join(f" {'-' if part < 0 else '+'} {abs(part):.{digits}f} {names[name]}"
                    for name, part in record["from"].items()).removeprefix(" + ").removeprefix(" ")
    text = (f"{record['dataset']}, {whose}, {record['response']}: {record['change']:+.{digits}f} nats a token = "
            f"{parts}; residual {abs(record['residual']):.1%}")
    return text + "".join(f"\n  {why}" for why in record["doubts"])


def decimals(number: float) -> int:
    """How many show a number's third digit; four at least.

    >>> decimals(-0.0232), decimals(0.00042), decimals(0.0)
    (4, 6, 4)
    """
    return max(4, 2 - math.floor(math.log10(abs(number)))) if number else 4


def doubts(record: dict) -> list[str]:
    """The reasons, in words, not to rely on a probe's shares."""
    found, moved, sizes = [], record["moved"], record["sizes"]
    if not moved:
        return ["unreliable: the steps are too small: with the weights as they are rounded the log-prob did not move; "
                "train with a larger --learning_rate"] * (sizes > 0)
    if record["missed"] > UNRELIABLE * moved:
        found.append(f"unreliable: the steps are too large: their gradients foresee each with an error, and these come "
                     f"to {record['missed'] / moved:.0%} of all that the steps moved. Train with a smaller "
                     "--learning_rate, or more --warmup_steps")
    elif abs(record["residual"]) > UNRELIABLE:
        found.append("unreliable: what the pairs' shares leave over is more than 5% of the change, which is close to 0")
    if sizes > OVERDONE * moved:
        found.append(f"ill-conditioned: all shares together are {sizes / moved:,.0f} times what the steps moved. A "
                     "share is divided by the size of a step's whole gradient, so single weights in which its parts "
                     "cancel decide, and their rounding; take no pair's share as its own doing")
    elif record["sizes_of_the_first_update"] > BEGINNING * sizes:
        part = record["sizes_of_the_first_update"] / sizes
        found.append(f"ill-conditioned: {part:.0%} of all shares, by size, are of the first update, which is the sign "
                     "of each weight's gradient; there single weights in which its parts cancel decide, and their "
                     "rounding; compare pairs of later steps, or of a run with --warmup_steps")
    return found


def worst_pairs(table: pandas.DataFrame) -> list[str]:
    """For the mean of each data set and response: the pairs that lowered it and raised it most, and how much of all
    that lowered it came from a tenth of the pairs."""
    lines = []
    for (dataset, response), part in table[table["row"].isna()].groupby(["dataset", "response"], sort=False):
        net = part.dropna(subset="pair").groupby(PAIR)["share"].sum().sort_values()
        several = net.groupby("pair").size() > 1
        falls = net[net < 0]
        if not net.any():
            continue
        digits = decimals(10 * net.abs().max())  # of a pair two digits do
        words = [", ".join(f"row {row}{f' chosen[{i}] rejected[{j}]' * bool(several[row])} ({share:+.{digits}f})"
                           for (row, i, j), share in side.items()) or "no pair"
                 for side in (falls.head(WORST), net[net > 0].iloc[::-1].head(WORST))]
        lines.append(f"{dataset}, {response}: lowered most by {words[0]}; raised most by {words[1]}")
        if len(falls):
            count = max(1, len(net) // 10)
            lines[-1] += (f"; the {count} of {len(net)} pairs that lowered it most made "
                          f"{falls.iloc[:count].sum() / falls.sum():.0%} of all that lowered it")
    return lines


def rebuilt_line(history: History, norms: dict[int, float], rebuilt: Tensor) -> str:
    """How well gradients and updates were made again: what training logged and left is known without the ledger."""
    worst = max((abs(norms[k] / history.norms[k] - 1) for k in norms if history.norms.get(k)), default=0.0)
    errors, norms_said = rebuilt[~rebuilt.isnan()], f"gradient norms within {worst:.1e} of those in metrics.jsonl"
    if not len(errors):
        return f"made again: {norms_said}; no update changed a weight"
    return (f"made again: {norms_said}; updates within {errors.median().item():.1e} of those between checkpoints "
            f"(median; {errors.max().item():.1e} at worst), beyond the rounding of the weights")
