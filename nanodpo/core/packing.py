"""From pairs of token ids to batches without padding. Torch only.

Shapes: P pairs, R responses of each; S sequences (a prompt with one response), N scored tokens, B the batch dimension
(1 when packed), T tokens along it.

A group is a prompt with its responses. In a packed batch the prompt stands once, its responses follow, the next group
follows them; positions restart at len(prompt) for each response. Nothing is padded or shifted, and there is no loss
mask: for each scored token a batch says where it is predicted (`predictors`), what it is (`targets`) and whose it is
(`sequence_ids`). The first token of *every* response is predicted by the last token of the prompt. A model that can't
take a packed batch gets the plain layout, `pad`.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

Group = tuple[list[int], list[list[int]]]  # prompt ids, ids of each response


def scored_places(response: list[int]):
    """Indices of the scored tokens: all, or in a response of several turns (data/example.py) those of its answers."""
    return getattr(response, "scored", range(len(response)))


class TensorRecord:
    """A record whose fields may be tensors, or records of tensors; it moves to a device as a whole."""

    def to(self, device: torch.device):
        """The same record on `device`. A copy to a GPU starts from pinned memory, so it is asynchronous."""
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                pinned = value.pin_memory() if device.type == "cuda" and not value.is_cuda else value
                moved[name] = pinned.to(device, non_blocking=True)
            elif isinstance(value, TensorRecord):
                moved[name] = value.to(device)
        return dataclasses.replace(self, **moved)


@dataclasses.dataclass
class Segments(TensorRecord):
    """Where the sequences of a packed batch lie, for attention. Tensors are int32."""

    # Of each sequence (prompt start, prompt end, response start, response end): positions in the batch, ends exclusive.
    # The first response of a prompt stands right behind it: its start is the prompt's end.
    spans: list[tuple[int, int, int, int]]
    q_lengths: list[int]  # queries: prompt + response for the first response of a prompt, else the response alone
    # Cumulative lengths, as flash attention takes them (its cu_seqlens), of queries and of keys: prompt + response.
    cu_q: Tensor  # (S+1,)
    cu_k: Tensor  # (S+1,)
    # For the variable-length kernel: a batch is cut into pieces, prompts and responses, of `piece_lengths` tokens each.
    # Put together again in this `key_order`, where a prompt comes once for each of its responses, they are the keys.
    piece_lengths: list[int]
    key_order: list[int]
    max_q: int  # the most queries of a sequence
    max_k: int  # the most keys: tokens of the longest sequence


@dataclasses.dataclass
class Batch(TensorRecord):
    """One forward pass: a micro-batch. In the plain layout `segments` is None, and so is `position_ids`: each row's
    positions are 0 to T - 1, as a model takes them by itself."""

    input_ids: Tensor  # (B, T)
    position_ids: Tensor | None  # (B, T)
    predictors: Tensor  # (N,) where each scored token is predicted: indices into the B*T hidden states
    targets: Tensor  # (N,) its id
    sequence_ids: Tensor  # (N,) its sequence: 0 for the first response, 1 for the next
    n_sequences: int
    segments: Segments | None


def pack(groups: list[Group]) -> Batch:
    """All groups one after the other without padding, each prompt once.

    >>> batch = pack([([7, 8], [[1, 2], [3]])])     # prompt 7 8, responses "1 2" and "3"
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[7, 8, 1, 2, 3]], [[0, 1, 2, 3, 2]])
    >>> batch.predictors.tolist(), batch.targets.tolist()     # 8 predicts 1, 1 predicts 2, 8 predicts 3
    ([1, 2, 1], [1, 2, 3])
    >>> batch.sequence_ids.tolist(), batch.segments.spans
    ([0, 0, 1], [(0, 2, 2, 4), (0, 2, 4, 5)])
    >>> batch.segments.cu_q.tolist(), batch.segments.cu_k.tolist()     # 7 8 1 2 and 3; 7 8 1 2 and 7 8 3
    ([0, 4, 5], [0, 4, 7])
    """
    _check(groups)
    ids, positions, predictors, targets, sequence_ids, spans = [], [], [], [], [], []
    for prompt, responses in groups:
        start, end = len(ids), len(ids) + len(prompt)
        ids += prompt
        positions += range(len(prompt))
        for response in responses:
            at, places = len(ids), scored_places(response)
            predictors += [at + i - 1 if i else end - 1 for i in places]
            targets += [response[i] for i in places]
            sequence_ids += [len(spans)] * len(places)
            spans.append((start, end, at, at + len(response)))
            ids += response
            positions += range(len(prompt), len(prompt) + len(response))
    return Batch(torch.tensor([ids]), torch.tensor([positions]),
                 *map(torch.tensor, (predictors, targets, sequence_ids)), len(spans), _segments(spans))


def _check(groups: list[Group]) -> None:
    """Asserts that every prompt and response has a token: the prompt's last one predicts the response's first."""
    for i, (prompt, responses) in enumerate(groups):
        assert prompt and responses and all(responses), f"group {i}: empty prompt, no response, or an empty one"


def _segments(spans) -> Segments:
    piece_lengths, key_order = [], []
    for p0, p1, r0, r1 in spans:
        if r0 == p1:  # the first response of a prompt
            prompt_piece = len(piece_lengths)
            piece_lengths.append(p1 - p0)
        key_order += [prompt_piece, len(piece_lengths)]
        piece_lengths.append(r1 - r0)
    q_lengths = [r1 - (p0 if r0 == p1 else r0) for p0, p1, r0, r1 in spans]
    k_lengths = [p1 - p0 + r1 - r0 for p0, p1, r0, r1 in spans]
    cu_q, cu_k = (torch.tensor([0, *each]).cumsum(0).to(torch.int32) for each in (q_lengths, k_lengths))
    return Segments(spans, q_lengths, cu_q, cu_k, piece_lengths, key_order, max(q_lengths), max(k_lengths))


def pad(groups: list[Group]) -> Batch:
    """Each sequence alone, the prompt repeated, padded on the right: for models that can't be given a packed batch.

    The padding needs no mask: no token of a causal model sees what follows it, and no padding is scored.
    """
    _check(groups)
    alone = [(prompt, response) for prompt, responses in groups for response in responses]
    width = max(len(prompt) + len(response) for prompt, response in alone)
    input_ids = torch.zeros(len(alone), width, dtype=torch.long)  # any id serves as padding: it is never scored
    predictors, targets, sequence_ids = [], [], []
    for i, (prompt, response) in enumerate(alone):
        input_ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        first, places = i * width + len(prompt) - 1, scored_places(response)
        predictors += [first + k for k in places]
        targets += [response[k] for k in places]
        sequence_ids += [i] * len(places)
    return Batch(input_ids, None, *map(torch.tensor, (predictors, targets, sequence_ids)), len(alone), None)


LAYOUTS = {"packed": pack, "plain": pad}


def make_batch(examples: list, sides: Sequence[str], layout: str, device: torch.device) -> tuple[Batch, Tensor]:
    """(one forward pass for these sides of all pairs, in a layout of `LAYOUTS`, on `device`; (P, R): the numbers of
    each pair's responses among the S of the batch)."""
    groups, index = groups_of(examples, sides)
    return LAYOUTS[layout](groups).to(device), index.to(device, non_blocking=True)


def groups_of(examples: list, sides: Sequence[str]) -> tuple[list[Group], Tensor]:
    """(groups, index) of pairs: prompts with the ids of these sides, and (P, R): where each pair's responses stand
    among the S of all groups. A pair is a group of its own. But a row of the data may list several answers, which
    gives several pairs: consecutive pairs of one row form one group, the prompt once and each answer once.

    >>> from nanodpo.data.example import Example
    >>> groups_of([Example(0, [1], [2], [3]), Example(1, [4], [5], [6])], ["chosen", "rejected"])
    ([([1], [[2], [3]]), ([4], [[5], [6]])], tensor([[0, 1],
            [2, 3]]))
    >>> row = [Example(0, [1], [2], [rejected], answer_numbers=(0, k)) for k, rejected in enumerate((3, 4))]
    >>> groups_of(row, ["chosen", "rejected"])
    ([([1], [[2], [3], [4]])], tensor([[0, 1],
            [0, 2]]))
    """
    groups, index, known = [], [], {}  # known: (group, side, number of the answer) -> its place among the S
    for before, example in zip([None, *examples], examples):
        if before is None or not example.follows(before):
            groups.append((example.prompt, []))
        index.append([])
        for side in sides:
            key = len(groups), side, example.number_of(side)
            if key not in known:
                known[key] = len(known)
                groups[-1][1].append(getattr(example, side))
            index[-1].append(known[key])
    return groups, torch.tensor(index)


def pair_lengths(examples: list, sides: Sequence[str], device: torch.device | None = None) -> Tensor:
    """(P, R) float64: how many tokens of each response are scored."""
    counts = [[len(scored_places(getattr(example, side))) for side in sides] for example in examples]
    return torch.tensor(counts, dtype=torch.float64).to(device, non_blocking=True)


def total_tokens(examples: list, sides: Sequence[str]) -> int:
    """Prompts and these sides' responses, together; what several pairs of a row share counts once."""
    return sum(len(prompt) + sum(map(len, responses)) for prompt, responses in groups_of(examples, sides)[0])
