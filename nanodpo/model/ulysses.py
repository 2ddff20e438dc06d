"""Sequence parallelism: several ranks share a batch, each with a part of its positions, by DeepSpeed's Ulysses (arXiv
2309.14509, for transformers arXiv 2506.13996).

Around attention the ranks exchange queries, keys and values: each has all positions of some of the heads there. All
other layers and the head work token by token. So of activations a rank keeps its part alone (docs/gpu.md).

Shapes: H heads, G key/value heads, T positions of a rank, E head size, N scored tokens of a batch, n those of a rank.
"""

import functools
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from ..core.attention import LOOP, VARLEN, loop_attention, varlen_attention
from ..core.logprobs import OneRank
from ..core.packing import Batch
from ..ranks import distributed


def shared(attention: str, ranks: int) -> str:
    """The name under which transformers finds an attention of core/attention.py whose heads so many ranks share."""
    return f"{attention}_ulysses" if ranks > 1 else attention


def ranks_of_a_batch(size: int) -> OneRank:
    """Returns the `parallel` of a SequenceLogProbs where so many ranks share a batch. All ranks must call it."""
    return SequenceParallel(size) if size > 1 else OneRank()


def cut(batch: Batch, rank: int, size: int) -> tuple[Batch, Tensor]:
    """Cuts a packed batch along its positions into `size` parts of one length; the last is filled up with tokens that
    are not scored. Returns (this rank's part, (n,) which of the N scored tokens are predicted in it). Segments stay
    those of the whole batch: attention sees all of it.

    >>> from nanodpo.core.packing import pack
    >>> here, places = cut(pack([([7, 8], [[1, 2, 3]])]), rank=1, size=2)     # 7 8 1 | 2 3
    >>> here.input_ids.tolist(), here.position_ids.tolist()
    ([[2, 3, 0]], [[3, 4, 0]])
    >>> places.tolist(), here.predictors.tolist(), here.targets.tolist()     # 2 predicts 3, the last of three
    ([2], [0], [3])
    """
    length = -(-batch.input_ids.shape[1] // size)
    first, filled = rank * length, (0, length * size - batch.input_ids.shape[1])
    line = (F.pad(x, filled)[:, first : first + length] for x in (batch.input_ids, batch.position_ids))
    places = (batch.predictors // length == rank).nonzero().squeeze(1)  # waits for a GPU, once a batch
    scored = batch.predictors[places] - first, batch.targets[places], batch.sequence_ids[places]
    return Batch(*line, *scored, batch.n_sequences, batch.segments), places


class SequenceParallel(OneRank):
    """The ranks that share a batch. All of them must make the same calls."""

    def __init__(self, size: int):
        self.size, self.group = size, distributed.neighbours(size)
        self.rank = dist.get_rank(self.group)
        self.places, self.count = None, 0  # of the batch sharded last: this rank's scored tokens, and N
        for name, attention in ((LOOP, loop_attention), (VARLEN, varlen_attention)):
            AttentionInterface.register(shared(name, size), functools.partial(exchanged, self.group, attention))

    def shard(self, batch: Batch) -> Batch:
        """The part of a packed batch that this rank's layers see."""
        here, self.places = cut(batch, self.rank, self.size)
        self.count = len(batch.targets)
        return here

    def gather(self, values: Tensor, places: Tensor | None = None, count: int | None = None) -> Tensor:
        """(n, ...) values of the scored tokens of the batch sharded last -> (N, ...) those of the whole batch; or
        values with these places among `count`."""
        return _Gather.apply(values, *((self.places, self.count) if places is None else (places, count)), self.group)

    def entries(self, counts: Tensor) -> Tensor:
        """(N,) -> (k,): of lists of so many entries for the scored tokens of a batch, one list after the other, the
        places of those that are of this rank's tokens."""
        mine = torch.zeros(self.count, dtype=torch.bool, device=counts.device)
        mine[self.places] = True
        return mine.repeat_interleave(counts).nonzero().squeeze(1)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks."""
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total


class _Gather(torch.autograd.Function):
    """(n, ...) -> (N, ...) on all ranks that share a batch, each of which then has the same loss of the whole.

    Backward a rank goes on with its own tokens alone; what its positions owe to the others' tokens reaches it through
    the exchanges in the layers. The sum over the ranks is the gradient, which DeepSpeed makes anyway.
    """

    @staticmethod
    def forward(ctx, values, places, count, group):
        ctx.save_for_backward(places)
        dtype = torch.int32 if values.dtype == torch.bool else values.dtype  # no backend adds truth values
        found = values.new_zeros(count, *values.shape[1:], dtype=dtype)
        found[places] = values.to(dtype)
        dist.all_reduce(found, group=group)  # each is one rank's, and 0 elsewhere: a sum without rounding
        return found.to(values.dtype)

    @staticmethod
    def backward(ctx, grad):
        (places,) = ctx.saved_tensors
        return grad[places], None, None, None


def exchanged(group, attention, module, query: Tensor, key: Tensor, value: Tensor, mask, *args, segments, **kwargs):
    """(1, H, T, E), (1, G, T, E) x 2 -> (1, T, H E): `attention` of a batch that the ranks of `group` share. Raises
    ValueError for heads that they can't share."""
    if key.shape != value.shape or query.shape[3] != key.shape[3]:
        raise ValueError(f"queries, keys and values of {query.shape[3]}, {key.shape[3]} and {value.shape[3]} numbers a "
                         "head can't be exchanged")
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings may return float32
    # Every layer hands positions on, and DeepSpeed gathers them; core/attention.py knows them from the segments.
    kwargs |= {"segments": segments, "position_ids": torch.zeros(1, 1, dtype=torch.long, device=query.device)}
    # DeepSpeed writes its number of heads into the module, whose own attention would read it there.
    stand_in = SimpleNamespace(training=module.training)
    exchange = _exchange(group, attention, query.shape[1], key.shape[1], query.shape[3])
    out, _ = exchange(stand_in, query, key, value, mask, *args, **kwargs)  # (1, T, H * E)
    return out.unflatten(2, (query.shape[1], query.shape[3])), None


@functools.cache
def _exchange(group, attention, heads: int, key_heads: int, size: int):
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF  # slow to import

    return UlyssesSPAttentionHF(functools.partial(_filled, attention), 1, heads, size, key_heads, 1, group,
                                seq_length_is_variable=True)


def _filled(attention, module, query: Tensor, key: Tensor, value: Tensor, mask, *args, segments, **kwargs):
    """`attention` of all positions, and 0 for those that fill up the last shard."""
    end = segments.spans[-1][3]
    whole = (x[:, :, :end] for x in (query, key, value))
    out, _ = attention(module, *whole, mask, *args, segments=segments, **kwargs)
    return F.pad(out, (0, 0, 0, 0, 0, query.shape[2] - end)), None
