"""A data set in token ids: its limits kept, and every dropped row accounted for."""

import collections
import dataclasses
import hashlib
from typing import NamedTuple

from ..errors import UserError, one_line
from ..progress import Progress
from .encoding import tokenize, tokenize_more
from .example import Example, too_long, truncate
from .problems import with_problems
from .rows import read_rows
from .shapes import Columns, choose_columns, describe_columns, in_messages, read_row, unread_parts
from .template import Template
from .texts import REPEATED, Texts, render_more, render_row, render_whole

AT_ONCE = 500  # rows whose texts are in memory at one time
SHOWN = 3  # rows that a message names; dropped_rows.jsonl has them all


@dataclasses.dataclass
class DataSet:
    path: str
    examples: list[Example]
    dropped: list[dict]  # {"file", "row", "reason"}
    notes: collections.Counter  # what was normalised or found, and in how many rows
    lengths: list[int] = dataclasses.field(default_factory=list)  # of every tokenised row, before any cut or drop
    held_out: int = 0  # examples that went to a data set of their own, or are the only ones that stay here
    total: int = 0  # examples of the file, where some of them are not here
    columns: str = ""  # which are read, and which are not

    def report(self) -> str:
        lines = [f"data {self.path}: {_rows(self.total or len(self.examples))}, {len(self.dropped)} dropped"
                 + f", {self.held_out} held out" * bool(self.held_out)]
        lines += [f"  {self.columns}"] * bool(self.columns)
        lines += [f"  {_rows(count)}: {note}" for note, count in sorted(self.notes.items())]
        lines += [f"  dropped row {row['row']}: {one_line(row['reason'])}" for row in self.dropped[:SHOWN]]
        return "\n".join(lines + [f"  ... and {len(self.dropped) - SHOWN} more"] * (len(self.dropped) > SHOWN))


class Seen(NamedTuple):
    """What stays of a row's texts once they are tokenised."""

    row: int
    notes: tuple[str, ...]
    content: bytes  # a hash of prompt, chosen and rejected
    whole: bool  # there is no prompt

    @classmethod
    def of(cls, texts: Texts) -> "Seen":
        content = hashlib.sha256(repr((texts.prompt, texts.chosen, texts.rejected)).encode(errors="surrogatepass"))
        return cls(texts.row, tuple(texts.notes), content.digest(), not texts.prompt)


def load_dataset(path: str, template: Template, args, limit: int, pairs: bool, more: tuple[str, ...] = ()) -> DataSet:
    """Reads, renders, tokenises and checks a data set. `limit`: tokens a sequence; `pairs`: rejected is required.

    `more` names further columns with responses, which are cut to fit. Raises UserError for an unreadable file, and for
    bad or overlong rows unless args drops or cuts them.
    """
    rows = read_rows(path)
    columns = choose_columns(path, rows, args, pairs)
    if missing := [name for name in more if name not in rows[0]]:
        raise UserError(f"--responses {missing[0]}: {path} has no such column; it has {', '.join(rows[0])}")
    data = DataSet(path, [], [], collections.Counter(), columns=describe_columns(rows, columns, more))
    alone = args.loss == "sft"  # trained on chosen alone
    seen, overlong = [], []
    with Progress("preparing", len(rows), "row") as bar:
        for first in range(0, len(rows), AT_ONCE):
            part = rows[first : first + AT_ONCE]
            texts = _render_all(data, template, first, part, columns, more, alone, alone and args.train_on == "all")
            examples = tokenize(texts, template.tokenizer, args.boundary, may_be_equal=alone)
            tokenize_more(texts, examples, template.tokenizer, args.boundary, limit)
            seen += map(Seen.of, texts)
            overlong += _add(data, texts, examples, limit, args)
            bar.update(len(part))
    _check_repeated(path, seen)
    if data.dropped and args.on_bad_row == "error":
        raise UserError(f"{path}: {len(data.dropped)} of {_rows(len(rows))} can't be used; {_worst(data.dropped)}. "
                        "Mend them, or leave such rows out with --on_bad_row drop")
    _handle_overlong(data, overlong, limit, args)
    data.examples = with_problems(data.examples, rows, {text.row for text in seen if text.whole})
    _add_notes(data, seen)
    for name, count in unread_parts(rows, columns).items():
        data.notes[f"column {name} is not read; if it is part of what is asked, put it into the prompt"] = count
    if not data.examples:
        raise UserError(f"{path}: no usable row is left of {len(rows)}; {_worst(data.dropped)}")
    return data


def _render_all(data: DataSet, template: Template, first: int, rows: list[dict], columns: Columns,
                more: tuple[str, ...], alone: bool, every: bool) -> list[Texts]:
    """The texts of these rows, whose numbers begin at `first`; a row that can't be rendered is dropped."""
    texts = []
    for number, row in enumerate(rows, first):
        try:
            texts.append(_render(template, number, row, columns, more, alone, every))
        except UserError as error:
            _drop(data, number, str(error))
    return texts


def _add(data: DataSet, texts: list[Texts], examples: list[Example | str], limit: int, args) -> list[tuple]:
    """Adds examples to the data set, and drops the rows that have a reason in their place. Returns what is too long:
    (example, reason)."""
    overlong = []
    for text, example in zip(texts, examples):
        if isinstance(example, str):
            _drop(data, text.row, example)
            continue
        data.lengths.append(example.length)
        if reason := too_long(example, args.max_prompt_length, limit, args.max_length):
            overlong.append((example, reason))
        else:
            data.examples.append(example)
    return overlong


def _render(template: Template, number: int, row: dict, columns: Columns, more: tuple[str, ...], alone: bool,
            every: bool) -> Texts:
    """The texts of one row, those of `more` columns with them."""
    values = read_row(row, columns)
    template = template.given(values.options)
    text = render_whole(template, number, values.chosen) if columns.whole else None
    text = text or render_row(template, number, values.prompt, values.chosen, values.rejected,
                              columns.rejected is not None, may_be_equal=alone, every=every, alike=columns.alike)
    found = {name: render_more(template, text.prompt, name, in_messages(f"column {name}", row[name])) for name in more}
    notes = (*text.notes, *(note for _, notes in found.values() for note in notes))
    said = {name: response for name, (response, _) in found.items() if response}
    return dataclasses.replace(text, notes=notes, more=said)


def _add_notes(data: DataSet, seen: list[Seen]) -> None:
    """Counts what was changed or found in the rows that stay."""
    left = {example.row for example in data.examples}
    for text in (seen := [text for text in seen if text.row in left]):
        data.notes.update(set(text.notes))  # a set: both sides may say the same of one row
    if duplicates := len(seen) - len({text.content for text in seen}):
        data.notes["repeats an earlier row"] = duplicates


def _check_repeated(path: str, texts: list[Seen]) -> None:
    """Raises UserError for a column of whole texts beside a prompt column. Single answers may repeat their question."""
    notes = [note for text in texts for note in dict.fromkeys(text.notes) if note.endswith(REPEATED)]
    for note, count in collections.Counter(notes).items():
        if 2 * count >= len(texts):
            raise UserError(f"{path}: {note}, and its second copy would be scored (in {count} of {_rows(len(texts))}); "
                            "cut it off, so that the column holds answers alone")


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _drop(data: DataSet, number: int, reason: str) -> None:
    data.dropped.append({"file": data.path, "row": number, "reason": reason})


def _worst(dropped: list[dict]) -> str:
    """The first rows of a list of dropped ones, each reason once."""
    first = {}
    for row in dropped:
        first.setdefault(row["reason"], row["row"])
    return "; ".join(f"row {row}: {reason}" for reason, row in list(first.items())[:SHOWN])


def _handle_overlong(data: DataSet, overlong: list[tuple[Example, str]], limit: int, args) -> None:
    if overlong and args.overlong == "error":
        worst = sorted(overlong, key=lambda item: -item[0].length)[:SHOWN]
        total = len(data.examples) + len(overlong)
        raise UserError(f"{data.path}: {len(overlong)} of {_rows(total)} ({len(overlong) / total:.1%}) are too long; "
                        f"longest: {'; '.join(f'row {e.row}: {reason}' for e, reason in worst)}. Raise the limit, or "
                        "use --overlong drop or --overlong truncate")
    for example, reason in overlong:
        cut = None
        if args.overlong == "truncate":
            cut = truncate(example, limit, args.max_prompt_length, may_be_equal=args.loss == "sft")
        if not isinstance(cut, Example):
            _drop(data, example.row, f"{reason}; {cut}" if cut else reason)
            continue
        data.examples.append(cut)
        sides = "both responses" if all(cut.cut) else f"only {'chosen' if cut.cut[0] else 'rejected'}"
        data.notes[f"{sides} cut to fit {limit} tokens"] += 1
    data.examples.sort(key=lambda example: example.row)
    data.dropped.sort(key=lambda row: row["row"])
