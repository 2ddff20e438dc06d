"""Selects the lines of the tables that are drawn, and places them on the x axis."""

import pandas

from ..errors import UserError
from .axes import listed, place
from .records import SIDES


def select(tables: list[pandas.DataFrame], runs: list[str], sets: list[str] | None) -> list[pandas.DataFrame]:
    """Of the tables the lines of these runs and data sets; all where none is named. Raises UserError for a name that
    no table has. A line without a data set, of a csv, belongs to every one."""
    have = [run for table in tables for run in table["run"].unique()]
    if twice := {run for run in have if have.count(run) > 1}:
        raise UserError(f"the scores and the csv both have a run called {listed(sorted(twice))}")
    there = sorted({name for table in tables for name in table["dataset"].unique()} - {""})
    for what, names, found in (("run", runs, have), ("data set", sets or [], there)):
        if missing := [name for name in names if name not in found]:
            raise UserError(f"no {what} called {listed(missing)} in what was read; there is {listed(found) or 'none'}")
    kept = [table[(table["run"].isin(runs) | (not runs)) & (table["dataset"].isin([*(sets or there), ""]))]
            for table in tables]
    if all(table.empty for table in kept):
        raise UserError(f"nothing to draw of run {listed(runs or have)} on data set {listed(sets or there)}")
    return kept


def select_there(tables: list[pandas.DataFrame], runs: list[str], sets: list[str]) -> list[pandas.DataFrame]:
    """As select, but some of the data sets may be missing: published curves are what they are."""
    return select(tables, runs, [name for name in sets if any((table["dataset"] == name).any() for table in tables)]
                  or sets)


def select_beside(scores, series, runs: list[str], sets: list[str] | None) -> list[pandas.DataFrame | None]:
    """Scores of these runs and, beside them, all series of a csv, both on these data sets; either may be None, and a
    table of which nothing is left becomes it."""
    there = [table for table in (scores, series) if table is not None]
    if runs and series is not None:
        runs = [*runs, *series["run"].unique()]
    kept = iter(select(there, runs, sets))
    return [None if table is None or (left := next(kept)).empty else left for table in (scores, series)]


def in_phases(scores: pandas.DataFrame | None, runs: list[str]) -> tuple[pandas.DataFrame, dict[str, tuple]]:
    """Scores of runs that followed one another, `at` their places on one axis; {run: (name, first step, last step)}.
    Raises UserError where a run has none."""
    have = [] if scores is None else list(scores["run"].unique())
    if missing := [run for run in runs if run not in have]:
        raise UserError(f"--phases: each run needs scores on the data sets drawn, and {listed(missing)} has none")
    if said := differing(scores, runs, [*SIDES]):
        raise UserError(f"--phases: {said}")
    spans = scores.groupby("run")["step"].agg(["min", "max"])
    names = scores.groupby("run")["phase"].first()
    phases = {run: (names[run].upper() or run, *spans.loc[run]) for run in runs}
    return at_phases(scores, phases), phases


def at_phases(table: pandas.DataFrame, phases: dict[str, tuple]) -> pandas.DataFrame:
    """Lines of runs that followed one another, `at` their places on the axis of phases."""
    number = {run: i for i, run in enumerate(phases)}
    at = [place(step, number[run], *phases[run][1:]) for run, step in zip(table["run"], table["step"])]
    return table.assign(at=at)


def differing(scores: pandas.DataFrame, runs: list[str], whole: list[str]) -> str:
    """Says which two of the runs were scored on different texts under one data set's name, by the tokens of each row's
    responses; "" where none were. A row that one run lacks is a difference in the responses `whole` alone."""
    for name, table in scores[scores["run"].isin(runs)].groupby("dataset"):
        tokens = table.drop_duplicates(["run", "row", "response"]).pivot(
            index=["row", "response"], columns="run", values="tokens")
        first, *others = [run for run in runs if run in tokens]
        for other in others:
            two = tokens[[first, other]].dropna(how="all")
            two = two[two.notna().all(axis=1) | two.index.isin(whole, level="response")]
            if (two[first] != two[other]).any():
                return (f"{first} and {other} were scored on different rows, or tokens, that are both called {name}; "
                        f"score both in one call: score.py {first} {other} --dataset_path {name}=FILE")
    return ""


def series_in_phases(series: pandas.DataFrame, phases: dict[str, tuple]) -> pandas.DataFrame:
    """A csv's curves, `at` their places on the axis of phases; a line whose column phase is empty is of the first."""
    number = {name.lower(): i for i, (name, *_) in reversed(list(enumerate(phases.values())))} | {"": 0}
    if unknown := set(series["phase"].str.lower()) - set(number):
        raise UserError(f"--series: no phase called {listed(sorted(unknown))}; there is {listed(list(number)[:-1])}")
    spans = [span for _, *span in phases.values()]
    at = [place(step, i := number[phase.lower()], *spans[i]) for step, phase in zip(series["step"], series["phase"])]
    return series.assign(at=at, phase="")


def everywhere(series: pandas.DataFrame, sets) -> pandas.DataFrame:
    """A csv's curves that name no data set, on each of `sets`."""
    nowhere = series["dataset"] == ""
    copies = [series[nowhere].assign(dataset=name) for name in sets]
    return pandas.concat([series[~nowhere], *copies], ignore_index=True) if len(copies) else series
