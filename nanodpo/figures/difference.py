"""The figure of a difference: the curves of two runs and below them, step by step, the second's minus the first's.

The runs may be any two; of a run and its fork the difference is exactly 0 up to the fork's step, which is marked, and
later steps have the same pairs in both, so that no part of the difference is that of other data.
"""

import math

import pandas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..folder.log import is_evaluation
from ..stats import over_problems
from . import training
from .axes import (
    COLOURS,
    DASHES,
    GREY,
    INTERVAL,
    LOGPS,
    MARKERS,
    ZERO,
    add_legend,
    crowd,
    draw_curve,
    focus_on_crowd,
    grid,
    plain,
    wrap,
)
from .noise import Marks
from .runs import Facts

PAIR = ["dataset", "row", "response", "step"]  # a score in two runs


def training_difference_figure(runs: dict[str, list[dict]], columns: int, facts: dict[str, Facts]):
    """(figure, caption) of the metrics that two runs, {name: lines of metrics.jsonl}, have at the same steps. None
    where they share no panel: those of a loss without a reference are others."""
    runs = {run: training.as_drawn(lines, facts[run]) for run, lines in runs.items()}
    panels = {label: names for label, (names, here) in training.panels_of(runs, facts).items() if len(here) == 2}
    below = subtract(*runs.values())
    if not panels or not below:
        return None
    held_out = any(map(is_evaluation, below))
    look = training.FAINT if held_out else {}
    marks, fig, pairs = Marks("a step's mean"), *framed(panels, columns, facts)
    for (label, names), (above, ax) in zip(panels.items(), pairs):
        for side, name in names.items():
            for colour, (run, lines) in zip(COLOURS, runs.items()):
                training.curves(above, run, lines, name, training.LOOKS[side] | {"color": colour}, look, 0)
            training.curves(ax, "difference", below, name, training.LOOKS[side] | {"color": "black"}, look, 0)
        if label in training.PANELS:
            marks.band(ax, 0, math.hypot(*(training.noise_of_step(label, f) for f in facts.values())))
    sides = dict.fromkeys(side for names in panels.values() for side in names if side != "loss")
    looks = {side: training.LOOKS[side] | ({} if held_out else {"marker": ""}) for side in sides}
    finish(fig, runs, looks, facts, marks, held_out)
    more = " that is drawn, of evenly spaced ones" * training.too_many(runs)
    more += ", and at the large markers over all held-out pairs" * held_out
    more += training.of_loss(panels, facts)
    rewards = not {training.REWARDS, training.FREE_REWARDS}.isdisjoint(panels)
    more += ". The rewards of each run have its own beta" * (rewards and len({f.beta for f in facts.values()}) > 1)
    return fig, caption("Training", runs, facts, f"means over the pairs of a step{more}") + marks.caption


def scored_difference_figure(scores: pandas.DataFrame, runs: list[str], columns: int, facts: dict[str, Facts]):
    """(figure, caption) of the mean log-probs per token that two runs give the same responses at the same steps, in
    each data set; None where they have none. Intervals of the difference are over problems, row by row."""
    first, second = (scores[scores["run"] == run].set_index(PAIR) for run in runs)
    both = first.join(second["mean_logps"].rename("other"), how="inner").reset_index().dropna(
        subset=["mean_logps", "other"])
    if both.empty:
        return None
    both = both.assign(at=both["step"], difference=both["other"] - both["mean_logps"])
    labels = {name: f"{plain(name)}: {LOGPS}" for name in both["dataset"].unique()}
    responses = list(both["response"].unique())
    looks = {response: {"color": GREY, "linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}
             for i, response in enumerate(responses)}
    marks, scale, shaded, fig, pairs = Marks("a mean"), "", False, *framed(labels.values(), columns, facts)
    for name, (above, ax) in zip(labels, pairs):
        ax.set_ylabel("difference\n(nats per token)")
        here = both[both["dataset"] == name]
        for response, look in looks.items():
            part = here[here["response"] == response]
            for colour, run, column in zip(COLOURS, runs, ("mean_logps", "other")):
                means = part.groupby("step")[column].mean()
                above.plot(means.index, means, **look | {"color": colour}, label=f"{run} {response}")
            curve = over_problems(part, ["at"], "difference")
            draw_curve(ax, curve, look | {"color": "black"}, f"difference {response}", outlined=len(looks) > 1)
            shaded |= bool(curve["low"].notna().any())  # of one problem there is no interval
        levels = here.groupby(["response", "step"])[["mean_logps", "other"]].mean().stack()
        if band := crowd(levels):
            focus_on_crowd([above], levels, band)
            scale = " The scale changes at the dotted lines."
        rows = here.groupby(["response", "step"]).size().min()
        marks.band(ax, 0, math.hypot(*(f.noise.logps for f in facts.values())) / math.sqrt(rows))
    finish(fig, runs, looks, facts, marks, intervals=shaded)
    what = "means over the rows that both have"
    what += ", with the 95% interval of the difference over their problems" * shaded
    return fig, caption("Log-probs of responses", runs, facts, what) + scale + marks.caption


def subtract(first: list[dict], second: list[dict]) -> list[dict]:
    """The second run's lines minus the first's: of each step the metrics that both have, training and evaluation each
    in a line of its own."""
    def by_step(lines):
        return {(line["step"], is_evaluation(line)): line for line in lines}

    first, second = by_step(first), by_step(second)
    return [{"step": key[0]} | {name: second[key][name] - value for name, value in line.items()
                                if name != "step" and isinstance(second[key].get(name), (int, float))}
            for key, line in first.items() if key in second]


def framed(labels, columns: int, facts: dict[str, Facts]):
    """(a figure, [(axes of the curves, axes of their difference below it)] for each label), forks marked."""
    labels = list(labels)
    across = len(labels) if columns == 2 and len(labels) <= 3 else 1
    fig, axes = grid(2 * len(labels), across, columns)
    pairs = list(zip(axes[:across], axes[across:])) if across > 1 else list(zip(axes[::2], axes[1::2]))
    for label, (above, below) in zip(labels, pairs):
        above.set_ylabel(label)
        below.set_ylabel("difference")
        below.axhline(0, **ZERO)
        for step in training.forks(facts):
            above.axvline(step, **training.FORK)
            below.axvline(step, **training.FORK)
    return fig, pairs


def finish(fig, runs, looks: dict[str, dict], facts: dict[str, Facts], marks: Marks, held_out: bool = False,
           intervals: bool = False) -> None:
    """The legend: the runs by colour, then the sides by dash."""
    first, second = runs
    handles = [Line2D([], [], color=colour, label=wrap(run)) for colour, run in zip(COLOURS, runs)]
    handles.append(Line2D([], [], color="black", label=wrap(f"{second} minus {first}")))
    handles += [Line2D([], [], **look | {"color": GREY}, label=plain(name)) for name, look in looks.items()]
    handles += [Line2D([], [], **training.FORK, label="fork")] * bool(training.forks(facts))
    handles += [Patch(color="black", **INTERVAL, label="95% interval")] * intervals
    if held_out:
        handles += [Line2D([], [], color=GREY, **training.FAINT, label="training"),
                    Line2D([], [], color=GREY, **training.PROMINENT, marker="o", linestyle="", label="held-out")]
    add_legend(fig, handles + marks.handles)


def caption(what: str, runs, facts: dict[str, Facts], means: str) -> str:
    first, second = runs
    what += f" of {first} and {second} over steps, and below {second} minus {first}: {means}."
    return what + training.at_forks(training.forks(facts))
