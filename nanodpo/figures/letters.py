"""Letters that matplotlib's own fonts lack, above all Chinese, Japanese and Korean ones: from fonts of the machine."""

import functools
import itertools
import unicodedata

from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

# The first that is installed is taken; matplotlib has none of them.
FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
         "Source Han Sans SC", "Source Han Sans", "PingFang SC", "Hiragino Sans GB", "Hiragino Sans", "Microsoft YaHei",
         "Yu Gothic", "Malgun Gothic", "SimHei", "WenQuanYi Micro Hei", "Arial Unicode MS")


@functools.cache
def spare_fonts() -> tuple[str, ...]:
    """For letters that a figure's own font lacks; empty where the machine has none of FONTS."""
    installed = {font.name for font in fontManager.ttflist if font.weight == 400}  # of no other: matplotlib would warn
    return tuple(itertools.islice((name for name in FONTS if name in installed), 1))


def fonts_of(families: list[str]) -> list:
    """matplotlib's fonts of these names, to be asked for letters."""
    return [get_font(findfont(FontProperties(family=name))) for name in families]


def can_be_drawn(letter: str, fonts: list) -> bool:
    """Whether one of the fonts has the letter, and it is none that acts: some fonts have signs for those."""
    return letter.isprintable() and any(font.get_char_index(ord(letter)) for font in fonts)


def cells(text: str) -> int:
    """The width of a text in letters of a monospace font: one of East Asia takes the room of two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def cut(text: str, width: int) -> str:
    """As much of the text as `width` cells have room for."""
    widths = itertools.accumulate(map(cells, text))
    return "".join(letter for letter, end in zip(text, widths) if end <= width)
