"""The figure of what mean log-probs do not show: the mass on implausible tokens, and right answers."""

import pandas

from .axes import ABOVE_GRID, GREY, listed, set_phases
from .dynamics import dashes_of, draw_panel, has_bars, interval, legend_of, looks_of, panel_grid, xlabel
from .intervals import OVER_PROBLEMS, levels, shares
from .noise import Marks, Noise
from .records import MASS, SIDES

LOOKS = {"right answers": {"color": "black", "marker": "P"}}
LABELS = {"mass": "change of mass on\nimplausible tokens", "right": "share of right answers"}


def aside_figure(scores: pandas.DataFrame, answers: pandas.DataFrame | None, columns: int, phases,
                 noise: dict[str, Noise]):
    """(figure, caption), or None where neither was scored: a line of panels a data set, with how much probability went
    to implausible tokens (scoring/measures.py) since step 0, along chosen and rejected, and the share of right answers.

    `scores` and `answers` have `at`, the place on the x axis; `phases` and `noise` are as for dynamics_figure.
    """
    tables = {}
    if {*MASS} <= {*scores}:
        scores = scores[scores.groupby("run")["step"].transform("max") > 0]  # a model alone has nothing to change from
        change = scores[MASS[0]] - scores[MASS[1]]
        mass = levels(scores.assign(mean_logps=change)[scores["response"].isin(SIDES) & change.notna()])
        tables["mass"] = mass[mass["response"] != "gap"]
    if answers is not None:
        tables["right"] = shares(answers)
    tables = {kind: table for kind, table in tables.items() if len(table)}
    if not tables:
        return None
    every = pandas.concat(tables.values(), ignore_index=True)
    sets, dashes, bars = list(every["dataset"].unique()), dashes_of(every, phases), has_bars(every, phases)
    looks = looks_of(every[~every["response"].isin(LOOKS)]) | LOOKS
    fig, panels = panel_grid(sets, list(tables), columns, xlabel(every, bars), phases, sharex=not bars)
    for (name, kind), ax in panels.items():
        ax.set_ylabel(LABELS[kind])
        here = {side: looks[side] for side in looks if (side in LOOKS) == (kind == "right")}
        draw_panel(ax, tables[kind], name, dashes, here, bars)
        if phases:
            set_phases(ax, list(phases.values()))
    for (_, kind), ax in panels.items():
        if kind == "right":
            ax.set_ylim(-0.04, 1.04)
        else:
            ax.axhline(0, color=GREY, linewidth=0.6, zorder=ABOVE_GRID)
    marks = Marks(listed({"mass": "this probability", "right": "this share"}[kind] for kind in tables))
    marks.not_measured([noise[run] for run in every["run"].unique() if run in noise])
    legend_of(fig, every, dashes, {side: looks[side] for side in looks if side in set(every["response"])}, phases,
              "95% interval" * bool(every["low"].notna().any()), marks.handles)
    return fig, _caption(tables, sets, phases) + marks.caption


def _caption(tables: dict[str, pandas.DataFrame], sets: list[str], phases) -> str:
    runs = ", then ".join(phases) if phases else listed(pandas.concat(tables.values())["run"].unique())
    text = {}
    if "mass" in tables:
        text["mass"] = ("change since the run's own step 0 of the probability of implausible tokens, mean over the "
                        "tokens of a response; a token is implausible where step 0 or the step shown gives it less "
                        "than 0.001" + _shaded(tables["mass"], "mean ± Student's t standard errors"))
    if "right" in tables:
        text["right"] = "share of greedy answers that are right" + _shaded(tables["right"], "Wilson's")
    return f"Of {runs}, on {listed(sets)}: {'. Beside it: '.join(text.values())}."


def _shaded(curves: pandas.DataFrame, how: str) -> str:
    """The words for what is shaded, in brackets, and `how` it was taken; none where there is no interval."""
    said = interval(curves)
    return f" ({said}, {how} {OVER_PROBLEMS})" if said else ""
