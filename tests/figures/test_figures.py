"""The figures of plot.py beside training and dynamics: their numbers, their axes, their files, and what they refuse."""

import inspect
import json
import math
import os
import re
import shutil
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas
import pytest
from conftest import ROOT, launch
from matplotlib.backends.backend_pdf import PdfFile
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.texmanager import TexManager
from matplotlib.text import Text
from test_plot import SCORES, boxes, draw, make_run, make_scores, points  # noqa: F401  (draw is a fixture)

import plot
from nanodpo.errors import UserError
from nanodpo.figures import drawing, heatmap, intervals, records, training
from nanodpo.figures.axes import crowd, escape_tex, place, set_focus, set_phases
from nanodpo.figures.intervals import t_quantile
from nanodpo.figures.selection import select_there

ROLES = {"forward": "f", "reverse": "r", "mixed": "m", "dpo": "d"}
TESTS = ("forward", "reverse", "mixed")
STEPS = {"f": (0, 50, 100), "r": (0, 50, 100), "m": (0, 100, 200), "d": (0, 20, 40)}


def value(role, test, response, step, row, seed):
    """A number of its own for each score, and for each gap."""
    i, j = "frmd".index(role), TESTS.index(test)
    gap = 0.03 + step / (512 + 64 * i) + j / 256 + seed * seed / 512
    return -1.0 - i / 4 - j / 16 - gap * (response == "rejected") - row * step / 4096 - seed * (1 + step) / 1024


def make_lab(file, seeds=3, rows=4, but=lambda table: table):
    """Scores of the paper's experiment: runs f0, f1 ..., r0 ..., m0 ..., d0 ..."""
    lines = [{"run": f"{role}{seed}", "phase": "dpo" if role == "d" else "sft", "step": step, "dataset": test,
              "row": row, "response": side, "tokens": 10, "mean_logps": value(role, test, side, step, row, seed)}
             for role in "frmd" for seed in range(seeds) for step in STEPS[role] for test in TESTS
             for row in range(rows) for side in ("chosen", "rejected")]
    but(pandas.DataFrame(lines)).to_parquet(file)
    return file


def lab_flags(file, seeds=3):
    runs = [[f"--{role}", *(f"{name}{seed}" for seed in range(seeds))] for role, name in ROLES.items()]
    return ["--three_panel", *sum(runs, []), "--scores", file]


def by_hand(role, test, response, step, seeds=3, rows=4):
    """Means of each seed, by plain loops; the gap is chosen - rejected."""
    if response == "gap":
        sides = [by_hand(role, test, side, step, seeds, rows) for side in ("chosen", "rejected")]
        return [a - b for a, b in zip(*sides)]
    return [sum(value(role, test, response, step, row, seed) for row in range(rows)) / rows for seed in range(seeds)]


def bands(ax):
    """{colour: [(x, low, high), ...]} of what is shaded, one list a band."""
    found = []
    for band in ax.collections:
        if len(band.get_paths()):
            vertices = band.get_paths()[0].vertices
            xs = sorted(set(vertices[:, 0]))
            found.append([(x, *(f(vertices[vertices[:, 0] == x][:, 1]) for f in (min, max))) for x in xs])
    return found


def test_t_quantiles_are_the_closed_forms():
    """One degree of freedom is Cauchy, tan(pi p - pi/2); two: t = c sqrt(2 / (1 - c^2)), c = 2p - 1; then a table's."""
    assert t_quantile(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)
    assert t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)
    for freedom, t in ((3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272), (1000, 1.962339)):
        assert t_quantile(freedom) == pytest.approx(t, abs=5e-7)


def test_the_three_panels_draw_the_means_over_seeds_and_their_t_intervals(tmp_path, draw):  # noqa: F811
    fig = draw(*lab_flags(make_lab(tmp_path / "s.parquet")))["three_panel"]
    names = {"f": "F", "r": "R", "m": "M", "d": "DPO"}
    wanted = [(0, role, test, side) for role, test in (("f", "forward"), ("r", "reverse"))
              for side in ("chosen", "rejected")]
    wanted += [(1, role, "mixed", side) for role in "md" for side in ("chosen", "rejected")]
    wanted += [(2, role, test, "gap") for role in "frmd" for test in TESTS]
    for panel, role, test, side in wanted:
        (line,) = [line for line in fig.axes[panel].get_lines() if line.get_label() == f"{names[role]} {test} {side}"]
        means = [np.mean(by_hand(role, test, side, step)) for step in STEPS[role]]
        assert line.get_ydata() == pytest.approx(means, abs=1e-12)
        scale = 1 if panel == 0 else 40 if role == "d" else 200  # (b) and (c): a phase is one unit wide
        assert list(line.get_xdata()) == [(role == "d" and panel > 0) + step / scale for step in STEPS[role]]
    drawn = [len([line for line in ax.get_lines() if not line.get_label().startswith("_")]) for ax in fig.axes]
    assert drawn == [4, 4, 12]
    seeds = by_hand("f", "forward", "chosen", 50)
    reach = t_quantile(2) * np.std(seeds, ddof=1) / math.sqrt(3)
    assert bands(fig.axes[0])[0][1] == pytest.approx((50, np.mean(seeds) - reach, np.mean(seeds) + reach), abs=1e-12)
    assert "95% interval over 3 seeds" in [text.get_text() for text in fig.legends[0].get_texts()]


def test_one_run_of_each_has_intervals_over_rows(tmp_path, draw):  # noqa: F811
    fig = draw(*lab_flags(make_lab(tmp_path / "s.parquet", seeds=1), seeds=1))["three_panel"]
    gaps = [value("f", "forward", "chosen", 100, row, 0) - value("f", "forward", "rejected", 100, row, 0)
            for row in range(4)]
    values = [value("f", "forward", "chosen", 100, row, 0) for row in range(4)]
    reach = 3.182446305284263 * np.std(values, ddof=1) / 2  # Student's t of four rows
    mean = np.mean(values)
    assert bands(fig.axes[0])[0][-1] == pytest.approx((100, mean - reach, mean + reach), abs=1e-12)
    assert points(fig, "F forward gap")[2][-1] == pytest.approx(np.mean(gaps), abs=1e-12)
    assert "95% interval over 4 rows" in [text.get_text() for text in fig.legends[0].get_texts()]


def test_the_three_panels_caption_says_which_errors_are_over_problems(tmp_path, draw):  # noqa: F811
    """Rows of one problem count as less than as many rows: whoever takes the standard error over rows finds another."""
    of_rows = draw(*lab_flags(make_lab(tmp_path / "one.parquet", seeds=1), seeds=1))["captions"]["three_panel"]
    assert "over 4 rows (mean ± Student's t standard errors; those of rows are over problems)." in of_rows
    assert "over 3 seeds (mean ± Student's t standard errors)." in draw(
        *lab_flags(make_lab(tmp_path / "s.parquet")))["captions"]["three_panel"]


def test_a_single_row_counts_among_those_of_no_interval(tmp_path, draw):  # noqa: F811
    def fail(table):
        gone = (table["run"] == "f0") & (table["response"] == "chosen") & (table["step"] == 50) & (table["row"] > 0)
        return table.assign(mean_logps=table["mean_logps"].mask(gone))

    found = draw(*lab_flags(make_lab(tmp_path / "s.parquet", seeds=1, but=fail), seeds=1))
    said = "Shaded: 95% interval over 4 rows, 3 scores missing (mean"
    assert said in found["captions"]["three_panel"]


def test_phases_are_named_and_ticks_are_in_their_own_steps(tmp_path, draw):  # noqa: F811
    fig = draw(*lab_flags(make_lab(tmp_path / "s.parquet")))["three_panel"]
    for ax in fig.axes[1:]:
        assert [text.get_text() for text in ax.texts] == ["SFT", "DPO"]
        assert [line.get_xdata()[0] for line in ax.get_lines() if list(line.get_ydata()) == [0, 1]] == [1]
        for tick, label in zip(ax.get_xticks(), [label.get_text() for label in ax.get_xticklabels()]):
            at = 1 if label == "200 | 0" else float(label) / 200 if tick < 1 else 1 + float(label) / 40
            assert tick == pytest.approx(at, abs=1e-12)


@pytest.mark.parametrize("focus, ratios", [(None, None), ((0.04, 0.2), ("1", "2", "3"))])
def test_the_gaps_axis_and_the_widths(tmp_path, draw, focus, ratios):  # noqa: F811
    more = ["--focus", *map(str, focus)] if focus else []
    more += ["--panel_ratios", *ratios] if ratios else []
    fig = draw(*lab_flags(make_lab(tmp_path / "s.parquet")), *more)["three_panel"]
    fig.draw_without_rendering()
    ax = fig.axes[2]
    high = (ax.transData + ax.transAxes.inverted()).transform([(0, y) for y in focus or (0.05, 0.1)])[:, 1]
    assert high[1] - high[0] == pytest.approx(0.25, abs=1e-12)
    assert tuple(ax.get_gridspec().get_width_ratios()) == ((1, 2, 3) if ratios else (1, 1, 1.2))


@pytest.mark.parametrize("band, changes", [(("0.04", "0.2"), True), (("-50", "50"), False)])
def test_gaps_whose_focus_holds_all_have_one_scale(tmp_path, draw, band, changes):  # noqa: F811
    found = draw(*lab_flags(make_lab(tmp_path / "s.parquet")), "--focus", *band)
    legend = [text.get_text() for text in found["three_panel"].legends[0].get_texts()]
    assert ("scale changes" in legend) == changes == ("the scale changes" in found["captions"]["three_panel"])


def test_positions_in_the_saved_svg_are_those_of_the_focus_axis(tmp_path):
    """Ticks and the points of a curve, read off the file: in the band a quarter of the height, outside one scale."""
    plot.main([str(flag) for flag in lab_flags(make_lab(tmp_path / "s.parquet"))])
    panel = (tmp_path / "three_panel.svg").read_text().split('<g id="axes_3">')[1]
    corners = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", panel.split("</g>")[0])]
    height = max(corners) - min(corners)
    axis = re.search(r'<g id="ytick_.*?(?=<g id="(?!ytick_|line2d_|text_))', panel, re.DOTALL)[0]
    found = re.findall(r' y="([\d.]+)"(?:(?!<!--).)*<!-- (\S+) -->', axis, re.DOTALL)
    ticks = {float(label.replace("\N{MINUS SIGN}", "-")): float(y) for y, label in found}
    assert ticks[0.05] - ticks[0.1] == pytest.approx(height / 4, rel=1e-5)
    above = sorted(tick for tick in ticks if tick >= 0.1)
    slope = (ticks[0.1] - ticks[above[-1]]) / (above[-1] - 0.1)  # points of the page a nat

    def where(gap):
        if gap > 0.1:
            return ticks[0.1] - (gap - 0.1) * slope
        return ticks[0.05] - (gap - 0.05) * (height / 4 / 0.05 if gap > 0.05 else slope)

    assert [ticks[tick] for tick in ticks] == pytest.approx([where(tick) for tick in ticks], abs=1e-3)
    curves = re.findall(r'<path d="(M [^"]*)"[^>]*stroke: #d55e00', panel)
    curves = curves[:3]  # DPO on the three test sets; then comes the legend
    for test, curve in zip(TESTS, curves, strict=True):
        ys = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", curve)]
        gaps = [np.mean(by_hand("d", test, "gap", step)) for step in STEPS["d"]]
        assert ys == pytest.approx([where(gap) for gap in gaps], abs=1e-3)


@pytest.mark.parametrize("low, high", [(-math.inf, 0), (0, math.inf), (0, math.nan), (0, 0)])
def test_a_band_that_is_none_is_refused(low, high):
    with pytest.raises(UserError, match=re.escape(f"--focus {low:g} {high:g}: LOW must be below HIGH")):
        set_focus(None, low, high)


def test_where_steps_lie_on_an_axis_of_phases():
    """The second phase is the unit from 1 to 2, whatever its own first step; a phase of one step begins its unit."""
    assert [place(step, 1, 20, 60) for step in (20, 30, 60)] == [1, 1.25, 2] and place(7, 2, 7, 7) == 2


def curve(response, values, run="r", **more):
    """Lines of one curve from {at: mean}."""
    return [{"dataset": "d", "run": run, "phase": "dpo", "response": response, "step": at, "at": at, "mean": mean}
            | more for at, mean in values.items()]


def test_a_gap_is_of_the_rows_that_have_both_sides():
    """Gaps 1 and 4: mean 2.5, sem 1.5, t of one degree of freedom; a row without its rejected has no gap, not 0."""
    sides = {"chosen": (-1.0, -2.0, -3.0), "rejected": (-2.0, math.nan, -7.0)}
    table = pandas.DataFrame([{"dataset": "d", "run": "r", "phase": "dpo", "response": side, "step": 0, "at": 0,
                               "row": row, "problem": str(row), "mean_logps": value} for side in sides
                              for row, value in enumerate(sides[side])])
    found = intervals.levels(table).set_index("response")[["mean", "low", "high", "n", "left_out"]]
    reach = 1.5 * math.tan(math.pi * 0.475)
    assert found.loc["gap"].tolist() == pytest.approx([2.5, 2.5 - reach, 2.5 + reach, 2, 0])
    assert found.loc["rejected", ["mean", "n", "left_out"]].tolist() == [-4.5, 2, 1]


def test_over_seeds_by_hand():
    """Means 1 and 3: 2 +- t(1) * 1; what the runs left out adds up. One run stays as it is."""
    one = curve("chosen", {0: 1.0}, "a", low=0.5, high=1.5, left_out=1)
    both = intervals.over_seeds(pandas.DataFrame(one + curve("chosen", {0: 3.0}, "b", low=2, high=4, left_out=2)))
    reach = math.tan(math.pi * 0.475)
    assert both[["mean", "low", "high", "left_out"]].values.tolist() == [pytest.approx([2, 2 - reach, 2 + reach, 3])]
    assert intervals.over_seeds(pandas.DataFrame(one)).to_dict("records") == one


def test_means_alone_move_each_since_its_own_first_place():
    """In whatever order the lines stand; an interval of levels says nothing of a change."""
    lines = curve("chosen", {10: -1.0, 0: -0.5}, low=-9.0, high=9.0)
    lines += curve("rejected", {0: -3.0, 10: -2.0}, low=-9.0, high=9.0)
    found = intervals.moved(pandas.DataFrame(lines))
    assert found["mean"].tolist() == [-0.5, 0.0, 0.0, 1.0] and found[["low", "high"]].isna().all(axis=None)


@pytest.mark.parametrize("values, band", [
    ([-0.16, -0.26, -0.9, -13.3], (-1.0, 0.0)), ([-0.16, -0.26, -0.9], None), ([-0.5], None), ([], None),
    ([-9.0, -9.5, -9.8, 9.9, math.nan], (-9.8, -9.0)), ([-0.5, -0.5, -9.0], None)])
def test_what_lies_together_is_found_where_the_rest_is_far_away(values, band):
    found = crowd(values)
    assert (found is None) == (band is None)
    assert band is None or (found[0] <= band[0] and band[1] <= found[1] and found[1] - found[0] < 2)


@pytest.mark.parametrize("apart, reach", [(0.001, 0.006), (0.1, 0.6353)])
def test_responses_that_lie_together_get_three_quarters_of_the_level(apart, reach, tmp_path, draw):  # noqa: F811
    """With their intervals, which of two rows that are `apart` reach 12.706 * apart / 2 beyond the mean. Where these
    are narrow, the nat in which the means lie is most of the panel."""
    values = {("test", response, step): [start + step / 1000, start + step / 1000 - apart] for step in (0, 10)
              for response, start in (("chosen", -0.2), ("rejected", -0.9), ("shuffled", -13.0))}
    level, change = draw("--scores", make_scores(tmp_path / "s.parquet", values))["dynamics"].axes
    high = (level.transData + level.transAxes.inverted()).transform([(0, -1), (0, 0)])[:, 1]
    low, top = sorted(line.get_ydata()[0] for line in level.get_lines() if line.get_linestyle() == ":"
                      or line.get_linewidth() == 0.6)[:2]
    assert low <= -0.9 - apart / 2 - reach and top >= -0.19 - apart / 2 + reach
    assert apart > 0.01 or high[1] - high[0] > 0.6
    assert change.get_yscale() == "linear"


def test_changes_are_of_the_rows_and_their_interval_too(tmp_path, draw):  # noqa: F811
    """Rows at -1, -2, -6 that move by +0.1, +0.2, +0.3: mean 0.2, sem 0.1 / sqrt(3), however far apart the rows."""
    values = {("test", "chosen", 5): [-1.0, -2.0, -6.0], ("test", "chosen", 9): [-0.9, -1.8, -5.7]}
    fig = draw("--scores", make_scores(tmp_path / "s.parquet", values))["dynamics"]
    change = fig.axes[1]
    assert change.get_lines()[0].get_ydata() == pytest.approx([0, 0.2], abs=1e-12)
    reach = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * 0.1 / math.sqrt(3)  # Student's t of three rows
    assert bands(change)[0][1] == pytest.approx((9, 0.2 - reach, 0.2 + reach), abs=1e-12)
    assert change.get_ylabel() == "change since step 5\n(nats per token)"


def test_scores_that_are_missing_are_left_out_and_counted(tmp_path, draw):  # noqa: F811
    """The row that failed at step 40 has no change there; the others keep theirs."""
    values = SCORES | {("forward", "chosen", 40): [math.nan, -1.5, -2.0]}
    found = draw("--scores", make_scores(tmp_path / "s.parquet", values))
    level, change = found["dynamics"].axes[:2]
    assert list(level.get_lines()[0].get_ydata()) == [-2.0, -1.75]
    assert change.get_lines()[0].get_ydata() == pytest.approx([0.0, (0.5 + 1.0) / 2])
    said = "95% interval, n = 2 to 3, 1 score missing"  # the one row of reverse has none
    assert said in [text.get_text().replace("\n", " ") for text in found["dynamics"].legends[0].get_texts()]
    assert said in found["captions"]["dynamics"]


@pytest.mark.parametrize("start, end, said", [
    ([math.nan, -1.0, -2.0, -3.0], [-1.0, math.nan, -2.0, -5.0], "n = 2 to 3, 2 scores missing"),  # a change of two
    ([math.nan, -1.0, -2.0], [math.nan, -1.5, math.nan], "n = 2, 3 scores missing"),  # of one row at the end none
    ([-1.0, -2.0, -3.0], [-1.5, -2.5, -3.0], "n = 3")])
def test_the_rows_of_an_interval_are_those_of_all_that_are_drawn(tmp_path, draw, start, end, said):  # noqa: F811
    found = draw("--scores", make_scores(tmp_path / "s.parquet", {("test", "chosen", 0): start,
                                                                  ("test", "chosen", 9): end}))
    assert f"Shaded: 95% interval, {said} (" in found["captions"]["dynamics"]


def test_skipped_steps_are_gaps(tmp_path, draw):  # noqa: F811
    """train.py leaves what is not finite out of a line; a line of an evaluation has no metric of training to miss."""
    run = make_run(tmp_path / "a", evals=(1, 2))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    one, whole = (line for line in lines if line["step"] in (1, 3) and "loss" in line)
    del one["rewards/chosen"]
    whole.clear()
    whole |= {"step": 3, "epoch": 0.75, "learning_rate": 1e-6, "num_tokens": 400, "skipped_steps": 1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fig = draw(run)["training"]
    for name, gaps, alone in (("loss", [3], [4]), ("rewards/chosen", [1, 3], [0, 2, 4])):
        panel, steps, values = points(fig, f"a {name}")
        (line,) = [line for line in fig.axes[panel].get_lines() if line.get_label() == f"a {name}"]
        assert line.get_marker() == "." and line.get_markevery() == alone  # no line leads to these
        assert steps == [0, 1, 2, 3, 4] and [k for k in steps if math.isnan(values[k])] == gaps
        assert points(fig, f"a eval_{name}")[1] == [1, 2]


def test_what_is_checked_is_what_is_drawn():
    """moved/... is the difference of two metrics of the file, and free_rewards/... are some of its rewards."""
    names = {name for panel in training.PANELS.values() for name in panel.values()} | {"loss"}
    names = {name for name in names if not name.startswith(("moved/", "free_"))} | {
        f"ref_logps_per_token/{side}" for side in ("chosen", "rejected")}
    assert records.DRAWN == names | {f"eval_{name}" for name in names}


def make_two_phases(folder):
    for run, phase, steps in (("sft", "sft", (0, 50, 100)), ("dpo", "dpo", (0, 10))):
        values = {("test", side, step): [start + step / 1000 * (1 + row) - (run == "dpo") for row in range(3)]
                  for step in steps for side, start in (("chosen", -1.0), ("rejected", -2.0))}
        make_scores(make_run(folder / run) / "scores.parquet", values, run=run, phase=phase)
    return folder / "sft", folder / "dpo"


def test_phases_follow_one_another_on_one_axis(tmp_path, draw):  # noqa: F811
    """Changes are since the first step of the first run: DPO starts 1 nat below SFT's start here."""
    found = draw(*make_two_phases(tmp_path), "--phases")
    assert set(found) == {"dynamics", "folder", "captions"}
    level, change = found["dynamics"].axes
    sft, _, dpo, _ = (line for line in level.get_lines() if not line.get_label().startswith("_"))
    assert list(sft.get_xdata()) == [0, 0.5, 1] and list(dpo.get_xdata()) == [1, 2]
    assert sft.get_ydata() == pytest.approx([-1, -0.9, -0.8]) and dpo.get_ydata() == pytest.approx([-2, -1.98])
    assert change.get_lines()[2].get_ydata() == pytest.approx([-1, -0.98])
    assert [text.get_text() for text in level.texts] == ["SFT", "DPO"]
    assert "100 | 0" in [label.get_text() for label in level.get_xticklabels()]


@pytest.mark.parametrize("other", [{"row": 7}, {"tokens": 11}], ids=str)
def test_phases_on_other_rows_of_one_name_are_refused(tmp_path, draw, other):  # noqa: F811
    """A change since the first run's start needs the first run's rows; each run's own held-out set is called test."""
    sft, dpo = make_two_phases(tmp_path)
    table = pandas.read_parquet(dpo / "scores.parquet")
    table.loc[table["row"] == 2, [*other]] = [*other.values()]
    table.to_parquet(dpo / "scores.parquet")
    with pytest.raises(UserError, match="^--phases: sft and dpo were scored on different rows, or tokens, that are "
                                        "both called test; score both in one call: score.py sft dpo --dataset_path"):
        draw(sft, dpo, "--phases")


def test_phases_with_answers_of_their_own_are_refused(tmp_path, draw):  # noqa: F811
    """Each scoring's greedy answer is that of its own first checkpoint: no text of which a change could be told."""
    sft, dpo = make_two_phases(tmp_path)
    for folder, tokens in ((sft, 20), (dpo, 21)):
        table = pandas.read_parquet(folder / "scores.parquet")
        own = table[table["response"] == "chosen"].assign(response="greedy", tokens=tokens)
        pandas.concat([table, own], ignore_index=True).to_parquet(folder / "scores.parquet")
    with pytest.raises(UserError, match="^--phases: sft and dpo were scored on different rows, or tokens"):
        draw(sft, dpo, "--phases")


def test_phases_are_of_the_named_runs_alone(tmp_path, draw):  # noqa: F811
    """`score.py sft other` leaves the scores of both in sft/scores.parquet."""
    sft, dpo = make_two_phases(tmp_path)
    before = draw(sft, dpo, "--phases")["captions"]
    make_scores(tmp_path / "other.parquet", SCORES, run="other")
    tables = [pandas.read_parquet(file) for file in (tmp_path / "other.parquet", sft / "scores.parquet")]
    pandas.concat(tables, ignore_index=True).to_parquet(sft / "scores.parquet")
    found = draw(sft, dpo, "--phases")
    assert found["captions"] == before and "of sft, then dpo, on test:" in before["dynamics"]
    assert [line.get_label() for line in found["dynamics"].axes[0].get_lines() if line.get_label()[0] != "_"] == [
        "sft sft chosen", "sft sft rejected", "dpo dpo chosen", "dpo dpo rejected"]


PAPER = "series,step,mean,dataset,response\n"


@pytest.mark.parametrize("test", ["forward", "reverse"])
def test_test_selects_in_the_csv_too(tmp_path, draw, test):  # noqa: F811
    (tmp_path / "p.csv").write_text(PAPER + "paper,0,-1,reverse,chosen\npaper,40,-2,reverse,chosen\n")
    run = make_run(tmp_path / "a")
    make_scores(run / "scores.parquet", SCORES, run="a")
    for how in ([run], ["a", "--scores", run / "scores.parquet"]):
        found = draw(*how, "--series", tmp_path / "p.csv", "--test", test)
        assert {ax.get_title() for ax in found["dynamics"].axes} == {test}
        runs = "a and paper" if test == "reverse" else "a"
        assert f" of {runs}, on {test}: its level" in found["captions"]["dynamics"]


def test_a_test_set_of_the_csv_alone_is_drawn_alone(tmp_path, draw):  # noqa: F811
    (tmp_path / "p.csv").write_text(PAPER + "paper,0,-1,third,chosen\npaper,40,-2,third,chosen\n")
    scores = make_scores(tmp_path / "s.parquet", SCORES)
    found = draw("--scores", scores, "--series", tmp_path / "p.csv", "--test", "third")
    assert [ax.get_title() for ax in found["dynamics"].axes] == ["third", "third"]
    assert found["dynamics"].axes[0].get_lines()[0].get_ydata().tolist() == [-1, -2]


def test_a_caption_says_rows_only_where_there_are_rows(tmp_path, draw):  # noqa: F811
    """A csv has means, of which data set and with what interval it need not say."""
    (tmp_path / "p.csv").write_text(HEAD + "paper,0,-1,-1.5,-0.5\npaper,40,-2,,\n")
    alone = draw("--series", tmp_path / "p.csv")
    assert alone["captions"]["dynamics"] == (
        "Mean log-prob per token (nats) of responses over steps of paper: its level (left) and its change since step "
        "0, of the means (right). Shaded: low to high, as given for paper.")
    assert "low to high, as given" in [text.get_text() for text in alone["dynamics"].legends[0].get_texts()]
    scores = make_scores(tmp_path / "s.parquet", SCORES)
    assert "since step 0, row by row (right)." in draw("--scores", scores)["captions"]["dynamics"]
    both = draw("--scores", scores, "--series", tmp_path / "p.csv")["captions"]["dynamics"]
    assert "since step 0, row by row, of paper of the means (right)." in both
    assert both.endswith("(mean ± Student's t standard errors over problems; n counts rows); low to high, as given for "
                         "paper.")


def test_a_series_is_drawn_beside_scores_and_alone(tmp_path, draw):  # noqa: F811
    csv = tmp_path / "paper.csv"
    csv.write_text("series,step,mean,low,high,response\npaper,40,-0.75,,,chosen\npaper,0,-0.5,-0.625,-0.375,chosen\n")
    scores = make_scores(tmp_path / "s.parquet", SCORES)
    fig = draw("--scores", scores, "--series", csv)["dynamics"]
    for level, change in zip(fig.axes[::2], fig.axes[1::2]):  # it names no data set: on each
        (line,) = [line for line in level.get_lines() if line.get_label() == "paper chosen"]
        assert list(line.get_xdata()) == [0, 40] and list(line.get_ydata()) == [-0.5, -0.75]
        (line,) = [line for line in change.get_lines() if line.get_label() == "paper chosen"]
        assert list(line.get_ydata()) == [0, -0.25]
    assert {"dpo", "paper"} <= {text.get_text() for text in fig.legends[0].get_texts()}
    found = draw("--series", csv)
    assert list(found["dynamics"].axes[0].get_lines()[0].get_ydata()) == [-0.5, -0.75]
    assert bands(found["dynamics"].axes[0])[0][0] == (0, -0.625, -0.375)
    assert found["folder"] == tmp_path


def test_series_alone_make_the_three_panels(tmp_path, draw):  # noqa: F811
    """Published means in a csv: the gap is that of the means where the csv has none."""
    lines = [f"{role},{step},{value(role, test, side, step, 0, 0)!r},{test},{side}" for role in "frmd"
             for step in STEPS[role] for test in TESTS for side in ("chosen", "rejected")]
    (tmp_path / "p.csv").write_text("series,step,mean,dataset,response\n" + "\n".join(lines))
    flags = sum([[f"--{role}", name] for role, name in ROLES.items()], [])
    fig = draw("--three_panel", *flags, "--series", tmp_path / "p.csv")["three_panel"]
    (line,) = [line for line in fig.axes[2].get_lines() if line.get_label() == "DPO reverse gap"]
    assert line.get_ydata() == pytest.approx([by_hand("d", "reverse", "gap", step, 1, 1)[0] for step in STEPS["d"]])


def test_the_heatmap_is_the_changes_sorted_by_the_last_of_chosen(tmp_path, draw):  # noqa: F811
    values = {("test", "chosen", 0): [-1.0, -2.0, -3.0], ("test", "chosen", 8): [-1.5, -1.75, -3.0],
              ("test", "chosen", 9): [-1.25, -1.0, -3.5], ("test", "rejected", 0): [-1.0, -1.0, -1.0],
              ("test", "rejected", 8): [-2.0, -3.0, -4.0], ("test", "rejected", 9): [-2.5, math.nan, -0.5]}
    found = draw("--scores", make_scores(tmp_path / "s.parquet", values), "--heatmap")
    chosen, rejected, bar = found["heatmap"].axes
    images = [ax.get_images()[0] for ax in (chosen, rejected)]
    assert images[0].get_array().tolist() == [[0.25, 1.0], [-0.5, -0.25], [0.0, -0.5]]  # rows 1, 0, 2
    there = images[1].get_array()
    assert there[0, 0] == -2.0 and np.ma.is_masked(there[0, 1]) and there[1:].tolist() == [[-1.0, -1.5], [-3.0, 0.5]]
    for image in images:
        low, high = image.get_clim()
        assert -low == high > 0  # centred at no change
        assert to_hex(image.cmap(image.norm(0.0))) == to_hex(image.cmap(0.5))
    assert chosen.get_title() == "chosen: 1 of 3 rise" and rejected.get_title() == "rejected: 1 of 2 rise"
    assert [label.get_text() for label in chosen.get_xticklabels()] == ["8", "9"]
    assert "step 0" in bar.get_ylabel() and "nats" in bar.get_ylabel()
    # The sizes are 0, 0.25 twice, 0.5 thrice, 1 twice, 1.5, 2 and 3: 98% of the ten steps up to 3 is at 2.8.
    assert high == pytest.approx(2.8) and found["captions"]["heatmap"].endswith(
        " Colours end at ± 2.8, the 98th percentile; 1 of 11 values lie beyond. Dark grey: a score is missing.")


def test_a_heatmap_of_data_without_rejected_has_one_side(tmp_path, draw):  # noqa: F811
    values = {("test", "chosen", 0): [-1.0, -2.0], ("test", "chosen", 8): [-1.5, -1.75]}
    fig = draw("--scores", make_scores(tmp_path / "s.parquet", values), "--heatmap")["heatmap"]
    assert [len(ax.get_images()) for ax in fig.axes[:2]] == [1, 0]


def test_a_series_that_no_role_names_is_not_passed_over(tmp_path):
    (tmp_path / "p.csv").write_text("series,step,mean\npaper,0,-1\n")
    flags = [*lab_flags(make_lab(tmp_path / "s.parquet")), "--series", tmp_path / "p.csv"]
    with pytest.raises(UserError, match="--series: paper is named by none of --forward, --reverse, --mixed, --dpo"):
        plot.main([str(flag) for flag in flags])


def make_tokens(folder, chosen, rejected, steps=(0, 40), row=7, **changed):
    """tokens.parquet: position p of step s has log-prob -1 - p / 8 of chosen and one nat lower of rejected, + s / 80
    at even positions and - s / 80 at odd ones."""
    lines = [{"run": "dpo", "step": step, "dataset": "test", "row": row, "response": side, "position": p, "token": word,
              "logp": -1.0 - p / 8 - (side == "rejected") + step / 80 * (-1) ** p, "entropy": 1.0, "argmax_logp": -0.1,
              "rank": 1} | changed
             for step in steps for side, words in (("chosen", chosen), ("rejected", rejected))
             for p, word in enumerate(words)]
    pandas.DataFrame(lines).to_parquet(folder / "tokens.parquet")
    return make_scores(folder / "scores.parquet", SCORES)


@pytest.mark.parametrize("figure", [["--heatmap"], ["--strip", "7"],
                                    ["--scatter", "chosen.mean_logps", "rejected.mean_logps"]])
def test_figures_of_rows_name_the_run_that_was_not_scored(tmp_path, draw, capsys, figure):  # noqa: F811
    """A scoring of several runs lies in the first one's folder: what lies here is all of another run, called dpo."""
    run = make_run(tmp_path / "mine")
    make_tokens(run, WORDS, WORDS)
    draw(run, *figure)
    assert capsys.readouterr().err == "note: no scores of mine were read, only of dpo\n"
    draw("--scores", run / "scores.parquet", *figure)
    assert capsys.readouterr().err == ""


WORDS = ["So", " Ivy", " has", "\n", " $5_0", " & 3%", "{x}"]


def cells(ax):
    """(text, colour of its cell) of each token."""
    texts = [text for text in ax.texts if text.get_fontproperties().get_family()[0] == "monospace"]
    assert len(texts) == len(ax.patches)
    return [(text.get_text(), patch.get_facecolor()) for text, patch in zip(texts, ax.patches)]


@pytest.mark.parametrize("steps", [(0, 40), (40,)])
def test_the_strip_colours_each_token_by_its_number(tmp_path, draw, steps):  # noqa: F811
    scores = make_tokens(tmp_path, WORDS, WORDS[:2] + [" had"], steps)
    fig = draw("--scores", scores, "--strip", 7)["strip"]
    ax, bar = fig.axes
    shown = cells(ax)
    seen = [word.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}") for word in WORDS]
    assert [word for word, *_ in shown] == [*seen, "So", " Ivy", " had"]
    if len(steps) == 2:  # by turns half a nat up and down
        assert [fill[2] > fill[0] for _, fill in shown] == [True, False] * 3 + [True] + [True, False, True]
        assert bar.get_xlim() == (-0.5, 0.5) and "change of log-prob from step 0 to 40 (nats)" == bar.get_xlabel()
    else:  # less likely is darker
        light = [sum(fill[:3]) for _, fill in shown]
        assert light[1] > light[7 + 1] and bar.get_xlim()[1] == 0 and bar.get_xlabel() == "log-prob at step 40 (nats)"
    heads = [text.get_text() for text in ax.texts if text.get_text().startswith(("chosen", "rejected"))]
    assert heads == ["chosen, 7 tokens; the first 2 shared (line above)",
                     "rejected, 3 tokens; the first 2 shared (line above)"]
    assert len(ax.collections[0].get_segments()) == 2  # of chosen, the two shared tokens


def test_the_strip_tells_tokens_apart_by_their_ids(tmp_path, draw):  # noqa: F811
    """Two tokens may have one text, such as the replacement character: of the three first tokens with the same texts
    here, one is shared."""
    scores = make_tokens(tmp_path, ["So", "\ufffd", "\ufffd"], ["So", "\ufffd", "\ufffd", "."])
    table = pandas.read_parquet(tmp_path / "tokens.parquet")
    ids = {"chosen": [5, 240, 17], "rejected": [5, 241, 17, 9]}
    table["id"] = [ids[side][p] for side, p in zip(table["response"], table["position"])]
    table.to_parquet(tmp_path / "tokens.parquet")
    found = draw("--scores", scores, "--strip", 7)
    heads = [text.get_text() for text in found["strip"].axes[0].texts]
    assert "chosen, 3 tokens; the first 1 shared (line above)" in heads
    assert "The first 1 tokens are the same" in found["captions"]["strip"]


@pytest.mark.parametrize("columns", [1, 2])
def test_a_long_response_is_wrapped_and_cut_and_says_so(tmp_path, draw, columns):  # noqa: F811
    fig = draw("--scores", make_tokens(tmp_path, [" word"] * 900, [" other", "."]), "--strip", 7, "--columns", columns)
    ax = fig["strip"].axes[0]
    a_line = int(ax.get_xlim()[1]) // 5
    shown = sum(word == " word" for word, *_ in cells(ax))
    assert shown == 14 * a_line
    heads = [text.get_text() for text in ax.texts if "tokens" in text.get_text()]
    assert heads[0] == f"chosen, 900 tokens, the last {900 - shown} left out; no token shared"
    fig["strip"].set_dpi(300)  # of the file: coarser, letters are as wide as whole pixels allow
    fig["strip"].draw_without_rendering()
    for text, patch in zip([t for t in ax.texts if t.get_fontproperties().get_family() == ["monospace"]], ax.patches):
        letters, cell = text.get_window_extent(), patch.get_window_extent()
        assert letters.x0 >= cell.x0 - 1 and letters.x1 <= cell.x1 + 1.5  # text stays in its cell
        assert letters.y0 >= cell.y0 - 1 and letters.y1 <= cell.y1 + 1


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("look", [[], ["--serif"], ["--style", "ggplot"]], ids=str)
def test_no_panel_legend_or_label_overlaps_another(tmp_path, draw, columns, look):  # noqa: F811
    lab = make_lab(tmp_path / "lab.parquet")
    flags = ["--columns", columns, *look]
    figures = [draw(*lab_flags(lab), "--floor", "-0.9", *flags)["three_panel"],
               draw("m0", "d0", "--phases", "--scores", lab, *flags)["dynamics"],
               draw("f1", "--heatmap", "--scores", lab, *flags)["heatmap"]]
    for fig in figures:
        found = boxes(fig)
        for i, box in enumerate(found):
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= fig.bbox.x1 + 1 and box.y1 <= fig.bbox.y1 + 1
            for other in found[i + 1 :]:
                assert (box.x1 <= other.x0 + 1 or other.x1 <= box.x0 + 1 or box.y1 <= other.y0 + 1
                        or other.y1 <= box.y0 + 1)
        for labels in [axis.get_ticklabels() for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)]:
            extents = [label.get_window_extent() for label in labels if label.get_text() and label.get_visible()]
            for one, other in zip(extents, extents[1:]):
                assert not one.overlaps(other)


def test_grey_tells_curves_of_one_panel_apart(tmp_path, draw):  # noqa: F811
    """Curves of one panel differ in dash or marker, or by a tenth in lightness, or lie in another phase."""
    fig = draw(*lab_flags(make_lab(tmp_path / "s.parquet")))["three_panel"]
    for ax in fig.axes:
        seen = []
        for line in ax.get_lines():
            if not line.get_label().startswith("_"):
                red, green, blue = (int(to_hex(line.get_color())[i : i + 2], 16) / 255 for i in (1, 3, 5))
                seen.append((line.get_linestyle(), line.get_marker(), line.get_label().startswith("DPO"),
                             0.299 * red + 0.587 * green + 0.114 * blue))
        for i, one in enumerate(seen):
            assert all(one[:3] != other[:3] or abs(one[3] - other[3]) > 0.1 for other in seen[i + 1 :])


def test_every_figure_is_the_same_bytes_again(tmp_path):
    lab = make_lab(tmp_path / "lab.parquet")
    make_tokens(tmp_path, WORDS, WORDS[:2])
    for flags in (lab_flags(lab), ["f0", "--heatmap", "--scores", lab], ["--strip", "7", "--scores",
                                                                        tmp_path / "scores.parquet", "--serif"]):
        for name in ("one", "two"):
            plot.main([*map(str, flags), "--output_dir", str(tmp_path / name)])
    names = [file.name for file in sorted((tmp_path / "one").iterdir())]
    assert names == sorted(f"{name}.{kind}" for name in ("three_panel", "heatmap", "strip")
                           for kind in ("png", "pdf", "svg", "tex"))
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize("columns, lines", [
    (1, [r"\begin{figure}[t]", r"  \includegraphics[width=\columnwidth]{dynamics.pdf}", r"\end{figure}"]),
    (2, [r"\begin{figure*}[t]", r"  \includegraphics[width=\textwidth]{dynamics.pdf}", r"\end{figure*}"])])
def test_the_tex_includes_the_figure_and_says_what_is_drawn(tmp_path, columns, lines):
    scores = make_scores(tmp_path / "s.parquet", SCORES, run="a_50%&$x^2~{#}\\")
    plot.main(["--scores", str(scores), "--columns", str(columns), "--floor", "-0.157"])
    text = (tmp_path / "dynamics.tex").read_text()
    assert set(lines) <= set(text.splitlines()) and r"\label{fig:dynamics}" in text
    caption = re.search(r"\\caption{(.*)}\n", text)[1]
    assert r"a\_50\%\&\$x\textasciicircum{}2\textasciitilde{}\{\#\}\textbackslash{}" in caption
    for what in ("per token (nats)", r"95\% interval, n = 3", "t standard errors", "-0.157", "since step 0"):
        assert what in caption
    assert text.count("{") == text.count("}")


def test_escaped_text_has_no_command_left():
    assert escape_tex("#$%&_{}") == r"\#\$\%\&\_\{\}"
    assert escape_tex("~^\\<>|") == (r"\textasciitilde{}\textasciicircum{}\textbackslash{}\textless{}"
                                     r"\textgreater{}\textbar{}")


def test_parts_of_fonts_are_named_by_what_is_in_them():
    """Only where LaTeX sets the text: there matplotlib hashes a view of a dict, which is its address, and so another
    number in every process. Everywhere else it hashes what is in it. Once that is mended, our own name can go."""
    letters = {1: "x", 2: "y"}
    assert hash(letters.values()) != hash(dict(letters).values())
    source = inspect.getsource(PdfFile)
    assert "self._get_subset_prefix(charmap.values())" in source and "_get_subset_prefix(frozenset(" in source
    before = PdfFile._get_subset_prefix
    with drawing.house_style():
        assert PdfFile._get_subset_prefix is before
    prefixes = [drawing.subset_prefix(letters) for letters in ({"a": "x", "b": "y"}.values(), ["y", "x"], ["x", "z"])]
    assert prefixes[0] == prefixes[1] != prefixes[2] and all(re.fullmatch(r"[A-Z]{6}\+", name) for name in prefixes)


@pytest.mark.skipif(not all(map(shutil.which, ("latex", "dvipng"))), reason="needs LaTeX")
def test_latex_sets_any_name_and_the_same_bytes_again(tmp_path):
    scores = make_scores(tmp_path / "s.parquet", SCORES, run="a_50%&$x^2~{#}")
    for name in ("one", "two"):
        launch(ROOT / "plot.py", "--scores", scores, "--usetex", "--output_dir", tmp_path / name)
    for kind in ("png", "pdf", "svg", "tex"):
        one, two = ((tmp_path / name / f"dynamics.{kind}").read_bytes() for name in ("one", "two"))
        assert one == two, kind


def test_usetex_needs_latex(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="--usetex: needs latex and dvipng, not found here; --serif"):
        plot.main([str(make_run(tmp_path / "a")), "--usetex"])
    (tmp_path / "tex.mplstyle").write_text("text.usetex: True\n")
    with pytest.raises(UserError, match="text.usetex of .*tex.mplstyle or .*: needs latex and dvipng, not found here"):
        plot.main([str(tmp_path / "a"), "--style", str(tmp_path / "tex.mplstyle")])
    with matplotlib.rc_context({"text.usetex": True}):  # as in the user's own matplotlibrc
        with pytest.raises(UserError, match="text.usetex of .*matplotlibrc: needs latex and dvipng, not found here"):
            plot.main([str(tmp_path / "a")])
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_what_latex_can_not_set_is_one_line(tmp_path, monkeypatch):
    """A LaTeX that lacks a package fails at the first text that is measured, before anything is written."""
    for name in ("latex", "dvipng"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(TexManager, "_cache_dir", tmp_path)
    before = PdfFile._get_subset_prefix
    with pytest.raises(UserError, match="--usetex: latex can't set this figure: latex was not able to process"):
        plot.main([str(make_run(tmp_path / "a")), "--usetex"])
    assert PdfFile._get_subset_prefix is before  # later figures of this process are what they are in another
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_draw_run_draws_what_a_folder_has(tmp_path):
    run = make_run(tmp_path / "a")
    kinds = ("pdf", "png", "svg", "tex")
    assert sorted(file.name for file in drawing.draw_run(run)) == [f"training.{kind}" for kind in kinds]
    make_scores(run / "scores.parquet", SCORES, run="a")
    files = drawing.draw_run(run)
    names = [f"{name}.{kind}" for name in ("dynamics", "training") for kind in kinds]
    assert sorted(file.name for file in files) == names
    before = {file: file.read_bytes() for file in files}
    plot.main([str(run)])
    assert before == {file: file.read_bytes() for file in files}  # what plot.py makes of the run
    (tmp_path / "scored").mkdir()
    make_scores(tmp_path / "scored" / "scores.parquet", SCORES)
    assert [file.suffix for file in drawing.draw_run(tmp_path / "scored")] == [".png", ".pdf", ".svg", ".tex"]
    with pytest.raises(UserError, match="metrics.jsonl: No such file"):
        drawing.draw_run(tmp_path)


RELATIVE = r"$\log(\pi/\pi_{\mathrm{ref}})$ (nats per token)"


def write_lines(folder, lines, **record):
    """A run's folder with these lines of metrics.jsonl and this run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_log_probs_are_drawn_less_the_references(tmp_path, draw):  # noqa: F811
    """With one pair a step, chosen is at -1, -3, -2 because other pairs come; pi moved by 0, 0.25, -0.5."""
    level, moved = (-1.0, -3.0, -2.0), (0.0, 0.25, -0.5)
    lines = [{"step": k, "loss": 1.0, "rewards/margins": 0.0, "logps_per_token/chosen": level[k],
              "ref_logps_per_token/chosen": level[k] - moved[k]} for k in range(3)]
    lines += [{"step": k, "eval_loss": 1.0, "eval_logps_per_token/chosen": -1.5 + k / 8,
               "eval_ref_logps_per_token/chosen": -1.5} for k in (0, 2)]
    found = draw(write_lines(tmp_path / "a", lines))
    fig = found["training"]
    panel, steps, values = points(fig, "a moved/chosen")
    assert fig.axes[panel].get_ylabel() == RELATIVE and values == list(moved)
    assert points(fig, "a eval_moved/chosen")[1:] == ([0, 2], [0.0, 0.25])
    assert "log-prob (nats per token)" not in [ax.get_ylabel() for ax in fig.axes]
    assert "log-prob per token minus the reference's (nats)" in found["captions"]["training"]
    drawn = {line.get_label(): line for line in fig.axes[panel].get_lines()}
    assert drawn["a eval_moved/chosen"].get_linewidth() > drawn["a moved/chosen"].get_linewidth()


def test_rewards_without_a_reference_have_a_panel_of_their_own(tmp_path, draw):  # noqa: F811
    """beta log pi is no log-ratio: the two are not in one panel, and the one has no band of the other's noise."""
    lines = [{"step": k, "loss": 1.0, "rewards/chosen": -1.0, "rewards/margins": 0.25 * k} for k in range(3)]
    runs = [write_lines(tmp_path / name, lines, arguments={"loss": loss, "beta": 2.0}, noise=NOISE)
            for name, loss in (("a", "dpo"), ("b", "simpo"))]
    found = draw(*runs)
    fig, labels = found["training"], {}
    for run in "ab":
        panel, _, values = points(fig, f"{run} {'free_' * (run == 'b')}rewards/margins")
        labels[run] = fig.axes[panel].get_ylabel()
        assert values == [0.0, 0.25, 0.5] and bool(hatched(fig.axes[panel])) == (run == "a")
    assert labels == {"a": r"reward, $\beta\,\log(\pi/\pi_{\mathrm{ref}})$ (nats)",
                      "b": "reward, no reference (nats)"}
    assert ("rewards without a reference, beta times the log-prob of a response, for SimPO and ORPO per token (nats)"
            ) in found["captions"]["training"]


@pytest.mark.parametrize("losses", [("dpo", "simpo"), ("simpo", "dpo"), ("dpo", "sft")])
def test_rewards_of_a_fork_to_another_loss_are_drawn_as_what_they_are(losses, tmp_path, draw):  # noqa: F811
    """Each step's own line tells whether they are of a reference; run.json knows the last loss alone."""
    lines = [{"step": k, "loss": 1.0, "logps_per_token/chosen": -2.0}
             | {"dpo": {"rewards/margins": 0.5 * k, "ref_logps_per_token/chosen": -2.0}, "sft": {},
                "simpo": {"rewards/margins": -1.5 * k}}[losses[k > 2]] for k in range(6)]
    found = draw(write_lines(tmp_path / "a", lines, arguments={"loss": losses[1], "beta": 2.0}))
    for loss, label, name, slope in (("dpo", r"reward, $\beta\,\log(\pi/\pi_{\mathrm{ref}})$ (nats)", "rewards", 0.5),
                                     ("simpo", "reward, no reference (nats)", "free_rewards", -1.5)):
        if loss in losses:
            panel, steps, values = points(found["training"], f"a {name}/margins")
            assert found["training"].axes[panel].get_ylabel() == label
            assert {k: v for k, v in zip(steps, values) if not math.isnan(v)} == {
                k: slope * k for k in range(6) if losses[k > 2] == loss}
        else:
            assert label not in [ax.get_ylabel() for ax in found["training"].axes]


def test_an_average_lies_over_raw_values_which_all_stay(tmp_path, draw):  # noqa: F811
    """120 steps: three to either side. By brute force; a step without a value has no mean, and is in nobody's."""
    values = {k: math.sin(k * k) for k in range(120) if k != 50}
    lines = [{"step": k, "learning_rate": 1.0} | ({"loss": values[k]} if k in values else {}) for k in range(120)]
    found = draw(write_lines(tmp_path / "a", lines))
    _, steps, raw = points(found["training"], "a loss")
    assert steps == list(range(120)) and {k: v for k, v in zip(steps, raw) if not math.isnan(v)} == values
    _, steps, means = points(found["training"], "a loss, average")
    for k, mean in zip(steps, means):
        near = [values[j] for j in range(int(k) - 3, int(k) + 4) if j in values]
        assert math.isnan(mean) if k == 50 else mean == pytest.approx(sum(near) / len(near), abs=1e-12)
    assert "the mean over the steps around each, 3 steps to either side" in found["captions"]["training"]
    (dots,) = [line for line in found["training"].axes[0].get_lines() if line.get_label() == "a loss"]
    assert dots.get_marker() == "." and dots.get_linestyle() == "None" and dots.get_alpha() < 0.5


def test_of_a_long_run_some_points_are_drawn(tmp_path, draw):  # noqa: F811
    """At most 2,000, evenly spaced, each with the average over all steps around it, and short labels of steps."""
    values = [math.sin(k * k) for k in range(20_500)]
    found = draw(write_lines(tmp_path / "a", [{"step": k, "loss": values[k]} for k in range(20_500)]))
    _, steps, raw = points(found["training"], "a loss")
    assert steps == list(range(0, 20_500, 11)) and raw == values[::11]
    _, steps, means = points(found["training"], "a loss, average")
    assert steps == list(range(0, 20_500, 11)) and means[1000] == pytest.approx(
        sum(values[11_000 - 512 : 11_000 + 513]) / 1025, abs=1e-9)
    assert "Faint points are single steps, evenly spaced;" in found["captions"]["training"]
    labels = found["training"].axes[0].xaxis.get_major_formatter()
    assert [labels(x) for x in (0, 500, 5000, 20_000, 12_500)] == ["0", "500", "5000", "20k", "12.5k"]


def test_of_a_long_difference_some_steps_are_drawn(tmp_path, draw):  # noqa: F811
    """The same evenly spaced ones of both runs and of their difference, and the caption says so."""
    runs = [write_lines(tmp_path / name, [{"step": k, "loss": of * k} for k in range(4100)])
            for name, of in (("a", 1.0), ("b", 3.0))]
    found = draw(*runs, "--diff")
    for name, of in (("a", 1), ("b", 3), ("difference", 2)):
        _, steps, values = points(found["difference"], f"{name} loss")
        assert steps == list(range(0, 4100, 3)) and values == [of * k for k in steps]
    assert "means over the pairs of a step that is drawn, of evenly spaced ones." in found["captions"]["difference"]


def test_evaluations_are_no_steps_that_are_left_out(tmp_path, draw):  # noqa: F811
    """Of 2,000 steps all are drawn, however many evaluations stand between them."""
    lines = [{"step": k, "loss": 1.0} for k in range(2000)] + [{"step": 0, "eval_loss": 1.0}]
    found = draw(*(write_lines(tmp_path / name, lines) for name in "ab"), "--diff")
    assert len(points(found["difference"], "a loss")[1]) == 2000
    assert "evenly spaced" not in found["captions"]["difference"]


def kinds(**arguments):
    return {"arguments": arguments}


@pytest.mark.parametrize("one, other, labels", [
    (kinds(loss="sft"), kinds(loss="dpo"), ["SFT loss", "DPO loss"]),
    (kinds(loss="dpo"), kinds(loss="ipo"), ["DPO loss", "IPO loss"]),
    (kinds(loss="dpo"), kinds(loss="dpo", label_smoothing=0.1), ["DPO loss", "DPO, label smoothing 0.1\nloss"]),
    (kinds(loss="dpo"), kinds(loss="dpo", beta=0.5), ["loss"]),
    ({}, {}, ["loss", "loss (runs with rewards)"])], ids=str)
def test_losses_of_two_kinds_have_two_panels(tmp_path, draw, one, other, labels):  # noqa: F811
    """-log p a token of SFT and a loss of margins are other quantities; where no run.json says so, rewards do."""
    more = {} if one or other else {"rewards/margins": 0.5}
    runs = [write_lines(tmp_path / name, [{"step": k, "loss": 1.0 + k} | extra for k in range(3)], **record)
            for name, record, extra in (("a", one, {}), ("b", other, more))]
    fig = draw(*runs)["training"]
    losses = [ax for ax in fig.axes if "loss" in ax.get_ylabel()]
    assert [" ".join(ax.get_ylabel().split()) for ax in losses] == [" ".join(label.split()) for label in labels]
    drawn = [[line.get_label() for line in ax.get_lines()] for ax in losses]
    assert drawn == ([["a loss", "b loss"]] if len(labels) == 1 else [["a loss"], ["b loss"]])


@pytest.mark.parametrize("loss, words", [
    ("dpo", "weighted where the data have weights."),
    ("sft", "weighted where the data have weights, and that of SFT is a mean over tokens.")])
def test_a_caption_says_what_a_loss_is_a_mean_of(tmp_path, draw, loss, words):  # noqa: F811
    """Of SFT it is over tokens, and of any loss weighted by a column `weight` (run/metrics.py): neither is a plain mean
    over pairs."""
    lines = [{"step": k, "loss": 1.0, "logps_per_token/chosen": -1.0} for k in range(2)]
    runs = [write_lines(tmp_path / name, lines, arguments={"loss": loss}) for name in "ab"]
    for name, found in (("training", draw(runs[0])), ("difference", draw(*runs, "--diff"))):
        caption = found["captions"][name]
        assert f"means over the pairs of a step. The loss is {words}" in caption and ".." not in caption
    bare = write_lines(tmp_path / "c", [{"step": 0, "logps_per_token/chosen": -1.0}])
    assert "The loss" not in draw(bare)["captions"]["training"]


def descend(child, checkpoint):
    (child / "run.json").write_text(json.dumps(kinds(loss="dpo", model_name=str(checkpoint))))


@pytest.mark.parametrize("checkpoint", ["sft/checkpoint-100", "{here}/sft/checkpoint-100", "sft/merged"])
def test_runs_that_followed_one_another_are_drawn_so_unasked(tmp_path, draw, checkpoint, capsys):  # noqa: F811
    """In whatever order they are named; a relative path of a checkpoint is one from a folder above the run's."""
    sft, dpo = make_two_phases(tmp_path)
    asked = draw(sft, dpo, "--phases")["captions"]["dynamics"]
    descend(dpo, checkpoint.format(here=tmp_path))
    found = draw(dpo, sft)
    assert found["captions"]["dynamics"] == asked and "training" in found
    assert [text.get_text() for text in found["dynamics"].axes[0].texts] == ["SFT", "DPO"]
    assert not capsys.readouterr().err


def test_what_keeps_runs_from_one_axis_is_said(tmp_path, draw, capsys):  # noqa: F811
    sft, dpo = make_two_phases(tmp_path)
    table = pandas.read_parquet(dpo / "scores.parquet")
    table.loc[table["row"] == 2, "row"] = 7
    table.to_parquet(dpo / "scores.parquet")
    descend(dpo, "sft/checkpoint-100")
    found = draw(sft, dpo)
    assert not found["dynamics"].axes[0].texts  # beside one another
    assert re.match("note: dynamics are drawn beside one another, and not as phases: sft and dpo were "
                    "scored on different rows", capsys.readouterr().err)
    shutil.copytree(dpo, tmp_path / "dpo2")
    pandas.read_parquet(dpo / "scores.parquet").assign(run="dpo2").to_parquet(tmp_path / "dpo2" / "scores.parquet")
    draw(sft, dpo, tmp_path / "dpo2")
    assert "dpo and dpo2 all began from sft" in capsys.readouterr().err
    descend(dpo, "elsewhere/sft/checkpoint-100")
    draw(sft, dpo)
    assert not capsys.readouterr().err  # another sft's


def test_one_checkpoint_is_bars_from_0_with_intervals(tmp_path, draw):  # noqa: F811
    """Rows at -1, -2, -3: mean -2, t(2) / sqrt(3) to either side; a single row has no interval."""
    values = {("test", "chosen", 7): [-1.0, -2.0, -3.0], ("test", "rejected", 7): [-4.0]}
    found = draw("--scores", make_scores(tmp_path / "s.parquet", values))
    (ax,) = found["dynamics"].axes
    assert [(bar.get_y(), bar.get_height()) for bar in ax.patches] == [(0, -2.0), (0, -4.0)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["chosen", "rejected"]
    (whisker,) = ax.collections
    reach = t_quantile(2) / math.sqrt(3)
    assert whisker.get_segments()[0][:, 1] == pytest.approx([-2 - reach, -2 + reach])
    assert ax.get_xlabel() == "at DPO step 7" and "under dpo, on test. Lines: 95%" in found["captions"]["dynamics"]


def test_where_the_scale_changes_there_is_no_bar(tmp_path, draw):  # noqa: F811
    """Means -1, -1.1 and -30: the first two share a band with round ends. A bar through both scales would have a length
    that means nothing, so there are points with intervals."""
    values = {("test", side, 7): [level - 0.0123, level, level + 0.0123] for side, level in (
        ("chosen", -1.0), ("rejected", -1.1), ("shuffled", -30.0))}
    (ax,) = draw("--scores", make_scores(tmp_path / "s.parquet", values))["dynamics"].axes
    assert not ax.patches and len(ax.collections) == 3
    low, high = (line.get_ydata()[0] for line in ax.get_lines()[-2:])
    assert (low, high) == pytest.approx((-1.14, -0.96)) and {low, high} <= {*ax.get_yticks()}
    assert all(len(label.get_text()) <= 5 for label in ax.get_yticklabels())
    two = {key: value for key, value in values.items() if key[1] != "shuffled"}
    (ax,) = draw("--scores", make_scores(tmp_path / "t.parquet", two))["dynamics"].axes
    assert len(ax.patches) == 2 and ax.get_yscale() == "linear"


def test_bars_of_several_models_stand_side_by_side(tmp_path, draw):  # noqa: F811
    """Two models, a checkpoint each: other edges, and no change to draw."""
    values = {("test", "chosen", 0): [-1.0, -2.0]}
    tables = [make_scores(tmp_path / f"{run}.parquet", values, run=run, phase="") for run in ("one", "two")]
    (ax,) = draw("--scores", *tables)["dynamics"].axes
    one, two = ax.patches
    assert one.get_x() + one.get_width() < two.get_x() and one.get_linestyle() != two.get_linestyle()


def test_a_model_that_is_no_runs_has_no_step_in_figures(tmp_path, draw):  # noqa: F811
    """scores.parquet has step 0 of it, the screen "-". Runs of different steps have theirs, and so has a csv."""
    tables = [make_scores(tmp_path / f"{run}.parquet", {("test", "chosen", step): [-1.0, -2.0]}, run=run, phase=phase)
              for run, phase, step in (("tuned", "dpo", 60), ("early", "dpo", 0), ("base", "", 0))]
    fig = draw("--scores", *tables)["dynamics"]
    assert [text.get_text() for text in fig.legends[0].get_texts()][1:4] == ["tuned, step 60", "early, step 0", "base"]
    assert draw("--scores", tables[2])["dynamics"].axes[0].get_xlabel() == ""
    fig = draw("--scores", *tables[1:])["dynamics"]
    assert [text.get_text() for text in fig.legends[0].get_texts()][1:3] == ["early, step 0", "base"]
    assert fig.axes[0].get_xlabel() == ""
    (tmp_path / "paper.csv").write_text("series,response,step,mean\npaper,chosen,7,-1\n")
    assert draw("--series", tmp_path / "paper.csv")["dynamics"].axes[0].get_xlabel() == "at step 7"


def test_intervals_of_one_colour_have_their_runs_dash(tmp_path, draw):  # noqa: F811
    tables = [make_scores(tmp_path / f"{run}.parquet", SCORES, run=run) for run in ("a", "b", "c")]
    ax = draw("--scores", *tables)["dynamics"].axes[0]
    found = {}
    for band in ax.collections:
        assert band.get_linewidth()[0] > 0 and band.get_facecolor()[0][3] < 0.2
        found.setdefault(to_hex(band.get_edgecolor()[0]), set()).add(str(band.get_linestyle()))
    assert [len(dashes) for dashes in found.values()] == [3, 3]  # of chosen and of rejected
    alone = draw("--scores", tables[0])["dynamics"].axes[0].collections
    assert {band.get_linewidth()[0] for band in alone} == {0}  # one run needs no edge


def test_intervals_of_a_difference_have_their_responses_dash(tmp_path, draw):  # noqa: F811
    """All differences are black: where their intervals lie on one another, the edges tell them apart."""
    folders = [make_run(tmp_path / name) for name in "ab"]
    for folder in folders:
        make_scores(folder / "scores.parquet", {key: its for key, its in SCORES.items() if key[0] == "forward"},
                    run=folder.name)
    bands = draw(*folders, "--diff")["difference_scores"].axes[1].collections
    assert len({str(band.get_linestyle()) for band in bands}) == len(bands) == 2
    assert all(band.get_linewidth()[0] > 0 for band in bands)


def make_checked(folder, right, mass=0.001):
    """scores.parquet with implausible mass, (1 + row) mass at step 0 and ten times that later; and answers.parquet."""
    make_scores(folder / "scores.parquet", SCORES)
    table = pandas.read_parquet(folder / "scores.parquet")
    table["implausible_mass"] = mass * (1 + table["row"]) * (1 + 9 * (table["step"] > 0))
    table["implausible_mass_start"] = mass * (1 + table["row"])
    table.to_parquet(folder / "scores.parquet")
    lines = [{"run": "dpo", "phase": "dpo", "step": step, "dataset": "forward", "row": row, "correct": value}
             for step, values in right.items() for row, value in enumerate(values)]
    pandas.DataFrame(lines).to_parquet(folder / "answers.parquet")
    return folder / "scores.parquet"


def test_mass_and_right_answers_are_drawn_where_they_were_scored(tmp_path, draw):  # noqa: F811
    """Wilson's ends are where |share - p| = z sqrt(p (1 - p) / n), also for 4 of 4, whose interval ends at 1."""
    scores = make_checked(tmp_path, {0: [True] * 4, 40: [True, False, False, False]})
    found = draw("--scores", scores)
    mass, right = found["mass_and_answers"].axes[:2]
    assert mass.get_lines()[0].get_ydata() == pytest.approx([0, 0.02 - 0.002])
    assert list(right.get_lines()[0].get_ydata()) == [1.0, 0.25]
    for (_, low, high), share in zip(bands(right)[0], (1.0, 0.25)):
        for end in (low, high):
            assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 4, abs=1e-9)
    assert bands(right)[0][0][2] == pytest.approx(1.0)
    caption = found["captions"]["mass_and_answers"]
    assert "less than 0.001 (95%" in caption and "Student's t standard errors over problems; n counts rows)" in caption
    assert "that are right (95% interval, n = 4, Wilson's over problems; n counts rows)" in caption
    (tmp_path / "answers.parquet").unlink()
    assert {ax.get_ylabel() for ax in draw("--scores", scores)["mass_and_answers"].axes} == {
        "change of mass on\nimplausible tokens"}
    make_scores(scores, SCORES)
    assert "mass_and_answers" not in draw("--scores", scores)


def test_no_interval_is_named_where_none_is_drawn(tmp_path, draw):  # noqa: F811
    """Two rows of one problem have no interval: neither have the captions and legends, nor beside a csv's own."""
    values = {("test", side, step): [-1.0 - step / 80, -2.0] for side in ("chosen", "rejected") for step in (0, 40)}
    folders = [make_run(tmp_path / name) for name in "ab"]
    for folder in folders:
        scores = make_scores(folder / "scores.parquet", values, run=folder.name)
        table = pandas.read_parquet(scores).assign(problem="p", implausible_mass=0.02, implausible_mass_start=0.01)
        table.to_parquet(scores)
        table = table[table["response"] == "chosen"][["run", "phase", "step", "dataset", "row", "problem"]]
        table.assign(correct=True).to_parquet(folder / "answers.parquet")
    found = draw(folders[0])
    of_two = draw(*folders, "--diff")
    for name, figure in (*found.items(), *of_two.items()):
        if name not in ("folder", "captions"):
            assert not any("interval" in text.get_text() for text in figure.legends[0].get_texts()), name
    for caption in (*found["captions"].values(), *of_two["captions"].values()):
        assert "interval" not in caption and "errors" not in caption and "Shaded" not in caption
    assert found["captions"]["mass_and_answers"].endswith(
        "gives it less than 0.001. Beside it: share of greedy answers that are right.")
    (tmp_path / "p.csv").write_text(HEAD + "paper,0,-1,-1.5,-0.5\npaper,40,-2,,\n")
    beside = draw("--scores", scores, "--series", tmp_path / "p.csv")
    assert beside["captions"]["dynamics"].endswith("Shaded: low to high, as given for paper.")
    assert "low to high, as given" in [text.get_text() for text in beside["dynamics"].legends[0].get_texts()]


def test_published_curves_are_drawn_as_far_as_they_go(tmp_path, draw, capsys):  # noqa: F811
    """(a) F and R on their own sets, (b) M and DPO on mixed, whose sides begin before their gaps, (c) some gaps."""
    lines = [("F", 0, -1, "forward", "chosen"), ("F", 100, -0.5, "forward", "chosen"),
             ("R", 0, -1, "reverse", "chosen"), ("R", 50, -0.5, "reverse", "chosen"),
             *(("M", step, -1 - step / 400, "mixed", side) for step in (0, 200) for side in ("chosen", "rejected")),
             *(("D", step, -1 - step / 400, "mixed", "chosen") for step in (10, 30, 50)),
             ("D", 30, 0.25, "mixed", "gap"), ("D", 50, 0.5, "mixed", "gap"), ("F", 0, 0.125, "forward", "gap")]
    (tmp_path / "p.csv").write_text(PAPER + "\n".join(",".join(map(str, line)) for line in lines))
    flags = ["--forward", "F", "--reverse", "R", "--mixed", "M", "--dpo", "D", "--series", tmp_path / "p.csv"]
    found = draw("--three_panel", *flags)
    a, b, c = found["three_panel"].axes
    at = {line.get_label(): list(line.get_xdata()) for ax in (a, b, c) for line in ax.get_lines()}
    assert at["F forward chosen"] == [0, 100] and at["R reverse chosen"] == [0, 50]
    assert at["M mixed chosen"] == [0, 1] and at["DPO mixed chosen"] == [1, 1.5, 2]  # DPO's own steps, 10 to 50
    assert at["DPO mixed gap"] == [1.5, 2]
    assert at["M mixed gap"] == [0, 1] and at["F forward gap"] == [0]
    assert "R reverse gap" not in at and "DPO mixed rejected" not in at
    said = "rejected of DPO on mixed"
    assert said in found["captions"]["three_panel"] and said in capsys.readouterr().err
    (tmp_path / "p.csv").write_text(PAPER + "\n".join(",".join(map(str, line)) for line in lines[:4]))
    fig = draw("--three_panel", "--forward", "F", "--reverse", "R", "--series", tmp_path / "p.csv")["three_panel"]
    assert [ax.get_title() for ax in fig.axes] == ["(a) SFT"]
    with pytest.raises(UserError, match="--dpo F: has none of the curves"):
        draw("--three_panel", "--reverse", "R", "--dpo", "F", "--series", tmp_path / "p.csv")


def test_published_curves_of_none_of_the_data_sets_are_not_those_of_all():
    """Some of the sets may be missing; where all are, the first is named, and nothing else is drawn for them."""
    table = pandas.DataFrame(curve("chosen", {0: -1.0})).assign(dataset=["forward"])
    assert [len(kept) for kept in select_there([table], ["r"], ["forward", "mixed"])] == [1]
    with pytest.raises(UserError, match="^no data set called mixed in what was read; there is forward$"):
        select_there([table], ["r"], ["mixed"])


def test_gaps_are_added_where_they_are_missing():
    """A csv that gives one run's gap and not the other's: the second is that of its means."""
    given = curve("chosen", {0: -1.0}) + curve("rejected", {0: -3.0}) + curve("gap", {0: 7.0})
    other = curve("chosen", {0: -1.0}, "s") + curve("rejected", {0: -1.5}, "s")
    found = intervals.with_gaps(pandas.DataFrame(given + other))
    assert found[found["response"] == "gap"].set_index("run")["mean"].to_dict() == {"r": 7.0, "s": 0.5}


ODD = "a\x1b[31mb\x07\ufffe"


def test_names_with_characters_that_act_are_shown_escaped(tmp_path, capsys):
    """A run's folder may be called anything: every SVG is XML, and no file of text has the characters themselves."""
    run = make_run(tmp_path / ODD)
    make_checked(run, {0: [True], 40: [False]})
    make_tokens(run, ["x\x1b[31m", "\x00", "y"], ["z"])
    plot.main([str(run)])
    plot.main([str(run), "--strip", "7"])
    plot.main([str(make_run(tmp_path / f"{ODD}\udcff")), "--output_dir", str(run / "bytes")])  # is no text at all
    ElementTree.parse(run / "bytes" / "training.svg")
    for name in ("training", "dynamics", "mass_and_answers", "strip"):
        ElementTree.parse(run / f"{name}.svg")
        for kind in ("svg", "tex"):
            assert not re.search(rb"[\x00-\x08\x0b-\x1f]", (run / f"{name}.{kind}").read_bytes())
    assert r"\textbackslash{}x1b[31mb" in (run / "training.tex").read_text()
    assert "\x1b" not in capsys.readouterr().out


def test_the_strip_says_its_extremes(tmp_path, draw):  # noqa: F811
    """Chosen moves by half a nat, up and down by turns; in one checkpoint its last token is at -1 - 1999 / 8 - 0.5."""
    scores = make_tokens(tmp_path, WORDS, WORDS[:2])
    for columns in (1, 2):
        texts = [text.get_text() for text in draw("--scores", scores, "--strip", 7, "--columns", columns)["strip"]
                 .axes[0].texts]
        assert any("lowest \N{MINUS SIGN}0.5 at token 2, [ Ivy]" in text for text in texts)
        assert any("highest +0.5 at token 1, [So]" in text for text in texts)
    scores = make_tokens(tmp_path, ["w"] * 2000, WORDS[:2], (40,))
    texts = [text.get_text() for text in draw("--scores", scores, "--strip", 7)["strip"].axes[0].texts]
    assert any(text.startswith("lowest \N{MINUS SIGN}251 at token 2,000, [w]") for text in texts)  # is left out


def test_a_row_that_is_not_there_is_answered_with_some_that_are(tmp_path):
    scores = make_tokens(tmp_path, WORDS, WORDS[:2])
    one = pandas.read_parquet(tmp_path / "tokens.parquet")
    pandas.concat([one.assign(row=row) for row in range(20, 30)] + [one.assign(dataset="third", row=4)],
                  ignore_index=True).to_parquet(tmp_path / "tokens.parquet")
    some = r"there is row 20, 21, 22, 23 \.\.\. 29 of test, 10 rows"
    for flags, message in ((["7"], some + "; row 4 of third$"), (["4", "--test", "test"], some + "$"),
                           (["20", "--test", "third"], "in row 20; there is row 4 of third$")):
        with pytest.raises(UserError, match=message):
            plot.main(["--scores", str(scores), "--strip", *flags])


NOISE = {"rewards/margins": 0.25, "logps_per_token/chosen": 0.125, "logps_per_token/rejected": 0.0625}


def hatched(ax):
    """(low, high) of the bands that are noise."""
    return [(patch.get_y(), patch.get_y() + patch.get_height()) for patch in ax.patches if patch.get_hatch()]


def test_noise_is_a_band_of_two_standard_deviations(tmp_path, draw):  # noqa: F811
    """Around 0 where what moved is drawn, around the start where levels are; runs that do not know theirs have none.
    run.json's are of one pair: a mean over n has sqrt(n) times less."""
    run = make_run(tmp_path / "dpo")
    make_scores(run / "scores.parquet", SCORES)
    found = draw(run)
    assert not any(hatched(ax) for name in ("training", "dynamics") for ax in found[name].axes)
    record = {"noise": NOISE, "world_size": 2, "arguments": {"per_device_train_batch_size": 4,
                                                             "gradient_accumulation_steps": 2}}
    (run / "run.json").write_text(json.dumps(record))
    found = draw(run)
    loss, rewards, level = found["training"].axes
    assert (hatched(loss), hatched(rewards)) == ([], [(-0.125, 0.125)])  # of 16 pairs, a fourth of one's
    assert hatched(level) == [(4.4375, 4.5625), (5.4375, 5.5625)]  # make_run's held-out log-probs start at 4.5 and 5.5
    level, change = found["dynamics"].axes[:2]
    reach = 0.25 / math.sqrt(3)  # of three rows
    assert np.array(hatched(level)) == pytest.approx(np.array([(-2 - reach, -2 + reach), (-5 - reach, -5 + reach)]))
    assert np.array(hatched(change)) == pytest.approx(np.array([(-reach, reach)]))
    for name in ("training", "dynamics"):
        assert "bfloat16 noise" in [text.get_text() for text in found[name].legends[0].get_texts()]
        assert "Hatched: what bfloat16's rounding alone does to a" in found["captions"][name]


def noisy_run(folder, noise=NOISE, steps=(0, 40)):
    """A run with scores, masses, answers, tokens and a ledger; its name is its folder's."""
    run = make_run(folder)
    (run / "run.json").write_text(json.dumps({"noise": noise} if noise else {}))
    rows = {(side, step): [start + row - move * step / 40 for row, move in enumerate((0.125, 0.25, 0.375, 1.0))]
            for side, start in (("chosen", -2.0), ("rejected", -3.0)) for step in steps}
    make_tokens(run, WORDS, WORDS[:2], run=run.name)
    make_scores(run / "scores.parquet", {("test", *key): means for key, means in rows.items()}, run=run.name,
                implausible_mass=0.5, implausible_mass_start=0.25)
    pandas.DataFrame([{"run": run.name, "phase": "dpo", "dataset": "test", "row": row, "step": step, "correct": row > 1}
                      for row in range(4) for step in steps]).to_parquet(run / "answers.parquet")
    about = {"run": run.name, "dataset": "test", "response": "chosen"}
    pandas.DataFrame([about | {"step": 0, "side": "chosen", "share": 0.5, "row": None, "pair": 3}]).to_parquet(
        run / "ledger.parquet")
    record = about | {"row": None, "rows": 4, "steps": 1, "change": 0.5, "residual": 0.0, "levels": [-2.0, -1.5]}
    (run / "ledger.json").write_text(json.dumps([record]))
    return run


def all_figures(run, beside, draw, scores, *more):  # noqa: F811
    """({name: figure}, {name: caption}) of every figure of plot.py."""
    roles = [part for role in ROLES for part in (f"--{role}", run if role == "forward" else f"{role}s")]
    found = [draw(run, *more), draw(run, "--heatmap", *more), draw(run, "--strip", "7", *more),
             draw(run, "--ledger", *more), draw(run, beside, "--diff", *more),
             draw(run, "--scatter", "rejected.mean_logps", "chosen.mean_logps", *more),
             draw("--three_panel", *roles, "--scores", scores)]
    captions = {name: caption for one in found for name, caption in one["captions"].items()}
    return {name: one[name] for one in found for name in one["captions"]}, captions


def test_every_figure_says_what_bfloat16_does(tmp_path, draw):  # noqa: F811
    """In legend and caption, by a band or by saying that nobody measured it; a figure that is added is asked too. None
    speaks of it where run.json has no noise."""
    for noise in ({}, NOISE):
        run = noisy_run(tmp_path / f"forward-{len(noise)}", noise)
        lab = make_lab(tmp_path / "lab.parquet", seeds=1, but=lambda t: t.assign(run=t["run"].map(
            {"f0": run.name, "r0": "reverses", "m0": "mixeds", "d0": "dpos"})))  # noqa: B023
        beside = noisy_run(tmp_path / f"beside-{len(noise)}", noise)
        figures, captions = all_figures(run, beside, draw, lab)
        code = "\n".join(file.read_text() for file in (ROOT / "nanodpo" / "figures").glob("*.py"))
        assert len(figures) == len(re.findall(r"^def (?!new_)\w+_figure\(", code, re.MULTILINE))
        for name, caption in captions.items():
            assert ("hat bfloat16's rounding alone does to " in caption) == bool(noise), name
            words = [text.get_text() for text in figures[name].findobj(Text)]
            assert any("bfloat16 noise" in word for word in words) == bool(noise), name


def test_noise_in_a_difference(tmp_path, draw):  # noqa: F811
    """Of two runs with noise, sqrt(2) times that of one; of a run in float32 and one with noise, that one's. A step has
    one pair, a score's mean is over four rows; two deviations to either side of no difference, and nowhere else."""
    one, other, exact = (noisy_run(tmp_path / name, noise) for name, noise in (("a", NOISE), ("b", NOISE), ("c", {})))
    for beside, times in ((other, 2**0.5), (exact, 1.0)):
        found = draw(one, beside, "--diff")
        levels, scores = found["difference"].axes[5], found["difference_scores"].axes[1]
        assert (levels.get_ylabel(), scores.get_ylabel()) == ("difference", "difference\n(nats per token)")
        assert np.array(hatched(levels)) == pytest.approx(np.array([(-2 * 0.125 * times, 2 * 0.125 * times)]))
        assert np.array(hatched(scores)) == pytest.approx(np.array([(-0.125 * times, 0.125 * times)]))
        assert not any(hatched(ax) for ax in found["difference"].axes[:4])


def test_noise_in_the_three_panels(tmp_path, draw):  # noqa: F811
    """Three seeds of four rows, of which the third's have no noise. From their start, which all share, comes half of a
    run's variance, and from their ends a third of the other half: of the mean of all variances, two thirds. Around the
    starts of y+ and y- along their curves; of a gap, sqrt(a^2 + b^2) of its sides, around no gap."""
    runs = [make_run(tmp_path / f"{role}{seed}") for role in "frmd" for seed in range(3)]
    for run in runs[:2]:
        (run / "run.json").write_text(json.dumps({"noise": NOISE}))
    lab = make_lab(tmp_path / "lab.parquet")
    flags = lab_flags(lab)
    found = draw(*(tmp_path / flag if flag in ("f0", "f1", "f2") else flag for flag in flags))
    a, b, c = found["three_panel"].axes
    one = math.sqrt(2 / 3 * 2 / 3 * 0.125**2 / 4)
    starts = [np.mean(by_hand("f", "forward", side, 0)) for side in ("chosen", "rejected")]
    assert np.array(hatched(a)) == pytest.approx(np.array([(at - 2 * one, at + 2 * one) for at in starts]))
    assert [patch.get_x() + patch.get_width() for patch in a.patches] == [100, 100] and not hatched(b)
    gap = math.sqrt(2 / 3 * 2 / 3 * (0.125**2 + 0.0625**2) / 4)
    assert np.array(hatched(c)) == pytest.approx(np.array([(-2 * gap, 2 * gap)]))


def test_a_heatmap_greys_what_rounding_alone_may_have_moved(tmp_path, draw):  # noqa: F811
    """Rows fell by 0.125, 0.25, 0.375 and 1; twice the noise of 0.125 is 0.25, so the first two are grey."""
    found = draw(noisy_run(tmp_path / "dpo"), "--heatmap")["heatmap"]
    chosen, _, bar = found.axes
    values, grey = (np.ma.filled(image.get_array(), np.nan).ravel() for image in chosen.get_images())
    assert list(values) == pytest.approx([-0.125, -0.25, -0.375, -1.0]) and list(grey == 1) == [1, 1, 0, 0]
    assert chosen.get_title() == "chosen: 0 of 4 rise beyond noise" and hatched(bar) == [(-0.25, 0.25)]
    assert to_hex(chosen.get_images()[1].to_rgba(1.0)) == to_hex(heatmap.NOISY) != to_hex(heatmap.MISSING)


def test_scores_outside_a_runs_folder_have_its_noise_by_the_verdict(tmp_path, draw):  # noqa: F811
    """score.py of several runs writes elsewhere. verdict.json has twice the deviation of a mean over its rows: 0.25 of
    4 rows are a deviation of 0.25 of one, and of the three rows here 0.25 / sqrt(3)."""
    make_scores(tmp_path / "scores.parquet", SCORES)
    of = {"change of chosen": {"mean": 1.0, "n": 4, "noise": 0.25}, "change of rejected": {"mean": 1.0, "n": 4}}
    lines = [{"run": "dpo", "numbers": of}, {"runs": ["dpo"], "numbers": of}]
    (tmp_path / "verdict.json").write_text(json.dumps(lines))
    found = draw("--scores", tmp_path / "scores.parquet")
    reach = 2 * 0.25 / math.sqrt(3)
    assert np.array(hatched(found["dynamics"].axes[1])) == pytest.approx(np.array([(-reach, reach)]))
    short = '[{"run": "dpo", "numbers": {"change of chosen": {"noise": 1}}}]'
    for text in ("{", "[1]", "3", '[{"run": "dpo"}]', short):
        (tmp_path / "verdict.json").write_text(text)
        words = "can't be read as JSON" if text == "{" else "is not what score.py writes"
        with pytest.raises(UserError, match=f"verdict.json: {words}"):
            draw("--scores", tmp_path / "scores.parquet")


def csv(text):
    return lambda folder: (folder / "s.csv").write_text(text)


HEAD = "series,step,mean,low,high\n"


@pytest.mark.parametrize("text, message", [
    ("step,mean\n0,1\n", "no column series; it has step, mean"), (HEAD, "has no lines"), ("", "can't be read as csv"),
    (HEAD + "a,0,x,,\n", "line 2: mean is 'x', not a finite"), (HEAD + "a,0,1,,\na,,1,,\n", "line 3: step is ''"),
    (HEAD + "a,0,inf,,\n", "line 2: mean is 'inf', not"), (HEAD + "a,0,1,2,3\n", "line 2: mean is not within low and"),
    (HEAD + "a,0,1,,\na,0,2,,\n", "line 3: is there twice"), (HEAD + ",0,1,,\n", "line 2: series has no name"),
    ("series,step,mean,low\na,0,1,0\n", "needs both columns, low and high"),
    ("series,step,mean,colour\na,0,1,red\n", "unknown column colour"),
])
def test_a_wrong_csv_is_named_and_leaves_nothing(tmp_path, text, message):
    csv(text)(tmp_path)
    with pytest.raises(UserError, match=message):
        plot.main(["--series", str(tmp_path / "s.csv")])
    assert [file.name for file in tmp_path.iterdir()] == ["s.csv"]


def lab(**how):
    return lambda folder: make_lab(folder / "scores.parquet", seeds=1, **how)


ALL = ["--three_panel", "--forward", "f0", "--reverse", "r0", "--mixed", "m0", "--dpo", "d0"]


@pytest.mark.parametrize("make, flags, message", [
    (lab(), ["--three_panel", "--forward", "f0"], "--three_panel: needs runs for --reverse, --mixed, --dpo"),
    (lab(), ["--forward", "f0"], "--forward: is for --three_panel"),
    (lab(), ["--panel_ratios", "1", "1", "1"], "--panel_ratios: is for --three_panel"),
    (lab(), [*ALL, "--panel_ratios", "1", "0", "1"], "--panel_ratios: must be above 0"),
    (lab(), [*ALL, "--focus", "0.1", "0.1"], "LOW must be below HIGH"),
    (lab(), [*ALL, "--floor", "nan"], "--floor: must be finite"),
    (lab(), ["x", *ALL], "takes its runs by --forward"),
    (lab(), [*ALL[:-1], "d9"], "no run called d9 in what was read; there is f0, r0, m0 and d0"),
    (lab(), [*ALL, "--test", "forward", "reverse", "both"], "no data set called both in what was read"),
    (lab(), [*ALL, "--test", "forward", "reverse"], "--test: the three-panel figure needs three data sets"),
    (lab(but=lambda t: t[(t["run"] != "m0") | (t["dataset"] != "mixed")]), ALL,
     "--mixed m0: has no scores of chosen on data set mixed; it has chosen, rejected and gap on forward and reverse"),
    (lab(), [*ALL[:3], "r0", *ALL[3:]], "--three_panel: r0 is named twice"),
    (lab(), ["m0", "--phases"], "--phases: needs two runs or more"),
    (lab(), ["m0", "x", "--phases"], "no run called x"),
    (lab(), ["--phases", "--heatmap"], "not allowed with argument"),
    (lab(), ["--heatmap"], "the scores are of the runs f0, r0, m0, d0; a heatmap has one"),
    (lab(but=lambda t: t[t["step"] == 0]), ["f0", "--heatmap"], "a heatmap needs the scores .* two steps or more"),
    (lab(but=lambda t: t.assign(mean_logps=math.nan)), ["f0"], "every score in it is missing"),
    (lab(), ["--strip", "7"], "tokens.parquet: is not there; score.py makes it"),
    (lab(), ["--strip", "x"], "--strip: invalid int value"),
    (lambda folder: make_tokens(folder, WORDS, WORDS), ["--strip", "8"], "no tokens of chosen or rejected in row 8"),
    (lambda folder: make_tokens(folder, WORDS, WORDS, position=3), ["--strip", "7"], "row .*: is out of place"),
    (lambda folder: make_tokens(folder, WORDS, WORDS, logp=-math.inf), ["--strip", "7"], "missing or not finite"),
    (lambda folder: make_tokens(folder, WORDS, WORDS), ["--strip", "7", "--floor", "1"], "are for the figures of cur"),
])
def test_wrong_input_is_named_and_leaves_nothing(tmp_path, make, flags, message):
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        plot.main([*flags, "--scores", str(tmp_path / "scores.parquet")])
    assert sorted(tmp_path.rglob("*")) == before


PAIR = ["sft", "dpo", "--phases"]


@pytest.mark.parametrize("flags, message", [
    (["sft", "dpo", "--phases", "--series", "p.csv"], "sft/scores.parquet: is not there; score.py makes it"),
    (["typo", "--series", "p.csv"], "typo/metrics.jsonl: No such file"),
    ([*PAIR, "--scores", "s.parquet", "--test", "third"], "--phases: .* on the data sets drawn, and sft has none"),
    ([*PAIR, "--scores", "s.parquet", "--series", "p.csv", "--test", "reverse"], "drawn, and sft and dpo has none"),
    (["sft", "paper", "--phases", "--scores", "s.parquet", "--series", "p.csv"], "drawn, and paper has none"),
    (["dpo", "x", "--phases", "--scores", "s.parquet"], "no run called x in what was read; there is sft and dpo"),
    (["run", "--test", "nowhere"], "--test: is for the figure of scores.parquet, and there is none"),
    (["run", "--floor", "-0.1"], "--floor: is for the figure of scores.parquet, and there is none"),
    (["run", "--floor", "0"], "--floor: is for the figure of scores.parquet, and there is none"),
    (["--series", "p.csv", "--test", "forward"], "no data set called forward in what was read; there is reverse"),
    (["run", "--series", "p.csv", "--test", "forward"], "no data set called forward in what was read; there is rev"),
    (["--series", "bare.csv", "--test", "forward"], "no data set called forward in what was read; there is none"),
    (["--scores", "s.parquet", "--series", "p.csv", "--test", "x"], "no data set called x .*; there is reverse, test"),
    (["--scores", "s.parquet", "--series", "same.csv"], "the scores and the csv both have a run called dpo"),
])
def test_no_flag_and_no_run_is_passed_over(tmp_path, monkeypatch, flags, message):
    """Every figure that is asked for is drawn or refused."""
    tables = [make_scores(tmp_path / f"{run}.parquet", {(name, "chosen", step): [-1.0, -2.0] for step in (0, 9)
              for name in sets}, run=run, phase=run) for run, sets in (("sft", ["test"]), ("dpo", ["test", "third"]))]
    pandas.concat(map(pandas.read_parquet, tables), ignore_index=True).to_parquet(tmp_path / "s.parquet")
    make_run(tmp_path / "run")
    for name, series in (("p", "paper"), ("same", "dpo")):
        (tmp_path / f"{name}.csv").write_text(PAPER + f"{series},0,-1,reverse,chosen\n{series},9,-2,reverse,chosen\n")
    (tmp_path / "bare.csv").write_text("series,step,mean\npaper,0,-1\npaper,9,-2\n")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        plot.main(flags)
    assert sorted(tmp_path.rglob("*")) == before


def test_seeds_at_other_steps_are_not_averaged(tmp_path):
    file = make_lab(tmp_path / "s.parquet", but=lambda t: t[(t["run"] != "f1") | (t["step"] != 50)])
    with pytest.raises(UserError, match=r"f1: has scores of chosen at steps \[0, 100\] on forward, f0 at \[0, 50, "):
        plot.main([str(flag) for flag in lab_flags(file)])


def test_a_seed_of_which_all_failed_at_a_step_was_scored_there(tmp_path):
    def fail(table):
        gone = (table["run"] == "f1") & (table["response"] == "chosen") & (table["step"] == 50)
        return table.assign(mean_logps=table["mean_logps"].mask(gone))

    file = make_lab(tmp_path / "s.parquet", but=fail)
    with pytest.raises(UserError, match=r"f1: has scores of gap at steps \[0, 100\] on forward, f0 at \[0, 50, 100\]"):
        plot.main([str(flag) for flag in lab_flags(file)])


@pytest.mark.parametrize("seeds", [("F", "G"), ("G", "F")])
def test_a_seed_that_a_csv_lacks_is_none_of_the_seeds_in_whatever_order(tmp_path, seeds):
    """G has no curve on forward: a mean over F alone would be called one over two seeds."""
    lines = "F,0,-1,forward,chosen\nF,9,-2,forward,chosen\nG,0,-1,reverse,chosen\nG,9,-2,reverse,chosen\n"
    (tmp_path / "p.csv").write_text(PAPER + lines)
    with pytest.raises(UserError, match="--forward G: has no scores of chosen on data set forward"):
        plot.main(["--three_panel", "--forward", *seeds, "--series", str(tmp_path / "p.csv")])


def test_long_names_and_tiny_scales_cover_nothing(tmp_path, draw):  # noqa: F811
    """A strip makes room for a name of any length; a scale of 1e-6 writes no factor where a phase has its name; and the
    two titles of a noisy heatmap in one column stand apart."""
    run = noisy_run(tmp_path / "-".join(["a-long-name"] * 10))
    for columns in (1, 2):
        strip = draw(run, "--strip", "7", "--columns", columns)["strip"]
        extents = [text.get_window_extent() for text in strip.axes[0].texts[:2]]
        assert not extents[0].overlaps(extents[1]) and all(0 <= e.x0 and e.x1 <= strip.bbox.x1 for e in extents)
    titles = [ax.title.get_window_extent() for ax in draw(run, "--heatmap", "--columns", 1)["heatmap"].axes[:2]]
    assert not titles[0].overlaps(titles[1])
    ax = Figure(layout="constrained").subplots()
    ax.plot([0, 2], [0, 1.5e-6])
    set_phases(ax, [("SFT", 0, 1), ("DPO", 0, 1)])
    ax.figure.draw_without_rendering()
    assert ax.yaxis.get_offset_text().get_text() == "" and "1e−06" in [t.get_text() for t in ax.get_yticklabels()]


def test_a_single_step_is_a_whole_number_and_its_phase_is_as_wide_as_others(tmp_path, draw):  # noqa: F811
    """Of runs with one step or checkpoint no tick is a fraction of a step, and the phases' names stand in their
    panel."""
    ones = make_lab(tmp_path / "lab.parquet", but=lambda table: table[table["step"] == 0])
    figures = [draw(make_run(tmp_path / "a", steps=1, evals=()))["training"],
               draw(*lab_flags(ones))["three_panel"],
               draw("m0", "d0", "--phases", "--scores", make_lab(tmp_path / "two.parquet", but=lambda table: table[
                   ~table["run"].str.startswith("d") | (table["step"] == 0)]))["dynamics"]]
    for ax in (ax for fig in figures for ax in fig.axes):
        ax.figure.draw_without_rendering()
        labels = [label.get_text() for label in ax.get_xticklabels()]
        assert bool(labels) == bool(ax.get_xlabel()) and all(re.fullmatch(r"[-\N{MINUS SIGN}\d |]+", label)
                                                             for label in labels)
        for text in ax.texts:
            box, panel = text.get_window_extent(), ax.get_window_extent()
            assert panel.x0 - 1 <= box.x0 and box.x1 <= panel.x1 + 1


def test_a_legend_that_says_much_stays_in_one_column(tmp_path, draw):  # noqa: F811
    """Seeds and rows and missing scores, in one column of a journal."""
    lab = make_lab(tmp_path / "lab.parquet", rows=40, but=lambda table: table[~table["run"].isin(("f1", "f2"))].assign(
        mean_logps=table["mean_logps"].mask((table["row"] == 0) & (table["step"] == 50))))
    flags = ["--forward", "f0", *lab_flags(lab)[5:]]
    for found in (draw("--three_panel", *flags, "--columns", 1)["three_panel"],
                  draw("f0", "--scores", lab, "--columns", 1, "--style", "ggplot")["dynamics"]):
        found.draw_without_rendering()
        box = found.legends[0].get_window_extent()
        assert box.x0 >= -1 and box.x1 <= found.bbox.x1 + 1
