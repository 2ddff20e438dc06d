"""The tables of a scoring: how the lines of a checkpoint and a data set are kept in parts, and how these become files.

All but prompts begin with run, phase (the run's loss), checkpoint (path), step and dataset. Log-probs are in nats. What
has a row has a problem beside it: a short hash that rows with one prompt, or of one question and its reverse, share.
Positions are from 0: token 1 of a figure or of the page has position 0.
Standard errors are over the problems of one run (stats.py).

    scores.parquet    row, response, tokens, logps (the sum, float64), mean_logps (logps / tokens), and means over the
                      response's tokens: MEASURES of measures.py
    pairs.parquet     row, rewards of chosen and rejected = beta (logps - those of the run's reference), margin,
                      weights/chosen and weights/rejected = -dL/dchosen and dL/drejected of the run's loss, by autograd
                      (missing for sft, and without --trust_remote_code for a loss that is the user's own function),
                      shared (tokens before the responses part), ches, ches_normalised. The reference is the run's
                      step 0, or what its --reference named; where that was not scored beside the run, rewards are
                      missing. simpo, cpo and orpo have no reference, and the rewards that run/metrics.py says.
                      Where gradients were asked for: grad_dot, grad_cosine and norms, and the disentanglement band:
                      weight_ratio, band_low, band_high, in_band (means.py, _band)
    sections.csv      by response and part of it (tenths, prefix and suffix of a pair, think and answer): n, problems,
                      mean and standard error of mean_logps, and the means of the measures, over rows of one run
    risers.parquet    row, response, position, place, id and token (its text), before, after, moved: the K tokens of the
                      whole vocabulary that gained most probability at this position since step 0 (place 1, 2, ...)
                      and the K that lost most (-1, -2, ...), with their probabilities at step 0 and now. A token that
                      did not move has no line, so step 0 has none. moved: what all tokens together gained there,
                      which is what all others lost
    risers.csv        the same over a data set, by response and section (all, and tenths): tokens (positions in it), the
                      K tokens that gained most (place 1, 2, ...) and lost most (-1, ...), id, token (its text in
                      quotes), positions (how many lines it has in risers.parquet), change = the sum of after - before
                      over these lines / tokens, and kept: the part of all gains, or losses, that the lines of
                      risers.parquet hold. Where it is well below 1, a larger K may name other tokens
    tokens.parquet    row, response, position, id, token (its text), and TOKEN_MEASURES of measures.py
    prompts.parquet   dataset, row, problem, prompt (its text as the model reads it, markup and all), beside tokens
    answers.parquet   row, found, expected, correct, ended, tokens, repetition, prompt_end, text: greedy answers of each
                      checkpoint; answers.txt has the first and the last one's side by side
    failed.jsonl      rows whose log-prob is not finite; they have no number above, and are in no mean
    summary.csv       n, problems, mean, median, standard error of mean_logps, and the means of the other measures, by
                      response, over rows of one run; likewise the mean of "gap", chosen - rejected of a row; answers,
                      how many greedy answers there are, and right_answers, how many of them are right
"""

import collections
import contextlib
import itertools
import math
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet

from ..data.example import SIDES
from ..data.marks import spaced_text
from ..errors import UserError
from ..folder.atomic import new_file, writing
from . import risers
from .answers import check_answers
from .datasets import ResponseSet
from .means import KEYS, add_rewards, means, summary
from .measures import MEASURES
from .parts import Parts
from .plan import Result, Work

COLUMNS = [*KEYS, "row", "problem", "response", "tokens", "logps", "mean_logps", *MEASURES]
BY_POSITION = {"tokens", "risers"}
TABLES = ("scores", "pairs", "answers", "failed")
TENTHS = ["run", "step", "dataset", "row", "problem", "section", "tokens", "mean_logps", "argmax_logps"]
WRITERS = {".parquet": lambda table, file: table.to_parquet(file, index=False),
           ".csv": lambda table, file: table.to_csv(file, index=False),
           ".jsonl": lambda table, file: table.to_json(file, orient="records", lines=True)}


def keep(parts: Parts, work: Work, done: list[tuple[list[Result], int, dict[str, list]]]) -> None:
    """Keeps what was computed: (the results in which an example is done now, its index, {table: its lines})."""
    held, lines = {}, collections.defaultdict(list)
    for results, i, tables in done:
        for result in results:
            held.setdefault(result.key, result.held([]))["rows"].add(work.data.examples[i].row)
        kinds = {result.kind for result in results}
        # Where tokens or risers alone were missing, the rest is there already.
        for name in tables if kinds - BY_POSITION else kinds:
            lines[name] += tables[name]
    if not any(parts.index.get(key) for key in held) and lines["scores"] and all(
            math.isnan(line["logps"]) for line in lines["scores"]):
        raise UserError(f"{work.checkpoint.path}: no log-prob of {work.data.name} is finite: the weights are broken")
    sets = lines.pop("plausible", [])
    frames = {name: pandas.concat(its) if name in BY_POSITION else pandas.DataFrame(its)
              for name, its in lines.items() if its}
    parts.add(held, frames, sets)


def table_of(work: Work, parts: Parts, name: str) -> pandas.DataFrame:
    """All lines that are there of a checkpoint and a data set, in the order of rows and responses."""
    if name == "answers":
        table = _concat([pandas.DataFrame(check_answers(work.data, parts.answers(result.key, result.kind)))
                         for result in work.of_kind("answers")])
    else:
        results = work.of_kind(name if name in BY_POSITION else "scores")
        table = _concat([parts.read(result.key, name) for result in results
                         if name != "pairs" or result.responses == SIDES])
    if name == "pairs" and len(table):
        products = _concat([parts.read(result.key, "gradients") for result in work.of_kind("gradients")])
        table = table.merge(products, on="row", how="left") if len(products) else table
    if name in BY_POSITION and len(table):
        texts = {i: spaced_text(work.data.template.tokenizer, i) for i in table["id"].unique().tolist()}
        table.insert(list(table).index("id") + 1, "token", table["id"].map(texts))
    return _labelled(_ordered(table, work), work)


def sections_of(work: list[Work], parts: Parts) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """(sections.csv, lines of the tenths of each row's chosen response at the first and the last step of each run).
    All sections of all rows have many times the lines of scores.parquet; those of one checkpoint and data set are in
    memory at a time."""
    steps = collections.defaultdict(list)
    for item in work:
        steps[item.checkpoint.run, item.data.name].append(item.checkpoint.step)
    ends = {key: (min(its), max(its)) for key, its in steps.items()}
    found = [_sections_of(item, parts, item.checkpoint.step in ends[item.checkpoint.run, item.data.name])
             for item in work]
    return tuple(map(_concat, zip(*found)))


def _sections_of(work: Work, parts: Parts, is_end: bool) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """The same of one checkpoint and data set. `is_end`: it is at one of these steps; else there are no tenths, as
    where chosen is not scored."""
    table = _concat([parts.read(result.key, "sections") for result in work.of_kind("scores")])
    if not len(table):
        return table, table
    table = _ordered(table, work)
    found = _labelled(means(table, ["response", "section"]).drop(columns="median"), work)
    tenths = table[(table["response"] == "chosen") & table["section"].str.startswith("tenth")]
    if not (is_end and len(tenths)):
        return found, pandas.DataFrame()
    return found, _labelled(tenths, work)[TENTHS]


def prompts_of(data: ResponseSet) -> pandas.DataFrame:
    """A line for each example of a data set."""
    texts = (data.template.tokenizer.decode(prompt) for prompt, _ in data.groups)
    return pandas.DataFrame({"dataset": data.name, **data.key_of(i), "prompt": text} for i, text in enumerate(texts))


def _labelled(table: pandas.DataFrame, work: Work) -> pandas.DataFrame:
    """The table with the columns of KEYS in front; an empty one as it is."""
    if not len(table):
        return table
    keys = {key: getattr(work.checkpoint, key) for key in ("run", "phase", "step")}
    table = table.assign(**keys, checkpoint=work.checkpoint.path, dataset=work.data.name)
    return table[[*KEYS, *(column for column in table if column not in KEYS)]]


def _ordered(table: pandas.DataFrame, work: Work) -> pandas.DataFrame:
    """The lines in the order of rows and responses."""
    if not len(table):
        return table
    rows = {example.row: i for i, example in enumerate(work.data.examples)}
    order = [table["row"].map(rows)]
    if "response" in table:
        order.insert(0, table["response"].map(work.data.kinds.index))
    return table.iloc[np.lexsort(order)]  # keeps the order of tokens, sections


def join(folder: Path, work: list[Work], parts: Parts, runs: dict) -> dict[str, pandas.DataFrame]:
    """Writes the output files, all of them or none; `runs` are the settings of each run by name. Returns the tables
    without tokens, which may be larger than memory, as "tenths" the sections' lines of chosen's tenths, row by row, at
    the first and the last step of each run, and as "risers" those of risers.csv."""
    tables = {name: _concat([table_of(item, parts, name) for item in work]) for name in TABLES}
    tables["scores"] = tables["scores"][COLUMNS]
    tables["pairs"] = add_rewards(tables["pairs"], tables["scores"], runs)
    tables["summary"] = summary(tables["scores"], tables["answers"])
    tables["sections"], tables["tenths"] = sections_of(work, parts)
    sums: list[pandas.DataFrame] = []
    empty: list[Path] = []
    with contextlib.ExitStack() as whole:  # else a scoring that ends in the midst leaves tables of two scorings
        for name in ("scores.parquet", "pairs.parquet", "answers.parquet", "summary.csv", "sections.csv",
                     "failed.jsonl"):
            empty += _write(folder / name, tables[Path(name).stem], whole)
        empty += _stream((table_of(item, parts, "tokens") for item in work), folder / "tokens.parquet", whole)
        prompts = map(prompts_of, {item.data.name: item.data for item in work if item.of_kind("tokens")}.values())
        empty += _stream(prompts, folder / "prompts.parquet", whole)
        lines = (_summed(table_of(item, parts, "risers"), tables["scores"], sums) for item in work)
        empty += _stream(lines, folder / "risers.parquet", whole)
        tables["risers"] = _concat(sums)
        empty += _write(folder / "risers.csv", tables["risers"], whole)
    for file in empty:
        file.unlink(missing_ok=True)
    return tables


def _summed(table: pandas.DataFrame, scores: pandas.DataFrame, sums: list) -> pandas.DataFrame:
    """The lines of risers.parquet as they are; their sums go to `sums`."""
    if len(table):
        at = ["run", "step", "dataset"]
        sums.append(risers.summed(table, scores[(scores[at] == table[at].iloc[0]).all(axis=1)]))
    return table


def contents(folder: Path) -> list[str]:
    """Names what the tables of a folder hold; nothing where there are none that can be read."""
    found = [f"{name}.parquet" for name in ("tokens", "risers", "answers") if (folder / f"{name}.parquet").exists()]
    try:
        table = pandas.read_parquet(folder / "scores.parquet", columns=["run", "step", "dataset", "response"])
    except (OSError, ValueError, pyarrow.ArrowException):
        return found
    runs = [f"{run} step {step}" for run, step in table[["run", "step"]].drop_duplicates().itertuples(index=False)]
    return [*runs, *(f"data set {name}" for name in table["dataset"].unique()),
            *(f"response {name}" for name in table["response"].unique()), *found]


def write_text(file: Path, text: str) -> None:
    """Puts a text in place of the file; where it is empty no file, and none that an earlier call left."""
    if not text:
        return file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    with writing(file), new_file(file) as place:
        place.write_text(text, encoding="utf-8")


def _concat(tables: list[pandas.DataFrame]) -> pandas.DataFrame:
    found = [table for table in tables if len(table)]
    return pandas.concat(found, ignore_index=True) if found else pandas.DataFrame()


def _write(file: Path, table: pandas.DataFrame, whole: contextlib.ExitStack) -> list[Path]:
    """A table in place of the file, at the end of `whole`. Without rows there is none: returns files that have to go.
    """
    if table.empty:
        return [file]
    with writing(file):
        WRITERS[file.suffix](table, _place(file, whole))
    return []


def _stream(tables, target: Path, whole: contextlib.ExitStack) -> list[Path]:
    """As `_write`, all of these tables as one file, one in memory at a time."""
    tables = (table for table in tables if len(table))
    if (first := next(tables, None)) is None:
        return [target]
    schema = pyarrow.Schema.from_pandas(first, preserve_index=False)
    with writing(target), pyarrow.parquet.ParquetWriter(_place(target, whole), schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(pyarrow.Table.from_pandas(table, schema, preserve_index=False))
    return []


def _place(file: Path, whole: contextlib.ExitStack) -> Path:
    """Where to write what takes the place of the file at the end of `whole`."""
    whole.enter_context(writing(file))
    return whole.enter_context(new_file(file))
