"""score.py --gradients with --gradient_checkpointing: the same numbers, with less memory."""

import pandas
import pytest
import torch
from conftest import make_tokenizer

import score
from nanodpo.core.packing import LAYOUTS
from nanodpo.data.example import SIDES
from nanodpo.model.recompute import _Live
from nanodpo.scoring.opened import Opener
from nanodpo.scoring.pairs import gradient_products
from nanodpo.scoring.runs import find_bases, open_targets

LAYERS = 8


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """LoRA on a model of 8 layers whose config has dropout, as GPT-2's has by default: 0.1."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gradients")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=256, eos_token_id=258)
    assert config.resid_pdrop == config.embd_pdrop == 0.1
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.1)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_the_same_numbers(adapter, tiny, tmp_path):
    """To the last bit, with answers in the same call, which generate by keys and values that are kept."""
    tables = []
    for name, flags in (("kept", []), ("again", ["--gradient_checkpointing"])):
        score.main(["--model_path", str(adapter), "--dataset_path", str(tiny / "train.jsonl"), "--gradients",
                    "--answers", "2", "--output_dir", str(tmp_path / name), *flags])
        tables.append([pandas.read_parquet(tmp_path / name / f"{table}.parquet")
                       for table in ("pairs", "scores", "answers")])
    for kept, again in zip(*tables):
        pandas.testing.assert_frame_equal(kept, again, check_exact=True)
    assert len(tables[0][0]) == 11 and (tables[0][0]["grad_norm_chosen"] > 0).all()


def test_a_data_set_without_pairs_is_named(adapter, tiny, tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "2+2=", "chosen": "4"}\n')
    score.main(["--model_path", str(adapter), "--dataset_path", f"pairs={tiny / 'train.jsonl'}", str(answers),
                "--gradients", "--output_dir", str(tmp_path / "out")])
    assert set(pandas.read_parquet(tmp_path / "out" / "pairs.parquet")["dataset"]) == {"pairs"}
    said = capsys.readouterr().out
    assert "answers: has no gradients, which need both chosen and rejected\n" in said and "pairs: has no" not in said


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_are_computed_again(adapter, recompute):
    """In the forward pass and, where backward computes them again, in each of the pair's two backward passes."""
    opened, batch = opened_with_batch(adapter, recompute)
    calls = []
    for module in opened.module.modules():
        if type(module).__name__ == "GPT2Attention":
            module.register_forward_hook(lambda *_: calls.append(1))
    gradient_products(opened.logps(batch), opened.trained)
    assert len(calls) == LAYERS * (3 if recompute else 1) and not opened.module.training


def test_less_memory(adapter):
    """What is kept of a layer is its input, where it was all that backward reads: attention's, the MLP's and more."""
    peaks = []
    for recompute in (False, True):
        opened, batch = opened_with_batch(adapter, recompute)
        with _Live(torch.device("cpu")) as live:
            gradient_products(opened.logps(batch), opened.trained)
        peaks.append(live.peak)
    assert peaks[1] < 0.4 * peaks[0]


def opened_with_batch(adapter, recompute):
    (checkpoint,) = checkpoints = open_targets([str(adapter)], {})
    find_bases(checkpoints)
    opened = Opener(torch.device("cpu"), True, 256, recompute=recompute).open(checkpoint)
    sides = dict.fromkeys(SIDES, [*range(100)])
    return opened, LAYOUTS[opened.layout]([([*range(20)], [*sides.values()])])
