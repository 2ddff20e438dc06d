"""Ranks that share batches, in float64: sharing.py SIZE FAMILY ...; launched by test_ulysses.py. Prints "as one rank"
where all log-probs and gradients are those of plain transformers on one, and what part of the bytes that one rank keeps
for backward each of them keeps; else raises AssertionError."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_models import KeepDouble, naive_token_logps, random_groups, tiny

from nanodpo.core import attention
from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.packing import pack
from nanodpo.data.schedule import micro_batches_of
from nanodpo.model import layers, ulysses
from nanodpo.ranks import distributed

sys.path.insert(0, str(Path(__file__).parent / "core"))
CPU = torch.device("cpu")
# Prompts of one token and of many, and a long one whose first shards have nothing that is scored; of two ranks that
# have batches of their own each gets two. Lengths that no number of ranks divides.
GROUPS = random_groups(sizes=((9, [14, 5]), (61, [3, 2]), (1, [7, 7, 30]), (12, [24, 1])))


def model_of(family: str, lora: bool):
    model = tiny(family)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
                               autocast_adapter_dtype=False)
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, 0, 0.1)
    return model if lora else model.requires_grad_(True)


def loss_of(sums: torch.Tensor) -> torch.Tensor:
    """Of the responses of a prompt: not linear, so that a sum of the ranks' losses would be another one."""
    return -F.logsigmoid(0.1 * (sums[0] - sums[1:])).sum()


def gradients(model) -> dict:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check(family: str, lora: bool, size: int, name: str) -> None:
    rank, world = distributed.rank_and_world()
    model = model_of(family, lora)
    tokens = iter(naive_token_logps(model, GROUPS))
    truth = [[next(tokens) for _ in responses] for _, responses in GROUPS]
    sum(loss_of(torch.stack([tokens.sum() for tokens in group])) for group in truth).backward()
    expected = gradients(model)
    if lora:
        layers.fuse_lora(model)
    layers.keep_less(model)
    module = SequenceLogProbs(model, chunk_size=5)
    module.parallel = ulysses.ranks_of_a_batch(size)
    (model.get_base_model() if lora else model).set_attn_implementation(ulysses.shared(name, size))
    mine = micro_batches_of([*range(len(GROUPS))], 2, rank // size, world // size)
    for indices, factor in mine:
        batch = pack([GROUPS[i] for i in indices])
        tokens = module.token_logps(batch)
        assert (tokens - torch.cat([t for i in indices for t in truth[i]])).abs().max() < 1e-11, family
        sums = module(batch).split([len(GROUPS[i][1]) for i in indices])
        (factor * sum(map(loss_of, sums))).backward()
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) > 3
    for key, gradient in found.items():  # DeepSpeed's mean over ranks, times their number
        dist.all_reduce(gradient)
        assert (gradient - expected[key]).norm() <= 1e-10 * expected[key].norm() + 1e-13, (family, key)


def kept_bytes(model, size: int) -> int:
    """Of what this rank keeps for the backward pass of a batch: each storage once, without weights."""
    module, saved = SequenceLogProbs(model), {}
    module.parallel = ulysses.ranks_of_a_batch(size)
    model.set_attn_implementation(ulysses.shared(attention.LOOP, size) if size > 1 else attention.LOOP)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    batch = pack(random_groups(sizes=((64, [480, 480]),)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        module(batch)
    return sum(storage.nbytes() for place, storage in saved.items() if place not in weights)


def main() -> None:
    size, *families = sys.argv[1:]
    distributed.join_ranks(int(os.environ["LOCAL_RANK"]))
    from test_attention import slow_varlen

    attention.varlen_call = slow_varlen
    with KeepDouble():
        for family in families:
            for lora in (True, False):
                check(family, lora, int(size), attention.LOOP)
        check("llama", True, int(size), attention.VARLEN)
    model = tiny("llama", torch.float32).requires_grad_(True)
    layers.keep_less(model)
    whole, part = kept_bytes(model, 1), kept_bytes(model, int(size))
    distributed.say(f"as one rank, kept {part / whole:.4f}")
    distributed.leave()


if __name__ == "__main__":
    sys.exit(main())
