"""plot.py --page: the page's numbers are the tables', text stays text, and a reader finds a way in a real browser."""

import base64
import itertools
import json
import re
import shutil
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pandas
import pytest

import plot
from nanodpo.errors import UserError
from nanodpo.figures import page
from nanodpo.figures.after import page_after

STEPS = [0, 40, 120]
HOSTILE = ["</script><img src=x onerror=alert(1)>", "<!--", "]]>", "\u2028", "\u202e", "\u2066", "\x00", "&lt;", "",
           "\n", "\t", " ", "\u00a0", "\ufeff", "\x1b[31m", "${alert(2)}", "'\"`", "@data@",
           "\U0001f468\u200d\U0001f469", "\u05e9\u05dc\u05d5\u05dd", "W" * 400]
GAINED, LOST = ["Eva", " the", "\u202ewen", "<b>"], ["lost", "\n\n", "</script>", "\ufffd"]


def write_scoring(folder, rows=4, runs=("dpo",), steps=STEPS, sets=("test",), length=12, risers=2, words=None):
    """Tables as score.py leaves them, of random numbers; the chosen responses of later rows move further. The tokens
    are `words`, or in row 1 the hostile ones. Returns the folder."""
    random, parts, gains = np.random.default_rng(0), [], []
    for run, name, row, response in itertools.product(runs, sets, range(rows), ("chosen", "rejected")):
        texts = words or (HOSTILE if row == 1 else [f" w{i}" for i in range(length)])
        n, s = len(texts), len(steps)
        moves = np.outer(np.divide(steps, 10), random.normal(0.01 * (row + 1) * (response == "chosen"), 0.01, n))
        key = {"run": run, "phase": "dpo", "dataset": name, "row": row, "response": response}
        parts.append(key | {
            "step": np.repeat(steps, n), "position": np.tile(range(n), s), "token": np.array(texts * s, dtype=object),
            "logp": np.minimum(-random.gamma(0.3, 2, n) - moves, 0).ravel().astype(np.float32),
            "entropy": random.random(s * n), "rank": random.integers(1, 12000, s * n).astype(np.int32)})
        gains += [key | {"step": step, "position": i, "place": sign * (k + 1), "id": 10 * k + sign + i % 3 * 100,
                         "token": (GAINED if sign > 0 else LOST)[(k + i) % 4], "before": np.float32(0.5),
                         "after": np.float32(0.5 + sign * (0.001 + 0.4 * random.random() ** 3))}
                  for step in steps[1:] for i in range(n) for k in range(risers) for sign in (1, -1)]
    folder.mkdir(parents=True)
    columns = {name: [np.broadcast_to(part[name], len(part["step"])) for part in parts] for name in parts[0]}
    tokens = pandas.DataFrame({name: np.concatenate(values) for name, values in columns.items()})
    tokens.to_parquet(folder / "tokens.parquet")
    groups = tokens.groupby(["run", "phase", "step", "dataset", "row", "response"], sort=False)["logp"]
    scores = groups.agg(logps="sum", mean_logps="mean", tokens="size").reset_index()
    scores.assign(checkpoint="x", problem=scores["row"].astype(str)).to_parquet(folder / "scores.parquet")
    if gains:
        pandas.DataFrame(gains).to_parquet(folder / "risers.parquet")
    prompts = scores[["dataset", "row"]].drop_duplicates()
    prompts.assign(prompt=prompts["row"].map(prompt_of)).to_parquet(folder / "prompts.parquet")
    return folder


def prompt_of(row: int) -> str:
    """Of row 0 one of 3,000 characters, of row 1 all that is hostile, of row 2 10,000, of others a short one."""
    return {0: "Why? " * 600, 1: "".join(HOSTILE), 2: "".join(f"{i:09d} " for i in range(1000))}.get(
        row, f"<|user|>\nWhat is {row}?")


def make(folder, *flags) -> Path:
    plot.main(["--scores", str(folder / "scores.parquet"), "--page", *map(str, flags)])
    return folder / "page.html"


def data_of(file: Path) -> dict:
    """The data that the page's own script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text()).group(1))


def row_of(data: dict, name: str, row: int) -> dict:
    (packed,) = [its["data"] for its in data["sets"][name]["rows"] if its["row"] == row]
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def numbers(text: str) -> list[int]:
    """Polylines, decoded bit by bit as Google describes them."""
    found, bits, shift = [], 0, 0
    for letter in text:
        bits |= ((ord(letter) - 63) & 0x1F) << shift
        shift += 5
        if ord(letter) - 63 < 0x20:
            found.append(~(bits >> 1) if bits & 1 else bits >> 1)
            bits = shift = 0
    return found


def summed(text: str, n: int) -> np.ndarray:
    return np.cumsum(np.reshape(numbers(text), (-1, n)), axis=0)


PAINT = "performance.getEntriesByName('first-contentful-paint')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("page") / "two <b>runs"
    return write_scoring(place, runs=("dpo", "<i>&other"), sets=("test", "a</script>"))


def test_letters_are_googles():
    """The two examples of its page on the algorithm, and what a decoder bit by bit makes of any numbers."""
    assert page.letters(np.array([-17998321])) == "`~oia@"
    points = [3850000, -12020000, 220000, -75000, 255200, -550300]
    assert page.letters(np.array(points)) == "_p~iF~ps|U_ulLnnqC_mqNvxq`@"
    random = np.random.default_rng(1).integers(-2**40, 2**40, 2000) >> np.random.default_rng(2).integers(0, 40, 2000)
    assert numbers(page.letters(random)) == random.tolist()


def test_all_numbers_are_the_tables(folder):
    """Of every token at every checkpoint, to half of the smallest difference that is kept."""
    data = data_of(make(folder))
    tokens, risers = (pandas.read_parquet(folder / f"{name}.parquet") for name in ("tokens", "risers"))
    assert list(data["runs"]) == ["dpo", "<i>&other"] and data["runs"]["dpo"]["steps"] == STEPS
    detail, seen = data["detail"], 0
    for (name, row), table in tokens.groupby(["dataset", "row"]):
        found = row_of(data, name, row)
        for (response, run), its in table.groupby(["response", "run"]):
            (entry,) = [entry for entry in found["entries"] if entry["response"] == response]
            n, packed = len(entry["tokens"]), entry["runs"][run]
            assert entry["tokens"] == its["token"][its["step"] == 0].tolist() and packed["at"] == STEPS
            for column in ("logp", "entropy"):
                given = np.reshape(its[column], (-1, n)) / detail[column]
                assert abs(summed(packed[column], n) - given).max() < 0.5001
            ranks, given = summed(packed["rank"], n), np.reshape(its["rank"], (-1, n))
            assert (abs(ranks - given) <= 10.0 ** (np.char.str_len(given.astype(str)) - 2) / 2 * (given >= 100)).all()
            seen += its.size
            (lines,) = [part for key, part in risers.groupby(["dataset", "row", "response", "run"])
                        if key == (name, row, response, run)]
            lines = lines.assign(lost=lines["place"] < 0, size=abs(lines["place"]))
            lines = lines.sort_values(["step", "position", "lost", "size"])
            lines = lines[abs(lines["after"] - lines["before"]) >= detail["probability"]]
            who = [found["names"][i] for i in numbers(packed["risers"]["who"])]
            assert who == [id if "\ufffd" in text else text for id, text in zip(lines["id"], lines["token"])]
            before, change = (np.array(numbers(packed["risers"][side])) for side in ("before", "change"))
            assert before * detail["probability"] == pytest.approx(lines["before"], abs=0.5001 * detail["probability"])
            after = (before + change) * detail["probability"]
            assert after == pytest.approx(lines["after"], abs=0.5001 * detail["probability"])
            for side, lost in (("gained", False), ("lost", True)):
                counts = lines[lines["lost"] == lost].groupby(["step", "position"]).size()
                index = pandas.MultiIndex.from_product([STEPS, range(n)])
                assert numbers(packed["risers"][side]) == counts.reindex(index, fill_value=0).tolist()
    assert seen == tokens.size


def test_means_of_rows_and_data_sets_are_the_tables(folder):
    data, scores = data_of(make(folder)), pandas.read_parquet(folder / "scores.parquet")
    for (name, run, response), table in scores.groupby(["dataset", "run", "response"]):
        for step, mean, low, high, n in data["sets"][name]["means"][run][response]:
            its = table["mean_logps"][table["step"] == step].astype(float)
            reach = 3.182446 * its.std() / 2  # Student's t at 97.5%, three degrees of freedom; four rows
            assert n == 4 and mean == pytest.approx(its.mean(), rel=1e-5)
            assert (low, high) == pytest.approx((its.mean() - reach, its.mean() + reach), rel=1e-5)
        for row in data["sets"][name]["rows"]:
            its = table[table["row"] == row["row"]].sort_values("step")["mean_logps"]
            assert row["means"][run][response] == pytest.approx(its.tolist(), rel=1e-5)


def test_a_prompt_is_that_of_its_row_and_of_a_long_one_both_ends_are_there(folder):
    """1,500 characters of each end, and how many lie between; the same for each run of these scores."""
    data = data_of(make(folder))
    for name, row in itertools.product(("test", "a</script>"), range(4)):
        whole, prompts = prompt_of(row), row_of(data, name, row)["prompts"]
        shown = [whole[:1500], 7000, whole[-1500:]] if row == 2 else [whole, 0, ""]
        assert prompts == {"dpo": shown, "<i>&other": shown}


def test_runs_of_several_folders_have_their_own_prompts(tmp_path):
    """Another template makes another prompt of the same row; one folder has none, and one lacks a row."""
    folders = [write_scoring(tmp_path / name, rows=2, runs=(name,)) for name in ("one", "two", "old")]
    file = folders[1] / "prompts.parquet"
    pandas.read_parquet(file)[:1].assign(prompt="[INST] What is 0? [/INST]").to_parquet(file)
    (folders[2] / "prompts.parquet").unlink()
    plot.main([*map(str, folders), "--page", "--output_dir", str(tmp_path / "all")])
    data = data_of(tmp_path / "all" / "page.html")
    found = [row_of(data, "test", row)["prompts"] for row in (0, 1)]
    assert found == [{"one": [prompt_of(0), 0, ""], "two": ["[INST] What is 0? [/INST]", 0, ""]},
                     {"one": [prompt_of(1), 0, ""]}]


def test_the_same_tables_give_the_same_bytes_and_nothing_else_is_named(folder):
    first = make(folder).read_bytes()
    assert make(folder).read_bytes() == first
    assert set(re.findall(rb"\w+://[\w./]+", first)) <= {b"http://www.w3.org/2000/svg"}
    assert b"default-src 'none'" in first and first.count(b"<script") == first.count(b"</script") == 2


def test_a_page_that_would_be_too_large_is_coarser_then_lacks_rows_and_says_so(tmp_path, monkeypatch, capsys):
    """First all rows stay, in coarser numbers; then those whose chosen response fell least are left out."""
    folder = write_scoring(tmp_path / "many", rows=14, length=60)
    sizes = []
    for detail in page.DETAILS:
        monkeypatch.setattr(page, "LIMIT", sizes[-1] - 500 if sizes else page.LIMIT)
        data = data_of(make(folder))
        sizes.append((folder / "page.html").stat().st_size)
        assert data["detail"] == detail and data["notes"] == [] and len(data["sets"]["test"]["rows"]) == 14
    assert capsys.readouterr().err == "" and sizes == sorted(sizes, reverse=True)
    monkeypatch.setattr(page, "LIMIT", sizes[-1] - 15000)
    data = data_of(make(folder))
    rows, said = [its["row"] for its in data["sets"]["test"]["rows"]], capsys.readouterr().err
    assert 2 < len(rows) < 13 and f"{14 - len(rows)} of 14" in said and said.count("\n") == 1
    assert data["notes"] == [said.removeprefix("note: ").rstrip()]
    assert page.LIMIT - 10000 < (folder / "page.html").stat().st_size <= page.LIMIT
    scores = pandas.read_parquet(folder / "scores.parquet")
    chosen = scores[scores["response"] == "chosen"].pivot(index="row", columns="step", values="mean_logps")
    assert rows == (chosen[STEPS[-1]] - chosen[0]).sort_values().index[: len(rows)].tolist()


def test_tables_of_which_no_page_holds_all_are_read_for_two_details_alone(tmp_path, monkeypatch):
    """Where the coarsest numbers are too long, so are those between. Each try is a pass through the tables."""
    folder = write_scoring(tmp_path / "many", rows=14, length=60)
    read = mock.Mock(side_effect=page.read_parts)
    monkeypatch.setattr(page, "read_parts", read)
    size = make(folder).stat().st_size
    assert read.call_count == 1
    monkeypatch.setattr(page, "LIMIT", (size + page.TEMPLATE.stat().st_size) // 2)
    data = data_of(make(folder))
    assert len(data["notes"]) == 1 and data["detail"] == page.DETAILS[-1]
    assert [call.args[3] for call in read.call_args_list[1:]] == [0.001, 0.1]


def test_a_folder_without_tokens_names_the_command_that_makes_them(tmp_path):
    folder = write_scoring(tmp_path / "my run")
    (folder / "tokens.parquet").unlink()
    with pytest.raises(UserError, match="tokens.parquet: is not there; score.py makes it with --tokens"):
        make(folder)
    (folder / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokens.parquet: is not there; `.*score.py '?\S*my run'? --tokens` makes it"):
        make(folder)
    assert page_after(folder) == "" and not (folder / "page.html").exists()


@pytest.mark.parametrize("flags, said", [
    (["--serif"], "--serif: is for figures, and --page makes none"),
    (["--focus", "0", "1"], "--series, --focus and --floor: are for the figures of curves"),
    (["--test", "nowhere"], "no data set called nowhere in what was read; there is test"),
    (["elsewhere"], "no run called elsewhere in what was read; there is dpo"),
])
def test_wrong_flags(tmp_path, flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        make(write_scoring(tmp_path / "run"), *flags)


@pytest.mark.parametrize("name, column, value, said", [
    ("tokens", "position", 3, r"tokens.parquet, row \d+: is out of place: positions must be 0, 1, 2"),
    ("tokens", "logp", np.inf, r"tokens.parquet, row \d+: has a value that is missing or not finite"),
    ("tokens", "token", None, r"tokens.parquet, row \d+: has a value that is missing or not finite"),
    ("tokens", "token", "new", "chosen of dpo has other tokens at step"),
    ("tokens", "rank", None, "tokens.parquet: no column rank; it has run"),
    ("risers", "place", 0, r"risers.parquet, row \d+: has a value that can't be"),
    ("risers", "before", 7.0, r"risers.parquet, row \d+: has a value that can't be"),
    ("risers", "position", 12, "risers.parquet: row 0 of test has a position beyond its 12 tokens"),
    ("prompts", "prompt", None, r"prompts.parquet, row \d+: has a value that is missing or not finite"),
    ("prompts", "row", 1, "prompts.parquet: has row 1 of test twice"),
])
def test_damaged_tables_are_refused(tmp_path, name, column, value, said):
    folder = write_scoring(tmp_path / "run", rows=6, words=[" a"] * 12)
    table = pandas.read_parquet(folder / f"{name}.parquet").reset_index(drop=True)
    table.loc[5, column] = value
    (table.drop(columns="rank") if column == "rank" else table).to_parquet(folder / f"{name}.parquet")
    with pytest.raises(UserError, match=said):
        make(folder)
    assert not (folder / "page.html").exists()


def test_what_is_no_parquet(tmp_path):
    folder = write_scoring(tmp_path / "run", rows=1)
    (folder / "tokens.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(UserError, match="tokens.parquet: can't be read as Parquet"):
        make(folder)
    assert page_after(folder).startswith("no page: ") and not (folder / "page.html").exists()


def test_runs_and_rows_without_tokens_are_not_offered(tmp_path):
    """One run kept tokens of two rows, the other none: the page has the first alone, and its means over all rows."""
    folder = write_scoring(tmp_path / "run", runs=("kept", "none"))
    tokens = pandas.read_parquet(folder / "tokens.parquet")
    tokens[(tokens["run"] == "kept") & (tokens["row"] > 1)].to_parquet(folder / "tokens.parquet")
    data = data_of(make(folder))
    assert [*data["runs"]] == ["kept"] and {row["row"] for row in data["sets"]["test"]["rows"]} == {2, 3}
    assert data["sets"]["test"]["means"]["kept"]["chosen"][0][4] == 4
    with pytest.raises(UserError, match="no tokens of run none on data set test; score.py keeps them"):
        make(folder, "none")


def test_scoring_makes_it_unasked(tmp_path):
    folder = write_scoring(tmp_path / "run")
    assert page_after(folder) == f"page: {folder / 'page.html'}, for a browser" and data_of(folder / "page.html")


def add_ledger(folder, run="dpo", name="test"):
    """A ledger of 20 pairs, a step each: row k moves chosen by (k - 6) / 1000 with its chosen side and by a tenth of
    that with its rejected one; a hostile row is among their texts. One probe is a single row, which is nobody's mean.
    """
    lines = [{"step": k, "pair": k, "side": side, "share": (k - 6) / 1000 * part}
             for k in range(20) for side, part in (("chosen", 1), ("rejected", 0.1))]
    lines.append({"step": 0, "pair": None, "side": "weight_decay", "share": 1.0})
    table = pandas.DataFrame(lines).assign(run=run, dataset=name, response="chosen", row=None)
    table = pandas.concat([table, table.assign(row=3, share=99.0)])
    table.astype({"pair": "Int64", "row": "Int64"}).to_parquet(folder / "ledger.parquet")
    record = {"run": run, "dataset": name, "response": "chosen", "row": None, "rows": 4, "change": 0.077,
              "levels": [0.0], "residual": 0.07, "steps": 20, "doubts": ["unreliable: 7% is left over"]}
    texts = {k: [f"Q{k}", {19: HOSTILE[0]}.get(k, f"A{k}"), f"B{k}"] for k in range(20)}
    (folder / "ledger.json").write_text(json.dumps([record | {"texts": texts}, record | {"row": 3}]))


def test_pairs_of_a_ledger(tmp_path):
    """Those that lowered the mean most and raised it most, their two sides, and texts."""
    folder = write_scoring(tmp_path / "run", rows=2)
    assert data_of(make(folder))["ledger"] == {}
    add_ledger(folder)
    found = data_of(make(folder))["ledger"]["dpo"]
    chosen = found["sets"]["test"]["chosen"]
    assert [row for row, *_ in chosen["lowered"]] == [0, 1, 2, 3, 4]
    assert [row for row, *_ in chosen["raised"]] == [19, 18, 17, 16, 15]
    for row, share, first, second in (*chosen["lowered"], *chosen["raised"]):
        assert [share, first, second] == pytest.approx([(row - 6) * part / 1000 for part in (1.1, 1, 0.1)])
    assert (chosen["rows"], chosen["change"], chosen["doubts"]) == (4, 0.077, ["unreliable: 7% is left over"])
    assert found["texts"]["19"] == ["Q19", HOSTILE[0], "B19"]
    records = json.loads((folder / "ledger.json").read_text())
    del records[0]["texts"]
    (folder / "ledger.json").write_text(json.dumps(records))
    found = data_of(make(folder))["ledger"]["dpo"]
    assert found["texts"] == {} and "score.py --ledger makes it again" in found["why"]


# --- In a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window; one for all tests."""
    pytest.importorskip("selenium", reason="no selenium here, which drives the browser")
    if missing := [name for name in ("chromium", "chromedriver") if not shutil.which(name)]:
        pytest.skip(f"no {' and no '.join(missing)} here")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update",
                 f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def hostile(folder):
    return make(folder)


@pytest.fixture
def show(browser):
    """show(file): the page as a reader finds it; the browser may not complain of anything."""
    def opened(file, width=1280, height=800, scheme="light"):
        cdp = browser.execute_cdp_cmd
        cdp("Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
        cdp("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        browser.get(file.resolve().as_uri())
        until(browser, "document.querySelectorAll('.token').length > 0")
        return browser
    yield opened
    assert browser.get_log("browser") == []


def ask(browser, expression, *arguments):
    """The value of an expression of JavaScript."""
    return browser.execute_script(f"return {expression}", *arguments)


def until(browser, expression, *arguments):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10, 0.02).until(lambda _: ask(browser, expression, *arguments), expression)


def press(browser, *keys):
    from selenium.webdriver import Keys
    from selenium.webdriver.common.action_chains import ActionChains

    chain = ActionChains(browser, duration=0)
    for shift, _, name in (key.rpartition("+") for key in keys):
        key = getattr(Keys, name, name)
        chain = chain.key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT) if shift else chain.send_keys(key)
    chain.perform()


def choose(browser, **values):
    """Chooses as a reader does in the lists of these names, and waits until the row is there."""
    for name, value in values.items():
        browser.execute_script("const list = document.getElementById(arguments[0]); list.value = arguments[1];"
                               "list.dispatchEvent(new Event('change'))", name, str(value))
        until(browser, "view.entries === view.row.unpacked?.entries && document.getElementById('row-title').textContent"
                       ".startsWith(`row ${document.getElementById('row').value},`)")


def texts(browser, css) -> list[str]:
    return ask(browser, "[...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css)


def cells(browser, table) -> list[list[str]]:
    rows = "[...document.getElementById(arguments[0]).rows]"
    return ask(browser, f"{rows}.map(row => [...row.cells].map(cell => cell.textContent))", table)


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-").replace("\N{ALMOST EQUAL TO}", "").replace(",", ""))


DRAWN = """
    const c = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    return [...document.querySelectorAll(arguments[0])].map(e => {
      c.clearRect(0, 0, 1, 1); c.fillStyle = getComputedStyle(e)[arguments[1]]; c.fillRect(0, 0, 1, 1);
      return [...c.getImageData(0, 0, 1, 1).data]; })"""


def colours(browser, css, what="backgroundColor") -> list[list[int]]:
    """Red, green, blue and alpha of what is found, as it is drawn."""
    return browser.execute_script(DRAWN, css, what)


PANES = [f"[aria-label='{name} response'] .token" for name in ("first", "second")]


def test_it_opens_on_the_row_that_fell_most_at_the_last_step(folder, hostile, show):
    browser, scores = show(hostile), pandas.read_parquet(folder / "scores.parquet")
    here = scores[(scores["run"] == "dpo") & (scores["dataset"] == "test") & (scores["response"] == "chosen")]
    moved = here.pivot(index="row", columns="step", values="mean_logps")
    order = (moved[120] - moved[0]).sort_values()
    assert texts(browser, "#row option") == [
        f"{row}  ({change:+.3f})".replace("-", "\N{MINUS SIGN}") for row, change in order.items()]
    assert texts(browser, "#at") == ["step 120 of 120"]
    assert texts(browser, "[aria-pressed=true]") == ["change since step 0"]
    choose(browser, order="number")
    assert [text.split()[0] for text in texts(browser, "#row option")] == ["0", "1", "2", "3"]


def test_the_numbers_shown_are_the_tables(folder, hostile, show):
    """Of tokens under the pointer before and after, their risers, the row's means and the data set's."""
    browser, at = show(hostile), ["run", "dataset", "row", "response", "step"]
    tables = {name: pandas.read_parquet(folder / f"{name}.parquet").set_index(at).sort_index()
              for name in ("tokens", "risers", "scores")}
    for run, row, index in (("dpo", 2, 1), ("<i>&other", 0, 2)):
        choose(browser, run=run, row=row)
        browser.execute_script("go(arguments[0])", index)
        for pane, response in enumerate(("chosen", "rejected")):
            for i in (0, 5, 11):
                browser.execute_script("document.querySelectorAll(arguments[0])[arguments[1]].dispatchEvent("
                                       "new MouseEvent('mouseover', {bubbles: true}))", PANES[pane], i)
                shown = cells(browser, "numbers")
                assert shown[0][1:3] == ["step 0", f"step {STEPS[index]}"]
                for column, step in ((1, 0), (2, STEPS[index])):
                    its = tables["tokens"].loc[(run, "test", row, response, step)].iloc[i]
                    assert number(shown[1][column]) == pytest.approx(np.exp(its["logp"]), rel=0.06, abs=0.001)
                    assert number(shown[2][column]) == pytest.approx(its["logp"], abs=0.00051)
                    assert number(shown[3][column]) == pytest.approx(its["rank"], rel=0.05 * (its["rank"] >= 100))
                    assert number(shown[4][column]) == pytest.approx(its["entropy"], abs=0.0051)
                its = tables["risers"].loc[(run, "test", row, response, STEPS[index])]
                its = its[(its["position"] == i) & (abs(its["after"] - its["before"]) > 0.001)]
                order = [*its[its["place"] > 0].sort_values("place").itertuples(),
                         *its[its["place"] < 0].sort_values("place", ascending=False).itertuples()]
                assert texts(browser, "#risers td:nth-child(2)") == [
                    f"{line.before:.3f} \N{RIGHTWARDS ARROW} {line.after:.3f}" for line in order]
            means = tables["scores"]["mean_logps"].xs((run, "test", response, STEPS[index]), level=(0, 1, 3, 4))
            assert number(texts(browser, ".pane h2 b")[pane]) == pytest.approx(means[row], abs=0.00006)
            (line,) = [line for line in cells(browser, "means") if line[0] == response]
            assert [*map(number, line[1:])] == pytest.approx([means[row], means.mean()], abs=0.00006)


def test_the_slider_moves_the_colours(folder, hostile, show):
    """Nothing has moved at step 0; later what rose is bluer than red, and what fell is redder than blue."""
    browser, tokens = show(hostile), pandas.read_parquet(folder / "tokens.parquet")
    choose(browser, run="dpo", row=3)
    its = tokens[(tokens[["run", "dataset", "row", "response"]] == ["dpo", "test", 3, "rejected"]).all(axis=1)]
    logps, found = its.pivot(index="position", columns="step", values="logp"), {}
    for index, step in reversed(list(enumerate(STEPS))):
        browser.execute_script("const slider = document.getElementById('slider'); slider.value = arguments[0];"
                               "slider.dispatchEvent(new Event('input'))", index)
        found[step] = colours(browser, PANES[1])
    assert {colour[3] for colour in found[0]} == {0} and found[40] != found[120]
    change = (logps[120] - logps[0]).to_numpy()
    for value, (red, _, blue, alpha) in zip(change, found[120]):
        if abs(value) > 0.1 * abs(change).max():
            assert alpha and (blue > red) == (value > 0)
    assert abs(change).argmax() == np.argmax([colour[3] for colour in found[120]])
    press(browser, "END", "1")  # by log-prob, the least likely is the strongest
    assert np.argmax([colour[3] for colour in colours(browser, PANES[1])]) == logps[120].to_numpy().argmin()


def test_against_the_other_run(folder, hostile, show):
    browser, tokens = show(hostile), pandas.read_parquet(folder / "tokens.parquet")
    choose(browser, run="dpo", row=2)
    press(browser, "HOME", "3")
    its = tokens[(tokens[["dataset", "row", "response", "step"]] == ["test", 2, "chosen", 0]).all(axis=1)]
    both, drawn = its.pivot(index="position", columns="run", values="logp"), colours(browser, PANES[0])
    for value, (red, _, blue, alpha) in zip(both["dpo"] - both["<i>&other"], drawn):
        assert not alpha or (blue > red) == (value > 0)
    assert any(colour[3] for colour in drawn) and "other run" in texts(browser, "#numbers th")
    assert ask(browser, "[...document.querySelectorAll('aside, .card')].every(e => e.scrollWidth <= e.clientWidth)")


def test_text_of_the_data_stays_text(hostile, show):
    """Whatever it holds: no markup, no script, nothing on the console; what can't be seen is written out."""
    from selenium.common.exceptions import NoAlertPresentException

    browser = show(hostile)
    choose(browser, run="dpo", row=1)
    seen = {"\u2028": "U+2028", "\u202e": "U+202E", "\u2066": "U+2066", "\x00": "U+0000", "\u00a0": "U+00A0",
            "\ufeff": "U+FEFF", "\x1b[31m": "U+001B[31m", "": "empty"}
    for css in PANES:
        assert texts(browser, css) == [seen.get(word, word) for word in HOSTILE]
    for css, shown in (("#title", ["two <b>runs"]), ("title", ["two <b>runs: log-probs, token by token"]),
                       ("#run option", ["dpo", "<i>&other"]), ("#set option", ["test", "a</script>"])):
        assert texts(browser, css) == shown
    assert ask(browser, "document.querySelectorAll('img, b b, h1 i').length") == 0
    marks = ask(browser, "[...document.querySelectorAll('.mark')].map(e => getComputedStyle(e, '::before').content)")
    assert {*marks} == {'"\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"', '"\N{RIGHTWARDS ARROW TO BAR}"'}
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.accept()


def test_the_prompt_stands_above_the_responses(hostile, show):
    """Four lines of it, as text; a button and a key open the rest, and close it for the next row; of a long one the
    page says what it left out. A short one needs no button."""
    browser, seen = show(hostile), "document.getElementById('prompt').getBoundingClientRect()"
    choose(browser, run="dpo", row=3)
    assert texts(browser, "#prompt .text") == ["<|user|>\nWhat is 3?"]
    assert ask(browser, "document.getElementById('whole').hidden") and texts(browser, "#prompt .title") == ["prompt"]
    tops = ask(browser, "[...document.querySelectorAll('.pane')].map(e => e.getBoundingClientRect().top)")
    assert all(0 < top - ask(browser, f"{seen}.bottom") < 30 for top in tops)
    choose(browser, row=2)
    long = prompt_of(2)
    assert texts(browser, "#prompt .text") == [f"{long[:1500]} ... 7,000 characters left out ... {long[-1500:]}"]
    low = ask(browser, f"{seen}.height")
    assert low < 170
    browser.execute_script("document.getElementById('whole').click()")
    assert ask(browser, f"{seen}.height") > 400 and texts(browser, "#whole") == ["less"]
    press(browser, "p")
    assert ask(browser, f"{seen}.height") == low and texts(browser, "#whole") == ["whole prompt"]
    press(browser, "p")
    choose(browser, row=1)
    seen = {"\u2028": "U+2028", "\u202e": "U+202E", "\u2066": "U+2066", "\x00": "U+0000", "\u00a0": "U+00A0",
            "\ufeff": "U+FEFF", "\x1b": "U+001B"}
    assert texts(browser, "#prompt .text") == ["".join(seen.get(letter, letter) for letter in prompt_of(1))]
    assert ask(browser, "document.querySelectorAll('#prompt img, #prompt b').length") == 0
    show(hostile, 390, 844)
    choose(browser, row=3)
    assert ask(browser, "document.getElementById('whole').hidden")
    choose(browser, row=0)
    assert texts(browser, "#prompt .text") == [prompt_of(0)] and texts(browser, "#whole") == ["whole prompt"]
    assert not ask(browser, "document.getElementById('whole').hidden")


def test_a_scoring_without_prompts_says_how_to_get_them(tmp_path, show):
    folder = write_scoring(tmp_path / "run", rows=2)
    (folder / "prompts.parquet").unlink()
    browser = show(make(folder))
    assert texts(browser, "#prompt .title") == ["prompt: not kept by this scoring; its command, given again, adds it"]
    assert texts(browser, "#prompt .text") == [""] and ask(browser, "document.getElementById('whole').hidden")


def test_nothing_can_be_asked_of_a_network(hostile, show):
    """The page has loaded nothing, and its policy stops a script that would, or an inline one."""
    browser = show(hostile)
    assert ask(browser, "performance.getEntriesByType('resource').length") == 0
    blocked = browser.execute_async_script("""
        const done = arguments[0], seen = [];
        addEventListener("securitypolicyviolation", event => {
          if (seen.push(event.effectiveDirective) > 2) done(seen.sort());
        });
        fetch("http://127.0.0.1:9/").catch(() => 0);
        new Image().src = "http://127.0.0.1:9/x.png";
        const script = document.createElement("script"); script.textContent = "1"; document.body.append(script);""")
    assert blocked == ["connect-src", "img-src", "script-src-elem"]
    assert len(browser.get_log("browser")) >= 3  # its words on the three; none are left for the check of all tests


def test_names_that_every_object_of_javascript_has(tmp_path, show):
    """A response, a run or a data set may be called so; where there is none of the name, it is not there."""
    sides, folder = ["chosen", "constructor", "toString", "__proto__"], tmp_path / "run"
    write_scoring(folder, rows=2, runs=("valueOf", "constructor"), sets=("test", "toString"))
    for name in ("tokens", "scores", "risers"):
        table = pandas.read_parquet(folder / f"{name}.parquet")
        table = pandas.concat([table[table["response"] == "chosen"].assign(response=side) for side in sides])
        there = (table["run"] == "valueOf") | (table["dataset"] == "test") & (table["row"] == 0)
        table[there].to_parquet(folder / f"{name}.parquet")
    add_ledger(folder, run="valueOf")
    browser = show(make(folder))
    for run, name in (("valueOf", "test"), ("valueOf", "toString"), ("constructor", "test")):
        choose(browser, run=run, set=name)
        for side in sides:
            browser.execute_script("const list = document.querySelector('.pane select'); list.value = arguments[0];"
                                   "list.dispatchEvent(new Event('change'))", side)
            assert [line[0] for line in cells(browser, "means")[1:]] == sides
            has_ledger = (run, name) == ("valueOf", "test") and "chosen" in ask(browser, "view.sides")
            assert texts(browser, "#pairs h2") == ["What moved chosen: training pairs"] * has_ledger
    assert texts(browser, "#set option") == ["test"]
    assert [text.split()[0] for text in texts(browser, "#row option")] == ["0"]


def test_a_small_probability_of_a_coarse_page_is_not_zero(tmp_path, monkeypatch, show):
    """Kept to 0.01 nats and shown to two decimals, a probability of exp(-5.5) = 0.0041 was 0.00."""
    folder = write_scoring(tmp_path / "run", rows=1)
    table = pandas.read_parquet(folder / "tokens.parquet")
    table.assign(logp=np.float32(-5.5)).to_parquet(folder / "tokens.parquet")
    monkeypatch.setattr(page, "DETAILS", page.DETAILS[2:])
    assert cells(show(make(folder)), "numbers")[1][1:] == ["4.1e\N{MINUS SIGN}3"] * 2


def test_a_row_that_was_not_scored_at_a_step(tmp_path, show):
    """Its numbers are missing there, as where a log-prob is not finite; a run of one checkpoint has no change."""
    folder = write_scoring(tmp_path / "run", runs=("whole", "short"))
    tokens, scores = (pandas.read_parquet(folder / f"{name}.parquet") for name in ("tokens", "scores"))
    gone = (tokens["run"] == "whole") & (tokens["row"] == 2) & (tokens["step"] == 40) & (tokens["response"] == "chosen")
    tokens[~gone & ((tokens["run"] == "whole") | (tokens["step"] == 0))].to_parquet(folder / "tokens.parquet")
    gone = (scores["run"] == "whole") & (scores["row"] == 2) & (scores["step"] == 40) & (scores["response"] == "chosen")
    scores.loc[gone, ["logps", "mean_logps"]] = np.nan
    scores[(scores["run"] == "whole") | (scores["step"] == 0)].to_parquet(folder / "scores.parquet")
    browser = show(make(folder))
    choose(browser, row=2)
    press(browser, "ARROW_LEFT")
    assert texts(browser, "small")[0].startswith("not scored at this step")
    assert not any(alpha for *_, alpha in colours(browser, PANES[0]))
    assert any(alpha for *_, alpha in colours(browser, PANES[1]))
    press(browser, "3", "END")  # the other run has no such step
    assert "no tokens of the other run at this step" in texts(browser, "small")[0]
    choose(browser, run="short")
    assert texts(browser, "#at") == ["step 0 of 0"] and texts(browser, "[aria-pressed=true]") == ["against"]
    press(browser, "1")
    assert any(alpha for *_, alpha in colours(browser, PANES[0]))


def test_why_a_response_that_was_scored_has_no_colours(tmp_path, show):
    """The other run has other tokens; or this run's own tokens were not kept at a step whose mean there is."""
    folder = write_scoring(tmp_path / "run", rows=1, runs=("one", "two"), risers=0)
    tokens = pandas.read_parquet(folder / "tokens.parquet")
    chosen, one = tokens["response"] == "chosen", tokens["run"] == "one"
    tokens.loc[chosen & ~one & (tokens["position"] == 3), "token"] = " another"
    tokens[~(chosen & one & (tokens["step"] == 40))].to_parquet(folder / "tokens.parquet")
    browser = show(make(folder))
    press(browser, "3")
    first, second = texts(browser, "small")
    assert first.endswith("tokens; the other run was scored on another text") and second.endswith("12 tokens")
    press(browser, "2", "ARROW_LEFT")
    assert texts(browser, "small")[0].endswith("tokens; its tokens were not kept at this step")


def test_a_response_that_is_in_no_pane_is_drawn_as_far_as_it_is_within_the_panel(tmp_path, show):
    """Its curve breaks where it leaves the panel: a line from before to after would say that it stayed."""
    folder = write_scoring(tmp_path / "run", steps=[0, 20, 40, 60])
    for name, column in (("tokens", "logp"), ("scores", "mean_logps")):
        table = pandas.read_parquet(folder / f"{name}.parquet")
        other = table[table["response"] == "chosen"].assign(response="other")
        other[column] -= 100 * (other["step"] == 20)
        pandas.concat([table, other], ignore_index=True).to_parquet(folder / f"{name}.parquet")
    browser = show(make(folder))
    paths = ask(browser, "[...document.querySelectorAll('#row-curve path.rest')].map(e => e.getAttribute('d'))")
    assert [re.sub(r"[^ML]", "", path) for path in paths] == ["MML"]


def test_keys(hostile, show):
    browser, title = show(hostile), "document.getElementById('row-title').textContent.startsWith(arguments[0])"
    for keys, step in ((["ARROW_LEFT"], 40), (["HOME"], 0), (["ARROW_LEFT", "ARROW_RIGHT"], 40), (["END"], 120)):
        press(browser, *keys)
        assert texts(browser, "#at") == [f"step {step} of 120"]
    order = [text.split()[0] for text in texts(browser, "#row option")]
    for key, row in (("ARROW_DOWN", order[1]), ("ARROW_UP", order[0])):
        press(browser, key)
        until(browser, title, f"row {row},")
    browser.execute_script("document.querySelectorAll(arguments[0])[2].click()", PANES[0])
    press(browser, "SHIFT+ARROW_RIGHT")
    assert texts(browser, "#where") == ["chosen, token 4 of 12"] and texts(browser, ".token.on") == [" w3"]
    for keys, shown in (([], "chosen, token 4 of 12"), (["ESCAPE"], "rejected, token 7 of 12")):
        press(browser, *keys)  # lets go of the token that was clicked
        browser.execute_script("document.querySelectorAll(arguments[0])[6].dispatchEvent("
                               "new MouseEvent('mouseover', {bubbles: true}))", PANES[1])
        assert texts(browser, "#where") == [shown]
    press(browser, "HOME", "SPACE")  # plays to the end, then stops
    until(browser, "document.getElementById('at').textContent === 'step 120 of 120'")
    assert texts(browser, "#play") == ["\N{BLACK RIGHT-POINTING TRIANGLE}"]
    press(browser, "?")
    assert ask(browser, "document.getElementById('keys').open") and len(texts(browser, "dialog tr")) > 6
    press(browser, "ESCAPE")
    assert not ask(browser, "document.getElementById('keys').open")


def test_a_click_on_a_curve_moves_the_slider(hostile, show):
    from selenium.webdriver.common.action_chains import ActionChains

    browser = show(hostile)
    for curve in ("row-curve", "set-curve"):
        place = browser.find_element("id", curve)
        line = f"['x1', 'x2'].map(x => Number(document.querySelector('#{curve} .now').getAttribute(x)))"
        for part, step in ((-0.3, 0), (-0.1, 40), (0.45, 120)):  # of the width, from the middle; step 40 is at a third
            pointer = ActionChains(browser, duration=0)
            pointer.move_to_element_with_offset(place, int(part * place.size["width"]), 0).click().perform()
            assert texts(browser, "#at") == [f"step {step} of 120"]
            left, right = ask(browser, line)
            assert left == right and (left < 60) == (step == 0)


def contrast(*colours) -> float:
    """WCAG's ratio of two colours in sRGB."""
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in colour[:3])]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])
    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def test_pairs_that_moved_the_mean(tmp_path, show):
    folder = write_scoring(tmp_path / "run", rows=3)
    add_ledger(folder)
    browser = show(make(folder))
    lines = texts(browser, "#pairs summary")
    assert len(lines) == 10 and lines[0] == "row 0: \N{MINUS SIGN}0.0066 = \N{MINUS SIGN}0.0060 by its chosen, " \
        "\N{MINUS SIGN}0.0006 by its rejected" and lines[5].startswith("row 19: +0.014 = +0.013 by its chosen")
    assert texts(browser, "#pairs .card > .title") == [
        "mean of 4 rows of test: +0.077 nats per token in all steps", "unreliable: 7% is left over"]
    browser.execute_script("document.querySelectorAll('#pairs details')[5].open = true")
    assert texts(browser, "#pairs details:nth-of-type(6) .text") == ["Q19", HOSTILE[0], "B19"]
    browser.execute_script("document.querySelector('.pane select').value = 'rejected';"
                           "document.querySelector('.pane select').dispatchEvent(new Event('change'))")
    assert texts(browser, "#pairs summary") == []  # the ledger has chosen alone, and both sides show rejected


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light_can_be_read(hostile, show, scheme):
    """As the system says, then by the switch; text has WCAG's 4.5 on what lies behind it, the strongest colours too."""
    browser = show(hostile, scheme=scheme)
    choose(browser, row=1)
    for now in (scheme, {"light": "dark", "dark": "light"}[scheme]):
        (card, *_), (ink, *_) = colours(browser, ".card"), colours(browser, ".token", "color")
        assert (sum(card[:3]) < 200) == (now == "dark") and texts(browser, "#theme") != [now]
        for key in "12":
            press(browser, key)
            for *colour, alpha in colours(browser, ".token"):
                behind = [(c * alpha + p * (255 - alpha)) / 255 for c, p in zip(colour, card)]
                assert contrast(ink, behind) >= 4.5
        for css in (".title", "th", ".gained td", ".lost td", "small", "footer", "label", ".mark"):
            assert min(contrast(colour, card) for colour in colours(browser, css, "color")) >= 4.5, css
        press(browser, "t")


def test_a_phone(hostile, show):
    """390 points wide: one column, nothing to scroll sideways, and the token's numbers once it is touched."""
    browser = show(hostile, 390, 844)
    for row in (3, 1):
        choose(browser, row=row)
        assert ask(browser, "document.documentElement.scrollWidth") <= 390
        assert all(ask(browser, "[...document.querySelectorAll('#colours button')].map(e => e.clientHeight <= 32)"))
    lefts = ask(browser, "[...document.querySelectorAll('.pane')].map(e => e.getBoundingClientRect().left)")
    assert len({*lefts}) == 1
    hidden = "getComputedStyle(document.getElementById('token')).display === 'none'"
    assert ask(browser, hidden)
    browser.execute_script("document.querySelectorAll(arguments[0])[2].click()", PANES[0])
    assert not ask(browser, hidden) and texts(browser, "#where") == [f"chosen, token 3 of {len(HOSTILE)}"]
    browser.execute_script("document.getElementById('close').click()")
    assert ask(browser, hidden)


def test_eighty_rows_at_ten_checkpoints_are_seen_within_a_second(tmp_path, show):
    folder = write_scoring(tmp_path / "large", rows=80, steps=[*range(0, 100, 10)], risers=0, words=[" token"] * 200)
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz \n"), (80, 5000))
    prompts = pandas.read_parquet(folder / "prompts.parquet")
    prompts.assign(prompt=["".join(line) for line in letters]).to_parquet(folder / "prompts.parquet")
    file, times = make(folder), []
    assert page.LIMIT / 10 < file.stat().st_size < page.LIMIT and data_of(file)["detail"] == page.DETAILS[0]
    for _ in range(3):  # the machine may be busy with other tests
        browser = show(file)
        until(browser, f"{PAINT}.length")  # it is noted a moment after it happened
        times.append(ask(browser, f"{PAINT}[0].startTime"))
    assert min(times) < 1000 and len(texts(browser, "#row option")) == 80


@pytest.mark.parametrize("problem", ["one", None])
def test_the_page_names_no_interval_where_there_is_none(tmp_path, show, problem):
    """Four rows of one problem have no interval; of four problems they have one."""
    folder = write_scoring(tmp_path / "run")
    if problem:
        scores = pandas.read_parquet(folder / "scores.parquet")
        scores.assign(problem=problem).to_parquet(folder / "scores.parquet")
    said = "mean of 4 rows, nats per token"
    assert texts(show(make(folder)), "#set-title") == [said if problem else f"{said}, 95% interval"]


def test_the_mean_of_a_single_row(tmp_path, show):
    assert texts(show(make(write_scoring(tmp_path / "run", rows=1))), "#set-title") == ["mean of 1 row, nats per token"]
