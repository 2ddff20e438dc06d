"""Finds the rows of one problem. They vary together, so an interval counts problems, not rows."""

import dataclasses
import hashlib

from .example import Example


def with_problems(examples: list[Example], rows: list[dict], alone: set[int] = frozenset()) -> list[Example]:
    """The examples of a file's rows with their problem, a short hash: the same for one prompt (token ids) and, in the
    paper's columns, for a question and the row whose relevant-question it is. Rows that are `alone` have no prompt but
    a text's first token, and each is a problem of its own."""
    prompts = [str((example.prompt, example.chosen) if example.row in alone else example.prompt)
               for example in examples]
    rows = [rows[example.row] for example in examples]
    asked = {row["question"]: key for row, key in zip(rows, prompts) if isinstance(row.get("question"), str)}
    links = {}

    def root(key: str) -> str:
        while key in links:
            key = links[key]
        return key

    for row, key in zip(rows, prompts):
        named = row.get("relevant-question")
        ends = {root(key), root(asked.get(named, key) if isinstance(named, str) else key)}
        links |= {end: min(ends) for end in ends - {min(ends)}}
    names = [hashlib.sha256(root(key).encode()).hexdigest()[:8] for key in prompts]
    return [dataclasses.replace(example, problem=name) for example, name in zip(examples, names)]
