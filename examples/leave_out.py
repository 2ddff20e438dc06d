"""Does the ledger tell the truth? Leaves out the pairs that it blames for the fall of chosen, and trains again.

    python examples/leave_out.py --output_dir out                     the tiny world, half an hour on two cores
    python examples/leave_out.py --output_dir out --settings my.yaml  your model and data: train_file_path and
                                                                      eval_file_path, Parquet files

For each seed: a run on all pairs with its ledger; then the same run without a tenth of the pairs that it visits, chosen
in four ways: those whose shares lower chosen most, those whose effects do (docs/ledger.md), those with the largest
CHES (arXiv 2410.08847), and at random. All other pairs come when they came (--without_rows). All runs are scored on the
rows that the ledger was made of, and on others.

Every step is one of this project's commands and is printed before it runs; what it said is in <its folder>.log. A call
that was stopped goes on when it is made again. Leaves leave_out.md, a table, and leave_out.json.
"""

import argparse
import functools
import json
import os
import random
import sys
from pathlib import Path

import pandas

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from commands import ROOT, Failed, last_checkpoint, run, run_all, stops_handed_on  # noqa: E402
from forward_reverse import read_setting  # noqa: E402

from nanodpo.errors import RunStopped, UserError, run_script  # noqa: E402
from nanodpo.flags.unknown import parse_known  # noqa: E402
from nanodpo.progress import Progress  # noqa: E402
from nanodpo.screen import put  # noqa: E402
from nanodpo.stats import t_quantile  # noqa: E402

WAYS = {"shares": "the tenth whose shares lower chosen most", "effects": "the tenth whose effects lower chosen most",
        "ches": "the tenth with the largest CHES", "random": "a random tenth"}
SETS = ("probes", "others")


def main(argv: list[str]) -> None:
    args = parse(argv)
    folder = Path(args.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    files = [ROOT / read_setting(Path(args.settings), f"{name}_file_path") for name in ("train", "eval")]
    write_tests(pandas.read_parquet(files[1]), args.probes, folder)
    seeds = range(1, args.seeds + 1)
    try:
        with Progress("leave out", args.seeds, "seed") as bar:
            run_all([functools.partial(one_seed, args, folder, files[0], seed) for seed in seeds], args.parallel, bar)
    except Failed as error:
        raise RunStopped(str(error)) from error
    scores = [pandas.read_parquet(folder / f"scores-{seed}" / "scores.parquet") for seed in seeds]
    lines = summary(pandas.concat([changes(table, seed) for table, seed in zip(scores, seeds)]))
    (folder / "leave_out.json").write_text(json.dumps(lines, indent=1) + "\n")
    (folder / "leave_out.md").write_text(to_markdown(lines))
    put(to_markdown(lines))
    put(f"done: {folder / 'leave_out.md'}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--probes", type=int, default=64, help="held-out rows of which the ledger is made")
    parser.add_argument("--settings", default=str(HERE / "dpo.yaml"), help="of train.py, a YAML file")
    parser.add_argument("--max_steps", type=int, help="of every run; default: as the settings say")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1, help="seeds at a time")
    args = parse_known(parser, argv, "leave_out.py")
    args.ranks = 1
    for name in ("seeds", "probes", "parallel", "max_steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be above 0")
    return args


def write_tests(held_out: pandas.DataFrame, probes: int, folder: Path) -> None:
    """The rows of the ledger, and as many as four times these of the rest."""
    if len(held_out) < probes + 2:
        raise UserError(f"--probes {probes}: the held-out file has {len(held_out)} rows, and some must be left for "
                        "others")
    held_out[:probes].to_parquet(folder / "probes.parquet", index=False)
    held_out[probes : 5 * probes].to_parquet(folder / "others.parquet", index=False)


def one_seed(args, folder: Path, train_file: Path, seed: int) -> None:
    """All runs of one seed, and their scores."""
    everything = folder / f"all-{seed}"
    train(args, everything, seed, "--save_steps", 1)
    ledger, ches = folder / f"ledger-{seed}", folder / f"pairs-{seed}"
    if not (ledger / "ledger.parquet").is_file():
        run(args, ledger, "score.py", everything, "--ledger", args.probes, "--dataset_path",
            f"probes={folder / 'probes.parquet'}", "--responses", "chosen", "--output_dir", ledger)
    run(args, ches, "score.py", everything / "checkpoint-0", "--dataset_path", f"train={train_file}", "--responses",
        "chosen", "rejected", "--output_dir", ches)
    blamed = left_out(pandas.read_parquet(ledger / "ledger.parquet"), pandas.read_parquet(ches / "pairs.parquet"), seed)
    runs = {"all": everything} | {way: folder / f"{way}-{seed}" for way in WAYS}
    for way, rows in blamed.items():
        train(args, runs[way], seed, "--save_steps", 0, "--without_rows", ",".join(map(str, sorted(rows))))
    ends = [place / end for place in runs.values() for end in ("checkpoint-0", last_checkpoint(place).name)]
    scores = folder / f"scores-{seed}"
    run(args, scores, "score.py", *ends, "--dataset_path", *(f"{name}={folder / name}.parquet" for name in SETS),
        "--responses", "chosen", "rejected", "other", "--output_dir", scores)


def train(args, place: Path, seed: int, *flags) -> None:
    more = ["--max_steps", args.max_steps] if args.max_steps else []
    run(args, place, "train.py", args.settings, "--output_dir", place, "--seed", seed, "--draw", "false",
        "--eval_steps", 0, *flags, *more)


def left_out(ledger: pandas.DataFrame, pairs: pandas.DataFrame, seed: int) -> dict[str, set[int]]:
    """The rows that each way leaves out: a tenth of those that the run has visited."""
    ledger = ledger.dropna(subset="pair")
    by_row = ledger.groupby("pair")[["share", "effect"]].sum()
    ches = pairs.set_index("row")["ches_normalised"].loc[by_row.index]
    count = max(1, len(by_row) // 10)
    drawn = random.Random(f"leave out/{seed}").sample(sorted(by_row.index), count)
    return {"shares": {*by_row["share"].nsmallest(count).index}, "effects": {*by_row["effect"].nsmallest(count).index},
            "ches": {*ches.nlargest(count).index}, "random": {*drawn}}


def changes(scores: pandas.DataFrame, seed: int) -> pandas.DataFrame:
    """(way, dataset, response, change, seed): means over rows, nats a token."""
    means = scores.groupby(["run", "dataset", "response", "step"])["mean_logps"].mean()
    moved = means.groupby(level=[0, 1, 2]).agg(lambda values: values.iloc[-1] - values.iloc[0]).rename("change")
    table = moved.reset_index()
    gap = table.pivot(index=["run", "dataset"], columns="response", values="change")
    gap = (gap["chosen"] - gap["rejected"]).rename("change").reset_index().assign(response="gap")
    table = pandas.concat([table, gap], ignore_index=True)
    return table.assign(way=table["run"].str.rpartition("-")[0], seed=seed)


def summary(found: pandas.DataFrame) -> list[dict]:
    """For each data set and way: the mean change of each response over seeds, and of chosen what leaving out gave back,
    compared seed by seed, with its 95% t-interval, and as a part of the fall."""
    lines, table = [], found.set_index(["dataset", "way", "response", "seed"])["change"].sort_index()
    for dataset in SETS:
        base = table[dataset, "all", "chosen"]
        for way in ("all", *WAYS):
            own = table[dataset, way]
            line = {"dataset": dataset, "way": way} | {name: own[name].mean() for name in ("chosen", "rejected", "gap",
                                                                                          "other")}
            if way != "all":
                back = own["chosen"] - base
                reach = t_quantile(len(back) - 1) * back.sem() if len(back) > 1 else None
                line |= {"given back": back.mean(), "reach": reach,
                         "of the fall": back.mean() / -base.mean() if base.mean() < 0 else None, "seeds": back.tolist()}
            lines.append(line)
    return lines


def to_markdown(lines: list[dict]) -> str:
    """A table for each data set."""
    words = {"probes": "On the rows of the ledger", "others": "On other held-out rows"}
    text = ""
    for dataset in SETS:
        text += (f"{words[dataset]}; change from the first to the last step, nats a token:\n\n| left out | chosen | "
                 "rejected | gap | other | given back to chosen, ± 95% over seeds | of its fall |\n"
                 "|---|---|---|---|---|---|---|\n")
        for line in (line for line in lines if line["dataset"] == dataset):
            numbers = [f"{line[name]:+.4f}" for name in ("chosen", "rejected", "gap", "other")]
            if line["way"] != "all":
                reach = f" ± {line['reach']:.4f}" if line["reach"] is not None else ""
                part = "no fall" if line["of the fall"] is None else f"{line['of the fall']:.0%}"
                numbers += [f"{line['given back']:+.4f}{reach}", part]
            else:
                numbers += ["", ""]
            text += f"| {WAYS.get(line['way'], 'nothing')} | {' | '.join(numbers)} |\n"
        text += "\n"
    return text


if __name__ == "__main__":
    with stops_handed_on():
        sys.exit(run_script(main))
