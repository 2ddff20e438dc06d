"""The parts of every figure: widths, colours, grids of panels, legends, names as text, and two special axes.

What tells two curves apart is never colour alone: dash, marker or place differs too. Legends stand above the panels,
where no curve can be.
"""

import math
import textwrap

import numpy as np
from matplotlib import rcParams
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from ..errors import UserError
from ..screen import printable

WIDTHS = {1: 3.3, 2: 6.9}  # inches: one and two columns of a journal
# Okabe and Ito's colours, which the colour-blind tell apart; not their yellow, too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (9, 2)))
MARKERS = "os^DvPX*"
GREY = "0.35"
INTERVAL = {"alpha": 0.2, "linewidth": 0}
OUTLINE = 0.5  # points: of intervals that lie on one another in one colour, in the dash of their curve
CHANGE = {"color": GREY, "linewidth": 0.6, "linestyle": (0, (1, 2))}  # where a scale changes
ZERO = {"color": GREY, "linewidth": 0.5, "zorder": 0.5}
WHOLE = {"integer": True, "min_n_ticks": 1}  # of ticks that are steps: one alone, too, is a whole number
ABOVE_GRID = 0.9  # and below what is drawn
FLOOR = {"color": "black", "linewidth": 0.8, "linestyle": (0, (6, 3))}
LOGPS = "log-prob (nats per token)"
TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
       ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "\N{MINUS SIGN}": "$-$",
       "\N{PLUS-MINUS SIGN}": r"$\pm$"}
TEX |= {letter: f"\\{letter}" for letter in "#$%&_{}"}


def escape_tex(text: str) -> str:
    """Text as LaTeX sets it: no character of it is a command."""
    return "".join(TEX.get(letter, letter) for letter in text)


def shown(text: str) -> str:
    """Text from outside (a folder's name, say) on one line, with an escape for each character that can't be printed:
    XML, and so SVG, has no place for those."""
    return printable(" ".join(text.split()))


def plain(text: str) -> str:
    """Text of a figure as it stands: a dollar sign starts no formula, and under LaTeX no character is a command."""
    return escape_tex(shown(text)) if rcParams["text.usetex"] else shown(text).replace("$", r"\$")


def wrap(name: str, width: int = 36) -> str:
    """A name as text of a figure: whole, on several lines where it is long."""
    return "\n".join(map(plain, textwrap.wrap(shown(name), width)))


def listed(names) -> str:
    """Names in a sentence: "a, b and c"; of none, nothing."""
    *names, last = [*map(str, names)] or [""]
    return f"{', '.join(names)} and {last}" if names else last


def new_figure(columns: int, height: float) -> Figure:
    """A figure as wide as a journal's columns; `height` inches, and more where a style has larger letters."""
    larger = max(1, FontProperties(size=rcParams["axes.labelsize"]).get_size() / 7)
    return Figure(figsize=(WIDTHS[columns], height * larger), layout="constrained")


def grid(panels: int, across: int, columns: int, xlabel: str = "step", height: float = 1.6, **how):
    """(figure, its axes in reading order), `across` panels a line, `height` inches a line; `how` as for subplots."""
    down = math.ceil(panels / across)
    fig = new_figure(columns, 0.2 + 0.8 / columns + height * down)
    axes = list(fig.subplots(down, across, squeeze=False, **{"sharex": True} | how).flat)
    for ax in axes[panels:]:
        ax.remove()
    for ax in axes[max(0, panels - across) : panels]:  # the lowest of each column, above a gap in the last line too
        ax.set_xlabel(xlabel)
        ax.tick_params(labelbottom=True)
    for ax in axes[:panels]:
        ax.xaxis.get_major_locator().set_params(**WHOLE)
        ax.xaxis.set_major_formatter(lambda x, _: (f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:g}").replace(
            "-", "\N{MINUS SIGN}"))
    return fig, axes[:panels]


def add_legend(fig: Figure, handles: list, title: str | None = None) -> None:
    """Above the panels, in as many columns as fit the width; of long names the figure grows with the legend."""
    for columns in range(len(handles), 0, -1):
        legend = fig.legend(handles=handles, ncols=columns, title=title and wrap(title), loc="outside upper center")
        if columns == 1 or legend.get_window_extent().width <= 0.98 * fig.bbox.width:
            more = legend.get_window_extent().height - fig.bbox.height / 4
            return fig.set_figheight(fig.get_figheight() + max(0, more) / fig.dpi)
        legend.remove()


def draw_curve(ax, curve, look: dict, label: str, shade: dict = INTERVAL, outlined: bool = False) -> None:
    """A line through columns at and mean, its interval from low to high shaded, which may be missing (NaN).

    `outlined`: the interval gets an edge in the line's dash, and a lighter fill; for a panel in which intervals of one
    colour lie on one another.
    """
    ax.plot(curve["at"], curve["mean"], **look, label=label)
    if curve["low"].notna().any():
        fill = {"color": look["color"]} | shade
        if outlined:
            fill = {"facecolor": to_rgba(look["color"], shade["alpha"] / 2), "edgecolor": to_rgba(look["color"], 0.8),
                    "linewidth": OUTLINE, "linestyle": look["linestyle"]}
        ax.fill_between(curve["at"].astype(float), curve["low"].astype(float), curve["high"].astype(float), **fill)


def set_focus(ax, low: float, high: float, share: float = 0.25) -> bool:
    """Gives the band [low, high] `share` of the height of the y axis as it is now; outside it, one linear scale.

    Dotted lines mark where the scale changes, and both have a tick. Returns whether it does: in a band that holds all
    of the axis there is one scale. Raises UserError where LOW, an end of --focus, isn't below HIGH.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--focus {low:g} {high:g}: LOW must be below HIGH")
    bottom, top = min(ax.get_ylim()[0], low), max(ax.get_ylim()[1], high)
    rest = (top - bottom) - (high - low)
    share, slope = (share, (1 - share) / rest) if rest > 0 else (1.0, 1 / (high - low))
    far = 10 * (top - bottom)  # np.interp is flat past its ends, and what is out of sight must stay there
    values = [low - far, low, high, high + far]
    places = [(low - bottom - far) * slope, (low - bottom) * slope]
    places += [places[1] + share, places[1] + share + far * slope]
    ax.set_yscale("function", functions=(lambda y: np.interp(y, values, places),
                                         lambda place: np.interp(place, places, values)))
    for edge in (low, high) if rest > 0 else ():
        ax.axhline(edge, **CHANGE, zorder=ABOVE_GRID)
    ax.set_ylim(bottom, top)

    ticks = [low, high]
    for tick in (*MaxNLocator(4).tick_values(low, high), *MaxNLocator(6).tick_values(bottom, top)):
        gaps = np.abs(np.interp(ticks, values, places) - np.interp(tick, values, places))
        if bottom <= tick <= top and gaps.min() > 0.08:  # or their labels touch
            ticks.append(tick)
    ax.set_yticks(sorted(ticks), [plain(f"{tick:g}".replace("-", "\N{MINUS SIGN}")) for tick in sorted(ticks)])
    return rest > 0


def focus_on_crowd(axes: list, values, band: tuple[float, float]) -> None:
    """Gives the band that most of these values share, see `crowd`, most of the y axis that these axes share. Moves its
    ends away from the other values: they get a narrow part, and would lie on the edge of the panel."""
    room = 0.12 * (max(values) - min(values))
    bottom, top = axes[0].get_ylim()
    axes[0].set_ylim(bottom - room * (min(values) < band[0]), top + room * (max(values) > band[1]))
    for ax in axes:
        set_focus(ax, *band, share=0.75)


class Whole(ScalarFormatter):
    """Writes tiny and huge numbers whole, as 1.5e-06: a common factor would stand where the name of a phase stands."""

    def __call__(self, x, pos=None):
        return plain(f"{x:g}".replace("-", "\N{MINUS SIGN}")) if super().get_offset() else super().__call__(x, pos)

    def get_offset(self):
        return ""


def crowd(values) -> tuple[float, float] | None:
    """The band that most values share while the others lie far away, with an empty stretch of more than 0.9 of the
    whole range between; its ends are round numbers. None where there is no such stretch."""
    values = np.sort(np.asarray(values, dtype=float)[np.isfinite(values)])
    gaps = np.diff(values)
    if not len(gaps) or gaps.max() <= 0.9 * (values[-1] - values[0]):
        return None
    cut = int(gaps.argmax()) + 1
    most = values[:cut] if cut > len(values) - cut else values[cut:]
    ends = MaxNLocator(4).tick_values(most[0], most[-1])
    return (float(ends[0]), float(ends[-1])) if most[0] < most[-1] else None


def place(steps, phase: int, first: float, last: float):
    """Places steps of the phase number `phase` (0-based) on an axis on which each phase is one unit wide."""
    return phase + (steps - first) / max(last - first, 1)


def set_phases(ax, phases: list[tuple[str, float, float]]) -> None:
    """Makes an x axis of phases, (name, first step, last step), one unit each: a line and a name each, ticks in own
    steps."""
    ax.yaxis.set_major_formatter(Whole())
    ax.update_datalim([(0, 0), (len(phases), 0)], updatey=False)  # a phase of a single step is as wide as others
    ax.autoscale_view(scaley=False)
    larger = FontProperties(size=rcParams["axes.labelsize"]).get_size() / 7
    width = ax.figure.get_figwidth() / ax.get_gridspec().ncols - 0.6 * larger
    width, ticks = width / len(phases), {}  # inches of a phase; 0.3 are room for a label
    for i, (name, first, last) in enumerate(phases):
        ax.text(i + 0.5, 1.01, plain(name), transform=ax.get_xaxis_transform(), ha="center", va="bottom",
                fontsize=rcParams["xtick.labelsize"])
        for tick in MaxNLocator(max(1, int(width / 0.3)), integer=True).tick_values(first, last):
            near = [abs(place(tick, i, first, last) - bound) for bound in range(1, len(phases))]
            if first <= tick <= last and min(near, default=1) > 0.3 / width:
                ticks[place(tick, i, first, last)] = f"{tick:g}"
        if i:
            ax.axvline(i, color="black", linewidth=0.6, zorder=ABOVE_GRID)
            ticks[i] = f"{phases[i - 1][2]:g} | {first:g}"  # the last step of one phase is the first of the next
    ax.set_xticks(sorted(ticks), [plain(ticks[at]) for at in sorted(ticks)])
