"""All rows of a data set in token ids, before any limit: made by several processes, and kept in little memory."""

import array
import contextlib
import dataclasses
import functools
import hashlib
import itertools
from typing import NamedTuple

from ..errors import UserError
from ..progress import Progress
from ..ranks.distributed import say
from .answers import WEIGHT, count_pairs, pairs_of, weight_of
from .encoding import tokenize, tokenize_more
from .example import SIDES, CompactIds, Example
from .forks import cores, in_forks
from .messages import in_messages
from .rows import read_places
from .shapes import Columns, choose_columns, describe_columns, read_row, unread_parts
from .template import Template
from .texts import Texts, before_answer, render_more, render_row, render_whole

AT_ONCE = 500  # rows whose texts are in memory at one time, in each process
MANY = 2000  # rows from which on it is worth while to start processes
MANY_PAIRS = 10**5  # of fewer rows: they take more than ten seconds


class Reading(NamedTuple):
    """The settings that decide which token ids a row gets. Nothing else is known while rows are prepared, so prepared
    rows are right under any other settings."""

    prompt_field: str | None
    chosen_field: str | None
    rejected_field: str | None
    boundary: str
    train_on: str
    loss: str  # "sft", which is trained on chosen alone, or empty
    pairs: bool  # rejected is required
    more: tuple[str, ...]  # further columns with responses

    @classmethod
    def of(cls, args, pairs: bool, more: tuple[str, ...] = ()) -> "Reading":
        return cls(args.prompt_field, args.chosen_field, args.rejected_field, args.boundary, args.train_on,
                   "sft" if args.loss == "sft" else "", pairs, more)


class Line(NamedTuple):
    """A row that could be rendered, or one of its pairs, without its token ids."""

    row: int
    notes: tuple[str, ...]
    content: str  # a hash of prompt, chosen and rejected
    whole: bool  # there is no prompt
    lengths: tuple[int, ...]  # of its pieces of token ids; -1: there is none. Empty: the row can't be tokenised
    weight: float  # in the loss
    answer_numbers: tuple[int, int]  # numbers of chosen and rejected in lists of answers


@dataclasses.dataclass
class Prepared:
    """The rows of a data set. `ids` has the token ids of all of them, piece after piece: prompt, chosen, rejected, the
    places of chosen that are scored where not all are, and the further columns; what pairs of a row share is there
    once."""

    columns: str  # which are read, and which are not
    unread: dict[str, int]  # columns that are not read and may be part of what is asked, and in how many rows
    counts: list[int]  # rows of each data set that was named
    more: tuple[str, ...]  # further columns with responses
    questions: dict[int, tuple]  # the paper's columns, by row: (question, relevant-question)
    lines: list[Line] = dataclasses.field(default_factory=list)
    dropped: list[tuple[int, str]] = dataclasses.field(default_factory=list)  # (row, reason)
    ids: array.array | memoryview = dataclasses.field(default_factory=lambda: array.array("i"))

    @property
    def count(self) -> int:
        """Rows in all."""
        return sum(self.counts)

    def examples(self) -> list[Example]:
        """Of the rows that could be tokenised, in their order. Their ids are stretches of `ids`, not copies."""
        found, ids, at, own = [], memoryview(self.ids), 0, {}
        for line in filter(lambda line: line.lengths, self.lines):
            own = own if found and found[-1].row == line.row else {}  # the pieces of its row so far
            names = _names(line.answer_numbers, self.more)
            for name, length in zip(names, line.lengths):
                if name not in own:
                    own[name] = ids[at : at + length] if length >= 0 else None
                    at += max(length, 0)
            prompt, chosen, rejected, scored, *more = [own[name] for name in names]
            said = {name: piece.tolist() for name, piece in zip(self.more, more) if piece is not None}
            kept = CompactIds(prompt), CompactIds(chosen, scored), rejected and CompactIds(rejected)
            found.append(Example(line.row, *kept, more=said, weight=line.weight,
                                 answer_numbers=tuple(line.answer_numbers)))
        return found


def prepare(path: str, template: Template, how: Reading, alone: bool = False, places: list | None = None) -> Prepared:
    """Reads, renders and tokenises the rows of a data set. `alone`: the other ranks of this machine wait meanwhile;
    `places`: its rows, as `read_places` gives them, where they are read already.

    Raises UserError for an unreadable file, and for columns that are missing.
    """
    places = places or read_places(path, alone or None)
    counts, rows = [*map(len, places)], [row for rows in places for row in rows]
    del places
    columns = choose_columns(path, rows, how, how.pairs)
    if missing := [name for name in how.more if name not in rows[0]]:
        raise UserError(f"--responses {missing[0]}: {path} has no such column; it has {', '.join(rows[0])}")
    pairs = 0 if columns.whole else sum(count_pairs(row, columns.chosen, columns.rejected, how.loss == "sft")
                                        for row in rows)
    if pairs >= MANY_PAIRS > len(rows):  # the bar counts rows
        say(f"data {path}: its lists of answers make {pairs:,} pairs, to be prepared one by one")
    found = Prepared(describe_columns(rows, columns, how.more), unread_parts(rows, columns), counts, how.more,
                     _questions(rows))
    parts = in_forks(functools.partial(_prepare_some, rows, template, how, columns), range(0, len(rows), AT_ONCE),
                     cores(alone) if len(rows) > MANY else 1)
    del rows  # forks have them
    with Progress("preparing", found.count, "row", here=alone or None) as bar, contextlib.closing(parts):
        for lines, dropped, ids in parts:
            found.lines += lines
            found.dropped += dropped
            found.ids.extend(ids)
            bar.update(AT_ONCE)
    return found


def _questions(rows: list[dict]) -> dict[int, tuple]:
    """The columns by which problems.py links rows, where a row has a link."""
    if not any(isinstance(row.get("relevant-question"), str) for row in rows):
        return {}
    return {i: tuple(value if isinstance(value := row.get(name), str) else None
                     for name in ("question", "relevant-question")) for i, row in enumerate(rows)}


def _prepare_some(rows: list[dict], template: Template, how: Reading, columns: Columns, first: int
                  ) -> tuple[list[Line], list[tuple[int, str]], array.array]:
    """Lines, dropped rows and ids, as in a Prepared, of AT_ONCE rows from this one on."""
    texts, dropped, lines, ids = [], [], [], array.array("i")
    for number, row in enumerate(rows[first : first + AT_ONCE], first):
        try:
            texts += _render_pairs(template, number, row, columns, how)
        except UserError as error:
            dropped.append((number, str(error)))
    examples = tokenize(texts, template.tokenizer, how.boundary, may_be_equal=how.loss == "sft")
    tokenize_more(texts, examples, template.tokenizer, how.boundary)
    for row, group in itertools.groupby(zip(texts, examples), lambda pair: pair[0].row):
        pairs, stored = [*group], set()
        if wrong := _wrong(pairs):
            dropped.append((row, wrong))
        for text, example in pairs:
            pieces = {} if wrong else _pieces(text, example, how.more)
            for name in pieces:
                if name not in stored:
                    ids.extend(pieces[name] or ())
            stored |= pieces.keys()
            content = hashlib.sha256(repr((text.prompt, text.chosen, text.rejected)).encode(errors="surrogatepass"))
            lines.append(Line(row, text.notes, content.hexdigest()[:32], not text.prompt,
                              tuple(-1 if piece is None else len(piece) for piece in pieces.values()), text.weight,
                              text.answer_numbers))
    return lines, sorted(dropped), ids


def _wrong(pairs: list[tuple[Texts, Example | str]]) -> str | None:
    """The reason why no pair of this row can be used, where one of them can't: one bad answer makes a bad row."""
    numbers = [text.answer_numbers for text, _ in pairs]
    return next((answers_named(text.answer_numbers, numbers) + reason
                 for text, reason in pairs if isinstance(reason, str)), None)


def _pieces(text: Texts, example: Example, more: tuple[str, ...]) -> dict[tuple[str, int], array.array | list | None]:
    """The token ids of a pair by the names of its pieces; None where it has no such piece."""
    prompt, chosen, rejected = example.compact()
    return dict(zip(_names(text.answer_numbers, more), [
        prompt.ids, chosen.ids, rejected and rejected.ids, chosen.scored, *map(example.more.get, more)]))


def _names(numbers: tuple[int, int], more: tuple[str, ...]) -> list[tuple[str, int]]:
    """The names of a pair's pieces: what each is, and of which answer of the row. Pairs of one row share the pieces
    that have one name."""
    chosen, rejected = numbers
    return [("prompt", 0), ("chosen", chosen), ("rejected", rejected), ("scored places", chosen),
            *(("more", i) for i in range(len(more)))]


def _render_pairs(template: Template, number: int, row: dict, columns: Columns, how: Reading) -> list[Texts]:
    """The texts of one row, or of each of its pairs, without an answer that was there before. Raises UserError where
    one can't be used, or where they do not answer one prompt."""
    alone, weight = how.loss == "sft", weight_of(row, WEIGHT in columns.beside)
    pairs = [((0, 0), row)] if columns.whole else pairs_of(row, columns.chosen, columns.rejected, alone)
    found = {}
    for which, own in pairs:
        try:
            text = _render(template, number, own, columns, how.more, alone and how.train_on == "all")
        except UserError as error:
            raise UserError(answers_named(which, [numbers for numbers, _ in pairs]) + str(error)) from error
        text.weight, text.answer_numbers = weight, which
        found.setdefault((text.chosen, None if alone else text.rejected), text)
    first, *others = found.values()
    if other := next((text.prompt for text in others if text.prompt != first.prompt), None):
        raise UserError(f"has lists of answers to different prompts, {first.prompt[-40:]!r} and {other[-40:]!r}; give "
                        "their prompt in a column of its own")
    if len(found) < len(pairs):
        first.notes += ("an answer that a list has twice is taken once",)
    return [first, *others]


def _render(template: Template, number: int, row: dict, columns: Columns, more: tuple[str, ...], every: bool) -> Texts:
    """The texts of one row, those of `more` columns with them."""
    values = read_row(row, columns)
    template = template.given(values.options)
    text = render_whole(template, number, values.chosen) if columns.whole else None
    text = text or render_row(template, number, values.prompt, values.chosen, values.rejected,
                              columns.rejected is not None, every, columns.alike)
    asked = None if text.places or not more else before_answer(template, values.prompt, values.chosen)
    found = {name: render_more(template, text.prompt, name, in_messages(f"column {name}", row[name]), asked)
             for name in more}
    notes = (*text.notes, *(note for _, notes in found.values() for note in notes))
    said = {name: response for name, (response, _) in found.items() if response}
    return dataclasses.replace(text, notes=notes, more=said)


def answers_named(which: tuple[int, int], row: list[tuple[int, int]]) -> str:
    """The answers of a pair by their numbers, for the beginning of a message, where the pairs of its row have several;
    `row` has the numbers of all of them."""
    parts = [f"{side}[{k}]" for side, k, numbers in zip(SIDES, which, zip(*row)) if any(numbers)]
    return f"{' and '.join(parts)}: " if parts else ""
