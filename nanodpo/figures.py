"""The figures: curves of metrics.jsonl, curves of scores.parquet with intervals, the focus axis.

A function takes numbers and gives a Figure; none opens a window or keeps state. What tells two curves apart is never
colour alone: sides also differ by dash or marker. Legends stand above the panels, where no curve can be.
"""

import itertools
import math
import textwrap

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from .errors import UserError

WIDTHS = {1: 3.3, 2: 6.9}  # inches: one and two columns of a journal
# Okabe and Ito's colours, which the colour-blind tell apart; not their yellow, too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (9, 2)))
MARKERS = "os^DvPX*"
GREY = "0.35"
FAINT = {"alpha": 0.4, "linewidth": 0.6, "linestyle": "-", "marker": ""}
INTERVAL = {"alpha": 0.2, "linewidth": 0}
CHANGE = {"color": GREY, "linewidth": 0.6, "linestyle": (0, (1, 2))}

LOOKS = {"loss": {"color": "black", "linestyle": "-", "marker": "o"}} | {
    side: {"color": COLOURS[i], "linestyle": DASHES[i], "marker": MARKERS[i]}
    for i, side in enumerate(("chosen", "rejected", "margin"))}
LOGPS = "log-prob (nats per token)"
# Of the training figure: a panel's y label, and the metric of each side.
PANELS = {"loss": {"loss": "loss"},
          r"reward, $\beta\,\log(\pi/\pi_{\mathrm{ref}})$ (nats)":
              {"chosen": "rewards/chosen", "rejected": "rewards/rejected", "margin": "rewards/margins"},
          LOGPS: {"chosen": "logps_per_token/chosen", "rejected": "logps_per_token/rejected"}}


def training_figure(runs: dict[str, list[dict]], columns: int) -> Figure:
    """Loss, rewards and log-probs of runs, {name: lines of metrics.jsonl}.

    The colour is the side, or with several runs the run. Training is faint where there is evaluation.
    """
    if len(runs) > len(COLOURS):
        raise UserError(f"{len(runs)} runs: at most {len(COLOURS)} can be told apart in one figure")
    colours = {run: {"color": colour} for run, colour in zip(runs, COLOURS)} if len(runs) > 1 else {}
    there = {name for lines in runs.values() for line in lines for name in line}
    held_out = any(name.startswith("eval_") for name in there)
    panels = {label: {side: name for side, name in names.items() if there & {name, f"eval_{name}"}}
              for label, names in PANELS.items()}
    panels = {label: names for label, names in panels.items() if names}
    fig, axes = _grid(len(panels), columns)
    for ax, (label, names) in zip(axes, panels.items()):
        ax.set_ylabel(label)
        for run, lines in runs.items():
            for side, name in names.items():
                _curves(ax, run, lines, name, LOOKS[side] | colours.get(run, {}))
    handles = [Line2D([], [], **colour, label=_wrap(run)) for run, colour in colours.items()]
    for side in dict.fromkeys(side for names in panels.values() for side in names if side != "loss"):
        look = LOOKS[side] | ({"color": GREY} if colours else {}) | ({} if held_out else {"marker": ""})
        handles.append(Line2D([], [], **look, label=side))
    if held_out:
        handles += [Line2D([], [], color=GREY, **FAINT, label="training"),
                    Line2D([], [], color=GREY, linestyle="", marker="o", label="held-out")]
    _legend(fig, handles, None if colours else next(iter(runs)))
    return fig


def _curves(ax, run: str, lines: list[dict], name: str, look: dict) -> None:
    """A metric of a run over steps: in training, and under evaluation."""
    held_out, trained = ([(line["step"], line[key]) for line in lines if key in line] for key in (f"eval_{name}", name))
    if trained:
        plain = {"marker": "." if len(trained) == 1 else ""}  # a single point has no line
        ax.plot(*zip(*trained), **look | (FAINT if held_out else {}) | plain, label=f"{run} {name}")
    if held_out:
        ax.plot(*zip(*held_out), **look, label=f"{run} eval_{name}")


def dynamics_figure(scores, columns: int, focus: tuple[float, float] | None = None) -> Figure:
    """Mean log-prob per token of each response over steps, one panel a data set, from a table of scores.parquet.

    The shaded interval is mean +- 1.96 sem, sem = standard deviation (n - 1) / sqrt(n) over rows; none where n is 1.
    """
    keys = ["dataset", "run", "phase", "response"]
    table = scores.groupby([*keys, "step"])["mean_logps"].agg(["mean", "sem", "count"]).reset_index()
    sets, runs = list(scores["dataset"].unique()), list(dict.fromkeys(zip(scores["run"], scores["phase"])))
    phases, found = {phase for _, phase in runs}, set(scores["response"])
    if len(runs) > len(DASHES):
        raise UserError(f"scores of {len(runs)} runs: at most {len(DASHES)} can be told apart in one figure")
    responses = ["chosen", "rejected", *sorted(found - {"chosen", "rejected"})]
    looks = {response: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
             for i, response in enumerate(responses) if response in found}
    fig, axes = _grid(len(sets), columns, f"{max(phases).upper()} step".strip() if len(phases) == 1 else "step", True)
    for ax, name in zip(axes, sets):
        ax.set_title(_wrap(name))
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel(LOGPS)
        for ((run, phase), dash), (response, look) in itertools.product(zip(runs, DASHES), looks.items()):
            here = table[(table[keys] == [name, run, phase, response]).all(axis=1)]  # groupby sorted it by step
            if here.empty:
                continue
            ax.plot(here["step"], here["mean"], **look, linestyle=dash, label=f"{run} {phase} {response}")
            reach = 1.96 * here["sem"]
            ax.fill_between(here["step"], here["mean"] - reach, here["mean"] + reach, color=look["color"], **INTERVAL)
    for ax in axes if focus else []:
        set_focus(ax, *focus)
    handles = [Line2D([], [], **look, label=_wrap(response)) for response, look in looks.items()]
    if len(runs) > 1:
        alike = len({run for run, _ in runs}) < len(runs)
        handles += [Line2D([], [], color=GREY, linestyle=dash, label=_wrap(f"{run} ({phase})" if alike else run))
                    for (run, phase), dash in zip(runs, DASHES)]
    fewest, most = table["count"].min(), table["count"].max()
    n = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    handles += [Patch(color=GREY, **INTERVAL, label=f"95% interval, n = {n}")]
    handles += [Line2D([], [], **CHANGE, label="scale changes")] if focus else []
    _legend(fig, handles, runs[0][0] if len(runs) == 1 else None)
    return fig


def set_focus(ax, low: float, high: float, share: float = 0.25) -> None:
    """Gives the band [low, high] `share` of the height of the y axis as it is now; outside it, one linear scale.

    Dotted lines mark where the scale changes, and both have a tick.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high and 0 < share < 1):
        raise UserError(f"focus {low:g} {high:g}, share {share:g}: LOW must be below HIGH, share between 0 and 1")
    bottom, top = min(ax.get_ylim()[0], low), max(ax.get_ylim()[1], high)
    rest = (top - bottom) - (high - low)
    share, slope = (share, (1 - share) / rest) if rest > 0 else (1.0, 1 / (high - low))
    far = 10 * (top - bottom)  # np.interp is flat past its ends, and what is out of sight must stay there
    values = [low - far, low, high, high + far]
    places = [(low - bottom - far) * slope, (low - bottom) * slope]
    places += [places[1] + share, places[1] + share + far * slope]
    ax.set_yscale("function", functions=(lambda y: np.interp(y, values, places),
                                         lambda place: np.interp(place, places, values)))
    for edge in (low, high):
        ax.axhline(edge, **CHANGE, zorder=0)
    ax.set_ylim(bottom, top)

    ticks = [low, high]
    for tick in (*MaxNLocator(4).tick_values(low, high), *MaxNLocator(6).tick_values(bottom, top)):
        gaps = np.abs(np.interp(ticks, values, places) - np.interp(tick, values, places))
        if bottom <= tick <= top and gaps.min() > 0.08:  # or their labels touch
            ticks.append(tick)
    ax.set_yticks(sorted(ticks), [f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in sorted(ticks)])


def _grid(panels: int, columns: int, xlabel: str = "step", sharey: bool = False):
    """(figure, its axes in reading order): up to three panels a line in two columns, one in one."""
    across = min(panels, 3) if columns == 2 else 1
    down = math.ceil(panels / across)
    larger = max(1, FontProperties(size=rcParams["axes.labelsize"]).get_size() / 7)  # a style's letters need room too
    fig = Figure(figsize=(WIDTHS[columns], (0.2 + 0.8 / columns + 1.6 * down) * larger), layout="constrained")
    axes = list(fig.subplots(down, across, sharex=True, sharey=sharey, squeeze=False).flat)
    for ax in axes[panels:]:
        ax.remove()
    for ax in axes[max(0, panels - across) : panels]:  # the lowest of each column, above a gap in the last line too
        ax.set_xlabel(xlabel)
        ax.tick_params(labelbottom=True)
        ax.xaxis.get_major_locator().set_params(integer=True)
    return fig, axes[:panels]


def _wrap(name: str) -> str:
    """A name as text of a figure: whole, on several lines where it is long; a dollar sign starts no formula."""
    return textwrap.fill(name, 36).replace("$", r"\$")


def _legend(fig: Figure, handles: list[Line2D], title: str | None) -> None:
    """Above the panels, in as many columns as fit the width."""
    for columns in range(len(handles), 0, -1):
        legend = fig.legend(handles=handles, ncols=columns, title=title and _wrap(title), loc="outside upper center")
        if columns == 1 or legend.get_window_extent().width <= 0.98 * fig.bbox.width:
            return
        legend.remove()
