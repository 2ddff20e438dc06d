"""From hidden states to log-probabilities: the one path of policy, reference, evaluation and scoring. Torch only.

For a sequence of T tokens whose last n are the response it must equal two lines over all logits:

    token_logps = logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)     # (T - 1,)
    logps = token_logps[-n:].sum()

Shapes: B the batch dimension, T tokens along it, N scored tokens, S sequences, D hidden size, V vocabulary, C tokens
of a chunk.

The head works chunk by chunk, so logits of no more than a chunk of tokens exist at a time. Logits and log-probs are
never below float32; sums over a response are float64: the order of adding 20,000 tokens changes no digit that counts.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

# The most bytes of float32 logits at one time. Every chunk reads the whole output weight again: on a GPU this is slow
# unless some hundred tokens share it (an estimate); on a CPU larger chunks are not faster (bench/head.py).
CHUNK_BYTES = (256 if torch.cuda.is_available() else 64) * 2**20
NO_SECOND = "this function has no second derivative; leave create_graph=True out"
CAST_BLOCK = 2**24  # numbers of a bfloat16 output weight that are held in float32 at one time, on a CPU: 64 MiB


class LogProbHead(nn.Module):
    """Token log-probs from hidden states, through the model's own output layer, whose parameters it shares.

    It is a module, and called as one, because ZeRO-3 gathers a sharded weight when the module that holds it is called.
    """

    def __init__(self, lm_head: nn.Linear, scale: float = 1.0, cap: float | None = None, chunk_size: int = 0):
        super().__init__()
        self.weight, self.bias, self.scale, self.cap = lm_head.weight, lm_head.bias, scale, cap
        self.on_chunk = None  # called after every chunk: TokenMetrics of run/metrics.py
        self.product_dtype = getattr(lm_head, "product_dtype", None)  # set by model/precision.py
        self.chunk_size = chunk_size or max(1, CHUNK_BYTES // (4 * lm_head.out_features))

    @property
    def bf16(self) -> bool:
        """Whether a GPU multiplies in bfloat16. What comes out of the product is float32, even so."""
        return self.weight.is_cuda and torch.bfloat16 in (self.weight.dtype, self.product_dtype)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(N, D), (N,) -> (N,): log softmax(logits)[target], nats, float32 (float64 for float64 hidden states)."""
        return _TokenLogProbs.apply(hidden, self.weight, self.bias, targets, self)

    def logits(self, hidden: Tensor, buffer: Tensor | None = None, own: tuple = ()) -> Tensor:
        """(C, D) -> (C, V), float32 or better: cap tanh(s (W h + b) / cap), or s (W h + b) without a cap; s is `scale`.
        Written into the first C rows of `buffer`, which all chunks share, or into new memory. `own`: W and b to use in
        place of the module's; backward gives those of forward, since functional_call puts its own there for a call."""
        weight, bias = own or (self.weight, self.bias)
        if buffer is None:
            buffer = hidden.new_empty(len(hidden), len(weight), dtype=torch.promote_types(hidden.dtype, torch.float32))
        z = buffer[: len(hidden)]
        if self.bf16:  # a GPU's product of bfloat16 gives float32, which a CPU's can't
            torch.mm(hidden.bfloat16(), weight.bfloat16().T, out_dtype=z.dtype, out=z)
            if bias is not None:
                z.add_(bias)
        else:  # both factors in float32: a CPU's bfloat16 product would round each logit
            for vocab, rows in _blocks(weight, z.dtype):
                if bias is None:
                    torch.mm(hidden.to(z.dtype), rows.T, out=z[:, vocab])
                else:
                    torch.addmm(bias[vocab].to(z.dtype), hidden.to(z.dtype), rows.T, out=z[:, vocab])
        if self.scale != 1.0:
            z.mul_(self.scale)
        return z if self.cap is None else z.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, z: Tensor) -> Tensor | float | None:
        """d logits / d (W h + b), from the logits z: (C, V), or one number without a cap, or None where that is 1."""
        if self.cap is None:
            return None if self.scale == 1.0 else self.scale
        return (z / self.cap).square_().neg_().add_(1).mul_(self.scale)

    def times_weight(self, dz: Tensor, weight: Tensor) -> Tensor:
        """(C, V), (V, D) -> (C, D): dz W, in the dtype of dz, or in bfloat16, as the weight then is."""
        if self.bf16:
            return dz.bfloat16() @ weight
        return functools.reduce(torch.add, (dz[:, vocab] @ rows for vocab, rows in _blocks(weight, dz.dtype)))


def _blocks(weight: Tensor, dtype: torch.dtype):
    """(slice of the vocabulary, its weights in this dtype): all at once, or in blocks where they are converted."""
    size = len(weight) if weight.dtype == dtype else max(1, CAST_BLOCK // weight.shape[1])
    for i in range(0, len(weight), size):
        yield slice(i, i + size), weight[i : i + size].to(dtype)


class Chunk(NamedTuple):
    """A chunk of tokens under the model: (C,) each, but `exps`. A gradient that is made of it overwrites `exps`."""

    logps: Tensor  # of each target, nats
    behind: Tensor  # the target's logit minus the largest one: 0 where no token is likelier
    top: Tensor  # the largest logit
    exps: Tensor  # (C, V): exp(logits - top)
    total: Tensor  # the sum of `exps`


def chunk_logps(z: Tensor, targets: Tensor, exps: Tensor | None = None) -> Chunk:
    """(C, V) logits, (C,) -> the log-probs of the targets. The one log-softmax of this project: training makes its
    gradient from the exponentials, score.py its measures. Overwrites z: with z - top where `exps` is memory for the
    exponentials, else with the exponentials."""
    top = z.amax(1)
    z.sub_(top[:, None])  # no exponential is above 1 then, none overflows
    behind = z.gather(1, targets[:, None]).squeeze(1)
    exps = torch.exp(z, out=z if exps is None else exps[: len(z)])
    total = exps.sum(1)
    # Not logit - logsumexp: both are rounded at their own size, which may be far above that of their difference.
    return Chunk(behind - total.log(), behind, top, exps, total)


def _logit_grad(exps: Tensor, total: Tensor, targets: Tensor, slope: Tensor | float | None) -> Tensor:
    """d log softmax(z)[target] / d(W h + b) = (onehot - exps / total) * slope: (C, V). Overwrites exps."""
    grad = exps.mul_(-1 / total[:, None])
    grad[torch.arange(len(targets), device=grad.device), targets] += 1
    return grad if slope is None else grad.mul_(slope)


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(W h)[y] for each row of h, in chunks.

    Frozen head: forward computes d logp / dh = W[y] - softmax(W h) W while the chunk's logits are in memory, and keeps
    it, (N, D). A token's log-prob depends on its own hidden state alone, so for any loss d loss / dh is
    (d loss / d logp) (d logp / dh): backward multiplies by the incoming (N,) gradient.
    Trainable head: backward computes the logits again and sums dW in float32: bfloat16 would lose small terms.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, head):
        ctx.head, on_chunk = head, head.on_chunk
        factor = weight.bfloat16() if head.bf16 else weight  # cast once, not for each chunk
        logps = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        top, total = torch.empty_like(logps), torch.empty_like(logps)
        ctx.trainable = weight.requires_grad or (bias is not None and bias.requires_grad)
        dlogp_dh = torch.empty_like(hidden) if hidden.requires_grad and not ctx.trainable else None
        # One buffer for all chunks, and all arithmetic inside it: allocating would take longer than the arithmetic.
        buffer = hidden.new_empty(min(head.chunk_size, len(hidden)), len(weight), dtype=logps.dtype)
        exps = torch.empty_like(buffer) if on_chunk is not None and on_chunk.needs_logits else None
        assert exps is None or dlogp_dh is None, "the gradient overwrites the exponentials that on_chunk needs"
        for i in range(0, len(hidden) or 1, head.chunk_size):  # for no token too: `on_chunk` is called on every rank
            here, gradient = slice(i, i + head.chunk_size), None
            z = head.logits(hidden[here], buffer, (factor, bias))
            slope = None if dlogp_dh is None else head.slope(z)  # before exponentials overwrite z
            chunk = chunk_logps(z, targets[here], exps)
            logps[here], top[here], total[here] = chunk.logps, chunk.top, chunk.total
            if dlogp_dh is not None:
                gradient = head.times_weight(_logit_grad(chunk.exps, chunk.total, targets[here], slope), factor)
                dlogp_dh[here] = gradient  # rounded to the dtype of the hidden states
            if on_chunk:
                on_chunk(chunk, z, hidden[here], gradient)
        saved = (hidden, weight, bias, targets, top, total) if ctx.trainable else (dlogp_dh,)
        ctx.save_for_backward(*saved)
        return logps

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True; what is kept is a constant to autograd, so it would be wrong
            raise RuntimeError(NO_SECOND)
        if not ctx.trainable:
            (dlogp_dh,) = ctx.saved_tensors
            return (dlogp_dh * grad[:, None]).to(dlogp_dh.dtype), None, None, None, None
        (hidden, weight, bias, targets, top, total), head = ctx.saved_tensors, ctx.head
        factor = weight.bfloat16() if head.bf16 else weight
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=top.dtype)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=top.dtype)
        buffer = hidden.new_empty(min(head.chunk_size, len(hidden)), len(weight), dtype=top.dtype)
        for i in range(0, len(hidden), head.chunk_size):
            here = slice(i, i + head.chunk_size)
            z = head.logits(hidden[here], buffer, (factor, bias))
            slope = head.slope(z)
            exps = z.sub_(top[here, None]).exp_()
            dz = _logit_grad(exps, total[here], targets[here], slope).mul_(grad[here, None])
            d_hidden[here] = head.times_weight(dz, factor)
            if head.bf16:
                torch.addmm(d_weight, dz.bfloat16().T, hidden[here].bfloat16(), out_dtype=dz.dtype, out=d_weight)
            else:
                d_weight += dz.T @ hidden[here].to(dz.dtype)
            if d_bias is not None:
                d_bias += dz.sum(0)
        return d_hidden, d_weight.to(weight.dtype), d_bias, None, None


def sum_by_sequence(token_logps: Tensor, sequence_ids: Tensor, n_sequences: int) -> Tensor:
    """(N,), (N,) -> (S,): log pi(y|x) of each response, nats, float64. `sequence_ids` must not decrease."""
    # Not index_add: on CUDA it adds in any order, and a policy would differ from itself in the last bit.
    offsets = torch.searchsorted(sequence_ids, torch.arange(n_sequences + 1, device=sequence_ids.device))  # (S+1,)
    # unsafe: a check of the offsets would make the CPU wait for the GPU.
    return torch.segment_reduce(token_logps.double(), "sum", offsets=offsets, unsafe=True, initial=0.0)


class OneRank:
    """A rank that has its batch for itself: nothing is cut, collected or summed up. Where several ranks share one
    (--sequence_parallel_size), a class of model/ulysses.py is in its place."""

    rank, size = 0, 1
    shard = gather = sum = staticmethod(lambda whole: whole)


class SequenceLogProbs(nn.Module):
    """A causal language model that answers a batch with log-probabilities instead of logits."""

    def __init__(self, model: nn.Module, chunk_size: int = 0):
        """`model`: a transformers causal LM, bare or wrapped by PEFT. Raises ValueError where its output layer is not a
        plain linear one, as with an adapter on it."""
        super().__init__()
        self.model, self.parallel = model, OneRank()
        lm_head, config = model.get_output_embeddings(), model.config.get_text_config()  # PEFT hands both on
        if not isinstance(lm_head, nn.Linear):
            raise ValueError(f"the output layer must be a plain linear layer, found {type(lm_head).__name__}")
        # gemma and recurrent gemma cap their logits, cohere and falcon-h1 multiply and granite divides them.
        cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        scale = (getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
                 or 1 / (getattr(config, "logits_scaling", None) or 1))
        self.head = LogProbHead(lm_head, scale, cap, chunk_size)

    def states(self, batch) -> Tensor:
        """Batch -> (N, D): the hidden state that predicts each scored token, in its dtype or the head's wider one."""
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        # LoRA sits inside the base's layers, so it takes part. The output layer is not called: LogProbHead replaces it.
        # transformers hands keywords that it does not know down to attention: ours needs `segments`, others ignore it.
        extra = {} if batch.segments is None else {"position_ids": batch.position_ids, "segments": batch.segments}
        own = str(inner.config.get_text_config()._attn_implementation)
        if extra and not own.startswith("nanodpo_"):
            raise ValueError("a packed batch needs model.set_attn_implementation(attention.LOOP), of nanodpo.core")
        if inner.get_output_embeddings().weight is not self.head.weight:  # resized, tied or loaded in its place
            raise ValueError("the output layer has another weight than when SequenceLogProbs was made; make it anew")
        states = inner.base_model(input_ids=batch.input_ids, use_cache=False, **extra).last_hidden_state  # (B, T, D)
        scored = states.flatten(0, 1).index_select(0, batch.predictors)
        return scored.to(torch.promote_types(scored.dtype, self.head.weight.dtype))

    def token_logps(self, batch) -> Tensor:
        """Batch -> (N,): the log-prob of every scored token, nats, in the order of batch.targets."""
        here = self.parallel.shard(batch)
        return self.parallel.gather(self.head(self.states(here), here.targets))

    def forward(self, batch) -> Tensor:
        """Batch -> (S,): the summed log-prob of each response, nats, float64."""
        return sum_by_sequence(self.token_logps(batch), batch.sequence_ids, batch.n_sequences)
