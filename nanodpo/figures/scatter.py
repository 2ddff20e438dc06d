"""The scatter figure: one measure of each pair or response against another, such as CHES before training against how
far the chosen response then moved (arXiv 2410.08847)."""

from pathlib import Path

import pandas
from matplotlib import rcParams
from matplotlib.lines import Line2D

from ..errors import UserError
from ..stats import rank_correlation
from .axes import COLOURS, MARKERS, ZERO, Whole, add_legend, grid, listed, plain, wrap
from .noise import Marks, Noise
from .records import ROWS, read_measure

WHEN = {"first": "at step {first}", "last": "at step {last}", "change": "change from step {first} to {last}"}
EACH = {"first": "at the first step", "last": "at the last step", "change": "change from the first to the last step"}
HELP = ("one of pairs.parquet, as ches, or of a response in scores.parquet, as chosen.mean_logps; :first, :last or "
        ":change behind it says when")


class Measure:
    """One of --scatter's two."""

    def __init__(self, text: str, otherwise: str):
        """`text` as HELP says; `otherwise`: one of WHEN where it does not say when. Raises UserError."""
        name, colon, when = text.rpartition(":")
        self.name, self.when = (name, when) if colon else (text, otherwise)
        if self.when not in WHEN:
            raise UserError(f"--scatter {text}: {self.when!r} is none of {listed(WHEN)}")
        self.response, dot, self.column = self.name.rpartition(".")

    def values(self, files: list[Path], steps: dict[str, tuple[int, int]]) -> pandas.Series:
        """By run, dataset, row and problem, from the tables beside these files of scores; of the runs in `steps`, whose
        first and last step those are. Rows without a number are left out, and so are changes of runs with one step."""
        if self.when == "change" and not (steps := {run: ends for run, ends in steps.items() if ends[0] < ends[1]}):
            raise UserError(f"--scatter {self.name}: its change is asked for, and no run here was scored at two steps; "
                            f"{self.name}:first takes one")
        table = read_measure(files, self.column, self.response)
        table = table[table["run"].isin(steps)]
        first, last = (table[table["step"] == table["run"].map({run: ends[end] for run, ends in steps.items()})]
                       .set_index(ROWS)[self.column] for end in (0, 1))
        return {"first": first, "last": last, "change": last - first}[self.when].dropna()

    def at(self, steps: tuple[int, int] | None) -> str:
        """Says when, of runs that all have these first and last steps, or of others."""
        return WHEN[self.when].format(first=steps[0], last=steps[1]) if steps else EACH[self.when]

    def label(self, steps: tuple[int, int] | None) -> str:
        return f"{plain(self.name)},\n{self.at(steps)}"


def scatter_table(texts: tuple[str, str], files: list[Path], steps: dict[str, tuple[int, int]]
                  ) -> tuple[list[Measure], pandas.DataFrame]:
    """(the two measures, a line for each run, data set and row that has both: ROWS, x, y). `steps`: the first and last
    scored step of each run."""
    measures = [Measure(text, otherwise) for text, otherwise in zip(texts, ("first", "change"))]
    x, y = (measure.values(files, steps) for measure in measures)
    return measures, pandas.concat({"x": x, "y": y}, axis=1, join="inner").reset_index()


def scatter_figure(measures: list[Measure], table: pandas.DataFrame, steps: dict[str, tuple[int, int]], columns: int,
                   noise: dict[str, Noise]):
    """(figure, caption): a panel for each data set, a point for each row, the runs in colours of their own. Above a
    panel stands the rank correlation of each run, with its 95% interval over problems. `steps` as in scatter_table."""
    runs, sets = list(table["run"].unique()), list(table["dataset"].unique())
    if len(runs) > len(COLOURS):
        raise UserError(f"--scatter: draws at most {len(COLOURS)} runs, and these are {len(runs)}; name some as RUN")
    ends = steps[runs[0]] if len({steps[run] for run in runs}) == 1 else None
    across = min(len(sets), 3) if columns == 2 else 1
    fig, axes = grid(len(sets), across, columns, measures[0].label(ends), height=2.4, sharex=False)
    marks = Marks("one response")
    for ax, name in zip(axes, sets):
        said = []
        for run, colour, marker in zip(runs, COLOURS, MARKERS):
            here = table[(table["run"] == run) & (table["dataset"] == name)]
            if here.empty:
                continue
            ax.plot(here["x"], here["y"], linestyle="", marker=marker, color=colour, markersize=2.5, alpha=0.6,
                    markeredgewidth=0)
            rho, low, high = rank_correlation(here["x"].to_numpy(), here["y"].to_numpy(), here["problem"].to_numpy())
            said.append((colour, f"{len(here):,} row{'s' * (len(here) > 1)}, "
                         + (f"rank correlation {rho:.2f}" if rho == rho else "no rank correlation")
                         + f" [{low:.2f}, {high:.2f}]" * (low == low)))
        ax.xaxis.get_major_locator().set_params(integer=False, nbins=5)
        ax.xaxis.set_major_formatter(Whole())
        ax.set_title(wrap(name), fontsize=rcParams["axes.labelsize"], pad=4 + 9 * len(said))
        for line, (colour, text) in enumerate(reversed(said)):
            ax.annotate(plain(text.replace("-", "\N{MINUS SIGN}")), (0.5, 1), (0, 3 + 9 * line), "axes fraction",
                        "offset points", ha="center", color=colour, fontsize=rcParams["xtick.labelsize"])
        if measures[1].when == "change":
            ax.axhline(0, **ZERO)
    for ax in axes[::across]:
        ax.set_ylabel(measures[1].label(ends))
    noises = [noise.get(run, Noise()) for run in runs]
    if measures[1].column != "mean_logps":
        marks.not_measured(noises)
    elif measures[1].when == "change":
        for ax in axes:
            marks.band(ax, 0, max(its.logps for its in noises))
    handles = [Line2D([], [], linestyle="", marker=marker, color=colour, markersize=3, label=wrap(run))
               for run, colour, marker in zip(runs, COLOURS, MARKERS)]
    add_legend(fig, handles + marks.handles)
    said = [f"{measure.name} ({measure.at(ends)})" for measure in measures]
    return fig, (f"{said[0]} across, and {said[1]} upwards, of each row of {listed(sets)} under {listed(runs)}. Above, "
                 "in the legend's order: rank correlations (Spearman's), with 95% intervals over problems (jackknife)."
                 + marks.caption)
