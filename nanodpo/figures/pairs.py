"""The training pairs that moved the mean log-prob of a data set most, with their texts: for the page, from a ledger."""

from pathlib import Path

from ..ledger.texts import of_mean, strongest
from .ledger import read_ledger

WITHOUT = "ledger.json has no texts, as an earlier version left it; score.py --ledger makes it again"


def read_pairs(folder: Path) -> dict:
    """{run: "sets", "texts" and "why"} of the ledger in a folder of scores; empty where there is none of means.

    "sets" has by data set and response the "rows" in the mean, its "change", the "doubts" (reasons not to rely on the
    shares), and the "lowered" and "raised" pairs of `strongest`, in six digits. "texts" are prompt, chosen and rejected
    by row, and "why" the reason where there are none.
    """
    if not (folder / "ledger.parquet").exists():
        return {}
    (table, records), found = read_ledger(folder), {}
    for record in records:
        name, response = record["dataset"], record["response"]
        ends = strongest(of_mean(table, record))
        its = found.setdefault(record["run"], {"sets": {}, "texts": {}, "why": WITHOUT})
        its["sets"].setdefault(name, {})[response] = {
            "rows": record["rows"], "change": record["change"], "doubts": record.get("doubts", [])} | {
            word: [[row, *(float(f"{share:.6g}") for share in line)] for row, *line in end]
            for word, end in ends.items()}
        its["texts"] |= record.get("texts", {})
    return found
