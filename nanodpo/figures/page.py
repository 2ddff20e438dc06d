"""The page to look around in a scoring of single tokens: one HTML file that holds all it shows, and asks nobody for
more. page.html is its template, with the script that draws it.

Every row of a data set is packed by itself, so that a browser unpacks the one that it shows: its tokens once, and of
each checkpoint whole numbers, each less that of the checkpoint before, in the letters of `letters`. DETAILS are the
sizes of 1 in these. The finest with which all rows fit is taken; where none is coarse enough, the rows whose chosen
response fell least are left out, and a note says how many.
"""

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet

from ..errors import UserError, first_line, one_line
from ..files import why
from ..folder.atomic import new_file
from ..screen import command_line
from .axes import listed
from .intervals import levels
from .noise import Noise
from .page_tables import NUMBERS, ROW, TOKENS, read_parts
from .pairs import read_pairs
from .records import SIDES, read_scores
from .selection import select
from .tables import read_parquet

LIMIT = 10_000_000  # bytes of the file
BATCH = 1_000_000  # lines of tokens.parquet in memory at once
# The smallest differences that are kept, the finest first; `probability` is of risers.
DETAILS = [dict(zip(("logp", "entropy", "probability"), units)) for units in (
    (0.001, 0.01, 0.001), (0.001, 0.01, 0.01), (0.01, 0.05, 0.02), (0.02, 0.1, 0.05), (0.05, 0.1, 0.1))]
TEMPLATE = Path(__file__).with_name("page.html")


def write_page(files: list[Path], folder: Path, runs: list[str], sets: list[str] | None,
               noise: dict[str, Noise]) -> tuple[Path, list[str]]:
    """Writes page.html into a folder, of these files of scores, with the tokens and risers beside them: of these runs
    and data sets, all where none is named. Returns the file, and what the user should be told of it."""
    tokens = [file.with_name("tokens.parquet") for file in files]
    for file in tokens:
        if not file.exists():
            command = command_line(Path(__file__).resolve().parents[2] / "score.py", file.parent, "--tokens")
            how = f"`{command}` makes it" if (file.parent / "run.json").exists() else "score.py makes it with --tokens"
            raise UserError(f"{file}: is not there; {how}")
    (scores,) = select([read_scores(files)], runs, sets)
    ledger = {run: its for file in files for run, its in read_pairs(file.parent).items()}
    text, notes = make_page(tokens, scores, one_line(folder.resolve().name), noise, ledger)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(folder / "page.html", shared=True) as place:
            place.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"--output_dir {folder}: can't be written ({first_line(error)})") from error
    return folder / "page.html", notes


def make_page(files: list[Path], scores: pandas.DataFrame, title: str,
              noise: dict[str, Noise], ledger: dict) -> tuple[str, list[str]]:
    """(the page, notes), of these files of tokens. `ledger` is of `read_pairs`."""
    lines = _lines(files)
    there = scores[pandas.MultiIndex.from_frame(scores[["run", *ROW]]).isin(lines.index)]
    if there.empty:
        raise UserError(f"{listed(files)}: no tokens of run {listed(scores['run'].unique())} on data set "
                        f"{listed(scores['dataset'].unique())}; score.py keeps them where it is told --tokens")
    scores = scores[scores["run"].isin(there["run"]) & scores["dataset"].isin(there["dataset"])]
    order, lines = _order(there), lines.groupby(level=ROW).sum().to_dict()
    frame = {"title": title, "runs": _runs(there, noise), "sets": _sets(scores), "ledger": ledger}
    room = LIMIT - len(_fill(frame | {"detail": DETAILS[0], "notes": [" " * 200]}))
    means = _row_means(there, frame["runs"])
    detail, rows, left_out = _finest(lambda detail: _pack_rows(files, there, order, lines, detail, means, room))
    notes = [f"rows left out, so that the page stays below {LIMIT // 10**6} MB: {left_out} of {len(order)}, those "
             f"whose {_first_side(there)} response fell least"] * bool(left_out)
    for name, found in rows.items():
        frame["sets"][name]["rows"] = found
    return _fill(frame | {"detail": detail, "notes": notes}), notes


def _first_side(scores: pandas.DataFrame) -> str:
    """The response whose fall orders the rows."""
    found = scores["response"].unique()
    return next((side for side in SIDES if side in found), found[0])


def _lines(files: list[Path]) -> pandas.Series:
    """How many lines the files have of each run, data set and row."""
    found = []
    for file in files:
        read_parquet(file, TOKENS, [("row", "<", 0)])  # the columns are there
        try:
            for part in pyarrow.parquet.ParquetFile(file).iter_batches(columns=["run", *ROW]):
                found.append(part.to_pandas().groupby(["run", *ROW]).size())
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file}: can't be read as Parquet ({why(error)})") from error
    return pandas.concat(found).groupby(level=["run", *ROW]).sum()


def _order(scores: pandas.DataFrame) -> list[tuple[str, int]]:
    """(data set, row) of all rows, those that fell most in one of the runs first, the data sets in turns."""
    means = scores[scores["response"] == _first_side(scores)].sort_values("step", kind="stable").groupby(["run", *ROW])
    moved = (means["mean_logps"].last() - means["mean_logps"].first()).groupby(level=ROW).min()
    every = pandas.MultiIndex.from_frame(scores[ROW].drop_duplicates().sort_values(ROW))
    table = moved.reindex(every).sort_values(kind="stable", na_position="last").reset_index()
    table["place"] = table.groupby("dataset").cumcount()
    return list(table.sort_values(["place", "dataset"], kind="stable")[ROW].itertuples(index=False, name=None))


def _runs(scores: pandas.DataFrame, noise: dict) -> dict:
    """{run: its loss, its steps, and the noise of a single token}."""
    return {run: {"phase": part["phase"].iloc[0], "steps": sorted(map(int, part["step"].unique())),
                  "noise": float(f"{noise[run].logps:.2g}") if run in noise else 0}
            for run, part in scores.groupby("run", sort=False)}


def _sets(scores: pandas.DataFrame) -> dict:
    """{data set: the means of its rows, {run: {response: [step, mean, low, high, rows] of each step}}}."""
    table = levels(scores.assign(at=scores["step"]))
    table = table[table["response"] != "gap"].sort_values("step", kind="stable")
    found = {name: {"means": {}, "rows": []} for name in scores["dataset"].unique()}
    for (name, run, response), part in table.groupby(["dataset", "run", "response"], sort=False):
        found[name]["means"].setdefault(run, {})[response] = [
            [int(step), *map(_short, numbers), int(n)]
            for step, *numbers, n in part[["step", "mean", "low", "high", "n"]].itertuples(index=False)]
    return found


def _row_means(scores: pandas.DataFrame, runs: dict) -> dict:
    """{(data set, row): {run: {response: its mean log-prob at each of the run's steps}}}."""
    found = {}
    for (*key, run, response), part in scores.groupby([*ROW, "run", "response"], sort=False):
        at = dict(zip(part["step"], part["mean_logps"]))
        here = found.setdefault(tuple(key), {}).setdefault(run, {})
        here[response] = [_short(at.get(step)) for step in runs[run]["steps"]]
    return found


def _short(number) -> float | None:
    """A number in six digits; None for one that is missing."""
    return None if number is None or pandas.isna(number) else float(f"{number:.6g}")


def _finest(pack: Callable[[dict], tuple[dict, int]]) -> tuple[dict, dict, int]:
    """The finest of DETAILS with which all rows fit, else the coarsest, and what `pack` makes with it. The coarsest is
    tried second: where it leaves rows out, those between do, too, and each try reads the tables anew."""
    finest, *between, coarsest = DETAILS
    rows, left_out = pack(finest)
    if not left_out:
        return finest, rows, left_out
    rows, left_out = pack(coarsest)
    for detail in between if not left_out else ():
        found, more = pack(detail)
        if not more:
            return detail, found, more
    return coarsest, rows, left_out


def _pack_rows(files, scores, order, lines, detail, means, room: int) -> tuple[dict, int]:
    """({data set: its rows}, how many rows did not fit into so many bytes)."""
    found, packed = {}, 0
    batches = np.cumsum([lines[key] for key in order]) // BATCH
    for batch in np.unique(batches):
        keys = [key for key, its in zip(order, batches) if its == batch]
        parts, prompts = read_parts(files, scores, keys, detail["probability"])
        for (name, row), its in parts.items():
            entry = {"row": int(row), "means": means[name, row], "data": _pack_row(its, prompts[name, row], detail)}
            room -= len(_escaped(entry)) + 2
            if room < 0:
                return found, len(order) - packed
            found.setdefault(name, []).append(entry)
            packed += 1
    return found, 0


def _pack_row(parts: dict, prompts: dict, detail: dict) -> str:
    """The parts of a row that `read_parts` found, and its prompts -> base64 of JSON that zlib packed: prompts by run,
    names, the tokens that gained or lost somewhere, and entries: a response, its tokens, and by run the steps and their
    numbers."""
    entries, names = {}, {}
    for (response, run), steps in parts.items():
        words = tuple(steps[0][1]["token"])
        for step, its, _ in steps:
            if tuple(its["token"]) != words:
                raise UserError(f"{response} of {run} has other tokens at step {step} than at step {steps[0][0]}; "
                                "score it again")
        entry = entries.setdefault((response, words), {"response": response, "tokens": words, "runs": {}})
        logps, entropies, ranks = (np.stack([its[name] for _, its, _ in steps]).astype(float) for name in NUMBERS)
        entry["runs"][run] = {
            "at": [step for step, *_ in steps], "logp": _moves(logps / detail["logp"]),
            "entropy": _moves(entropies / detail["entropy"]), "rank": _moves(_two_digits(ranks)),
            "risers": _pack_risers([risers for *_, risers in steps], len(words), detail["probability"], names)}
    content = {"prompts": prompts, "names": list(names), "entries": list(entries.values())}
    text = json.dumps(content, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _pack_risers(steps: list, n: int, least: float, names: dict) -> dict | None:
    """Of each step and each of n positions: how many tokens gained and lost; and of these, one after the other, which
    (its number in `names`, which grows) and its probabilities before and after. None where there are no risers."""
    found = [table for table in steps if table is not None]
    if not found:
        return None
    gained, lost = ([np.bincount(table["position"][sign * table["place"] > 0], minlength=n) if table is not None
                     else np.zeros(n, int) for table in steps] for sign in (1, -1))
    columns = {name: np.concatenate([table[name] for table in found]) for name in found[0]}
    # A token whose text alone does not tell it from others goes by its number.
    words = [id if not text or "\ufffd" in text else text for id, text in zip(columns["id"].tolist(), columns["token"])]
    who = [names.setdefault(word, len(names)) for word in words]
    before, after = (np.round(columns[side].astype(float) / least) for side in ("before", "after"))
    return {"gained": letters(np.stack(gained)), "lost": letters(np.stack(lost)), "who": letters(np.array(who)),
            "before": letters(before), "change": letters(after - before)}


def _moves(values: np.ndarray) -> str:
    """(steps, n) numbers as letters: whole, the first step's as they are, each other's minus the step before."""
    return letters(np.diff(np.round(values), axis=0, prepend=0))


def _two_digits(ranks: np.ndarray) -> np.ndarray:
    """Ranks, those of 100 and more in their first two digits."""
    scale = 10.0 ** np.maximum(np.floor(np.log10(np.maximum(ranks, 1))) - 1, 0)
    return np.round(ranks / scale) * scale


def letters(values: np.ndarray) -> str:
    """Whole numbers as text, a letter for one from -16 to 15, in Google's encoding of polylines: the sign as the lowest
    bit, five bits a letter, the lowest first, 32 more where another follows, and 63 to be printable.

    >>> letters(np.array([3850000, -12020000]))
    '_p~iF~ps|U'
    """
    whole = np.ravel(values).astype(np.int64)
    whole = (whole << 1) ^ (whole >> 63)
    shifts = np.arange(0, 60, 5)
    rest = whole[:, None] >> shifts  # (numbers, letters)
    more = (whole[:, None] >> shifts + 5) > 0
    return ((rest & 31) + 32 * more + 63)[(rest > 0) | (shifts == 0)].astype(np.uint8).tobytes().decode("ascii")


def _escaped(value) -> str:
    """JSON in ASCII that a reader of HTML takes for nothing else."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _fill(data: dict) -> str:
    """The template with these data, and the hashes of its own script and style, all that the browser may run."""
    template = TEMPLATE.read_text(encoding="utf-8")
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("script", "style"):
        (own,) = re.findall(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'"
    start, end = template.replace("@policy@", policy).split("@data@")
    return start.replace("@title@", html.escape(data["title"])) + _escaped(data) + end
