"""Ranks that share batches (--sequence_parallel_size): all numbers are those of one rank, and each has its part of
the memory.

Where rounding would hide what is wrong, whole runs are made in float64 (double.py)."""

import json
import math
from types import SimpleNamespace

import pandas
import pytest
import torch
from conftest import ROOT, forked, lines_of, make_model, make_tokenizer, without_times, zero
from safetensors.torch import load_file
from test_resume import assert_same
from transformers import AutoConfig, AutoModelForCausalLM

from nanodpo.core.packing import pack
from nanodpo.errors import UserError
from nanodpo.flags.arguments import TrainArguments
from nanodpo.folder.elastic import pairs_per_step, share_anew
from nanodpo.model.source import check_heads
from nanodpo.model.ulysses import cut

pytestmark = pytest.mark.slow
TRAIN, SCORE, DOUBLE = ROOT / "train.py", ROOT / "score.py", ROOT / "tests" / "double.py"
# Lists of answers, which share prompts, weights, and prompts so long that a first part has nothing that is scored.
ROWS = [{"prompt": f"What is {i}+{i}? " + "Think of it. " * (5 * (i % 3)), "weight": [1, 0.5, 2][i % 3],
         "chosen": [f"It is {2 * i}, " + "sure " * (i % 4), f"{2 * i}"][: 1 + i % 2],
         "rejected": ["No idea" + "!" * (3 * i + 1), "Who knows?"][: 1 + i % 2]} for i in range(8)]
PAIRS = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2")
FLAGS = ("--learning_rate", "1e-3", "--lora_r", "4", "--max_steps", "3", "--eval_size", "2", "--eval_steps", "1",
         "--draw", "false")
FULL = ("--use_lora", "false")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    for name, seed in (("model", 0), ("other", 1)):
        make_model(seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def start(place, run, *more, ranks=1, script=(TRAIN,), model="model"):
    """(exit codes, what was printed) of a run."""
    return forked(*script, "--model_name", place / model, "--train_file_path", place / "rows.jsonl", "--output_dir",
                  run, "--cache_dir", run.parent / f"{run.name}-cache", *FLAGS, *more, ranks=ranks)


def made(place, run, *more, ranks=1, script=(TRAIN,), **how) -> tuple[list[dict], dict]:
    """(lines of metrics.jsonl, the weights in the end) of a run."""
    codes, said = start(place, run, *more, ranks=ranks, script=script, **how)
    assert codes == [0] * ranks, said[-3000:]
    files = [*run.glob("checkpoint-3/*.safetensors")]
    return ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()],
            {name: tensor for file in files for name, tensor in load_file(file).items()})


def assert_equal(one: tuple, other: tuple, rel: float) -> None:
    """All numbers of all lines, of steps and evaluations, and all weights."""
    assert len(one[0]) == len(other[0]) == 7
    for a, b in zip(*(without_times(lines) for lines, _ in (one, other))):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=rel, abs=rel), (a["step"], key)
    assert one[1].keys() == other[1].keys() != set()
    assert max((one[1][name] - other[1][name]).abs().max() for name in one[1]) <= rel


@pytest.mark.parametrize("size", [1, 2, 3, 5, 70])
def test_parts_of_a_batch_are_the_batch(size):
    """Put one after the other they are its tokens and positions; each scored token is in one part, where the token that
    predicts it is the one that does in the whole. All are of one length, and attention sees the whole."""
    batch = pack([([7, 8, 9], [[1, 2], [3]]), ([4], [[5, 6, 7, 8]])])
    parts = [cut(batch, rank, size) for rank in range(size)]
    total, found = batch.input_ids.numel(), []
    for name in ("input_ids", "position_ids"):
        line = torch.cat([getattr(part, name) for part, _ in parts], 1)
        assert line[:, :total].equal(getattr(batch, name)) and not line[:, total:].any()
    assert len({part.input_ids.shape for part, _ in parts}) == 1
    for part, places in parts:
        assert part.segments is batch.segments and part.n_sequences == 3
        for i, place in enumerate(places.tolist()):
            assert part.input_ids[0, part.predictors[i]] == batch.input_ids[0, batch.predictors[place]]
            assert (part.targets[i], part.sequence_ids[i]) == (batch.targets[place], batch.sequence_ids[place])
        found += places.tolist()
    assert sorted(found) == [*range(7)]


@pytest.mark.parametrize("size, families", [(2, "llama qwen3_moe gemma2 gpt2"), (4, "qwen3")])
def test_log_probs_and_gradients_in_float64(size, families):
    """Those of plain transformers with full logits, to 1e-10: windows, caps, experts, trained heads, the flash kernel's
    shapes, four ranks that share two key/value heads. What a rank keeps for backward is its part, and 3% that do not
    grow with the batch."""
    codes, said = forked(ROOT / "tests" / "sharing.py", size, *families.split(), ranks=size)
    assert codes == [0] * size and "as one rank" in said, said[-3000:]
    assert 1 / size <= float(said.rpartition("kept ")[2].split()[0]) < 1 / size + 0.03


@pytest.mark.parametrize("stage, more, rel", [
    (0, (), 1e-12), (2, ("--reference", "{other}", "--sft_weight", "0.3", *FULL), 1e-7),
    (3, ("--loss", "sft", *FULL), 1e-7)], ids=["lora", "zero2-reference-full", "zero3-sft-full"])
def test_a_run_in_float64(stage, more, rel, place, tmp_path):
    """Loss, norm, every metric of steps and evaluations, and the weights are those of one rank. ZeRO clips by a factor
    in float32."""
    more = [*PAIRS, "--deepspeed", zero(tmp_path, stage), *(x.format(other=place / "other") for x in more)]
    one, two = (made(place, tmp_path / f"ranks{n}", *more, "--sequence_parallel_size", n, ranks=n,
                     script=(DOUBLE, "train")) for n in (1, 2))
    assert_equal(one, two, rel)
    record = json.loads((tmp_path / "ranks2" / "run.json").read_text())
    assert pairs_per_step(record) == 4 and record["attention"] == "nanodpo_loop"


def test_groups_of_ranks_in_float64(place, tmp_path):
    """Four ranks of which two share a batch are two ranks: the last step has fewer pairs than there are ranks."""
    more = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "3", "--max_steps", "3")
    two = made(place, tmp_path / "two", *more, ranks=2, script=(DOUBLE, "train"))
    four = made(place, tmp_path / "four", *more, "--sequence_parallel_size", "2", ranks=4, script=(DOUBLE, "train"))
    assert_equal(two, four, 1e-12)


def test_recomputation_changes_no_bit(place, tmp_path):
    """--gradient_checkpointing, and --activation_memory by which some batches are computed again and some are not: the
    exchanges between ranks are made again, too, on all ranks in the same order. With --bf16 the noise is measured."""
    found = []
    for i, more in enumerate(((), ("--gradient_checkpointing",), ("--activation_memory", "0.00002"))):
        run = tmp_path / f"run{i}"
        lines, weights = made(place, run, *PAIRS, "--bf16", "--sequence_parallel_size", "2", *more, ranks=2)
        found.append((without_times(lines), weights))
    for lines, weights in found[1:]:
        assert lines == found[0][0] and all(weights[name].equal(w) for name, w in found[0][1].items())


def test_step_0_is_the_reference_on_three_ranks(place, tmp_path):
    """To the last bit: a log-prob that three ranks have is not always the third part of their sum."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=264, hidden_size=48, intermediate_size=64, num_hidden_layers=2, eos_token_id=258,
                         num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=400, pad_token_id=256)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "six")
    make_tokenizer().save_pretrained(tmp_path / "six")
    lines, _ = made(place, tmp_path / "run", *PAIRS, "--sequence_parallel_size", "3", "--model_name",
                    tmp_path / "six", ranks=3, script=(DOUBLE, "train"))
    first = next(line for line in lines if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0 and first["rewards/ties"] == 1.0


def test_a_stopped_run_goes_on_to_the_last_bit(place, tmp_path):
    """Killed in its third step by the second of the ranks that share its pairs."""
    more = (*PAIRS, "--save_steps", "1", "--sequence_parallel_size", "2", "--deepspeed", zero(tmp_path, 3))
    assert start(place, tmp_path / "whole", *more, ranks=2)[0] == [0, 0]
    faulty = (ROOT / "tests" / "faulty.py", "kill@2:1")
    assert start(place, tmp_path / "run", *more, ranks=2, script=faulty)[0] == [1, 137]
    codes, said = start(place, tmp_path / "run", *more, ranks=2)
    assert codes == [0, 0] and "going on at step 2" in said, said
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_dry_run_is_of_the_ranks_that_share_a_pair(place, tmp_path):
    """It runs the longest micro-batch as they will, and writes nothing."""
    codes, said = start(place, tmp_path / "run", *PAIRS, "--sequence_parallel_size", "2", "--dry_run", ranks=2)
    assert codes == [0, 0] and " tokens), which 2 ranks share" in said and "peak memory by rank: " in said, said
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def run(place):
    made(place, place / "run", *PAIRS)
    return place / "run"


def test_scores_in_float64(run, place, tmp_path):
    """Every table of score.py, with tokens, risers, gradients and answers, is that of one process; micro-batches are
    of several groups, and two of four ranks share each."""
    asked = ("--dataset_path", f"d={place / 'rows.jsonl'}", "--tokens", "--gradients", "--risers", "5", "--max_tokens",
             "400", "--responses", "chosen", "rejected", "other", "--answers", "2", "--max_new_tokens", "9")
    for ranks, size in ((1, 1), (4, 2)):
        codes, said = forked(DOUBLE, "score", run, *asked, "--output_dir", tmp_path / f"ranks{ranks}",
                             "--sequence_parallel_size", size, ranks=ranks)
        assert codes == [0] * ranks, said[-3000:]
    names = sorted(file.name for file in (tmp_path / "ranks1").glob("*.parquet"))
    assert {*names} >= {"scores.parquet", "tokens.parquet", "risers.parquet", "pairs.parquet", "answers.parquet"}
    for name in names:
        truth, table = (pandas.read_parquet(tmp_path / f"ranks{ranks}" / name) for ranks in (1, 4))
        pandas.testing.assert_frame_equal(table, truth, rtol=1e-9, atol=1e-12, obj=name)


@pytest.mark.parametrize("ranks, more, words", [
    (1, ("0",), "--sequence_parallel_size 0: must be above 0"),
    (1, ("2",), "--sequence_parallel_size 2: does not divide the number of ranks, 1; start 2 ranks or a multiple of it "
                "(torchrun --nproc_per_node 2 ...), or give 1"),
    (3, ("3",), "has 4 attention heads and 2 key/value heads, which 3 ranks can't share; give 1, 2, 4"),
    (2, ("2", "--deepspeed", "{json}"), "sets sequence_parallel_size, which train.py owns: remove it there and use the "
                                        "flags "),
    (2, ("2", "--model_name", "{mixed}"), "--sequence_parallel_size 2: ranks that share a batch do not get this model's"
                                          " own log-probs (error "),
    (2, ("2", "--model_name", "{latent}"), "queries, keys and values of 12, 12 and 8 numbers a head can't "),
    (2, ("2", "--reference", "{odd}"), "odd has 3 attention heads and 3 key/value heads, which 2 ranks can't share; ")])
def test_what_is_refused_in_training(ranks, more, words, place, tmp_path):
    """In one line, with exit code 2, and nothing written. A model whose layers look at other positions without
    attention (here a convolution) is found out by its numbers."""
    own = {"mixed": ("lfm2", {"block_ff_dim": 48, "layer_types": ["conv", "full_attention"]}),
           "latent": ("deepseek_v3", {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
                                      "v_head_dim": 8, "first_k_dense_replace": 2, "num_key_value_heads": 4}),
           "odd": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24})}
    for name, (family, changes) in own.items():
        if f"{{{name}}}" in more:
            config = AutoConfig.for_model(family, **{
                "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 258, "pad_token_id": 256} | changes)
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
            make_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "ds.json").write_text('{"sequence_parallel_size": 2}')
    more = [x.format(json=tmp_path / "ds.json", **{name: tmp_path / name for name in own}) for x in more]
    codes, said = start(place, tmp_path / "run", "--sequence_parallel_size", *more, ranks=ranks)
    assert codes == [2] * ranks and words in said and "Traceback" not in said, said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_ranks_that_share_its_batches(run, place, tmp_path):
    """Begun on one rank, whose memory was too small for a row, say: its steps keep their pairs, and its numbers are
    those that one rank has, to float32's rounding."""
    more = (*PAIRS, "--save_steps", "1")
    assert start(place, tmp_path / "run", *more, script=(ROOT / "tests" / "faulty.py", "kill@2"))[0] == [137]
    codes, said = start(place, tmp_path / "run", *more, "--sequence_parallel_size", "2", ranks=2)
    assert codes == [0, 0] and "going on at step 2" in said, said
    assert ("resume: 2 ranks, of which 2 share each batch, in place of 1; --gradient_accumulation_steps 2 keeps 4 "
            "pairs a step") in said
    one, other = lines_of(run), lines_of(tmp_path / "run")
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for a, b in zip(one, other):
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-6), (a["step"], key)


@pytest.mark.parametrize("ranks, size, accumulation", [(1, 1, 4), (2, 2, 4), (4, 2, 2), (4, 1, 1), (8, 2, 1)])
def test_accumulation_follows_from_groups_of_ranks(ranks, size, accumulation, monkeypatch):
    """Of a run that two groups of two ranks began, with two micro-batches each: four in a step."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    args = SimpleNamespace(gradient_accumulation_steps=2, sequence_parallel_size=size)
    given = {"gradient_accumulation_steps": 2, "sequence_parallel_size": 2}
    share_anew(args, {"arguments": given, "world_size": 4}, "")
    assert args.gradient_accumulation_steps == accumulation


def test_ranks_that_can_share_a_step_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    args = SimpleNamespace(gradient_accumulation_steps=2, sequence_parallel_size=2)
    with pytest.raises(UserError, match="2 micro-batches, which 6 ranks can't share evenly; go on with 2 or 4 ranks"):
        share_anew(args, {"arguments": {"gradient_accumulation_steps": 2}, "world_size": 1}, "")


@pytest.mark.parametrize("size, words", [("0", "must be at least 1"), ("2", "does not divide the number of ranks, 1"),
                                         ("3", "which 3 ranks can't share; give 1, 2, 4")])
def test_what_is_refused_in_scoring(size, words, run, tmp_path):
    ranks = 3 if size == "3" else 1
    codes, said = forked(SCORE, run, "--sequence_parallel_size", size, "--output_dir", tmp_path / "out", ranks=ranks)
    assert codes == [2] * ranks and f"--sequence_parallel_size {size}: " in said and words in said, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family, heads, fit", [
    ("llama", {"num_attention_heads": 12, "num_key_value_heads": 4}, (2, 4, 12)),
    ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3}, (3, 9)),
    ("llama", {"num_attention_heads": 28, "num_key_value_heads": 4}, (2, 4, 28)),
    ("gpt2", {"n_head": 8}, (2, 4, 8)), ("mamba", {}, range(2, 40))])
def test_which_sizes_fit_the_heads(family, heads, fit):
    """As many query heads for each rank, and as many key/value heads or a copy of one: what DeepSpeed's exchange takes.
    A model without heads is found out by its numbers."""
    config = AutoConfig.for_model(family, hidden_size=4 * next(iter(heads.values()), 1), **heads)
    for size in range(2, 40):
        if size in fit:
            check_heads(config, size, "M")
        else:
            with pytest.raises(UserError, match=f"--sequence_parallel_size {size}: M has "):
                check_heads(config, size, "M")


def test_pairs_of_a_step_by_run_json():
    """Ranks that share a batch count as one, for figures and ledgers; runs of earlier versions know no such flag."""
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert pairs_per_step({"arguments": given, "world_size": 4}) == 24
    assert pairs_per_step({"arguments": given | {"sequence_parallel_size": 2}, "world_size": 4}) == 12
    assert TrainArguments.sequence_parallel_size == 1
