"""A ledger of 12 steps against training again, in float64: by plain PyTorch, one pair's term a little heavier."""

import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from oracle import sequence_logp
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.losses import dpo
from nanodpo.data.example import Example
from nanodpo.data.schedule import learning_rate, pairs_of_step
from nanodpo.flags.arguments import TrainArguments
from nanodpo.ledger.history import History
from nanodpo.ledger.probes import Probe, Probes
from nanodpo.ledger.report import sentence, to_record, to_table
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
        return SimpleNamespace(module=self.module, layout="plain", device=torch.device("cpu"))


def track(items, what, unit):
    return items


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
    references(run, store, track)
    forward(run, store, track)
    return run, backward(run, probes, store, "probes", track), probes, store, end


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
    assert f"{end - start:+.4f} nats a token = " in sentence(record) and "from weight decay" in sentence(record)


def true_effects(peak: float, terms: list) -> torch.Tensor:
    """Of these (step, index, side): each term 1 +- e times as heavy, and all trained again."""
    e = 1e-3
    ends = [[train(peak, {term: 1 + sign * e}) for sign in (1, -1)] for term in terms]
    return torch.tensor([(up - down) / (2 * e) for up, down in ends])


def effects_of(found, terms: list) -> torch.Tensor:
    lines = zip(*(found.lines[name].tolist() for name in ("step", "index", "side")))
    effects = dict(zip(lines, found.lines["effect"][:, 0].tolist()))
    return torch.tensor([effects[term] for term in terms])


def test_effects_are_those_of_training_again(ledger):
    """In sign for each term of three steps, and in size to a tenth. What they leave out is that the gradients of later
    steps would have been others, too."""
    terms = [(step, k, side) for step in (1, 4, 9) for k in pairs_of_step(N, 2, 42, step) for side in (0, 1)]
    said, true = effects_of(ledger[1], terms), true_effects(2e-4, terms)
    assert ((said > 0) == (true > 0)).all()
    assert (said - true).norm() < 0.1 * true.norm()


def test_with_small_steps_effects_are_exact(tmp_path):
    """Weights that hardly move have the same gradients whatever came before: the rest shrinks with the learning rate.
    """
    _, found, *_ = make_ledger(2e-6, tmp_path)
    terms = [(1, k, side) for k in pairs_of_step(N, 2, 42, 1) for side in (0, 1)]
    torch.testing.assert_close(effects_of(found, terms), true_effects(2e-6, terms), rtol=2e-3, atol=0)


def test_a_ledger_that_was_stopped_goes_on(ledger, tmp_path):
    """The forward pass after 5 steps, the backward pass after 4: nothing differs in the last bit."""
    run, found, probes, *_ = ledger

    def stopping(at):
        def tracked(items, what, unit):
            for i, item in enumerate(items):
                if i == at:
                    raise KeyboardInterrupt
                yield item
        return tracked

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        forward(run, store, stopping(5))
    forward(run, store, track)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanodpo.ledger.sweeps.KEEP_EVERY", 0)
        with pytest.raises(KeyboardInterrupt):
            backward(run, probes, store, "probes", stopping(4))
    again = backward(run, probes, store, "probes", track)
    for name, values in found.lines.items():
        order = [torch.argsort(lines["step"] * 1000 + lines["index"] * 3 + lines["side"])
                 for lines in (found.lines, again.lines)]
        assert torch.equal(values[order[0]].nan_to_num(), again.lines[name][order[1]].nan_to_num())
    assert torch.equal(found.levels, again.levels) and torch.equal(found.rebuilt, again.rebuilt)


def test_a_few_probes_at_a_time_are_all_of_them(ledger, tmp_path):
    run, found, probes, store, _ = ledger
    single = 1, [(PROBES[0][0], [PROBES[0][1]])], torch.tensor([0.25]).double()
    both = Probes([*probes.names, Probe("test", 0, "chosen", 1)], [*probes.batches, single])
    whole = backward(run, both, store, "whole", track)
    parts = [backward(run, both.only(i, i + 1), store, f"part-{i}", track) for i in (0, 1)]
    torch.testing.assert_close(whole.lines["share"], torch.cat([part.lines["share"] for part in parts], 1), rtol=1e-9,
                               atol=1e-15)
    torch.testing.assert_close(whole.lines["share"][:, :1], found.lines["share"], rtol=1e-9, atol=1e-15)
