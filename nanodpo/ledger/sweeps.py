"""Two passes through a run. Forwards: each step's gradient, and so AdamW's moments. Backwards: what each pair's parts
of these gradients made of the probes' change.

What is done is kept in a folder, so that a ledger that was stopped goes on. Shapes as in adamw.py.
"""

import dataclasses
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError, first_line
from ..files import check_regular, why
from ..folder.atomic import new_file, tensors_hash, writing
from ..progress import track
from .adamw import Adjoint, Moments, lacking
from .history import History
from .probes import Probes

DECAY = 2  # the side of a line that is weight decay's; 0 and 1 are chosen and rejected
KEEP_EVERY = 30  # seconds, of the backward pass
COLUMNS = ("step", "index", "side", "share", "effect")


class Store:
    """The folder in which the passes keep what is done. Raises RunStopped where the disk won't take it."""

    def __init__(self, folder: Path):
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, *keys: str) -> dict[str, Tensor] | None:
        """The tensors kept under this name, or these of them; None where there are none. Raises UserError for a damaged
        file."""
        file = self.folder / f"{name}.safetensors"
        try:
            check_regular(file)  # a pipe would be waited for
            with safe_open(file, "pt") as opened:
                found, hashes = {key: opened.get_tensor(key) for key in keys or opened.keys()}, opened.metadata() or {}
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{file}: can't be read ({why(error)})") from error
        except SafetensorError as error:
            raise UserError(f"{file}: is damaged ({first_line(error)}); remove {self.folder}") from error
        if any(hashes.get(key) != self._hash(name, key, tensor) for key, tensor in found.items()):
            raise UserError(f"{file}: is damaged (not what was written); remove {self.folder}")
        return found

    def _hash(self, name: str, key: str, tensor: Tensor) -> str:
        """Each tensor has its own: some are read alone."""
        return tensors_hash(f"{self.folder.name} {name}", {key: tensor})

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        with writing(self.folder), new_file(self.folder / f"{name}.safetensors") as place:
            here = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            save_file(here, place, {key: self._hash(name, key, tensor) for key, tensor in here.items()})

    def moments(self, step: int, like: Tensor) -> Moments:
        """After this step; before the first update all are 0. A step that made no update has those before it."""
        if step < 0:
            return Moments(torch.zeros_like(like), torch.zeros_like(like))
        found = self.read(f"step-{step}")
        if found is None:
            return self.moments(step - 1, like)
        return Moments(found["m"].to(like), found["v"].to(like), int(found["t"]))

    def norm(self, step: int) -> float:
        """Of the step's gradient before clipping."""
        return self.read(f"step-{step}", "norm")["norm"].item()


def references(history: History, store: Store) -> None:
    """Gives the history its reference's log-probs, where its loss takes them, and keeps them."""
    if history.reference is None:
        return
    if kept := store.read("reference"):
        history.ref = kept["ref"]
        return
    history.ref = history.reference_logps()
    store.write("reference", {"ref": history.ref})


def forward(history: History, store: Store) -> None:
    """Keeps the moments after each step that made an update, and the norm of its gradient."""
    steps = [step for step in range(history.steps) if step not in history.skipped]
    left = [step for step in steps if store.read(f"step-{step}", "norm") is None]
    moments = None
    for step in track(left, "gradients", "step"):
        history.open(step)
        grad = history.step_gradient(step)
        norm = grad.double().norm().item()  # as training sums it: millions of squares
        moments = moments or store.moments(step - 1, grad)
        moments = moments.after(grad * history.adam.clip_factor(norm), history.adam)
        store.write(f"step-{step}", {"m": moments.m, "v": moments.v, "t": torch.tensor(moments.t),
                                     "norm": torch.tensor(norm, dtype=torch.float64)})


@dataclasses.dataclass
class Found:
    """The results of the pass backwards through the steps, for M probes."""

    levels: Tensor  # (K + 1, M): their values at every step, nats a token
    predicted: Tensor  # (K, M): how far each step moved them by the trapezoid rule
    lines: dict[str, Tensor]  # step, index (of an example; -1 for weight decay), side: (L,); share, effect: (L, M)
    rebuilt: Tensor  # (K,): |update - its reconstruction| / |update|, beyond rounding; NaN where none was made


def backward(history: History, probes: Probes, store: Store, name: str) -> Found:
    """Shares and effects of all pairs, from the last step to the first. `name`: under which it keeps what is done."""
    kept = store.read(name)
    history.open(history.steps)
    if kept is None:
        level, end = history.probe_gradients(probes)
        levels = torch.full((history.steps + 1, len(probes.names)), torch.nan, dtype=torch.float64)
        levels[-1] = level
        kept = {"next": end, "after": history.weights(), "end": end, "levels": levels,
                "at": torch.tensor(history.steps), "predicted": torch.full_like(levels[1:], torch.nan),
                "rebuilt": torch.full((history.steps,), torch.nan, dtype=torch.float64)}
    device = history.opened.device
    state = {key: value.to(device) for key, value in kept.items()}
    adjoint = Adjoint(history.adam, state["end"], state if "q" in state else None)
    lines = [{key: kept[key] for key in COLUMNS}] if "share" in kept else []
    del kept  # each tensor of a probe may take gigabytes: making.VECTORS
    last = time.monotonic()
    for step in track(range(int(state["at"]) - 1, -1, -1), "ledger", "step"):
        history.open(step)
        state["levels"][step], here = history.probe_gradients(probes)
        weights, path = history.weights(), (here + state.pop("next")).div_(2)
        state["predicted"][step] = path @ (state["after"] - weights)
        if step not in history.skipped:
            lines.append(_step(history, store, adjoint, step, path, state, weights))
        del path
        state |= {"next": here, "after": weights, "at": torch.tensor(step)}
        if lines and (time.monotonic() - last > KEEP_EVERY or step == 0):
            lines = [{key: torch.cat([part[key] for part in lines]) for key in COLUMNS}]
            store.write(name, state | adjoint.state() | lines[0])
            last = time.monotonic()
    return Found(state["levels"].cpu(), state["predicted"].cpu(), lines[0], state["rebuilt"].cpu())


def _step(history: History, store: Store, adjoint: Adjoint, step: int, path: Tensor, state: dict[str, Tensor],
          weights: Tensor) -> dict[str, Tensor]:
    """The lines of one step: of each pair's two sides, and of weight decay, where there is any."""
    adam, rate = history.adam, history.rate(step)
    now, before = store.moments(step, weights), store.moments(step - 1, weights)
    decayed = history.decayed()
    # AdamW rounds the sum of weight and update; with decay 1 - rate decay and its product with the weight, too.
    roundings = 3 if adam.decay else 1
    state["rebuilt"][step] = lacking(weights, state["after"], now.update(rate, adam, decayed), roundings)
    adjoint.back(path, rate, now)
    clip = adam.clip_factor(store.norm(step))
    heavier = adjoint.heavier((now.m - adam.beta1 * before.m) / (1 - adam.beta1), clip)
    found = [(step, k, side, adjoint.share(part * clip), heavier @ (part * clip))
             for k, side, part in history.pair_gradients(step)]
    if adam.decay:
        shrunk = path @ (-rate * adam.decay * decayed)
        found.append((step, -1, DECAY, shrunk, torch.full_like(shrunk, torch.nan)))
    columns = dict(zip(COLUMNS, zip(*found)))
    return {key: torch.stack(values).double().cpu() if key in ("share", "effect") else torch.tensor(values)
            for key, values in columns.items()}
