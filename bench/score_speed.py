"""How fast is score.py beside one plain forward pass a response? The same checkpoints, rows and responses for both.

    python bench/score_speed.py --model_name M --train_file_path pairs.parquet [--checkpoints 10] [--rows 40]
        [--shots 4]

Makes LoRA checkpoints with random weights on M and scores five responses of each row under each of them: once with the
plain code that one writes first (open the base, put the adapter on, a forward pass a response, full logits,
log_softmax), once with score.py as it is, measures and tables included. Without arguments it takes the example. Checks
that both give the same log-probs, to 1e-5, then prints both times, less start-up, and how many times more tokens the
plain code goes through: all that sharing a prompt can save, where arithmetic is what takes the time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
KINDS = ["chosen", "rejected", "other", "shuffled", "relevant-question"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default=str(ROOT / "examples" / "piles" / "sft"))
    parser.add_argument("--train_file_path", default=str(ROOT / "examples" / "piles" / "test.parquet"))
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--shots", type=int, default=0, help="solved rows that stand before each question")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=1024, help="tokens; longer sequences are cut")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with_shots(pandas.read_parquet(args.train_file_path), args).to_parquet(folder / "rows.parquet")
        adapters = make_adapters(args, folder)
        groups = responses(args, folder)
        plain, ours = [], []
        for i in range(args.rounds):  # interleaved, so that a busy minute hits both
            plain.append(plainly(args, adapters, groups))
            ours.append(by_score(args, adapters, folder / f"out-{i}", folder))
        error = compare(plain[0][1], folder / "out-0" / "scores.parquet")
        times = [sorted(run[0] for run in runs)[args.rounds // 2] for runs in (plain, ours)]
    record = {"checkpoints": args.checkpoints, "rows": args.rows, "responses": len(KINDS), "shots": args.shots,
              "plain_seconds": times[0], "score_seconds": times[1], "ratio": times[0] / times[1],
              "ratio_of_tokens": ratio_of_tokens(groups), "largest_relative_difference": error,
              "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(record, indent=1))
    return int(error > 1e-5)


def with_shots(table: pandas.DataFrame, args) -> pandas.DataFrame:
    """The first rows, each after the transcripts of so many of the rows behind them."""
    rows, behind = table[: args.rows].copy(), table["text"][args.rows :].tolist()
    shots = ["".join(behind[(i + k) % len(behind)] for k in range(args.shots)) for i in range(len(rows))]
    for column in ("text", "worse-text"):
        rows[column] = [before + text for before, text in zip(shots, rows[column])]
    return rows


def ratio_of_tokens(groups: list) -> float:
    """Of a pass a response, and of one in which a prompt stands once."""
    plain = sum(len(prompt) + len(ids) for _, _, prompt, ids in groups)
    prompts = {row: len(prompt) for row, _, prompt, _ in groups}
    return plain / (sum(prompts.values()) + sum(len(ids) for *_, ids in groups))


def make_adapters(args, folder: Path) -> list[Path]:
    """LoRA checkpoints as train.py leaves them, each with its tokenizer, B drawn anew."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.model_name, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(Path(args.model_name).resolve())
    made = []
    for i in range(args.checkpoints):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        made.append(folder / f"adapter-{i}")
        model.save_pretrained(made[-1])
        AutoTokenizer.from_pretrained(args.model_name).save_pretrained(made[-1])
    return made


def responses(args, folder: Path) -> list:
    """(row, kind, prompt ids, response ids), as nanodpo reads and draws them: what both sides then score."""
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    from nanodpo.data.template import read_template
    from nanodpo.data.tokens import load_dataset
    from nanodpo.scoring.responses import make_groups
    from nanodpo.scoring.runs import DEFAULTS

    tokenizer = AutoTokenizer.from_pretrained(args.model_name)
    settings = SimpleNamespace(**DEFAULTS | {"overlong": "truncate"})
    data = load_dataset(str(folder / "rows.parquet"), read_template(tokenizer), settings, args.max_length, pairs=False,
                        more=("relevant-question",))
    groups = make_groups(data.examples, KINDS, 42, args.max_length)
    return [(e.row, kind, prompt, ids)
            for e, (prompt, said) in zip(data.examples, groups) for kind, ids in said.items()]


@torch.no_grad()
def plainly(args, adapters: list[Path], groups: list) -> tuple[float, dict]:
    """(seconds, {(adapter, row, kind): log-prob}); the clock starts when everything is imported."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found, began = {}, time.perf_counter()
    for adapter in adapters:
        model = AutoModelForCausalLM.from_pretrained(args.model_name, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapter).eval()
        for row, kind, prompt, ids in groups:
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logps = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
            found[adapter.name, row, kind] = logps.double().sum().item()
    return time.perf_counter() - began, found


def by_score(args, adapters: list[Path], out: Path, folder: Path) -> tuple[float, None]:
    """Seconds of score.py's own work in a process of its own, from its last import to its last file."""
    code = ("import sys, time, transformers, peft, datasets, score, nanodpo.model.selfcheck, nanodpo.figures.drawing; "
            "began = time.perf_counter(); "
            "score.main(sys.argv[1:]); print('seconds', time.perf_counter() - began)")
    done = subprocess.run([sys.executable, "-c", code, *map(str, adapters), "--dataset_path",
                           f"d={folder / 'rows.parquet'}", "--responses", *KINDS, "--output_dir", str(out),
                           "--max_length", str(args.max_length), "--overlong", "truncate"],
                          capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1]), None


def compare(truth: dict, file: Path) -> float:
    table = pandas.read_parquet(file)
    assert len(table) == len(truth)
    return max(abs(logps / truth[run, row, kind] - 1)
               for run, row, kind, logps in table[["run", "row", "response", "logps"]].itertuples(index=False))


if __name__ == "__main__":
    sys.exit(main())
