"""Reference log-probs: computed once, before the first step, for the pairs that the run will visit, and kept on disk.

The file is named by a fingerprint of everything that could change a number in it. Another fingerprint is another file,
so a stale cache is never read; the run says so where the newest one is of other weights, data or versions.
"""

import array
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.example import row_starts
from ..errors import Preempted, RunStopped, UserError, first_line
from ..files import check_regular
from ..progress import Progress
from ..ranks.distributed import ask, from_main, is_main, main_first, say, sum_over_ranks
from .atomic import clear_abandoned, new_file

SAVE_SECONDS = 60
STALE = ("weights", "data", "versions")  # may change while the names and settings stay


def data_hash(examples) -> str:
    """A hash of the token ids of all examples, in order, and of their weights where these are not all 1: data,
    tokenizer, template and limits in one."""
    weights = [example.weight for example in examples]
    if {*weights} <= {1.0}:
        return token_hash(examples)
    return hashlib.sha256(token_hash(examples).encode() + array.array("d", weights).tobytes()).hexdigest()


def token_hash(examples) -> str:
    """A hash of the token ids of all examples, in order, and of where rows begin where one is several pairs. Log-probs
    of a model follow from these, whatever the weights."""
    digest = hashlib.sha256()
    for example in examples:
        prompt, chosen, rejected = example.compact()
        places = () if chosen.scored is None else (chosen.scored,)  # of the tokens that count, where not all do
        for ids in (prompt.ids, chosen.ids, rejected.ids if rejected else (), *places):
            digest.update(np.int64(len(ids)).tobytes())
            digest.update(np.asarray(ids, np.int64))  # a list of them takes eight times as long
    if starts := row_starts(examples):
        digest.update(array.array("q", starts).tobytes())
    return digest.hexdigest()


def reference_logps(examples, steps, micro_batches_of, score, fingerprint: dict, cache_dir: str, device,
                    check) -> Tensor:
    """(n, 2) float64 on CPU: the reference's summed log-probs of chosen and rejected; NaN for pairs not visited.

    `steps` are lists of indices, the same on every rank; `micro_batches_of` gives this rank's micro-batches of one,
    (indices, factor) each, as many on every rank; `score` maps indices to (P, 2) log-probs, nats. The cache is written
    every SAVE_SECONDS, so a pass that was killed goes on from there, and also before Preempted is passed on, which
    `check` raises where the run was told to stop. Raises UserError for a cache that can't be read, and RunStopped for a
    log-prob that is not finite.
    """
    key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    file, logps = Path(cache_dir) / f"reference-{key[:24]}.safetensors", None
    with main_first():
        if is_main():
            clear_abandoned(file.with_name("*.safetensors"))
            logps = _load(file, fingerprint, len(examples))
    logps = from_main(logps)
    missing = [pairs for pairs in steps if logps[pairs].isnan().any()]
    with Progress("reference", len(missing), "step") as bar:
        done, stopped = 0, None
        while done < len(missing) and not stopped:
            count, stopped = _fill(logps, missing[done:], micro_batches_of, score, device, bar, check)
            done += count
            with main_first():
                if is_main():
                    _save(file, logps, fingerprint)
    if stopped:
        raise stopped
    total, new = (len({i for pairs in lists for i in pairs}) for lists in (steps, missing))
    say(f"reference: {new} pairs computed, {total - new} from the cache\n  {file}")
    return logps


def _fill(logps: Tensor, steps, micro_batches_of, score, device, bar, check) -> tuple[int, Preempted | None]:
    """Computes the pairs of the first of these steps on all ranks, as many as SAVE_SECONDS allow by rank 0's clock, and
    writes them into `logps`. Returns how many steps, and what `check` raised, if it did."""
    sums, counts = torch.zeros_like(logps), torch.zeros(len(logps), 1, dtype=torch.float64)
    began, done, late, stopped = time.monotonic(), 0, lambda: False, None
    while done < len(steps) and not late():
        try:
            check()
        except Preempted as told:
            stopped = told
            break
        for indices, factor in micro_batches_of(steps[done]):
            sums[indices] += factor * score(indices).cpu()
            counts[indices] += factor
        done += 1
        late = ask(is_main() and time.monotonic() - began >= SAVE_SECONDS)
        bar.update()
    pairs = torch.tensor(sorted({i for step in steps[:done] for i in step}), dtype=torch.long)
    sums, counts = (sum_over_ranks(part[pairs].to(device)).cpu() for part in (sums, counts))
    logps[pairs] = torch.where(counts > 0, sums / counts, logps[pairs])
    computed = (counts > 0).flatten()
    if bad := (~logps[pairs][computed].isfinite().all(1)).sum().item():
        raise RunStopped(f"{bad} pair{'s have' if bad > 1 else ' has'} a reference log-prob that is not finite: the "
                         "weights of the reference are broken")
    return done, stopped


def _load(file: Path, fingerprint: dict, n: int) -> Tensor:
    """The cached log-probs, (n, 2), NaN for pairs that the cache lacks. Says why, where there is a cache and it can't
    be used. Raises UserError where the file can't be read."""
    try:
        check_regular(file)  # a pipe would be waited for
        with safe_open(file, "pt") as cache:
            logps, about = cache.get_tensor("logps"), cache.metadata() or {}
        # Another cache under this name, as a copy, has all bits that were written.
        of_this = about.get("fingerprint") == json.dumps(fingerprint)
        if of_this and logps.shape == (n, 2) and about.get("sha256") == _digest(logps):
            return logps
        say(f"reference: {file} is damaged (not what was written), computing it again")
    except (FileNotFoundError, NotADirectoryError):
        if changed := _changed(file.parent, fingerprint):
            say(f"reference: the cached one is of other {' and '.join(changed)}, computing it again")
    except SafetensorError as error:
        say(f"reference: {file} is damaged ({first_line(error)}), computing it again")
    except OSError as error:
        raise UserError(f"--cache_dir: {file}: can't be read ({first_line(error)}); remove it, or name another folder"
                        ) from error
    return torch.full((n, 2), torch.nan, dtype=torch.float64)


def _changed(folder: Path, fingerprint: dict) -> list[str]:
    """Those of STALE that differ from the newest cache of this model's name, this data file and these settings; empty
    where there is no such cache: one of other settings belongs to another run."""
    files = [file for file in folder.glob("reference-*.safetensors") if file.is_file()]
    for file in sorted(files, key=os.path.getmtime, reverse=True):
        try:
            with safe_open(file, "pt") as cache:
                other = json.loads(cache.metadata()["fingerprint"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):  # damaged, or somebody else's
            continue
        changed = [key for key in fingerprint if other.get(key) != fingerprint[key]]
        if {*changed} <= {*STALE}:
            return changed
    return []


def _digest(logps: Tensor) -> str:
    return hashlib.sha256(logps.numpy().tobytes()).hexdigest()


def _save(file: Path, logps: Tensor, fingerprint: dict) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file, shared=True) as place:  # other runs may fill the same cache
            save_file({"logps": logps}, place, {"fingerprint": json.dumps(fingerprint), "sha256": _digest(logps)})
    except (OSError, SafetensorError) as error:
        raise RunStopped(f"{file}: can't be written ({first_line(error)})") from error
