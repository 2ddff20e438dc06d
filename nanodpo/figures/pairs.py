"""The training pairs that moved the mean log-prob of a data set most, with their texts: for the page, from a ledger and
the run's own training data."""

import json
from pathlib import Path
from types import SimpleNamespace

from ..data.rows import read_rows
from ..data.shapes import choose_columns, read_row
from ..errors import UserError, one_line
from ..files import read_json
from .ledger import read_ledger
from .records import SIDES

MOST = 5  # pairs at each end
LONGEST = 4000  # characters of a text


def read_pairs(folder: Path) -> dict:
    """{run: "sets", "texts" and "why"} of the ledger in a folder of scores; empty where there is none of means.

    "sets" has by data set and response the "rows" in the mean, its "change", the "doubts" (reasons not to rely on the
    shares), and MOST "lowered" and "raised" pairs, the strongest first: [row, share, its chosen side's,
    its rejected side's], nats per token. "texts" are prompt, chosen and rejected by row, and "why" the reason where
    there are none.
    """
    if not (folder / "ledger.parquet").exists():
        return {}
    (table, records), found = read_ledger(folder), {}
    for record in records:
        name, response = record["dataset"], record["response"]
        here = table[(table["dataset"] == name) & (table["response"] == response)].dropna(subset="pair")
        shares = here.groupby(["pair", "side"])["share"].sum().unstack(fill_value=0.0)
        shares = shares.reindex(columns=SIDES, fill_value=0.0)
        shares.insert(0, "share", shares.sum(axis=1))
        shares = shares.sort_values("share", kind="stable")
        ends = {"lowered": shares[shares["share"] < 0][:MOST], "raised": shares[shares["share"] > 0][::-1][:MOST]}
        its = found.setdefault(record["run"], {"sets": {}})["sets"].setdefault(name, {})
        its[response] = {"rows": record["rows"], "change": record["change"], "doubts": record.get("doubts", [])} | {
            word: [[int(row), *(float(f"{share:.6g}") for share in line)] for row, *line in end.itertuples()]
            for word, end in ends.items()}
    for its in found.values():
        rows = {row for responses in its["sets"].values() for record in responses.values()
                for row, *_ in (*record["lowered"], *record["raised"])}
        its["texts"], its["why"] = read_texts(folder, rows)
    return found


def read_texts(folder: Path, rows: set[int]) -> tuple[dict[int, list[str]], str]:
    """({row: prompt, chosen, rejected} of the training data of the run in this folder, why there are none)."""
    try:
        settings = SimpleNamespace(**read_json(folder / "run.json")["arguments"])
        data = read_rows(path := settings.train_file_path)
        if max(rows, default=0) >= len(data):
            raise UserError(f"{path}: has {len(data):,} rows, and the ledger one of number {max(rows):,}")
        columns = choose_columns(path, data, settings, pairs=settings.loss != "sft")
        found = {row: read_row(data[row], columns) for row in sorted(rows)}
    except UserError as error:
        return {}, one_line(str(error))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{folder / 'run.json'}: names no training data that can be read here ({type(error).__name__})"
    return {row: [_said(its.prompt), _said(its.chosen), _said(its.rejected)] for row, its in found.items()}, ""


def _said(value) -> str:
    """A text, a conversation or a list of these as text."""
    if isinstance(value, list):
        value = "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" if isinstance(turn, dict) else _said(turn)
                            for turn in value)
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    more = len(text) - LONGEST
    return text if more <= 0 else f"{text[:LONGEST]} ... ({more:,} characters more)"
