"""The experiment of arXiv 2509.13079: SFT on forward, on reverse and on mixed data, then DPO from the mixed model.

    python examples/forward_reverse.py --output_dir out --seeds 3                 the tiny world, minutes on two cores
    python examples/forward_reverse.py --output_dir out MODEL [MODEL ...] DATA    real base models, one after the other

DATA is a table in the paper's columns (question, text, worse-text, relevant-question, sample_type), split into training
and test by problem. Every step is one of this project's commands and is printed before it runs; what a run said is in
<its folder>.log. A call that was stopped goes on when it is made again. A model that fails is reported, and the next
one starts.

Leaves the runs forward-<seed>, reverse-<seed>, mixed-<seed>, dpo-<seed> and gentle-<seed> (DPO at an eighth of the
learning rate), scores-<seed>/, findings.json (which of the paper's findings hold, over seeds) and the figures.
"""

import argparse
import functools
import json
import math
import os
import sys
from pathlib import Path

import pandas

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from commands import Failed, last_checkpoint, run, run_all, stops_handed_on  # noqa: E402

from nanodpo.errors import RunStopped, UserError, run_script  # noqa: E402
from nanodpo.files import check_regular, read_text, why  # noqa: E402
from nanodpo.flags.unknown import parse_known  # noqa: E402
from nanodpo.progress import Progress  # noqa: E402
from nanodpo.screen import put  # noqa: E402
from nanodpo.stats import t_quantile  # noqa: E402

TESTED = 200  # rows of the tiny world: 100 problems, each in both directions
FLOOR = -0.156  # the best that a model can reach on these rows, since their wording is random; piles.py knows it
AT_LEAST = 0.001  # rise of a probability that is called one: of a thousand tokens one more
COLUMNS = ("question", "text", "worse-text", "relevant-question", "sample_type")
SETS = ("forward", "reverse", "mixed")


def main(argv: list[str]) -> None:
    args = parse(argv)
    root, failed, table = Path(args.output_dir), {}, read_data(args.data, args.test_every)
    for model in args.models or [None]:
        folder = root / Path(model).name if model else root
        try:
            experiment(args, model, folder, table)
        except Failed as error:
            failed[model or "the tiny world"] = str(error)
            put(f"FAILED {model or ''}: {error}")
    if failed:
        raise RunStopped("; ".join(f"{model} failed: {reason}" for model, reason in failed.items()))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL ... DATA", help="base models, and last the data")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seeds", type=int, default=1, help="runs of everything, for intervals")
    parser.add_argument("--sft", default=None, help="settings of SFT, a YAML file; default: those beside this script")
    parser.add_argument("--dpo", default=None, help="settings of DPO")
    parser.add_argument("--test_every", type=int, default=10, metavar="N",
                        help="of real data each N-th problem is a test")
    parser.add_argument("--ranks", type=int, default=1, help="processes a run, by torchrun")
    parser.add_argument("--parallel", type=int, help="commands at a time; default: one a core; one for a real model")
    parser.add_argument("--max_new_tokens", type=int, help="of a greedy answer; default: those of the longest response")
    args = parse_known(parser, argv, "forward_reverse.py")
    if len(args.models) == 1:
        raise UserError(f"{args.models[0]}: name models and, last, the data: MODEL [MODEL ...] DATA")
    if len({Path(model).name for model in args.models[:-1]}) < len(args.models[:-1]):
        raise UserError("two models have folders of one name, and would share their output")
    for name in ("seeds", "ranks", "parallel", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be above 0")
    if args.test_every < 2:
        raise UserError(f"--test_every {args.test_every}: must be above 1, or no problem is left to train on")
    args.models, args.data = (args.models[:-1], args.models[-1]) if args.models else ([], None)
    kind = "real" if args.models else "tiny"
    args.output_dir = str(Path(args.output_dir).resolve())  # commands run in this repository's folder
    args.models = [str(Path(name).resolve()) if Path(name).exists() else name for name in args.models]
    args.sft, args.dpo = (value and str(Path(value).resolve()) for value in (args.sft, args.dpo))
    args.sft, args.dpo = args.sft or HERE / f"{kind}_sft.yaml", args.dpo or HERE / f"{kind}_dpo.yaml"
    for file in (args.sft, args.dpo):
        try:
            read_text(file)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: {why(error)}") from error
    args.parallel = args.parallel or (1 if args.models else os.cpu_count() or 1)
    return args


def experiment(args, model: str | None, folder: Path, table) -> None:
    """All seeds of one model, then what they show together."""
    folder.mkdir(parents=True, exist_ok=True)
    write_data(table, folder / "data", args.test_every)
    seeds = range(1, args.seeds + 1)
    with Progress(folder.name, 7 * args.seeds, "command") as bar:
        for stage in (sft, dpo, scoring):
            jobs = [functools.partial(run, args, *job) for seed in seeds for job in stage(args, model, folder, seed)]
            run_all(jobs, args.parallel, bar)
    found = findings(*evidence(folder, seeds))
    (folder / "findings.json").write_text(json.dumps(found, indent=1) + "\n")
    put("\n".join(f"{'holds' if line['holds'] else 'does not':>8}  {line['text']}" for line in found))
    if args.seeds == 1:
        put("of one seed these are signs of single numbers; --seeds 3 gives intervals")
    draw(args, folder)


def read_data(path: str | None, test_every: int) -> pandas.DataFrame | None:
    """The table of real data; None for the tiny world's. Raises UserError for what is no such table, or has no problem
    to test on."""
    if path is None:
        return None
    try:
        check_regular(path)
        table = pandas.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read as Parquet ({why(error)})") from error
    if missing := [name for name in COLUMNS if name not in table]:
        raise UserError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(map(str, table))}")
    for name in COLUMNS:
        odd = [not isinstance(value, str) or not value.strip() for value in table[name]]
        if any(odd):
            row = odd.index(True)
            raise UserError(f"{path}, row {row}: {name} must be text, found {table[name].iloc[row]!r}")
    if not {"original", "flipped"} <= set(table["sample_type"]) or len(table) < 2 * test_every:
        raise UserError(f"{path}: expected {test_every} problems (--test_every) or more, each a row of original and "
                        f"one of flipped; found {table['sample_type'].value_counts().to_dict()}")
    return table


def write_data(table: pandas.DataFrame | None, folder: Path, test_every: int) -> None:
    """{train,test}-{forward,reverse,mixed}.parquet; of real data each N-th problem is a test."""
    folder.mkdir(exist_ok=True)
    if table is None:
        parts = {part: pandas.read_parquet(HERE / "piles" / f"{part}.parquet") for part in ("train", "test")}
        parts["test"] = parts["test"][:TESTED]
    else:
        # A problem's two directions name each other, and must not be parted.
        problem = [min(pair) for pair in zip(table["question"], table["relevant-question"])]
        order = {name: i for i, name in enumerate(dict.fromkeys(problem))}
        held = pandas.Series([order[name] % test_every == test_every - 1 for name in problem], index=table.index)
        parts = {"train": table[~held], "test": table[held]}
    for part, table in parts.items():
        forward = table["sample_type"] == "original"
        for name, rows in (("forward", table[forward]), ("reverse", table[~forward]), ("mixed", table)):
            rows.to_parquet(folder / f"{part}-{name}.parquet", index=False)


def training(folder: Path, name: str, settings, data: str, seed: int, *flags) -> tuple:
    """A job: (what to call its log, script, flags)."""
    place = folder / f"{name}-{seed}"
    return (place, "train.py", settings, "--output_dir", place, "--seed", seed, "--train_file_path",
            folder / "data" / f"train-{data}.parquet", *flags)


def sft(args, model: str | None, folder: Path, seed: int) -> list[tuple]:
    """One run each on forward, reverse and mixed data, the longest first."""
    start = ["--model_name", model] if model else []
    return [training(folder, name, args.sft, name, seed, "--save_steps", steps_of_epoch(args, folder, name), *start)
            for name in SETS[::-1]]


def dpo(args, model: str | None, folder: Path, seed: int) -> list[tuple]:
    """From the mixed model, at the full and at an eighth of the learning rate."""
    start = ["--model_name", last_checkpoint(folder / f"mixed-{seed}")]
    rate = float(read_setting(args.dpo, "learning_rate"))
    return [training(folder, "dpo", args.dpo, "mixed", seed, *start),
            training(folder, "gentle", args.dpo, "mixed", seed, *start, "--learning_rate", rate / 8)]


def scoring(args, model: str | None, folder: Path, seed: int) -> list[tuple]:
    """Every checkpoint on all three test sets; more of DPO's first and last ones, on the mixed set."""
    tests = [f"{name}={folder / 'data' / f'test-{name}.parquet'}" for name in SETS]
    runs = [folder / f"{name}-{seed}" for name in (*SETS, "dpo")]
    ends = [folder / f"{name}-{seed}" / checkpoint for name in ("dpo", "gentle")
            for checkpoint in ("checkpoint-0", last_checkpoint(folder / f"{name}-{seed}").name)]
    every, more = (folder / f"{name}-{seed}" for name in ("scores", "answers"))
    sides = ["--responses", "chosen", "rejected"]
    return [(every, "score.py", *runs, "--output_dir", every, "--dataset_path", *tests, *sides),
            (more, "score.py", *ends, "--output_dir", more, "--dataset_path", tests[2], *sides, "other", "shuffled",
             "--answers", 100, *(["--max_new_tokens", args.max_new_tokens] if args.max_new_tokens else []))]


def read_setting(file: Path, name: str, default: str | None = None) -> str:
    """A setting of a flat YAML file, as it is written."""
    lines = (line.partition(":") for line in read_text(file).splitlines() if not line.startswith("#"))
    found = {key.strip(): value.partition("#")[0].strip() for key, colon, value in lines if colon}
    if name not in found and default is None:
        raise Failed(f"{file}: has no {name}")
    return found.get(name, default)


def steps_of_epoch(args, folder: Path, name: str) -> int:
    sizes = [int(read_setting(args.sft, key, "1"))
             for key in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    rows = len(pandas.read_parquet(folder / "data" / f"train-{name}.parquet", columns=["text"]))
    return math.ceil(rows / math.prod([*sizes, args.ranks]))


def evidence(folder: Path, seeds) -> tuple[list, list, list]:
    """Collects for `findings` what `ends_of`, `worst_places` and `answered` give, an entry a seed each."""
    # DPO's own scoring comes second: of the mixed tests it has what the first has, and more.
    ends = [tuple(a | b for a, b in zip(*(ends_of(pandas.read_parquet(folder / f"{name}-{seed}" / "scores.parquet"))
                                          for name in ("scores", "answers")))) for seed in seeds]
    places = [worst_places(json.loads((folder / f"scores-{seed}" / "verdict.json").read_text())) for seed in seeds]
    direction = pandas.read_parquet(folder / "data" / "test-mixed.parquet")["sample_type"]
    files = [folder / f"answers-{seed}" / "answers.parquet" for seed in seeds]
    # Where no answer ends in something that can be compared there is no such file.
    answers = [answered(pandas.read_parquet(file), direction) for file in files if file.is_file()]
    return ends, places, answers if len(answers) == len(files) else []


def findings(ends: list[tuple[dict, dict]], places: list[dict], answers: list[dict]) -> list[dict]:
    """Returns a line for each finding of the paper: a number a seed, their mean and 95% t-interval, does it hold.

    Log-probs are means over rows of the log-prob per token, nats; a change is from the first to the last checkpoint.
    """
    def change(name, data, response, column="mean_logps"):
        return [seed[1][name, data, response][column] - seed[0][name, data, response][column] for seed in ends]

    def gap(name, data, at=1):
        sides = [[seed[at][name, data, side].mean_logps for seed in ends] for side in ("chosen", "rejected")]
        return less(*sides)

    def less(a, b):
        return [x - y for x, y in zip(a, b)]

    claims = []
    for name, other in (("forward", "reverse"), ("reverse", "forward")):
        claims += [(f"SFT on {name} raises y+ on {name} tests", change(name, name, "chosen"), 1),
                   (f"SFT on {name} lowers y- on {name} tests", change(name, name, "rejected"), -1),
                   (f"SFT on {name} lowers y+ on {other} tests", change(name, other, "chosen"), -1),
                   (f"SFT on {name} raises y- on {other} tests", change(name, other, "rejected"), 1)]
    matched = [(a + b) / 2 for a, b in zip(gap("forward", "forward"), gap("reverse", "reverse"))]
    claims += [("SFT on both raises y+ on mixed tests", change("mixed", "mixed", "chosen"), 1),
               ("SFT on both raises y- on mixed tests", change("mixed", "mixed", "rejected"), 1),
               ("the mixed gap is smaller than the matched ones", less(gap("mixed", "mixed"), matched), -1),
               ("DPO widens the gap", less(gap("dpo", "mixed"), gap("dpo", "mixed", 0)), 1),
               ("DPO lowers y+", change("dpo", "mixed", "chosen"), -1),
               ("DPO lowers y-", change("dpo", "mixed", "rejected"), -1),
               ("DPO lowers answers to other questions", change("dpo", "mixed", "other"), -1),
               ("DPO raises shuffled answers", change("dpo", "mixed", "shuffled"), 1),
               ("DPO moves mass to tokens that its start or its end finds implausible (along y+)",
                [seed[1]["dpo", "mixed", "chosen"].implausible_mass
                 - seed[1]["dpo", "mixed", "chosen"].implausible_mass_start for seed in ends], 1, AT_LEAST),
               ("DPO at an eighth of the learning rate lowers y- as well", change("gentle", "mixed", "rejected"), -1),
               ("... and moves y+ less than DPO does", less(map(abs, change("gentle", "mixed", "chosen")),
                                                            map(abs, change("dpo", "mixed", "chosen"))), -1)]
    for name in ("forward", "reverse"):
        there = [place[name] for place in places if name in place]
        claims += [(f"DPO lowers y+ on {name} tests", change("dpo", name, "chosen"), -1),
                   (f"DPO lowers y- on {name} tests", change("dpo", name, "rejected"), -1),
                   (f"... {name} y+ in the tenth that loses most, {' or '.join(sorted({place[0] for place in there}))}",
                    [place[1] for place in there], -1),
                   (f"... where the argmax token rises ({name})", [place[2] for place in there], 1),
                   (f"DPO lowers the share of right {name} answers", [a["dpo", name][0] for a in answers], -1),
                   (f"DPO raises the share of {name} answers that break off", [a["dpo", name][1] for a in answers], 1),
                   (f"an eighth of the learning rate keeps more {name} answers right",
                    [a["gentle", name][0] - a["dpo", name][0] for a in answers], 1)]
    return [judged(*claim) for claim in claims if claim[1]]


def ends_of(table: pandas.DataFrame) -> tuple[dict, dict]:
    """Means over rows at a run's first and at its last checkpoint, by (run without its seed, data set, response)."""
    columns = ["mean_logps", "implausible_mass", "implausible_mass_start"]
    means = table.groupby(["run", "dataset", "response", "step"])[columns].mean()
    runs = [part for _, part in means.groupby(level=[0, 1, 2])]
    return tuple({(part.index[at][0].rpartition("-")[0], *part.index[at][1:3]): part.iloc[at] for part in runs}
                 for at in (0, -1))


def worst_places(verdicts: list[dict]) -> dict[str, tuple[str, float, float]]:
    """Of DPO, by data set: the tenth of y+ that loses most, and the changes there of y+ and of the argmax token; none
    of a data set of one problem, which can't both choose the tenth and tell what happens there."""
    return {line["dataset"]: (line["there"], line["numbers"]["change of chosen there"]["mean"],
                              line["numbers"]["change of argmax there"]["mean"])
            for line in verdicts
            if line.get("run", "").startswith("dpo-") and "change of chosen there" in line["numbers"]}


def answered(table: pandas.DataFrame, direction: pandas.Series) -> dict[tuple[str, str], tuple[float, float]]:
    """(run without its seed, forward or reverse): how the share of right greedy answers changed, first to last
    checkpoint, and that of greedy answers that give no answer."""
    table = table.assign(kind=table["row"].map(direction), silent=table["found"].isna())
    shares = table.groupby(["run", "kind", "step"])[["correct", "silent"]].mean()
    names = {"original": "forward", "flipped": "reverse"}
    return {(run.rpartition("-")[0], names[kind]): tuple(part.iloc[-1] - part.iloc[0])
            for (run, kind), part in shares.groupby(level=[0, 1])}


def judged(text: str, values: list[float], sign: int, least: float = 0.0) -> dict:
    """Holds where the interval over seeds lies on the right side of 0 and the mean is `least` away from it, or more; of
    a single seed, which has no interval, where the number is."""
    series = pandas.Series([float(value) for value in values])
    mean, several = series.mean(), len(series) > 1
    reach = t_quantile(len(series) - 1) * series.sem() if several else 0.0
    interval = f" [{mean - reach:+.4f}, {mean + reach:+.4f}] over {len(series)} seeds" if several else " in one seed"
    return {"text": f"{text}: {mean:+.4f}{interval}", "holds": bool(sign * mean > reach and sign * mean >= least),
            "mean": mean, "low": mean - reach if several else None, "high": mean + reach if several else None,
            "seeds": series.tolist()}


def draw(args, folder: Path) -> None:
    """The paper's three panels."""
    seeds = range(1, args.seeds + 1)
    roles = {role: [folder / f"{role}-{seed}" for seed in seeds] for role in ("forward", "reverse", "mixed", "dpo")}
    flags = [part for role, names in roles.items() for part in (f"--{role}", *names)]
    files = [folder / f"scores-{seed}" / "scores.parquet" for seed in seeds]
    floor = [] if args.models else ["--floor", FLOOR]
    run(args, folder / "figures", "plot.py", "--three_panel", *flags, "--scores", *files, *floor, "--output_dir",
        folder / "figures")
    put(f"done: {folder / 'findings.json'}, {folder / 'figures'}")


if __name__ == "__main__":
    with stops_handed_on():
        sys.exit(run_script(main))
