"""Reads preference data: files or hub ids -> texts of prompt, chosen and rejected, the same whatever the format was."""

import dataclasses
import glob
from pathlib import Path

from .errors import UserError
from .template import Template, close_turn, question_in, render_messages, split_transcript

PROMPT_FIELDS, CHOSEN_FIELDS, REJECTED_FIELDS = (
    ("prompt", "question"), ("chosen", "text", "completion", "messages"), ("rejected", "worse-text"))
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


@dataclasses.dataclass
class Texts:
    """One row as rendered text. Responses end with exactly one end of turn; rejected is None in SFT data."""

    row: int
    prompt: str
    chosen: str
    rejected: str | None
    notes: tuple[str, ...]  # what was normalised, for the report


def read_rows(path: str) -> list[dict]:
    """.parquet, .jsonl, .json or .csv file(s), a save_to_disk folder, or a hub id "name[:config[:split]]" -> rows."""
    import datasets  # slow to import

    datasets.disable_progress_bars()
    files = sorted(glob.glob(path))
    try:
        if Path(path).is_dir():
            table = datasets.load_from_disk(path)
        elif files:
            table = datasets.load_dataset(_reader(files), data_files=files, split="train")
        elif Path(path).suffix in READERS or path.count("/") > 1 or path.startswith((".", "/", "~")):
            raise UserError(f"{path}: no such file")
        else:
            name, config, split = (path.split(":") + [None, None])[:3]
            table = datasets.load_dataset(name, config or None, split=split or "train")
        if not isinstance(table, datasets.Dataset):
            raise UserError(f"{path}: holds several splits ({', '.join(table)}); name the folder of one")
        rows = list(table)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # datasets wraps what the parser said
        raise UserError(f"{path}: can't be read as a data set: {' '.join(str(cause).split())[:300]}") from error
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def _reader(files: list[str]) -> str:
    suffixes = {Path(file).suffix for file in files}
    if len(suffixes) != 1 or not suffixes <= READERS.keys():
        raise UserError(f"{files[0]}: expected {', '.join(READERS)}, all files of one kind, found "
                        f"{', '.join(sorted(suffixes)) or 'no suffix'}")
    return READERS[suffixes.pop()]


def choose_fields(path: str, rows: list[dict], prompt, chosen, rejected, pairs: bool) -> tuple:
    """The names of the three columns; prompt and, unless `pairs`, rejected may be None. Raises UserError."""
    columns = list(rows[0])

    def choose(flag, named, candidates, needed):
        if named and named not in columns:
            raise UserError(f"{path}: has no column {named!r} (--{flag}); it has {', '.join(columns)}")
        found = named or next((name for name in candidates if name in columns), None)
        if needed and not found:
            raise UserError(f"{path}: has no column {' or '.join(candidates)}; it has {', '.join(columns)}: "
                            f"name one with --{flag}")
        return found

    return (choose("prompt_field", prompt, PROMPT_FIELDS, False), choose("chosen_field", chosen, CHOSEN_FIELDS, True),
            choose("rejected_field", rejected, REJECTED_FIELDS, pairs))


def render_row(template: Template, number: int, prompt, chosen, rejected, has_rejected: bool) -> Texts:
    """One row's values -> Texts. Raises UserError naming the side that is wrong."""
    notes = []
    chosen_prompt, chosen = _render_side(template, "chosen", prompt, chosen, notes)
    if not has_rejected:
        return Texts(number, chosen_prompt, chosen, None, tuple(notes))
    rejected_prompt, rejected = _render_side(template, "rejected", prompt, rejected, notes)
    if chosen_prompt != rejected_prompt:
        at = next((i for i, (a, b) in enumerate(zip(chosen_prompt, rejected_prompt)) if a != b),
                  min(len(chosen_prompt), len(rejected_prompt)))
        raise UserError(f"prompts of chosen and rejected differ: {chosen_prompt[at:at + 30]!r} against "
                        f"{rejected_prompt[at:at + 30]!r}")
    if chosen == rejected:
        raise UserError("chosen and rejected are equal")
    return Texts(number, chosen_prompt, chosen, rejected, tuple(notes))


def _render_side(template: Template, side: str, prompt, value, notes: list[str]) -> tuple[str, str]:
    """(prompt column's value, this side's value) -> (prompt text, response text), and notes on what was changed."""
    try:
        if _is_messages(value):
            parts = render_messages(template, (prompt if _is_messages(prompt) else []) + value)
        elif isinstance(value, str):
            parts = split_transcript(template, value)
        else:
            raise UserError(f"is {_kind(value)}, not text or a list of messages")
    except UserError as error:
        raise UserError(f"{side} {error}") from error
    end = template.end
    if parts is None:
        parts = _plain_prompt(template, prompt), value
        end = end if _is_messages(prompt) or parts[0].endswith(template.header or "\0") else template.tokenizer.eos_token
    elif isinstance(prompt, str) and not question_in(template, parts[0]).endswith(prompt.strip()):
        notes.append("prompt column differs from the transcript's prompt (the transcript is used)")
    response, dropped, added = close_turn(parts[1], end or template.end)
    if not response.removesuffix(end or template.end).strip():
        raise UserError(f"{side} is empty")
    if end and end in response.removesuffix(end):
        raise UserError(f"{side} goes on after its end of turn {end!r}")
    notes += [f"{side}: dropped what followed the end of turn"] * dropped + [f"{side}: added the end of turn"] * added
    return parts[0], response


def _plain_prompt(template: Template, prompt) -> str:
    if _is_messages(prompt):
        return template.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    if not isinstance(prompt, str):
        raise UserError(f"prompt is {_kind(prompt)}, not text or a list of messages")
    if not prompt.strip():
        raise UserError("prompt is empty")
    return prompt


def _is_messages(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _kind(value) -> str:
    return "missing" if value is None else "an empty list" if value == [] else f"of type {type(value).__name__}"
