"""Finds the tokens that gained and lost most probability since a run's start, at each position of a response.

Both models' logits of a chunk are there at the same time, and with them the exact change of every token of the
vocabulary; of these the K largest gains and the K largest losses of a position are kept. A token that did not move has
neither gained nor lost, so a position has fewer lines where fewer moved, and the start itself has none.

The sums over a data set are of what was kept. `kept` says which part of all that was gained, or lost, they hold: with
K as large as the vocabulary it is 1.

Shapes: N scored tokens, C tokens of a chunk, V vocabulary, K.
"""

import numpy as np
import pandas
import torch
from torch import Tensor

from ..core.logprobs import chunk_logps
from ..core.packing import Batch
from ..data.example import SIDES
from .means import KEYS
from .sections import tenth_of

SHOWN = 5  # tokens in a line on the screen


class Risers:
    """The start's model beside the one that is measured. `add` takes the latter's probabilities chunk by chunk."""

    def __init__(self, module, batch: Batch, k: int):
        """`module`: the start's SequenceLogProbs; `batch`: what is measured, in the start's layout; `k` <= V."""
        self.head, self.states, self.targets, self.k = module.head, module.states(batch), batch.targets, k
        self.logits = None  # of the last chunk, whose memory the next one takes
        self.parts: list[tuple[Tensor, ...]] = []

    def add(self, here: slice, after: Tensor) -> None:
        """(C, V) probabilities at these of the N places, which are not changed."""
        self.logits = self.head.logits(self.states[here], self.logits)
        start = chunk_logps(self.logits, self.targets[here])
        before = start.exps.div_(start.total[:, None])
        change = after - before
        ids = torch.cat([change.topk(self.k).indices, change.topk(self.k, largest=False).indices], 1)  # (C, 2K)
        self.parts.append((ids, before.gather(1, ids), after.gather(1, ids), change.clamp_(min=0).sum(1)))

    def split(self, lengths: list[int], gather=lambda values: values) -> list[dict[str, np.ndarray]]:
        """The risers of each response of so many tokens: `ids`, `before` and `after` (n, 2K), `moved` (n,). `gather`:
        that of OneRank, for ranks that share the batch."""
        found = [gather(torch.cat(side)).cpu().split(lengths) for side in zip(*self.parts)]
        return [dict(zip(("ids", "before", "after", "moved"), (side.numpy() for side in part))) for part in zip(*found)]


def table_of(key: dict, found: dict[str, np.ndarray]) -> pandas.DataFrame:
    """One response's part of `Risers.split` -> a line for each position and token that gained or lost. `place` is 1 for
    the token that gained most, then 2, ...; -1 for the one that lost most, then -2, ..."""
    k = found["ids"].shape[1] // 2
    places = np.concatenate([np.arange(1, k + 1), -np.arange(1, k + 1)])
    # The largest gains of a position may be losses: where fewer than K tokens gained.
    position, column = np.nonzero(np.sign(found["after"] - found["before"]) == np.sign(places))
    return pandas.DataFrame(key | {
        "position": position.astype(np.int32), "place": places[column].astype(np.int32),
        "id": found["ids"][position, column].astype(np.int32), "before": found["before"][position, column],
        "after": found["after"][position, column], "moved": found["moved"][position]})


def summed(table: pandas.DataFrame, scores: pandas.DataFrame) -> pandas.DataFrame:
    """Lines of risers.parquet and of scores.parquet of one checkpoint on one data set -> those of risers.csv."""
    if not len(table):
        return pandas.DataFrame()
    scores = scores[scores["logps"].notna() & scores["response"].isin(table["response"].unique())]
    lengths = scores.set_index(["row", "response"])["tokens"].rename("length")
    table = table.join(lengths, on=["row", "response"])
    table["tenth"] = tenth_of(table["position"], table["length"])
    table["change"] = table["after"].astype(float) - table["before"]
    texts = table.drop_duplicates("id").set_index("id")["token"]
    names = {id: named(token, id) for id, token in texts.items()}
    found = []
    for i in (None, *range(10)):
        section, here = ("all", table) if i is None else (f"tenth {i + 1}", table[table["tenth"] == i])
        for response, lines in here.groupby("response", sort=False):
            n = lengths.xs(response, level="response")
            n = n.sum() if i is None else ((i + 1) * n // 10 - i * n // 10).sum()
            found.append(_most(lines, int(n)).assign(response=response, section=section))
    lines = pandas.concat(found, ignore_index=True)
    lines = lines.assign(token=lines["id"].map(names), **{key: table[key].iloc[0] for key in KEYS})
    return lines[[*KEYS, "response", "section", "tokens", "place", "id", "token", "positions", "change", "kept"]]


def _most(lines: pandas.DataFrame, tokens: int) -> pandas.DataFrame:
    """Of a response's section, which has so many tokens in all rows: the K tokens that gained most and lost most."""
    moved = lines.drop_duplicates(["row", "position"])["moved"].astype(float).sum()
    # Losses add up to the gains but for float32's rounding, which is percents of them where next to nothing moved.
    kept = {sign: min(1.0, lines["change"][np.sign(lines["change"]) == sign].abs().sum() / moved) for sign in (1, -1)}
    sums = lines.groupby("id")["change"].agg(["sum", "size"]).sort_values("sum", kind="stable")
    k, sides = lines["place"].abs().max(), []
    for sign, side in ((1, sums[::-1]), (-1, sums)):
        side = side[np.sign(side["sum"]) == sign][:k]
        sides.append(pandas.DataFrame({"id": side.index, "place": sign * np.arange(1, len(side) + 1),
                                       "positions": side["size"].to_numpy(), "tokens": tokens,
                                       "change": side["sum"].to_numpy() / tokens, "kept": kept[sign]}))
    return pandas.concat(sides)


def named(token: str, id: int) -> str:
    """A token for a reader: in quotes; by its number, where its text alone does not tell it from others."""
    return f"token {id}" if not token or "\ufffd" in token else repr(token)


def top(lines: pandas.DataFrame, sign: int, most: int = SHOWN) -> str:
    """The first tokens of a section of risers.csv, in words: those that gained (sign 1) or lost (-1)."""
    lines = lines[np.sign(lines["place"]) == sign].sort_values("place", key=abs)[:most]
    return ", ".join(f"{line.token} {line.change:+.2g}" for line in lines.itertuples())


def to_screen(table: pandas.DataFrame) -> list[str]:
    """Of each run and data set, at its last step: which tokens gained and lost most along its responses."""
    if not len(table):
        return []
    found = []
    for (run, dataset), lines in table[table["section"] == "all"].groupby(["run", "dataset"], sort=False):
        last = lines["step"].max()
        found.append(f"tokens that gained and lost most, {run} on {dataset}, step 0 to {last} (mean change of their "
                     "probability at a position; risers.csv has the tenths, too):")
        lines = lines[(lines["step"] == last) & lines["response"].isin(SIDES)]
        for response, here in lines.groupby("response", sort=False):
            for sign, verb in ((1, "gained"), (-1, "lost")):
                kept = here.loc[np.sign(here["place"]) == sign, "kept"].max()
                found.append(f"    along {response} {verb}: {top(here, sign)} ({kept:.0%} of all that was {verb} is in "
                             "risers.parquet)")
    return found
