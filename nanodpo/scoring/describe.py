"""One row of a data set: from the measures of its responses' tokens to the lines of the tables."""

import math

import numpy as np
import pandas

from . import risers
from .measures import DERIVED, MEASURES, TOKEN_MEASURES
from .pairs import ches
from .sections import answer_start, sections, shared_prefix


def describe(row: dict, responses: dict[str, list[int]], found: dict[str, dict], token_texts,
             with_tokens: bool) -> dict:
    """{table: lines} of one row; of "tokens" and "risers", where asked for, a table a response. `row` has the columns
    that tell it from others, row and problem.

    `found[kind]` has "logps" (the sum, nats), "states" (D,) and "tokens", {measure: (n,)} with those of measures.py;
    and, where asked for, "risers" (risers.py). `token_texts` turns token ids into their texts. A response whose sum is
    not finite keeps its place without numbers.
    """
    out = {"scores": [], "sections": [], "tokens": [], "risers": [], "failed": [], "pairs": []}
    pair = "chosen" in responses and "rejected" in responses
    shared = shared_prefix(responses["chosen"], responses["rejected"]) if pair else None
    for kind, ids in responses.items():
        key, measures, logps = row | {"response": kind}, found[kind]["tokens"], found[kind]["logps"]
        if not math.isfinite(logps):
            out["failed"].append(key | {"logps": str(logps)})
            out["scores"].append(key | {"tokens": len(ids), "logps": math.nan, "mean_logps": math.nan})
            continue
        every = measures | {name: derive(measures) for name, derive in DERIVED.items()}
        table = np.zeros((1 + len(MEASURES), len(ids) + 1))
        table[:, :-1] = [every[name] for name in ("logps", *MEASURES)]
        answer = answer_start(token_texts(ids))
        parts = sections(len(ids), shared if kind in ("chosen", "rejected") else None, answer)
        whole, *means = _means(table, [range(len(ids)), *parts.values()])
        out["scores"].append(key | {"tokens": len(ids), "logps": logps} | whole)
        out["sections"] += [key | {"section": name, "tokens": len(part)} | mean
                            for (name, part), mean in zip(parts.items(), means)]
        if with_tokens:
            columns = {name.replace("logps", "logp"): measures[name] for name in TOKEN_MEASURES}
            out["tokens"].append(pandas.DataFrame(key | {"position": range(len(ids)), "id": ids} | columns))
        if "risers" in found[kind]:
            out["risers"].append(risers.table_of(key, found[kind]["risers"]))
    if pair and all(math.isfinite(found[side]["logps"]) for side in ("chosen", "rejected")):
        raw, normalised = ches(found["chosen"]["states"], found["rejected"]["states"], len(responses["chosen"]),
                               len(responses["rejected"]))
        out["pairs"].append(row | {"shared": shared, "ches": raw, "ches_normalised": normalised})
    return out


def _means(table: np.ndarray, parts: list[range]) -> list[dict[str, float]]:
    """(measures, n + 1), the last column not used -> for each part, the means of the measures over its positions."""
    borders = [border for part in parts for border in (part.start, part.stop)]
    sums = np.add.reduceat(table, borders, axis=1)[:, ::2]  # the rest lies between parts
    return [dict(zip(("mean_logps", *MEASURES), mean)) for mean in (sums / [len(part) for part in parts]).T.tolist()]
