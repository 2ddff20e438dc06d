"""One row of a data set: from the measures of its responses' tokens to the lines of the tables."""

import math

import numpy as np
import pandas

from .pairs import ches
from .sections import answer_start, sections, shared_prefix


def describe(row: int, responses: dict[str, list[int]], found: dict[str, dict], pieces, tokens: bool) -> dict:
    """{table: lines} of one row; of "tokens" a table a response.

    `found[kind]` has "logps" (the sum, nats), "states" (D,) and "tokens", {measure: (n,)}. `pieces` turns
    token ids into their texts. A response whose sum is not finite keeps its place without numbers.
    """
    out = {"scores": [], "sections": [], "tokens": [], "failed": [], "pairs": []}
    pair = "chosen" in responses and "rejected" in responses
    shared = shared_prefix(responses["chosen"], responses["rejected"]) if pair else None
    for kind, ids in responses.items():
        key, measures, logps = {"row": row, "response": kind}, found[kind]["tokens"], found[kind]["logps"]
        if not math.isfinite(logps):
            out["failed"].append(key | {"logps": str(logps)})
            out["scores"].append(key | {"tokens": len(ids), "logps": math.nan, "mean_logps": math.nan})
            continue
        measures = measures | {"argmax_mass": np.exp(measures["argmax_logps"]), "accuracy": measures["rank"] == 1}
        out["scores"].append(key | {"tokens": len(ids), "logps": logps, "mean_logps": logps / len(ids),
                                    **_means(measures, range(len(ids)))})
        texts = pieces(ids)
        parts = sections(len(ids), shared if kind in ("chosen", "rejected") else None, answer_start(texts))
        out["sections"] += [key | {"section": name, "tokens": len(part), **_means(measures, part, "mean_logps")}
                            for name, part in parts.items()]
        if tokens:
            out["tokens"].append(_token_table(key, texts, measures))
    if pair and not out["failed"]:
        raw, normalised = ches(found["chosen"]["states"], found["rejected"]["states"], len(responses["chosen"]),
                               len(responses["rejected"]))
        out["pairs"].append({"row": row, "shared": shared, "ches": raw, "ches_normalised": normalised})
    return out


def _means(measures: dict[str, np.ndarray], part: range, logps: str | None = None) -> dict[str, float]:
    """Means over these positions, float64. `logps` is the name to give the log-prob's, if it is wanted."""
    names = {"argmax_logps", "entropy", "argmax_mass", "implausible_mass", "accuracy"}
    means = {name: float(np.mean(measures[name][part.start : part.stop], dtype=np.float64)) for name in sorted(names)}
    if logps:
        means[logps] = float(np.mean(measures["logps"][part.start : part.stop], dtype=np.float64))
    return means


def _token_table(key: dict, texts: list[str], measures: dict[str, np.ndarray]) -> pandas.DataFrame:
    names = {"logp": "logps", "entropy": "entropy", "argmax_logp": "argmax_logps", "rank": "rank",
             "implausible_mass": "implausible_mass"}
    columns = {name: measures[source] for name, source in names.items()}
    return pandas.DataFrame(key | {"position": range(len(texts)), "token": texts} | columns)
