"""Parts of a response: tenths of its length, what a pair shares, thinking and answer. Positions are in tokens."""

import itertools

ANSWERS = ("<|im_start|>answer", "</think>")  # marks that end the thinking in a transcript


def sections(length: int, shared: int | None, answer: int | None) -> dict[str, range]:
    """Name -> positions, without the empty ones.

    `shared`: the pair's first differing token, None for a response that is no side of a pair; `answer`: the first token
    of the answer, None where the response has no such mark.

    >>> sections(4, 1, None)
    {'tenth 3': range(0, 1), 'tenth 5': range(1, 2), 'tenth 8': range(2, 3), 'tenth 10': range(3, 4), \
'prefix': range(0, 1), 'suffix': range(1, 4)}
    """
    parts = {f"tenth {i + 1}": range(i * length // 10, (i + 1) * length // 10) for i in range(10)}
    if shared is not None:
        parts |= {"prefix": range(shared), "suffix": range(shared, length)}
    if answer is not None:
        parts |= {"think": range(answer), "answer": range(answer, length)}
    return {name: part for name, part in parts.items() if len(part)}


def tenth_of(position, length):
    """The tenth, from 0, in which a position lies; numbers or arrays of them.

    >>> [tenth_of(i, 4) for i in range(4)], tenth_of(9, 10), tenth_of(24, 25)
    ([2, 4, 7, 9], 9, 9)
    """
    return (10 * position + 9) // length


def shared_prefix(chosen: list[int], rejected: list[int]) -> int:
    """How many tokens two responses have in common from the start."""
    return next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))


def answer_start(texts: list[str]) -> int | None:
    """Tokens as text -> the first one after the last mark of an answer.

    >>> answer_start(["two", "<|im_start|>", "answer", " 2"]), answer_start(["two"])
    (3, None)
    """
    text = "".join(texts)
    ends = [text.rfind(mark) + len(mark) for mark in ANSWERS if mark in text]
    starts = itertools.accumulate(map(len, texts), initial=0)  # of each token, in characters
    return next((i for i, start in zip(range(len(texts)), starts) if ends and start >= max(ends)), None)
