"""Measures how much of a model a rank holds under ZeRO-3, and how long its bytes take: read, hashed, saved.

    python bench/sharding.py                  a random Llama of 155M numbers in float32, on one CPU rank and on two
    python bench/sharding.py --loading        only until the model is read and hashed
    python bench/sharding.py --layers 24 --json FILE

Each rank runs train.py from its start through two steps, a checkpoint of LoRA and a state: `memory`, beside that of a
baseline, the same run on a model of 0.1M numbers. Then the whole model is trained on two ranks, so that checkpoint and
state are as large as they get: `seconds`.
Memory is a rank's anonymous memory (RssAnon), sampled every 5 ms, above that of its first sample. Not the resident set,
in which the pages of the file that is read count too, though the system takes them back when it needs them; and not
the holes that the C allocator leaves, which here returns blocks above --hole KiB. (With 1024 the first forward pass
leaves some 230 MiB of them, alone or in two ranks, which the later ones fill again.) DeepSpeed may keep gathered
weights between layers, up to 1e9 numbers by default: here few, so that what stays is what is shared.
"""

import argparse
import ctypes
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import faults
import measure

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"stage3_max_live_parameters": 10**6, "stage3_max_reuse_distance": 10**6, "stage3_prefetch_bucket_size": 10**6,
         "stage3_param_persistence_threshold": 10**4, "reduce_bucket_size": 10**6}
FLAGS = ("--max_steps", 2, "--resume_steps", 1, "--save_steps", 0, "--eval_steps", 0, "--draw", "false",
         "--per_device_train_batch_size", 1, "--warmup_steps", 0, "--lora_r", 4)
ROWS = '{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}\n' * 4  # short: weights are what is measured
SEVEN_B = {"reading": 30.5, "hashing": 30.5, "gathering": 30.5, "checkpoint": 30.5, "state": 91.4}  # GB, float32


def make(folder: Path, layers: int, width: int) -> int:
    """Writes a random Llama in bfloat16, as most are published, with the example's tokenizer; returns its bytes in
    float32, in which it is trained. (Weights that are stored as they are trained may stay in the file's pages.)"""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "piles" / "sft")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=8, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.002,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "rows.jsonl").write_text(ROWS)
    return sum(4 * p.numel() for p in model.parameters())


def rank(argv: list[str]) -> None:
    """A rank of a run: train.py's main with a clock on its parts, whose seconds go to a file beside the run. With
    --loading as the first argument it ends before the engine is made."""
    import safety

    import train
    from nanodpo.folder import checkpoint
    from nanodpo.model import loading
    from nanodpo.run import lifecycle

    seconds, loading_alone = {}, argv[0] == "--loading"
    for place, name, key in ((loading, "load_model", "reading"), (loading, "weights_hash", "hashing"),
                             (lifecycle, "save_checkpoint", "checkpoint"), (lifecycle, "save_state", "state"),
                             (checkpoint, "gather", "gathering")):
        safety.timed(place, name, seconds, key)
    if loading_alone:
        train.make_engine = lambda *_: sys.exit()
    train.main(argv[loading_alone:])
    run, number = Path(argv[argv.index("--output_dir") + 1]), os.environ["RANK"]
    run.with_suffix(f".{number}.json").write_text(json.dumps({part: max(each) for part, each in seconds.items()}))


def anonymous(pid: int) -> float:
    """MiB of a process's own memory; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")), 0.0)


def run(folder: Path, name: str, ranks: int, *more, model: str = "model", loading: bool = False) -> dict:
    """Peaks by rank, MiB above the start; and the seconds of each part, the slowest rank's. Raises RuntimeError, with
    the run's last words, where it fails."""
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3} | SMALL}))
    argv = [__file__, "--rank", *["--loading"] * loading, "--model_name", folder / model, "--train_file_path",
            folder / model / "rows.jsonl", "--output_dir", folder / name, "--cache_dir", folder / f"{name}-cache",
            "--deepspeed", folder / "zero3.json", *FLAGS, *more]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    log = folder / f"{name}.log"
    pids = [faults.fork([str(word) for word in argv], log, rank, ranks, port) for rank in range(ranks)]
    began, samples = [anonymous(pid) for pid in pids], [[] for _ in pids]
    while None in (codes := faults.ended(pids)):
        for pid, mine in zip(pids, samples):
            mine.append(anonymous(pid))
        time.sleep(0.005)
    if any(codes):
        raise RuntimeError(f"exit codes {codes}: {log.read_text()[-2000:]}")
    peaks = {"peaks_mib": [max(mine) - first for mine, first in zip(samples, began)]}
    if loading:
        return peaks
    parts = [json.loads((folder / f"{name}.{i}.json").read_text()) for i in range(ranks)]
    return peaks | {"seconds": {part: max(one.get(part, 0.0) for one in parts) for part in parts[0]}}


def show_seconds(full: dict, size: int) -> dict:
    """A table of what a run's parts took; returns seconds a GB."""
    rates = {part: seconds / (size * (3 if part == "state" else 1) / 1e9) for part, seconds in full["seconds"].items()}
    print(measure.table(["part", "seconds", "seconds a GB", "7B in float32, seconds (extrapolated, not measured)"], [
        [part, f"{full['seconds'][part]:.2f}", f"{rate:.2f}", f"{rate * SEVEN_B[part]:,.0f}"]
        for part, rate in rates.items()]))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--loading", action="store_true", help="only until the model is read and hashed")
    parser.add_argument("--hole", type=int, default=64, metavar="KIB", help="the largest block that may leave a hole")
    parser.add_argument("--json", help="default: bench/results/sharding.json")
    args = parser.parse_args()
    allocator = ctypes.CDLL(None)
    allocator.mallopt(-3, args.hole * 1024)  # M_MMAP_THRESHOLD, of the ranks too, which are forks
    faults.warm_up()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder / "small", 1, 64)
        size = make(folder / "model", args.layers, 1024)
        allocator.malloc_trim(0)  # what is free here would hide as much of what a rank takes
        found = {"model_mib": size / 2**20}
        for name in ("small", "model"):
            found[name] = {n: run(folder, f"{name}-{n}", n, model=name, loading=args.loading) for n in (1, 2)}
        above = {n: max(one["peaks_mib"]) - max(found["small"][n]["peaks_mib"]) for n, one in found["model"].items()}
        print(measure.table(["ranks", "peak of a rank, MiB above its start", "the baseline's", "difference / model"], [
            [n, *(", ".join(f"{peak:.0f}" for peak in found[name][n]["peaks_mib"]) for name in ("model", "small")),
             f"{above[n] / found['model_mib']:.2f}"] for n in above]))
        print(f"\na model of {found['model_mib']:.0f} MiB; a rank of two / one alone: {above[2] / above[1]:.2f}\n")
        if not args.loading:
            found["full"] = run(folder, "full", 2, "--lora_r", 0)
            found["seconds_a_gb"] = show_seconds(found["full"], size)
    measure.write("sharding", args.json, vars(args), found)


if __name__ == "__main__":
    # As a script ends, for who forked it.
    sys.exit(rank(sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main())
