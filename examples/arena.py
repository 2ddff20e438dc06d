"""The arena: every loss on the same batches, references and probes, and what each does to a model's answers.

    python examples/arena.py --output_dir out                       all losses, three seeds, on the tiny world
    python examples/arena.py --output_dir out --losses dpo simpo --seeds 1 --max_steps 20
    python examples/arena.py --output_dir out --settings run.yaml --model_name M --train_file_path D --eval_file_path T

Every run of a seed has the same data in the same order and starts from the same weights; its loss has the settings of
its paper (SETTINGS), and the learning rate is the same for all, which suits none of them best: --learning_rate changes
it. Each loss is measured at the first and the last checkpoint, on rows that no run has seen.

Leaves the runs <loss>-<seed> and scores-<loss>/, all through train.py and score.py, what each said in a .log beside it;
arena.csv and arena.md, the table, and the figure arena.png, .pdf and .svg. What is finished is not done again. A loss
whose run fails is named, and left out.
"""

import argparse
import functools
import json
import os
import sys
from pathlib import Path

import pandas

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from commands import Failed, last_checkpoint, run, run_all, stops_handed_on  # noqa: E402

from nanodpo.core.losses import LOSSES  # noqa: E402
from nanodpo.errors import RunStopped, UserError, run_script  # noqa: E402
from nanodpo.figures.axes import COLOURS, grid, plain  # noqa: E402
from nanodpo.figures.drawing import house_style, save  # noqa: E402
from nanodpo.flags.unknown import parse_known  # noqa: E402
from nanodpo.progress import Progress  # noqa: E402
from nanodpo.scoring.estimates import over_runs  # noqa: E402
from nanodpo.screen import put  # noqa: E402

# Where a loss's settings are not train.py's (beta 0.1, docs/losses.md): those of its paper. Without label smoothing
# robust would be dpo.
SETTINGS = {"robust": {"label_smoothing": 0.1}, "dpo_norm": {"beta": 5.0}, "simpo": {"beta": 2.0}}
# A column of the table, the name of its number in verdict.json, and its decimals. Entropy is added to them here.
MEASURES = {"chosen": ("change of chosen", 4), "rejected": ("change of rejected", 4), "other": ("change of other", 4),
            "gap": ("change of gap", 4), "right answers": ("change of answer accuracy", 3),
            "answer length": ("change of answer length", 1), "entropy": ("change of entropy", 4)}
UNITS = {"chosen": "nats a token", "rejected": "nats a token", "other": "nats a token", "gap": "nats a token",
         "right answers": "share", "answer length": "tokens", "entropy": "nats, along chosen"}
OF_TRAIN = ("model_name", "train_file_path", "max_steps", "learning_rate")  # flags that are handed on to train.py


def main(argv: list[str]) -> None:
    args = parse(argv)
    folder, failed = Path(args.output_dir), {}
    folder.mkdir(parents=True, exist_ok=True)
    with Progress("arena", len(args.losses) * (args.seeds + 1), "command") as bar:
        jobs = [training(args, folder, loss, seed) for seed in range(1, args.seeds + 1) for loss in args.losses]
        run_all([functools.partial(attempt, args, failed, *job) for job in jobs], args.parallel, bar)
        jobs = [scoring(args, folder, loss) for loss in args.losses if loss not in failed]
        run_all([functools.partial(attempt, args, failed, *job) for job in jobs], args.parallel, bar)
    if done := [loss for loss in args.losses if loss not in failed]:
        table = pandas.DataFrame([line_of(folder, loss, args.seeds) for loss in done])
        table.to_csv(folder / "arena.csv", index=False)
        text = markdown(table, args)
        (folder / "arena.md").write_text(text)
        put(text)
        with house_style():
            put("figure:", save({"arena": draw(table, args)}, folder, 2)[0])
    if failed:
        raise RunStopped(f"failed, for the reasons above: {', '.join(failed)}; the same command tries again")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("arena.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", required=True)
    add("--losses", nargs="+", default=list(LOSSES), metavar="LOSS", help=f"of {', '.join(LOSSES)}; default: all")
    add("--seeds", type=int, default=3, help="runs of each loss; the intervals are over them")
    add("--settings", default=HERE / "tiny_dpo.yaml", help="YAML file for train.py; default: the tiny world's")
    add("--model_name", default=HERE / "piles" / "sft", help="what every run starts from")
    add("--train_file_path", default=HERE / "piles" / "train.parquet")
    add("--eval_file_path", default=HERE / "piles" / "test.parquet", help="what every checkpoint is scored on")
    add("--max_steps", type=int, help="in place of that of --settings")
    add("--learning_rate", type=float, help="in place of that of --settings, for all losses")
    add("--answers", type=int, default=100, metavar="ROWS", help="greedy answers of each checkpoint")
    add("--parallel", type=int, default=os.cpu_count() or 1, help="commands at a time; default: one a core")
    add("--ranks", type=int, default=1, help="processes of a command, by torchrun")
    args = parse_known(parser, argv, "arena.py")
    if unknown := [loss for loss in args.losses if loss not in LOSSES]:
        raise UserError(f"--losses {unknown[0]}: there is no such loss; there are {', '.join(LOSSES)}")
    for name in ("seeds", "parallel", "ranks"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    args.losses = list(dict.fromkeys(args.losses))
    for name in ("settings", "model_name", "train_file_path", "eval_file_path", "output_dir"):
        value = str(getattr(args, name))  # the commands run in this repository's folder
        setattr(args, name, str(Path(value).resolve()) if Path(value).exists() or name == "output_dir" else value)
    return args


def training(args, folder: Path, loss: str, seed: int) -> tuple:
    """A job: (its loss, the file that it leaves when it is finished, the name of its log, script, flags)."""
    place = folder / f"{loss}-{seed}"
    given = {"loss": loss, "seed": seed, "save_steps": 0, "draw": "false", "cache_dir": folder / "cache"}
    given |= {name: value for name in OF_TRAIN if (value := getattr(args, name)) is not None} | SETTINGS.get(loss, {})
    flags = [part for name, value in given.items() for part in (f"--{name}", value)]
    return loss, place, place, "train.py", args.settings, "--output_dir", place, *flags


def scoring(args, folder: Path, loss: str) -> tuple:
    """The same for the first and last checkpoints of all seeds of a loss, scored in one call: one verdict over them."""
    place, runs = folder / f"scores-{loss}", [folder / f"{loss}-{seed}" for seed in range(1, args.seeds + 1)]
    ends = [end for run in runs for end in (run / "checkpoint-0", last_checkpoint(run))]
    return (loss, place, place, "score.py", *ends, "--output_dir", place, "--dataset_path",
            f"test={args.eval_file_path}", "--responses", "chosen", "rejected", "other", "--answers", args.answers)


def attempt(args, failed: dict[str, str], loss: str, place: Path, log: Path, script: str, *flags) -> None:
    """Runs a command, unless what it leaves is there, made by the same command; notes where it fails."""
    done, command = place / "arena.json", json.dumps([script, *map(str, flags)])
    if done.is_file() and done.read_text() == command:
        return
    try:
        run(args, log, script, *flags)
        done.write_text(command)
    except Failed as error:
        failed[loss] = str(error)
        put(f"FAILED {loss}: {error}")


def line_of(folder: Path, loss: str, seeds: int) -> dict:
    """A loss's line of the table: of each measure the change from the first to the last checkpoint, mean and 95%
    interval over seeds (of one seed, over rows), the right answers at both ends, and the verdict's names."""
    verdicts = json.loads((folder / f"scores-{loss}" / "verdict.json").read_text())
    verdict = next((line for line in verdicts if "runs" in line), verdicts[0])
    numbers = verdict["numbers"] | {"change of entropy": entropy(pandas.read_csv(folder / f"scores-{loss}"
                                                                                 / "summary.csv"))}
    given = {"beta": 0.1} | SETTINGS.get(loss, {}) if loss != "sft" else {}
    line = {"loss": loss, "settings": " ".join(f"{name}={value:g}" for name, value in given.items()), "seeds": seeds}
    for name, (number, _) in MEASURES.items():
        found = numbers.get(number, {})
        line |= {name: found.get("mean"), f"{name} low": found.get("low"), f"{name} high": found.get("high")}
    ends = {f"right answers {when}": numbers.get(number, {}).get("mean")
            for when, number in (("first", "right answers at the start"), ("last", "right answers"))}
    return line | ends | {"verdict": ", ".join(verdict["names"])}


def entropy(summary: pandas.DataFrame) -> dict:
    """How the mean entropy of the next token along chosen changed from first to last checkpoint, over the runs."""
    wide = summary[summary["response"] == "chosen"].pivot(index="run", columns="step", values="entropy")
    changes = [{"mean": change} for change in wide.iloc[:, -1] - wide.iloc[:, 0]]
    return over_runs(changes) if len(changes) > 1 else changes[0]


def markdown(table: pandas.DataFrame, args) -> str:
    """The table in Markdown, and a line below it that says what it shows."""
    heads = ["loss", *(f"{name}, {UNITS[name]}" for name in MEASURES), "verdict"]
    rows = [[f"`{line['loss']}` {line['settings']}".strip(), *(cell(line, name) for name in MEASURES), line["verdict"]]
            for line in table.to_dict("records")]
    over = f"over {args.seeds} seeds" if args.seeds > 1 else "over the rows of one seed"
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (
        f"\n\nChanges from the first to the last checkpoint, with 95% intervals {over}; right answers also at both.\n")


def cell(line: dict, name: str) -> str:
    """A change and its interval, as far as they are there."""
    value, low, high = (line[key] for key in (name, f"{name} low", f"{name} high"))
    if pandas.isna(value):
        return ""
    text, digits = f"{value:+.{MEASURES[name][1]}f}", MEASURES[name][1]
    if name == "right answers" and not pandas.isna(line["right answers first"]):
        text = f"{line['right answers first']:.2f} -> {line['right answers last']:.2f}, {text}"
    return text if pandas.isna(low) else f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def draw(table: pandas.DataFrame, args) -> tuple:
    """(a panel for each measure that is there, a line for each loss, its caption)."""
    there = [name for name in MEASURES if table[name].notna().any()]
    fig, axes = grid(len(there), 4, 2, "", height=0.7 + 0.12 * len(table), sharex=False, sharey=True)
    places = range(len(table))
    for name, ax in zip(there, axes):
        low, high = (table[f"{name} {end}"].fillna(table[name]).astype(float) for end in ("low", "high"))
        ax.axvline(0, color="0.35", linewidth=0.5, zorder=0.5)
        ax.hlines(places, low, high, color=COLOURS[0], linewidth=1)
        ax.plot(table[name], places, "o", color=COLOURS[0])
        ax.set_title(name)
        ax.set_xlabel(UNITS[name])
        ax.locator_params(axis="x", nbins=4, integer=False)
        ax.set_yticks(places, [plain(loss) for loss in table["loss"]])
    axes[0].set_ylim(len(table) - 0.4, -0.6)  # shared: the first loss on top
    over = f"over {args.seeds} seeds" if args.seeds > 1 else "over rows"
    return fig, f"Changes from the first to the last checkpoint under each loss; intervals of 95% {over}."


if __name__ == "__main__":
    with stops_handed_on():
        sys.exit(run_script(main))
