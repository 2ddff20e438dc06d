"""Risers: the tokens that gained and lost most since the start, against all logits in float64."""

import re
from types import SimpleNamespace

import oracle
import pandas
import pytest
import torch
from conftest import ROOT, launch, make_model, make_tokenizer
from test_measures import GROUPS, Distribution, places
from test_parts import no_figures, run, work  # noqa: F401 (fixtures)
from test_verdict import CASES, KEY, seeds, tables

import score
from nanodpo.core.attention import LOOP
from nanodpo.core.logprobs import SequenceLogProbs
from nanodpo.core.packing import pack, pad
from nanodpo.errors import UserError
from nanodpo.scoring import opened, risers
from nanodpo.scoring.means import KEYS
from nanodpo.scoring.measures import token_measures
from nanodpo.scoring.runs import Checkpoint, check_starts
from nanodpo.scoring.sections import sections, tenth_of
from nanodpo.scoring.verdict import judge

V = 264  # of the tiny model


def compared(start, later, batch, k, lengths, layout=None):
    """The riser lines of each response, under two "models"."""
    beside = risers.Risers(start, layout or batch, k)
    token_measures(later, batch, None, beside.add)
    return [risers.table_of({"row": i}, part) for i, part in enumerate(beside.split(lengths))]


def scored(output, *flags):
    """Calls score.py; returns its risers' lines and their sums."""
    score.main([*map(str, flags), "--output_dir", str(output)])
    return read(output) if (output / "risers.csv").exists() else (pandas.DataFrame(), None)


def read(folder):
    return pandas.read_parquet(folder / "risers.parquet"), pandas.read_csv(folder / "risers.csv")


def test_a_distribution_whose_riser_is_known():
    """Token 3 takes 0.3 from token 0 and 0.05 from token 2; token 1 stays, so it has neither gained nor lost."""
    start, later = (torch.tensor([line], dtype=torch.float64).log()
                    for line in ([0.5, 0.25, 0.125, 0.125], [0.2, 0.25, 0.075, 0.475]))
    (found,) = compared(Distribution(start), Distribution(later), places(1), 4, [1])
    change = dict(zip(zip(found.place, found.id), found.after - found.before))
    assert change == {(1, 3): pytest.approx(0.35), (-1, 0): pytest.approx(-0.3), (-2, 2): pytest.approx(-0.05)}
    assert found.before.tolist() == pytest.approx([0.125, 0.5, 0.125])
    assert found.moved.tolist() == pytest.approx([0.35] * 3) and found.position.tolist() == [0] * 3
    (found,) = compared(Distribution(start), Distribution(later), places(1), 1, [1])
    assert list(zip(found.place, found.id)) == [(1, 3), (-1, 0)]  # of one gain and two losses the first of each


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("layouts", [(pack, pack), (pad, pack)])
def test_over_the_whole_vocabulary_gains_and_losses_are_those_of_all_logits(chunk, layouts):
    """K = V, float32 in the kernel's chunks, whatever layouts the two models take: every token that moved is there
    once, changes of a position sum to 0, each is that of plain float64 forward passes, the largest first."""
    modules = [SequenceLogProbs(make_model(seed).eval(), chunk) for seed in (0, 1)]
    flat = [(prompt, response) for prompt, responses in GROUPS for response in responses]
    truth = []
    with torch.no_grad():
        for prompt, response in flat:
            here = slice(len(prompt) - 1, len(prompt) - 1 + len(response))
            before, after = (make_model(seed, dtype=torch.float64).eval()(torch.tensor([prompt + response])).logits[
                0, here].softmax(1) for seed in (0, 1))
            truth.append((before, after))
        for module, layout in zip(modules, layouts):
            if layout is pack:
                module.model.set_attn_implementation(LOOP)
        found = compared(*modules, layouts[1](GROUPS), V, [len(response) for _, response in flat], layouts[0](GROUPS))
    for table, (before, after) in zip(found, truth):
        assert not table.duplicated(["position", "id"]).any()
        at = table.position.tolist(), table.id.tolist()
        assert table.before.to_numpy() == pytest.approx(before[at].numpy(), rel=1e-4, abs=1e-7)
        assert table.after.to_numpy() == pytest.approx(after[at].numpy(), rel=1e-4, abs=1e-7)
        change = (table.after - table.before).groupby(table.position)
        assert change.sum().abs().max() < 1e-6 and (change.size() >= V - 2).all() and change.max().min() > 1e-3
        gains = (after - before).clamp(min=0).sum(1)
        assert table.groupby("position").moved.first().to_numpy() == pytest.approx(gains.numpy(), rel=1e-4)
        for _, lines in table.groupby("position"):
            for side in (lines[lines.place > 0], lines[lines.place < 0]):
                moved = (side.after - side.before).abs().to_numpy()
                assert (side.place.abs().to_numpy() == range(1, len(side) + 1)).all()
                assert (moved[:-1] >= moved[1:]).all() and (moved > 0).all()


def test_no_more_is_kept_than_moved():
    """Over a vocabulary of 20,000 two models that differ by 1e-5: gains of 4e-6, and probabilities are known to 1e-7.
    With K = V all is kept, to rounding; a part of a whole is at most 1."""
    start = torch.randn(5, 20000, generator=torch.Generator().manual_seed(0))
    later = start + 1e-5 * torch.randn(5, 20000, generator=torch.Generator().manual_seed(1))
    (table,) = compared(Distribution(start), Distribution(later), places(*[0] * 5), 20000, [5])
    table = table.assign(token="x", response="chosen", **dict.fromkeys(KEYS, "k"))
    scores = pandas.DataFrame([{"row": 0, "response": "chosen", "tokens": 5, "logps": -1.0}])
    kept = risers.summed(table, scores)["kept"]
    assert kept.max() <= 1 and kept.min() > 0.8


def test_the_start_has_neither_gained_nor_lost():
    """A model beside itself: every change is exactly 0, whatever K, so there is no line."""
    module = SequenceLogProbs(make_model().eval(), 4)
    with torch.no_grad():
        module.model.set_attn_implementation(LOOP)
        assert [len(table) for table in compared(module, module, pack(GROUPS), V, [4, 1, 2, 3, 1])] == [0] * 5


@pytest.mark.parametrize("token, name", [(" a\n", r"' a\n'"), ("", "token 7"), ("a\ufffd", "token 7")])
def test_a_token_whose_text_tells_it_from_no_other_is_named_by_its_number(token, name):
    assert risers.named(token, 7) == name


@pytest.mark.parametrize("length", [1, 4, 10, 25, 137])
def test_the_tenth_of_a_position_is_the_section_that_holds_it(length):
    parts = sections(length, None, None)
    assert all(i in parts[f"tenth {tenth_of(i, length) + 1}"] for i in range(length))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):  # noqa: F811
    """Everything that moved: K is the whole vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("score.draw_after", lambda folder: "")
        patch.setattr("score.page_after", lambda folder: "")
        folder = tmp_path_factory.mktemp("whole")
        return folder, scored(folder, run, "--risers", str(V))


def test_tables_are_those_of_plain_transformers(run, whole, tiny):  # noqa: F811
    """Each position of chosen under both checkpoints, opened by plain PEFT; their sums over rows, in all and by tenths,
    and over the rest of the vocabulary."""
    _, (table, sums) = whole
    assert set(table.step) == {1} and {*table.columns} >= {"run", "phase", "checkpoint", "dataset", "token"}
    start, end = (oracle.load(run / f"checkpoint-{step}", tiny / "model").eval() for step in (0, 1))
    change, tokens = torch.zeros(10, V, dtype=torch.float64), [0] * 10
    for row, (prompt, ids, _) in enumerate(oracle.read_pairs(run.parent / "d.jsonl")):
        here = slice(len(prompt) - 1, len(prompt) - 1 + len(ids))
        with torch.no_grad():
            before, after = (model(input_ids=torch.tensor([prompt + ids])).logits[0, here].double().softmax(1)
                             for model in (start, end))
        lines = table[(table.row == row) & (table.response == "chosen")]
        at = lines.position.tolist(), lines.id.tolist()
        assert lines.before.to_numpy() == pytest.approx(before[at].numpy(), rel=1e-4)
        assert lines.after.to_numpy() == pytest.approx(after[at].numpy(), rel=1e-4)
        for name, part in sections(len(ids), None, None).items():
            change[int(name.split()[1]) - 1] += (after - before)[list(part)].sum(0)
            tokens[int(name.split()[1]) - 1] += len(part)
    mine = sums[sums.response == "chosen"]
    for section, truth, n in [("all", change.sum(0), sum(tokens)),
                              *((f"tenth {i + 1}", change[i], tokens[i]) for i in range(10))]:
        lines = mine[mine.section == section]
        if n == 0:  # no response has ten tokens
            assert lines.empty
            continue
        assert set(lines.tokens) == {n} and len(lines) >= V - 5
        assert lines.change.to_numpy() == pytest.approx((truth / n)[lines.id.tolist()].numpy(), abs=1e-7)
        assert lines.change.sum() == pytest.approx(0, abs=1e-6) and lines.kept.to_numpy() == pytest.approx(
            1, rel=1e-5)  # what was lost is what was gained, but for rounding
        ends = [lines[lines.place == place].id.item() for place in (1, -1)]
        assert ends == [truth.argmax(), truth.argmin()]
        assert lines[lines.place > 0].place.tolist() == [*range(1, (lines.place > 0).sum() + 1)]
    decode = make_tokenizer().decode
    # A byte that is no character by itself is written in hexadecimal.
    assert all(token == decode([id]) if decode([id]) != "\ufffd" else re.fullmatch(r"\\x[89a-f][0-9a-f]", token)
               for token, id in zip(table.token[:500], table.id))


def test_a_small_k_keeps_the_first_places_of_all_and_says_how_much_they_are(run, whole, tmp_path, capsys):  # noqa: F811
    """Their part of all gains is that which the lines of the whole vocabulary have, whose probabilities of some 0.004
    are kept in float32: a gain of 1e-4 is known to 2e-10 / 1e-4."""
    table, sums = scored(tmp_path, run, "--risers", "2")
    every = whole[1][0]
    pandas.testing.assert_frame_equal(table, every[every.place.abs() <= 2].reset_index(drop=True))
    assert set(sums.place) == {1, 2, -1, -2}
    for response, lines in every.groupby("response"):
        gain = (lines.after.astype(float) - lines.before)
        for sign in (1, -1):
            mine = sums[(sums.response == response) & (sums.section == "all") & (sums.place == sign)]
            kept = gain[(lines.place * sign > 0) & (lines.place.abs() <= 2)].sum() / gain[lines.place * sign > 0].sum()
            assert mine.kept.item() == pytest.approx(kept, rel=1e-5) and 0.01 < kept < 1
    said = capsys.readouterr().out
    assert "tokens that gained and lost most, run on train, step 0 to 1" in said
    first = sums[(sums.response == "chosen") & (sums.section == "all")].iloc[0]
    assert f"    along chosen gained: {first.token} {first.change:+.2g}" in said


def test_risers_add_to_what_is_there_and_stay(run, tmp_path, work):  # noqa: F811
    """Asked for later they are kept alone, under their K; asked for less, all is there, with nothing computed."""
    flags = [run, "--responses", "chosen", "rejected"]
    scored(tmp_path, *flags)
    tokens, before, scores = work["tokens"], {*(tmp_path / "parts").glob("*/*")}, (tmp_path / "scores.parquet")
    old = pandas.read_parquet(scores)
    counts = []
    for more in (["--risers", "3"], [], ["--risers", "3", "--tokens"], ["--risers", "2"], []):
        work["tokens"] = 0
        table, _ = scored(tmp_path, *flags, *more)
        counts.append((work["tokens"], table.place.abs().max()))
    assert counts == [(tokens / 2, 3), (0, 3), (tokens, 3), (tokens / 2, 2), (0, 2)]  # the start needs no pass
    new = {file.name for file in {*(tmp_path / "parts").glob("*/*")} - before}
    assert new == {"manifest.json", "risers.parquet", "tokens.parquet"}
    pandas.testing.assert_frame_equal(pandas.read_parquet(scores), old)
    assert scored(tmp_path, run / "checkpoint-0", *flags[1:])[0].empty and not (tmp_path / "risers.csv").exists()


def test_a_scoring_that_was_stopped_and_two_ranks_give_the_same(run, tmp_path, monkeypatch):  # noqa: F811
    flags = [run, "--risers", "3", "--max_tokens", "1"]
    once = scored(tmp_path / "one", *flags)
    inner, calls = score.token_measures, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(score, "AT_ONCE", 1)
    monkeypatch.setattr(score, "token_measures", stopping)
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path / "again", *flags)
    again = scored(tmp_path / "again", *flags)
    assert len(calls) == 2 * 4 + 1
    launch(ROOT / "score.py", *flags, "--output_dir", tmp_path / "two", ranks=2, launcher="fork")
    for other in (again, read(tmp_path / "two")):
        for mine, its in zip(once, other):
            pandas.testing.assert_frame_equal(mine, its)


@pytest.mark.parametrize("shared, bases", [(True, 1), (False, 2)], ids=["one base", "two models"])
def test_a_lora_runs_base_is_in_memory_once(run, whole, tmp_path, monkeypatch, shared, bases):  # noqa: F811
    """Adapters take turns on it; with a model for each all is the same, to the last bit."""
    calls, inner = [], opened.open_base
    monkeypatch.setattr(opened, "open_base", lambda *args: calls.append(args) or inner(*args))
    if not shared:
        monkeypatch.setattr(opened, "_only_lora", lambda shape: False)
    for mine, its in zip(scored(tmp_path, run, "--risers", str(V)), whole[1]):
        pandas.testing.assert_frame_equal(mine, its, check_exact=True)
    assert len(calls) == bases


@pytest.mark.parametrize("shape, only", [
    ({"peft_type": "LORA", "bias": "none"}, True), ({"peft_type": "LORA", "use_dora": True}, True), (None, False),
    ({"peft_type": "IA3"}, False), ({"peft_type": "LORA", "bias": "lora_only"}, False),
    ({"peft_type": "LORA", "modules_to_save": ["norm"]}, False)])
def test_adapters_with_other_weights_share_no_base(shape, only):
    assert opened._only_lora(shape) is only


def test_the_model_of_a_runs_reference_needs_no_start():
    """It is scored beside the run for the rewards, and has moved from nowhere."""
    none, against = (SimpleNamespace(reference=place) for place in (None, "base"))
    run_ = [Checkpoint("r", "dpo", step, f"r/checkpoint-{step}", against) for step in (0, 3)]
    check_starts([*run_, Checkpoint("base", "", 0, "base", none)], 2)
    check_starts([Checkpoint("other", "", 0, "other", none)], None)
    with pytest.raises(UserError, match="--risers 2: other is no checkpoint of a run"):
        check_starts([*run_, Checkpoint("other", "", 0, "other", none)], 2)


def test_the_verdict_names_the_tokens_that_took_the_place():
    """Of chosen's worst tenth, the third, and of the last step alone; nothing where nobody asked for risers."""
    lines = [KEY | {"step": step, "response": response, "section": section, "place": place, "id": id, "token": token,
                    "change": change}
             for step, response, section, place, id, token, change in [
                 (9, "chosen", "tenth 3", 1, 5, "' the'", 0.25), (9, "chosen", "tenth 3", 2, 6, "token 6", 0.125),
                 (9, "chosen", "tenth 3", -1, 7, " lost", -0.5), (9, "chosen", "tenth 4", 1, 8, " x", 0.5),
                 (9, "rejected", "tenth 3", 1, 8, " y", 0.5), (4, "chosen", "tenth 3", 1, 8, " z", 0.5)]]
    (found,) = judge(*tables(**CASES["squeezing"]), rising=pandas.DataFrame(lines))
    assert found["names"] == ["squeezing"]
    assert "rows; tokens that gained most probability there: ' the' +0.25, token 6 +0.12)" in found["text"]
    (found,) = judge(*tables(**CASES["squeezing"]))
    assert "gained most" not in found["text"]


def riser_lines(name, gains, section="tenth 3"):
    """Lines of risers.csv along chosen of the last step: {id: its change}, the first gained most."""
    return [KEY | {"run": name, "step": 9, "response": "chosen", "section": section, "place": place + 1, "id": id,
                   "token": f"' {id}'", "change": change} for place, (id, change) in enumerate(gains.items())]


def test_over_seeds_the_verdict_names_the_tokens_that_gained_in_each():
    """Their means over the seeds: 5 has (0.25 + 0.25 + 0.125) / 3, 6 has 0.25. Token 7 gained more than both, in two
    seeds, and is not among those that the third kept; 8 is of another tenth."""
    parts, recipes = seeds(*[CASES["squeezing"]] * 3)
    lines = [*riser_lines("s0", {7: 0.5, 6: 0.3, 5: 0.25}), *riser_lines("s1", {7: 0.75, 5: 0.25, 6: 0.2}),
             *riser_lines("s2", {6: 0.25, 5: 0.125, 9: 0.1}), *riser_lines("s2", {8: 0.9}, "tenth 4")]
    *_, together = judge(*parts, recipes, rising=pandas.DataFrame(lines))
    assert together["names"] == ["squeezing"] and together["risers"] == "' 6' +0.25, ' 5' +0.21"
    assert "there in every run: ' 6' +0.25, ' 5' +0.21)" in together["text"]
    apart = riser_lines("s0", {5: 0.3}) + riser_lines("s1", {6: 0.3}) + riser_lines("s2", {5: 0.3})
    *_, together = judge(*parts, recipes, rising=pandas.DataFrame(apart))
    assert "there in every run: none)" in together["text"]
    for some in (None, pandas.DataFrame(), pandas.DataFrame(lines[:6])):  # nobody asked for those of the third
        *_, together = judge(*parts, recipes, rising=some)
        assert together["risers"] is None and "gained most" not in together["text"]
