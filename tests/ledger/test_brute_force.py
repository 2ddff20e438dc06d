"""A ledger of 12 steps against training again, in float64, by plain PyTorch: with terms of the gradient a little
heavier, and its derivative by the weights of all terms, which goes back through the whole training."""

import contextlib
import dataclasses
import functools
import os
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from oracle import sequence_logp
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.losses import dpo
from nanodpo.data.example import Example
from nanodpo.data.schedule import learning_rate, pairs_of_step
from nanodpo.errors import UserError
from nanodpo.flags.arguments import TrainArguments
from nanodpo.ledger import history
from nanodpo.ledger.history import History
from nanodpo.ledger.making import VECTORS
from nanodpo.ledger.probes import Probe, Probes
from nanodpo.ledger.report import decimals, sentence, to_record, to_table, worst_pairs
from nanodpo.ledger.sweeps import Store, backward, forward, references

STEPS, BETA, N = 12, 0.5, 9
SETTINGS = {"weight_decay": 0.1, "max_grad_norm": 2.0, "lr_scheduler_type": "linear", "warmup_steps": 3,
            "adam_beta2": 0.95, "beta": BETA, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}


def examples():
    draw = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(0, 250, (n,), generator=draw).tolist()

    return [Example(100 + i, ids(4), ids(3 + i % 3), ids(2 + i % 4)) for i in range(N)]


EXAMPLES = examples()
PROBES = [([1, 2, 3], [7, 8, 9, 10]), ([4, 5], [11, 12])]  # prompt and response of the two rows of the probe


def new_model():
    model = make_model(seed=3, dtype=torch.float64)
    model.config._attn_implementation = "sdpa"  # eager attention rounds to float32
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    for norm in (module for module in model.modules() if isinstance(module, LlamaRMSNorm)):
        norm.forward = functools.partial(rms, norm)  # transformers' own rounds to float32
    return model.eval()


def rms(norm, x):
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def probe(model) -> torch.Tensor:
    return sum(sequence_logp(model, x, y) / len(y) for x, y in PROBES) / len(PROBES)


@functools.cache
def start_logps():
    model = new_model()
    with torch.no_grad():
        return {k: [sequence_logp(model, e.prompt, y).item() for y in (e.chosen, e.rejected)]
                for k, e in enumerate(EXAMPLES)}


def train(peak: float, heavier: dict | None = None, keep: bool = False):
    """The end's probe, or with `keep` all weights, step by step. `heavier`: {(step, index of a pair, side): factor} of
    a side's term of the gradient."""
    model, states = new_model(), []
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95),
                                  weight_decay=0.1)
    for step in range(STEPS):
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, peak, 3, "linear")
        pairs = pairs_of_step(N, 2, 42, step)
        total = 0.0
        for k in pairs:
            ref, logps = start_logps()[k], []
            for side, ids in enumerate((EXAMPLES[k].chosen, EXAMPLES[k].rejected)):
                logp = sequence_logp(model, EXAMPLES[k].prompt, ids)
                factor = (heavier or {}).get((step, k, side), 1.0)
                logps.append(logp.detach() + factor * (logp - logp.detach()))  # the same value, a heavier gradient
            m = (logps[0] - ref[0]) - (logps[1] - ref[1])
            total = total + torch.log1p(torch.exp(-BETA * m)) / len(pairs)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
    states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    with torch.no_grad():
        return (states, probe(model).item()) if keep else probe(model).item()


class Weights:
    """Opens the weights of a step, as scoring.opened.Opener opens a checkpoint."""

    def __init__(self, states):
        self.states, self.module = states, SequenceLogProbs(new_model())

    def open(self, checkpoint):
        with torch.no_grad():
            for name, p in self.module.model.named_parameters():
                p.copy_(self.states[checkpoint.step][name])
        return SimpleNamespace(module=self.module, logps=self.module, layout="plain", device=torch.device("cpu"))


def make_ledger(peak: float, folder):
    """(the history, what was found, the probes, where it was kept, the probe at the end) of a run."""
    states, end = train(peak, keep=True)
    args = TrainArguments(model_name="m", train_file_path="d", use_lora=False, learning_rate=peak, **SETTINGS)
    settings = SimpleNamespace(record={})
    checkpoints = [SimpleNamespace(step=k, run="run", settings=settings) for k in range(len(states))]
    run = History(checkpoints, args, functools.partial(dpo, beta=BETA), EXAMPLES, 2, STEPS, set(), {}, Weights(states),
                  checkpoints[0])
    weights = torch.tensor([1 / len(y) / len(PROBES) for _, y in PROBES], dtype=torch.float64)
    probes = Probes([Probe("test", None, "chosen", 2)], [(0, [(x, [y]) for x, y in PROBES], weights)])
    store = Store(folder)
    references(run, store)
    forward(run, store)
    return run, backward(run, probes, store, "probes"), probes, store, end


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    return make_ledger(2e-4, tmp_path_factory.mktemp("ledger"))


def test_updates_are_rebuilt(ledger):
    assert ledger[1].rebuilt.max() < 1e-8


def test_shares_add_up_to_the_change(ledger):
    """To the error of the trapezoid rule; and the table, its record and its sentence say the same."""
    run, found, probes, _, end = ledger
    start = probe(new_model()).item()
    assert found.levels[[0, -1], 0].tolist() == pytest.approx([start, end], abs=1e-12)
    total = found.lines["share"].sum().item()
    assert abs(end - start) > 1e-3
    assert total == pytest.approx(end - start, rel=1e-3)
    table, (record,) = to_table(run, probes.names, found), to_record(run, probes.names, found)
    assert table["share"].sum() == pytest.approx(total, abs=1e-14)
    assert len(table) == 2 * sum(len(run.pairs(k)) for k in range(STEPS)) + STEPS  # two sides each, and the decay
    assert record["residual"] == pytest.approx((end - start - total) / (end - start), abs=1e-12)
    assert sum(record["from"].values()) == pytest.approx(total, abs=1e-14)
    by_pair = table[(table["step"] == 0) & (table["side"] == "chosen")]["pair"].tolist()
    assert by_pair == sorted(EXAMPLES[k].row for k in pairs_of_step(N, 2, 42, 0))
    said = sentence(record)
    assert f"{end - start:+.{decimals(end - start)}f} nats a token = " in said and "from weight decay" in said
    # The shares are of what the trapezoid rule foresees of each step, and that is nearly what the step did.
    assert found.predicted.sum().item() == pytest.approx(total, rel=1e-9)
    moved = found.levels[:, 0].diff()
    assert record["moved"] == moved.abs().sum().item() and record["missed"] < 2e-3 * record["moved"]
    assert record["sizes"] == pytest.approx(table[table["side"] != "weight_decay"]["share"].abs().sum(), rel=1e-12)


@functools.cache
def derivatives(peak: float, later_as_they_were: bool = False) -> tuple[float, torch.Tensor]:
    """(the end's probe, its derivative by the weight of each of TERMS): one training whose gradients, AdamW and
    clipping are a graph, and one pass back through all of it. `later_as_they_were`: a heavier term changes the updates,
    and not the gradients that come after it."""
    model, w = new_model(), [p.detach().clone().requires_grad_() for p in new_model().parameters()]
    names = [name for name, _ in model.named_parameters()]
    m, v = ([torch.zeros_like(p) for p in w] for _ in range(2))
    factors = torch.ones(STEPS, 2, 2, dtype=torch.float64, requires_grad=True)

    def logp(weights, prompt, response):
        def forward(input_ids):
            return torch.func.functional_call(model, dict(zip(names, weights)), (), {"input_ids": input_ids})
        return sequence_logp(forward, prompt, response)

    with sdpa_kernel(SDPBackend.MATH):  # has a second derivative
        for step in range(STEPS):
            here = [p.detach().requires_grad_() for p in w] if later_as_they_were else w
            pairs, logps, slopes = pairs_of_step(N, 2, 42, step), [], []
            for k in pairs:
                both = [logp(here, EXAMPLES[k].prompt, y) for y in (EXAMPLES[k].chosen, EXAMPLES[k].rejected)]
                ref = start_logps()[k]
                slope = BETA * torch.sigmoid(-BETA * ((both[0] - ref[0]) - (both[1] - ref[1]))) / len(pairs)
                logps += both
                slopes += [-slope, slope]
            slopes = torch.stack(slopes) * factors[step, : len(pairs)].flatten()
            grads = torch.autograd.grad(torch.stack(logps), here, slopes, create_graph=True)
            clip = (2.0 / (sum((g * g).sum() for g in grads).sqrt() + 1e-6)).clamp(max=1.0)
            m = [0.9 * a + 0.1 * clip * g for a, g in zip(m, grads)]
            v = [0.95 * b + 0.05 * (clip * g) ** 2 for b, g in zip(v, grads)]
            rate, t = learning_rate(step, STEPS, peak, 3, "linear"), step + 1
            roots = [torch.where(b > 0, b / (1 - 0.95**t), 1.0).sqrt() + 1e-8 for b in v]  # where 0, m is 0 as well
            w = [p * (1 - rate * 0.1 * (p.ndim > 1)) - rate / (1 - 0.9**t) * a / d for p, a, d in zip(w, m, roots)]
        value = sum(logp(w, x, y) / len(y) for x, y in PROBES) / len(PROBES)
        found, = torch.autograd.grad(value, factors)
    return value.item(), torch.stack([found[step, pairs_of_step(N, 2, 42, step).index(k), side]
                                      for step, k, side in TERMS])


TERMS = [(step, k, side) for step in range(STEPS) for k in pairs_of_step(N, 2, 42, step) for side in (0, 1)]


def effects_of(found) -> torch.Tensor:
    """Of TERMS."""
    lines = zip(*(found.lines[name].tolist() for name in ("step", "index", "side")))
    effects = dict(zip(lines, found.lines["effect"][:, 0].tolist()))
    return torch.tensor([effects[term] for term in TERMS], dtype=torch.float64)


def off(said: torch.Tensor, true: torch.Tensor) -> float:
    return ((said - true).norm() / true.norm()).item()


def by_pair(effects: torch.Tensor) -> torch.Tensor:
    """The weight of a pair is that of its two sides."""
    return effects.view(-1, 2).sum(1)


@pytest.mark.parametrize("terms", [[TERMS[2]], [TERMS[39]], TERMS[20:22]], ids=["chosen", "rejected", "a pair"])
def test_the_derivative_is_that_of_training_again(ledger, terms):
    """Two trainings, with one term or both of a pair 1 +- e times as heavy. In the first step e must be small: AdamW's
    first update is the gradient's sign, but for gradients as small as its epsilon."""
    e = 1e-7
    up, down = (train(2e-4, {term: 1 + sign * e for term in terms}) for sign in (1, -1))
    value, found = derivatives(2e-4)
    assert value == pytest.approx(ledger[-1], abs=1e-13)
    true = sum(found[TERMS.index(term)].item() for term in terms)
    assert true == pytest.approx((up - down) / (2 * e), rel=1e-3)


def test_effects_are_exact_for_gradients_that_stay(ledger):
    """Of every term of all 12 steps; what is left is what weight decay makes of a change of the weights."""
    assert len(TERMS) == 2 * sum(len(pairs_of_step(N, 2, 42, step)) for step in range(STEPS)) > 40
    torch.testing.assert_close(effects_of(ledger[1]), derivatives(2e-4, later_as_they_were=True)[1], rtol=1e-3,
                               atol=1e-8)


def test_pairs_of_one_row_are_named_by_their_answers(ledger):
    """The nine pairs as three rows, each of one chosen and three rejected answers: every line has its pair's numbers,
    and the sentence names them. Where a row has one pair it is the row alone."""
    run, found, probes, *_ = ledger
    lists = [dataclasses.replace(e, row=k // 3, answer_numbers=(0, k % 3)) for k, e in enumerate(EXAMPLES)]
    plain, table = (to_table(one, probes.names, found) for one in (run, dataclasses.replace(run, examples=lists)))
    indices = plain["pair"].dropna() - 100
    for name, numbers in (("pair", indices // 3), ("chosen_answer", 0 * indices), ("rejected_answer", indices % 3)):
        assert table.dropna(subset="pair")[name].tolist() == numbers.tolist()
    assert table["rejected_answer"].isna().sum() == STEPS and not plain["rejected_answer"].any()
    (said,), (before,) = worst_pairs(table), worst_pairs(plain)
    worst = int(re.search(r"lowered most by row (\d+) \(", before).group(1)) - 100
    assert f"lowered most by row {worst // 3} chosen[0] rejected[{worst % 3}] (" in said
    assert re.sub(r"row \d+( chosen\S+ rejected\S+)?", "", said) == re.sub(r"row \d+", "", before)


def test_effects_are_those_of_training_again(ledger):
    """In sign for every term and pair of all 12 steps, and in size to a tenth of the terms' norm, to a third of the
    pairs', whose two sides nearly cancel. What effects leave out is that the gradients of later steps would have been
    others, too."""
    said, true = effects_of(ledger[1]), derivatives(2e-4)[1]
    alone = torch.tensor([len(pairs_of_step(N, 2, 42, step)) == 1 for step, _, _ in TERMS[::2]])
    assert ((said > 0) == (true > 0)).all() and ((by_pair(said) > 0) == (by_pair(true) > 0))[~alone].all()
    assert alone.sum() == 2 and by_pair(said)[alone].abs().max() < 1e-6  # heavier alone, it is clipped to what it was
    assert off(said, true) < 0.1 and off(by_pair(said), by_pair(true)) < 1 / 3
    assert ((said - true) / true).abs().median() < 0.005


def test_with_small_steps_effects_are_exact(tmp_path):
    """Weights that hardly move have the same gradients whatever came before: the rest shrinks with the learning rate.
    """
    _, found, *_ = make_ledger(2e-6, tmp_path)
    said, true = effects_of(found), derivatives(2e-6)[1]
    torch.testing.assert_close(said, true, rtol=5e-3, atol=0)
    assert off(said, true) < 0.001 and off(by_pair(said), by_pair(true)) < 0.003


def stopping(at):
    """In place of `track`: a pass that is stopped after so many steps."""
    def tracked(items, what, unit):
        for i, item in enumerate(items):
            if i == at:
                raise KeyboardInterrupt
            yield item
    return tracked


def test_a_ledger_that_was_stopped_goes_on(ledger, tmp_path):
    """The forward pass after 5 steps, the backward pass after 4: nothing differs in the last bit."""
    run, found, probes, *_ = ledger
    store = Store(tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nanodpo.ledger.sweeps.track", stopping(5))
        forward(run, store)
    forward(run, store)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nanodpo.ledger.sweeps.KEEP_EVERY", 0)
        patch.setattr("nanodpo.ledger.sweeps.track", stopping(4))
        backward(run, probes, store, "probes")
    again = backward(run, probes, store, "probes")
    for name, values in found.lines.items():
        order = [torch.argsort(lines["step"] * 1000 + lines["index"] * 3 + lines["side"])
                 for lines in (found.lines, again.lines)]
        assert torch.equal(values[order[0]].nan_to_num(), again.lines[name][order[1]].nan_to_num())
    assert torch.equal(found.levels, again.levels) and torch.equal(found.rebuilt, again.rebuilt)


def test_what_a_ledger_keeps_is_read_as_it_was_written_or_not_at_all(tmp_path):
    """A flipped bit would be another number in the ledger, and another step's file in its place those of that step."""
    store = Store(tmp_path / "ledger-1.partial")
    for step in (1, 2):
        store.write(f"step-{step}", {"m": torch.full((4,), 1.5 * step), "norm": torch.tensor(2.0 * step).double()})
    file = store.folder / "step-1.safetensors"
    whole, said = file.read_bytes(), f"{file}: is damaged (not what was written); remove {store.folder}"
    for broken in (whole[:-1] + bytes([whole[-1] ^ 1]), (store.folder / "step-2.safetensors").read_bytes()):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=re.escape(said)):
            store.read("step-1")
    file.write_bytes(whole)
    assert store.norm(1) == 2.0
    save_file(store.read("step-1"), file)  # without hashes
    with pytest.raises(UserError, match=re.escape(said)):
        store.read("step-1")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="is a pipe, not a file"):
        store.read("step-1")


class Alive(TorchDispatchMode):
    """Counts the tensors of a size that are alive, by the memory that they lie in."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.alive, self.most = size, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in (*args, *(found if isinstance(found, (list, tuple)) else [found])):
            if isinstance(one, torch.Tensor) and one.numel() == self.size:
                self.alive.add(StorageWeakRef(one.untyped_storage()))
        self.alive = {ref for ref in self.alive if not ref.expired()}
        self.most = max(self.most, len(self.alive))
        return found


def test_a_probe_takes_no_more_memory_than_is_reckoned(ledger, tmp_path, monkeypatch):
    """Vectors as large as all weights, of three probes at a time, also while what is done is kept, and where the pass
    goes on from that."""
    run, found, probes, store, _ = ledger
    three = Probes([*probes.names * 3], [(m, *rest) for m in range(3) for _, *rest in probes.batches])
    monkeypatch.setattr("nanodpo.ledger.sweeps.KEEP_EVERY", -1)
    for end in (2, STEPS):  # stopped, then gone on
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr("nanodpo.ledger.sweeps.track", stopping(end))
            with Alive(3 * len(run.weights())) as alive:
                backward(run, three, store, "three")
        assert VECTORS - 1 <= alive.most <= VECTORS


def test_a_ledger_keeps_its_work_where_the_last_step_made_no_update(ledger, tmp_path, monkeypatch):
    """There are no lines to keep yet when half a minute has passed."""
    run, _, probes, *_ = ledger
    run, store = dataclasses.replace(run, skipped={STEPS - 1}), Store(tmp_path)
    forward(run, store)
    whole = backward(run, probes, store, "whole")
    monkeypatch.setattr("nanodpo.ledger.sweeps.KEEP_EVERY", -1)
    kept = backward(run, probes, store, "kept")
    assert kept.lines["step"].max() == STEPS - 2 and torch.equal(kept.levels, whole.levels)
    assert kept.lines["share"].sum().item() == pytest.approx(whole.lines["share"].sum().item(), rel=1e-12)


def test_a_pairs_reference_is_that_of_the_first_epoch(ledger, monkeypatch):
    """As in training, which computes none in later ones, where a pair stands in a micro-batch with others: bfloat16
    rounds it otherwise there. Twelve steps of 2 of the 9 pairs are two epochs and two steps."""
    run, seen = ledger[0], []
    response_logps = history.response_logps
    monkeypatch.setattr(history, "response_logps", lambda module, examples, *rest: (
        seen.extend(example.row for example in examples), response_logps(module, examples, *rest))[1])
    assert torch.equal(run.reference_logps(), run.ref)
    assert sorted(seen) == sorted(example.row for example in EXAMPLES)


def test_a_few_probes_at_a_time_are_all_of_them(ledger):
    run, found, probes, store, _ = ledger
    single = 1, [(PROBES[0][0], [PROBES[0][1]])], torch.tensor([0.25]).double()
    both = Probes([*probes.names, Probe("test", 0, "chosen", 1)], [*probes.batches, single])
    whole = backward(run, both, store, "whole")
    parts = [backward(run, both.only(i, i + 1), store, f"part-{i}") for i in (0, 1)]
    torch.testing.assert_close(whole.lines["share"], torch.cat([part.lines["share"] for part in parts], 1), rtol=1e-9,
                               atol=1e-15)
    torch.testing.assert_close(whole.lines["share"][:, :1], found.lines["share"], rtol=1e-9, atol=1e-15)
