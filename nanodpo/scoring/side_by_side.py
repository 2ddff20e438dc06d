"""Greedy answers of a run's first and last checkpoint side by side, to be read by a person."""

import pandas

from ..errors import one_line
from .estimates import at_both

SHOWN = 3  # rows on the screen
MOST = 240  # characters of a text on the screen


def side_by_side(answers: pandas.DataFrame) -> list[tuple[str, pandas.DataFrame]]:
    """(how many are right, the lines of answers.parquet at the first and last step) of each run and data set, of the
    rows that were answered at both."""
    if not len(answers):
        return []
    found = []
    for (run, dataset), table in answers.groupby(["run", "dataset"], sort=False):
        ends = at_both(table, table["step"].min(), table["step"].max())
        right = [f"{part['correct'].sum()} of {len(part)} right at step {step}" for step, part in ends.groupby("step")]
        found.append((f"answers of {run} on {dataset}: {', '.join(right)}", ends))
    return found


def to_file(answers: pandas.DataFrame) -> str:
    """All of them, whole: the text of answers.txt, empty where nobody was asked."""
    return "\n".join(f"{head}\n\n" + "".join(f"{_row(part, None)}\n" for _, part in ends.groupby("row"))
                     for head, ends in side_by_side(answers))


def to_screen(answers: pandas.DataFrame) -> list[str]:
    """How many are right in each; of the first whose answers changed, or else the first, the ends of a few rows: before
    others those that were right and are wrong now, then those that became right."""
    parts = [(head, ends, _moved(ends)) for head, ends in side_by_side(answers)]
    chosen = next((head for head, _, moved in parts if moved.any()), parts[0][0] if parts else None)
    shown = []
    for head, ends, moved in parts:
        shown.append(head)
        if head == chosen:
            rows = sorted(moved.index, key=lambda row: ({-1: 0, 1: 1, 0: 2}[moved[row]], row))[:SHOWN]
            shown += [_row(ends[ends["row"] == row], MOST).rstrip("\n") for row in rows]
    return [*shown, "answers.txt has all of them"] if shown else []


def _moved(ends: pandas.DataFrame) -> pandas.Series:
    """-1 for a row that went wrong, 1 for one that became right, else 0."""
    right = ends.astype({"correct": int}).sort_values("step").groupby("row")["correct"].agg(["first", "last"])
    return right["last"] - right["first"]


def _row(lines: pandas.DataFrame, most: int | None) -> str:
    """One row: the end of its prompt, the expected answer, and what each step answers."""
    def end(text: str) -> str:
        text = one_line(text, len(text))
        return text if most is None or len(text) <= most else f"... {text[-most:]}"

    first = lines.iloc[0]
    said = [f"row {first['row']}, expected {first['expected']}", f"  asked: {end(first['prompt_end'])}"]
    for line in lines.sort_values("step").itertuples():
        found = "no answer" if pandas.isna(line.found) else f"answers {line.found}"
        said.append(f"  step {line.step}: {'RIGHT' if line.correct else 'WRONG'}, {found}: {end(line.text)}")
    return "\n".join(said) + "\n"
