"""Rows as literal tensors, and as what a loop over the groups says they must be."""

import copy
import random

import pytest
import torch

from nanodpo.core.packing import Batch, Segments, pack, pad, pair_lengths
from nanodpo.data.example import Example, PartlyScored

# Prompt 7 8 9 with three responses, one of a single token; prompt 4, a single token, with two.
GROUPS = [([7, 8, 9], [[1, 2], [3], [5, 6]]), ([4], [[2, 2, 2], [1]])]


def random_groups(draw: random.Random) -> list:
    def ids(most):
        return [draw.randrange(1, 50) for _ in range(draw.randint(1, most))]

    return [(ids(6), [ids(7) for _ in range(draw.randint(1, 4))]) for _ in range(draw.randint(1, 5))]


def test_pack_literally():
    """Every token in its place; no padding, no shift, positions restart at len(prompt) for each response."""
    batch = pack(GROUPS)
    #                            0  1  2  3  4  5  6  7  8  9 10 11 12
    assert batch.input_ids.tolist() == [[7, 8, 9, 1, 2, 3, 5, 6, 4, 2, 2, 2, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 3, 4, 0, 1, 2, 3, 1]]
    assert batch.predictors.tolist() == [2, 3, 2, 2, 6, 8, 9, 10, 8]
    assert batch.targets.tolist() == [1, 2, 3, 5, 6, 2, 2, 2, 1]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 2, 2, 3, 3, 3, 4]
    assert batch.n_sequences == 5


def keys_of(segments) -> list[int]:
    """Positions of the keys, sequence by sequence."""
    parts = torch.arange(sum(segments.piece_lengths)).split(segments.piece_lengths)
    return [position for i in segments.key_order for position in parts[i].tolist()]


def test_segments_literally():
    """Queries are parts of the batch; keys are each sequence's prompt and then itself."""
    segments = pack(GROUPS).segments
    assert segments.spans == [(0, 3, 3, 5), (0, 3, 5, 6), (0, 3, 6, 8), (8, 9, 9, 12), (8, 9, 12, 13)]
    assert segments.cu_q.tolist() == [0, 5, 6, 8, 12, 13]
    assert segments.cu_k.tolist() == [0, 5, 9, 14, 18, 20]
    assert segments.q_lengths == [5, 1, 2, 4, 1]
    assert segments.piece_lengths == [3, 2, 1, 2, 1, 3, 1]  # a prompt and three responses, a prompt and two
    assert segments.key_order == [0, 1, 0, 2, 0, 3, 4, 5, 4, 6]
    assert keys_of(segments) == [0, 1, 2, 3, 4, 0, 1, 2, 5, 0, 1, 2, 6, 7, 8, 9, 10, 11, 8, 12]
    assert (segments.max_q, segments.max_k) == (5, 5)
    assert segments.cu_q.dtype == segments.cu_k.dtype == torch.int32  # what the CUDA kernel takes


def test_pad_literally():
    """The same groups, a sequence a line, padded on the right; positions count through the flattened lines of 5."""
    batch = pad(GROUPS)
    assert batch.input_ids.tolist() == [[7, 8, 9, 1, 2], [7, 8, 9, 3, 0], [7, 8, 9, 5, 6], [4, 2, 2, 2, 0],
                                      [4, 1, 0, 0, 0]]
    assert batch.position_ids is None  # a model's own, from 0 in each line
    assert batch.predictors.tolist() == [2, 3, 7, 12, 13, 15, 16, 17, 20]
    assert batch.targets.tolist() == [1, 2, 3, 5, 6, 2, 2, 2, 1]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 2, 2, 3, 3, 3, 4]
    assert (batch.n_sequences, batch.segments) == (5, None)


@pytest.mark.parametrize("layout, predictors", [(pack, [1, 4, 5, 1]), (pad, [1, 4, 5, 8])])
def test_of_a_response_only_some_tokens_may_count(layout, predictors):
    """Answers 3 and 5 6 of a conversation; the question 4 between them is seen, and not scored. All else is as it is
    where all of a response counts."""
    groups = [([1, 2], [PartlyScored([3, 9, 4, 5, 6], [0, 3, 4]), [7]])]
    batch, whole = layout(groups), layout([([1, 2], [[3, 9, 4, 5, 6], [7]])])
    assert batch.predictors.tolist() == predictors
    assert batch.targets.tolist() == [3, 5, 6, 7] and batch.sequence_ids.tolist() == [0, 0, 0, 1]
    assert batch.input_ids.equal(whole.input_ids)
    if layout is pad:
        assert batch.segments is None and whole.segments is None
    else:
        assert batch.position_ids.equal(whole.position_ids)
        assert batch.segments.spans == whole.segments.spans
        assert keys_of(batch.segments) == keys_of(whole.segments)
    example = Example(0, *groups[0][:1], *groups[0][1])
    assert pair_lengths([example], ["chosen", "rejected"]).tolist() == [[3, 1]]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("layout", [pack, pad])
def test_every_scored_token_once_after_what_came_before_it(layout, seed):
    """Following `predictors` back through the batch finds, for each token of each response, its true context."""
    groups = random_groups(random.Random(seed))
    batch = layout(groups)
    expected, number = [], 0
    for prompt, responses in groups:
        for response in responses:
            expected += [(number, token, (prompt + response[:k])) for k, token in enumerate(response)]
            number += 1
    found = [(s, t, context_of(batch, r, s)) for r, t, s in zip(batch.predictors.tolist(), batch.targets.tolist(),
                                                              batch.sequence_ids.tolist())]
    assert found == expected
    assert batch.n_sequences == number


def context_of(batch: Batch, at: int, seq: int) -> list[int]:
    """The ids that flattened position `at` may see, in order of position, by the layout's own rule."""
    width = batch.input_ids.shape[1]
    line, column = divmod(at, width)
    ids = batch.input_ids[line].tolist()
    if batch.segments is None:
        seen = range(column + 1)
    else:
        p0, p1, r0, r1 = batch.segments.spans[seq]
        seen = [i for i in [*range(p0, p1), *range(r0, r1)] if i <= column]
        assert batch.position_ids[line, seen].tolist() == list(range(len(seen)))
    return [ids[i] for i in seen]


@pytest.mark.parametrize("seed", range(40))
def test_queries_and_keys_line_up_at_the_end(seed):
    """Of each sequence queries are the last keys, in order, and together they are the batch, each position once."""
    groups = random_groups(random.Random(seed))
    batch = pack(groups)
    s, length = batch.segments, batch.input_ids.shape[1]
    assert length == sum(len(p) + sum(map(len, rs)) for p, rs in groups)
    queries = []
    for i, (p0, p1, r0, r1) in enumerate(s.spans):
        q = list(range(*s.cu_q[i:i + 2].tolist()))
        k = keys_of(s)[s.cu_k[i]:s.cu_k[i + 1]]
        assert k == [*range(p0, p1), *range(r0, r1)]
        assert k[-len(q):] == q
        assert q == (k if r0 == p1 else list(range(r0, r1)))
        queries += q
    assert queries == list(range(length))
    assert s.max_q == max(s.cu_q.diff().tolist()) and s.max_k == max(s.cu_k.diff().tolist())


@pytest.mark.parametrize("layout", [pack, pad])
def test_groups_are_left_as_they_were(layout):
    """A layout reads its input: what comes after the call must see the same lists."""
    groups = copy.deepcopy(GROUPS)
    layout(groups)
    assert groups == GROUPS


@pytest.mark.parametrize("layout", [pack, pad])
@pytest.mark.parametrize("group", [([], [[1]]), ([1], []), ([1], [[2], []])])
def test_nothing_is_scored_without_a_prompt_or_a_token(layout, group):
    """An empty side would take its hidden state from a neighbour, or shift the others' targets."""
    with pytest.raises(AssertionError, match="group 1: empty prompt, no response, or an empty one"):
        layout([([1, 2], [[3]]), group])


def test_rows_can_be_pinned():
    """Pinned memory takes no tensor whose elements share a place."""
    for layout in (pack, pad):
        batch = layout([([7, 8], [[1, 2], [3]])])
        assert all(tensor.is_contiguous() for tensor in vars(batch).values() if isinstance(tensor, torch.Tensor))


def test_moving_a_row_moves_every_tensor_and_changes_none():
    """`to` reaches the tensors inside `segments`; the meta device shows which ones it took."""
    batch = pack(GROUPS)
    moved, same = batch.to(torch.device("meta")), batch.to(torch.device("cpu"))
    for record, other, kept in [(moved, batch, same), (moved.segments, batch.segments, same.segments)]:
        tensors = [name for name, value in vars(other).items() if isinstance(value, torch.Tensor)]
        assert tensors == {Batch: ["input_ids", "position_ids", "predictors", "targets", "sequence_ids"],
                           Segments: ["cu_q", "cu_k"]}[type(other)]
        for name in tensors:
            assert getattr(record, name).device.type == "meta"
            assert torch.equal(getattr(kept, name), getattr(other, name))
    assert moved.segments.spans == batch.segments.spans and moved.n_sequences == 5
