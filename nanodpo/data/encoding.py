"""Texts -> token ids, and the boundary between prompt and response."""

import dataclasses
import itertools
from typing import NamedTuple

from .example import Example, PartlyScored
from .marks import added_tokens
from .texts import Texts


class Head(NamedTuple):
    """The beginning of a text up to a token that nothing merges with, which is tokenised once for all its responses."""

    length: int = 0  # characters; the token is what follows
    ids: tuple[int, ...] = ()  # without that token
    token: int | None = None


def tokenize(texts: list[Texts], tokenizer, boundary: str, may_be_equal: bool) -> list[Example | str]:
    """An Example for each text, or the reason why there is none."""
    if not texts:
        return []
    heads = _heads(tokenizer, [t.prompt for t in texts])
    prompts = _encode(tokenizer, [t.prompt for t in texts], texts, heads)
    sides = []
    for side in ("chosen", "rejected"):
        responses = [getattr(t, side) for t in texts]
        if responses[0] is None:
            sides.append([None] * len(texts))
        else:
            sides.append(_responses(tokenizer, texts, prompts, responses, boundary, heads))
    examples = [_example(*row, may_be_equal) for row in zip(texts, prompts, *sides)]
    return [_with_places(text, example, tokenizer, boundary) if text.places and isinstance(example, Example)
            else example for text, example in zip(texts, examples)]


def _with_places(text: Texts, example: Example, tokenizer, boundary: str) -> Example | str:
    """The example with the numbers of the tokens that are scored: those of the places of its text."""
    borders = [border for place in text.places for border in place]  # the first is 0, the last the end
    pieces = _ids(tokenizer, [text.chosen[a:b] for a, b in itertools.pairwise(borders)])
    if [i for piece in pieces for i in piece] == example.chosen:
        ends = [*itertools.accumulate(map(len, pieces), initial=0)]
    else:  # a tokenizer that puts something before every text
        heads = _responses(tokenizer, [text] * len(borders), [example.prompt] * len(borders),
                           [text.chosen[:border] for border in borders], boundary)
        if any(isinstance(head, str) or example.chosen[: len(head)] != head for head in heads):
            return ("chosen: an answer and what is beside it merge in tokens; score the last answers alone with "
                    "--train_on last")
        ends = [*map(len, heads)]
    scored = [place for stretch in zip(ends[::2], ends[1::2]) for place in range(*stretch)]
    return dataclasses.replace(example, chosen=PartlyScored(example.chosen, scored))


def _responses(tokenizer, texts: list[Texts], prompts: list[list[int]], responses: list[str], boundary: str,
               heads: list[Head] | None = None) -> list:
    """Ids of a response to each text's prompt, or what is wrong with it."""
    if boundary == "concat":
        return _apart(tokenizer, prompts, responses)
    wholes = _encode(tokenizer, [t.prompt + r for t, r in zip(texts, responses)], texts, heads)
    return [_after(prompt, whole, tokenizer) for prompt, whole in zip(prompts, wholes)]


def tokenize_more(texts: list[Texts], examples: list, tokenizer, boundary: str) -> None:
    """Gives each Example its further responses; puts a reason in its place where one merges with the prompt."""
    for i, (text, example) in enumerate(zip(texts, examples)):
        if isinstance(example, str):  # it has a reason already
            continue
        for name, response in text.more.items():
            ids, = _responses(tokenizer, [text], [example.prompt], [response], boundary)
            if isinstance(ids, str):
                examples[i] = f"column {name}: {ids}"
                break
            example.more[name] = ids


def _example(text: Texts, prompt: list[int], chosen, rejected, may_be_equal: bool) -> Example | str:
    if not text.prompt and not prompt:  # one text: its first token, which nothing predicts, is given
        prompt, chosen = chosen[:1], chosen[1:]
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(ids, str):
            return f"{name}: {ids}"
        if ids == []:
            return f"{name} has no tokens"
    if not prompt:
        return "prompt has no tokens"
    if chosen == rejected and not may_be_equal:
        return "chosen and rejected are equal" + " in tokens" * (text.chosen != text.rejected)
    return Example(text.row, prompt, chosen, rejected)


def _encode(tokenizer, lines: list[str], texts: list[Texts], heads: list[Head] | None) -> list[list[int]]:
    """Token ids; of plain text with exactly one BOS in front where the tokenizer uses one. `heads` are those with which
    the lines begin.

    What the chat template rendered has the BOS that the template wrote, or none, as at inference.
    """
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    return [[bos, *ids] if adds_bos and not text.rendered and ids[:1] != [bos] else ids
            for ids, text in zip(_after_heads(tokenizer, lines, heads or [Head()] * len(lines)), texts)]


def _after_heads(tokenizer, lines: list[str], heads: list[Head]) -> list[list[int]]:
    """Token ids of lines that begin with these heads."""
    found = []
    for line, head, ids in zip(lines, heads, _ids(tokenizer, [line[head.length:] for line, head in zip(lines, heads)])):
        apart = head.token is None or ids[:1] == [head.token]  # else the token is part of a longer one
        found.append([*head.ids, *ids] if apart else _ids(tokenizer, [line])[0])
    return found


def _heads(tokenizer, prompts: list[str]) -> list[Head]:
    """The heads of prompts, each to the last place of a token that opens the assistant's turn; empty ones where there
    is no such token. A tokenizer of the tokenizers library takes added tokens out of a text before it looks at the
    rest, so that what is before one and what is after it can be tokenised apart."""
    token = _border(tokenizer, prompts[0])
    places = [prompt.rfind(token) if token else -1 for prompt in prompts]
    cut = [i for i, place in enumerate(places) if place > 0]
    heads = [Head()] * len(prompts)
    for i, ids in zip(cut, _ids(tokenizer, [prompts[i][: places[i] + len(token)] for i in cut])):
        if ids[-1:] == [tokenizer.convert_tokens_to_ids(token)]:
            heads[i] = Head(places[i], tuple(ids[:-1]), ids[-1])
    return heads


def _border(tokenizer, prompt: str) -> str | None:
    """The last added token in a prompt, if it is found as it is written, and shares no character with another one,
    whatever stands beside it."""
    if not tokenizer.is_fast:
        return None
    added = list(tokenizer.added_tokens_decoder.values())
    here = [token for token in added if token.content in prompt]
    last = max(here, key=lambda token: prompt.rfind(token.content), default=None)
    if last is None or last.normalized or last.lstrip or last.rstrip or last.single_word:
        return None
    text = last.content
    for other in (token.content for token in added if token.content != text):
        if text in other or other in text or any(
                other.endswith(text[:k]) or other.startswith(text[-k:]) for k in range(1, min(len(text), len(other)))):
            return None
    return text


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    # Not verbose: it would warn of texts beyond the model's context, which are handled here.
    how = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    once = [*dict.fromkeys(texts)]  # the pairs of a row have many texts in common
    ids = dict(zip(once, tokenizer(once, **how).input_ids)) if texts else {}
    return [ids[text] for text in texts]


def _apart(tokenizer, prompts: list[list[int]], responses: list[str]) -> list[list[int] | str]:
    """Ids of responses by themselves, but as they are within a text: many tokenizers put a space before every text.

    Those are given something that comes first and is taken away again, and that no token joins with what follows: the
    prompt's last token where it is an added one, else a mark or letter.
    """
    line, word, both = _ids(tokenizer, ["\n", "a", "\na"])
    if both == line + word:  # nothing is put in front
        return _ids(tokenizer, responses)
    added, found = set(added_tokens(tokenizer)), []
    for prompt, response in zip(prompts, responses):
        last = tokenizer.convert_ids_to_tokens(prompt[-1]) if prompt else ""
        for first in [last] if last in added else "\n.a\u4e00":
            before, whole = _ids(tokenizer, [first, first + response])
            if whole[: len(before)] == before:
                found.append(whole[len(before):])
                break
        else:
            found.append("can't be tokenised apart from its prompt; leave out --boundary concat")
    return found


def _after(prompt: list[int], whole: list[int], tokenizer) -> list[int] | str:
    """Ids of the response, or what is wrong where the prompt's ids are not a prefix of the whole's."""
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt):]
    at = next(i for i, (a, b) in enumerate(zip(prompt, whole + [None] * len(prompt))) if a != b)
    show = [tokenizer.convert_ids_to_tokens(ids[at : at + 3]) for ids in (prompt, whole)]
    return (f"prompt and response merge in tokens: {show[0]} alone, {show[1]} together; end the prompt elsewhere, or "
            "tokenise them apart with --boundary concat")
