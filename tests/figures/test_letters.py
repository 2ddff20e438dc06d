"""Letters that matplotlib's monospace font lacks, and the room that those of East Asia take."""

from types import SimpleNamespace

import pytest
from test_figures import draw, make_tokens  # noqa: F401

from nanodpo.figures import letters

DOUBLE = "\N{MATHEMATICAL DOUBLE-STRUCK CAPITAL A}"  # DejaVu Sans has it, DejaVu Sans Mono does not


@pytest.fixture
def spare(monkeypatch):
    """Sets the fonts that are looked for."""
    def set_fonts(*names):
        monkeypatch.setattr(letters, "FONTS", names)
        letters.spare_fonts.cache_clear()

    yield set_fonts
    letters.spare_fonts.cache_clear()


@pytest.mark.parametrize("fonts, shown", [((), "\N{REPLACEMENT CHARACTER}"), (("no such font", "DejaVu Sans"), DOUBLE)])
def test_the_strip_takes_what_its_font_lacks_from_another(fonts, shown, spare, tmp_path, draw):  # noqa: F811
    spare(*fonts)
    fig = draw("--scores", make_tokens(tmp_path, ["So", DOUBLE, "."], ["No"]), "--strip", 7)["strip"]
    texts = [text for text in fig.axes[0].texts if text.get_fontproperties().get_family()[0] == "monospace"]
    assert [text.get_text() for text in texts] == ["So", shown, ".", "No"]
    assert texts[1].get_fontproperties().get_family() == ["monospace", *fonts[1:]]


def test_no_character_that_acts_is_drawn():
    """A font with a sign for each: an escape in an SVG would make it no XML."""
    fonts = [SimpleNamespace(get_char_index=lambda code: 7)]
    assert [letters.can_be_drawn(letter, fonts) for letter in "a\x1b\ufffe"] == [True, False, False]


def test_letters_of_east_asia_take_two_cells():
    """By Unicode's own table (UAX 11): wide and fullwidth letters, of Chinese, Japanese and Korean."""
    assert [letters.cells(text) for text in ("ab", "我", "ト", "한", "，", "ｶ", "é", "")] == [2, 2, 2, 2, 2, 1, 1, 0]
    assert [letters.cut("a我b我", width) for width in range(7)] == ["", "a", "a", "a我", "a我b", "a我b", "a我b我"]


def test_a_cell_is_as_wide_as_its_letters(spare, tmp_path, draw, monkeypatch):  # noqa: F811
    """Three such letters take six cells where a font has them. Where none has, three marks take three."""
    for there in (True, False):
        monkeypatch.setattr("nanodpo.figures.strip.can_be_drawn", lambda letter, _: there or letter.isascii())  # noqa: B023
        fig = draw("--scores", make_tokens(tmp_path, ["So", "我们算", "."], ["No"]), "--strip", 7)["strip"]
        assert [patch.get_width() for patch in fig.axes[0].patches] == [2, 6 if there else 3, 1, 2]
