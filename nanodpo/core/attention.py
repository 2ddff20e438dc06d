"""Attention for packed batches: every response sees its own prompt and itself, nothing else. Torch only, but for the
names registered with transformers.

Shapes: H heads, G key/value heads, T tokens of the batch, E head size, S sequences, K keys: prompt + response of each.

Two implementations of one definition, chosen by name (`config._attn_implementation`): "nanodpo_loop" calls causal SDPA
once a sequence and runs anywhere; "nanodpo_varlen" is a single variable-length call on CUDA. Neither builds a mask of
the whole batch. The loop builds one of a sequence, where a model caps its scores or has a window shorter than that; and
one of (response, prompt + response) for a later response to a prompt, if it is no longer than the prompt and SHORT.
"""

import functools
import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

LOOP, VARLEN = "nanodpo_loop", "nanodpo_varlen"
SHORT = 512  # a later response that is longer gets no mask, so that masks grow with a batch's length, not its square


def loop_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, *, segments, position_ids=None,
                   **kwargs):
    """(1, H, T, E), (1, G, T, E) x 2 -> (1, T, H, E): each response as if its [prompt | response] stood alone. Raises
    TypeError for a tensor that it would ignore, be it a bias, sinks, or keys to look at."""
    if odd := [name for name, value in kwargs.items() if isinstance(value, Tensor)]:
        raise TypeError(f"attention of packed batches does not know {', '.join(odd)}")
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings may return float32
    # A CPU's SDPA shares key/value heads by itself; CUDA's for float32 needs them repeated.
    if query.shape[1] != key.shape[1] and (query.device.type != "cpu" or kwargs.get("softcap")):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    # Split, not sliced: the gradient of a slice is as large as the batch, that of a split no larger than its part.
    pieces, parts = [], zip(*(x.split(segments.q_lengths, 2) for x in (query, key, value)))
    for size, (p0, p1, r0, _), (q, k, v) in zip(segments.q_lengths, segments.spans, parts):
        if r0 == p1:  # the first response, behind its prompt
            prompt = [x[:, :, : p1 - p0] for x in (q, k, v)]
        else:
            k, v = torch.cat([prompt[1], k], 2), torch.cat([prompt[2], v], 2)
            if size > min(p1 - p0, SHORT):  # with the prompt's queries, to need no mask; cut off below
                q = torch.cat([prompt[0], q], 2)
        out = _causal(q, k, v, scaling, dropout, kwargs.get("sliding_window"), kwargs.get("softcap"))
        pieces.append(out.transpose(1, 2)[:, -size:])
    return torch.cat(pieces, 1), None


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling, dropout, window, softcap) -> Tensor:
    """(1, H, L, E), (1, G, K, E) x 2 -> (1, H, L, E): the last L of a sequence's K positions see those up to them."""
    (length, keys), mask = (q.shape[2], k.shape[2]), None
    if softcap or length < keys or (window and window < keys):
        # Query i is at position keys - length + i, and sees the last `window` positions up to itself.
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril_(keys - length)
        if window and window < keys:
            mask.triu_(keys - length - window + 1)
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scaling,
                                              enable_gqa=q.shape[1] != k.shape[1])
    scores = q @ k.transpose(2, 3) * (scaling or q.shape[3] ** -0.5)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    return F.dropout(scores.softmax(-1, dtype=torch.float32).to(v.dtype), dropout) @ v


def varlen_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, *, segments,
                     position_ids=None, **kwargs):
    """The same in one call. Queries lie in the batch's order; of the keys a shared prompt stands before each of its
    responses. The kernel aligns its causal mask to the last key: just what a response after a prompt needs."""
    if kwargs.get("softcap") or dropout or any(isinstance(value, Tensor) for value in kwargs.values()):
        return loop_attention(module, query, key, value, attention_mask, dropout, scaling, segments=segments, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)
    # Not query[0], whose backward pass would fill and copy a tensor as large as the batch.
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (T, H, E), (T, G, E) x 2
    if len(segments.key_order) > len(segments.piece_lengths):  # a prompt has several responses
        # Joined, not picked by an index, whose backward pass would sort.
        parts = (x.split(segments.piece_lengths) for x in (k, v))
        k, v = (torch.cat([part[i] for i in segments.key_order]) for part in parts)
    # transformers counts the token itself into its window, this kernel does not; -1 is no window.
    window, ends = (kwargs.get("sliding_window") or 0) - 1, (segments.cu_q, segments.cu_k)
    if q.is_cuda and q.requires_grad and torch.are_deterministic_algorithms_enabled():
        empty = empty_sequences(segments, q.shape[1], torch.cuda.get_device_properties(q.device).multi_processor_count)
        ends = (torch.cat([end, end[-1:].expand(empty)]) for end in ends)
    out = varlen_call(q, k, v, *ends, segments.max_q, segments.max_k, scaling, window)
    return out.unsqueeze(0), None


def empty_sequences(segments, heads: int, processors: int) -> int:
    """How many empty sequences behind a batch make the kernel's backward pass fastest where it adds in one order. It
    cuts the keys of each head of each sequence, empty ones too, so that all of a GPU's processors have a part."""
    areas = [q * (r1 - r0 + p1 - p0 - q / 2) for q, (p0, p1, r0, r1) in zip(segments.q_lengths, segments.spans)]
    parts = [math.ceil(processors / (heads * (len(areas) + empty))) for empty in range(3)]
    times = [math.ceil(heads * sum(areas) / max(areas) * n / processors) / n for n in parts]
    return times.index(min(times))


def varlen_call(q, k, v, cu_q, cu_k, max_q: int, max_k: int, scaling, window: int) -> Tensor:
    """PyTorch's flash kernel; a function of its own so that a test can put a slow, plain one in its place.

    (T, H, E), (K, G, E) x 2, int32 (S+1,) x 2 -> (T, H, E). Of a sequence with L queries and K keys, query i sees keys
    up to i + K - L (a right window of 0), and with a left window of w only the last w + 1 of them.
    """
    return _kernel()(q, k, v, cu_q, cu_k, max_q, max_k, scale=scaling, window_size=(window, 0))


@functools.cache  # looked up once, not in every layer of every pass
def _kernel():
    from torch.nn.attention.varlen import varlen_attn  # imported here because only CUDA has the kernel

    # Older releases of PyTorch see from the shapes that key/value heads are shared.
    told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if told else varlen_attn


# No mask function is registered under these names, so transformers builds no mask for them.
AttentionInterface.register(LOOP, loop_attention)
AttentionInterface.register(VARLEN, varlen_attention)
