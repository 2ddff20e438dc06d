"""The training pairs that moved a mean most, and their texts, which ledger.json keeps: nobody needs the data again."""

import json

import pandas

from ..data.example import SIDES
from ..data.rows import read_rows
from ..data.shapes import choose_columns, read_row

MOST = 5  # pairs at each end
LONGEST = 4000  # characters of a text


def strongest(table: pandas.DataFrame) -> dict[str, list[list]]:
    """Of the lines of one probe the MOST pairs that lowered it and that raised it, the strongest first: [row, share,
    its chosen side's, its rejected side's], nats per token."""
    shares = table.dropna(subset="pair").groupby(["pair", "side"])["share"].sum().unstack(fill_value=0.0)
    shares = shares.reindex(columns=SIDES, fill_value=0.0)
    shares.insert(0, "share", shares.sum(axis=1))
    shares = shares.sort_values("share", kind="stable")
    ends = {"lowered": shares[shares["share"] < 0][:MOST], "raised": shares[shares["share"] > 0][::-1][:MOST]}
    return {word: [[int(row), *line] for row, *line in end.itertuples()] for word, end in ends.items()}


def of_mean(table: pandas.DataFrame, record: dict) -> pandas.DataFrame:
    """The lines of ledger.parquet that are of a mean, whose entry of ledger.json this is."""
    return table[table["row"].isna() & (table["dataset"] == record["dataset"])
                 & (table["response"] == record["response"])]


def add_texts(records: list[dict], table: pandas.DataFrame, args) -> None:
    """Gives each mean's entry of ledger.json "texts", {row: [prompt, chosen, rejected]} of its strongest pairs. `args`:
    those of train.py, which name the training data. Raises UserError."""
    means = [record for record in records if record["row"] is None]
    rows = [sorted({row for end in strongest(of_mean(table, record)).values() for row, *_ in end}) for record in means]
    if not any(rows):
        return
    data = read_rows(args.train_file_path)
    columns = choose_columns(args.train_file_path, data, args, pairs=args.loss != "sft")
    for record, its in zip(means, rows):
        found = {row: read_row(data[row], columns) for row in its}
        record["texts"] = {row: [as_text(one.prompt), as_text(one.chosen), as_text(one.rejected)]
                           for row, one in found.items()}


def as_text(value) -> str:
    """A text, a conversation or a list of these as text; a long one is cut."""
    if isinstance(value, list):
        value = "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" if isinstance(turn, dict) else as_text(turn)
                            for turn in value)
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    more = len(text) - LONGEST
    return text if more <= 0 else f"{text[:LONGEST]} ... ({more:,} characters more)"
