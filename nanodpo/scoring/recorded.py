"""The settings that a run's run.json tells, of how it read its data and was trained, each checked: the file may come
from somebody else."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from ..data.shapes import options_of
from ..errors import UserError
from ..files import read_json
from ..flags.arguments import TrainArguments
from ..flags.loss import LOSSES, own_function

# Flags that say how data are read; without them data are read as the run read its own.
READING = ("prompt_field", "chosen_field", "rejected_field", "assistant_header", "chat_template_kwargs", "boundary",
           "max_length", "max_prompt_length", "overlong", "on_bad_row")
PRECISION = ("bf16", "load_in_4bit", "load_in_8bit")
FLAGS = {flag.name: flag for flag in dataclasses.fields(TrainArguments) if flag.name in (
    *READING, "train_on", "loss", "beta", "label_smoothing", "loss_kwargs", "sft_weight", *PRECISION, "train_file_path",
    "eval_file_path", "reference")}
# The settings of a model that comes from no run.
BARE_MODEL = {name: flag.default for name, flag in FLAGS.items()} | {
    "loss": "", "train_on": "last", "prompt_leads": None, "held_out_rows": None, "date": None}
# `record` is all that a run's run.json says, `function` a loss of the user's own, where it may be run.
NOT_A_RUN = {"trust_remote_code": False, "record": {}, "function": None}


def recorded_settings(run: Path) -> SimpleNamespace:
    """Those of a run's folder, and all of its run.json as `record`. Raises UserError for a file that train.py has not
    written."""
    record = read_json(run / "run.json")
    try:
        given = record["arguments"] | {"max_length": record["max_length"]} | {
            key: record.get(key) for key in ("prompt_leads", "held_out_rows", "date")}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run / 'run.json'}: is not what train.py writes ({type(error).__name__}: {error})") from error
    given = {key: given[key] for key in BARE_MODEL if key in given}
    if wrong := next((key for key, value in given.items() if not _right(key, value)), None):
        raise UserError(f"{run / 'run.json'}: is not what train.py writes: {wrong} is {json.dumps(given[wrong])[:100]}")
    try:
        options_of(given.get("chat_template_kwargs"))
    except UserError as error:
        raise UserError(f"{run / 'run.json'}: is not what train.py writes: {error}") from error
    return SimpleNamespace(**BARE_MODEL | NOT_A_RUN | given | {"record": record})


def _right(key: str, value) -> bool:
    """Can a setting of run.json have this value?"""
    if value is None:
        return BARE_MODEL[key] is None and key != "max_length"
    lists = {"prompt_leads": (str, type(None)), "held_out_rows": (int,)}
    if key in lists:
        return isinstance(value, list) and all(type(item) in lists[key] for item in value)
    if key not in FLAGS:
        return isinstance(value, str)
    if key == "loss":
        return isinstance(value, str) and bool(value in LOSSES or own_function(value))
    kind, limit, choices = FLAGS[key].type, FLAGS[key].metadata["limit"], FLAGS[key].metadata.get("choices")
    if kind is float and type(value) in (int, float):
        return abs(value) <= sys.float_info.max and limit.holds(value)
    return type(value) is kind and (limit is None or limit.holds(value)) and (choices is None or value in choices)
