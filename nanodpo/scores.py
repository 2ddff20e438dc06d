"""Parts, tables and adapters of a scoring: what score.py reads and writes.

scores.parquet: run, phase (the run's loss), checkpoint (path), step, dataset, row, response, tokens, logps (summed over
the response, nats, float64) and mean_logps (logps / tokens).
"""

import json
import os
import tempfile
from pathlib import Path

import pandas

from .errors import UserError, first_line

COLUMNS = ["run", "phase", "checkpoint", "step", "dataset", "row", "response", "tokens", "logps", "mean_logps"]
PLACES = ("base_model_name_or_path", "peft_version", "inference_mode", "revision")  # say nothing of the shape


def make_folder(folder: Path) -> None:
    """Raises UserError before the work where its result could not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--output_dir {folder.parent}: can't be written to ({error.strerror})") from error


def write_part(file: Path, checkpoint, dataset: str, lines: list[dict]) -> None:
    """One checkpoint's scores of one data set, whole or not at all."""
    table = pandas.DataFrame(lines)
    table["mean_logps"] = table["logps"] / table["tokens"]
    for name in ("run", "phase", "step"):
        table[name] = getattr(checkpoint, name)
    table["checkpoint"], table["dataset"] = checkpoint.path, dataset
    _replace(file, lambda aside: table[COLUMNS].to_parquet(aside, index=False))


def join_parts(folder: Path, parts: list[Path]) -> str:
    """scores.parquet and summary.csv of all parts; a table for the screen."""
    table = pandas.concat([pandas.read_parquet(part) for part in parts], ignore_index=True)
    _replace(folder / "scores.parquet", lambda aside: table.to_parquet(aside, index=False))
    means = summary(table)
    _replace(folder / "summary.csv", lambda aside: means.to_csv(aside, index=False))
    shown = means.pivot_table(index=["run", "step", "dataset"], columns="response", values="mean", sort=False)
    return f"{shown.to_string(float_format='%.4f')}\n(mean log-prob, nats a token)\ndone: {folder / 'scores.parquet'}"


def summary(table: pandas.DataFrame) -> pandas.DataFrame:
    """n, mean, median and standard error of mean_logps over rows; likewise of the gap, chosen - rejected of a row."""
    keys = ["run", "phase", "checkpoint", "step", "dataset"]
    sides = table.pivot(index=[*keys, "row"], columns="response", values="mean_logps")
    if {"chosen", "rejected"} <= set(sides):
        gap = (sides["chosen"] - sides["rejected"]).dropna().reset_index(name="mean_logps").assign(response="gap")
        table = pandas.concat([table, gap], ignore_index=True)
    groups = table.groupby([*keys, "response"], sort=False)["mean_logps"]
    return groups.agg(n="count", mean="mean", median="median", sem="sem").reset_index()


def _replace(file: Path, write) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def adapter_shape(adapter: str | None) -> dict | None:
    """An adapter's config without the entries that only say where things lie; None for a whole model."""
    if adapter is None:
        return None
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config.get("target_modules") or [])
    return {key: value for key, value in config.items() if key not in PLACES}


def add_adapter(model, adapter: str | None):
    """The model with its adapter, in the model's dtype; without one the model itself."""
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)


def exchange_adapter(model, adapter: str) -> None:
    """Puts another adapter's weights in place of the present ones, which have the same shape. Raises UserError."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    try:
        set_peft_model_state_dict(model, load_peft_weights(adapter, device="cpu"))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{adapter}: can't be opened: {first_line(error)}") from error
