"""Texts -> token ids, with the boundary, the limits and every dropped row accounted for.

Lengths are in tokens, always. A row is an Example: prompt ids, and the ids of each response with its end of turn.
"""

import collections
import dataclasses

from .data import Texts, choose_fields, read_rows, render_row
from .errors import UserError
from .template import Template


@dataclasses.dataclass
class Example:
    row: int  # number of the row in its file
    prompt: list[int]
    chosen: list[int]
    rejected: list[int] | None
    cut: tuple[bool, bool] = (False, False)  # was chosen, rejected truncated

    @property
    def length(self) -> int:
        """The longest [prompt | response], in tokens."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected or ()))


@dataclasses.dataclass
class DataSet:
    path: str
    examples: list[Example]
    dropped: list[dict]  # {"file", "row", "reason"}
    notes: collections.Counter  # what was normalised or found, and in how many rows

    def report(self) -> str:
        lines = [f"data {self.path}: {len(self.examples)} rows, {len(self.dropped)} dropped"]
        lines += [f"  {count} rows: {note}" for note, count in sorted(self.notes.items())]
        return "\n".join(lines)


def load_dataset(path: str, template: Template, args, limit: int, pairs: bool) -> DataSet:
    """Reads, renders, tokenises and checks a data set. `limit`: tokens a sequence; `pairs`: rejected is required.

    Raises UserError for an unreadable file, and for bad or overlong rows unless args drops or cuts them.
    """
    rows = read_rows(path)
    fields = choose_fields(path, rows, args.prompt_field, args.chosen_field, args.rejected_field, pairs)
    data = DataSet(path, [], [], collections.Counter())
    texts, overlong = [], []
    for number, row in enumerate(rows):
        try:
            values = [row[name] if name else None for name in fields]
            texts.append(render_row(template, number, *values, has_rejected=fields[2] is not None))
        except UserError as error:
            _bad_row(data, number, str(error), args.on_bad_row)
    for text, example in zip(texts, _tokenize(texts, template.tokenizer, args.boundary)):
        if isinstance(example, str):
            _bad_row(data, text.row, example, args.on_bad_row)
        elif reason := _too_long(example, args.max_prompt_length, limit):
            overlong.append((example, reason))
        else:
            data.examples.append(example)
        data.notes.update(text.notes)
    _handle_overlong(data, overlong, limit, args)
    duplicates = len(texts) - len({(t.prompt, t.chosen, t.rejected) for t in texts})
    if duplicates:
        data.notes["duplicate of another row"] = duplicates
    if not data.examples:
        raise UserError(f"{path}: no usable row left of {len(rows)}; first: {data.dropped[0]['reason']}")
    return data


def _bad_row(data: DataSet, number: int, reason: str, policy: str) -> None:
    if policy == "error":
        raise UserError(f"{data.path}: row {number}: {reason}; mend it, or drop such rows with --on_bad_row drop")
    data.dropped.append({"file": data.path, "row": number, "reason": reason})


def _tokenize(texts: list[Texts], tokenizer, boundary: str) -> list[Example | str]:
    """An Example for each text, or the reason why there is none."""
    if not texts:
        return []
    prompts = _encode(tokenizer, [t.prompt for t in texts])
    sides = []
    for side in ("chosen", "rejected"):
        responses = [getattr(t, side) for t in texts]
        if responses[0] is None:
            sides.append([None] * len(texts))
        elif boundary == "concat":
            sides.append(tokenizer(responses, add_special_tokens=False).input_ids)
        else:
            wholes = _encode(tokenizer, [t.prompt + r for t, r in zip(texts, responses)])
            sides.append([_after(prompt, whole, tokenizer) for prompt, whole in zip(prompts, wholes)])
    return [_example(*row) for row in zip(texts, prompts, *sides)]


def _example(text: Texts, prompt: list[int], chosen, rejected) -> Example | str:
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(ids, str):
            return f"{name}: {ids}"
    if not prompt:
        return "prompt has no tokens"
    if chosen == rejected:
        return "chosen and rejected are equal in tokens"
    return Example(text.row, prompt, chosen, rejected)


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids with exactly one BOS in front where the tokenizer uses one, and no other special token added."""
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    # A rendered template may have written its BOS as text already.
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    return [[bos, *line] if adds_bos and line[:1] != [bos] else line for line in ids]


def _after(prompt: list[int], whole: list[int], tokenizer) -> list[int] | str:
    """Ids of the response, or what is wrong where the prompt's ids are not a prefix of the whole's."""
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt):]
    at = next(i for i, (a, b) in enumerate(zip(prompt, whole + [None] * len(prompt))) if a != b)
    show = [tokenizer.convert_ids_to_tokens(ids[at : at + 3]) for ids in (prompt, whole)]
    return (f"prompt and response merge in tokens: {show[0]} alone, {show[1]} together; end the prompt elsewhere, or "
            "tokenise them apart with --boundary concat")


def _too_long(example: Example, max_prompt: int | None, limit: int) -> str | None:
    if max_prompt and len(example.prompt) > max_prompt:
        return f"prompt of {len(example.prompt)} tokens, over --max_prompt_length {max_prompt}"
    if example.length > limit:
        return f"{example.length} tokens, over the limit of {limit}"
    return None


def _handle_overlong(data: DataSet, overlong: list[tuple[Example, str]], limit: int, args) -> None:
    if overlong and args.overlong == "error":
        worst = sorted(overlong, key=lambda item: -item[0].length)[:3]
        total = len(data.examples) + len(overlong)
        raise UserError(
            f"{data.path}: {len(overlong)} of {total} rows ({len(overlong) / total:.0%}) are too long; longest: "
            + "; ".join(f"row {e.row}: {reason}" for e, reason in worst)
            + ". Raise --max_length, or use --overlong drop or --overlong truncate")
    for example, reason in overlong:
        cut = None if args.overlong == "drop" else truncate(example, limit, args.max_prompt_length)
        if cut is None:
            data.dropped.append({"file": data.path, "row": example.row, "reason": reason})
            continue
        data.examples.append(cut)
        sides = "both responses" if all(cut.cut) else f"only {'chosen' if cut.cut[0] else 'rejected'}"
        data.notes[f"{sides} cut to fit {limit} tokens"] += 1
    data.examples.sort(key=lambda example: example.row)


def truncate(example: Example, limit: int, max_prompt: int | None = None) -> Example | None:
    """Each response cut at its end to fit `limit` with the whole prompt, never closed again.

    None where no token of a response would be left, where the cut makes both responses equal, or for a long prompt.
    """
    room = limit - len(example.prompt)
    if room < 1 or (max_prompt and len(example.prompt) > max_prompt):
        return None
    chosen, rejected = example.chosen[:room], example.rejected and example.rejected[:room]
    if chosen == rejected:
        return None
    cut = len(example.chosen) > room, len(example.rejected or ()) > room
    return Example(example.row, example.prompt, chosen, rejected, cut)
