"""The figures of a scoring that nobody has to ask for: dynamics, and what log-probs do not show."""

import pandas

from .aside import aside_figure
from .dynamics import dynamics_figure
from .intervals import KEYS, changes, levels, moved
from .selection import at_phases, everywhere


def scored_figures(scores: pandas.DataFrame | None, series: pandas.DataFrame | None = None,
                   answers: pandas.DataFrame | None = None, columns: int = 2, phases=None, noise=None, **how) -> dict:
    """{name: (figure, caption)} of a table of scores with its answers, of a csv's table of series, or of the second
    beside the first. With `phases` both have their places on that axis already; `how` goes to dynamics_figure."""
    tables, drawn = [], {}
    if scores is not None:
        scores = scores if phases else scores.assign(at=scores["step"])
        since = ["dataset", "response"] if phases else KEYS
        tables.append((levels(scores), changes(scores, since)))
    if series is not None:
        series = everywhere(series, scores["dataset"].unique() if tables else [])
        tables.append((series, moved(series)))
    level, change = (pandas.concat(pair, ignore_index=True) for pair in zip(*tables))
    drawn["dynamics"] = dynamics_figure(level, change, columns, phases=phases, noise=noise, **how)
    if scores is not None:
        if answers is not None:
            answers = answers[answers["run"].isin(scores["run"]) & answers["dataset"].isin(scores["dataset"])]
            answers = at_phases(answers, phases) if phases else answers.assign(at=answers["step"])
        if aside := aside_figure(scores, answers, columns, phases, noise):
            drawn["mass_and_answers"] = aside
    return drawn
