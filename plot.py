"""Draws runs: their training, and where they were scored, how the log-probs of responses moved.

    python plot.py                                  the newest run under runs/: its training and dynamics
    python plot.py RUN [RUN ...]                    these run folders, in one figure; the dynamics of runs that began
                                                    from one another's checkpoints one after the other
    python plot.py --scores scores.parquet          the dynamics in files of score.py alone
    python plot.py SFT_RUN DPO_RUN --phases         dynamics of runs that followed one another, on one axis
    python plot.py RUN FORK --diff                  the second run minus the first, with the fork's step
    python plot.py RUN --heatmap                    every example of a run at every checkpoint
    python plot.py RUN --scatter ches chosen.mean_logps     CHES before training against how far chosen moved, by row
    python plot.py RUN --ledger                     which training pairs moved the log-probs, from ledger.parquet
    python plot.py RUN --strip 7                    every token of the pair in row 7, from tokens.parquet
    python plot.py RUN --page                       page.html, to look around in the tokens with a browser
    python plot.py --series published.csv           curves of a csv, alone or beside one's own
    python plot.py --three_panel --forward RUN ... --reverse RUN ... --mixed RUN ... --dpo RUN ... --scores FILE ...

A RUN is a run's folder or, with --scores, a name in its column `run`. Leaves each figure as .png, .pdf and .svg, with a
.tex that includes it, in the run's folder (runs/figures for several runs). Every number drawn is read from
metrics.jsonl, the tables of score.py (scores, pairs, answers, tokens, risers, ledger) or the csv, and bfloat16's noise
from run.json or verdict.json; a rerun gives the same bytes.
"""

import argparse
import os
import sys
from pathlib import Path

from nanodpo.errors import UserError, run_script
from nanodpo.figures.choice import draw, noise_of
from nanodpo.figures.drawing import house_style, save
from nanodpo.figures.page import write_page
from nanodpo.figures.scatter import HELP
from nanodpo.figures.three_panel import ROLES
from nanodpo.flags.settings import open_home
from nanodpo.flags.unknown import parse_known
from nanodpo.scoring.runs import newest_run
from nanodpo.screen import put


def main(argv: list[str]) -> None:
    args = parse(argv)
    given = list(dict.fromkeys(args.runs + [run for role in ROLES for run in getattr(args, role)]))
    if not (given or args.scores or args.series):
        given = [newest_run(Path("runs"))]
    folders = find_folders(args, given)
    names = [folders[run].resolve().name if run in folders else run for run in given]
    files = find_scores(args, list(folders.values()))
    for flag in ("focus", "floor", "test"):
        if getattr(args, flag) is not None and not files and not args.series:
            raise UserError(f"--{flag}: is for the figure of scores.parquet, and there is none; "
                            "--scores FILE names one")
    places = list(dict.fromkeys(folders.values())) or [Path(file).parent for file in [*files, args.series][:1]]
    target = Path(open_home("--output_dir", args.output_dir) if args.output_dir else
                  places[0] if len(places) == 1 else "runs/figures")
    if args.page:
        noise = noise_of(list(folders.values()), files)
        file, notes = write_page(files, target, names if args.scores else [], args.test, noise)
        put(file)
        return tell(notes)
    with house_style(args.style, args.serif, args.usetex):
        drawn, notes = draw(args, list(folders.values()), files, names)
        for file in save(drawn, target, args.columns):
            put(file)
    tell(notes)


def tell(notes: list[str]) -> None:
    for note in notes:
        put("note:", note, file=sys.stderr)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("plot.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="Run folders, or names in the files of --scores. Default: the newest.")
    add("--output_dir", help="Default: the folder of the run, or of the first file; of several runs, runs/figures.")
    add("--scores", nargs="+", metavar="FILE", help="Files of score.py. Default: scores.parquet of each run folder.")
    add("--series", metavar="CSV", help="Means from elsewhere: columns series (its name, drawn like a run's), step, "
                                        "mean and, as you have them, low, high, dataset, response, phase (sft, dpo).")
    add("--test", nargs="+", metavar="DATASET", help="The data sets to draw. Default: all; in the three-panel figure "
                                                     "forward reverse mixed, and three in this order.")
    figures = parser.add_argument_group("figures", "Default: training and, where it was scored, dynamics, mass on "
                                                   "implausible tokens and right answers.")
    one = figures.add_mutually_exclusive_group()
    one.add_argument("--phases", action="store_true", help="Dynamics of the RUNs one after the other, in this order.")
    one.add_argument("--diff", action="store_true", help="Two RUNs and, below, the second minus the first: of a run "
                     "and its fork, what the change did.")
    one.add_argument("--heatmap", action="store_true", help="Examples x checkpoints: how far each moved.")
    one.add_argument("--scatter", nargs=2, metavar=("X", "Y"), help="One measure of each row against another, each "
                     f"{HELP}; else X is at the first step, and Y the change.")
    one.add_argument("--ledger", action="store_true", help="What the training pairs made of a change, from "
                     "ledger.parquet.")
    one.add_argument("--strip", type=int, metavar="ROW", help="The tokens of one pair, from tokens.parquet beside "
                     "the scores: how far each moved, or with one checkpoint its log-prob.")
    one.add_argument("--page", action="store_true", help="One HTML file, for any browser and without a network: every "
                     "token at every checkpoint, and curves. score.py makes it where it is told --tokens.")
    one.add_argument("--three_panel", action="store_true", help="The figure of arXiv 2509.13079; with the four below.")
    for role in ROLES:
        what = "DPO from the mixed runs" if role == "dpo" else f"SFT on {role} data"
        figures.add_argument(f"--{role}", nargs="+", metavar="RUN", default=[],
                             help=f"{what}; several runs are seeds, and the interval is over them.")
    look = parser.add_argument_group("look")
    look.add_argument("--columns", type=int, choices=[1, 2], default=2,
                      help="Width, in columns of a journal: 3.3 or 6.9 inches.")
    look.add_argument("--focus", type=float, nargs=2, metavar=("LOW", "HIGH"),
                      help="A band, in nats per token, that gets a quarter of the height: of levels in dynamics, of "
                           "gaps in the three-panel figure, where it is 0.05 0.10 if you don't say.")
    look.add_argument("--floor", type=float, metavar="VALUE", help="Draws a line at this level, the best possible one.")
    look.add_argument("--panel_ratios", type=float, nargs=3, metavar=("A", "B", "C"),
                      help="Widths of the three panels (heights in one column). Default: 1 1 1.2.")
    look.add_argument("--style", help="A matplotlib style sheet: its name, or a file.")
    look.add_argument("--serif", action="store_true", help="The letters of a paper (STIX), without LaTeX.")
    look.add_argument("--usetex", action="store_true", help="Letters set by LaTeX, which must be installed.")
    args = parse_known(parser, argv, "plot.py")
    args.series = args.series and home(args.series)
    if files := [name for name in args.scores or [] if name.endswith(".parquet")]:  # --scores FILE RUN RUN
        args.runs, args.scores = args.runs + [name for name in args.scores if name not in files], files
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Flags that contradict one another or would go unused; raises UserError."""
    roles = [role for role in ROLES if getattr(args, role)]
    if args.three_panel and len(roles) < (1 if args.series else len(ROLES)):
        missing = [f"--{role}" for role in ROLES if role not in roles]
        raise UserError(f"--three_panel: needs runs for {', '.join(missing)}")
    if not args.three_panel and (roles or args.panel_ratios):
        raise UserError(f"--{roles[0] if roles else 'panel_ratios'}: is for --three_panel")
    if args.three_panel and args.runs:
        raise UserError(f"--three_panel: takes its runs by --{', --'.join(ROLES)}, not {args.runs[0]}")
    if args.three_panel and args.test and len(set(args.test)) != 3:
        raise UserError("--test: the three-panel figure needs three data sets, in the order forward, reverse, mixed")
    named = [run for role in ROLES for run in getattr(args, role)]
    if twice := [run for run in named if named.count(run) > 1]:
        raise UserError(f"--three_panel: {twice[0]} is named twice")
    if args.phases and len(set(args.runs)) < 2:
        raise UserError("--phases: needs two runs or more, in their order")
    if args.diff and (len(set(args.runs)) != 2 or args.series or args.focus or args.floor is not None):
        raise UserError("--diff: needs two runs, and takes no --series, --focus or --floor")
    for flag in ("focus", "floor", "panel_ratios"):
        values = [args.floor or 0] if flag == "floor" else getattr(args, flag) or []
        if not all(abs(value) <= 1e12 for value in values):
            raise UserError(f"--{flag}: must be finite, and no larger than 1e12")
    if args.panel_ratios and min(args.panel_ratios) <= 0:
        raise UserError("--panel_ratios: must be above 0")
    no_curves = args.heatmap or args.scatter or args.ledger or args.strip is not None or args.page
    if no_curves and (args.series or args.focus or args.floor is not None):
        raise UserError("--series, --focus and --floor: are for the figures of curves")
    if args.page and (look := [flag for flag in ("style", "serif", "usetex") if getattr(args, flag)]):
        raise UserError(f"--{look[0]}: is for figures, and --page makes none")


def home(path: str | Path) -> Path:
    """A path whose ~ is opened; a ~ that means nobody stays, and is then not found."""
    return Path(os.path.expanduser(path))


def find_folders(args: argparse.Namespace, given: list[str]) -> dict[str, Path]:
    """The given runs that are folders: without a table to look a name up in, all. Raises UserError for a file."""
    paths = {run: home(run) for run in given}
    found = {run: path for run, path in paths.items()
             if not (args.scores or (args.series and args.three_panel)) or os.path.exists(path / "metrics.jsonl")}
    if file := next(filter(os.path.isfile, found.values()), None):
        raise UserError(f"{file}: is a file, and no run's folder; a table of score.py belongs to --scores, a csv to "
                        "--series")
    return found


def find_scores(args: argparse.Namespace, folders: list[Path]) -> list[Path]:
    """The files of --scores, or those in the runs' folders, which a figure that can't do without must have."""
    if args.scores:
        return [home(file) for file in args.scores]
    needed = args.phases or args.heatmap or args.scatter or args.strip is not None or args.page
    needed = needed or (args.three_panel and not args.series)
    return [file for folder in folders if os.path.exists(file := folder / "scores.parquet") or needed]


def command() -> None:
    sys.exit(run_script(main))


if __name__ == "__main__":
    command()
