"""The figure of arXiv 2509.13079: SFT on forward, reverse and mixed data, DPO from the mixed model, their gaps.

One meaning a sign, in all three panels: the colour is what was trained, the marker the test set, a dashed line with
hollow markers the rejected side.
"""

import math

import pandas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..errors import UserError
from ..run.noise import of_seeds
from .axes import (
    ABOVE_GRID,
    CHANGE,
    FLOOR,
    GREY,
    INTERVAL,
    LOGPS,
    WHOLE,
    add_legend,
    draw_curve,
    listed,
    new_figure,
    place,
    set_focus,
    set_phases,
    wrap,
)
from .intervals import over_seeds, said_missing
from .noise import Marks, Noise

# Of different lightness where they meet in a panel, for print in grey.
ROLES = {"forward": ("F", "#0072B2"), "reverse": ("R", "#E69F00"), "mixed": ("M", "#000000"), "dpo": ("DPO", "#D55E00")}
MARKERS = "os^"
FOCUS, RATIOS = (0.05, 0.10), (1, 1, 1.2)  # where the user says none
ZERO = {"color": GREY, "linewidth": 0.6, "linestyle": "-"}
STYLES = {"chosen": {"linestyle": "-"}, "rejected": {"linestyle": (0, (3, 1.2)), "markerfacecolor": "white"}}


Key = tuple[str, str, str]  # of a curve: role, data set, and chosen, rejected or gap


def three_panel_figure(curves: pandas.DataFrame, roles: dict[str, list[str]], tests: list[str], columns: int,
                       focus: tuple[float, float], ratios: tuple[float, float, float], floor: float | None,
                       noise: dict[str, Noise]):
    """(figure, caption, what is missing in words). `curves` is a table of intervals.py with responses chosen, rejected
    and gap; `roles` names the runs of each of ROLES, several are seeds; `tests` are the data sets in the order forward,
    reverse, mixed.

    (a) y+ and y- of F and R, each on its own test set; (b) y+ and y- of M and then DPO on the mixed one; (c) the gap
    y+ - y- of everything on everything, where `focus` gets a quarter of the height. Curves that a csv lacks are left
    out, and so is a panel without any. `noise` is that of each run in bfloat16.
    """
    plan = {"a": [(role, test, side) for role, test in zip(("forward", "reverse"), tests) for side in STYLES],
            "b": [(role, tests[2], side) for role in ("mixed", "dpo") for side in STYLES],
            "c": [(role, test, "gap") for role in ROLES for test in tests]}
    wanted = [key for keys in plan.values() for key in keys if roles[key[0]]]
    seeds = {key: found for key in wanted if (found := _seeds(curves, *key, roles[key[0]], noise)) is not None}
    if unseen := [role for role in ROLES if roles[role] and all(key[0] != role for key in seeds)]:
        raise UserError(f"--{unseen[0]} {roles[unseen[0]][0]}: has none of the curves that the three panels show; they "
                        f"are of chosen, rejected and gap on {listed(tests)}")
    panels = {panel: [key for key in keys if key in seeds] for panel, keys in plan.items()}
    panels = {panel: keys for panel, keys in panels.items() if keys}
    fig, axes = _panels(columns, {panel: ratios["abc".index(panel)] for panel in panels})
    marks = Marks("a mean", " of its start" + "; in (c) to a gap, around 0" * ("c" in panels))
    for panel, keys in panels.items():
        phases = [] if panel == "a" else _phases(seeds, keys)
        for role, test, side in keys:
            _draw(axes[panel], seeds[role, test, side], role, tests.index(test), test, side, phases, marks)
        if phases:
            set_phases(axes[panel], phases)
        if floor is not None and panel != "c":
            axes[panel].axhline(floor, **FLOOR, zorder=ABOVE_GRID)
    if "c" in panels:
        axes["c"].axhline(0, **ZERO, zorder=ABOVE_GRID)
        marks.band(axes["c"], 0, max(seeds[key]["noise"].iloc[0] for key in panels["c"]))
        focus = focus if set_focus(axes["c"], *focus) else None
    shaded = _interval(seeds, roles)
    _legend(fig, seeds, tests, shaded, floor, focus, marks.handles)
    missing = [f"{side} of {ROLES[role][0]} on {test}" for role, test, side in
               (key for key in wanted if key not in seeds)]
    return fig, _caption(panels, focus, shaded, floor, missing) + marks.caption, missing


def _seeds(curves: pandas.DataFrame, role: str, test: str, side: str, runs: list[str],
           noise: dict[str, Noise]) -> pandas.DataFrame | None:
    """The curve of a role's runs on a test set, None where a csv has none; refused where a run that was scored has no
    such scores, or one of the seeds others than the rest. Its column noise is the standard deviation of the first mean
    under rounding."""
    whole = {run: curves[curves["run"] == run] for run in runs}
    found = {run: here.assign(at=here["step"]).sort_values("step") for run, its in whole.items()
             if len(here := its[(its["dataset"] == test) & (its["response"] == side)])}
    for run, its in whole.items():
        if run not in found and (found or (its["n"] > 0).any()):
            raise UserError(f"--{role} {run}: has no scores of {side} on data set {test}; it has "
                            f"{listed(its['response'].unique())} on {listed(its['dataset'].unique())}")
    if not found:
        return None
    first = found[runs[0]]
    for run, here in found.items():
        if list(here["step"]) != list(first["step"]):
            raise UserError(f"--{role} {run}: has scores of {side} at steps {list(here['step'])} on {test}, {runs[0]} "
                            f"at {list(first['step'])}; seeds need the same")
    own = {run: noise.get(run, Noise()) for run in found}
    deviation = of_seeds([(own[run].gap if side == "gap" else own[run].logps) / math.sqrt(max(here["n"].iloc[0], 1))
                          for run, here in found.items()])
    return over_seeds(pandas.concat(found.values())).assign(step=list(first["step"]), noise=deviation)


def _phases(seeds: dict[Key, pandas.DataFrame], keys: list[Key]) -> list[tuple[str, float, float]]:
    """SFT and DPO, as far as a panel has them: each from the first to the last step of all curves of its roles."""
    there, spans = {role for role, *_ in keys}, []
    for name, roles in (("SFT", there - {"dpo"}), ("DPO", there & {"dpo"})):
        steps = [step for (role, *_), curve in seeds.items() if role in roles for step in curve["step"]]
        spans += [(name, min(steps), max(steps))] if steps else []
    return spans


def _panels(columns: int, ratios: dict[str, float]):
    """(figure, {panel: axes})."""
    if columns == 2:
        fig = new_figure(2, 2.75)
        axes = fig.subplots(1, len(ratios), width_ratios=[*ratios.values()], squeeze=False)
    else:
        fig = new_figure(1, 0.7 + 6.2 * len(ratios) / 3)
        axes = fig.subplots(len(ratios), 1, height_ratios=[*ratios.values()], squeeze=False)
    axes = dict(zip(ratios, axes.flat))
    for panel, ax in axes.items():
        ax.set_title({"a": "(a) SFT", "b": "(b) mixed", "c": r"(c) $y^+ - y^-$"}[panel], pad=12)
        ax.set_xlabel("SFT step" if panel == "a" else "step")
        ax.set_ylabel("gap (nats per token)" if panel == "c" else LOGPS)
        ax.xaxis.get_major_locator().set_params(**WHOLE, nbins=5)
    return fig, axes


def _draw(ax, curve: pandas.DataFrame, role: str, number: int, test: str, side: str, phases: list,
          marks: Marks) -> None:
    """A role's curve on the test set of this number; with `phases`, in its own."""
    look = {"color": ROLES[role][1], "marker": MARKERS[number]} | STYLES.get(side, {"linestyle": "-"})
    if phases:
        names = [name for name, *_ in phases]
        i = names.index("DPO" if role == "dpo" else "SFT")
        curve = curve.assign(at=place(curve["step"], i, *phases[i][1:]))
    if side != "gap":
        marks.band(ax, curve["mean"].iloc[0], curve["noise"].iloc[0], (curve["at"].min(), curve["at"].max()))
    draw_curve(ax, curve, look, f"{ROLES[role][0]} {test} {side}",
               INTERVAL | ({"alpha": 0.1} if side == "gap" else {}))  # many gaps lie on one another


def _interval(seeds: dict, roles: dict) -> str:
    """Returns the words for what is shaded: intervals over seeds, over rows, or both; those of a csv are as given."""
    seeds = {key: curve for key, curve in seeds.items() if curve["low"].notna().any()}
    many = sorted({len(roles[role]) for role, *_ in seeds} - {1})
    n = pandas.concat([curve["n"][curve["low"].notna()] for key, curve in seeds.items() if len(roles[key[0]]) == 1]
                      or [pandas.Series(dtype=float)])
    over = [f"{listed(many)} seeds"] if many else []
    if (n > 1).any():
        over.append(f"{n.max():,} rows" if n.min() == n.max() else f"{n.min():,} to {n.max():,} rows")
    if not over:
        return "low to high, as given" if seeds else ""
    sides = [curve for key, curve in seeds.items() if key[2] != "gap"]
    return f"95% interval over {' or '.join(over)}" + (said_missing(pandas.concat(sides)) if sides else "")


def _legend(fig, seeds: dict[Key, pandas.DataFrame], tests: list[str], shaded: str, floor, focus,
            more: list) -> None:
    """Of what is drawn."""
    roles, there, sides = ({key[i] for key in seeds} for i in range(3))
    handles = [Line2D([], [], color=ROLES[role][1], label=label) for role, label in zip(
        ROLES, ("SFT forward", "SFT reverse", "SFT mixed", "DPO")) if role in roles]
    handles += [Line2D([], [], color=GREY, marker="o", label=label, **look)
                for (side, look), label in zip(STYLES.items(), ("$y^+$, chosen", "$y^-$, rejected")) if side in sides]
    handles += [Line2D([], [], color=GREY, marker=marker, linestyle="", label=wrap(f"on {test}"))
                for marker, test in zip(MARKERS, tests) if test in there]
    handles += [Patch(color=GREY, **INTERVAL, label=wrap(shaded))] if shaded else []
    handles += [Line2D([], [], **FLOOR, label="best possible")] if floor is not None else []
    handles += more
    if "gap" in sides:
        handles += [Line2D([], [], **ZERO, label="no gap")]
        handles += [Line2D([], [], **CHANGE, label="scale changes")] if focus else []
    add_legend(fig, handles)


def _caption(panels: dict[str, list[Key]], focus, shaded: str, floor, missing: list[str]) -> str:
    text = "Mean log-prob per token (nats) of chosen (y+, solid) and rejected responses (y-, dashed, hollow)."
    own = {panel: dict.fromkeys((role, test) for role, test, _ in keys) for panel, keys in panels.items()}
    if "a" in panels:
        text += " (a)" + ";".join(f" SFT on {role} data, tested on {test}" for role, test in own["a"]) + "."
    if "b" in panels:
        names = {"mixed": "SFT on mixed data", "dpo": "DPO from it"}
        text += f" (b) {', then '.join(names[role] for role, _ in own['b'])}, tested on {panels['b'][0][1]}."
    if "c" in panels:
        roles, tests = (listed(dict.fromkeys(part)) for part in zip(*own["c"]))
        text += f" (c) The gap y+ - y- of {roles}, each tested on {tests}"
        text += (f"; {focus[0]:g} to {focus[1]:g} take a quarter of the height; the scale changes at the dotted lines, "
                 "and nowhere else." if focus else ".")
    text += f" Shaded: {shaded}" * bool(shaded)
    over = "; those of rows are over problems" * ("rows" in shaded)
    text += f" (mean ± Student's t standard errors{over})" * shaded.startswith("95%") + "." * bool(shaded)
    text += f" Dashed line: the best possible value, {floor:g}." if floor is not None else ""
    return text + f" Not given: {listed(missing)}." * bool(missing)
