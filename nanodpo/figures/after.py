"""The figures and the page that nobody has to ask for, of a run or scoring that has ended: it has, whatever becomes of
them."""

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError, first_line
from ..folder import card
from ..model.source import BROKEN
from ..screen import command_line


def draw_after(folder: Path, ledger: bool = False) -> str:
    """Draws the default figures of `folder`, or that of its `ledger`, for the last lines on the screen: their names, or
    why there are none."""
    def make() -> str:
        from . import drawing

        files = drawing.draw_ledger(folder) if ledger else drawing.draw_run(folder)
        return "figures: " + ", ".join(file.name for file in files if file.suffix == ".png")

    return _made("figure", folder, make, *["--ledger"] * ledger)


def page_after(folder: Path) -> str:
    """Makes the page of a scoring that kept single tokens, in words as `draw_after`; "" where none are kept, and then
    none stays that an earlier call left."""
    def make() -> str:
        from .choice import noise_of
        from .page import write_page

        scores = [folder / "scores.parquet"]
        file, notes = write_page(scores, folder, [], None, noise_of([], scores))
        return f"page: {file}, for a browser" + "".join(f" ({note})" for note in notes)

    if (folder / "tokens.parquet").exists():
        return _made("page", folder, make, "--page")
    (folder / "page.html").unlink(missing_ok=True)
    return ""


def _made(what: str, folder: Path, make: Callable[[], str], *flags: str) -> str:
    try:
        return make()  # imports what is slow to import, and matplotlib may not take its settings
    except UserError as error:
        return f"no {what}: {error}"
    except BROKEN as error:
        plot = Path(__file__).resolve().parents[2] / "plot.py"
        return f"no {what}: {first_line(error)}; `{command_line(plot, folder, *flags)}` says more"


def draw_run_after(run: Path) -> str:
    """Draws the figures of a run that has ended, and puts that of its training into its model cards. Returns the words
    of `draw_after`."""
    said = draw_after(run)
    try:
        card.add_figure(run)
    except OSError as error:
        said += f"\nno figure in the model cards: {first_line(error)}"
    return said


def is_drawn(run: Path) -> bool:
    """Tells whether a run has its figure, with all files. The .tex that includes it is written last."""
    return (run / "training.tex").is_file()
