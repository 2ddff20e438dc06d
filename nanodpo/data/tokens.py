"""A data set in token ids: its limits kept, and every dropped row accounted for."""

import collections
import dataclasses

from ..errors import UserError, one_line
from .closing import OF_ENDS
from .example import SIDES, Example
from .limits import too_long, truncate
from .prepared import Line, Reading, answers_named, prepare
from .problems import find_problems
from .template import Template
from .texts import REPEATED

SHOWN = 3  # rows that a message names; dropped_rows.jsonl has them all


@dataclasses.dataclass
class DataSet:
    """The pairs that can be used of the data that a name names, and what became of the others."""

    path: str
    examples: list[Example]
    dropped: list[dict]  # {"file", "row", "reason"}
    notes: collections.Counter  # what was normalised or found, and in how many rows
    lengths: list[int] = dataclasses.field(default_factory=list)  # of every tokenised row, before any cut or drop
    rows_held_out: int = 0  # rows that went to a data set of their own, or are the only ones that stay here
    rows_in_file: int = 0  # usable rows of the file, where some of them are not here
    columns: str = ""  # which are read, and which are not
    sizes: list[int] = dataclasses.field(default_factory=list)  # rows of each of the data sets that `path` names
    mixture: str = ""  # what mixing.py made of them, and ...
    unmixed: list[Example] | None = None  # ... the examples that it took

    @property
    def once(self) -> list[Example]:
        """The examples of which an epoch is made, each once."""
        return self.examples if self.unmixed is None else self.unmixed

    @property
    def rows(self) -> int:
        """How many rows the examples are of; a row with lists of answers is several examples."""
        return len({example.row for example in self.once})

    @property
    def sides(self) -> tuple[str, ...]:
        """Those that it has: data for SFT may lack rejected."""
        return SIDES if self.examples[0].rejected is not None else SIDES[:1]

    def cut_rows(self) -> list[dict]:
        """{"file", "row", "answer_numbers", "cut"} of each pair of which a side, or both, was cut to fit."""
        return [{"file": self.path, "row": example.row, "answer_numbers": example.answer_numbers,
                 "cut": [side for side, cut in zip(SIDES, example.cut) if cut]}
                for example in self.once if any(example.cut)]

    def report(self) -> str:
        stay = {example.row for example in self.once}
        lost = {row["row"] for row in self.dropped}
        name = " ".join(self.path.splitlines())  # each line of a report is a fact; card.py takes the first apart
        lines = [f"data {name}: {_rows(self.rows_in_file or self.rows)}, {len(lost - stay)} dropped"
                 + f", {self.rows_held_out} held out" * bool(self.rows_held_out)]
        if pairs := sum(row["row"] in stay for row in self.dropped):
            lines.append(f"  {'a pair' if pairs == 1 else f'{pairs} pairs'} dropped of {_rows(len(lost & stay))} with "
                         "lists of answers")
        if len(self.once) > self.rows:
            lines.append(f"  lists of answers: {_rows(self.rows)} make{'s' * (self.rows == 1)} {len(self.once)} pairs")
        lines += [f"  {text}" for text in (self.columns, self.mixture) if text]
        lines += [f"  {_rows(count)}: {note}" for note, count in sorted(self.notes.items())]
        lines += [f"  dropped row {row['row']}: {one_line(row['reason'])}" for row in self.dropped[:SHOWN]]
        return "\n".join(lines + [f"  ... and {len(self.dropped) - SHOWN} more"] * (len(self.dropped) > SHOWN))


def load_dataset(path: str, template: Template, args, limit: int, pairs: bool, more: tuple[str, ...] = (),
                 keep=None) -> DataSet:
    """Reads, renders, tokenises and checks a data set. `limit`: tokens a sequence; `pairs`: rejected is required.

    `more` names further columns with responses, which are cut to fit. `keep`, like data_cache.keep, may have the rows
    from an earlier time. Raises UserError for an unreadable file, and for bad or overlong rows unless args drops or
    cuts them.
    """
    how = Reading.of(args, pairs, more)
    prepared = keep(path, template, how) if keep else prepare(path, template, how)
    data = DataSet(path, [], [], collections.Counter(), columns=prepared.columns, sizes=prepared.counts)
    for row, reason in prepared.dropped:
        _drop(data, row, reason)
    overlong = _add(data, prepared.examples(), limit, args)
    _check_repeated(path, prepared.lines)
    if data.dropped and args.on_bad_row == "error":
        raise UserError(f"{path}: {len(data.dropped)} of {_rows(prepared.count)} can't be used; "
                        f"{_worst(data.dropped)}. Mend them, or leave such rows out with --on_bad_row drop")
    _handle_overlong(data, overlong, limit, args)
    find_problems(data.examples, prepared.questions, {line.row for line in prepared.lines if line.whole})
    _add_notes(data, prepared.lines)
    for name, count in prepared.unread.items():
        data.notes[f"column {name} is not read; if it is part of what is asked, put it into the prompt"] = count
    if not data.examples:
        raise UserError(f"{path}: no usable row is left of {prepared.count}; {_worst(data.dropped)}")
    return data


def _add(data: DataSet, examples: list[Example], limit: int, args) -> list[tuple[Example, str]]:
    """Adds the examples that fit to the data set. Returns the others, each with the limit that it breaks."""
    overlong, rows = [], {}
    for example in examples:
        rows.setdefault(example.row, []).append(example.answer_numbers)
    for example in examples:
        room = max(0, limit - len(example.prompt)) if example.more else 0
        example.more = {name: ids[:room] for name, ids in example.more.items()}
        data.lengths.append(example.length)
        if reason := too_long(example, args.max_prompt_length, limit, args.max_length):
            overlong.append((example, answers_named(example.answer_numbers, rows[example.row]) + reason))
        else:
            data.examples.append(example)
    return overlong


def _add_notes(data: DataSet, lines: list[Line]) -> None:
    """Counts what was changed or found in the rows that stay."""
    left, rows = {example.row: example.weight for example in data.examples}, {}
    cut = {(example.row, example.answer_numbers): example.cut for example in data.examples if any(example.cut)}
    for line in lines:
        if line.row in left:
            rows.setdefault(line.row, []).append(line)
    for own in rows.values():  # a set: both sides, and all pairs, may say the same of one row
        data.notes.update({note for line in own for note in _true_notes(line, cut)})
    for what, count in (("weight 0, which counts nothing in the loss", sum(not w for w in left.values())),
                        ("a weight other than 0 and 1", sum(w not in (0, 1) for w in left.values()))):
        if count:
            data.notes[what] = count
    if duplicates := len(rows) - len({tuple(line.content for line in own) for own in rows.values()}):
        data.notes["repeats an earlier row"] = duplicates


def _true_notes(line: Line, cut: dict[tuple, tuple[bool, bool]]) -> list[str]:
    """The notes of a pair, without those on an end that was cut off. `cut`: Example.cut of all pairs that were cut, by
    row and numbers of answers."""
    gone = dict(zip(SIDES, cut.get((line.row, tuple(line.answer_numbers)), ())))
    return [note for note in line.notes if not (note.endswith(OF_ENDS) and gone.get(note.partition(":")[0]))]


def _check_repeated(path: str, lines: list[Line]) -> None:
    """Raises UserError for a column of whole texts beside a prompt column. Single answers may repeat their question."""
    notes = dict.fromkeys((line.row, note) for line in lines for note in line.notes if note.endswith(REPEATED))
    total = len({line.row for line in lines})
    for note, count in collections.Counter(note for _, note in notes).items():
        if 2 * count >= total:
            raise UserError(f"{path}: {note}, and its second copy would be scored (in {count} of {_rows(total)}); "
                            "cut it off, so that the column holds answers alone")


def check_weights(train: DataSet, held_out: DataSet | None = None, without: str | None = None) -> frozenset[int]:
    """The rows of --without_rows, `without`. Raises UserError for one that is not trained on, and where no row is left
    in a data set that counts, so that there is nothing to learn or to measure."""
    rows = frozenset(map(int, without.split(",") if without else ()))
    trained = {example.row for example in train.examples}
    for row in sorted(rows - trained):
        find_row(train, held_out, row, flag := f"--without_rows {without}: row {row}")
        why = "not drawn by --mix_weights" if row in {example.row for example in train.once} else "held out"
        raise UserError(f"{flag}: {train.path}: this row is {why}, and is not trained on; leave it out of the list")
    for data in filter(None, (train, held_out)):
        if not any(example.weight for example in data.examples):
            raise UserError(f"{data.path}: every row that is left has the weight 0, so the loss is 0 whatever the "
                            "model says; give some row a weight above 0, or remove the column weight")
    if not any(example.weight for example in train.examples if example.row not in rows):
        raise UserError(f"--without_rows {without}: {train.path}: no row is left that counts in the loss")
    return rows


def find_row(data: DataSet, held_out: DataSet | None, row: int, flag: str) -> list[Example]:
    """The pairs of a row, also where it was held out of this data set. Raises UserError, which begins with `flag`, for
    a row that is not used."""
    examples = {}
    for example in [*data.once, *(held_out.examples if data.rows_held_out else ())]:
        examples.setdefault(example.row, []).append(example)
    if row in examples:
        return examples[row]
    reasons = {dropped["row"]: dropped["reason"] for dropped in data.dropped}
    if row in reasons:
        raise UserError(f"{flag}: {data.path}: this row is left out: {reasons[row]}")
    raise UserError(f"{flag}: {data.path} has rows 0 to {max(examples | reasons)}")


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
    """Drops or cuts examples, each given with the limit that it breaks. Raises UserError where --overlong says so."""
    if overlong and args.overlong == "error":
        worst = sorted(overlong, key=lambda item: -item[0].length)[:SHOWN]
        count, total = (len({e.row for e in examples}) for examples in (
            [e for e, _ in overlong], [*data.examples, *(e for e, _ in overlong)]))
        raise UserError(f"{data.path}: {count} of {_rows(total)} ({count / total:.1%}) are too long; "
                        f"longest: {'; '.join(f'row {e.row}: {reason}' for e, reason in worst)}. Raise the limit, or "
                        "use --overlong drop or --overlong truncate")
    shortened = set()  # (row, what was done): pairs of one row have answers in common
    for example, reason in overlong:
        cut = None
        if args.overlong == "truncate":
            cut = truncate(example, limit, args.max_prompt_length, may_be_equal=args.loss == "sft")
        if not isinstance(cut, Example):
            _drop(data, example.row, f"{reason}; {cut}" if cut else reason)
            continue
        data.examples.append(cut)
        side = SIDES[cut.cut.index(True)]
        sides = "both responses" if all(cut.cut) else side if cut.rejected is None else f"only {side}"
        shortened.add((example.row, f"{sides} cut to fit {limit} tokens"))
    data.notes.update(note for _, note in shortened)
    data.examples.sort(key=lambda example: (example.row, example.answer_numbers))
    if shortened:
        _drop_repeated(data, {row for row, _ in shortened}, args.loss == "sft")
    data.dropped.sort(key=lambda row: row["row"])


def _drop_repeated(data: DataSet, rows: set[int], alone: bool) -> None:
    """Takes once what several answers of one of these rows have become by a cut. `alone`: SFT."""
    seen, kept, again = set(), [], set()
    for example in data.examples:
        pair = example.row, tuple(example.chosen), None if alone else tuple(example.rejected)
        if example.row in rows and pair in seen:
            again.add(example.row)
            continue
        seen.add(pair)
        kept.append(example)
    data.examples = kept
    data.notes["answers that are the same once they are cut are taken once"] = len(again)
    data.notes += collections.Counter()  # without what was never found
