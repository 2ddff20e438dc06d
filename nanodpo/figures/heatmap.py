"""The heatmap: how far the log-prob of each example moved, at each checkpoint."""

import numpy as np
import pandas
from matplotlib import rcParams
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..errors import UserError
from .axes import add_legend, grid, plain, wrap
from .noise import Marks, Noise
from .records import SIDES

COLOURS = "RdBu"  # red fell, blue rose, white is no change; the colour-blind tell these two apart
NOISY, MISSING = "0.85", "0.6"  # a change that rounding alone may have made; a score that is not there


def heatmap_figure(scores: pandas.DataFrame, columns: int, noise: dict[str, Noise]):
    """Change of mean_logps since the first step, examples x checkpoints, chosen and rejected of one run side by side.

    An example has the same line in both: lines are sorted by the final change of chosen, the largest rise on top.
    The colours end at the 98th percentile of |change|; where values lie beyond, the colour bar says so by an arrow.
    `noise` is that of each run in bfloat16: a change of no more than two standard deviations of it is grey.
    """
    runs, sets = scores["run"].unique(), list(scores["dataset"].unique())
    if len(runs) > 1:
        raise UserError(f"the scores are of the runs {', '.join(runs)}; a heatmap has one: name it as RUN")
    scores = scores[scores["response"].isin(SIDES)]
    if scores["step"].nunique() < 2:
        raise UserError("a heatmap needs the scores of chosen or rejected at two steps or more")
    tables = {name: _changes(scores[scores["dataset"] == name]) for name in sets}
    values = np.concatenate([table.to_numpy().ravel() for pair in tables.values() for table in pair.values()])
    there = np.isfinite(values)
    values = np.abs(values[there])
    limit = float(np.quantile(values, 0.98)) or float(values.max()) or 1.0
    deviation = noise.get(runs[0], Noise()).logps
    fig, axes = grid(2 * len(sets), 2, columns, height=2.2, sharey="row")
    images = []
    for ax, (name, side) in zip(axes, [(name, side) for name in sets for side in SIDES]):
        images += _draw(ax, tables[name].get(side), side, limit, 2 * deviation,
                        " " if columns == 2 else "\n")
        if side == "chosen":
            ax.set_ylabel(f"examples of {wrap(name, 24)},\nsorted by the last change of chosen")
    beyond = int((values > limit).sum())
    bar = fig.colorbar(images[0], ax=axes, extend="both" if beyond else "neither", shrink=0.9, aspect=30, pad=0.02)
    bar.set_label(f"change since step {scores['step'].min():g} (nats per token)")
    marks = Marks("one example", "; examples that moved no further are grey")
    marks.band(bar.ax, 0, min(deviation, limit / 2), facecolor=NOISY, edgecolor="0.6", zorder=2)  # over the colours
    if marks.handles:
        add_legend(fig, [*marks.handles, Patch(color=NOISY, label="an example within it")], runs[0])
    else:
        fig.suptitle(wrap(runs[0]), fontsize="medium")
    caption = (f"Change of the mean log-prob per token (nats) of each example since step {scores['step'].min():g} of "
               f"{runs[0]}: chosen (left) and rejected (right), blue rose, red fell. An example has one line in both, "
               "sorted by the final change of chosen.")
    ends = f" Colours end at ± {limit:.3g}, the 98th percentile; {beyond:,} of {len(values):,} values lie beyond."
    lost = " Dark grey: a score is missing." * bool(not there.all())
    return fig, caption + ends * bool(beyond) + lost + marks.caption


def _changes(scores: pandas.DataFrame) -> dict[str, pandas.DataFrame]:
    """{side: examples x steps without the first}, in the order in which they are drawn."""
    tables = {side: part.pivot(index="row", columns="step", values="mean_logps")
              for side, part in scores.groupby("response")}
    tables = {side: table.sub(table.iloc[:, 0], axis=0).iloc[:, 1:] for side, table in tables.items()}
    by = tables.get("chosen", next(iter(tables.values())))
    order = by.iloc[:, -1].sort_values(ascending=False, kind="stable").index
    return {side: tables[side].reindex(order) for side in SIDES if side in tables}


def _draw(ax, table: pandas.DataFrame | None, side: str, limit: float, noise: float, gap: str) -> list:
    if table is None:
        ax.set_axis_off()
        return []
    final = table.iloc[:, -1].dropna()
    ax.set_title(f"{side}:{gap}{(final > noise).sum():,} of {len(final):,} rise" + f"{gap}beyond noise" * (noise > 0),
                 fontsize=rcParams["legend.fontsize"])
    ax.grid(False)
    ax.set_facecolor(MISSING)
    how = {"aspect": "auto", "interpolation": "nearest"}
    image = ax.imshow(table.to_numpy(), cmap=COLOURS, vmin=-limit, vmax=limit, **how)
    if noise:
        ax.imshow(table.abs().le(noise).astype(float).replace(0.0, np.nan).to_numpy(), cmap=ListedColormap([NOISY]),
                  **how)
    places = [int(i) for i in MaxNLocator(5, integer=True).tick_values(0, table.shape[1] - 1)
              if 0 <= i < table.shape[1]]
    ax.set_xticks(places, [plain(f"{table.columns[i]:g}") for i in places])
    ax.set_yticks([])
    ax.spines[:].set_visible(True)
    return [image]
