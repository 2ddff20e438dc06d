"""Finds the rows of one problem. They vary together, so an interval counts problems, not rows."""

import hashlib

from .example import Example


def find_problems(examples: list[Example], questions: dict[int, tuple], alone: set[int] = frozenset()) -> None:
    """Gives each example its problem, a short hash: the same for one prompt (token ids) and, in the paper's columns,
    for one question, and for a question and the row whose relevant-question it is. `questions` are these two columns,
    by row. Rows that are `alone` have no prompt but a text's first token, and each is a problem of its own."""
    prompts = [str((example.prompt, example.chosen) if example.row in alone else example.prompt)
               for example in examples]
    rows = [questions.get(example.row, (None, None)) for example in examples]
    asked = {question: key for (question, _), key in zip(rows, prompts) if isinstance(question, str)}
    links = {}

    def root(key: str) -> str:
        while key in links:
            key = links[key]
        return key

    for names, key in zip(rows, prompts):  # by its own question, too: in r1k both directions have the forward one
        ends = {root(key), *(root(asked[name]) for name in names if isinstance(name, str) and name in asked)}
        links |= {end: min(ends) for end in ends - {min(ends)}}
    for example, key in zip(examples, prompts):
        example.problem = hashlib.sha256(root(key).encode()).hexdigest()[:8]
