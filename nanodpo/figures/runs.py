"""Reads what figures need of a run.json: how a run was trained, what it began from, and its noise."""

import dataclasses
import math
import os
import re
from pathlib import Path

from ..core.losses import LOSSES, needs_reference
from ..errors import UserError
from ..files import read_json
from ..flags.loss import loss_name
from ..folder.elastic import pairs_per_step
from ..folder.same_run import forks_of, later_forks
from ..run.noise import of_record
from .axes import listed
from .noise import Noise

OF_LOSS = {"--loss", "--label_smoothing", "--sft_weight", "--loss_kwargs", "loss_function"}  # what makes its kind
WEIGHTS = re.compile(r"checkpoint-\d+|merged")  # the folders in a run's folder that another run can begin from


@dataclasses.dataclass
class Facts:
    """Holds what a run.json says. Fields that it lacks are empty: a folder of metrics.jsonl alone can be drawn."""

    loss: str = ""
    smoothing: float = 0.0
    beta: float | None = None
    model: str = ""
    sft_weight: float = 0.0
    kwargs: str | None = None  # of --loss_kwargs
    noise: Noise = dataclasses.field(default_factory=Noise)
    pairs: int = 1  # of a step
    forks: tuple[int, ...] = ()  # the steps at which it, or the run that it was forked from, was forked from another
    loss_since: int = 0  # the step before which it had a loss of another kind, as a fork may

    @property
    def without_reference(self) -> bool:
        """Whether the loss is known to take no reference, so that rewards are those of log-probs themselves."""
        return self.loss in LOSSES and not needs_reference(LOSSES[self.loss])

    @property
    def kind(self) -> str:
        """Names the loss: numbers of two kinds are different quantities."""
        more = {"label smoothing": self.smoothing, "SFT weight": self.sft_weight}
        words = [self.loss.upper(), *(f"{name} {value:g}" for name, value in more.items() if value), self.kwargs or ""]
        return ", ".join(filter(None, words)) if self.loss else ""


def read_facts(folder: Path) -> Facts:
    """Of a run's folder. Raises UserError where run.json can't be read, or is not what train.py writes."""
    file = folder / "run.json"
    if not file.exists():
        return Facts()
    record = read_json(file)
    given = record.get("arguments", {}) if isinstance(record, dict) else None
    if not isinstance(given, dict):
        raise UserError(f"{file}: is not what train.py writes; arguments must be an object")
    facts = Facts(given.get("loss", ""), given.get("label_smoothing", 0.0), given.get("beta"),
                  given.get("model_name", ""), given.get("sft_weight", 0.0), given.get("loss_kwargs"),
                  Noise(of_record(record, file)), _pairs(given, record.get("world_size", 1)))
    facts.forks, facts.loss_since = _forks(record.get("fork"), file)
    numbers = {"label_smoothing": facts.smoothing, "beta": facts.beta or 0.0, "sft_weight": facts.sft_weight}
    wrong = [name for name, value in numbers.items() if type(value) not in (int, float) or not 0 <= value < math.inf]
    texts = {"loss": facts.loss, "model_name": facts.model, "loss_kwargs": facts.kwargs or ""}
    wrong += [name for name, value in texts.items() if not isinstance(value, str)]
    wrong += [] if type(facts.pairs) is int and facts.pairs > 0 else ["the number of pairs of a step"]
    if wrong:
        raise UserError(f"{file}: is not what train.py writes: {wrong[0]} has no value that it could have")
    facts.loss = loss_name(facts.loss)
    return facts


def _forks(entry, file: Path) -> tuple[tuple[int, ...], int]:
    """(the steps of the forks that made a run, the last one first; the step since which its loss is of its kind), by
    the entry `fork` of its run.json."""
    found = forks_of(entry)
    for fork in found:
        for name, right in (("step", type(step := fork.get("step")) is int and step >= 0),
                            ("entry `changed`", isinstance(fork.get("changed", {}), dict))):
            if not right:
                raise UserError(f"{file}: is not what train.py writes: the {name} of the fork has no value that it "
                                "could have")
    later = later_forks(entry)  # of one at step 0 nothing is of the run before it
    since = (fork["step"] for fork in later if not OF_LOSS.isdisjoint(fork.get("changed", {})))
    return tuple(fork["step"] for fork in found[: len(later) + 1]), next(since, 0)


def _pairs(given: dict, ranks) -> int:
    """The pairs of a step, for these arguments; 0 where they are no numbers."""
    try:
        return pairs_per_step({"arguments": given, "world_size": ranks})
    except (TypeError, ZeroDivisionError):
        return 0


def in_order(folders: dict[str, Path], facts: dict[str, Facts]) -> tuple[list[str], str]:
    """(the runs in their order, "") where each but the first began from a checkpoint of the one before it; ([], "")
    where none began from another; and ([], the reason) where some did, and yet there is no such order."""
    parents = {run: next((other for other in folders if other != run
                          and _began_from(facts[run].model, folders[run], folders[other])), None) for run in folders}
    roots = [run for run, parent in parents.items() if parent is None]
    if len(roots) == len(folders):
        return [], ""
    if len(roots) != 1:
        return [], f"{listed(roots)} began from none of the others" if roots else "they all began from one another"
    order = roots
    while children := [run for run, parent in parents.items() if parent == order[-1]]:
        if len(children) > 1:
            return [], f"{listed(children)} all began from {order[-1]}"
        order = order + children
    return order, ""


def _began_from(model: str, folder: Path, other: Path) -> bool:
    """Tells whether `model`, as the run in `folder` was given it, is a checkpoint (or merged/) of the run in `other`. A
    relative path is one from here or from a folder above the run's."""
    if not WEIGHTS.fullmatch(Path(model).name):
        return False
    places = [(above / model).parent for above in (Path.cwd(), *folder.resolve().parents)]
    return any(os.path.realpath(place) == os.path.realpath(other) for place in places)
