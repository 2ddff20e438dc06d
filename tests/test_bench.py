"""The benchmarks compare like with like, and the one for the GPU runs as far as a CPU lets it."""

import functools
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from conftest import ROOT, launch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "bench"))
import contenders
import gpu
import head
import layer
import machines
import measure
import on_gpu
import precision
import prompt_share
import rows
import step

from nanodpo.core.attention import LOOP
from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.model.layers import fuse_lora, keep_less
from nanodpo.model.recompute import MODES, FitToMemory, Recompute, sample_batch
from nanodpo.ranks import distributed
from nanodpo.ranks.gpu import rounding_restored

SHAPE = contenders.tiny_wide(hidden=32, vocabulary=300)
PAIRS = [([5, 6, 7], [8, 9, 1, 2, 4], [3, 3]), ([9], [1, 2], [2, 1, 9, 9])]


class Here:
    """measure.Worker without the process."""

    def __init__(self, build, threads=0, resident_memory=True, **settings):
        self.contender = build(**settings)

    def call(self, method, *args):
        return getattr(self.contender, method)(*args), 1.0, 1.0

    def close(self):
        pass


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("checkpointing", ["keep", "full"])
def test_all_contenders_train_on_the_same_loss(cached, checkpointing):
    """Two steps on two pairs: losses and gradient norms of every layout and of plain full-logits DPO, to 1e-4."""
    work = contenders.Work(PAIRS, SHAPE, cached=cached, checkpointing=checkpointing, batch=2, spread=0.3)
    found = {}
    for name in ("nanodpo", "alone", "padded", "plain"):
        contender = contenders.build(name, work)
        found[name] = [*contender.step(0), *contender.step(1)]
    for name, values in found.items():
        assert values == pytest.approx(found["plain"], rel=1e-4), name
    assert abs(found["plain"][0] - 0.6931) > 0.01 and found["plain"][1] > 1e-3
    assert found["plain"][2] != found["plain"][0]  # the update came through


def test_a_contest_on_unequal_losses_is_void():
    """The comparison stops where a contender computed something else, or nothing."""
    def result(loss, norm):
        return {"first_loss": loss, "first_norm": norm}

    step.check_agreement({"a": result(0.5, 2.0), "b": result(0.50001, 2.0001)})
    for bad in (result(0.52, 2.0), result(0.5, 2.1), result(float("nan"), 2.0)):
        with pytest.raises(SystemExit, match="void"):
            step.check_agreement({"a": result(0.5, 2.0), "b": bad})
    with pytest.raises(SystemExit, match="ln 2"):
        step.check_agreement({"a": result(0.69315, 2.0), "b": result(0.69315, 2.0)})


def test_the_length_mix_is_the_one_it_names():
    """Median 2.4k, 95th percentile 8k, longest 14k tokens; the pair after the mix has 20k a side."""
    lengths = rows.length_mix(1000, 1.0)
    assert statistics.median(lengths) == pytest.approx(2400, rel=0.01)
    assert statistics.quantiles(lengths, n=20)[-1] == pytest.approx(8000, rel=0.02)
    assert lengths[-1] == 14_000
    pairs = rows.mixed_pairs(16, 1000, 1.0)
    sides = sorted(len(p) + len(y) for p, *ys in pairs for y in ys)
    assert sides == sorted(rows.length_mix(16, 1.0) * 2 + [20_000] * 2)
    both = [(len(prompt) + len(chosen), len(prompt) + len(rejected)) for prompt, chosen, rejected in pairs[:-1]]
    assert sum(2 * max(pair) for pair in both) / sum(map(sum, both)) == pytest.approx(1.36, abs=0.01)


def test_prompt_share_pairs_are_as_ragged_as_they_say():
    pairs = prompt_share.ragged_pairs(4, 100, 0.3, 50)
    assert [tuple(map(len, pair)) for pair in pairs] == [(30, 35, 70), (30, 70, 35)] * 2


@pytest.mark.parametrize("checkpointing", ["keep", "full"])
def test_counted_flops_are_those_that_run(checkpointing):
    """The formula against torch's own counter, matmuls of weights and head, attention left out on both sides."""
    work = contenders.Work(PAIRS[:1], SHAPE, rank=4, checkpointing=checkpointing)
    contender = contenders.build("nanodpo", work)
    with FlopCounterMode(display=False) as counter:
        contender.step(0)
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    prompt, chosen, rejected = map(len, PAIRS[0])
    squares = (prompt + chosen) ** 2 + (prompt + rejected) ** 2
    attention = 2 * 4 / 2 * 32 * squares * (1 + (checkpointing == "full") + 2.5)  # two layers
    expected = rows.flops("nanodpo", PAIRS[0], SHAPE, 4, {checkpointing: 2}) - attention
    # The first layer needs no gradient by its input, and the formula does not know that.
    assert 0.85 * expected < counted <= expected


@pytest.mark.parametrize("name", ["nanodpo", "plain", "trl"])
def test_who_is_said_to_recompute_does(name):
    """Full checkpointing does a step's forward products again; a peer that is spared them would look fast."""
    if not measure.can_run(name if name == "trl" else "torch"):
        pytest.skip("TRL is not installed: pip install -e .[bench]")
    flops = []
    for checkpointing in ("keep", "full"):
        contender = contenders.build(name, contenders.Work(PAIRS[:1], SHAPE, rank=4, checkpointing=checkpointing))
        with FlopCounterMode(display=False) as counter:
            contender.step(0)
        flops.append(counter.get_total_flops())
    tokens = sum(map(len, PAIRS[0])) + (0 if name == "nanodpo" else len(PAIRS[0][0]))
    weights = sum(p.numel() for key, p in contender.model.named_parameters() if "layers" in key and p.ndim == 2)
    assert flops[1] - flops[0] > 0.8 * 2 * tokens * weights


def test_gpu_benchmark_says_where_it_is(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device here; --toy runs the same code"):
        gpu.main()


def test_gpu_benchmark_runs_at_toy_size_and_says_so(monkeypatch, tmp_path, capsys):
    """The whole path on CPU: a pair that does not fit is left out and listed, a contender that does not even start has
    its line, the rest is measured, and all of it labelled a toy."""
    step = contenders.Nanodpo.step

    def small(self, k):
        (_, chosen, _), = self.batch(k)
        if len(chosen) > (100 if self.work.checkpointing == "keep" else 300):
            raise RuntimeError("CUDA out of memory")
        return step(self, k)

    class Broken(Here):
        def call(self, method, *args):
            if args == ("broken",):
                raise RuntimeError("OutOfMemoryError: the model alone")
            return super().call(method, *args)

    monkeypatch.setattr(gpu, "MODES", [*gpu.MODES, ("nanodpo", "broken")])
    monkeypatch.setattr(contenders.Nanodpo, "step", small)
    monkeypatch.setattr(measure, "Worker", Broken)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--pairs", "2", "--rounds", "1", "--only", "nanodpo",
                                      "--profile", "--json", str(tmp_path / "toy.json")])
    with distributed.process_restored():
        gpu.main()
    shown, record = capsys.readouterr().out, json.loads((tmp_path / "toy.json").read_text())
    assert "TOY SIZE ON CPU" in shown and record["results"]["toy"] is True
    found = {one["checkpointing"]: one for one in record["results"]["contenders"]}
    assert list(found) == ["by need", "by need, --deterministic false", "full", "keep", "broken"]
    assert len({found[mode]["losses"][0] for mode in list(found)[:3]}) == 1  # each way begins with the same adapter
    assert "aten::mm" in shown  # of the profile
    assert found["broken"]["result"] == "out of memory before the first step"
    for mode, fit in (("by need", 2), ("full", 2), ("keep", 1)):
        mix = found[mode]["mix"]
        assert (mix["fit"], mix["of"]) == (fit, 2) and mix["peak_gib"] == 0
        assert mode == "by need" or mix["modes"] == [{mode: 2}] * fit  # of two layers
        assert len(found[mode]["did_not_fit"]) == 3 - fit - (mode != "keep")
        assert (found[mode]["longest"] is None) == (mode == "keep")
    pairs = rows.mixed_pairs(2, rows.TOY["vocab_size"], 0.01)
    least, most, last = map(rows.tokens_of, sorted(pairs, key=rows.tokens_of))
    assert found["keep"]["did_not_fit"] == [most, last] and last == 400
    mix = found["keep"]["mix"]
    assert mix["tokens_per_second"] == pytest.approx(least / mix["seconds"]["median"])
    need = found["by need"]
    assert need["mix"]["modes"] == [{"keep": 2}] * 2 and need["longest"]["modes"] != [{"keep": 2}]
    *fit, short = record["results"]["longest_pair"].items()  # up to the first that does not
    assert 100 < int(fit[-1][0]) < 320 and short[1] is None and fit[-1][1]["modes"] == {"offload": 2}
    assert gpu.best(record["results"]["contenders"], "nanodpo")["fit"] == 2


def test_what_rows_take_is_counted_without_data(monkeypatch, tmp_path, capsys):
    """As on CPU with data: nearly, since the two attentions differ. By hand what stands beside a row: two bytes a
    weight, 16 more a trained one."""
    shape = contenders.tiny_wide(hidden=64, vocabulary=1000)
    counted = rows.count(shape, 8, 1.0, PAIRS)
    found = counted["rows"]
    model = contenders.adapted(contenders.Work([], shape, rank=8, dtype=torch.bfloat16))
    fuse_lora(model)
    keep_less(model)
    model.get_base_model().set_attn_implementation(LOOP)
    sample = functools.partial(sample_batch, "packed", model.config, torch.device("cpu"))
    need = FitToMemory(Recompute(model), SequenceLogProbs(model), sample, 1.0)
    for mode in MODES[:2]:
        assert found[mode]["bytes_per_token"] == pytest.approx(need.per_token[mode], rel=0.15), mode
    beside = sum(2 * p.numel() for p in model.parameters()) + 16 * sum(
        p.numel() for name, p in model.named_parameters() if "lora" in name)
    assert counted["beside_any_row"] == beside
    assert list(counted["matmuls"].values())[:2] == [1, 1] and 1.3 < counted["matmuls"]["nanodpo, full"] < 1.5
    assert found["full"]["longest_row"] == int((0.92 * 2**30 - beside) / found["full"]["bytes_per_token"])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--count", "--toy", "--json", str(tmp_path / "count.json")])
    gpu.main()
    assert "| full | " in capsys.readouterr().out
    found = json.loads((tmp_path / "count.json").read_text())["results"]
    limits = [one["longest_row"] for one in found["rows"].values()]
    least, need, full, trl = found["matmuls"].values()
    assert 1 == least <= need < full < trl
    assert 0 < limits[0] < limits[1] < limits[2]


def test_which_settings_fit_which_machine_is_arithmetic(monkeypatch, tmp_path, capsys):
    """By hand for Qwen2.5-0.5B, all numbers of whose shape are published (494,032,768 in all), on four GPUs under stage
    2; the first setting that fits is named, and what a longer pair needs instead."""
    n = machines.numbers("0.5B", 16)
    hidden, inner, kv, layers = 896, 4864, 128, 24
    sides = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, inner)] * 3
    assert n.embeddings == 151_936 * hidden and n.matrices == layers * sum(a * b for a, b in sides)
    assert n.matrices + n.embeddings + n.vectors == 494_032_768
    assert n.lora == layers * sum(16 * (a + b) for a, b in sides)
    beside = 2 * (494_032_768 - n.vectors) + 4 * n.vectors + 4 * n.lora + 16 * n.lora / 4
    beside += 4 * 2 * 10**7 + 3 * 256 * 2**20  # the bucket of gradients, the head's chunks
    assert machines.bytes_beside(n, machines.Setting(""), 4) == pytest.approx(beside, rel=1e-12)
    keep = n.per_token["keep"]
    assert machines.fits(n, machines.Setting(""), 4, 24, 1000) == pytest.approx((beside + 1000 * keep) / 2**30)
    most = int((0.92 * 24e9 - beside) / keep)
    assert machines.cell(n, 4, 24, most).startswith("stage 2: 21 GiB")  # 0.92 of 24e9 bytes are 20.6
    assert machines.cell(n, 4, 24, most + 9).startswith("stage 2, `--activation_memory -1`: ")
    assert machines.cell(n, 1, 24, 10**7).startswith("does not fit: ")
    # 20,000 tokens of 896 numbers of 4 bytes are 71.7 MB, in 2^27 bytes for each layer: 3 GiB.
    assert machines.waiting(n, 20_000) == 24 * 2**27
    monkeypatch.setattr(machines, "SIZES", {"0.5B": machines.SIZES["0.5B"]})
    monkeypatch.setattr(sys, "argv", ["machines.py", "--lora_r", "16", "--json", str(tmp_path / "machines.json")])
    machines.main()
    assert f"| 8 x 80 GB | 0.5B | {machines.cell(n, 8, 80, 2000)} | " in capsys.readouterr().out


def test_the_unattended_run_goes_on_after_a_part_that_fails(monkeypatch, tmp_path, capsys):
    """It is named in the table, the next ones run, nothing begins when the minutes are over; table and JSON agree."""
    def second(parts):
        parts.end = 0
        return "0.25 s", "0.5 s"

    monkeypatch.setattr(on_gpu, "BESIDE", {"no such file": lambda parts: parts.call("no-such.py")})
    monkeypatch.setattr(on_gpu, "ALONE", {"second": second, "third": lambda parts: pytest.fail("begun")})
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--toy", "--json", str(tmp_path / "found.json")])
    assert on_gpu.main() == 1
    shown, record = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())["results"]
    assert "TOY SIZE ON CPU" in shown and "| second | ran | 0 | 0.25 s | 0.5 s |" in shown
    first, _, third = (part["result"] for part in record["parts"].values())
    assert "FAILED: exit code 2: " in first and "no-such.py" in first
    assert third == "FAILED: not begun: --minutes were over"
    assert (tmp_path / "found.md").read_text() in shown
    assert "no-such.py" in (tmp_path / "found.log").read_text()


@pytest.mark.slow
def test_the_unattended_run_trains_and_compares(monkeypatch, tmp_path):
    """Two of its parts at toy size, on CPU on both sides: no distance at all between a run and its like."""
    monkeypatch.setattr(on_gpu.Parts, "call", lambda self, script, *flags, **_: launch(script, *flags, launcher="fork"))
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--toy", "--workers", "1", "--parts", "default_run", "by_need",
                                      "--json", str(tmp_path / "found.json")])
    assert on_gpu.main() == 0
    found = json.loads((tmp_path / "found.json").read_text())["results"]["parts"]
    assert len(found) == 2 and all(part["measured"].startswith(
        "distance of loss 0.0e+00, logps/chosen 0.0e+00, logps/rejected 0.0e+00") for part in found.values())


def test_the_unattended_run_kills_a_run_once_it_is_ready(tmp_path):
    """And only then: one that ends before has shown nothing. What a killed one has written stays."""
    parts = on_gpu.Parts(SimpleNamespace(minutes=1, toy=True), tmp_path, tmp_path / "log")
    file = tmp_path / "begun"
    endless = f"import pathlib, time; pathlib.Path({str(file)!r}).write_text('x'); time.sleep(60)"
    assert parts.call("-c", endless, until=lambda: file.exists() and file.read_text() == "x") == ""
    assert file.read_text() == "x"
    assert parts.call("-c", "print(1)") == "1\n"
    with pytest.raises(on_gpu.Failed, match="ended before it could be killed: exit code 0"):
        parts.call("-c", "print(1)", until=lambda: False)
    with pytest.raises(on_gpu.Failed, match="exit code 3"):
        parts.call("-c", "raise SystemExit(3)")


def test_parts_of_a_step_run_at_toy_size_and_say_so(monkeypatch, tmp_path, capsys):
    """Also that all of torch's settings are as before; by hand, operations of a product and bytes of a gate."""
    monkeypatch.setattr(sys, "argv", ["layer.py", "--toy", "--json", str(tmp_path / "toy.json")])
    monkeypatch.setattr(layer.Parts, "seconds", lambda self, call, times=0: call() is None or 1e-6)
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    layer.main()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction == before
    assert "TOY SIZE ON CPU" in capsys.readouterr().out
    found = {name: rate for name, _, rate in json.loads((tmp_path / "toy.json").read_text())["results"]}
    assert len(found) > 12 and {"head, trained, chunks of 256 MiB", "positions and gradients"} < found.keys()
    parts = layer.Parts(layer.TOY, 10, [], toy=True)
    with rounding_restored():
        assert [one[2] for one in parts.products()] == 2 * [2 * 10 * a * b for a, b in (
            (64, 64), (64, 256), (256, 64)) for _ in "01"]
    assert [one[3] for one in parts.gate()] == [2 * 10 * 256 * 3, 2 * 10 * 256 * 5]


def test_bfloat16_is_trained_as_the_engine_trains_it():
    """Weights in bfloat16 have twins, moments and gradients in float32; a rate too small for bfloat16 adds up there."""
    work = contenders.Work(PAIRS, SHAPE, dtype=torch.bfloat16, spread=0.3)
    contender = contenders.build("nanodpo", work)
    before = [p.detach().clone() for p in contender.trained]
    for k in range(2):
        contender.step(k)
    assert {p.dtype for p in contender.trained} == {torch.bfloat16}
    assert all(twin.dtype == m.dtype == torch.float32 for twin in contender.twins
               for m in (contender.optimizer.state[twin]["exp_avg"],))
    moved = [(twin - p.float()).abs().max().item() for twin, p in zip(contender.twins, before)]
    assert min(moved) > 1e-6  # two steps of 1e-5, of weights of which most are coarser than that
    assert all(p.equal(twin.bfloat16()) and p.grad is None for p, twin in zip(contender.trained, contender.twins))


def test_first_margins_in_each_precision():
    """bench/precision.py: a fresh adapter has a margin of 0, to float32's last digits; with float32 products later ones
    are those of float32 but for the base's rounding, and nothing moves them."""
    found = {}
    for name in ("nanodpo, float32", "nanodpo --bf16, CPU", "nanodpo --bf16, as on a GPU"):
        work = contenders.Work(PAIRS, SHAPE, **precision.ROWS[name][1])
        probe = precision.Probe("nanodpo", work, True, 1e-3)
        found[name] = [probe.step(k) for k in range(2)] + [probe.noise(0)]
    exact, cpu, _ = found.values()
    assert max(abs(margins[0]) for margins in found.values()) < 1e-6 < abs(exact[1])
    assert abs(cpu[1] - exact[1]) < 0.05 * abs(exact[1]) and abs(cpu[2]) < 1e-6


def test_distance_time_and_memory_stand_in_one_table():
    """Time as a ratio of medians to the first line's; the peak is what was loaded and what came on top. A contender
    that was not timed has empty cells, and a table without times no such columns."""
    def line(seconds, **more):
        spread = {"seconds": {"median": seconds}, "cpu_seconds": {"median": 3 * seconds**2}} if seconds else {}
        return {"distance": [0.5, 1e-5], "noise": None} | spread | more

    found = {"a": line(2.0, loaded_mib=100, mib_above_loaded=11), "b": line(None, noise=0.25),
             "c": line(3.0, loaded_mib=200, mib_above_loaded=22)}
    lines = precision.table(found, True).splitlines()
    assert lines[2:] == ["| a | 0.5 1e-05 |  | 1.00 | 1.00 | 111 | 11 |", "| b | 0.5 1e-05 | 0.25 |  |  |  |  |",
                         "| c | 0.5 1e-05 |  | 1.50 | 2.25 | 222 | 22 |"]
    assert {line.count("|") for line in lines} == {8}
    assert {line.count("|") for line in precision.table(found, False).splitlines()} == {4}
    assert precision.UNTIMED < set(precision.ROWS)


def test_wide_products_are_those_of_bfloat16():
    """Sums in float32, rounded once: within half of bfloat16's last place of float64's product."""
    torch.manual_seed(0)
    a, b = torch.randn(30, 40).bfloat16(), torch.randn(40, 50).bfloat16()
    with precision.Widen():
        found = a @ b
    exact = a.double() @ b.double()
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_heads_agree():
    """nanodpo's and torch's own: the mean log-prob and the norm of the gradient, to 1e-5."""
    values = [head.Head(name, 50, 200, 16, torch.float32).step() for name in ("nanodpo", "torch")]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_worker_counts_its_own_memory_and_says_what_failed():
    """64 MiB held for a moment are seen; an error comes back by name."""
    worker = measure.Worker(Hungry, 1, mib=64)
    loaded, _ = worker.memory()
    worker.call("eat")
    assert 60 < worker.memory()[1] - loaded < 90
    with pytest.raises(RuntimeError, match="ValueError: full"):
        worker.call("burst")


class Hungry:
    def __init__(self, mib: int):
        self.bytes = mib * 2**20

    def eat(self):
        return torch.ones(self.bytes // 4).sum().item()

    def burst(self):
        raise ValueError("full")


@pytest.mark.slow
def test_what_safety_costs_at_toy_size(tmp_path):
    """A state is three times the adapter's float32 weights, counted by hand, and a little; seven steps write three
    states and three checkpoints; shares are shares."""
    piles, few = ROOT / "examples" / "piles", tmp_path / "few.parquet"
    pandas.read_parquet(piles / "test.parquet")[:56].to_parquet(few)
    launch(ROOT / "bench" / "safety.py", "--json", tmp_path / "safety.json", "--max_steps", "7", "--save_steps", "4",
           "--model_name", piles / "sft", "--train_file_path", few, "--lora_r", "4", "--cache_dir", tmp_path / "cache",
           launcher="fork")
    found, config = (json.loads(file.read_text()) for file in (tmp_path / "safety.json", piles / "sft" / "config.json"))
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = width // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    ends = [(width, q), (width, kv), (width, kv), (q, width), (width, inner), (width, inner), (inner, width)]
    weights = config["num_hidden_layers"] * sum(4 * (a + b) for a, b in ends)
    assert found["state"]["times"] == 3 and found["checkpoint"]["times"] == 3  # before 2, 4, 6; of 0, 4, 7
    assert 12 * weights < found["state"]["bytes"] < 12 * weights + 50_000
    assert found["checkpoint"]["bytes"] > 4 * weights
    assert 0 < found["share"] < 0.2 and 0.3 < found["after_a_save"] < 3


@pytest.mark.slow
def test_the_files_of_a_step_are_those_that_the_readme_and_the_page_on_internals_name():
    done = launch(ROOT / "bench" / "trace_step.py", launcher="fork")
    entered = {line.split()[0]: len(line.split(", ")) for line in done.stdout.splitlines() if " lines  " in line}
    assert {"train.py", "nanodpo/core/logprobs.py", "nanodpo/core/losses.py"} <= entered.keys()
    assert len(entered) <= 11 and sum(entered.values()) <= 59  # a step stays as small as it is
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/internals.md"))
    assert not [name for name in entered if f"`{name}`" not in page]
    assert not [name for name in entered if f"`{name}`" not in readme and f"`{Path(name).name}`" not in readme]
