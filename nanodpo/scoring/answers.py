"""Makes greedy answers, and checks them: a model's own words, beside how likely it finds those of others."""

import re

import torch

from .sections import ANSWERS

DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})++|\d++)(?:\.\d++)?|(?<![\w.])\.\d++)(?:[eE][-+\u2212]?\d++)?"
# A fraction is one number. A part of a power, a time, a date or digits in groups of another kind is none.
NUMBER = (r"((?:(?<![\w)])[-\u2212])?(?<!\d)(?<!\d[.:/\u00a0\u202f\u2009])(?<!\^)(?<!\^[(-])" + DECIMAL
          + rf"(?:\s?/\s?{DECIMAL})?(?!\s?[/^]\s?[\d{{(]|[.:\u00a0\u202f\u2009]\d))")
LAST = re.compile(NUMBER + r"(?:<[^<>\s]*>|[^\w<])*$")  # nothing but punctuation and special tokens after it
COMMAND = re.compile(r"(\\?\w+|[]}^])\Z")  # of LaTeX, before its argument in braces: \frac{1}{2}, x_{2}
BARE = re.compile(r"\\(?:[cdt]?frac|sqrt)\Z")  # of commands whose argument may have no braces: \frac12, \sqrt2
STYLE = re.compile(r"\\(?:text|math)[a-z]*")  # of those, commands that show their argument as it is
NAMED = re.compile(r"answer(?:s?\s+(?:is|are))?[^\w<.]*?" + NUMBER + r"(?!\w)", re.IGNORECASE)


@torch.no_grad()
def greedy(model, prompts: list[list[int]], most: int, limit: int, ends: list[int], budget: int,
           report=lambda count: None, padded: bool = True) -> list[list[int]]:
    """Takes the likeliest token after each prompt, again and again: to one of `ends`, which is included, to `most`
    tokens, or to `limit` tokens with the prompt.

    Prompts of one batch are padded on the left, or, where `padded` is False, have one length: some models number the
    padding too. A batch holds about `budget` tokens. `report` is called with the number of prompts just answered.
    """
    from transformers import GenerationConfig

    # A model's own settings (sampling, a repetition penalty) would answer another question.
    model.generation_config = GenerationConfig(do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=ends[0])
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    while order:
        longest = len(prompts[order[0]])
        room = min(most, limit - longest)
        # One room for all of a batch: an answer does not depend on who else is asked, but for a GPU's rounding.
        size = batch_size(longest, most, budget)
        batch = [i for i in order[:size] if min(most, limit - len(prompts[i])) == room
                 and (padded or len(prompts[i]) == longest)]
        order = order[len(batch):]
        if room < 1:
            report(len(batch))
            continue
        ids = torch.tensor([[ends[0]] * (longest - len(prompts[i])) + prompts[i] for i in batch], device=model.device)
        lengths = torch.tensor([len(prompts[i]) for i in batch], device=model.device)
        mask = torch.arange(longest, device=model.device) >= (longest - lengths)[:, None]
        out = model.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=room)
        for i, line in zip(batch, out[:, longest:].tolist()):
            end = next((at + 1 for at, token in enumerate(line) if token in ends), len(line))
            answers[i] = line[:end]
        report(len(batch))
    return answers


def batch_size(longest: int, most: int, budget: int) -> int:
    """How many prompts of up to `longest` tokens, each with room for `most` more, a batch of `budget` tokens holds."""
    return max(1, budget // (longest + most))


def thinks(text: str) -> bool:
    """Does a response mark where its thinking ends?"""
    return any(mark in text for mark in ANSWERS)


def final_answer(text: str, marked: bool = False) -> str | None:
    r"""The answer of a response, after its thinking: its last \boxed{...}; else the number that it ends with; else the
    number right after its last "answer" ("The answer is 12 apples"); else None, since any other number may be anything,
    as one in the braces of a LaTeX command may, unless it says how it looks (\textbf).

    `marked`: thinking that never ends is no answer.

    >>> final_answer("2 and 3 <|im_start|>answer The answer is 1,205.<|im_end|>")
    '1205'
    >>> final_answer(r"so \boxed{ x+\frac{1}{2^{n}} } it is"), final_answer(r"\boxed{4} or \boxed{5")
    ('x+\\frac{1}{2^{n}}', '4')
    >>> final_answer("the answer is (D), position 27 of it"), final_answer("(9), answer: GOATHERDS")
    (None, None)
    >>> final_answer("**Answer:** -12 apples, all in"), final_answer("The answer is 2 + 3 = 5")
    ('-12', '5')
    >>> final_answer("first + 2 and last * 2."), final_answer("first + 2 and last * 2.", marked=True)
    ('2', None)
    >>> final_answer("10-5 = 5.00"), final_answer("1, 2,3"), final_answer("it is -0.50")
    ('5', '3', '-0.5')
    >>> final_answer("it is 3/4."), final_answer("\u221227"), final_answer("4.24e24"), final_answer(r"\boxed{3{,}000}")
    ('3/4', '-27', '4.24e24', '3000')
    >>> final_answer("The answer is 10:30."), final_answer("it is 2^10"), final_answer("1.000.000")
    (None, None, None)
    """
    if marked and not thinks(text):
        return None
    said = text[max((text.rfind(mark) + len(mark) for mark in ANSWERS if mark in text), default=0):]
    if (boxed := _boxed(said)) is not None:
        boxed = "".join(boxed.split())
        number = re.fullmatch(NUMBER, boxed.replace("{,}", ","))
        return (plain_number(number[0]) if number else boxed) or None
    *_, found = None, *NAMED.finditer(said), *LAST.finditer(said)
    if found is None:
        return None
    before, brace, inside = said[: found.start(1)].rpartition("{")
    command = COMMAND.search(before[-40:])
    braced = brace and "}" not in inside and command and not STYLE.fullmatch(command[1])
    return None if braced or BARE.search(inside[-40:]) else plain_number(found[1])


def plain_number(text: str) -> str:
    """A number without what others write differently: spaces and commas within, zeros at its end.

    >>> plain_number("1,205.50"), plain_number(".5"), plain_number("1 / 2"), plain_number("1.5E+3")
    ('1205.5', '0.5', '1/2', '1.5e3')
    """
    text = "".join(text.split()).replace(",", "").replace("\u2212", "-").lower().replace("e+", "e")
    text = re.sub(r"(?<!\d)\.", "0.", text)
    return text.rstrip("0").rstrip(".") if re.fullmatch(r"-?\d+\.\d+", text) else text


def _boxed(text: str) -> str | None:
    """The content of the \\boxed{...} that opens last, of those that are closed."""
    opened, found = [], None
    for mark in re.finditer(r"\\boxed\{|(?<!\\)[{}]", text):
        if mark[0] != "}":
            opened.append(mark)
        elif opened and (start := opened.pop())[0] != "{" and (found is None or start.end() > found[0]):
            found = start.end(), text[start.end() : mark.start()]
    return found and found[1]


def repetition(ids: list[int], n: int = 4) -> float:
    """The share of n-grams that were there before: 0 for a text without repeats, near 1 for a loop.

    >>> repetition([1, 2, 3, 4, 5]), repetition([7] * 7)
    (0.0, 0.75)
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def check_answers(data, answers: dict[int, list[int]]) -> list[dict]:
    """A line for each row of a ResponseSet whose answer is known: a checkpoint's answer, by row, and whether it is
    right."""
    lines, decode = [], data.template.tokenizer.decode
    for i, example in enumerate(data.examples):
        if example.row in answers and (known := data.expected(i)):
            ids, (expected, marked) = answers[example.row], known
            text = decode(ids)
            found = final_answer(text, marked)
            lines.append(data.key_of(i) | {
                "found": found, "expected": expected, "correct": found == expected,
                "ended": not {*data.ends}.isdisjoint(ids[-1:]), "tokens": len(ids), "repetition": repetition(ids),
                "text": text, "prompt_end": decode(example.prompt)[-300:]})
    return lines
