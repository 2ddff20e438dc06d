"""The figure of dynamics: log-probs of responses over steps, their level and beside it how far they moved."""

import itertools
import math

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
    focus_on_crowd,
    grid,
    listed,
    plain,
    set_focus,
    set_phases,
    wrap,
)
from .bars import draw_bars
from .intervals import OVER_PROBLEMS, said_missing
from .noise import Marks, Noise


def dynamics_figure(levels: pandas.DataFrame, changes: pandas.DataFrame, columns: int, focus, floor, phases,
                    noise: dict[str, Noise]):
    """Log-prob per token of each response over steps: a line of panels a data set, the level and beside it the change;
    of one checkpoint a run, a bar for each response, or a point where the scale changes.

    `levels` and `changes` are tables of curves (intervals.py). The band `focus` gets a quarter of the level's height;
    without one, values that lie close together get three quarters where others are far away. `floor` is a level to
    mark. With `phases`, {run: (name, first step, last step)}, `at` is a place on an axis of these phases. `noise` is
    that of each run in bfloat16.
    """
    levels, changes = (table[table["response"] != "gap"] for table in (levels, changes))
    sets, bars = list(levels["dataset"].unique()), has_bars(levels, phases)
    dashes, looks = dashes_of(levels, phases), looks_of(levels)
    marks = Marks("a mean")
    fig, panels = panel_grid(sets, ["level"] if bars else ["level", "change"], columns, xlabel(levels, bars), phases)
    since, band = _since(changes, phases), focus or _band(levels)
    for (name, kind), ax in panels.items():
        if kind == "change" or ax.get_subplotspec().is_first_col():
            ax.set_ylabel(f"change since {since}\n(nats per token)" if kind == "change" else LOGPS)
        draw_panel(ax, changes if kind == "change" else levels, name, dashes, looks, bars, from_zero=not band)
        _noise(marks, ax, levels[levels["dataset"] == name], noise, kind)
        if phases:
            set_phases(ax, list(phases.values()))
        if kind == "change":
            ax.axhline(0, color=GREY, linewidth=0.6, zorder=ABOVE_GRID)
        elif floor is not None:
            ax.axhline(floor, **FLOOR, zorder=ABOVE_GRID)
    of_levels = [ax for (_, kind), ax in panels.items() if kind == "level"]
    if focus:
        band = focus if all([set_focus(ax, *focus) for ax in of_levels]) else None
    elif band:
        focus_on_crowd(of_levels, levels["mean"].dropna(), band)
    handles = [Line2D([], [], **FLOOR, label="best possible")] if floor is not None else []
    handles += marks.handles
    handles += [Line2D([], [], **CHANGE, label="scale changes")] if band else []
    drawn = levels if bars else pandas.concat([levels, changes.assign(left_out=0)], ignore_index=True)
    legend_of(fig, levels, dashes, looks, phases, interval(drawn), handles)
    return fig, _caption(drawn, None if bars else since, phases, floor, band) + marks.caption


def panel_grid(sets: list[str], kinds: list[str], columns: int, label: str, phases, **how):
    """(figure, {(data set, kind): its axes}), each under its data set's name; a line of panels a data set where there
    are two kinds. `how` as for grid."""
    across = 2 if len(kinds) == 2 else min(len(sets), 3) if columns == 2 else 1
    fig, axes = grid(len(kinds) * len(sets), across, columns, label, sharey="col" if len(kinds) == 2 else True, **how)
    panels = dict(zip(itertools.product(sets, kinds), axes))
    for (name, _), ax in panels.items():
        ax.set_title(wrap(name, 36 if across == 1 else 24), pad=12 if phases else None)
    return fig, panels


def dashes_of(levels: pandas.DataFrame, phases) -> dict[tuple[str, str], object]:
    """Returns the dash of each (run, phase); runs that follow one another share the solid line."""
    runs = list(dict.fromkeys(zip(levels["run"], levels["phase"])))
    beside = [run for run in runs if not phases or run[0] not in phases]
    dashes = DASHES[1:] if phases else DASHES
    if len(beside) > len(dashes):
        raise UserError(f"scores of {len(runs)} runs: at most {len(DASHES)} can be told apart in one figure; "
                        "name fewer")
    return {run: DASHES[0] for run in runs} | dict(zip(beside, dashes))


def looks_of(levels: pandas.DataFrame) -> dict[str, dict]:
    """Colour and marker of each response; those of chosen and rejected are always the same."""
    found = set(levels["response"])
    responses = ["chosen", "rejected", *sorted(found - {"chosen", "rejected"})]
    return {response: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            for i, response in enumerate(responses) if response in found}


def has_bars(levels: pandas.DataFrame, phases) -> bool:
    """Tells whether every run has one checkpoint alone: a curve of one point would say less than a bar. Phases have two
    points at least."""
    return not phases and not levels.duplicated(["dataset", "run", "phase", "response"]).any()


def draw_panel(ax, curves: pandas.DataFrame, name: str, dashes, looks, bars: bool, from_zero: bool = True) -> None:
    """The curves of a data set, or `bars`: see draw_bars."""
    keys, outlined = ["dataset", "run", "phase", "response"], len(set(dashes.values())) > 1
    if bars:
        return draw_bars(ax, curves[curves["dataset"] == name], dashes, looks, from_zero)
    for ((run, phase), dash), (response, look) in itertools.product(dashes.items(), looks.items()):
        here = curves[(curves[keys] == [name, run, phase, response]).all(axis=1)].sort_values("at")
        if not here.empty:
            draw_curve(ax, here, look | {"linestyle": dash}, " ".join(filter(None, (run, phase, response))),
                       outlined=outlined)


def _noise(marks: Marks, ax, levels: pandas.DataFrame, noise: dict[str, Noise], kind: str) -> None:
    """The band in which rounding alone moves the means of chosen and rejected: around no change, or their starts."""
    sides = levels[levels["response"].isin(["chosen", "rejected"]) & levels["run"].isin(noise) & (levels["n"] > 0)]
    starts = sides.sort_values("at", kind="stable").drop_duplicates(["run", "response"])
    places = [(start.mean, noise[start.run].logps / math.sqrt(start.n)) for start in starts.itertuples(index=False)]
    for around, deviation in places if kind == "level" else [(0, max((d for _, d in places), default=0))]:
        marks.band(ax, around, deviation)


def _band(levels: pandas.DataFrame) -> tuple[float, float] | None:
    """The band in which most means lie close together, wide enough for their intervals, with round ends; None where
    there is none."""
    if not (band := crowd(levels["mean"])):
        return None
    inside = levels["mean"].between(*band)
    ends = levels.loc[inside, ["low", "high"]].stack()
    low, high = min(band[0], *ends), max(band[1], *ends)
    unit = 10 ** math.floor(math.log10(high - low) - 0.5)  # 3 to 32 of these are the height of the band
    band = math.floor(low / unit) * unit, math.ceil(high / unit) * unit
    return None if levels["mean"][~inside].between(*band).any() else band


def xlabel(levels: pandas.DataFrame, bars: bool) -> str:
    names, steps = set(levels["phase"]), _steps(levels).unique()
    text = f"{plain(names.pop().upper())} step".strip() if len(names) == 1 else "step"
    if bars:
        return f"at {text} {steps[0]:g}" if len(steps) == 1 and steps[0] == steps[0] else ""
    return text


def _steps(levels: pandas.DataFrame) -> pandas.Series:
    """The step of each line; NaN of a model that is no run's, whose step 0 in the tables is none. A csv, which counts
    no rows, may leave out its phase."""
    return levels["step"].where((levels["phase"] != "") | (levels["n"] == 0))


def _since(changes: pandas.DataFrame, phases) -> str:
    firsts = changes.groupby(["dataset", "run", "phase", "response"])["step"].min().unique()
    return "the first step" if phases or len(firsts) != 1 else f"step {firsts[0]:g}"


def interval(levels: pandas.DataFrame) -> str:
    """Returns the words for what is shaded, like "95% interval, n = 398 to 400, 2 scores missing"; none where nothing
    is. Of a csv alone nobody knows what low and high are."""
    given = levels[levels["low"].notna()]  # of one problem there is no interval
    n = given["n"][given["n"] > 0]
    if n.empty:
        return "low to high, as given" if len(given) else ""
    span = f"{n.max():,}" if n.min() == n.max() else f"{n.min():,} to {n.max():,}"
    return f"95% interval, n = {span}" + said_missing(levels)


def legend_of(fig, levels: pandas.DataFrame, dashes, looks, phases, shaded: str, more: list) -> None:
    """Responses, runs, the words for what is shaded, and `more`; over it the run's name where there is one alone."""
    bars = has_bars(levels, phases)
    steps = _steps(levels).groupby(levels["run"]).first()
    beside = {run: dash for run, dash in dashes.items() if not phases or run[0] not in phases}
    handles = [Line2D([], [], **look, linestyle="" if bars else "-", label=wrap(response or "log-prob"))
               for response, look in looks.items()]
    if len(dashes) > 1:
        alike = len({run for run, _ in dashes}) < len(dashes)
        several = bars and steps.nunique(dropna=False) > 1
        said = {run: f", step {steps[run]:g}" if several and steps[run] == steps[run] else "" for run, _ in beside}
        handles += [Line2D([], [], color=GREY, linestyle=dash,
                           label=wrap((f"{run} ({phase})" if alike else run) + said[run]))
                    for (run, phase), dash in beside.items()]
    if shaded:
        handles.append(Line2D([], [], color="black", linewidth=1, label=wrap(shaded)) if bars else
                       Patch(color=GREY, **INTERVAL, label=wrap(shaded)))
    add_legend(fig, handles + more,
               ", then ".join(phases) if phases else next(iter(dashes))[0] if len(dashes) == 1 else None)


def _caption(levels: pandas.DataFrame, since: str | None, phases, floor, band) -> str:
    runs = f"{', then '.join(phases)}" if phases else listed(levels["run"].unique())
    sets = listed(name for name in levels["dataset"].unique() if name)
    where = "over steps of" if since else "under"
    text = f"Mean log-prob per token (nats) of responses {where} {runs}" + (f", on {sets}" if sets else "")
    most = levels.groupby("run", sort=False)["n"].max()
    rows, means = (list(most.index[which]) for which in (most > 0, most == 0))  # a csv has means alone
    how = ["row by row"] * bool(rows)
    how += ["of the means" if not rows else f"of {listed(means)} of the means"] * bool(means)
    text += f": its level (left) and its change since {since}, {', '.join(how)} (right)." if since else "."
    given = levels.loc[levels["run"].isin(means) & levels["low"].notna(), "run"].unique()
    said = interval(levels[~levels["run"].isin(means)])
    shaded = [f"{said} (mean ± Student's t standard errors {OVER_PROBLEMS})"] * bool(said)
    shaded += [f"low to high, as given for {listed(given)}"] * bool(len(given))
    text += f" {'Shaded' if since else 'Lines'}: {'; '.join(shaded)}." if shaded else ""
    text += f" Dashed: the best possible value, {floor:g}." if floor is not None else ""
    return text + (" The scale changes at the dotted lines." if band else "")
