"""Memory and disk: how much a run needs, and the error where there is not enough."""

import contextlib
import math
import shutil
from pathlib import Path

import torch

from ..core.logprobs import CHUNK_BYTES
from ..errors import RankStopped, UserError
from ..folder import card
from ..folder.atomic import nearest
from ..folder.resume import KEEP
from ..model.quantised import is_quantised, numel
from ..model.sharding import shape_of
from ..ranks.distributed import rank_and_world

ADVICE = ("a smaller --per_device_train_batch_size (with more --gradient_accumulation_steps), a smaller "
        "--activation_memory or --gradient_checkpointing, --bf16, a --max_length with --overlong, or a higher ZeRO "
        "stage or offloading in --deepspeed, or several ranks for a pair (--sequence_parallel_size)")
# The CPU's allocators raise a plain RuntimeError; cuBLAS and NCCL have memory, and messages, of their own.
SHORTAGE = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def shortage_named(rank: int, where: str, rows=None, advice: str = f"no update was made with it. It needs {ADVICE}"):
    """Raises RankStopped where the block runs out of memory. `where` names the block, `rows` returns the words for the
    rows that were too much, and `advice` says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, RankStopped) or not out_of_memory(error):
            raise
        raise RankStopped(f"rank {rank} ran out of memory in {where}{f' on {rows()}' if rows else ''}; {advice}"
                          ) from error


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in SHORTAGE)


def describe(examples) -> str:
    """"row 3 (prompt 12, chosen 40, rejected 38 tokens), row 7 (...)": the first few."""
    some = [f"row {e.row} (prompt {len(e.prompt)}, chosen {len(e.chosen)}"
            + (f", rejected {len(e.rejected)}" if e.rejected else "") + " tokens)" for e in examples[:16]]
    return ", ".join(some) + (f" and {len(examples) - 16} more" if len(examples) > 16 else "")


def disk_needed(model, args, tokenizer, steps: int) -> dict[str, int]:
    """Bytes by purpose: checkpoints (all that will stay), states to resume from, the merged model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if args.use_lora else list(model.parameters())
    weights = sum(numel(p) * p.element_size() for p in saved)
    whole = sum(numel(p) * ((2 if args.bf16 else 4) if is_quantised(p) else p.element_size())
                for p in model.parameters())
    extra = len(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else 0
    times = saves(args.save_steps, steps)
    kept = min(times, args.save_total_limit + 1) if args.save_total_limit else times  # one more while it is written
    log = 1000 * min(card.MOST, steps // args.logging_steps)  # bytes of trainer_state.json, which has some as much
    needs = {"checkpoints": (kept + 1) * (weights + extra) + kept * log, "the log": 1000 * steps}  # and checkpoint-0
    # The float32 weights and AdamW's two moments; two states stay and a third is being written, or all of them stay.
    states = max(KEEP + 1, kept_states(args.save_steps, args.resume_steps, steps) if args.keep_states else 0)
    needs["states to resume from"] = states * 12 * sum(map(numel, trained))
    return needs | ({"the merged model": whole + extra} if args.merge_weights else {})


def bytes_to_come(module, zero_stage: int) -> float:
    """Bytes that training will allocate beside a batch's activations: gradients in float32, AdamW's moments, the
    float32 gradient of a trained head while it is computed, and the bfloat16 copies of trained matrices that autocast
    keeps through a forward pass (not of LoRA's, nor of those that ZeRO-3 gathers)."""
    head, ranks = module.head.weight, rank_and_world()[1] if zero_stage else 1  # the moments are shared by the ranks
    trained = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
    copied = module.head.product_dtype and head.requires_grad and zero_stage < 3
    return trained * (4 + 8 / ranks + 2 * bool(copied)) + 8 * head.numel() * head.requires_grad


def memory_budget(device: torch.device, gib: float, reserved: float) -> float:
    """Bytes for activations: `gib` GiB, or, where that is -1, what the GPU has left beside the bytes `reserved`.

    A part stays free, since blocks of all sizes leave holes, and the head's chunks are not activations. What other
    processes hold, CUDA itself and NCCL, is not this run's to take.
    """
    if gib > 0:
        return gib * 2**30
    free, total = torch.cuda.mem_get_info(device)
    taken = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - taken  # blocks that the allocator has, and nothing is in
    return max(0.0, min(0.92 * total - taken, free - 0.04 * total) - reserved - 3 * CHUNK_BYTES)


def saves(every: int, steps: int) -> int:
    """How many checkpoints follow the first: one after every so many steps, and one after the last."""
    return -(-steps // every) if every else 1


def kept_states(save_steps: int, resume_steps: int, steps: int) -> int:
    """How many states a run leaves that keeps all: before each step but the first that one of the two divides."""
    every = [number for number in (save_steps, resume_steps) if number]
    both = (steps - 1) // math.lcm(*every) if len(every) == 2 else 0
    return sum((steps - 1) // number for number in every) - both


def check_disk(folder: Path, needs: dict[str, int]) -> None:
    """Raises UserError where the disk of `folder`, which may not exist yet, can't hold the rest of the run."""
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())  # of the run that is going on
    free, need = shutil.disk_usage(nearest(folder)).free, sum(needs.values()) - there
    if need > free:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in needs.items())
        raise UserError(f"--output_dir {folder}: the run needs {gib(need)} ({parts}), and {gib(free)} are free there; "
                        "save less often (--save_steps), keep fewer (--save_total_limit), or name another folder")


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def weight_bytes(model) -> int:
    return sum(shape_of(p).numel() * p.element_size() for p in model.parameters())


def estimate(engine, device, shards, peaks: list[float], seconds: float, needs: dict[str, int],
             reference: int = 0) -> str:
    """Lines for the screen after a dry run: memory, time and disk. `peaks`: GiB by rank; `shards`: the weights that
    this rank trains; `needs`: from `disk_needed`; `reference`: bytes of the model of --reference."""
    model = weight_bytes(engine.module)
    state = sum(p.numel() for p in shards)
    spread = " shared by all ranks" if engine.zero_optimization_stage() == 3 else ""
    # ZeRO has float32 weights of its own; without it AdamW's weights are the model's, and are counted there.
    of_adamw = f"float32 weights and AdamW's moments {gib(12 * state)}" if engine.zero_optimization_stage() else (
        f"AdamW's moments {gib(8 * state)}")
    rest = "activations" if device.type == "cuda" else "Python with its libraries, and activations"
    lines = [f"peak memory by rank: {', '.join(f'{peak:.2f}' for peak in peaks)} GiB, of which weights {gib(model)}"
             f"{spread}, {of_adamw}, gradients at least {gib(4 * state)}; the rest are {rest}"]
    if reference:
        lines.append(f"before the first step the reference's weights are there as well, {gib(reference)}{spread}; the "
                     "peak is of both")
    if device.type == "cuda":
        lines.append(f"the GPU has {gib(torch.cuda.get_device_properties(device).total_memory)}; CUDA itself, the "
                     "allocator's holes and, with several ranks, NCCL take some of it besides")
    lines.append(f"the longest micro-batch took {seconds:.2f} s, forward, backward and update")
    lines.append("disk: " + ", ".join(f"{name} {gib(size)}" for name, size in needs.items()))
    return "\n".join(lines)
