"""The figure of training: curves of metrics.jsonl.

A function that draws takes numbers and gives a Figure and its caption, plain text; none opens a window or keeps state.
"""

import math

from matplotlib.lines import Line2D

from ..errors import UserError
from .axes import COLOURS, DASHES, GREY, LOGPS, MARKERS, add_legend, grid, listed, wrap

FAINT = {"alpha": 0.4, "linewidth": 0.6, "marker": ""}
LOOKS = {"loss": {"color": "black", "linestyle": "-", "marker": "o"}} | {
    side: {"color": COLOURS[i], "linestyle": DASHES[i], "marker": MARKERS[i]}
    for i, side in enumerate(("chosen", "rejected", "margin"))}
# Of the training figure: a panel's y label, and the metric of each side.
PANELS = {"loss": {"loss": "loss"},
          r"reward, $\beta\,\log(\pi/\pi_{\mathrm{ref}})$ (nats)":
              {"chosen": "rewards/chosen", "rejected": "rewards/rejected", "margin": "rewards/margins"},
          LOGPS: {"chosen": "logps_per_token/chosen", "rejected": "logps_per_token/rejected"}}


def training_figure(runs: dict[str, list[dict]], columns: int):
    """Loss, rewards and log-probs of runs, {name: lines of metrics.jsonl}.

    The colour is the side, or with several runs the run. Where one of them has evaluation, training is faint in all.
    """
    if len(runs) > len(COLOURS):
        raise UserError(f"{len(runs)} runs: at most {len(COLOURS)} can be told apart in one figure")
    colours = {run: {"color": colour} for run, colour in zip(runs, COLOURS)} if len(runs) > 1 else {}
    there = {name for lines in runs.values() for line in lines for name in line}
    held_out = any(name.startswith("eval_") for name in there)
    panels = {label: {side: name for side, name in names.items() if there & {name, f"eval_{name}"}}
              for label, names in PANELS.items()}
    panels = {label: names for label, names in panels.items() if names}
    fig, axes = grid(len(panels), min(len(panels), 3) if columns == 2 else 1, columns)
    for ax, (label, names) in zip(axes, panels.items()):
        ax.set_ylabel(label)
        for run, lines in runs.items():
            for side, name in names.items():
                _curves(ax, run, lines, name, LOOKS[side] | colours.get(run, {}), FAINT if held_out else {})
    handles = [Line2D([], [], **colour, label=wrap(run)) for run, colour in colours.items()]
    for side in dict.fromkeys(side for names in panels.values() for side in names if side != "loss"):
        look = LOOKS[side] | ({"color": GREY} if colours else {}) | ({} if held_out else {"marker": ""})
        handles.append(Line2D([], [], **look, label=side))
    if held_out:
        handles += [Line2D([], [], color=GREY, **FAINT, label="training"),
                    Line2D([], [], color=GREY, linestyle="", marker="o", label="held-out")]
    add_legend(fig, handles, None if colours else next(iter(runs)))
    names = {"loss": "loss", LOGPS: "mean log-prob per token (nats)"}
    what = listed(names.get(panel, "rewards (nats)") for panel in panels)
    return fig, (f"Training of {listed(runs)} over steps: {what}; means over the pairs of a step"
                 + (", and at the markers over held-out pairs." if held_out else "."))


def _curves(ax, run: str, lines: list[dict], name: str, look: dict, training: dict) -> None:
    """A metric of a run over steps, in training (`training` alters the look) and under evaluation. A step that was
    skipped is a gap: its line lacks what was not finite, while a line of an evaluation never had it."""
    held_out = [(line["step"], line[f"eval_{name}"]) for line in lines if f"eval_{name}" in line]
    trained = [(line["step"], line.get(name, math.nan)) for line in lines
               if name in line or not any(key.startswith("eval_") for key in line)]
    if any(name in line for line in lines):
        gaps = [True, *(math.isnan(value) for _, value in trained), True]
        alone = [i for i in range(len(trained)) if gaps[i : i + 3] == [True, False, True]]  # a point without a line
        dots = {"marker": ".", "markevery": alone} if alone else {"marker": ""}
        ax.plot(*zip(*trained), **look | training | dots, label=f"{run} {name}")
    if held_out:
        ax.plot(*zip(*held_out), **look, label=f"{run} eval_{name}")
