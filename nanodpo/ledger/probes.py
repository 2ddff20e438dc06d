"""The probes of a ledger: what changed, mean log-probs of responses, in nats a token."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.packing import Group
from ..errors import UserError
from ..scoring.datasets import ResponseSet
from ..scoring.responses import batches

DEFAULT_KINDS = ("chosen", "rejected", "other")


class Probe(NamedTuple):
    """The log-prob per token of a response, or its mean over rows of a data set."""

    dataset: str
    row: int | None  # None: the mean
    response: str
    rows: int  # in the mean


@dataclasses.dataclass
class Probes:
    """M probes, each a weighted sum of the log-probs of sequences. `batches` has micro-batches, each of one probe: its
    number, groups of one response, and the weights of these, (S,) float64."""

    names: list[Probe]
    batches: list[tuple[int, list[Group], Tensor]]

    def only(self, first: int, end: int) -> "Probes":
        """The probes from number `first` to before `end`."""
        kept = [(m - first, groups, weights) for m, groups, weights in self.batches if first <= m < end]
        return Probes(self.names[first:end], kept)


def make_probes(datasets: list[ResponseSet], kinds: list[str] | None, rows: int, single: list[int],
                max_tokens: int) -> Probes:
    """The mean over the first `rows` rows of each data set, and the rows `single` by themselves, for these kinds of
    responses (None: DEFAULT_KINDS, as far as the data have them). Raises UserError for a row that no data set has."""
    probes = Probes([], [])
    for data in datasets:
        wanted = [(None, [*range(min(rows, len(data.groups)))])]
        wanted += [(example.row, [i]) for i, example in enumerate(data.examples) if example.row in single]
        for row, indices in wanted:
            for kind in kinds or DEFAULT_KINDS:
                having = [i for i in indices if kind in data.groups[i][1]]
                if having:
                    _add(probes, Probe(data.name, row, kind, len(having)), [data.groups[i] for i in having], max_tokens)
    if lost := {*single} - {probe.row for probe in probes.names}:
        raise UserError(f"--ledger_rows {min(lost)}: no data set has such a row")
    return probes


def _add(probes: Probes, probe: Probe, groups: list, max_tokens: int) -> None:
    """Adds the mean over these groups of the log-prob per token of one of their responses."""
    groups = [(prompt, {probe.response: responses[probe.response]}) for prompt, responses in groups]
    for indices in batches(groups, max_tokens):
        plain = [(groups[i][0], [groups[i][1][probe.response]]) for i in indices]
        weights = torch.tensor([1 / len(ids) / len(groups) for _, (ids,) in plain], dtype=torch.float64)
        probes.batches.append((len(probes.names), plain, weights))
    probes.names.append(probe)
