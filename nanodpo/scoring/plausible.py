"""Keeps on disk the tokens that the starting checkpoint found plausible, place by place, and their probabilities, so
that later checkpoints can be compared with it (measures.py)."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import UserError, first_line
from ..files import why
from .measures import Sets

PARTS = ("counts", "rest", "ids", "probabilities")
NAME = "plausible.safetensors"


def split(sets: Sets, lengths: list[int]) -> list[Sets]:
    """The sets of a batch -> those of each of its responses, of so many tokens, on CPU."""
    counts, rest, ids, before = (side.cpu() for side in sets)
    counts = counts.to(torch.int32).split(lengths)
    sizes = [int(part.sum()) for part in counts]
    parts = zip(counts, rest.split(lengths), ids.to(torch.int32).split(sizes), before.split(sizes))
    return [tuple(side.clone() for side in part) for part in parts]  # a view would take the whole along to other ranks


def part_of(sets: Sets | None, parallel) -> Sets | None:
    """The sets of a batch -> those of this rank's tokens of it, where ranks share it. `parallel`: a OneRank."""
    if sets is None or parallel.size == 1:
        return sets
    counts, rest, *lists = sets
    entries = parallel.entries(counts)
    return counts[parallel.places], rest[parallel.places], *(side[entries] for side in lists)


def gathered(sets: Sets, parallel) -> Sets:
    """The sets of this rank's tokens -> those of the batch, on all ranks that share it."""
    if parallel.size == 1:
        return sets
    counts, rest = (parallel.gather(side) for side in sets[:2])
    entries, size = parallel.entries(counts), int(counts.sum())
    return counts, rest, *(parallel.gather(side, entries, size) for side in sets[2:])


def join(sets: dict[tuple[int, str], Sets], keys: list[tuple[int, str]], device: torch.device) -> Sets:
    """The sets of several responses, (row, kind) each, one after the other. Raises UserError where one is not there."""
    if lost := [key for key in keys if key not in sets]:
        raise UserError(f"row {lost[0][0]}, {lost[0][1]}: nothing is left of what step 0 found plausible there; score "
                        f"step 0 with --responses {lost[0][1]} first")
    counts, rest, ids, before = (torch.cat(side).to(device) for side in zip(*(sets[key] for key in keys)))
    return counts.long(), rest, ids.long(), before


def write(folder: Path, parts: list[Sets]) -> None:
    save_file({name: torch.cat(side) for name, side in zip(PARTS, zip(*parts))}, folder / NAME)


def read(folder: Path, lengths: list[int]) -> list[Sets]:
    """Reads a file of `write`, for responses of so many tokens. Raises UserError for another file."""
    try:
        sets = load_file(folder / NAME)
        return split(tuple(sets[name] for name in PARTS), lengths)
    except OSError as error:
        raise UserError(f"{folder / NAME}: can't be read ({why(error)})") from error
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder / NAME}: is damaged ({first_line(error)}); remove {folder}") from error
