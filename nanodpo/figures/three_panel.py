"""The figure of arXiv 2509.13079: SFT on forward, reverse and mixed data, DPO from the mixed model, their gaps.

One meaning a sign, in all three panels: the colour is what was trained, the marker the test set, a dashed line with
hollow markers the rejected side.
"""

import itertools

import pandas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..errors import UserError
from .axes import (
    ABOVE_GRID,
    CHANGE,
    FLOOR,
    GREY,
    INTERVAL,
    LOGPS,
    add_legend,
    draw_curve,
    listed,
    new_figure,
    place,
    plain,
    set_focus,
    set_phases,
    wrap,
)
from .intervals import over_seeds

# Of different lightness where they meet in a panel, for print in grey.
ROLES = {"forward": ("F", "#0072B2"), "reverse": ("R", "#E69F00"), "mixed": ("M", "#000000"), "dpo": ("DPO", "#D55E00")}
MARKERS = "os^"
ZERO = {"color": GREY, "linewidth": 0.6, "linestyle": "-"}
SIDES = {"chosen": {"linestyle": "-"}, "rejected": {"linestyle": (0, (3, 1.2)), "markerfacecolor": "white"}}


def three_panel_figure(curves: pandas.DataFrame, roles: dict[str, list[str]], tests: list[str], columns: int,
                       focus: tuple[float, float] = (0.05, 0.10), ratios=(1, 1, 1.2), floor=None):
    """`curves` is a table of intervals.py with responses chosen, rejected and gap; `roles` names the runs of each of
    ROLES, several are seeds; `tests` are the data sets in the order forward, reverse, mixed.

    (a) y+ and y- of F and R, each on its own test set; (b) y+ and y- of M and then DPO on the mixed one; (c) the gap
    y+ - y- of everything on everything, where `focus` gets a quarter of the height.
    """
    seeds = {key: _seeds(curves, *key, roles[key[0]]) for key in itertools.product(
        ROLES, tests, ("chosen", "rejected", "gap"))}
    spans = {role: (seeds[role, tests[2], "gap"]["step"].min(), seeds[role, tests[2], "gap"]["step"].max())
             for role in ROLES}
    sft = (min(spans[role][0] for role in ROLES if role != "dpo"), max(spans[r][1] for r in ROLES if r != "dpo"))
    fig, (a, b, c) = _panels(columns, ratios)
    for side, (role, test) in itertools.product(SIDES, zip(("forward", "reverse"), tests)):
        _draw(a, seeds, role, tests, test, side)
    for phases, ax, shown in (([("SFT", *spans["mixed"]), ("DPO", *spans["dpo"])], b, [tests[2]]),
                              ([("SFT", *sft), ("DPO", *spans["dpo"])], c, tests)):
        for role, test in itertools.product(("mixed", "dpo") if ax is b else ROLES, shown):
            for side in SIDES if ax is b else ("gap",):
                i = int(role == "dpo")
                _draw(ax, seeds, role, tests, test, side, lambda steps, i=i, p=phases[i]: place(steps, i, *p[1:]))
        set_phases(ax, phases)
        ax.set_xlabel("step")
    if floor is not None:
        for ax in (a, b):
            ax.axhline(floor, **FLOOR, zorder=ABOVE_GRID)
    c.axhline(0, **ZERO, zorder=ABOVE_GRID)
    set_focus(c, *focus)
    shaded = _interval(seeds, roles)
    _legend(fig, tests, shaded, floor)
    return fig, _caption(tests, focus, shaded, floor)


def _seeds(curves: pandas.DataFrame, role: str, test: str, side: str, runs: list[str]) -> pandas.DataFrame:
    """The curve of a role's runs on a test set; refused where one has no such scores or other steps than the rest."""
    found = {}
    for run in runs:
        of_run = curves[curves["run"] == run]
        here = of_run[(of_run["dataset"] == test) & (of_run["response"] == side)]
        if here.empty:
            raise UserError(f"--{role} {run}: has no scores of {side} on data set {test}; it has "
                            f"{listed(of_run['response'].unique())} on {listed(of_run['dataset'].unique())}")
        found[run] = here.assign(at=here["step"]).sort_values("step")
    first = found[runs[0]]
    for run, here in found.items():
        if list(here["step"]) != list(first["step"]):
            raise UserError(f"--{role} {run}: is scored at steps {list(here['step'])} on {test}, {runs[0]} at "
                            f"{list(first['step'])}; seeds need the same")
    return over_seeds(pandas.concat(found.values())).assign(step=list(first["step"]))


def _panels(columns: int, ratios):
    if columns == 2:
        fig = new_figure(2, 2.75)
        axes = list(fig.subplots(1, 3, width_ratios=ratios))
    else:
        fig = new_figure(1, 6.9)
        axes = list(fig.subplots(3, 1, height_ratios=ratios))
    for ax, title in zip(axes, ("(a) SFT", "(b) mixed", r"(c) $y^+ - y^-$")):
        ax.set_title(title, pad=12)
        ax.set_xlabel("SFT step")
        ax.set_ylabel("gap (nats per token)" if ax is axes[2] else LOGPS)
        ax.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    return fig, axes


def _draw(ax, seeds: dict, role: str, tests: list[str], test: str, side: str, at=lambda steps: steps) -> None:
    curve = seeds[role, test, side]
    look = {"color": ROLES[role][1], "marker": MARKERS[tests.index(test)]} | SIDES.get(side, {"linestyle": "-"})
    draw_curve(ax, curve.assign(at=at(curve["step"])), look, f"{ROLES[role][0]} {test} {side}",
               INTERVAL | ({"alpha": 0.1} if side == "gap" else {}))  # many gaps lie on one another


def _interval(seeds: dict, roles: dict) -> str:
    """What is shaded: intervals over seeds, over rows, or both."""
    many = sorted({len(runs) for runs in roles.values()} - {1})
    n = pandas.concat([seeds[key]["n"] for key in seeds if len(roles[key[0]]) == 1] or [pandas.Series(dtype=float)])
    over = [f"{listed(many)} seeds"] if many else []
    if (n > 1).any():
        over.append(f"{n.max():,} rows" if n.min() == n.max() else f"{n.min():,} to {n.max():,} rows")
    missing = sum(int(curve["left_out"].sum()) for key, curve in seeds.items() if key[2] != "gap")
    return f"95% interval over {' or '.join(over)}" + f", {missing:,} scores missing" * (missing > 0) if over else ""


def _legend(fig, tests: list[str], shaded: str, floor) -> None:
    handles = [Line2D([], [], color=colour, label=label)
               for label, (_, colour) in zip(("SFT forward", "SFT reverse", "SFT mixed", "DPO"), ROLES.values())]
    handles += [Line2D([], [], color=GREY, marker="o", label=label, **look)
                for label, look in zip(("$y^+$, chosen", "$y^-$, rejected"), SIDES.values())]
    handles += [Line2D([], [], color=GREY, marker=marker, linestyle="", label=wrap(f"on {test}"))
                for marker, test in zip(MARKERS, tests)]
    handles += [Patch(color=GREY, **INTERVAL, label=plain(shaded))] if shaded else []
    handles += [Line2D([], [], **FLOOR, label="best possible")] if floor is not None else []
    add_legend(fig, [*handles, Line2D([], [], **ZERO, label="no gap"), Line2D([], [], **CHANGE, label="scale changes")])


def _caption(tests: list[str], focus, shaded: str, floor) -> str:
    forward, reverse, mixed = tests
    text = ("Mean log-prob per token (nats) of chosen (y+, solid) and rejected responses (y-, dashed, hollow). "
            f"(a) SFT on forward data, tested on {forward}, and on reverse data, on {reverse}. (b) SFT on mixed data, "
            f"then DPO from it, on {mixed}. (c) The gap y+ - y- of all four on {listed(tests)}; {focus[0]:g} to "
            f"{focus[1]:g} take a quarter of the height; the scale changes at the dotted lines, and nowhere else.")
    text += f" Shaded: {shaded} (mean ± Student's t standard errors)." if shaded else ""
    return text + (f" Dashed line: the best possible value, {floor:g}." if floor is not None else "")
