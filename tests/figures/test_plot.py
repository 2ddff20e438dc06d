"""plot.py: what is drawn is what the files say, whole figures or none, and the same bytes again."""

import json
import math
import os
import re
import time
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
from conftest import ROOT, launch
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import plot
import train
from nanodpo.errors import UserError, run_script
from nanodpo.figures import drawing
from nanodpo.figures.after import draw_after
from nanodpo.figures.axes import set_focus
from nanodpo.figures.records import read_metrics
from nanodpo.figures.training import training_figure
from nanodpo.folder import atomic

FORMATS = ("png", "pdf", "svg")
OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}
SIDES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps_per_token/chosen", "logps_per_token/rejected")


def make_run(folder, steps=5, evals=(0, 4), sides=SIDES, started=None):
    """A run's folder; metric i of step k is i + k / 8, and i + k / 8 + 0.5 under evaluation."""
    def values(step, prefix, more):
        return {prefix + name: i + step / 8 + more for i, name in enumerate(("loss", *sides))}

    lines = [{"step": k, **values(k, "eval_", 0.5)} for k in evals]
    lines += [{"step": k, **values(k, "", 0), "grad_norm": 1.0} for k in range(steps)]
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if started:
        os.utime(folder / "run.json", (started, started))
    return folder


def make_scores(file, values, run="dpo", phase="dpo", **changed):
    """scores.parquet from {(dataset, response, step): mean log-probs of its rows}; 10 tokens a response."""
    rows = [{"run": run, "phase": phase, "checkpoint": f"runs/{run}/checkpoint-{step}", "step": step,
             "dataset": dataset, "row": row, "response": response, "tokens": 10, "logps": 10 * value,
             "mean_logps": value} | changed
            for (dataset, response, step), means in values.items() for row, value in enumerate(means)]
    pandas.DataFrame(rows).to_parquet(file)
    return file


SCORES = {("forward", "chosen", 0): [-1.0, -2.0, -3.0], ("forward", "chosen", 40): [-1.0, -1.5, -2.0],
          ("forward", "rejected", 0): [-4.0, -4.0, -7.0], ("forward", "rejected", 40): [-5.0, -6.0, -7.0],
          ("reverse", "chosen", 0): [-0.5], ("reverse", "chosen", 40): [-0.25]}


@pytest.fixture
def draw(monkeypatch):
    """draw(*arguments) -> the figures by name, in place of files."""
    def figures(*arguments):
        found = {}
        monkeypatch.setattr(plot, "save", lambda drawn, folder, columns: found.update(
            {name: fig for name, (fig, _) in drawn.items()}, folder=folder,
            captions={name: caption for name, (_, caption) in drawn.items()}) or [])
        plot.main([str(argument) for argument in arguments])
        return found
    return figures


def points(fig, label):
    """(panel, steps, values) of the one line with this label."""
    (found,) = [(i, line) for i, ax in enumerate(fig.axes) for line in ax.get_lines() if line.get_label() == label]
    return found[0], list(found[1].get_xdata()), list(found[1].get_ydata())


def test_the_training_figure_draws_the_files_numbers(tmp_path, draw):
    fig = draw(make_run(tmp_path / "a"))["training"]
    for i, (name, panel) in enumerate(zip(("loss", *SIDES), (0, 1, 1, 1, 2, 2))):
        assert points(fig, f"a {name}") == (panel, [0, 1, 2, 3, 4], [i, i + 0.125, i + 0.25, i + 0.375, i + 0.5])
        assert points(fig, f"a eval_{name}") == (panel, [0, 4], [i + 0.5, i + 1.0])
    assert sum(len(ax.get_lines()) for ax in fig.axes) == 12  # and nothing else
    assert [ax.get_ylabel() for ax in fig.axes][::2] == ["loss", "log-prob (nats per token)"]
    assert "nats" in fig.axes[1].get_ylabel()


def test_training_is_faint_only_beside_evaluation(tmp_path):
    fig = training_figure({"a": read_metrics(make_run(tmp_path / "a", evals=()))}, 2)[0]
    assert {line.get_alpha() for ax in fig.axes for line in ax.get_lines()} == {None}
    fig = training_figure({"b": read_metrics(make_run(tmp_path / "b"))}, 2)[0]
    for line in (line for ax in fig.axes for line in ax.get_lines()):
        held_out = "eval_" in line.get_label()
        assert (line.get_alpha() is None) == held_out == (line.get_marker() in {"o", "s", "^"})


def test_beside_evaluation_training_is_faint_in_every_run_and_keeps_its_sides_dash(tmp_path, draw):
    """A run without evaluation is faint too, as the legend says; sides of one run share a colour, so dashes differ."""
    fig = draw(make_run(tmp_path / "a"), make_run(tmp_path / "b", evals=()))["training"]
    for run in "ab":
        drawn = {line.get_label(): line for ax in fig.axes for line in ax.get_lines()}
        sides = [drawn[f"{run} {name}"] for name in SIDES[:3]]
        assert {(line.get_alpha(), line.get_linewidth()) for line in sides} == {(0.4, 0.6)}
        assert len({str(line._dash_pattern) for line in sides}) == 3


def forked_from(folder, run, step, change):
    """A copy of a run whose metrics from this step on are `change` larger; its run.json says that it is a fork."""
    text = (run / "metrics.jsonl").read_text().splitlines()
    lines = [{name: value + change if name != "step" and line["step"] >= step else value
              for name, value in line.items()} for line in map(json.loads, text)]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"fork": {"run": str(run), "step": step}}))
    return folder


def test_the_difference_of_a_run_and_its_fork(tmp_path, draw):
    """Both runs' curves above, and below what the files' numbers differ by at each step; the fork's step in each."""
    run = make_run(tmp_path / "a")
    found = draw(run, forked_from(tmp_path / "b", run, 2, 0.25), "--diff")
    fig = found["difference"]
    for i, (name, panel) in enumerate(zip(("loss", *SIDES), (0, 1, 1, 1, 2, 2))):
        assert points(fig, f"a {name}") == (panel, [*range(5)], [i + k / 8 for k in range(5)])
        assert points(fig, f"b {name}") == (panel, [*range(5)], [i + k / 8 + 0.25 * (k >= 2) for k in range(5)])
        assert points(fig, f"difference {name}") == (panel + 3, [*range(5)], [0, 0, 0.25, 0.25, 0.25])
        assert points(fig, f"difference eval_{name}") == (panel + 3, [0, 4], [0, 0.25])
    assert all(any(list(line.get_xdata()) == [2, 2] for line in ax.get_lines()) for ax in fig.axes)
    assert "b minus a" in found["captions"]["difference"] and "fork at step 2" in found["captions"]["difference"]
    assert found.keys() == {"difference", "folder", "captions"}
    one = draw(run, tmp_path / "b", "--diff", "--columns", "1")["difference"]  # each difference below its panel
    assert [points(one, f"{which} loss")[0] for which in ("a", "difference")] == [0, 1]


def test_a_fork_is_marked_in_its_training(tmp_path, draw):
    """What is before it was made by another run, maybe by another loss; before a fork at step 0 there is nothing."""
    run = make_run(tmp_path / "a")
    found = draw(forked_from(tmp_path / "b", run, 2, 0.25))
    assert all(any(list(line.get_xdata()) == [2, 2] for line in ax.get_lines()) for ax in found["training"].axes)
    assert "fork" in [text.get_text() for text in found["training"].legends[0].get_texts()]
    assert "Dashed: the fork at step 2; before it all is of the run" in found["captions"]["training"]
    for other in (run, forked_from(tmp_path / "c", run, 0, 0.25)):
        found = draw(other)
        assert "fork" not in [text.get_text() for text in found["training"].legends[0].get_texts()]
        assert "fork" not in found["captions"]["training"]


def test_a_fork_of_a_fork_is_marked_at_both(tmp_path, draw):
    """At 3 it left a run that was itself forked at 1. What is before a fork at step 0 is of no other run."""
    run = make_run(tmp_path / "a")
    whole = {"run": "o", "step": 4, "changed": {}}
    for name, forks, marked in (("b", [3, 1], [1, 3]), ("c", [3, 0, 2], [0, 3]), ("d", [3], [3])):
        fork = forked_from(tmp_path / name, run, 3, 0.25)
        entry = None
        for step in reversed(forks):
            entry = whole | {"step": step, "of": entry}
        (fork / "run.json").write_text(json.dumps({"fork": entry}))
        found = draw(run, fork, "--diff")
        for ax in found["difference"].axes:
            assert [x for line in ax.get_lines() if len(set(x := list(line.get_xdata()))) == 1] == [
                [step, step] for step in marked]
        where = "; ".join(f"the fork at step {step}" for step in marked)
        assert found["captions"]["difference"].endswith(f" Dashed: {where}.")


def test_a_fork_to_another_loss_has_its_loss_alone_as_a_curve(tmp_path, draw):
    """Numbers of two losses are no curve: before the fork there is none. Where --beta or the rate is another, it is of
    the same kind."""
    run = make_run(tmp_path / "a")
    for name, changed, first in (("b", "--loss", 2), ("c", "--loss_kwargs", 2), ("d", "--beta", 0)):
        fork = forked_from(tmp_path / name, run, 2, 0.25)
        entry = {"run": "a", "step": 2, "changed": {changed: ["x", "y"]}}
        (fork / "run.json").write_text(json.dumps({"arguments": {"loss": "ipo"}, "fork": entry}))
        found = draw(fork)
        _, steps, losses = points(found["training"], f"{name} loss")
        assert [step for step, value in zip(steps, losses) if not math.isnan(value)] == [*range(first, 5)]
        assert points(found["training"], f"{name} {SIDES[0]}")[1] == [*range(5)]
        assert ("A loss of another kind, before a fork, is not drawn" in found["captions"]["training"]) == bool(first)


def test_figures_of_scores_that_are_gone_go_too(tmp_path):
    """These scores have no masses, so a figure of masses is of others."""
    make_scores(tmp_path / "scores.parquet", SCORES)
    for kind in ("png", "pdf", "svg", "tex"):
        (tmp_path / f"mass_and_answers.{kind}").write_text("of before")
    (tmp_path / "mine.png").write_text("")
    assert {file.stem for file in drawing.draw_run(tmp_path)} == {"dynamics"}
    assert (tmp_path / "mine.png").exists() and not [*tmp_path.glob("mass_and_answers.*")]


def test_runs_may_be_named_behind_the_files_of_scores(tmp_path, draw):
    """As the usage line has them: plot.py --scores FILE RUN."""
    file = make_scores(tmp_path / "scores.parquet", SCORES, "a")
    table = pandas.concat([pandas.read_parquet(file), pandas.read_parquet(file).assign(run="b")])
    table.to_parquet(file)
    ends = [draw("--scores", file, "a")["captions"], draw("a", "--scores", file)["captions"]]
    assert ends[0] == ends[1] != draw("--scores", file)["captions"]


def test_a_figure_grows_with_a_long_legend(tmp_path, draw):
    """Six runs whose names fill a line each: the panels keep their height, with half an inch for the legend."""
    runs = [make_run(tmp_path / f"{k}{'-a-name-of-usual-length' * 5}") for k in range(6)]
    short, long = draw(*[make_run(tmp_path / f"{k}") for k in range(6)])["training"], draw(*runs)["training"]
    for fig in (short, long):
        fig.draw_without_rendering()
    heights = [fig.axes[0].get_window_extent().height / fig.dpi for fig in (short, long)]
    assert heights[1] > 0.8 * heights[0] and long.get_figheight() > short.get_figheight()


def test_the_difference_of_scores_is_of_the_rows_that_both_have(tmp_path, draw, capsys):
    """0.1, 0.2 and 0.3 in three rows: mean 0.2, and t = 4.302653 with two degrees of freedom at standard error
    0.1 / sqrt(3). A row that one run lacks, and a step, count nowhere."""
    run = make_run(tmp_path / "a")
    fork = forked_from(tmp_path / "b", run, 2, 0.25)
    make_scores(run / "scores.parquet", {("test", "chosen", 0): [-1.0, -2.0, -3.0, -9.0],
                                         ("test", "chosen", 4): [-1.0, -2.0, -3.0]}, "a")
    assert draw(run, fork, "--diff").keys() == {"difference", "folder", "captions"}
    assert "note: no scores of b were read, only of a: no difference of scores is drawn" in capsys.readouterr().err
    make_scores(fork / "scores.parquet", {("test", "chosen", 0): [-1.0, -2.0, -3.0], ("test", "chosen", 2): [-1.0],
                                          ("test", "chosen", 4): [-0.9, -1.8, -2.7]}, "b")
    fig = draw(run, fork, "--diff")["difference_scores"]
    assert points(fig, "a chosen") == (0, [0, 4], [-2.0, -2.0])
    assert points(fig, "b chosen")[2] == pytest.approx([-2.0, -1.8])
    assert points(fig, "difference chosen")[2] == pytest.approx([0, 0.2])
    (band,) = [part for part in fig.axes[1].collections if isinstance(part, PolyCollection)]
    ends = sorted(y for x, y in band.get_paths()[0].vertices if x == 4)
    assert [ends[0], ends[-1]] == pytest.approx([0.2 - 4.302653 * 0.1 / 3**0.5, 0.2 + 4.302653 * 0.1 / 3**0.5])


def test_runs_without_scores_are_told_by_what_was_read(tmp_path, draw, capsys):
    """One call may score several runs into the folder of the first; a file may be a copy of another run's."""
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    tables = [pandas.read_parquet(make_scores(tmp_path / "s.parquet", SCORES, run)) for run in ("one", "two")]
    pandas.concat(tables, ignore_index=True).to_parquet(one / "scores.parquet")
    assert "dynamics" in draw(one, two) and capsys.readouterr().err == ""
    tables[1].to_parquet(one / "scores.parquet")
    assert "dynamics" in draw(one) and capsys.readouterr().err == "note: no scores of one were read, only of two\n"
    draw(one, two, "--diff", "--test", "forward")
    assert ("no scores of one on forward were read, only of two: no difference of scores is drawn"
            ) in capsys.readouterr().err


def test_a_difference_is_of_rows_that_both_runs_have(tmp_path, draw):
    """At step 4 the first row failed under a and the last under b: of all three curves the middle row is left."""
    run, fork = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for place, name, last in ((run, "a", [math.nan, -2.0, -4.0]), (fork, "b", [-1.0, -1.5, math.nan])):
        make_scores(place / "scores.parquet", {("test", "chosen", 0): [-1.0, -2.0, -3.0],
                                               ("test", "chosen", 4): last}, name)
    fig = draw(run, fork, "--diff")["difference_scores"]
    found = [points(fig, f"{label} chosen")[2] for label in ("a", "b", "difference")]
    assert found == [[-2.0, -2.0], [-2.0, -1.5], [0.0, 0.5]]


@pytest.mark.parametrize("response", ["chosen", "greedy"])
def test_there_is_no_difference_of_other_texts(tmp_path, draw, capsys, response):
    """Each run's own held-out data are called test, and its first checkpoint's own answer greedy."""
    run, fork = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for place, name, tokens in ((run, "a", [10, 10]), (fork, "b", [10, 11])):
        scores = {("test", which, step): [-1.0, -2.0] for which in {"chosen", response} for step in (0, 4)}
        table = pandas.read_parquet(make_scores(place / "scores.parquet", scores, name))
        table.loc[table["response"] == response, "tokens"] = table["row"].map(dict(enumerate(tokens)))
        table.to_parquet(place / "scores.parquet")
    assert draw(run, fork, "--diff").keys() == {"difference", "folder", "captions"}
    assert ("note: a and b were scored on different rows, or tokens, that are both called test; score both in one "
            "call: score.py a b --dataset_path test=FILE") in capsys.readouterr().err


def test_levels_of_a_difference_that_lie_close_together_are_told_apart(tmp_path, draw):
    """Answers at -1 and -1.5 and their tokens in random order at -13: the first two, 4% of the range apart, have most
    of the panel's height between them and its lower part."""
    run = make_run(tmp_path / "a")
    fork = forked_from(tmp_path / "b", run, 2, 0.25)
    for place, name in ((run, "a"), (fork, "b")):
        make_scores(place / "scores.parquet", {("test", side, step): [level, level] for step in (0, 4) for side, level
                                               in (("chosen", -1.0), ("rejected", -1.5), ("shuffled", -13.0))}, name)
    found = draw(run, fork, "--diff")
    above = found["difference_scores"].axes[0]
    assert "The scale changes at the dotted lines." in found["captions"]["difference_scores"]
    far, low, high = (above.transAxes.inverted().transform(above.transData.transform((0, level)))[1]
                      for level in (-13.0, -1.5, -1.0))
    assert 0 < far < 0.25 < low + 0.01 and high - low > 0.6 and high <= 1


def test_a_difference_that_can_not_be_drawn(tmp_path, draw):
    """One run or three, flags of other figures, and runs that have nothing in common: one line each."""
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", sides=())
    (other / "metrics.jsonl").write_text(json.dumps({"step": 9, "loss": 1.0}) + "\n")
    scores = make_scores(tmp_path / "scores.parquet", SCORES)
    for arguments, words in (([run], "needs two runs"), ([run, run], "needs two runs"),
                             ([run, other, tmp_path], "needs two runs"), ([run, other, "--floor", "1"], "takes no"),
                             ([run, "dpo", "--scores", scores], "needs the folders of two runs, and found a"),
                             ([run, other], "a and b have no panel of training in common")):
        with pytest.raises(UserError, match=f"^--diff: .*?{words}"):
            draw(*arguments, "--diff")
    (other / "run.json").write_text('{"fork": {"step": -2}}')
    with pytest.raises(UserError, match="the step of the fork has no value that it could have"):
        draw(run, other, "--diff")


def test_sft_has_no_panel_of_rewards(tmp_path):
    sides = ("logps_per_token/chosen",)
    fig = training_figure({"sft": read_metrics(make_run(tmp_path / "sft", sides=sides))}, 1)[0]
    assert [ax.get_ylabel() for ax in fig.axes] == ["loss", "log-prob (nats per token)"]


def test_a_single_step_can_be_seen(tmp_path):
    fig = training_figure({"a": read_metrics(make_run(tmp_path / "a", steps=1, evals=()))}, 2)[0]
    assert {line.get_marker() for ax in fig.axes for line in ax.get_lines()} == {"."}


def test_several_runs_have_a_colour_and_a_name_each(tmp_path, draw):
    found = draw(*[make_run(tmp_path / name) for name in "abcdefg"])
    colours = {}
    for ax in found["training"].axes:
        for line in ax.get_lines():
            colours.setdefault(line.get_label()[0], set()).add(to_hex(line.get_color()))
    assert len(colours) == 7 == len(set.union(*colours.values())) and set.union(*colours.values()) < OKABE_ITO
    names = [text.get_text() for text in found["training"].legends[0].get_texts()]
    assert names[:8] == [*"abcdefg", "chosen"]
    assert str(found["folder"]) == "runs/figures"


def test_two_folders_of_one_name_are_told_apart_by_their_paths(tmp_path, draw):
    folders = [make_run(tmp_path / parent / "run") for parent in "ab"]
    fig = draw(*folders, folders[0])["training"]  # one given twice is drawn once
    names = [text.get_text().replace("\n", "") for text in fig.legends[0].get_texts()]
    assert names[:3] == [*map(str, folders), "chosen"]


def test_without_arguments_the_newest_run_is_drawn(tmp_path, draw, monkeypatch):
    """The one that was started last, though another ended after it and wrote its run.json again."""
    for name, started in (("a", 1000), ("b", 3000), ("c", 2000)):
        make_run(tmp_path / "runs" / name, started=started)
    for name, started, ended in (("c", 2000, 9000), ("b", 3000, 4000)):
        (tmp_path / "runs" / name / "checkpoint-0").mkdir()
        (tmp_path / "runs" / name / "checkpoint-0" / "manifest.json").write_text("{}")
        os.utime(tmp_path / "runs" / name / "checkpoint-0" / "manifest.json", (started, started))
        os.utime(tmp_path / "runs" / name / "run.json", (ended, ended))
    monkeypatch.chdir(tmp_path)
    found = draw()
    assert found["training"].legends[0].get_title().get_text() == "b"
    assert str(found["folder"]) == "runs/b"


def test_means_and_intervals_are_those_computed_by_hand(tmp_path, draw):
    """sem of -1, -2, -3: standard deviation 1, over the root of 3. Of -4, -4, -7: mean -5, deviations 1, 1, -2."""
    fig = draw("--scores", make_scores(tmp_path / "s.parquet", SCORES))["dynamics"]
    assert [ax.get_title() for ax in fig.axes] == ["forward", "forward", "reverse", "reverse"]  # level and change
    assert fig.axes[0].get_ylim() == fig.axes[2].get_ylim() != fig.axes[1].get_ylim()  # levels, to be compared
    chosen, rejected = fig.axes[0].get_lines()
    assert list(chosen.get_xdata()) == list(rejected.get_xdata()) == [0, 40]
    assert list(chosen.get_ydata()) == [-2.0, -1.5] and list(rejected.get_ydata()) == [-5.0, -6.0]
    bands = [b.get_paths()[0].vertices for b in fig.axes[0].collections if isinstance(b, PolyCollection)]
    for band, at_0, at_40 in zip(bands, ((-2, 1), (-5, math.sqrt(3))), ((-1.5, 0.5), (-6, 1))):
        for step, (mean, deviation) in ((0, at_0), (40, at_40)):
            reach = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * deviation / math.sqrt(3)
            ys = band[band[:, 0] == step][:, 1]
            assert ys.min() == pytest.approx(mean - reach, abs=1e-12)
            assert ys.max() == pytest.approx(mean + reach, abs=1e-12)
    assert list(fig.axes[2].get_lines()[0].get_ydata()) == [-0.5, -0.25]
    assert not fig.axes[2].collections  # n = 1: no interval
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["chosen", "rejected", "95% interval, n = 3"]
    assert fig.axes[0].get_ylabel() == "log-prob (nats per token)" and fig.axes[2].get_xlabel() == "DPO step"
    assert fig.axes[1].get_ylabel() == "change since step 0\n(nats per token)"


def test_scores_beside_runs_are_joined(tmp_path, draw):
    for name in "ab":
        make_scores(make_run(tmp_path / name) / "scores.parquet", SCORES, run=name)
    fig = draw(tmp_path / "a", tmp_path / "b")["dynamics"]
    assert [line.get_label() for line in fig.axes[0].get_lines()] == [
        "a dpo chosen", "a dpo rejected", "b dpo chosen", "b dpo rejected"]
    assert {line.get_linestyle() for line in fig.axes[2].get_lines()} == {"-", "--"}


def test_focus_gives_the_band_its_share():
    """Of 0 to -10, [-1, -0.5] gets the quarter; 9.5 nats share the rest, 3/38 of the height each."""
    ax = Figure().add_subplot()
    ax.set_ylim(-10, 0)
    set_focus(ax, -1, -0.5)
    ax.figure.draw_without_rendering()
    place = ax.transData + ax.transAxes.inverted()
    for y, height in ((-10, 0), (-9, 3 / 38), (-1, 27 / 38), (-0.75, 27 / 38 + 0.125), (-0.5, 27 / 38 + 0.25), (0, 1)):
        assert place.transform((0, y))[1] == pytest.approx(height, abs=1e-12)
    values = np.linspace(-12, 2, 10001)
    there = ax.yaxis.get_transform()
    assert np.abs(there.inverted().transform(there.transform(values)) - values).max() < 1e-12
    assert (np.diff(there.transform(values)) > 0).all()  # out of sight too: nothing is moved to the edge
    ticks = ax.get_yticks()
    assert {-1, -0.5, -10} <= set(ticks)
    assert [float(t.get_text().replace("\N{MINUS SIGN}", "-")) for t in ax.get_yticklabels()] == pytest.approx(ticks)
    assert np.diff([place.transform((0, y))[1] for y in ticks]).min() > 0.08
    assert [line.get_ydata()[0] for line in ax.get_lines()] == [-1, -0.5]


def test_focus_on_all_there_is_stays_linear_and_a_wider_one_widens_the_axis():
    for band in ((-4, 0), (-8, 1)):
        ax = Figure().add_subplot()
        ax.set_ylim(-4, 0)
        assert not set_focus(ax, *band) and not ax.get_lines()
        assert ax.get_ylim() == band
        assert (ax.transData + ax.transAxes.inverted()).transform((0, sum(band) / 2))[1] == pytest.approx(0.5)


def test_focus_is_an_option(tmp_path, draw):
    file = make_scores(tmp_path / "s.parquet", SCORES)
    for ax in draw("--scores", file, "--focus", "-3", "-1")["dynamics"].axes[::2]:  # levels, not changes
        place = ax.transData + ax.transAxes.inverted()
        assert np.diff(place.transform([(0, -3), (0, -1)])[:, 1]) == pytest.approx(0.25, abs=1e-12)


@pytest.mark.parametrize("band, changes", [(("-3", "-1"), True), (("-50", "50"), False)])
def test_where_the_focus_holds_all_nobody_says_that_the_scale_changes(tmp_path, draw, band, changes):
    found = draw("--scores", make_scores(tmp_path / "s.parquet", SCORES), "--focus", *band)
    legend = [text.get_text() for text in found["dynamics"].legends[0].get_texts()]
    assert ("scale changes" in legend) == changes == ("The scale changes" in found["captions"]["dynamics"])


def boxes(fig):
    fig.draw_without_rendering()
    renderer = fig._get_renderer()
    return [legend.get_window_extent() for legend in fig.legends] + [ax.get_tightbbox(renderer) for ax in fig.axes]


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("style", [None, "ggplot"])
def test_nothing_overlaps_or_leaves_the_figure(tmp_path, draw, columns, style):
    names = ["dpo-2026-11-22-132049", "a-long-name-of-a-run-that-somebody-gave-it-on-a-friday-afternoon"]
    runs = [make_run(tmp_path / name) for name in names]
    values = {(d, r, s): [-i - 1.0, -i - 1.5] for d in "vwxyz" for s in (0, 5)
              for i, r in enumerate(("chosen", "rejected", "other", "shuffled"))}
    for run in runs:
        make_scores(run / "scores.parquet", values, run=run.name)
    extra = ["--columns", columns, *(["--style", style] if style else [])]
    for chosen in (runs[:1], runs):
        for name, fig in draw(*chosen, *extra, "--focus", "-2", "-1.5").items():
            if name in ("folder", "captions"):
                continue
            found = boxes(fig)
            for i, box in enumerate(found):
                assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= fig.bbox.x1 + 1 and box.y1 <= fig.bbox.y1 + 1
                for other in found[i + 1 :]:
                    apart = (box.x1 <= other.x0 + 1 or other.x1 <= box.x0 + 1 or box.y1 <= other.y0 + 1
                             or other.y1 <= box.y0 + 1)
                    assert apart, (name, box, other)


@pytest.mark.parametrize("columns, inches", [(1, 3.3), (2, 6.9)])
def test_files_are_as_wide_as_a_journals_columns(tmp_path, columns, inches):
    plot.main([str(make_run(tmp_path / "a")), "--columns", str(columns)])
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "metrics.jsonl", "run.json", "training.pdf", "training.png", "training.svg", "training.tex"]
    png, pdf, svg = ((tmp_path / "a" / f"training.{kind}").read_bytes() for kind in FORMATS)
    assert int.from_bytes(png[16:20], "big") == round(300 * inches)
    assert float(re.search(rb"/MediaBox \[ 0 0 (\S+)", pdf)[1]) == pytest.approx(72 * inches)
    assert float(re.search(rb'<svg [^>]*width="([\d.]+)pt"', svg)[1]) == pytest.approx(72 * inches)
    assert b"Date" not in pdf and b"<dc:date>" not in svg


def test_another_process_writes_the_same_bytes(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a")
    make_scores(run / "scores.parquet", SCORES, run="a")
    plot.main([str(run), "--output_dir", str(tmp_path / "one")])
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    done = launch(ROOT / "plot.py", run, "--output_dir", tmp_path / "two")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in ("training", "dynamics") for kind in (*FORMATS, "tex"))
    assert sorted(line.rpartition("/")[2] for line in done.stdout.split()) == files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def broken_metrics(text):
    return lambda run: (run / "metrics.jsonl").write_text(text)


def broken_scores(**changed):
    return lambda run: make_scores(run / "scores.parquet", SCORES, **changed)


def without(*names):
    def drop(run):
        make_scores(run / "scores.parquet", SCORES)
        table = pandas.read_parquet(run / "scores.parquet").drop(columns=list(names))
        table.to_parquet(run / "scores.parquet")
    return drop


@pytest.mark.parametrize("change, flags, message", [
    (lambda run: (run / "metrics.jsonl").unlink(), [], r"a/metrics.jsonl: No such file or directory"),
    (broken_metrics('{"step": 0, "loss": 1.0}\n{"step": 1, "lo'), [], r"a/metrics.jsonl, line 2: not JSON"),
    (broken_metrics('{"step": 0, "loss": 1.0}\n[1]\n'), [], r"a/metrics.jsonl, line 2: expected an object with a step"),
    (broken_metrics('{"loss": 1.0}\n'), [], r"a/metrics.jsonl, line 1: expected an object with a step"),
    (broken_metrics('{"step": 0, "loss": NaN}\n'), [], r"a/metrics.jsonl, line 1: loss is NaN, not a finite number"),
    (broken_metrics('{"step": "0", "loss": 1}\n'), [], r'a/metrics.jsonl, line 1: step is "0", not a finite number'),
    (broken_metrics(""), [], r"a/metrics.jsonl: has no step to draw yet"),
    (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe"), [], r"a/metrics.jsonl: not text"),
    (without("response", "step"), [], r"a/scores.parquet: no column response, step; it has run, phase"),
    (lambda run: (run / "scores.parquet").write_text("PAR1"), [], r"a/scores.parquet: can't be read as Parquet"),
    (broken_scores(mean_logps=-math.inf), [], r"a/scores.parquet, row 0: has a value that is missing or not finite"),
    (broken_scores(response=None), [], r"a/scores.parquet, row 0: has a value that is missing or not finite"),
    (broken_scores(mean_logps="x"), [], r"a/scores.parquet: column mean_logps must hold numbers"),
    (broken_scores(row=3), [], r"a/scores.parquet, row 1: is there twice"),
    (lambda run: None, ["--focus", "0", "1"], r"--focus: is for the figure of scores.parquet"),
    (broken_scores(), ["--focus", "1", "0"], r"LOW must be below HIGH"),
    (broken_scores(), ["--scores", "nowhere.parquet"], r"nowhere.parquet: is not there; score.py makes it"),
    (broken_scores(), ["--style", "nonsense"], r"--style nonsense: neither a style"),
    (broken_scores(), ["--output_dir", __file__], r"--output_dir .*test_plot.py: can't be written"),
    (broken_scores(), ["--column", "2"], r"unknown argument --column: did you mean --columns"),
    (broken_scores(), ["--columns", "3"], r"--columns: invalid choice: 3"),
    (broken_scores(), ["elsewhere"], r"elsewhere/metrics.jsonl: No such file"),
])
def test_wrong_input_is_named_and_leaves_nothing(tmp_path, change, flags, message):
    run = make_run(tmp_path / "a")
    change(run)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        plot.main([str(run), *flags])
    assert sorted(tmp_path.rglob("*")) == before


def test_scores_of_one_run_in_two_files_are_not_mixed(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run in runs:
        make_scores(run / "scores.parquet", SCORES, run="dpo")
    with pytest.raises(UserError, match="more than one has a run called dpo"):
        plot.main([*map(str, runs)])


def test_more_runs_than_colours_are_refused(tmp_path):
    with pytest.raises(UserError, match="8 runs: at most 7"):
        plot.main([str(make_run(tmp_path / name)) for name in "abcdefgh"])


def test_no_runs_at_all_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["plot.py"])
    assert run_script(plot.main) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"error: runs/ holds no run; .*\n", said.err) and not said.out
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_figures_whole(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a")
    plot.main([str(run)])
    before = {file: file.read_bytes() for file in run.iterdir()}
    make_scores(run / "scores.parquet", SCORES)
    before[run / "scores.parquet"] = (run / "scores.parquet").read_bytes()
    write, written = type(run).write_bytes, []

    def full(file, content):
        written.append(write(file, content[: len(content) // 2] if len(written) == 3 else content))
        if len(written) == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(run), "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        plot.main([str(run), "--columns", "1"])
    assert {file: file.read_bytes() for file in run.iterdir()} == before


def test_who_has_a_figure_open_keeps_it_whole(tmp_path):
    """A figure is exchanged for the new one, never written over."""
    run = make_run(tmp_path / "a")
    plot.main([str(run)])
    before = (run / "training.pdf").read_bytes()
    with (run / "training.pdf").open("rb") as reader:
        plot.main([str(run), "--columns", "1"])
        assert reader.read() == before != (run / "training.pdf").read_bytes()


def test_a_strip_without_tokens_says_how_to_get_them(tmp_path):
    make_scores(make_run(tmp_path / "a") / "scores.parquet", SCORES)
    with pytest.raises(UserError, match="tokens.parquet: is not there; score.py makes it where it is told --tokens"):
        plot.main([str(tmp_path / "a"), "--strip", "0"])


# Drawn by themselves, at the end of a run


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "garbage"])
def test_a_notebooks_backend_is_not_ours(backend, tmp_path, monkeypatch):
    """MPLBACKEND as a notebook leaves it to what is started from it, and one that matplotlib refuses: figures are
    drawn all the same, to the same bytes."""
    run = make_run(tmp_path / "run")
    monkeypatch.setenv("MPLBACKEND", backend)
    launch(ROOT / "plot.py", run)
    found = (run / "training.png").read_bytes()
    draw_after(run)
    assert (run / "training.png").read_bytes() == found


@pytest.mark.parametrize("error, words", [
    (UserError("no step"), "no figure: no step"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "no figure: 'utf-8' codec can't decode byte"
     " 0xff in position 0: invalid start byte; `"),
    (RuntimeError("no\nfont"), "no figure: no; `"), (KeyError("x"), "no figure: KeyError 'x'; `")])
def test_a_figure_that_fails_is_one_line(error, words, tmp_path, monkeypatch):
    """A matplotlibrc that can't be read, say: a run that has ended has ended."""
    def fails(folder):
        raise error

    monkeypatch.setattr(drawing, "draw_run", fails)
    said = draw_after(tmp_path)
    assert said.startswith(words) and "\n" not in said and ("plot.py" in said) == ("`" in words)


def test_two_that_draw_at_once_do_not_take_each_others_files(tmp_path, monkeypatch):
    """plot.py beside a run that ends, say: both end well, and every file is one of theirs, whole."""
    figure, flush, others = Figure((1, 1)), atomic.flush, [2]

    def meanwhile(place):
        if others:
            drawing.save({"a": (figure, "second")}, tmp_path, others.pop())
        flush(place)

    monkeypatch.setattr(atomic, "flush", meanwhile)  # the first has written all of its files, and named none
    files = drawing.save({"a": (figure, "first")}, tmp_path, 1)
    assert not others and {*files} == {*tmp_path.iterdir()} and "first" in (tmp_path / "a.tex").read_text()


def test_a_finished_run_without_its_figure_gets_one(tmp_path, capsys):
    """Killed while it drew, or not asked to: the same command draws, and the next one finds it there."""
    run = make_run(tmp_path / "run")
    (left := run / ".training.png.1.partial").write_bytes(b"half")
    os.utime(left, (0, time.time() - 25 * 3600))  # a younger one may be written to by somebody else
    args = SimpleNamespace(merge_weights=False, draw=False)
    start = SimpleNamespace(args=args, folder=run, resumed={"steps": 5})
    train.complete_finished_run(start)
    assert not (run / "training.png").exists()
    args.draw = True
    train.complete_finished_run(start)
    assert "figures: training.png" in capsys.readouterr().out and not list(run.glob(".*"))
    train.complete_finished_run(start)
    said = capsys.readouterr().out
    assert said.startswith(f"{run}: this run is finished, all 5 steps\n") and "figure" not in said
