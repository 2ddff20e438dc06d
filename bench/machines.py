"""Lists the settings that train Qwen2.5's sizes on a few machines: counted, and nothing of it measured on a GPU.

    python bench/machines.py                the table of docs/gpu.md
    python bench/machines.py --lora_r 16    with another rank; --json FILE

For each machine, size and length of a pair (prompt, chosen and rejected together, in tokens) the table names the first
setting of SETTINGS that fits, with GiB by GPU. The arithmetic is that of nanodpo/run/memory.py and of `bench/gpu.py
--count`: weights in bfloat16, norms and LoRA in float32, LoRA's float32 twins, moments and gradients as the ZeRO stage
shares them, what backward keeps of a pair, and the head's chunks; 8% stay free. A GPU of 24 GB is taken to have 24e9
bytes. Layers' inputs are float32 with --bf16, which `--count` has not: they are added by hand.
"""

import argparse
import dataclasses
import functools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
import rows

MACHINES = [(1, 24), (1, 80), (4, 24), (4, 80), (8, 80)]  # GPUs, GB of each
PAIRS = [2_000, 20_000, 64_000]  # tokens
CHUNKS = 3 * 256 * 2**20  # the head's, as memory_budget sets them aside
LIVE = 2 * 10**9 + 2 * 5 * 10**7  # bytes that DeepSpeed's stage 3 may keep gathered or fetch ahead by default, bfloat16
BUCKET = 4 * 2 * 10**7  # reduce_bucket_size as train.py sets it


def qwen(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool = False) -> dict:
    return rows.QWEN_7B | {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
                          "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary,
                          "tie_word_embeddings": tied}


SIZES = {"0.5B": qwen(896, 4864, 24, 14, 2, 151_936, True), "7B": rows.QWEN_7B,
         "14B": qwen(5120, 13_824, 48, 40, 8, 152_064), "32B": qwen(5120, 27_648, 64, 40, 8, 152_064)}


@dataclasses.dataclass
class Setting:
    """A way to train: the ZeRO stage, what backward keeps of each layer, and what else makes room."""

    words: str  # flags, beside --bf16
    stage: int = 2
    keeps: str = "keep"
    bits: int = 16  # of the base's matrices
    split: bool = False  # a pair among all GPUs
    offload: bool = False  # weights and optimizer wait in the CPU's memory

    @property
    def name(self) -> str:
        return f"stage {self.stage}{', ' * bool(self.words)}{self.words}"


NEED, AGAIN = "`--activation_memory -1`", "`--gradient_checkpointing`"
SPLIT, BITS = "`--sequence_parallel_size {gpus}`", "`--load_in_4bit`"
# From the fastest to the one that needs the least.
SETTINGS = [
    Setting(""), Setting(NEED, keeps="full"), Setting(f"{NEED}, inputs offloaded", keeps="offload"),
    Setting(AGAIN, stage=3, keeps="full"),
    Setting(f"{NEED}, {SPLIT}", keeps="offload", split=True),
    Setting(f"{AGAIN}, {SPLIT}", stage=3, keeps="full", split=True),
    Setting(f"{BITS}, {NEED}", keeps="full", bits=4),
    Setting(f"{BITS}, {NEED}, inputs offloaded", keeps="offload", bits=4),
    Setting(f"{BITS}, {NEED}, {SPLIT}", keeps="offload", bits=4, split=True),
    Setting(f"{AGAIN}, offload_param and offload_optimizer to cpu", stage=3, keeps="full", offload=True),
    Setting(f"{AGAIN}, {SPLIT}, offload_param and offload_optimizer to cpu", stage=3, keeps="full", split=True,
            offload=True)]


@dataclasses.dataclass
class Numbers:
    """Of a model: how many numbers its layers' matrices, embeddings, vectors and LoRA have, and bytes that a token
    takes."""

    matrices: int
    embeddings: int
    vectors: int
    lora: int
    per_token: dict[str, float]
    hidden: int
    layers: int
    heads: int


@functools.cache
def numbers(size: str, rank: int) -> Numbers:
    """Counted on tensors that have a shape and no data."""
    shape = SIZES[size]
    model, chosen, _ = rows.sized(shape, rank)
    sizes = rows.by_mode(chosen, shape)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    ends = sum(p.numel() for name, p in frozen.items() if "embed_tokens" in name or "lm_head" in name)
    vectors = sum(p.numel() for p in frozen.values() if p.ndim < 2)
    inputs = 2 * shape["hidden_size"] * shape["num_hidden_layers"]
    kept = sizes | {"full": sizes["full"] + inputs}  # 4 bytes a number in place of the 2 that were counted
    return Numbers(sum(p.numel() for p in frozen.values()) - ends - vectors, ends, vectors,
                   sum(p.numel() for p in model.parameters() if p.requires_grad), kept,
                   shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"])


def bytes_beside(n: Numbers, setting: Setting, gpus: int) -> float:
    """On a GPU beside any pair: weights, what trains them, the head's chunks."""
    base = n.matrices * (2 if setting.bits == 16 else 0.516) + 2 * n.embeddings + 4 * n.vectors  # NF4, double quantised
    if setting.stage == 3:
        live = min(LIVE, base)
        shared = 0 if setting.offload else (base + (4 + 12 + 4) * n.lora) / gpus
        return shared + live + BUCKET + CHUNKS
    return base + 4 * n.lora + (12 + 4) * n.lora / gpus + BUCKET + CHUNKS


def needed(n: Numbers, setting: Setting, gpus: int, pair: int) -> float:
    """Bytes on each GPU."""
    return bytes_beside(n, setting, gpus) + n.per_token[setting.keeps] * pair / (gpus if setting.split else 1)


def waiting(n: Numbers, tokens: float) -> int:
    """Bytes of the CPU's memory on each rank for the layers' inputs of so many tokens: float32, each rounded up to a
    power of two, as PyTorch does with pinned memory."""
    return n.layers * 2 ** math.ceil(math.log2(4 * n.hidden * tokens))


def fits(n: Numbers, setting: Setting, gpus: int, gb: int, pair: int) -> float | None:
    """GiB on each GPU, or None where they are more than it has, but for 8%."""
    need = needed(n, setting, gpus, pair)
    return need / 2**30 if need <= 0.92 * gb * 1e9 else None


def cell(n: Numbers, gpus: int, gb: int, pair: int) -> str:
    """The first setting that fits, and its GiB."""
    settings = [s for s in SETTINGS if gpus > 1 or not (s.split or (s.stage == 3 and not s.offload))]
    settings = [s for s in settings if not s.split or n.heads % gpus == 0]  # each rank has as many heads
    for setting in settings:
        if need := fits(n, setting, gpus, gb, pair):
            tokens = pair / (gpus if setting.split else 1)
            waits = waiting(n, tokens) / 2**30 if setting.keeps == "offload" else 0
            cpu = f", and {waits:.0f} of the CPU's a rank" * (waits >= 1)
            return f"{setting.name.format(gpus=gpus)}: {need:.0f} GiB{cpu}"
    least = min(needed(n, setting, gpus, pair) for setting in settings)
    return f"does not fit: {least / 2**30:.0f} GiB at the least; more GPUs with {SPLIT.format(gpus='N')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora_r", type=int, default=64)
    parser.add_argument("--json", help="default: bench/results/machines.json")
    args = parser.parse_args()
    table = [[f"{gpus} x {gb} GB", size, *(cell(numbers(size, args.lora_r), gpus, gb, pair) for pair in PAIRS)]
             for gpus, gb in MACHINES for size in SIZES]
    print(measure.table(["machine", "model", *(f"pair of {pair:,} tokens" for pair in PAIRS)], table))
    measure.write("machines", args.json, vars(args), {"counted": table})


if __name__ == "__main__":
    main()
