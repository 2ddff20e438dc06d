"""From files to figures on disk: the look of the house, the figures of a run that nobody has to ask for, their files.

matplotlib is imported with this module: who draws only at the end imports it only then.
"""

import argparse
import contextlib
import hashlib
import io
import os
import shutil
from pathlib import Path
from unittest import mock

import matplotlib
import matplotlib.style
from matplotlib.backends.backend_pdf import PdfFile

from ..errors import UserError, first_line
from ..files import check_regular
from ..folder.atomic import new_file
from .axes import escape_tex, shown
from .choice import draw
from .letters import spare_fonts

FORMATS = {"png": None, "pdf": {"CreationDate": None}, "svg": {"Date": None}}  # metadata that must not be written
HOUSE = {"font.size": 7, "axes.labelsize": 7, "axes.titlesize": 7, "legend.fontsize": 7, "legend.title_fontsize": 7,
         "xtick.labelsize": 6, "ytick.labelsize": 6, "lines.linewidth": 1, "lines.markersize": 3, "axes.linewidth": 0.6,
         "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False}
# The letters of a paper; not matplotlib's cmr10, which shows other characters for _ < > { } and |.
SERIF = {"font.family": ["STIXGeneral", "DejaVu Sans"], "mathtext.fontset": "stix"}
USETEX = {"text.usetex": True, "font.family": "serif"}
# Whatever the style: the same ids on a rerun, the full width, text that a journal's software can edit.
FIXED = {"svg.hashsalt": "nanodpo", "savefig.bbox": None, "pdf.fonttype": 42}
# The flags of plot.py that draw reads, none of them given.
ASKED = argparse.Namespace(columns=2, **dict.fromkeys((
    "strip", "three_panel", "diff", "phases", "heatmap", "scatter", "ledger", "series", "scores", "test", "focus",
    "floor")))
SNIPPET = r"""%% In the preamble: \usepackage{graphicx}
\begin{figure%(star)s}[t]
  \centering
  \includegraphics[width=%(width)s]{%(name)s.pdf}
  \caption{%(caption)s}
  \label{fig:%(name)s}
\end{figure%(star)s}
"""


def draw_run(folder: Path) -> list[Path]:
    """Draws the figures of a folder that nobody has to ask for into it, as plot.py does. Those that an earlier call
    left, of scores that are there no more, go. Returns the files; raises UserError where there is nothing that can be
    drawn."""
    scored = folder / "scores.parquet"
    runs = [folder] if (folder / "metrics.jsonl").exists() or not scored.exists() else []
    with house_style():
        drawn = draw(ASKED, runs, [scored] if scored.exists() else [], [])[0]
        for name in {"dynamics", "mass_and_answers"} - drawn.keys():
            for kind in (*FORMATS, "tex"):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
        return save(drawn, folder, 2)


def draw_ledger(folder: Path) -> list[Path]:
    """Draws the figure of a folder's ledger into it, as plot.py --ledger does. Returns the files; raises UserError."""
    with house_style():
        return save(draw(argparse.Namespace(**vars(ASKED) | {"ledger": True}), [folder], [], [])[0], folder, 2)


def subset_prefix(letters) -> str:
    """Six letters that name a part of a font in a PDF: a function of what is in it."""
    digest = hashlib.sha256(repr(sorted(map(str, letters))).encode()).digest()
    return "".join(chr(ord("A") + byte % 26) for byte in digest[:6]) + "+"


@contextlib.contextmanager
def house_style(sheet: str | None = None, serif: bool = False, usetex: bool = False):
    """The fonts and lines of the house, then a matplotlib style sheet (name or file), for what is drawn within. LaTeX
    sets its text where `usetex` says so, or the sheet, or the user's own matplotlibrc."""
    with matplotlib.rc_context(HOUSE | (SERIF if serif else {})):
        try:
            if sheet:
                if os.path.exists(sheet):
                    check_regular(sheet)
                matplotlib.style.use(sheet)
        except (OSError, ValueError) as error:
            raise UserError(f"--style {sheet}: neither a style of matplotlib nor a file with one") from error
        matplotlib.rcParams.update(FIXED | (USETEX if usetex else {}))
        if not matplotlib.rcParams["text.usetex"]:
            matplotlib.rcParams["font.family"] = [*matplotlib.rcParams["font.family"], *spare_fonts()]
            yield
            return
        places = [sheet, matplotlib.matplotlib_fname()]
        said = "--usetex" if usetex else f"text.usetex of {' or '.join(filter(None, places))}"
        if missing := " and ".join(name for name in ("latex", "dvipng") if not shutil.which(name)):
            raise UserError(f"{said}: needs {missing}, not found here; --serif looks like LaTeX without it")
        own = "_get_subset_prefix"  # private; for Type 1 fonts it hashes an address
        try:
            with (mock.patch.object(PdfFile, own, staticmethod(subset_prefix)) if hasattr(PdfFile, own)
                  else contextlib.nullcontext()):
                yield
        except RuntimeError as error:  # what matplotlib raises where latex fails
            raise UserError(f"{said}: latex can't set this figure: {first_line(error)}") from error


def save(drawn: dict, folder: Path, columns: int) -> list[Path]:
    """Writes figures, {name: (figure, caption)}, in each format and with a .tex that includes them: beside their
    places, and into them once all are whole."""
    files = {}
    for name, (figure, caption) in drawn.items():
        for kind, metadata in FORMATS.items():
            files[folder / f"{name}.{kind}"] = _render(figure, kind, metadata)
            figure.set_layout_engine("none")  # it takes a third of the time, and is done: all formats are alike
        wide = {"star": "*", "width": r"\textwidth"} if columns == 2 else {"star": "", "width": r"\columnwidth"}
        snippet = SNIPPET % (wide | {"name": name, "caption": escape_tex(shown(caption))})
        files[folder / f"{name}.tex"] = snippet.encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as all_whole:
            for file, content in files.items():
                all_whole.enter_context(new_file(file, shared=True)).write_bytes(content)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: can't be written ({first_line(error)})") from error
    return list(files)


def _render(figure, kind: str, metadata: dict | None) -> bytes:
    figure.savefig(out := io.BytesIO(), format=kind, dpi=300, metadata=metadata)
    return out.getvalue()
