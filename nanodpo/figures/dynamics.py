"""The figure of dynamics: log-probs of responses over steps, their level and beside it how far they moved."""

import itertools

import pandas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..errors import UserError
from .axes import (
    ABOVE_GRID,
    CHANGE,
    COLOURS,
    DASHES,
    FLOOR,
    GREY,
    INTERVAL,
    LOGPS,
    MARKERS,
    add_legend,
    crowd,
    draw_curve,
    grid,
    listed,
    plain,
    set_focus,
    set_phases,
    wrap,
)


def dynamics_figure(levels: pandas.DataFrame, changes: pandas.DataFrame, columns: int, focus=None, floor=None,
                    phases=None):
    """Log-prob per token of each response over steps: a line of panels a data set, the level and beside it the change.

    `levels` and `changes` are tables of curves (intervals.py). The band `focus` gets a quarter of the level's height;
    without one, values that lie close together get three quarters where others are far away. `floor` is a level to
    mark. With `phases`, {run: (name, first step, last step)}, `at` is a place on an axis of these phases.
    """
    levels, changes = (table[table["response"] != "gap"] for table in (levels, changes))
    sets = list(levels["dataset"].unique())
    dashes, looks = _dashes(levels, phases), _looks(levels)
    kinds = ("level", "change") if changes["at"].nunique() > 1 else ("level",)
    across = 2 if len(kinds) == 2 else min(len(sets), 3) if columns == 2 else 1
    fig, axes = grid(len(kinds) * len(sets), across, columns, _xlabel(levels),
                     sharey="col" if len(kinds) == 2 else True)
    panels = dict(zip(itertools.product(sets, kinds), axes))
    since = _since(changes, phases)
    for (name, kind), ax in panels.items():
        ax.set_title(wrap(name, 36 if across == 1 else 24), pad=12 if phases else None)
        if kind == "change" or ax.get_subplotspec().is_first_col():
            ax.set_ylabel(f"change since {since}\n(nats per token)" if kind == "change" else LOGPS)
        _draw(ax, changes if kind == "change" else levels, name, dashes, looks)
        if phases:
            set_phases(ax, list(phases.values()))
        if kind == "change":
            ax.axhline(0, color=GREY, linewidth=0.6, zorder=ABOVE_GRID)
        elif floor is not None:
            ax.axhline(floor, **FLOOR, zorder=ABOVE_GRID)
    band = focus or crowd(levels["mean"])
    if band and not focus:  # what is far away gets a narrow part, and would lie on the edge of the panel
        room = 0.12 * (levels["mean"].max() - levels["mean"].min())
        axes[0].set_ylim(axes[0].get_ylim()[0] - room * (levels["mean"].min() < band[0]),
                         axes[0].get_ylim()[1] + room * (levels["mean"].max() > band[1]))
    for (_, kind), ax in panels.items():
        if band and kind == "level":
            set_focus(ax, *band, share=0.25 if focus else 0.75)
    _legend(fig, levels, dashes, looks, phases, floor, band)
    return fig, _caption(levels, since if len(kinds) == 2 else None, phases, floor, band)


def _dashes(levels: pandas.DataFrame, phases) -> dict[tuple[str, str], object]:
    """What tells runs apart, by (run, phase); runs that follow one another share the solid line."""
    runs = list(dict.fromkeys(zip(levels["run"], levels["phase"])))
    beside = [run for run in runs if not phases or run[0] not in phases]
    dashes = DASHES[1:] if phases else DASHES
    if len(beside) > len(dashes):
        raise UserError(f"scores of {len(runs)} runs: at most {len(DASHES)} can be told apart in one figure")
    return {run: DASHES[0] for run in runs} | dict(zip(beside, dashes))


def _looks(levels: pandas.DataFrame) -> dict[str, dict]:
    """Colour and marker of each response; those of chosen and rejected are always the same."""
    found = set(levels["response"])
    responses = ["chosen", "rejected", *sorted(found - {"chosen", "rejected"})]
    return {response: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            for i, response in enumerate(responses) if response in found}


def _draw(ax, curves: pandas.DataFrame, name: str, dashes, looks) -> None:
    keys = ["dataset", "run", "phase", "response"]
    for ((run, phase), dash), (response, look) in itertools.product(dashes.items(), looks.items()):
        here = curves[(curves[keys] == [name, run, phase, response]).all(axis=1)].sort_values("at")
        if not here.empty:
            draw_curve(ax, here, look | {"linestyle": dash}, " ".join(filter(None, (run, phase, response))))


def _xlabel(levels: pandas.DataFrame) -> str:
    names = set(levels["phase"])
    return f"{plain(names.pop().upper())} step".strip() if len(names) == 1 else "step"


def _since(changes: pandas.DataFrame, phases) -> str:
    firsts = changes.groupby(["dataset", "run", "phase", "response"])["step"].min().unique()
    return "the first step" if phases or len(firsts) != 1 else f"step {firsts[0]:g}"


def interval(levels: pandas.DataFrame) -> str:
    """What is shaded, and over how many rows, like "95% interval, n = 398 to 400, 2 scores missing"; or nothing. Of a
    csv alone nobody knows what low and high are."""
    n = levels["n"][levels["n"] > 0]
    if n.empty:
        return "low to high, as given" if levels["low"].notna().any() else ""
    span = f"{n.max():,}" if n.min() == n.max() else f"{n.min():,} to {n.max():,}"
    missing = levels["left_out"].sum()
    return f"95% interval, n = {span}" + (f", {missing:,} scores missing" if missing else "")


def _legend(fig, levels, dashes, looks, phases, floor, band) -> None:
    handles = [Line2D([], [], **look, label=wrap(response or "log-prob")) for response, look in looks.items()]
    beside = {run: dash for run, dash in dashes.items() if not phases or run[0] not in phases}
    if len(dashes) > 1:
        alike = len({run for run, _ in dashes}) < len(dashes)
        handles += [Line2D([], [], color=GREY, linestyle=dash, label=wrap(f"{run} ({phase})" if alike else run))
                    for (run, phase), dash in beside.items()]
    handles += [Patch(color=GREY, **INTERVAL, label=plain(shaded))] if (shaded := interval(levels)) else []
    handles += [Line2D([], [], **FLOOR, label="best possible")] if floor is not None else []
    handles += [Line2D([], [], **CHANGE, label="scale changes")] if band else []
    add_legend(fig, handles, ", then ".join(phases) if phases else next(iter(dashes))[0] if len(dashes) == 1 else None)


def _caption(levels: pandas.DataFrame, since: str | None, phases, floor, band) -> str:
    runs = f"{', then '.join(phases)}" if phases else listed(levels["run"].unique())
    sets = listed(name for name in levels["dataset"].unique() if name)
    text = f"Mean log-prob per token (nats) of responses over steps of {runs}" + (f", on {sets}" if sets else "")
    most = levels.groupby("run", sort=False)["n"].max()
    rows, means = (list(most.index[which]) for which in (most > 0, most == 0))  # a csv has means alone
    how = ["row by row"] * bool(rows)
    how += ["of the means" if not rows else f"of {listed(means)} of the means"] * bool(means)
    text += f": its level (left) and its change since {since}, {', '.join(how)} (right)." if since else "."
    given = levels.loc[levels["run"].isin(means) & levels["low"].notna(), "run"].unique()
    shaded = [f"{interval(levels)} (mean ± Student's t standard errors over rows)"] * bool(rows)
    shaded += [f"low to high, as given for {listed(given)}"] * bool(len(given))
    text += f" Shaded: {'; '.join(shaded)}." if shaded else ""
    text += f" Dashed: the best possible value, {floor:g}." if floor is not None else ""
    return text + (" The scale changes at the dotted lines." if band else "")
