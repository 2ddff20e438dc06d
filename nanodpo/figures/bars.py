"""Draws a single checkpoint: a bar and an interval for each response, in place of a curve of one point."""

import itertools

import pandas
from matplotlib import rcParams
from matplotlib.colors import to_rgba

from .axes import plain


def draw_bars(ax, curves: pandas.DataFrame, dashes: dict, looks: dict) -> None:
    """A group of bars from 0 for each response of `looks`, in it a bar for each (run, phase) of `dashes`, edged in the
    run's dash; the marker of the response is at the mean, its interval from low to high."""
    wide = 0.8 / len(dashes)
    for (j, ((run, phase), dash)), (i, (response, look)) in itertools.product(
            enumerate(dashes.items()), enumerate(looks.items())):
        here = curves[(curves[["run", "phase", "response"]] == [run, phase, response]).all(axis=1)]
        for bar in here.itertuples():
            at, colour = i + (j - (len(dashes) - 1) / 2) * wide, look["color"]
            ax.bar(at, bar.mean, 0.9 * wide, facecolor=to_rgba(colour, 0.3), edgecolor=colour, linewidth=0.8,
                   linestyle=dash)
            if bar.low == bar.low:  # a single row has no interval
                ax.vlines(at, bar.low, bar.high, color="black", linewidth=1, zorder=3)
            ax.plot([at], [bar.mean], **look, linestyle="", zorder=4,
                    label=" ".join(filter(None, (run, phase, response))))
    ax.set_xticks(range(len(looks)), [plain(name) for name in looks], rotation=20, ha="right", rotation_mode="anchor")
    ax.axhline(0, color="black", linewidth=rcParams["axes.linewidth"])
    room = 0.6 + max(0, 3 - len(looks)) / 2  # one bar alone is no wall
    ax.set_xlim(-room, len(looks) - 1 + room)
