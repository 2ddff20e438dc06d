"""Texts -> token ids, with the boundary, the limits and every dropped row accounted for."""

import collections
import dataclasses
import hashlib
import itertools
from typing import NamedTuple

from ..errors import UserError, one_line
from ..progress import Progress
from .example import Answers, Example, too_long, truncate
from .problems import with_problems
from .rows import read_rows
from .shapes import Columns, choose_columns, describe_columns, in_messages, read_row, unread_parts
from .template import Template, added_tokens
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
    held_out: int = 0  # examples that went to a data set of their own
    columns: str = ""  # which are read, and which are not

    def report(self) -> str:
        lines = [f"data {self.path}: {_rows(len(self.examples) + self.held_out)}, {len(self.dropped)} dropped"
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
            examples = _tokenize(texts, template.tokenizer, args.boundary, may_be_equal=alone)
            _tokenize_more(texts, examples, template.tokenizer, args.boundary, limit)
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


def _tokenize(texts: list[Texts], tokenizer, boundary: str, may_be_equal: bool) -> list[Example | str]:
    """An Example for each text, or the reason why there is none."""
    if not texts:
        return []
    prompts = _encode(tokenizer, [t.prompt for t in texts], texts)
    sides = []
    for side in ("chosen", "rejected"):
        responses = [getattr(t, side) for t in texts]
        if responses[0] is None:
            sides.append([None] * len(texts))
        else:
            sides.append(_responses(tokenizer, texts, prompts, responses, boundary))
    examples = [_example(*row, may_be_equal) for row in zip(texts, prompts, *sides)]
    return [_with_places(text, example, tokenizer, boundary) if text.places and isinstance(example, Example)
            else example for text, example in zip(texts, examples)]


def _with_places(text: Texts, example: Example, tokenizer, boundary: str) -> Example | str:
    """The example with the numbers of the tokens that are scored: those of the places of its text."""
    borders = [border for place in text.places for border in place]  # the first is 0, the last the end
    pieces = _ids(tokenizer, [text.chosen[a:b] for a, b in itertools.pairwise(borders)])
    if [i for piece in pieces for i in piece] == example.chosen:
        ends = [*itertools.accumulate(map(len, pieces), initial=0)]
    else:  # a tokenizer that puts something before every text
        heads = _responses(tokenizer, [text] * len(borders), [example.prompt] * len(borders),
                           [text.chosen[:border] for border in borders], boundary)
        if any(isinstance(head, str) or example.chosen[: len(head)] != head for head in heads):
            return ("chosen: an answer and what is beside it merge in tokens; score the last answers alone with "
                    "--train_on last")
        ends = [*map(len, heads)]
    scored = [place for stretch in zip(ends[::2], ends[1::2]) for place in range(*stretch)]
    return dataclasses.replace(example, chosen=Answers(example.chosen, scored))


def _responses(tokenizer, texts: list[Texts], prompts: list[list[int]], responses: list[str], boundary: str) -> list:
    """Ids of a response to each text's prompt, or what is wrong with it."""
    if boundary == "concat":
        return _apart(tokenizer, prompts, responses)
    wholes = _encode(tokenizer, [t.prompt + r for t, r in zip(texts, responses)], texts)
    return [_after(prompt, whole, tokenizer) for prompt, whole in zip(prompts, wholes)]


def _tokenize_more(texts: list[Texts], examples: list, tokenizer, boundary: str, limit: int) -> None:
    """Gives each Example its further responses; puts a reason in its place where one merges with the prompt."""
    for i, (text, example) in enumerate(zip(texts, examples)):
        for name, response in text.more.items() if isinstance(example, Example) else ():
            ids, = _responses(tokenizer, [text], [example.prompt], [response], boundary)
            if isinstance(ids, str):
                examples[i] = f"column {name}: {ids}"
                break
            example.more[name] = ids[: max(0, limit - len(example.prompt))]


def _example(text: Texts, prompt: list[int], chosen, rejected, may_be_equal: bool) -> Example | str:
    if not text.prompt and not prompt:  # one text: its first token, which nothing predicts, is given
        prompt, chosen = chosen[:1], chosen[1:]
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(ids, str):
            return f"{name}: {ids}"
        if ids == []:
            return f"{name} has no tokens"
    if not prompt:
        return "prompt has no tokens"
    if chosen == rejected and not may_be_equal:
        return "chosen and rejected are equal in tokens"
    return Example(text.row, prompt, chosen, rejected)


def _encode(tokenizer, lines: list[str], texts: list[Texts]) -> list[list[int]]:
    """Token ids; of plain text with exactly one BOS in front where the tokenizer uses one.

    What the chat template rendered has the BOS that the template wrote, or none, as at inference.
    """
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    return [[bos, *ids] if adds_bos and not text.rendered and ids[:1] != [bos] else ids
            for ids, text in zip(_ids(tokenizer, lines), texts)]


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    # Not verbose: it would warn of texts beyond the model's context, which are handled here.
    how = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, **how).input_ids if texts else []


def _apart(tokenizer, prompts: list[list[int]], responses: list[str]) -> list[list[int] | str]:
    """Ids of responses by themselves, but as they are within a text: many tokenizers put a space before every text.

    Those are given something that comes first and is taken away again, and that no token joins with what follows: the
    prompt's last token where it is an added one, else a mark or letter.
    """
    if not _puts_in_front(tokenizer):
        return _ids(tokenizer, responses)
    added, found = set(added_tokens(tokenizer)), []
    for prompt, response in zip(prompts, responses):
        last = tokenizer.convert_ids_to_tokens(prompt[-1]) if prompt else ""
        for first in [last] if last in added else "\n.a\u4e00":
            before, whole = _ids(tokenizer, [first, first + response])
            if whole[: len(before)] == before:
                found.append(whole[len(before):])
                break
        else:
            found.append("can't be tokenised apart from its prompt; leave out --boundary concat")
    return found


def _puts_in_front(tokenizer) -> bool:
    line, word, both = _ids(tokenizer, ["\n", "a", "\na"])
    return both != line + word


def _after(prompt: list[int], whole: list[int], tokenizer) -> list[int] | str:
    """Ids of the response, or what is wrong where the prompt's ids are not a prefix of the whole's."""
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt):]
    at = next(i for i, (a, b) in enumerate(zip(prompt, whole + [None] * len(prompt))) if a != b)
    show = [tokenizer.convert_ids_to_tokens(ids[at : at + 3]) for ids in (prompt, whole)]
    return (f"prompt and response merge in tokens: {show[0]} alone, {show[1]} together; end the prompt elsewhere, or "
            "tokenise them apart with --boundary concat")


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
