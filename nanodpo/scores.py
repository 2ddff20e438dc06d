"""The tables of a scoring: what score.py keeps of a checkpoint and data set, and how the parts become its output.

All begin with run, phase (the run's loss), checkpoint (path), step and dataset. Log-probs are in nats.

    scores.parquet    row, response, tokens, logps (the sum, float64), mean_logps (logps / tokens), and means over the
                      response's tokens: argmax_logps, entropy, argmax_mass, implausible_mass, accuracy (rank 1)
    pairs.parquet     row, rewards of chosen and rejected = beta (logps - those at the run's step 0), margin, weight =
                      sigma(-margin), shared (tokens before the responses part), ches, ches_normalised; the products of
                      gradients where they were asked for. Without the run's step 0, rewards are missing.
    sections.csv      by response and part of it (tenths, prefix and suffix of a pair, think and answer): n, mean and
                      standard error of mean_logps, and the means of the measures, over rows
    tokens.parquet    row, response, position, token (text), logp, entropy, argmax_logp, rank, implausible_mass
    answers.parquet   row, found, expected, correct, ended, tokens, repetition, text: greedy answers of each checkpoint
    failed.jsonl      rows whose log-prob is not finite; they have no number above, and are in no mean
    summary.csv       n, mean, median, standard error of mean_logps, and the means of the other measures, by response;
                      likewise of "gap", chosen - rejected of a row
"""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet

from .errors import RunStopped, UserError, first_line

KEYS = ["run", "phase", "checkpoint", "step", "dataset"]
MEASURES = ["argmax_logps", "entropy", "argmax_mass", "implausible_mass", "accuracy"]
COLUMNS = [*KEYS, "row", "response", "tokens", "logps", "mean_logps", *MEASURES]
TABLES = ("scores", "pairs", "sections", "tokens", "answers", "failed")


def make_folder(folder: Path) -> None:
    """Raises UserError before the work where its result could not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--output_dir {folder.parent}: can't be written to ({error.strerror})") from error


def write_part(folder: Path, checkpoint, dataset: str, found: dict[str, list[dict]], write_more) -> None:
    """One checkpoint's scores of one data set, whole or not at all. `write_more(folder)` adds files of its own."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for name, lines in ((name, lines) for name, lines in found.items() if lines):
            table = pandas.concat(lines) if name == "tokens" else pandas.DataFrame(lines)
            for key in ("run", "phase", "step"):
                table[key] = getattr(checkpoint, key)
            table["checkpoint"], table["dataset"] = checkpoint.path, dataset
            rest = [column for column in table if column not in KEYS]
            table[[*KEYS, *rest]].to_parquet(aside / f"{name}.parquet", index=False)
        write_more(aside)
        os.rename(aside, folder)
    except OSError as error:
        raise unwritten(folder, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def join_parts(folder: Path, parts: list[Path], betas: dict[str, float]) -> dict[str, pandas.DataFrame]:
    """Writes the output files from all parts. Returns the tables, less tokens, which may be larger than memory."""
    tables = {name: _concat([part / f"{name}.parquet" for part in parts]) for name in TABLES if name != "tokens"}
    tables["scores"] = tables["scores"][COLUMNS]
    tables["pairs"] = add_rewards(tables["pairs"], tables["scores"], betas)
    tables["summary"] = summary(tables["scores"])
    if len(tables["sections"]):
        tables["sections"] = _means(tables["sections"], [*KEYS, "response", "section"]).drop(columns="median")
    for name in ("scores", "pairs", "answers"):
        _write(folder / f"{name}.parquet", tables[name], lambda file, table: table.to_parquet(file, index=False))
    for name in ("summary", "sections"):
        _write(folder / f"{name}.csv", tables[name], lambda file, table: table.to_csv(file, index=False))
    _write(folder / "failed.jsonl", tables["failed"],
           lambda file, table: table.to_json(file, orient="records", lines=True))
    _stream([part / "tokens.parquet" for part in parts], folder / "tokens.parquet")
    return tables


def write_json(file: Path, value) -> None:
    with _aside(file) as aside:
        aside.write_text(json.dumps(value, indent=1) + "\n")


def _concat(files: list[Path]) -> pandas.DataFrame:
    found = [pandas.read_parquet(file) for file in files if file.exists()]
    return pandas.concat(found, ignore_index=True) if found else pandas.DataFrame()


def _write(file: Path, table: pandas.DataFrame, write) -> None:
    """A table in place of the file; without rows no file, and none that an earlier call left."""
    if table.empty:
        file.unlink(missing_ok=True)
        return
    with _aside(file) as aside:
        write(aside, table)


def _stream(files: list[Path], target: Path) -> None:
    """All of these files as one, a part at a time."""
    files = [file for file in files if file.exists()]
    if not files:
        target.unlink(missing_ok=True)
        return
    schema = pyarrow.parquet.read_schema(files[0])
    with _aside(target) as aside, pyarrow.parquet.ParquetWriter(aside, schema) as writer:
        for file in files:
            writer.write_table(pyarrow.parquet.read_table(file).cast(schema))


@contextlib.contextmanager
def _aside(file: Path):
    """A name to write to; what is there at the end takes the file's place."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield aside
        os.replace(aside, file)
    except OSError as error:
        raise unwritten(file, error) from error
    finally:
        aside.unlink(missing_ok=True)


def unwritten(place: Path, error: OSError) -> RunStopped:
    """A full disk, mostly."""
    return RunStopped(f"{place}: can't be written ({first_line(error)}); the parts that are done are whole, the same "
                      "command goes on from them")


def add_rewards(pairs: pandas.DataFrame, scores: pandas.DataFrame, betas: dict[str, float]) -> pandas.DataFrame:
    """The pairs with the rewards that training has, against each run's own step 0."""
    if pairs.empty:
        return pairs
    at = ["run", "dataset", "row"]
    for side in ("chosen", "rejected"):
        here = scores[scores["response"] == side]
        start = here[here["step"] == 0].set_index(at)["logps"].rename("start")
        joined = here.join(start, on=at).set_index([*at, "step"])
        reward = (joined["logps"] - joined["start"]) * joined.index.get_level_values("run").map(betas)
        pairs = pairs.join(reward.rename(f"rewards/{side}"), on=[*at, "step"])
    pairs["margin"] = pairs["rewards/chosen"] - pairs["rewards/rejected"]
    pairs["weight"] = np.exp(-np.logaddexp(0, pairs["margin"]))
    return pairs


def summary(table: pandas.DataFrame) -> pandas.DataFrame:
    """n, mean, median and standard error of mean_logps over rows, means of the measures; likewise of the gap."""
    sides = table.pivot(index=[*KEYS, "row"], columns="response", values="mean_logps")
    if {"chosen", "rejected"} <= set(sides):
        gap = (sides["chosen"] - sides["rejected"]).dropna().reset_index(name="mean_logps").assign(response="gap")
        table = pandas.concat([table, gap], ignore_index=True)
    return _means(table, [*KEYS, "response"]).sort_values(["run", "dataset", "step"], kind="stable", ignore_index=True)


def _means(table: pandas.DataFrame, keys: list[str]) -> pandas.DataFrame:
    groups = table.groupby(keys, sort=False)
    found = groups["mean_logps"].agg(n="count", mean="mean", median="median", sem="sem")
    return found.join(groups[[name for name in MEASURES if name in table]].mean()).reset_index()


def show(means: pandas.DataFrame) -> str:
    """A table for the screen."""
    shown = means.pivot_table(index=["run", "step", "dataset"], columns="response", values="mean", sort=False)
    return f"{shown.to_string(float_format='%.4f')}\n(mean log-prob, nats a token)"
