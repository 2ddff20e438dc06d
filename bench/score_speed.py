"""How fast is score.py beside what one would take instead? The same checkpoints, rows and responses for all.

    python bench/score_speed.py --model_name M --train_file_path pairs.parquet [--checkpoints 10] [--rows 40]
        [--shots 4] [--responses chosen rejected] [--bf16]

Makes LoRA checkpoints with random weights on M and scores some responses of each row under each of them: with the
plain code that one writes first (open the base, put the adapter on, a forward pass a response, full logits,
log_softmax); with lm-eval's `loglikelihood` where it is installed (pip install lm_eval); and with score.py as it is,
measures and tables included. Loading the checkpoints is part of all times, imports are part of none. The floor is the
time of the matrix products alone that any program needs which passes each prompt once. Without arguments it takes the
example.

Checks that all give the same log-probs, to 1e-5 (not with --bf16), and prints how many times more tokens a pass a
response goes through: all that sharing a prompt can save, where arithmetic is what takes the time.
"""

import argparse
import importlib.util
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
sys.path.insert(0, str(ROOT / "bench"))
import measure  # noqa: E402

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
    parser.add_argument("--responses", nargs="+", default=KINDS, choices=KINDS, help="of each row; default: all five")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 for all, each in its own way")
    args = parser.parse_args()
    ways = {"plain": plainly, "lm_eval": by_lm_eval, "score.py": by_score, "floor": products_alone}
    if not importlib.util.find_spec("lm_eval"):
        del ways["lm_eval"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with_shots(pandas.read_parquet(args.train_file_path), args).to_parquet(folder / "rows.parquet")
        adapters, groups = make_adapters(args, folder), responses(args, folder)
        seconds, found = {way: [] for way in ways}, {}
        for _ in range(args.rounds):  # in turns, so that a busy minute hits all
            for way, score in ways.items():
                took, found[way] = score(args, adapters, groups, folder)
                seconds[way].append(took)
    errors = {way: largest_difference(found["plain"], found[way]) for way in ways if found[way]}
    middle = {way: sorted(times)[args.rounds // 2] for way, times in seconds.items()}
    record = {**vars(args), "tokens": ratio_of_tokens(groups), "seconds": seconds,
              "of_score": {way: middle[way] / middle["score.py"] for way in ways},
              "largest_relative_difference": errors, **measure.machine()}
    print(json.dumps(record, indent=1))
    return int(not args.bf16 and max(errors.values()) > 1e-5)


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
    from nanodpo.scoring.recorded import BARE_MODEL
    from nanodpo.scoring.responses import make_groups

    tokenizer = AutoTokenizer.from_pretrained(args.model_name)
    settings = SimpleNamespace(**BARE_MODEL | {"overlong": "truncate"})
    data = load_dataset(str(folder / "rows.parquet"), read_template(tokenizer), settings, args.max_length, pairs=False,
                        more=("relevant-question",))
    groups = make_groups(data.examples, args.responses, 42, args.max_length)
    return [(e.row, kind, prompt, ids)
            for e, (prompt, said) in zip(data.examples, groups) for kind, ids in said.items()]


def dtype(args) -> torch.dtype:
    return torch.bfloat16 if args.bf16 else torch.float32


@torch.no_grad()
def plainly(args, adapters: list[Path], groups: list, folder: Path) -> tuple[float, dict]:
    """(seconds, {(adapter, row, kind): log-prob}); the clock starts when everything is imported."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found, began = {}, time.perf_counter()
    for adapter in adapters:
        model = AutoModelForCausalLM.from_pretrained(args.model_name, dtype=dtype(args))
        model = PeftModel.from_pretrained(model, adapter).eval()
        for row, kind, prompt, ids in groups:
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
            logps = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
            found[adapter.name, row, kind] = logps.double().sum().item()
    return time.perf_counter() - began, found


def by_lm_eval(args, adapters: list[Path], groups: list, folder: Path) -> tuple[float, dict]:
    """The same by lm-eval, at its defaults, from token ids."""
    import logging

    from lm_eval.models.huggingface import HFLM

    logging.disable(logging.WARNING)
    found, began = {}, time.perf_counter()
    for adapter in adapters:
        model = HFLM(args.model_name, peft=str(adapter), dtype=dtype(args), device="cpu", batch_size=1)
        asked = [(("", str(i)), prompt, ids) for i, (*_, prompt, ids) in enumerate(groups)]
        for (row, kind, *_), (logps, _) in zip(groups, model._loglikelihood_tokens(asked, disable_tqdm=True)):
            found[adapter.name, row, kind] = logps
    return time.perf_counter() - began, found


def by_score(args, adapters: list[Path], groups: list, folder: Path) -> tuple[float, dict]:
    """The same by score.py in a process of its own, from its last import to its last file."""
    code = ("import sys, time, transformers, peft, datasets, score, nanodpo.model.selfcheck, nanodpo.figures.drawing; "
            "began = time.perf_counter(); "
            "score.main(sys.argv[1:]); print('seconds', time.perf_counter() - began)")
    out = Path(tempfile.mkdtemp(dir=folder))
    done = subprocess.run([sys.executable, "-c", code, *map(str, adapters), "--dataset_path",
                           f"d={folder / 'rows.parquet'}", "--responses", *args.responses, "--output_dir", str(out),
                           "--max_length", str(args.max_length), "--overlong", "truncate", *["--bf16"] * args.bf16],
                          capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    table = pandas.read_parquet(out / "scores.parquet")[["run", "row", "response", "logps"]]
    return float(done.stdout.split()[-1]), {tuple(key): logps for *key, logps in table.itertuples(index=False)}


@torch.no_grad()
def products_alone(args, adapters: list[Path], groups: list, folder: Path) -> tuple[float, None]:
    """Seconds of the products with every matrix of a checkpoint, each prompt once and the head for responses alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model_name, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapters[0])
    head = model.get_base_model().get_output_embeddings()
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    tokens = {row: [len(prompt), 0] for row, _, prompt, _ in groups}
    for row, _, _, ids in groups:
        tokens[row][1] += len(ids)
    seconds = 0.0
    for prompt, answers in tokens.values():
        for layer, count in [(layer, prompt + answers) for layer in layers] + [(head, answers)]:
            states = torch.randn(count, layer.in_features)
            began = time.perf_counter()
            torch.mm(states, layer.weight.T)
            seconds += time.perf_counter() - began
    return seconds * len(adapters), None


def largest_difference(truth: dict, found: dict) -> float:
    assert truth.keys() == found.keys()
    return max(abs(found[key] / logps - 1) for key, logps in truth.items())


if __name__ == "__main__":
    sys.exit(main())
