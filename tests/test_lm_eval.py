"""The models that a run leaves, opened by lm-eval as its users open any: an adapter on its base, and merged weights."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from conftest import environment, make_tokenizer, train
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed: pip install lm_eval")]
TASK = """task: pairs
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{[chosen, rejected]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def test_its_log_probs_are_those_of_plain_transformers(tiny, tmp_path):
    """Of both answers to three prompts, under the adapter on its base and under the merged weights, to 1e-4 nats.

    lm-eval cuts the vocabulary of a model with an adapter to the tokenizer's size, so here they are of one size.
    """
    tokenizer = make_tokenizer()
    small = AutoModelForCausalLM.from_pretrained(tiny / "model")
    small.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    small.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    train(tiny, tmp_path / "run", "--model_name", tmp_path / "model", "--max_steps", "2", "--learning_rate", "1e-2",
          "--merge_weights", "true")
    rows = [{"prompt": f"What is {i}+{i}?", "chosen": f" It is {2 * i}", "rejected": " No idea!"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pairs.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    truth = by_hand(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged"), tokenizer, rows)
    assert truth != pytest.approx(by_hand(small, tokenizer, rows), abs=0.1)  # training has moved them
    models = [f"{tmp_path / 'model'},peft={tmp_path / 'run' / 'checkpoint-2'}", tmp_path / "run" / "merged"]
    for found in lm_eval(models, tmp_path / "tasks", tmp_path / "out"):
        assert found == pytest.approx(truth, abs=1e-4)


def by_hand(model, tokenizer, rows: list[dict]) -> list[float]:
    """log pi of chosen and rejected of each row, from all logits in float64."""
    found = []
    for row in rows:
        for side in ("chosen", "rejected"):
            prompt, ids = (tokenizer(text).input_ids for text in (row["prompt"], row["prompt"] + row[side]))
            with torch.no_grad():
                logps = model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
            found.append(sum(logps[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
    return found


def lm_eval(models: list, tasks, output) -> list[list[float]]:
    """The answers' log-probs under each model. Its command takes one; all are asked for in one process, since that
    takes ten seconds to start."""
    commands = [["lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32",
                 "--include_path", str(tasks), "--tasks", "pairs", "--device", "cpu", "--batch_size", "1",
                 "--log_samples", "--output_path", str(output / str(i))] for i, model in enumerate(models)]
    program = ("import json, sys; from lm_eval.__main__ import cli_evaluate\n"
               "for sys.argv in json.loads(sys.argv[1]): cli_evaluate()")
    done = subprocess.run([sys.executable, "-c", program, json.dumps(commands)], capture_output=True, text=True,
                          env=environment() | {"PYTHONPATH": ":".join(sys.path)}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = []
    for i in range(len(models)):
        (file,) = (output / str(i)).rglob("samples_pairs*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        found.append([float(answer[0][0]) for sample in samples for answer in sample["resps"]])
    return found
