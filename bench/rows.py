"""Qwen2.5-7B's shape, counted without a GPU: pairs of reasoning traces, their matrix products, what a row of them keeps
in memory. For gpu.py, which measures the same, and machines.py.

The lengths are those of reasoning traces: median 2.4k tokens a sequence, 95th percentile 8k, longest 14k, then a pair
of 20k; prompts are 5%.
"""

import collections
import functools
import math
import statistics

import contenders
import measure
import torch

QWEN_7B = {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 2**17, "rope_theta": 1e6,
           "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOY = contenders.tiny_wide(vocabulary=1000)
MEDIAN, PERCENTILE_95, LONGEST = 2400, 8000, 14_000



def length_mix(count: int, scale: float, longest: int = LONGEST) -> list[int]:
    """`count` sequence lengths, evenly spaced quantiles of a log-normal through median and 95th percentile."""
    normal, spread = statistics.NormalDist(), math.log(PERCENTILE_95 / MEDIAN) / 1.645
    lengths = [MEDIAN * math.exp(spread * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    return [max(8, round(scale * length)) for length in [*lengths[:-1], longest]]


def mixed_pairs(count: int, vocabulary: int, scale: float) -> list[contenders.Pair]:
    """Chosen and rejected are of like length: padding a pair to its longer side costs 36%, as with real traces. The
    last pair has 20k tokens a side."""
    draw = torch.Generator().manual_seed(0)
    rank = torch.randperm(count, generator=draw)
    near = (rank + count / 2 * torch.randn(count, generator=draw)).argsort().argsort()
    sides = [[length_mix(count, scale)[i] for i in ranks] for ranks in (rank, near)]
    lengths = [*zip(*sides), (round(20_000 * scale),) * 2]
    ids = torch.randint(vocabulary, (max(map(sum, lengths)),), generator=draw).tolist()
    pairs = []
    for a, b in lengths:
        prompt = max(1, round(0.05 * min(a, b)))
        pairs.append((ids[:prompt], ids[prompt:a], ids[a : a + b - prompt]))
    return pairs


def tokens_of(pair: contenders.Pair) -> int:
    """Of both sequences, each with the prompt."""
    return 2 * len(pair[0]) + len(pair[1]) + len(pair[2])


def flops(name: str, pair: contenders.Pair, shape: dict, rank: int, modes: dict[str, int]) -> float:
    """Of the matmuls that a contender does for a pair: recomputation and padding counted, elementwise work not.

    A frozen weight costs 2 FLOPs a token forward and 2 backward, a trained one 2 and 4; full recomputation is a
    forward more. Attention is 4 T^2/2 D forward, 2.5 times that backward. TRL's head computes the logits again in
    backward. `modes`: how many layers keep what.
    """
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sides = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, inner)] * 3
    base, lora = sum(a * b for a, b in sides), sum(rank * (a + b) for a, b in sides)
    prompt, *responses = (len(ids) for ids in pair)
    lengths = [prompt + response for response in responses]
    if name == "trl":
        lengths = [max(lengths)] * 2
    tokens = sum(lengths) - (prompt if name == "nanodpo" else 0)
    attention = sum(4 * n * n / 2 * hidden for n in lengths)
    forward = tokens * 2 * (base + lora) + attention  # of a layer
    backward = tokens * (2 * base + 4 * lora) + 2.5 * attention
    head = 2 * hidden * shape["vocab_size"] * sum(responses) * (3 if name == "trl" else 2)
    again = {"keep": 0, "full": forward, "offload": forward}
    return layers * (forward + backward) + sum(count * again[mode] for mode, count in modes.items()) + head


def sized(shape: dict, rank: int, gib: float = 0.0):
    """(the model, its FitToMemory for so many GiB, bytes that stand beside any row), counted on tensors that have a
    shape and no data, with the attention that runs on a GPU. Beside the row stand the weights in bfloat16, and of LoRA
    twins in float32, moments and gradients."""
    from nanodpo.core.attention import VARLEN
    from nanodpo.core.logprobs import SequenceLogProbs
    from nanodpo.model.layers import fuse_lora, keep_less
    from nanodpo.model.recompute import FitToMemory, Recompute, sample_batch

    model = contenders.adapted(contenders.Work([], shape, rank=rank, device="meta", dtype=torch.bfloat16))
    fuse_lora(model)
    keep_less(model)
    model.get_base_model().set_attn_implementation(VARLEN)
    weights = sum(p.numel() * (18 if p.requires_grad else 2) for p in model.parameters())
    rows = functools.partial(sample_batch, "packed", model.config, torch.device("meta"))
    return model, FitToMemory(Recompute(model), SequenceLogProbs(model), rows, gib * 0.92 * 2**30 - weights), weights


def by_mode(chosen, shape: dict) -> dict[str, float]:
    """Bytes a token by mode, from `sized`. A copy on the CPU can't be made of what has no data: the layers' inputs by
    hand."""
    return chosen.per_token | {"offload": chosen.per_token["full"] - 2 * shape["hidden_size"] *
                               shape["num_hidden_layers"]}


def count(shape: dict, rank: int, gib: float, pairs: list[contenders.Pair]) -> dict:
    """Bytes that stand beside any row; by mode bytes that a token takes in forward and backward pass, and the longest
    row that so many GiB allow; and the matmuls of these pairs, by contender, over what they are where all is kept."""
    _, chosen, weights = sized(shape, rank, gib)
    layers, matmuls = shape["num_hidden_layers"], {}
    for name, mode, modes in (("nanodpo", "keep", None), ("nanodpo", "by need", chosen.modes),
                              ("nanodpo", "full", None), ("trl", "full", None)):
        each = [modes(sum(map(len, pair))) if modes else [mode] * layers for pair in pairs]
        matmuls[f"{name}, {mode}"] = sum(flops(name, pair, shape, rank, collections.Counter(by_layer))
                                         for pair, by_layer in zip(pairs, each))
    return {"beside_any_row": weights, "matmuls": {name: n / matmuls["nanodpo, keep"] for name, n in matmuls.items()},
            "rows": {mode: {"bytes_per_token": n, "longest_row": int(chosen.budget / n)}
                     for mode, n in by_mode(chosen, shape).items()}}


def show_count(args) -> None:
    """A table of `count`, and its record."""
    shape, rank, gib = (TOY, 8, 1 / 64) if args.toy else (QWEN_7B, 256, 80e9 / 2**30)
    *mix, _ = mixed_pairs(args.pairs, shape["vocab_size"], 0.01 if args.toy else 1.0)
    found = count(shape, rank, gib, mix)
    print(measure.table(["recomputes", "KiB a token", "longest row, tokens"], [
        [mode, f"{one['bytes_per_token'] / 1024:,.0f}", f"{one['longest_row']:,}"]
        for mode, one in found["rows"].items()]))
    print(f"\nbeside any row: {found['beside_any_row'] / 2**30:.1f} GiB of weights, LoRA's twins, moments and "
          "gradients\nmatmuls of the mix:", {name: round(n, 2) for name, n in found["matmuls"].items()})
    measure.write("gpu-count", args.json, vars(args), found)
