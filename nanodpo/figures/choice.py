"""From what plot.py was told to the figures: which there are to draw, of which runs, with what beside them."""

import argparse
from pathlib import Path

import pandas

from ..errors import UserError
from . import selection
from .aside import aside_figure
from .axes import listed
from .difference import scored_difference_figure, training_difference_figure
from .dynamics import dynamics_figure
from .heatmap import heatmap_figure
from .intervals import KEYS, changes, levels, moved, with_gaps
from .ledger import ledger_figure
from .noise import Noise, read_verdicts
from .records import read_answers, read_metrics, read_scores, read_series, read_tokens
from .runs import Facts, in_order, read_facts
from .scatter import scatter_figure, scatter_table
from .strip import strip_figure
from .three_panel import FOCUS, RATIOS, ROLES, three_panel_figure
from .training import training_figure

TESTS = ["forward", "reverse", "mixed"]


def draw(args: argparse.Namespace, folders: list[Path], files: list[Path], names: list[str]) -> tuple[dict, list[str]]:
    """({a figure's name: (the figure, its caption)}, what the user should be told of them)."""
    if args.strip is not None:
        runs = names if args.scores else []
        tokens = [file.with_name("tokens.parquet") for file in files]
        (tokens,) = selection.select([read_tokens(tokens, args.strip, runs, args.test)], runs, args.test)
        return ({"strip": strip_figure(tokens, args.strip, args.columns, noise_of(folders, files))},
                say_unread(args, folders, tokens))
    if args.ledger:
        if len(folders) != 1:
            raise UserError(f"--ledger: is of one run, and {len(folders)} are named")
        return {"ledger": ledger_figure(folders[0], args.columns, read_facts(folders[0]).noise)}, []
    scores = read_scores(files) if files else None
    if args.scatter:
        (scores,) = selection.select([scores], names if args.scores else [], args.test)
        return ({"scatter": draw_scatter(args, files, scores, noise_of(folders, files))},
                say_unread(args, folders, scores))
    series = read_series(args.series) if args.series else None
    if args.three_panel:
        return draw_three_panel(args, scores, series, noise_of(folders, files))
    runs = label(folders)
    trained = folders and not (args.phases or args.heatmap)
    lines = {run: read_metrics(folder) for run, folder in runs.items()} if trained else {}
    facts = {run: read_facts(folder) for run, folder in runs.items()}
    if args.diff:
        return draw_difference(args, lines, facts, scores)
    drawn = {"training": training_figure(lines, args.columns, facts)} if trained else {}
    if scores is not None or series is not None:
        scores, series = selection.select_beside(scores, series, names if args.scores or args.phases else [], args.test)
    noise = noise_of(folders, files)
    if args.heatmap:
        return {"heatmap": heatmap_figure(scores, args.columns, noise)}, say_unread(args, folders, scores)
    notes = []
    if scores is not None or series is not None:
        said = say_unread(args, folders, scores)
        scores, series, phases, notes = follow(args, scores, series, names, runs, facts)
        answers = read_answers([file.with_name("answers.parquet") for file in files])
        drawn |= draw_scores(args, scores, series, answers, phases, noise)
        notes = [*notes, *said]
    return drawn, notes


def draw_scatter(args, files: list[Path], scores, noise: dict[str, Noise]):
    steps = {run: (int(part.min()), int(part.max())) for run, part in scores.groupby("run")["step"]}
    measures, table = scatter_table(args.scatter, files, steps)
    table = table[table["dataset"].isin(scores["dataset"])]
    if table.empty:
        raise UserError(f"--scatter: no row has both {measures[0].name} and {measures[1].name}")
    return scatter_figure(measures, table, steps, args.columns, noise)


def draw_scores(args, scores, series, answers, phases, noise) -> dict:
    """Dynamics, and what log-probs do not show, of a table of scores with its answers, of a csv's table of series, or
    of the second beside the first. With `phases` both have their places on that axis already."""
    tables, drawn = [], {}
    if scores is not None:
        scores = scores if phases else scores.assign(at=scores["step"])
        since = ["dataset", "response"] if phases else KEYS
        tables.append((levels(scores), changes(scores, since)))
    if series is not None:
        series = selection.everywhere(series, scores["dataset"].unique() if tables else [])
        tables.append((series, moved(series)))
    level, change = (pandas.concat(pair, ignore_index=True) for pair in zip(*tables))
    drawn["dynamics"] = dynamics_figure(level, change, args.columns, args.focus, args.floor, phases, noise)
    if scores is not None:
        if answers is not None:
            answers = answers[answers["run"].isin(scores["run"]) & answers["dataset"].isin(scores["dataset"])]
            answers = selection.at_phases(answers, phases) if phases else answers.assign(at=answers["step"])
        if aside := aside_figure(scores, answers, args.columns, phases, noise):
            drawn["mass_and_answers"] = aside
    return drawn


def draw_difference(args, lines: dict[str, list[dict]], facts: dict[str, Facts], scores) -> tuple[dict, list[str]]:
    """The difference of two runs in training, and in the scores that both have. Raises UserError where there are not
    two folders of runs."""
    if len(lines) != 2:
        raise UserError(f"--diff: needs the folders of two runs, and found {listed(lines) or 'none'}")
    names = [Path(run).name for run in lines]
    drawn = {"difference": training_difference_figure(lines, args.columns, facts)}
    notes = [] if drawn["difference"] else [f"{listed(names)} have no panel of training in common"]
    if scores is not None:
        (scores,) = selection.select([scores], [], args.test)
        if missing := [run for run in names if run not in set(scores["run"])]:
            notes.append(f"{no_scores(missing, {*scores['run']}, args.test)}: no difference of scores is drawn")
        elif said := selection.differing(scores, names, []):
            notes.append(said)
        else:
            drawn["difference_scores"] = scored_difference_figure(scores, names, args.columns, facts)
            notes += [f"{listed(names)} have no score of one row at one step in common; score them in one call"] * (
                drawn["difference_scores"] is None)
    if not (drawn := {name: figure for name, figure in drawn.items() if figure}):
        raise UserError(f"--diff: {'; '.join(notes)}")
    return drawn, notes


def follow(args, scores, series, names: list[str], runs: dict[str, Path], facts: dict[str, Facts]):
    """(scores, series, phases, notes): of runs that followed one another on one axis of phases, where that is asked
    for or their run.json says that they did; what keeps the second kind from it is a note."""
    order, why = (names, "") if args.phases else in_order(runs, facts)
    order = [runs[run].resolve().name if run in runs else run for run in order]
    if order and scores is not None:
        try:
            here, phases = selection.in_phases(scores if args.phases else scores[scores["run"].isin(order)], order)
            return here, series if series is None else selection.series_in_phases(series, phases), phases, []
        except UserError as error:
            if args.phases:
                raise
            why = str(error).removeprefix("--phases: ")
    elif args.phases:
        selection.in_phases(None, order)  # raises
    beside = f"dynamics are drawn beside one another, and not as phases: {why}"
    return scores, series, None, [beside] if why and scores is not None else []


def say_unread(args, folders: list[Path], scores: pandas.DataFrame | None) -> list[str]:
    """A note that names the folders of which these scores, or tokens, have nothing."""
    there = set() if scores is None else {*scores["run"]}
    unread = [] if args.scores else [run for run, place in label(folders).items() if there.isdisjoint(names_of(place))]
    return [no_scores(unread, there, args.test)] * bool(unread)


def no_scores(runs: list[str], there: set[str], sets: list[str] | None) -> str:
    """Says that what was read has no scores of these runs, and of which it has some: a file may lie in another run's
    folder."""
    return (f"no scores of {listed(runs)}" + f" on {listed(sets or ())}" * bool(sets) + " were read"
            + f", only of {listed(sorted(there))}" * bool(there))


def names_of(folder: Path) -> tuple[str, str]:
    """The two names that scores may have for the run of a folder."""
    place = folder.resolve()
    return place.name, f"{place.parent.name}/{place.name}"


def noise_of(folders: list[Path], files: list[Path]) -> dict[str, Noise]:
    """{run, as scores name it: its noise}, of runs' folders and of what lies beside these files of scores."""
    found = {}
    for file in files:
        found |= read_verdicts(file.with_name("verdict.json"))
    for folder in [*folders, *(file.parent for file in files)]:
        noise = read_facts(folder).noise
        found |= {name: noise for name in names_of(folder) if noise}
    return found


def draw_three_panel(args: argparse.Namespace, scores, series, noise) -> tuple[dict, list[str]]:
    roles = {role: [Path(run).name for run in getattr(args, role)] for role in ROLES}
    tests = args.test or TESTS
    named = sum(roles.values(), [])
    if series is not None and (unused := sorted(set(series["run"]) - set(named))):
        raise UserError(f"--series: {unused[0]} is named by none of --{', --'.join(ROLES)}")
    tables = [*([levels(scores.assign(at=scores["step"]))] if scores is not None else []),
              *([with_gaps(selection.everywhere(series, tests))] if series is not None else [])]
    tables = selection.select(tables, named, tests) if series is None else selection.select_there(tables, named, tests)
    figure, caption, missing = three_panel_figure(
        pandas.concat(tables, ignore_index=True), roles, tests, args.columns, args.focus or FOCUS,
        args.panel_ratios or RATIOS, args.floor, noise)
    return {"three_panel": (figure, caption)}, [f"not drawn, since nothing has it: {listed(missing)}"] * bool(missing)


def label(folders: list[Path]) -> dict[str, Path]:
    """Runs by their folders' names, or by their paths where two folders have one name."""
    folders = list(dict.fromkeys(folders))
    names = [folder.resolve().name for folder in folders]
    return dict(zip(names if len(set(names)) == len(names) else map(str, folders), folders))
