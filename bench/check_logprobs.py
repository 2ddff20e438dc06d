"""Are the log-probs of real rows those of plain transformers? Two computations that share nothing but the weights.

    python bench/check_logprobs.py --model_name M --train_file_path pairs.parquet --max_length 1024

One side is score.py: its reader, its packed rows, its kernel. The other is pandas, one sequence a forward pass, full
logits, log_softmax and a sum, in this file. Takes the paper's Parquet with whole ChatML transcripts. Exit code 1 where
a summed log-prob differs by more than 1e-5 relative.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas
import torch

ROOT = Path(__file__).resolve().parent.parent
HEADER, END = "<|im_start|>assistant\n", "<|im_end|>"


def plain(model, tokenizer, file: str, max_length: int, rows: int) -> list[list[float]]:
    """[chosen, rejected] of each row, the long way."""
    table, out = pandas.read_parquet(file), []
    for transcripts in table[["text", "worse-text"]].itertuples(index=False):
        sums = []
        for transcript in transcripts:
            prompt = transcript[: transcript.rindex(HEADER) + len(HEADER)]
            whole = transcript[: transcript.rindex(END) + len(END)]
            ids = tokenizer(whole, return_tensors="pt", add_special_tokens=False).input_ids[:, :max_length]
            start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
            with torch.no_grad():
                logps = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
            sums.append(logps[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum().item())
        out.append(sums)
        print(f"row {len(out) - 1}: chosen {sums[0]:.4f}, rejected {sums[1]:.4f}", flush=True)
        if len(out) == rows:
            break
    return out


def ours(args) -> list[list[float]]:
    """The same by score.py, as a user calls it."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.parquet"
        pandas.read_parquet(args.train_file_path)[: args.rows].to_parquet(rows)
        subprocess.run([sys.executable, ROOT / "score.py", "--model_path", args.model_name, "--dataset_path", rows,
                        "--responses", "chosen", "rejected", "--max_length", str(args.max_length), "--overlong",
                        "truncate", "--output_dir", folder], check=True, stdout=subprocess.DEVNULL)
        table = pandas.read_parquet(Path(folder) / "scores.parquet")
    return table.pivot(index="row", columns="response", values="logps")[["chosen", "rejected"]].values.tolist()


def main() -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--train_file_path", required=True)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=10**9)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model_name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name)
    expected = plain(model, tokenizer, args.train_file_path, args.max_length, args.rows)
    expected, found = (torch.tensor(values, dtype=torch.float64) for values in (expected, ours(args)))
    error = ((found - expected) / expected).abs().max().item()
    print(f"{expected.numel()} responses, largest relative difference {error:.1e} (1e-5 allowed)")
    return int(error > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
