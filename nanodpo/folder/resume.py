"""States to resume from: a run that goes on from one computes, bit for bit, what it would have computed uninterrupted.

    <run>/resume/step-<k>/rank<r>.safetensors    what rank r has of the float32 weights and of AdamW's moments, its
                                                 random numbers
    <run>/resume/step-<k>/manifest.json          sizes, hashes, the step, the counters, the run it belongs to, and how
                                                 many ranks wrote it

Every rank writes its own file, without pickles; without ZeRO, where all have the same weights and moments, these are in
the first rank's alone. The two newest states are kept, so that one may be damaged; all of them with --keep_states, for
fork.py. To the state of step k belong the lines of metrics.jsonl before step k, of which its manifest has a hash.

ZeRO cuts a parameter wherever a rank's share ends. So a file has parts of parameters, flat: "exp_avg/<name>/1024" is
a moment of the parameter <name> from its element 1024 on, as far as it goes. Whoever goes on reads the elements that it
is to have, from whichever files have them, and no others. With another number of ranks sums over them are rounded
differently: the run is then the same as far as arithmetic allows. So it is with another ZeRO stage.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import RankStopped, RunStopped, UserError
from ..files import read_text
from ..ranks.distributed import gather_or_raise, is_main, main_first, say
from . import atomic
from .log import MAX_BYTES, Log, LogHash, is_evaluation, read_lines, trained_steps
from .state import COUNTERS

KEEP = 2
FOREIGN = "was written by another run"
LOST = "metrics.jsonl lacks step"
OTHER = "was written by another version of nanodpo, with which (run.json: git_commit) the run can go on"
MENDS = {LOST: "put metrics.jsonl back as it was, or ", OTHER: "go on with that version, or "}
LAYOUT = "by name"  # of the tensors in the files; before, a file had the shards of its rank by number


def begin(run: Path, steps: int, wanted: int | None, owners: list[str], first: int = 0) -> tuple[dict, set[int]]:
    """(facts of the state to go on from, steps with an evaluation); cuts the run's folder back to it. On one rank.

    The facts have the step: 0 where the run was stopped before its first state, and `steps` where training is done and
    only the run's end is missing, which needs no state. `wanted`: the step that the user asked for; `owners`: the
    fingerprints of the run, and of that which it is a fork of; `first`: the step that it began with. Raises UserError
    where the run can't go on.
    """
    lines = read_lines(run)
    if (wanted is None and sum(0 <= step < steps for step in trained_steps(lines)) == steps
            and isinstance(atomic.read_manifest(run / f"checkpoint-{steps}"), dict)):
        facts = {"step": steps, "complete": True}  # the last thing that training writes
    else:
        facts = find(run, lines, owners, wanted, first) or {"step": 0}
    if facts.get("log", (now := LogHash(lambda: lines).before(facts["step"]))) != now:
        say(f"resume: {run / 'metrics.jsonl'}: lines before step {facts['step']} are not as the run wrote them; they "
            "stay as they are")
    strangers = {k: stranger(atomic.read_facts(run / f"checkpoint-{k}"), k, owners) for k in atomic.saved_steps(run)}
    # What is made again takes the place of these.
    if anew := [k for k, words in strangers.items() if words and not 0 < k < facts["step"]]:
        raise UserError(f"{run / f'checkpoint-{anew[0]}'}: {strangers[anew[0]]}; move it elsewhere, and the same "
                        "command goes on")
    evaluated = go_back(run, lines, facts["step"])
    # Checkpoint 0 and the one of this step are made again where they are damaged.
    for k in [k for k in atomic.saved_steps(run) if 0 < k < facts["step"]]:
        damage = atomic.read_manifest(place := run / f"checkpoint-{k}")
        if words := damage if isinstance(damage, str) else strangers[k]:
            say(f"resume: {place}: {words}; only a run into a new --output_dir would make it again")
    return facts, evaluated


def stranger(facts: dict, step: int, owners: list[str] | None = None) -> str | None:
    """Words where the facts in a checkpoint's manifest say that it is of another step than its name, or of a run that
    is none of `owners`, if these are known: somebody renamed or copied it. Else None."""
    if (its := facts.get("step", step)) != step:
        return f"is a copy of checkpoint-{its}, by its manifest.json"
    return FOREIGN if owners and facts.get("run", owners[0]) not in owners else None


def folder_of(run: Path, step: int) -> Path:
    return run / "resume" / f"step-{step}"


def steps_in(run: Path) -> list[int]:
    """The steps of a run's states, the newest first."""
    return atomic.saved_steps(run / "resume", "step")


def save(run: Path, step: int, tensors: dict[str, Tensor], facts: dict, rank: int, keep: bool = False,
         log: LogHash | None = None) -> None:
    """Writes resume/step-<step>, all ranks together. Raises RunStopped on all of them where one can't write.

    The state gets its name last, when every rank has read its file back and rank 0 has seen them all. `facts` go into
    the manifest. `keep`: older states stay. `log`: rank 0's hash of the run's log so far, made anew where None.
    """
    folder, place = folder_of(run, step), atomic.aside(folder_of(run, step))
    file, error, written = place / f"rank{rank}.safetensors", None, None
    with main_first():
        if is_main():
            atomic.clear(place)
            with atomic.writing(folder):
                place.parent.mkdir(exist_ok=True)  # in the run's folder, which must be there still
                place.mkdir()
    try:
        with atomic.writing(folder):
            written = _write(file, tensors)
    except RunStopped as caught:
        error = caught
    try:
        everyone = gather_or_raise(error, written)
        with main_first():
            if is_main():
                names = {f"rank{i}.safetensors": written for i, written in enumerate(everyone)}
                if unseen := [name for name in names if not (place / name).is_file()]:
                    raise UserError(f"{run}: {unseen[0]} was written, but can't be seen by rank 0; --output_dir must "
                                    "be a folder that all machines share")
                with atomic.writing(folder):
                    if (run / "metrics.jsonl").exists():
                        atomic.flush(run / "metrics.jsonl")
                    before = (log or LogHash(Log(run).new_lines)).before(step)
                    atomic.publish(folder, {"step": step, "tensors": LAYOUT, "log": before, **facts}, names)
                if not keep:
                    for old in [s for s in steps_in(run) if s < step][KEEP - 1 :]:
                        atomic.remove(folder_of(run, old))
    finally:
        if is_main():
            atomic.clear(place)


def _write(file: Path, tensors: dict[str, Tensor]) -> dict:
    """Writes a file and reads it back; its `file_facts`."""
    save_file(tensors, file)
    atomic.flush(file)
    for name, tensor in load_file(file).items():
        if not torch.equal(tensor, tensors[name]) or not tensor.isfinite().all():
            raise RankStopped(f"{file}: {name} is not finite, or not as it is in memory")
    return atomic.file_facts(file)


def find(run: Path, lines: list[tuple[str, dict]], owners: list[str], wanted: int | None = None,
         first: int = 0) -> dict | None:
    """The facts of the newest state that is whole and has all its lines in metrics.jsonl, or of the step `wanted`.
    `lines`: from log.read_lines; `owners`: as for `begin`. On one rank.

    None where the run was stopped before its first state; a run that began with a step `first` above 0 always has one.
    Says which states it passes over, and why. Raises UserError where none is left: starting again from step 0 would
    throw away the work of the run.
    """
    steps, passed = steps_in(run) if wanted is None else [wanted], {}
    for step in steps:
        facts = state(run, step, lines, owners)
        if isinstance(facts, dict):
            return facts
        passed.setdefault(facts, []).append(f"step-{step}")
        say(f"resume: passing over {folder_of(run, step)}: {facts}")
    done = [step for step in atomic.saved_steps(run) if step > 0]
    if passed or done or first:
        there = f"checkpoint-{done[0]} is there" if done else f"it is a fork at step {first}"
        broken = "; ".join(f"{', '.join(names)}: {why}" for why, names in passed.items())
        broken = broken or f"there is none, but {there}"
        kinds = {LOST if LOST in why else why for why in passed}
        mend = MENDS.get(kinds.pop(), "") if len(kinds) == 1 else ""
        raise UserError(f"{run}: no state to go on from ({broken}); {mend}train again into a new --output_dir")
    return None


def state(run: Path, step: int, lines: list[tuple[str, dict]], owners: list[str]) -> dict | str:
    """The facts of a state; words where it is not whole or another run's, or metrics.jsonl, whose `lines` these are,
    lacks one before it. On one rank."""
    facts = atomic.read_manifest(folder_of(run, step))
    if isinstance(facts, str):
        return facts
    if facts.get("tensors") != LAYOUT:
        return OTHER
    if facts.get("run") not in owners:
        return FOREIGN
    if any(type(facts.get(name)) is not int for name in ("tokens", "skipped", *COUNTERS)):
        return "manifest.json is damaged"
    if len(facts["files"]) != facts.get("world_size"):
        return f"no rank{len(facts['files'])}.safetensors, of {facts.get('world_size')} ranks"
    written = trained_steps(lines)
    lost = next((k for k in range(step) if k not in written), None)
    if lost is not None:
        return f"{LOST} {lost}"
    return facts if facts.get("step") == step else "misnamed"


def load(run: Path, facts: dict, rank: int) -> tuple[Callable[[str, str, int, int], Tensor], dict[str, Tensor]]:
    """(`read`, the random numbers of this rank: none where the state is of fewer ranks). `facts`: those of the state.

    read(kind, name, start, size) gives elements start .. start + size of a parameter's "weight", or of a moment, flat
    and on CPU. Raises RankStopped where the files lack some.
    """
    folder, found, random = folder_of(run, facts["step"]), {}, {}
    for file in facts["files"]:
        opened = safe_open(folder / file, "pt")
        for key in opened.keys():
            if key.startswith("random."):
                random |= {key: opened.get_tensor(key)} if file == f"rank{rank}.safetensors" else {}
            else:
                what, _, first = key.rpartition("/")
                found.setdefault(what, {})[int(first)] = opened.get_slice(key)

    def read(kind: str, name: str, start: int, size: int) -> Tensor:
        pieces, end = [], start
        for first, piece in sorted(found.get(f"{kind}/{name}", {}).items()):
            last = first + piece.get_shape()[0]
            if first <= end < min(last, start + size):
                pieces.append(piece[end - first : min(last, start + size) - first])
                end += len(pieces[-1])
        if end < start + size:
            raise RankStopped(f"{folder}: has no {kind} of {name}, or not all of it; was it written by a version of "
                              "transformers or PEFT with other names?")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return read, random


def go_back(run: Path, lines: list[tuple[str, dict]], step: int) -> set[int]:
    """Removes from the run's folder the lines, states and checkpoints after step `step`: they are computed again, to
    the same numbers. `lines`: those of metrics.jsonl. Returns the steps whose evaluation is there.
    """
    metrics = run / "metrics.jsonl"
    kept = [(text, line) for text, line in lines
            if line["step"] < step or (is_evaluation(line) and line["step"] == step)]
    if metrics.exists() and read_text(metrics, MAX_BYTES, "replace") != "".join(text for text, _ in kept):
        with atomic.writing(metrics), atomic.new_file(metrics) as place:
            place.write_text("".join(text for text, _ in kept), encoding="utf-8")
    for folder, prefix in ((run / "resume", "step"), (run, "checkpoint")):
        for later in [s for s in atomic.saved_steps(folder, prefix) if s > step]:
            atomic.remove(folder / f"{prefix}-{later}")
    return {line["step"] for _, line in kept if is_evaluation(line)}
