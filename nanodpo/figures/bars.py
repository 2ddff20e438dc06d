"""Draws a single checkpoint: a mean and an interval for each response, in place of a curve of one point."""

import itertools

import pandas
from matplotlib import rcParams
from matplotlib.colors import to_rgba

from .axes import plain


def draw_bars(ax, curves: pandas.DataFrame, dashes: dict, looks: dict, from_zero: bool) -> None:
    """A group for each response of `looks`, in it for each (run, phase) of `dashes` the response's marker at the mean,
    its interval from low to high, and a bar from 0, edged in the run's dash. Not `from_zero`, where the scale changes
    on the way, a length would say nothing: there is no bar."""
    wide = 0.8 / len(dashes)
    for (j, ((run, phase), dash)), (i, (response, look)) in itertools.product(
            enumerate(dashes.items()), enumerate(looks.items())):
        here = curves[(curves[["run", "phase", "response"]] == [run, phase, response]).all(axis=1)]
        for bar in here.itertuples():
            at, colour = i + (j - (len(dashes) - 1) / 2) * wide, look["color"]
            if from_zero:
                ax.bar(at, bar.mean, 0.9 * wide, facecolor=to_rgba(colour, 0.3), edgecolor=colour, linewidth=0.8,
                       linestyle=dash)
            if bar.low == bar.low:  # a single row has no interval
                ax.vlines(at, bar.low, bar.high, color="black" if from_zero else colour, linewidth=1, zorder=3,
                          linestyle="-" if from_zero else dash)
            ax.plot([at], [bar.mean], **look, linestyle="", zorder=4,
                    label=" ".join(filter(None, (run, phase, response))))
    ax.set_xticks(range(len(looks)), [plain(name) for name in looks], rotation=20, ha="right", rotation_mode="anchor")
    if from_zero:
        ax.axhline(0, color="black", linewidth=rcParams["axes.linewidth"])
    room = 0.6 + max(0, 3 - len(looks)) / 2  # one bar alone is no wall
    ax.set_xlim(-room, len(looks) - 1 + room)
