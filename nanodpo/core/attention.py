"""Attention for packed batches: every response sees its own prompt and itself, nothing else. Torch only, but for the
names registered with transformers.

Shapes: H heads, G key/value heads, T tokens of the batch, E head size, S sequences.

Two implementations of one definition, chosen by name (`config._attn_implementation`): "nanodpo_loop" calls causal SDPA
once a sequence and runs anywhere; "nanodpo_varlen" is a single variable-length call on CUDA. No T x T mask is built by
either, except a sequence's own where a model caps its scores or slides a window shorter than the sequence. A response
shorter than the prompt that it shares has a mask of its own length by theirs, SHORT lines at most.
"""

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

LOOP, VARLEN = "nanodpo_loop", "nanodpo_varlen"
SHORT = 512  # lines of a mask at most, so that masks grow no faster than batches


def loop_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, *, segments, **kwargs):
    """(1, H, T, E), (1, G, T, E) x 2 -> (1, T, H, E): each response as if its [prompt | response] stood alone."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # positions are turned in float32
    # On CPU the kernel shares key/value heads by itself; on CUDA the one that takes float32 needs them repeated.
    if query.shape[1] != key.shape[1] and (query.device.type != "cpu" or kwargs.get("softcap")):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    pieces = []
    for p0, p1, r0, r1 in segments.spans:
        k, v = (_sequence(x, p0, p1, r0, r1) for x in (key, value))
        # The prompt's queries come with its first response. For another one they are computed again and dropped where
        # that costs less than the mask which it spares.
        alone = r0 > p1 and r1 - r0 <= min(p1 - p0, SHORT)
        q = query[:, :, r0:r1] if alone else _sequence(query, p0, p1, r0, r1)
        out = _causal(q, k, v, scaling, dropout, kwargs.get("sliding_window"), kwargs.get("softcap")).transpose(1, 2)
        pieces.append(out[:, r0 - r1:] if r0 > p1 else out)
    return torch.cat(pieces, 1), None


def _sequence(x: Tensor, p0: int, p1: int, r0: int, r1: int) -> Tensor:
    """Prompt and response, one after the other; not copied where they lie so."""
    return torch.cat([x[:, :, p0:p1], x[:, :, r0:r1]], 2) if r0 > p1 else x[:, :, p0:r1]


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling, dropout, window, softcap) -> Tensor:
    """(1, H, L, E), (1, G, K, E) x 2 -> (1, H, L, E): the last L places of a sequence see those up to themselves."""
    (length, keys), band = (q.shape[2], k.shape[2]), None
    if softcap or length < keys or (window and window < keys):
        # Row i is place keys - length + i, and sees the last `window` places up to itself.
        band = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril_(keys - length)
        if window and window < keys:
            band.triu_(keys - length - window + 1)
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, band, dropout, is_causal=band is None, scale=scaling,
                                              enable_gqa=q.shape[1] != k.shape[1])
    scores = q @ k.transpose(2, 3) * (scaling or q.shape[3] ** -0.5)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~band, -torch.inf)
    return F.dropout(scores.softmax(-1, dtype=torch.float32).to(v.dtype), dropout) @ v


def varlen_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, *, segments, **kwargs):
    """The same in one call. Queries lie in the batch's order; keys are gathered so that a shared prompt stands before
    each of its responses. The kernel aligns its causal mask to the last key: just what a response after a prompt needs.
    """
    if kwargs.get("softcap") or dropout:
        return loop_attention(module, query, key, value, attention_mask, dropout, scaling, segments=segments, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)
    q = query[0].transpose(0, 1)  # (T, H, E)
    k, v = (x[0].index_select(1, segments.keys).transpose(0, 1) for x in (key, value))  # (K, G, E)
    window = (kwargs.get("sliding_window") or 0) - 1  # -1: no window
    out = varlen_call(q, k, v, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k, scaling, window)
    return out.unsqueeze(0), None


def varlen_call(q, k, v, cu_q, cu_k, max_q: int, max_k: int, scaling, window: int) -> Tensor:
    """PyTorch's flash kernel; a function of its own so that a test can put a slow, plain one in its place.

    (T, H, E), (K, G, E) x 2, int32 (S+1,) x 2 -> (T, H, E). With a right window of 0 query i of a stretch sees keys up
    to i + keys - queries, and with a left window of w none before the last w + 1 of those.
    """
    return _kernel()(q, k, v, cu_q, cu_k, max_q, max_k, scale=scaling, window_size=(window, 0))


@functools.cache  # looked up once, not in every layer of every pass
def _kernel():
    from torch.nn.attention.varlen import varlen_attn  # imported here because only CUDA has the kernel

    # Older releases share key/value heads without being told.
    told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if told else varlen_attn


# No mask function is registered under these names, so transformers builds no mask for them.
AttentionInterface.register(LOOP, loop_attention)
AttentionInterface.register(VARLEN, varlen_attention)
