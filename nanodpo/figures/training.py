"""The figure of training: curves of metrics.jsonl.

A function that draws takes numbers and gives a Figure and its caption, plain text; none opens a window or keeps state.
"""

import math

import numpy as np
from matplotlib.lines import Line2D

from ..errors import UserError
from ..folder.log import is_evaluation
from ..run.noise import MARGIN
from .axes import COLOURS, DASHES, GREY, LOGPS, MARKERS, add_legend, grid, listed, wrap
from .noise import Marks
from .records import SIDES
from .runs import Facts

POINTS = {"alpha": 0.3, "linestyle": "", "marker": ".", "markersize": 1.5}  # a step's own value, under its average
FAINT = {"alpha": 0.4, "linewidth": 0.6, "marker": ""}  # training beside evaluation
PROMINENT = {"linewidth": 1.2, "markersize": 4, "zorder": 3}
FORK = {"color": GREY, "linewidth": 0.8, "linestyle": (0, (2, 1))}
PART = 40  # the average reaches over this part of the run's steps to each side
MOST = 2000  # points of a curve that are drawn: more are no clearer, and make an SVG of 100 MB of a long run
LOOKS = {"loss": {"color": "black", "linestyle": "-", "marker": "o"}} | {
    side: {"color": COLOURS[i], "linestyle": DASHES[i], "marker": MARKERS[i]}
    for i, side in enumerate((*SIDES, "margin"))}
REWARDS = r"reward, $\beta\,\log(\pi/\pi_{\mathrm{ref}})$ (nats)"
FREE_REWARDS = "reward, no reference (nats)"
MOVED = r"$\log(\pi/\pi_{\mathrm{ref}})$ (nats per token)"
# Of the training figure: a panel's y label, and the metric of each side. Each kind of loss has a panel of its own.
# The level of log-probs is drawn where there is no reference: with few pairs a step it tells which pairs came, and not
# what was learned.
OF_REWARDS = {"chosen": "rewards/chosen", "rejected": "rewards/rejected", "margin": MARGIN}
PANELS = {REWARDS: OF_REWARDS, FREE_REWARDS: {side: f"free_{name}" for side, name in OF_REWARDS.items()},
          MOVED: {side: f"moved/{side}" for side in SIDES}, LOGPS: {side: f"logps_per_token/{side}" for side in SIDES}}
WORDS = {LOGPS: "mean log-prob per token (nats)", REWARDS: "rewards (nats)",
         FREE_REWARDS: "rewards without a reference, beta times the log-prob of a response, for SimPO and ORPO "
                       "per token (nats)",
         MOVED: "log-prob per token minus the reference's (nats)"}


def training_figure(runs: dict[str, list[dict]], columns: int, facts: dict[str, Facts] | None = None):
    """Loss, rewards and log-probs of runs, {name: lines of metrics.jsonl}.

    The colour is the side, or with several runs the run. Where one of them has evaluation, training is faint in all.
    Averages of long runs are drawn over the steps' own values, which are points then.
    """
    if len(runs) > len(COLOURS):
        raise UserError(f"{len(runs)} runs: at most {len(COLOURS)} can be told apart in one figure; name fewer")
    facts = {run: (facts or {}).get(run, Facts()) for run in runs}
    runs = {run: as_drawn(lines, facts[run]) for run, lines in runs.items()}
    colours = {run: {"color": colour} for run, colour in zip(runs, COLOURS)} if len(runs) > 1 else {}
    held_out = any(is_evaluation(line) for lines in runs.values() for line in lines)
    reach = {run: len({line["step"] for line in lines}) // PART for run, lines in runs.items()}
    panels = panels_of(runs, facts)
    kinds = [names for names, _ in panels.values() if "loss" in names]
    fig, axes = grid(len(panels), min(len(panels), 3) if columns == 2 else 1, columns, sharex=len(kinds) < 2)
    marks = Marks("a training step's mean")
    for ax, (label, (names, here)) in zip(axes, panels.items()):
        ax.set_ylabel(label)
        for run in here:
            for side, name in names.items():
                look = LOOKS[side] | colours.get(run, {})
                curves(ax, run, runs[run], name, look, FAINT if held_out else {}, reach[run])
        _noise(marks, ax, label, [(facts[run], runs[run]) for run in here])
        for step in filter(None, forks(facts)):  # before a step 0 there is nothing
            ax.axvline(step, **FORK)
    sides = dict.fromkeys(side for names, _ in panels.values() for side in names if side != "loss")
    more = [Line2D([], [], **FORK, label="fork")] * any(forks(facts)) + marks.handles
    _legend(fig, runs, colours, sides, held_out, reach, more)
    return fig, _caption(runs, panels, facts, held_out, reach) + marks.caption


def as_drawn(lines: list[dict], facts: Facts) -> list[dict]:
    """The lines with how far log-probs are from the reference's, in place of their level. Of a fork to another loss the
    steps before it have no loss, which was of another kind; and rewards without a reference have another name."""
    moved = [_with_moved(line, {"loss", "eval_loss"} if line["step"] < facts.loss_since else set()) for line in lines]
    known = [any("ref_logps_per_token/" in name for name in line) for line in lines]
    some = facts.without_reference or any(known)
    return [line if has or not some else {name.replace("rewards/", "free_rewards/"): v for name, v in line.items()}
            for line, has in zip(moved, known)]


def _with_moved(line: dict, without: set[str]) -> dict:
    line = {name: value for name, value in line.items() if name not in without}
    for prefix in ("", "eval_"):
        for side in SIDES:
            name, ref = f"{prefix}logps_per_token/{side}", f"{prefix}ref_logps_per_token/{side}"
            if name in line and ref in line:
                line[f"{prefix}moved/{side}"] = line.pop(name) - line[ref]
    return line


def panels_of(runs: dict, facts: dict) -> dict[str, tuple[dict[str, str], list[str]]]:
    """{y label: (metric of each side, the runs that have one)}, a loss for each kind first."""
    there = {run: {name.removeprefix("eval_") for line in lines for name in line} for run, lines in runs.items()}
    kinds = {}
    for run in runs:  # without a run.json, rewards tell SFT from the rest
        kinds.setdefault((facts[run].kind, not facts[run].kind and MARGIN in there[run]), []).append(run)
    panels = {}
    for (kind, _), members in kinds.items():
        label = f"{wrap(kind, 24)} loss".strip() if len(kinds) > 1 else "loss"
        label = "loss (runs with rewards)" if label in panels else label
        panels[label] = {"loss": "loss"}, [run for run in members if "loss" in there[run]]
    for label, names in PANELS.items():
        have = {side: name for side, name in names.items() if any(name in there[run] for run in runs)}
        panels[label] = have, [run for run in runs if there[run] & set(have.values())]
    return {label: (names, members) for label, (names, members) in panels.items() if names and members}


def curves(ax, run: str, lines: list[dict], name: str, look: dict, training: dict, reach: int) -> None:
    """A metric of a run over steps, in training (`training` alters the look) and under evaluation. A step that was
    skipped is a gap: its line lacks what was not finite, while a line of an evaluation never had it."""
    held_out = [(line["step"], line[f"eval_{name}"]) for line in lines if f"eval_{name}" in line]
    trained = [(line["step"], line.get(name, math.nan)) for line in lines
               if name in line or not is_evaluation(line)]
    if any(name in line for line in lines):
        every = -(-len(trained) // MOST)
        means = [values[::every] for values in average(trained, reach)]
        trained = trained[::every]
        gaps = [True, *(math.isnan(value) for _, value in trained), True]
        alone = [i for i in range(len(trained)) if gaps[i : i + 3] == [True, False, True]]  # a point without a line
        dots = {"marker": ".", "markevery": alone} if alone else {"marker": ""}
        ax.plot(*zip(*trained), **look | (POINTS if reach else training | dots), label=f"{run} {name}")
        if reach:
            faint = training | {"alpha": 0.7} if training else {}
            ax.plot(*means, **look | {"marker": "", "zorder": 2.5} | faint, label=f"{run} {name}, average")
    if held_out:
        ax.plot(*zip(*held_out), **look | PROMINENT, label=f"{run} eval_{name}")


def too_many(runs: dict[str, list[dict]]) -> bool:
    """Whether one of the runs has more steps than are drawn."""
    return any(sum(not is_evaluation(line) for line in lines) > MOST for lines in runs.values())


def average(values: list[tuple[int, float]], reach: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps, at each the mean of the values within `reach` steps to either side); NaN where a step has no value."""
    steps, numbers = (np.asarray(side, dtype=float) for side in zip(*sorted(values)))
    there = np.isfinite(numbers)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(there, numbers, 0.0), there))
    first, last = np.searchsorted(steps, steps - reach), np.searchsorted(steps, steps + reach, side="right")
    means = (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)
    return steps, np.where(there, means, math.nan)


def _noise(marks: Marks, ax, label: str, runs: list[tuple[Facts, list[dict]]]) -> None:
    """Draws the noise of bfloat16 in a step's mean, where runs know theirs: around 0, and in a panel of levels around
    the start."""
    if label in (REWARDS, MOVED):
        marks.band(ax, 0, max(noise_of_step(label, facts) for facts, _ in runs))
    elif label == LOGPS:
        for facts, lines in runs:
            for start in _starts(lines):
                marks.band(ax, start, noise_of_step(label, facts))


def forks(facts: dict[str, Facts]) -> list[int]:
    """The steps at which these runs were forked from others."""
    return sorted({step for f in facts.values() for step in f.forks})


def noise_of_step(label: str, facts: Facts) -> float:
    """The standard deviation that bfloat16's rounding gives a step's mean in this panel, nats; 0 where it is not known,
    as of rewards without a reference."""
    of_pair = {REWARDS: facts.noise.get(MARGIN, 0.0), MOVED: facts.noise.logps, LOGPS: facts.noise.logps}
    return of_pair.get(label, 0.0) / math.sqrt(facts.pairs)


def of_loss(panels, facts: dict[str, Facts]) -> str:
    """A caption's sentence on what a step's loss is, without its full stop, where a panel shows one: no plain mean over
    pairs, as other metrics are (run/metrics.py)."""
    sft = any(f.loss == "sft" for f in facts.values())
    text = ". The loss is weighted where the data have weights" + ", and that of SFT is a mean over tokens" * sft
    return text * any(label not in PANELS for label in panels)


def _starts(lines: list[dict]) -> list[float]:
    """The first log-prob of each side, held-out where there is one."""
    found = [[line[prefix + name] for prefix in ("eval_", "") for line in lines if prefix + name in line]
             for name in PANELS[LOGPS].values()]
    return [values[0] for values in found if values]


def _legend(fig, runs: dict, colours: dict, sides, held_out: bool, reach: dict[str, int], more: list) -> None:
    handles = [Line2D([], [], **colour, label=wrap(run)) for run, colour in colours.items()]
    for side in sides:
        look = LOOKS[side] | ({"color": GREY} if colours else {}) | ({} if held_out else {"marker": ""})
        handles.append(Line2D([], [], **look, label=side))
    if any(reach.values()):
        handles.append(Line2D([], [], color=GREY, **POINTS | {"markersize": 3}, label="training, a step"))
    if held_out or any(reach.values()):
        label = "training" + ", average" * any(reach.values())
        look = FAINT | ({"alpha": 0.7} if any(reach.values()) else {}) if held_out else {}
        handles.append(Line2D([], [], color=GREY, **look, label=label))
    if held_out:
        handles.append(Line2D([], [], color=GREY, linestyle="", marker="o", markersize=4, label="held-out"))
    add_legend(fig, handles + more, None if colours else next(iter(runs)))


def _caption(runs: dict, panels: dict, facts: dict[str, Facts], held_out: bool, reach: dict) -> str:
    losses = [label for label in panels if label not in PANELS]
    what = ["loss" if len(losses) == 1 else f"losses of {len(losses)} kinds, which can't be compared"] * bool(losses)
    what = listed([*what, *(WORDS[panel] for panel in panels if panel in PANELS)])
    text = f"Training of {listed(runs)} over steps: {what}; means over the pairs of a step"
    text += ", and at the large markers over all held-out pairs" * held_out + of_loss(panels, facts) + "."
    if any(reach.values()):
        of_run = {run: f"{count:,} steps" if count > 1 else "1 step" if count else "no step"
                  for run, count in reach.items()}
        each = set(of_run.values())
        spans = each.pop() if len(each) == 1 else listed(f"{count} of {run}" for run, count in of_run.items())
        which = ", evenly spaced" * too_many(runs)
        text += (f" Faint points are single steps{which}; the line through them is the mean over the steps around "
                 f"each, {spans} to either side.")
    betas = {facts[run].beta for label in (REWARDS, FREE_REWARDS) if label in panels for run in panels[label][1]}
    text += " The rewards of each run have its own beta." * (len(betas) > 1)
    text += at_forks(filter(None, forks(facts)), "; before it all is of the run that was forked")
    another = any(f.loss_since for f in facts.values()) and bool(losses)
    return text + " A loss of another kind, before a fork, is not drawn." * another


def at_forks(steps, more: str = "") -> str:
    """A caption's sentence on where the forks are; empty where there are none."""
    which = "; ".join(f"the fork at step {step}" for step in steps)
    return f" Dashed: {which}{more}." if which else ""
