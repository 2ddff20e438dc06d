"""`train.py --inspect`: what the model will be trained on, token by token, before any training."""

import dataclasses
import itertools
import sys

from ..core.packing import scored_places
from ..screen import folded
from .tokens import find_row

BINS, HEAD, TAIL = 12, 200, 60


def lenient(args):
    """The same settings, but for rows that would stop a run: they are left out, since one wants to look at all."""
    overlong = "drop" if args.overlong == "error" else args.overlong
    return dataclasses.replace(args, on_bad_row="drop", overlong=overlong)


def inspect(data, tokenizer, limit: int, row: int | None = None, held_out=None) -> str:
    """One row: its answers with the scored tokens in brackets, the ids around the boundary; and the lengths of all.

    `row` is the number of a row in the training file, None takes the first example; `held_out` is the set that was
    drawn from that file, if one was. Raises UserError for a row that is not used.
    """
    pairs = find_row(data, held_out, data.examples[0].row if row is None else row, f"--inspect_row {row}")
    first, count = pairs[0], f", {len(pairs)} pairs" * (len(pairs) > 1)
    weight = f", weight {first.weight:g}" * (first.weight != 1)
    times = sum(example is first for example in data.examples)
    often = f", {times} time{'s' * (times != 1)} in an epoch" * bool(data.mixture)
    note = ["  dropped rows stop a run, but for --on_bad_row drop, --overlong drop or truncate"] * bool(data.dropped)
    parts = [folded(data.report()), *note, f"\nrow {first.row}{count}{weight}{often}; [scored tokens] in brackets"]
    for k, side in enumerate(("chosen", "rejected")):
        answers = {pair.answer_numbers[k]: (getattr(pair, side), pair.cut[k]) for pair in pairs}
        for number, (response, cut) in sorted(answers.items()):
            if response is not None:
                name = f"{side}[{number}]" if len(answers) > 1 else side
                parts += _response(tokenizer, name, first.prompt, response, cut)
    return "\n".join([*parts, "", histogram(data.lengths, limit)])


def _response(tokenizer, name: str, prompt: list[int], response: list[int], cut: bool) -> list[str]:
    places = {*scored_places(response)}
    near = [(i, "") for i in prompt[-5:]] + [(i, "*" * (place in places)) for place, i in enumerate(response[:5])]
    ids = "  ".join(f"{star}{i}:{tokenizer.decode([i])!r}" for i, star in near)
    count, others = len(places), len(response) - len(places)
    return [f"\n--- {name}: {len(prompt)} prompt + {count} scored tokens"
            + f", {others} others between them" * bool(others) + ", cut" * cut,
            tokenizer.decode(prompt) + _stretches(tokenizer, response), f"boundary, scored ids starred: {ids}"]


def _stretches(tokenizer, response: list[int]) -> str:
    """A response whose scored tokens are in brackets, and the others are not."""
    places, text = {*scored_places(response)}, ""
    for scored, stretch in itertools.groupby(range(len(response)), lambda place: place in places):
        ids = [response[place] for place in stretch]
        text += _scored(tokenizer, ids) if scored else tokenizer.decode(ids)
    return text


def _scored(tokenizer, ids: list[int]) -> str:
    """The tokens in brackets; of a long response its beginning and end."""
    hidden = len(ids) - HEAD - TAIL
    if hidden > 0:
        head, tail = _brackets(tokenizer, ids[:HEAD]), _brackets(tokenizer, ids[-TAIL:])
        return f"{head}\n... {hidden} more tokens ...\n{tail}"
    return _brackets(tokenizer, ids)


def _brackets(tokenizer, ids: list[int]) -> str:
    """Each token's text; tokens that hold only part of a character share a bracket."""
    pieces, part = [], []
    for i in ids:
        part.append(i)
        text = tokenizer.decode(part)
        if not text.endswith("\ufffd") or len(part) == 4:  # no character has more than four bytes
            pieces.append(text)
            part = []
    return "".join(f"[{piece}]" for piece in pieces + [tokenizer.decode(part)] * bool(part))


def histogram(lengths: list[int], limit: int) -> str:
    """Text bars of sequence lengths in tokens, before any cut, with the share over the limit."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // BINS))
    counts = [0] * ((high - low) // width + 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    lines = [f"{low + i * width:>7}-{low + (i + 1) * width - 1:<7}{'#' * round(50 * c / max(counts)):<51}{c}"
             for i, c in enumerate(counts)]
    over = sum(length > limit for length in lengths) / len(lengths)
    bound = "no limit" if limit == sys.maxsize else f"{over:.1%} over the limit of {limit}"
    return "\n".join([f"prompt + longest response, tokens, before any cut ({bound})", *lines])
