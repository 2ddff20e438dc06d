"""Makes a run's ledger: what it costs, the passes, the files."""

import json
import shutil
from pathlib import Path

import pandas
import torch

from ..errors import UserError
from ..folder.atomic import nearest, new_file, remove, writing
from ..ranks import gpu
from ..ranks.distributed import rank_and_world, say
from ..scoring.contents import hash_of
from ..scoring.datasets import ResponseSet
from ..scoring.parts import FORMAT
from ..scoring.runs import Checkpoint
from . import report, texts
from .history import History, open_history
from .probes import Probes, make_probes
from .sweeps import Found, Store, backward, forward, references

VECTORS = 7  # as large as the trained weights, that the backward pass holds for each probe


def make_ledger(checkpoints: list[Checkpoint], datasets: list[ResponseSet], args, device: torch.device,
                folder: Path) -> list[str]:
    """Writes ledger.parquet and ledger.json into `folder`; returns the lines that say what is in them. `args`: those of
    score.py. Raises UserError, also where the memory or the disk would be too small."""
    if rank_and_world()[1] > 1:
        raise UserError("--ledger: works on one rank; start it with plain python")
    probes = make_probes(datasets, args.responses, args.ledger, args.ledger_rows, args.max_tokens)
    longest = max(len(prompt) + len(ids) for _, groups, _ in probes.batches for prompt, (ids,) in groups)
    history = open_history(checkpoints, device, longest, args.trust_remote_code, args.gradient_checkpointing)
    if device.type == "cuda" and history.args.deterministic:
        gpu.be_deterministic()  # as in training, whose gradients are made again
    keys = [c.key for c in history.checkpoints] + [c.key for c in [history.reference] if c]
    store = Store(folder / f"ledger-{hash_of([FORMAT, keys, history.planned])[:16]}.partial")
    for place in sorted({*folder.glob("ledger-*.partial")} - {store.folder}):
        say(f"{place}: is of another run or another version, and not used; it can be removed")
    at_once = check_cost(history, probes, args.ledger_memory, store.folder)
    references(history, store)
    forward(history, store)
    found = []
    for first in range(0, len(probes.names), at_once):
        part = probes.only(first, first + at_once)
        content = [part.names, [(m, groups, weights.tolist()) for m, groups, weights in part.batches]]
        found.append((part, backward(history, part, store, f"probes-{hash_of(content)[:16]}")))
    return write(history, found, store, folder)


def check_cost(history: History, probes: Probes, memory: float, place: Path) -> int:
    """Says what the ledger will take; returns how many probes `memory`, in GiB, has room for at one time. Raises
    UserError where there is none, or the disk is too small."""
    history.open(0)
    size = sum(p.numel() * p.element_size() for p in history.trained)
    responses = sum(len(groups) for _, groups, _ in probes.batches)
    at_once = min(len(probes.names), int(memory * 2**30 / (VECTORS * size)))
    if at_once < 1:
        raise UserError(f"--ledger_memory {memory:g}: a probe takes {VECTORS * size / 2**30:.2f} GiB of the trained "
                        "weights' size; give more")
    passes = -(-len(probes.names) // at_once)
    pairs = sum(len(history.pairs(step)) for step in range(history.steps))
    disk = 2 * size * history.steps
    if disk > (free := shutil.disk_usage(nearest(place)).free):
        raise UserError(f"--ledger: keeps {disk / 2**30:.1f} GiB in {place} until it is done, and {free / 2**30:.1f} "
                        "GiB are free; name another --output_dir")
    say(f"ledger: {history.steps} steps, {pairs} pairs, {size // history.trained[0].element_size():,} trained weights, "
        f"probes: {len(probes.names)}, responses in them: {responses}; takes {pairs * (1 + passes):,} passes over a "
        f"pair and {responses * (history.steps + 1):,} over a response, {VECTORS * at_once * size / 2**20:,.0f} MiB "
        f"of memory beside the model, and {disk / 2**20:,.0f} MiB of disk until it is done")
    return at_once


def write(history: History, found: list[tuple[Probes, Found]], store: Store, folder: Path) -> list[str]:
    """The files; returns the lines for the screen."""
    table = pandas.concat([report.to_table(history, part.names, its) for part, its in found], ignore_index=True)
    records = [record for part, its in found for record in report.to_record(history, part.names, its)]
    texts.add_texts(records, table, history.args)
    with writing(folder):
        with new_file(folder / "ledger.parquet") as place:
            table.to_parquet(place, index=False)
        with new_file(folder / "ledger.json") as place:
            place.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    norms = {step: store.norm(step) for step in range(history.steps) if step not in history.skipped}
    lines = [report.rebuilt_line(history, norms, found[0][1].rebuilt), *map(report.sentence, records),
             *report.worst_pairs(table), f"done: {folder / 'ledger.parquet'}"]
    remove(store.folder)
    return lines
