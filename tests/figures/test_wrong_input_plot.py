"""plot.py, and the experiment's data, on malformed input: metrics, scores, tokens, series, flags. A case a line."""

import importlib.util
import math

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from malformed import BYTES, DEEP, broken, nothing_changed, refused, written
from test_plot import SCORES, make_run, make_scores

import plot

RUN, STRIP, SERIES = ["@/run"], ["@/run", "--strip=7"], ["--series=@/s.csv"]
TEXT, NUMBER = "must hold text, found ", "must hold numbers, found "
MISSING = "has a value that is missing or not finite"
NAME = "has a name of more than 200 characters, or with characters that can't be printed"
KINDS = {  # a value in every row: its type in Arrow, and whether that is a number's
    "numbers": (7, "int64"), "fractions": (0.5, "double"), "truths": (True, "bool"), "lists": ([1, 2], "list"),
    "objects": ({"a": 1}, "struct"), "bytes": (b"ab", "binary"), "dates": (pandas.Timestamp(0), "timestamp"),
    "text": ("x", str(pa.array(pandas.Series(["x"])).type))}  # pandas 3 writes other strings than pandas 2


def column(table: str, name: str, value):
    """A change: this value in every row of a column of run/<table>.parquet; `...` takes the column away."""
    def change(folder):
        file = folder / "run" / f"{table}.parquet"
        found = pandas.read_parquet(file)
        found[name] = pandas.Series([None if value is ... else value] * len(found))
        (found.drop(columns=name) if value is ... else found).to_parquet(file)
    return change


TABLES = []
for _table, _flags, _texts, _numbers in (
        ("scores", RUN, ["run", "phase", "dataset", "response"], ["row", "step", "mean_logps"]),
        ("tokens", STRIP, ["run", "dataset", "response", "token"], ["row", "step", "position", "logp"])):
    _file = f"@/run/{_table}.parquet"
    for _name in _texts + _numbers:
        TABLES.append((f"{_table}: no {_name}", column(_table, _name, ...), _flags,
                       [f"{_file}: no column {_name}; it has"]))
        for _what, (_value, _kind) in KINDS.items():
            if _kind not in (("int64", "double") if _name in _numbers else KINDS["text"][1:]):
                TABLES.append((f"{_table}: {_name} holds {_what}", column(_table, _name, _value), _flags,
                               [f"{_file}: column {_name} {NUMBER if _name in _numbers else TEXT}{_kind}"]))
    for _name in _texts[:3] if _table == "tokens" else _texts:
        TABLES += [(f"{_table}: {_name} is {_what}", column(_table, _name, _value), _flags, [_file, "row 0: ", NAME])
                   for _what, _value in (("huge", "x" * 1_000_000), ("no text to show", "a\0\x1b[2J"),
                                         ("long", "x" * 201))]
    for _name in _numbers:
        if _name != "row" or _table == "scores":
            TABLES.append((f"{_table}: {_name} beyond all", column(_table, _name, 1e308), _flags,
                           [f"{_file}, row 0: has a value beyond 1e+12"]))
TABLES += [(f"{table}: {name} is {value}", column(table, name, value), RUN if table == "scores" else STRIP,
            [f"@/run/{table}.parquet", words]) for table, name, value, words in [
    *(("scores", name, None, MISSING) for name in ("run", "phase", "dataset", "response", "row", "step")),
    *(("scores", name, math.inf, MISSING) for name in ("step", "mean_logps")),
    *(("tokens", name, None, MISSING) for name in ("run", "dataset", "step", "position", "token", "logp")),
    *(("tokens", name, -math.inf, MISSING) for name in ("step", "logp")),
    ("scores", "mean_logps", None, "every score in it is missing"), ("scores", "step", 3, "is there twice"),
    ("tokens", "response", None, "no tokens of chosen or rejected in row 7"),
    ("tokens", "position", 3, "is out of place"),
    ("tokens", "row", 8, "no tokens of chosen or rejected in row 7"), ("tokens", "step", 1, "is out of place"),
]]
TABLES += [(f"{name} {how}", broken(f"run/{name}", change), flags, [f"@/run/{name}: can't be read as Parquet"])
           for name, flags in (("scores.parquet", RUN), ("tokens.parquet", STRIP))
           for how, change in {**BYTES, "a folder": "a folder"}.items()]


def scores(how):
    def change(folder):
        file = folder / "run" / "scores.parquet"
        how(pandas.read_parquet(file)).to_parquet(file)
    return change


def one_column_twice(folder):
    names = ["run", "run", "phase", "dataset", "row", "response", "step", "mean_logps"]
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * len(names), names), folder / "run" / "scores.parquet")


TABLES += [
    ("scores: no rows", scores(lambda t: t.iloc[:0]), RUN, ["@/run/scores.parquet: has no rows"]),
    ("scores: all twice", scores(lambda t: pandas.concat([t, t])), RUN, ["row 14: is there twice"]),
    ("scores: one step in a heatmap", scores(lambda t: t[t["step"] == 0]), [*RUN, "--heatmap"],
     ["at two steps or more"]),
    ("scores: no side in a heatmap", scores(lambda t: t[t["response"] == "chosen"].assign(response="other")),
     [*RUN, "--heatmap"], ["a heatmap needs the scores of chosen or rejected"]),
    ("scores: too many runs", scores(lambda t: pandas.concat([t.assign(run=f"r{i}") for i in range(9)])),
     ["--scores=@/run/scores.parquet"], ["scores of 9 runs: at most 6 can be told apart"]),
    ("scores: a column twice", one_column_twice, RUN, ["@/run/scores.parquet"]),
    ("a run without tokens", broken("run/tokens.parquet", "missing"), STRIP,
     ["tokens.parquet: is not there; score.py makes it"]),
    ("a run without scores in a heatmap", broken("run/scores.parquet", "missing"), [*RUN, "--heatmap"],
     ["@/run/scores.parquet: is not there; score.py makes it"]),
]
METRICS = [(f"metrics.jsonl {how}", broken("run/metrics.jsonl", change), RUN, [f"@/run/metrics.jsonl{words}"])
           for (how, change), words in zip({**BYTES, "a folder": "a folder"}.items(), [
               ", line 4: not JSON", ": not text", ": has no step to draw yet", ": not text", ", line 1: not JSON",
               ": Is a directory"])]
METRICS += [(f"metrics.jsonl: {text[:80]!r}, {len(text)}",
             written("run/metrics.jsonl", '{"step": 0, "loss": 1.0}\n' + text + "\n"), RUN,
             ["@/run/metrics.jsonl, line 2: " + words]) for text, words in [
    *((text, "not JSON") for text in (DEEP, "\0", '{"step": 1, "lo', '{"step": 1}{"step": 2}', "", "\ufeff{}",
                                      '{"step": ' + "9" * 5000 + "}")),
    *((text, "expected an object with a step") for text in ("[1]", "null", "3", '"a"', '{"loss": 1}')),
    *((f'{{"step": {step}, "loss": 1}}', f"step is {found}") for step, found in (
        ("null", "null, not a finite"), ('"1"', '"1", not a finite'), ("true", "true, not a finite"),
        ("[1]", "[1], not"),
        ("Infinity", "Infinity, not a finite"), ("9" * 400, "9999"), ("0.5", "0.5, not a whole number from 0"),
        ("-1", "-1, not a whole number from 0"))),
    *((f'{{"step": 1, "{name}": {value}}}', f"{name} is {value[:20]}")
      for name in ("loss", "rewards/margins", "eval_logps_per_token/chosen")
      for value in ("null", '"x"', "true", "[1]", "{}", "-Infinity", "NaN", "1e+308", "9" * 400)),
    ('{"step": 0, "loss": 2.0}', "step 0 is there twice"),
]]
HEAD = "series,step,mean,low,high,dataset,response,phase\n"
CSV = [(f"s.csv: {what}", written("s.csv", text), SERIES, ["@/s.csv", words]) for what, text, words in [
    ("more fields", "series,step,mean\na,0,1,5\n", "line 2: has 4 fields, the first line 3"),
    ("fewer fields", "series,step,mean\na,0,1\na,0\n", "line 3: has 2 fields, the first line 3"),
    ("a column twice", "series,step,mean,mean\na,0,1,2\n", "has two columns called mean"),
    ("NUL in a name", "series,step,mean\na\0,0,1\n", "line 2: " + NAME),
    ("a huge name", HEAD + "x" * 10**6 + ",0,1,,,,,\n", "line 2: " + NAME),
    ("a name that acts", HEAD + "a,0,1,,,\x1b[2J,,\n", "line 2: " + NAME),
    ("an open quote", 'series,step,mean\n"a,0,1\n', "can't be read as csv (unexpected end of data)"),
    ("semicolons", "series;step;mean\na;0;1\n", "it has series;step;mean"),
    ("capitals", "Series,Step,Mean\na,0,1\n", "no column series, step, mean"),
    ("empty lines", "\n\n\n", "it is empty"),
    ("latin-1", "series,step,mean\né,0,1\n".encode("latin-1"), "can't decode"),
    ("UTF-16", "series,step,mean\na,0,1\n".encode("utf-16"), "can't decode byte 0xff"),
    ("a step twice", HEAD + "a,0,1,,,d,chosen,dpo\na,0.0,2,,,d,chosen,dpo\n", "line 3: is there twice"),
    ("low above high", HEAD + "a,0,1,2,0,,,\n", "line 2: mean is not within low and high"),
    *((f"{name} {value}", "series,step,mean\na," + (f"{value},1" if name == "step" else f"0,{value}") + "\n",
       f"line 2: {name} is {value.strip(chr(34))!r}, not a finite number")
      for name in ("step", "mean")
      for value in ("x", "", "nan", "-inf", "1e400", "1e308", "0x10", '"1,5"', "1 2", "None")),
]]
CSV += [(f"s.csv {how}", broken("s.csv", change), SERIES, [f"@/s.csv{words}"])
        for (how, change), words in zip({**BYTES, "a folder": "a folder", "missing": "missing"}.items(), [
            ", line 3: has 1 fields", ": can't be read as csv ('utf-8' codec", ": can't be read as csv (it is empty)",
            ": can't be read as csv ('utf-8' codec", ": no column series, step, mean",
            ": can't be read as csv (Is a directory)",
            ": can't be read as csv (No such file or directory)"])]
FLAGS = [(" ".join(flags)[:60], nothing_changed, [*RUN, *flags], [words]) for flags, words in [
    (["--columns=0"], "--columns: invalid choice: 0"), (["--columns=1.0"], "--columns: invalid int value: '1.0'"),
    (["--focus", "x", "y"], "--focus: invalid float value: 'x'"), (["--focus", "1"], "--focus: expected 2 arguments"),
    *((["--focus", value, "1"], "--focus: must be finite, and no larger than 1e12")
      for value in ("nan", "inf", "1e400")),
    *(([f"--floor={value}"], "--floor: must be finite, and no larger than 1e12") for value in ("nan", "-inf", "1e308")),
    (["--floor="], "--floor: invalid float value: ''"),
    (["--panel_ratios", "1", "1"], "--panel_ratios: expected 3 argum"),
    (["--panel_ratios", "1", "1", "inf"], "--panel_ratios"),
    (["--serif=yes"], "--serif: ignored explicit argument 'yes'"),
    *(([f"--strip={value}"], f"--strip: invalid int value: '{value}'") for value in ("", "1.5", "nan", "1e3")),
    *(([f"--strip={value}"], f"--strip {value}: must be the number of a row, from 0") for value in ("-1", "9" * 30)),
    (["--strip=" + "9" * 5000], "--strip: invalid int value"),
    (["--strip=8"], "no tokens of chosen or rejected in row 8"),
    (["--style=@"], "--style @: neither a style of matplotlib nor a file with one"),
    (["--style=x\ny"], "neither a style"),
    (["--output_dir=@/s.csv/x"], "--output_dir @/s.csv/x: can't be written"),
    (["--test"], "--test: expected at least one"),
    (["--output_dir=@/" + "x" * 300], "can't be written"),
    (["--output_dir=/dev/null/x"], "/dev/null/x: can't be written"),
    (["--test", "nope"], "no data set called nope in what was read; there is forward and reverse"),
    (["--scores"], "--scores: expected at least one argument"), (["--scores", "@"], "@: can't be read as Parquet"),
    (["--scores", "@/none"], "@/none: is not there; score.py makes it"),
    (["--scores", "x" * 5000], "File name too long"),
    (["--series=@/none"], "@/none: can't be read as csv"), (["--series=@"], "@: can't be read as csv"),
    (["--heatmap", "--phases"], "--phases: not allowed with argument --heatmap"),
    (["--phases"], "needs two runs or more"),
    (["--phases", "@/run"], "--phases: needs two runs or more"), (["--three_panel"], "needs runs for --forward"),
    (["--heatmap", "--floor=1"], "--series, --focus and --floor: are for the figures of curves"),
    (["--heatmap", "--series=@/s.csv"], "--series, --focus and --floor"),
    (["--mixed=run"], "--mixed: is for --three_panel"),
    (["--strip=7", "--test=nope"], "no data set called nope in what was read; there is d"),
    (["--nope"], "unknown argument --nope"),
    (["@/run/scores.parquet"], "@/run/scores.parquet: is a file, and no run's folder; a table of score.py belongs"),
    (["@/none"], "@/none/metrics.jsonl: No such file"), (["x" * 5000], "File name too long"),
    *((flags, "File name too long") for flags in (
        ["--series=@/" + "x" * 300], ["--phases", "@/run", "x" * 300], ["--phases", "x" * 300, "@/run"])),
    (["--style=" + "x" * 300], "neither a style of matplotlib nor a file with one"),
    (["@"], "@/metrics.jsonl: No"),
    (["@/s.csv"], "@/s.csv: is a file, and no run's folder; a table of score.py belongs to --scores, a csv to --ser"),
    (["~nobody-at-all"], "~nobody-at-all/metrics.jsonl: No such"),
    (["@/run", "--output_dir=~nobody-at-all/o"], "--output_dir ~nobody-at-all/o: there is no home folder"),
]]
NOT_OURS, NO_JSON = "@/run/run.json: is not what train.py writes", "@/run/run.json: can't be read as JSON"
RECORDS = [(f"run.json: {text[:60]!r}", written("run/run.json", text), RUN, [NOT_OURS]) for text in (
    "[1]", '{"arguments": 3}', '{"noise": [1]}', '{"arguments": {"loss": 3}}',
    '{"arguments": {"model_name": null}}', '{"arguments": {"label_smoothing": "x"}}', '{"arguments": {"beta": NaN}}',
    '{"noise": {"rewards/margins": -1}}', '{"noise": {"logps_per_token/chosen": "x"}}',
    '{"noise": {"logps_per_token/rejected": Infinity}}')]
RECORDS += [(f"run.json: {text[:60]!r}", written("run/run.json", text), RUN, [NO_JSON]) for text in ("", "{", DEEP)]
RECORDS += [(f"run.json {how}", broken("run/run.json", change), RUN, [NO_JSON]) for how, change in BYTES.items()]
RECORDS += [("run.json a folder", broken("run/run.json", "a folder"), RUN,
             ["@/run/run.json: can't be read (Is a directory)"])]


def answers(**changed):
    def change(folder):
        lines = [{"run": "run", "phase": "dpo", "dataset": "forward", "row": row, "step": 0, "correct": True} | changed
                 for row in range(2)]
        pandas.DataFrame(lines).dropna(axis=1, how="all").to_parquet(folder / "run" / "answers.parquet")
    return change


RECORDS += [(f"answers: {changed}", answers(**changed), RUN, ["@/run/answers.parquet", words]) for changed, words in [
    ({"correct": 1}, "column correct must hold true or false, found int64"), ({"correct": None}, "no column correct"),
    ({"correct": "yes"}, "column correct must hold true or false"), ({"row": 3}, "row 1: is there twice"),
    ({"run": "x" * 201}, NAME), ({"step": math.inf}, MISSING), ({"step": "0"}, NUMBER)]]
CASES = [*TABLES, *METRICS, *CSV, *FLAGS, *RECORDS]


@pytest.mark.parametrize("change, flags, words", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_malformed_input(tmp_path, change, flags, words, monkeypatch, capfd):
    """Input that can't be drawn is named in one line, and no figure, old or new, is touched."""
    run = make_run(tmp_path / "run")
    make_scores(run / "scores.parquet", SCORES, run="run")
    tokens = [{"run": "run", "dataset": "d", "response": side, "step": step, "row": 7, "position": i, "token": word,
               "logp": -1.0 - i - step} for step in (0, 4) for side in ("chosen", "rejected")
              for i, word in enumerate(("a", " b", f" {side}"))]
    pandas.DataFrame(tokens).to_parquet(run / "tokens.parquet")
    (tmp_path / "s.csv").write_text(HEAD + "".join(f"paper,{i},{-i},,,d,chosen,dpo\n" for i in range(4)))
    (run / "training.png").write_text("an old figure")
    change(tmp_path)
    said = refused(plot.main, [flag.replace("@", str(tmp_path)) for flag in flags], tmp_path, monkeypatch, capfd)
    for part in words:
        assert part.replace("@", str(tmp_path)) in said


# The experiment's data

_spec = importlib.util.spec_from_file_location("forward_reverse_wrong", ROOT / "examples" / "forward_reverse.py")
experiment = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(experiment)


def problems(**changed):
    """A change: ten problems, a row of each direction, with these columns otherwise; `...` takes one away."""
    def change(folder):
        rows = [{"question": f"q{i % 2}-{i // 2}", "text": "a", "worse-text": "b", "relevant-question":
                 f"q{1 - i % 2}-{i // 2}", "sample_type": ("original", "flipped")[i % 2]} for i in range(20)]
        for row in rows[3:] if changed.pop("later", False) else rows:
            row.update({name: value for name, value in changed.items() if value is not ...})
        table = pandas.DataFrame(rows).drop(columns=[name for name, value in changed.items() if value is ...])
        table.to_parquet(folder / "r.parquet")
    return change


DATA = [(f"{name} {what}", problems(**{name: value}), [f"@/r.parquet, row 0: {name} must be text, found"])
        for name in ("question", "text", "worse-text", "relevant-question", "sample_type")
        for what, value in {"null": None, "a number": 3, "a list": [1], "an object": {"a": 1}, "empty": "",
                            "white": " ",
                            "bytes": b"a"}.items()]
DATA += [(f"no {name}", problems(**{name: ...}), [f"@/r.parquet: has no column {name}; it has"])
         for name in ("question", "text", "worse-text", "relevant-question", "sample_type")]
DATA += [(f"the experiment's data {getattr(how, '__name__', how)}", lambda folder,
          how=how: (problems()(folder), broken("r.parquet", how)(folder)),
          ["@/r.parquet: can't be read as Parquet"]) for how in [*BYTES.values(), "missing"]]
DATA += [("one direction only", problems(sample_type="original"),
          ["expected 10 problems (--test_every) or more", "{'original': 20}"]),
         ("a row that starts later", problems(later=True, question=None),
          ["@/r.parquet, row 3: question must be text"]),
         ("too few", lambda folder: (problems()(folder), pandas.read_parquet(folder / "r.parquet")[:4].to_parquet(
             folder / "r.parquet")), ["expected 10 problems (--test_every) or more", "'original': 2"])]


@pytest.mark.parametrize("change, words", [case[1:] for case in DATA], ids=[case[0] for case in DATA])
def test_malformed_data_of_the_experiment(tmp_path, change, words, monkeypatch, capfd):
    monkeypatch.setattr(experiment, "experiment", lambda *_: pytest.fail("the wrong input was not found"))
    change(tmp_path)
    flags = ["model", str(tmp_path / "r.parquet"), "--output_dir", str(tmp_path / "out")]
    said = refused(experiment.main, flags, tmp_path, monkeypatch, capfd)
    for part in words:
        assert part.replace("@", str(tmp_path)) in said
