"""Reads what the page shows: tokens, risers and prompts, checked, by row and response."""

from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.compute

from ..errors import UserError
from .tables import read_parquet, refuse

ROW, PART = ["dataset", "row"], ["dataset", "row", "response", "run", "step"]
NUMBERS = ["logp", "entropy", "rank"]
TOKENS = [*PART, "position", "token", *NUMBERS]
RISERS = [*PART, "position", "place", "id", "token", "before", "after"]
PROMPTS = [*ROW, "prompt"]
END = 1500  # characters of a prompt's beginning, and of its end


def read_parts(files: list[Path], scores: pandas.DataFrame, keys: list, least: float) -> tuple[dict, dict]:
    """{(data set, row): {(response, run): [(step, its tokens, its risers)]}}, columns by name; of risers those whose
    probability changed by `least` or more. And {(data set, row): {run: its prompt}}."""
    rows = pyarrow.compute.field("row").isin(sorted({row for _, row in keys}))
    change = pyarrow.compute.abs(pyarrow.compute.field("after") - pyarrow.compute.field("before"))
    runs, responses, found = set(scores["run"]), list(scores["response"].unique()), {key: {} for key in keys}
    prompts = {key: {} for key in keys}
    for file in files:
        texts = _read_prompts(file.with_name("prompts.parquet"), rows)
        tokens = _by_part(file, read_parquet(file, TOKENS, rows))
        risers, beside = {}, file.with_name("risers.parquet")
        if beside.exists():
            table = read_parquet(beside, RISERS, rows & (change >= least))
            wrong = (table["place"] == 0) | (table["position"] < 0)
            refuse(beside, table, wrong | (table[["before", "after"]].abs() > 1.001).any(axis=1),
                   "has a value that can't be")
            risers = _by_part(beside, table)
        for (name, row, response, run, step), its in tokens.items():
            if (name, row) in found and run in runs:
                if (name, row) in texts:
                    prompts[name, row][run] = texts[name, row]
                beside = risers.get((name, row, response, run, step))
                if beside is not None and beside["position"][-1] >= len(its["position"]):
                    raise UserError(f"{file.with_name('risers.parquet')}: row {row} of {name} has a position beyond "
                                    f"its {len(its['position'])} tokens; score it again")
                found[name, row].setdefault((response, run), []).append((int(step), its, beside))
    return {key: dict(sorted(parts.items(), key=lambda item: responses.index(item[0][0])))
            for key, parts in found.items() if parts}, prompts


def _read_prompts(file: Path, rows) -> dict[tuple, tuple[str, int, str]]:
    """{(data set, row): the first END characters of its prompt, how many are left out, the last END}; a prompt that is
    no longer than both is whole. Empty where an earlier version scored, which kept none."""
    if not file.exists():
        return {}
    table = read_parquet(file, PROMPTS, rows)
    if twice := next(iter(table[table.duplicated(ROW)][ROW].itertuples(index=False)), None):
        raise UserError(f"{file}: has row {twice.row} of {twice.dataset} twice; score it again")
    return {(name, row): (text[:END], len(text) - 2 * END, text[-END:]) if len(text) > 2 * END else (text, 0, "")
            for name, row, text in table[PROMPTS].itertuples(index=False)}


def _by_part(file: Path, table: pandas.DataFrame) -> dict[tuple, dict[str, np.ndarray]]:
    """{its PART: the other columns}, of tokens in the order of their positions, of risers from the first gain to the
    last, then of losses."""
    codes, names = zip(*(pandas.factorize(table[name], sort=True) for name in PART))
    words, texts = pandas.factorize(table["token"])
    columns = {name: table[name].to_numpy() for name in table if name not in (*PART, "token")}
    place = columns.get("place", np.zeros(len(table)))
    order = np.lexsort([abs(place), place < 0, columns["position"], *codes[::-1]])
    codes, columns = np.stack(codes)[:, order], {name: column[order] for name, column in columns.items()}
    columns["token"] = np.array([*texts, ""], dtype=object)[words[order]]
    starts = np.flatnonzero((codes != np.roll(codes, 1, axis=1)).any(axis=0)) if len(table) else []
    starts = starts if len(starts) else np.zeros(min(len(table), 1), int)  # of a single part nothing changes
    lengths = np.diff(starts, append=len(table))
    if "place" not in columns:
        wrong = np.zeros(len(table), bool)
        wrong[order] = columns["position"] != np.arange(len(table)) - np.repeat(starts, lengths)
        refuse(file, table, pandas.Series(wrong), "is out of place: positions must be 0, 1, 2 ... once each")
    return {tuple(its[code] for its, code in zip(names, codes[:, start])):
            {name: column[start : start + n] for name, column in columns.items()} for start, n in zip(starts, lengths)}
