"""The strip: the tokens of one pair as text, each coloured by its log-prob or by how far it moved."""

import numpy as np
import pandas
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

from ..errors import UserError
from ..scoring.sections import shared_prefix
from .axes import WIDTHS, wrap
from .letters import can_be_drawn, cells, cut, fonts_of, spare_fonts
from .noise import Marks, Noise
from .records import SIDES

SIZE, PITCH, MARGIN = 5.5, 0.13, 0.06  # points; inches from line to line, and around
LETTER = 0.602 * SIZE / 72  # inches: every letter of matplotlib's monospace font is this wide
HEAD = {1: 3, 2: 2}  # lines over the tokens of a response, by the columns of the figure
LINES = 14  # of a response; what does not fit is left out and counted
SEEN = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\r": "\N{LEFTWARDS ARROW}", "\t": "\N{RIGHTWARDS ARROW}"}


def strip_figure(tokens: pandas.DataFrame, row: int, columns: int, noise: dict[str, Noise]):
    """The tokens of a row's chosen and rejected, from a table of read_tokens of one run and one data set.

    With several steps the colour is the change of the log-prob between the first and the last, blue rose and red fell,
    with one step the log-prob itself. A line over the first tokens marks those that both sides share. `noise` is
    that of each run in bfloat16.
    """
    where = list(tokens[["run", "dataset"]].drop_duplicates().itertuples(index=False, name=None))
    if len(where) != 1:
        found = "; ".join(f"{run} on {name}" for run, name in where) or "none"
        raise UserError(f"--strip {row}: needs the tokens of one run and data set, found {found}; name a RUN that has "
                        "them, and a data set by --test")
    steps = sorted(tokens["step"].unique())
    sides = {side: _values(part, steps, f"--strip {row}: {side} of {where[0][0]}")
             for side in SIDES if len(part := tokens[tokens["response"] == side])}
    shared = _shared(tokens[tokens["step"] == steps[-1]])
    moved = len(steps) > 1
    what = (f"change of log-prob from step {steps[0]:g} to {steps[-1]:g} (nats)" if moved
            else f"log-prob at step {steps[0]:g} (nats)")
    values = np.concatenate([values for _, values in sides.values()])
    limit = float(np.quantile(np.abs(values), 0.98)) or 1.0
    colour = ScalarMappable(Normalize(-limit, limit if moved else 0), "RdBu" if moved else "Blues_r")
    letters = int((WIDTHS[columns] - 2 * MARGIN) / LETTER)
    laid = {side: _lay(words, letters) for side, (words, _) in sides.items()}
    own = noise.get(where[0][0], Noise())
    marks = Marks("a single token", f"; it moves the mean over a response's tokens by ± {2 * own.logps:.2g} nats, two "
                                    "standard deviations")
    marks.not_measured([own])
    title = "; ".join([f"{where[0][0]}, {where[0][1]}, row {row}", *(handle.get_label() for handle in marks.handles)])
    title = wrap(title, 50 * columns)
    top = title.count("\n") + 1
    lines = top + sum(HEAD[columns] + 1.5 + places[-1][1] for places in laid.values())
    fig, ax = _canvas(lines, letters, columns)
    ax.text(0, top / 2, title, va="center", fontsize=7)
    for side, (words, numbers) in sides.items():
        _head(ax, side, len(words), len(words) - len(laid[side]), shared, len(sides), top)
        ends = _extremes(words, numbers)
        for i, line in enumerate(ends if columns == 1 else ["; ".join(ends)]):
            ax.text(0, top + 1.45 + i, line, va="center", fontsize=6, parse_math=False, usetex=False)
        _draw(ax, words, numbers, laid[side], top + HEAD[columns], shared, colour, moved)
        top += laid[side][-1][1] + HEAD[columns] + 1.5
    bar = fig.colorbar(colour, cax=fig.add_axes((0.2, 0.34 / fig.get_figheight(), 0.6, 0.08 / fig.get_figheight())),
                       orientation="horizontal",
                       extend=("both" if moved else "min") if (np.abs(values) > limit).any() else "neither")
    bar.set_label(what)
    return fig, (f"The tokens of row {row} of {where[0][1]} under {where[0][0]}: {what}"
                 + (", blue rose, red and underlined fell" if moved else ", darker is less likely")
                 + f". The first {shared} tokens are the same in both responses (line above them)." * (shared > 0)
                 + marks.caption)


def _shared(tokens: pandas.DataFrame) -> int:
    """How many tokens both sides have in common from the start, at one step, by their ids: two may have one text."""
    sides = [part["id"].tolist() for _, part in tokens.groupby("response")]
    return shared_prefix(*sides) if len(sides) == 2 else 0


def _values(part: pandas.DataFrame, steps: list, what: str) -> tuple[list[str], np.ndarray]:
    """(tokens, numbers): how far each log-prob moved from the first step to the last; of one step, the log-probs."""
    first, last = (part[part["step"] == step] for step in (steps[0], steps[-1]))
    if list(first["id"]) != list(last["id"]):
        raise UserError(f"{what} has other tokens at step {steps[0]} than at step {steps[-1]}")
    values = last["logp"].to_numpy(dtype=float)
    return list(last["token"]), values - first["logp"].to_numpy(dtype=float) if len(steps) > 1 else values


def _extremes(words: list[str], values: np.ndarray) -> list[str]:
    """The lowest and the highest number with their tokens, also of those that are left out."""
    said = []
    for name, i in (("lowest", int(values.argmin())), ("highest", int(values.argmax()))):
        number = f"{values[i]:+.3g}".replace("-", "\N{MINUS SIGN}")
        said.append(f"{name} {number} at token {i + 1:,}, [{_visible(words[i], 20)}]")
    return said


def _lay(words: list[str], letters: int) -> list[tuple[int, int, int]]:
    """(first letter, line, letters) of each token's cell, as far as LINES reach."""
    places, x, line = [], 0, 0
    for word in words:
        width = max(cells(_visible(word, letters)), 1)
        if x + width > letters:
            x, line = 0, line + 1
        if line == LINES:
            break
        places.append((x, line, width))
        x += width
    return places


def _canvas(lines: float, letters: int, columns: int):
    """(figure, axes): a unit across is a letter, a unit down a line; below is room for the colour bar."""
    width, height = WIDTHS[columns], lines * PITCH + 0.5 + MARGIN
    fig = Figure(figsize=(width, height))
    ax = fig.add_axes((MARGIN / width, 0.5 / height, letters * LETTER / width, lines * PITCH / height),
                      xlim=(0, letters), ylim=(lines, 0))
    ax.set_axis_off()
    return fig, ax


def _head(ax, side: str, tokens: int, left_out: int, shared: int, sides: int, top: float) -> None:
    text = f"{side}, {tokens:,} tokens"
    text += f", the last {left_out:,} left out" if left_out else ""
    text += f"; the first {shared:,} shared (line above)" if shared else "; no token shared" if sides == 2 else ""
    ax.text(0, top + 0.45, text, va="center", fontsize=6)


def _draw(ax, words, values, places, top: float, shared: int, colour, moved: bool) -> None:
    """The cells with their text, dark ones in white letters; never by LaTeX, whose letters are of other widths."""
    over, under, font = [], [], FontProperties(family=_families(), size=SIZE)
    for i, ((x, line, width), word, value) in enumerate(zip(places, words, values)):
        y, fill = top + line, colour.to_rgba(value)
        ax.add_patch(Rectangle((x, y + 0.08), width, 0.84, facecolor=fill, edgecolor="0.75", linewidth=0.25))
        dark = np.dot(fill[:3], (0.299, 0.587, 0.114)) < 0.5
        ax.text(x, y + 0.5, _visible(word, width), va="center_baseline", fontproperties=font,
                color="white" if dark else "black", parse_math=False, usetex=False)
        if i < shared:
            over.append([(x, y + 0.04), (x + width, y + 0.04)])
        if moved and value < -0.1 * colour.norm.vmax:  # red and blue are one grey: the fall is underlined
            under.append([(x + 0.15, y + 0.86), (x + width - 0.15, y + 0.86)])
    ax.add_collection(LineCollection(over, colors="black", linewidths=1.2))
    ax.add_collection(LineCollection(under, colors="0.1", linewidths=0.5))


def _visible(word: str, width: int) -> str:
    """A token with its white space to be seen, and what no font has as a replacement character; as much of it as there
    is room for in `width` cells."""
    word = "".join(SEEN.get(letter, letter) for letter in word[:width])
    word = word if word.strip() else "\N{OPEN BOX}" * max(len(word), 1)
    fonts = fonts_of(_families())
    return cut("".join(letter if can_be_drawn(letter, fonts) else "\N{REPLACEMENT CHARACTER}" for letter in word),
               width)


def _families() -> list[str]:
    return ["monospace", *spare_fonts()]
