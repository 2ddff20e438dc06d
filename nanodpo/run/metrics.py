"""The metrics of a step: means over all its pairs, on all ranks and in all micro-batches, every pair once.

Names are TRL's where TRL has one. Shapes: P pairs. Per-pair values are (P,) float64; a metric of a step is their mean
over its pairs:

    loss                     dpo, ipo ...: the mean over pairs; sft: -log pi per token, over all tokens of the step
    rewards/chosen           beta * (logps - ref_logps) of the chosen response, nats; rewards/rejected likewise
    rewards/margins          rewards/chosen - rewards/rejected
    rewards/accuracies       share of pairs with a margin above 0; a tie counts as 0
    rewards/ties             share of pairs with a margin of exactly 0; usually all at step 0, without --reference
    logps/chosen             log pi(y|x) summed over the tokens of the response, nats; logps/rejected likewise
    logps_per_token/chosen   each pair's logps/chosen divided by its tokens, the end of turn included; .../rejected
    ref_logps/chosen         the reference's sum, as logps/chosen; ref_logps/rejected likewise
    ref_logps_per_token/chosen  as logps_per_token/chosen: their difference is how far pi moved; .../rejected likewise
    weights/chosen           -dL/dchosen, per nat: how hard a pair pushes chosen up; weights/rejected: dL/drejected

    entropy                  -sum p log p of the next token, nats: mean over all tokens of the responses
    mean_token_accuracy      share of chosen's tokens that the model finds likeliest

In training, entropy is there with LoRA, unless the output layer has a bias, the model caps its logits, or a GPU
computes in bfloat16 (TokenMetrics says why). An evaluation has both, except at step 0 of a run that begins as its
reference: it takes the reference's log-probs there, and makes no pass.

Where the data have a column `weight`, the loss alone is a weighted mean; L above is the loss of --loss with the term of
--sft_weight, not yet times this weight. With --without_rows the loss alone lacks the terms of these rows: it is the sum
of the others, divided as if none were missing. All other metrics are of all pairs, so that they can be compared with
those of a run with these rows.

SFT has no reference, hence no rewards and ref_logps, and trains on chosen alone: only its eval_ lines have rejected,
and its entropy is of chosen in both.
A loss that takes no ref_... has no reference either. Its rewards are beta * logps for cpo, and beta * logps_per_token
for simpo and orpo; a function of the user's own has none then.

A line of metrics.jsonl has besides

    step                     the update's number, from 0; its numbers are those under the weights of checkpoint-<step>
    epoch                    passes over the training data at the beginning of the step
    grad_norm                of the whole step's gradient, over all ranks and before clipping
    learning_rate            of this step's update
    num_tokens               prompts and responses seen so far, this step's included, all ranks; a shared prompt once
    skipped_steps            updates that were left out up to and including this one, see --skip_nonfinite
    perf/step_seconds        of the whole step with its update, on rank 0; without evaluation and saving
    perf/tokens_per_second   this step's part of num_tokens by step_seconds
    mem/peak_gib             rank 0's peak so far: what torch had allocated on the GPU, or the process's memory on CPU

Lines of an evaluation have step, epoch and the means above as eval_<name>, over the whole held-out set under
checkpoint-<step>'s weights. Values that are not finite, those of a step that was left out, are absent.
"""

import resource
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.logprobs import sum_by_sequence
from ..core.losses import pair_weights, rewards_without_reference
from ..core.packing import Batch
from ..data.example import SIDES
from ..ranks.distributed import sum_over_ranks

# Where a logit minus the largest may be -inf, this stands for it: its exp is 0, and 0 times it is 0 where 0 times -inf
# would be NaN.
LOWEST = -1e4


def pair_metrics(loss: Callable, logps: Tensor, ref: Tensor | None, lengths: Tensor, beta: float,
                 sft_weight: float = 0.0) -> dict[str, Tensor]:
    """(P, R) summed log-probs, nats, and lengths in tokens -> (P,) values by name, without gradients.

    R is 2, chosen and rejected, or 1 for SFT data without rejected. `ref` is (P, 2), the reference's sums, or None.
    `loss` and `sft_weight` are those of pair_losses.
    """
    values, logps = {}, logps.detach()
    for side, sums, counts in zip(SIDES, logps.unbind(1), lengths.unbind(1)):
        values |= {f"logps/{side}": sums, f"logps_per_token/{side}": sums / counts}
    rewards = rewards_without_reference(loss, logps, lengths, beta) if ref is None else beta * (logps - ref)
    if rewards is not None:
        margins = rewards[:, 0] - rewards[:, 1]
        values |= {"rewards/chosen": rewards[:, 0], "rewards/rejected": rewards[:, 1], "rewards/margins": margins,
                   "rewards/accuracies": (margins > 0).double(), "rewards/ties": (margins == 0).double()}
    if ref is not None:
        values |= {"ref_logps/chosen": ref[:, 0], "ref_logps/rejected": ref[:, 1],
                   "ref_logps_per_token/chosen": ref[:, 0] / lengths[:, 0],
                   "ref_logps_per_token/rejected": ref[:, 1] / lengths[:, 1]}
    weights = pair_weights(loss, logps, ref, lengths, sft_weight)
    if weights.shape[1] == 2:  # where the loss takes chosen alone they are no metric
        values |= {"weights/chosen": weights[:, 0], "weights/rejected": weights[:, 1]}
    return values


class TokenMetrics:
    """Entropy and accuracy of the tokens that a LogProbHead scores, whose `on_chunk` it is: the head calls it with each
    chunk of tokens, `take` then returns what was gathered.

    In training the entropy comes from the gradient that the kernel keeps. Let z = W h be the logits, and E the mean
    over the vocabulary under p. Then d log p(y) / dh = W[y] - E[W], hence h . (d log p(y) / dh) = z[y] - E[z]; and
    since log p(y) = z[y] - logsumexp(z),

        entropy = logsumexp(z) - E[z] = h . (d log p(y) / dh) - log p(y)

    which takes N * D multiplications. A head that is trained keeps no such gradient, one with a cap or a bias is not
    linear, and a GPU's product in bfloat16 rounds it: there, entropy is of evaluations alone, which with `needs_logits`
    sum over the vocabulary.
    """

    def __init__(self, module, needs_logits: bool = False):
        """`module` is a SequenceLogProbs. `needs_logits`: the head keeps a chunk's logits for it."""
        self.needs_logits, self.gather, self.parts = needs_logits, module.parallel.gather, []
        self.linear = module.head.cap is None and module.head.bias is None

    def __call__(self, chunk, z: Tensor, hidden: Tensor, d_hidden: Tensor | None) -> None:
        """`z`: logits minus the largest, where it needs them; `d_hidden`: the gradient of the log-probs with respect to
        the hidden states, where there is one."""
        found = {"mean_token_accuracy": chunk.behind == 0}
        if self.needs_logits:
            # logsumexp(z) - E[z], which stays as it is where one number, the largest logit, is taken from all z.
            mean = torch.linalg.vecdot(chunk.exps, z.clamp_(min=LOWEST)) / chunk.total
            found["entropy"] = chunk.total.log() - mean
        elif d_hidden is not None and self.linear and d_hidden.dtype != torch.bfloat16:
            # In float64: products of both signs, of which the sum may be small beside them.
            found["entropy"] = (hidden.double() * d_hidden).sum(1) - chunk.logps
        self.parts.append(found)

    def take(self, batch: Batch, index: Tensor, lengths: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each pair, (P,) sums and (P,) numbers of tokens summed over, for `Meter`: entropies of the responses in
        `index`, hits of chosen alone, as in TRL. `batch` and `index` are those of make_batch, `lengths` of pair_lengths
        (core/packing.py)."""
        # There is a part even where this rank has no scored token: `gather` is work of all ranks.
        parts, self.parts = self.parts, []
        values = {name: self.gather(torch.cat([part[name] for part in parts])) for name in parts[0]}
        sums = {name: sum_by_sequence(values[name], batch.sequence_ids, batch.n_sequences)[index] for name in values}
        found = {"mean_token_accuracy": (sums["mean_token_accuracy"][:, 0], lengths[:, 0])}
        return found | ({"entropy": (sums["entropy"].sum(1), lengths.sum(1))} if "entropy" in sums else {})


class Meter:
    """Adds up the values of micro-batches; `means` sums them over the ranks, once a step."""

    def __init__(self, device: torch.device):
        self.device, self.sums, self.counts = device, {}, {}

    def add(self, values: dict[str, Tensor | tuple[Tensor, Tensor]], factor: float) -> None:
        """(P,) values by name; of a mean over tokens (P,) sums and (P,) numbers of tokens. `factor` is 1, or 0 for a
        micro-batch that is a repeat (data/schedule.py)."""
        for name, value in values.items():  # the factor is in both sums, so a repeat changes no mean
            value, count = (value[0], value[1].sum()) if isinstance(value, tuple) else (value, len(value))
            self.sums[name] = self.sums.get(name, 0.0) + factor * value.sum()
            self.counts[name] = self.counts.get(name, 0.0) + factor * count

    def means(self) -> dict[str, float]:
        """Every name's mean over the pairs of all ranks, or over their tokens. The same on every rank."""
        # All names in one sum over the ranks: one wait for the others, and for the GPU, however many metrics there are.
        both = [torch.as_tensor(value, dtype=torch.float64, device=self.device)
                for values in (self.sums, self.counts) for value in values.values()]
        sums, counts = sum_over_ranks(torch.stack(both)).view(2, -1).tolist()
        return {name: total / count for name, total, count in zip(self.sums, sums, counts)}


def peak_gib(device: torch.device) -> float:
    """Peak memory of this rank so far, GiB: of the GPU, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts it in KiB
