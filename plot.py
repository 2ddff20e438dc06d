"""Draws runs: their training curves, and where they were scored, the log-probs of responses over steps.

    python plot.py                             the newest run under runs/
    python plot.py RUN [RUN ...]               these run folders, in one figure
    python plot.py --scores scores.parquet     the log-probs of a file of score.py alone

Leaves training and dynamics, each as .png, .pdf and .svg, in the run's folder (runs/figures for several runs). Every
number drawn is read from metrics.jsonl or scores.parquet; a rerun gives the same bytes.
"""

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path

import matplotlib
import matplotlib.style

from nanodpo import figures
from nanodpo.errors import UserError, first_line, run_script
from nanodpo.records import read_metrics, read_scores
from nanodpo.runs import newest_run

FORMATS = {"png": None, "pdf": {"CreationDate": None}, "svg": {"Date": None}}  # metadata that must not be written
HOUSE = {"font.size": 7, "axes.labelsize": 7, "axes.titlesize": 7, "legend.fontsize": 7, "legend.title_fontsize": 7,
         "xtick.labelsize": 6, "ytick.labelsize": 6, "lines.linewidth": 1, "lines.markersize": 3, "axes.linewidth": 0.6,
         "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False}
# Whatever the style: the same ids on a rerun, the full width, text that a journal's software can edit.
FIXED = {"svg.hashsalt": "nanodpo", "savefig.bbox": None, "pdf.fonttype": 42}


def main(argv: list[str]) -> None:
    args = parse(argv)
    folders = list(dict.fromkeys(Path(run).expanduser() for run in args.runs))
    if not folders and not args.scores:
        folders = [Path(newest_run(Path("runs")))]
    runs = {name: read_metrics(folder) for name, folder in label(folders).items()}
    beside = [folder / "scores.parquet" for folder in folders if (folder / "scores.parquet").exists()]
    files = [Path(args.scores).expanduser()] if args.scores else beside
    if args.focus and not files:
        raise UserError("--focus: is for the figure of scores.parquet, and there is none; --scores FILE names one")
    scores = read_scores(files) if files else None
    default = "runs/figures" if len(folders) > 1 else folders[0] if folders else files[0].parent
    with house_style(args.style):
        drawn = {"training": figures.training_figure(runs, args.columns)} if runs else {}
        if files:
            drawn["dynamics"] = figures.dynamics_figure(scores, args.columns, args.focus)
        save(drawn, Path(args.output_dir or default).expanduser())


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("plot.py", description="Figures of runs.", allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="Run folders. Default: the newest under runs/.")
    parser.add_argument("--output_dir", help="Default: the folder of the run, or of FILE; of several runs/figures.")
    parser.add_argument("--scores", metavar="FILE", help="Log-probs of score.py. Default: scores.parquet of each run.")
    parser.add_argument("--columns", type=int, choices=[1, 2], default=2, help="Of a journal: 3.3 or 6.9 inches.")
    parser.add_argument("--focus", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="Log-probs per token that get a quarter of the height in the figure of scores.")
    parser.add_argument("--style", help="A matplotlib style sheet: its name, or a file.")
    parser.error = _raise  # argparse would print the whole usage before the one line that matters
    return parser.parse_intermixed_args(argv)


def _raise(message: str) -> None:
    raise UserError(message)


def label(folders: list[Path]) -> dict[str, Path]:
    """Runs by their folders' names, or by their paths where two folders have one name."""
    names = [folder.resolve().name for folder in folders]
    return dict(zip(names if len(set(names)) == len(names) else map(str, folders), folders))


@contextlib.contextmanager
def house_style(sheet: str | None):
    """The fonts and lines of the house, then a matplotlib style sheet (name or file), for what is drawn within."""
    with matplotlib.rc_context(HOUSE):
        try:
            if sheet:
                matplotlib.style.use(sheet)
        except (OSError, ValueError) as error:
            raise UserError(f"--style {sheet}: neither a style of matplotlib nor a file with one") from error
        matplotlib.rcParams.update(FIXED)
        yield


def save(drawn: dict, folder: Path) -> None:
    """Writes each figure in each format: beside its place, and into it once all are whole."""
    files = {}
    for name, figure in drawn.items():
        for kind, metadata in FORMATS.items():
            figure.savefig(out := io.BytesIO(), format=kind, dpi=300, metadata=metadata)
            files[folder / f"{name}.{kind}"] = out.getvalue()
    aside = {file: file.with_name(f".{file.name}.partial") for file in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            aside[file].write_bytes(content)
        for file in files:
            os.replace(aside[file], file)
            print(file)
    except OSError as error:
        for file in filter(Path.exists, aside.values()):
            file.unlink()
        raise UserError(f"--output_dir {folder}: can't be written ({first_line(error)})") from error


if __name__ == "__main__":
    sys.exit(run_script(main))
