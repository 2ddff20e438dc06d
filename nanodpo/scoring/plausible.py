"""Which tokens the starting checkpoint found plausible, place by place: kept on disk, so later checkpoints can be asked
how much probability they give to all the others."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError, first_line

Sets = tuple[Tensor, Tensor]  # (N,) how many tokens a place has, and their ids, one place after the other
NAME = "plausible.safetensors"


def split(sets: Sets, lengths: list[int]) -> list[Sets]:
    """The sets of a row -> those of each of its groups, of so many scored tokens, on CPU."""
    counts = sets[0].cpu().to(torch.int32).split(lengths)
    ids = sets[1].cpu().to(torch.int32).split([int(part.sum()) for part in counts])
    return [(c.clone(), i.clone()) for c, i in zip(counts, ids)]  # a view would take the whole along to other ranks


def join(parts: list[Sets], device: torch.device) -> Sets:
    """The sets of several groups, one after the other."""
    return tuple(torch.cat(side).long().to(device) for side in zip(*parts))


def write(folder: Path, parts: list[Sets]) -> None:
    counts, ids = (torch.cat(side) for side in zip(*parts))
    save_file({"counts": counts, "ids": ids}, folder / NAME)


def read(folder: Path, lengths: list[int]) -> list[Sets]:
    """What `write` wrote, for groups of so many scored tokens. Raises UserError for a damaged file."""
    try:
        sets = load_file(folder / NAME)
        return split((sets["counts"], sets["ids"]), lengths)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder / NAME}: is damaged ({first_line(error)}); remove {folder}") from error
