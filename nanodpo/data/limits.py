"""Examples that are longer than --max_length or --max_prompt_length: told, or cut to fit. Lengths are in tokens."""

import dataclasses
import sys

from ..errors import UserError
from .example import SIDES, Example, PartlyScored


def longest_allowed(max_length: int | None, context: int | None) -> int:
    """Tokens that a prompt with a response may have: --max_length, or without one the model's context. Raises UserError
    for a --max_length beyond the context."""
    if max_length and context and max_length > context:
        raise UserError(f"--max_length {max_length}: the model's context is {context} tokens "
                        "(max_position_embeddings)")
    return max_length or context or sys.maxsize


def too_long(example: Example, max_prompt: int | None, limit: int, max_length: int | None) -> str | None:
    """Which limit an example breaks, or None. `limit` is max_length or, without one, the model's context."""
    if max_prompt and len(example.prompt) > max_prompt:
        return f"prompt of {len(example.prompt)} tokens, over --max_prompt_length {max_prompt}"
    if example.length > limit:
        name = f"--max_length {limit}" if max_length else f"the model's context of {limit}"
        side, prompt = max(SIDES, key=lambda side: len(getattr(example, side) or ())), len(example.prompt)
        return f"{example.length} tokens (prompt {prompt}, {side} {example.length - prompt}), over {name}"
    return None


def truncate(example: Example, limit: int, max_prompt: int | None = None, may_be_equal: bool = False):
    """Each response cut at its end to fit `limit` with the whole prompt, never closed again; or why that can't be.

    Returns an Example or the reason, a str. `may_be_equal`: SFT has no use for a difference.
    """
    room = limit - len(example.prompt)
    if max_prompt and len(example.prompt) > max_prompt:
        return "prompts are not cut"
    if room < 1:
        return f"the prompt alone, {len(example.prompt)} tokens, leaves no room for a response"
    chosen, rejected = example.chosen[:room], example.rejected and example.rejected[:room]
    if chosen == rejected and not may_be_equal:
        return "cut, both responses would be equal"
    cut = len(example.chosen) > room, len(example.rejected or ()) > room
    if isinstance(example.chosen, PartlyScored):
        scored = [place for place in example.chosen.scored if place < room]
        chosen = PartlyScored(chosen[: scored[-1] + 1], scored)  # without a last question whose answer is cut off
    return dataclasses.replace(example, chosen=chosen, rejected=rejected, cut=cut)
