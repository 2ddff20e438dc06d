"""`train.py --inspect`: what the model will be trained on, token by token, before any training."""

from .tokens import DataSet

BINS = 12


def inspect(data: DataSet, tokenizer, limit: int) -> str:
    """One example with its scored tokens in brackets, the ids around the boundary, and the lengths of all."""
    example = data.examples[0]
    parts = [data.report(), f"\nrow {example.row}; [scored tokens] in brackets"]
    for side in ("chosen", "rejected"):
        response = getattr(example, side)
        if response is None:
            continue
        text = _mark(tokenizer, example.prompt, False) + _mark(tokenizer, response, True)
        near = [(i, False) for i in example.prompt[-5:]] + [(i, True) for i in response[:5]]
        ids = "  ".join(f"{'*' if scored else ''}{i}:{tokenizer.decode([i])!r}" for i, scored in near)
        parts += [f"\n--- {side}: {len(example.prompt)} prompt + {len(response)} scored tokens", text,
                  f"boundary, scored ids starred: {ids}"]
    return "\n".join([*parts, "", histogram([e.length for e in data.examples], limit)])


def _mark(tokenizer, ids: list[int], scored: bool) -> str:
    pieces = [tokenizer.decode([i]) for i in ids]
    return "".join(f"[{piece}]" for piece in pieces) if scored else "".join(pieces)


def histogram(lengths: list[int], limit: int) -> str:
    """Text bars of sequence lengths, in tokens, with the share at the limit."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // BINS))
    counts = [0] * ((high - low) // width + 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    lines = [f"{low + i * width:>7}-{low + (i + 1) * width - 1:<7}{'#' * round(50 * c / max(counts)):<51}{c}"
             for i, c in enumerate(counts)]
    at_limit = sum(length >= limit for length in lengths) / len(lengths)
    return "\n".join([f"prompt + longest response, tokens ({at_limit:.1%} at the limit of {limit})", *lines])
