"""Greedy answers, and whether they are right: what the model says, beside how likely it finds what others said."""

import re

import torch

from .sections import ANSWERS

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


@torch.no_grad()
def greedy(model, prompts: list[list[int]], most: int, limit: int, ends: list[int], budget: int) -> list[list[int]]:
    """The likeliest token after each prompt, again and again: to one of `ends`, which is included, to `most` tokens, or
    to `limit` tokens with the prompt.

    Prompts of one batch are padded on the left; a batch holds about `budget` tokens.
    """
    from transformers import GenerationConfig

    # A model's own settings (sampling, a repetition penalty) would answer another question.
    model.generation_config = GenerationConfig(do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=ends[0])
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    while order:
        longest = len(prompts[order[0]])
        room = min(most, limit - longest)
        # One room for all of a batch: an answer does not depend on who else is asked.
        size = max(1, budget // (longest + most))
        batch = [i for i in order[:size] if min(most, limit - len(prompts[i])) == room]
        order = order[len(batch):]
        if room < 1:
            continue
        ids = torch.tensor([[ends[0]] * (longest - len(prompts[i])) + prompts[i] for i in batch], device=model.device)
        lengths = torch.tensor([len(prompts[i]) for i in batch], device=model.device)
        mask = torch.arange(longest, device=model.device) >= (longest - lengths)[:, None]
        out = model.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=room)
        for i, line in zip(batch, out[:, longest:].tolist()):
            end = next((at + 1 for at, token in enumerate(line) if token in ends), len(line))
            answers[i] = line[:end]
    return answers


def thinks(text: str) -> bool:
    """Does a response mark where its thinking ends?"""
    return any(mark in text for mark in ANSWERS)


def final_answer(text: str, marked: bool = False) -> str | None:
    r"""What a response answers: its last \boxed{...}, else the last number after its thinking, else None.

    `marked`: thinking that never ends is no answer.

    >>> final_answer("2 and 3 <|im_start|>answer The answer is 1,205.")
    '1205'
    >>> final_answer(r"so \boxed{ x+1 } it is"), final_answer("GOATHERDS")
    ('x+1', None)
    >>> final_answer("first + 2 and last * 2."), final_answer("first + 2 and last * 2.", marked=True)
    ('2', None)
    >>> final_answer("10-5 = 5.00"), final_answer("1, 2,3"), final_answer("it is -0.50")
    ('5', '3', '-0.5')
    """
    if marked and not thinks(text):
        return None
    said = text[max((text.rfind(mark) + len(mark) for mark in ANSWERS if mark in text), default=0):]
    if boxed := re.findall(r"\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", said):
        return "".join(boxed[-1].split())
    numbers = [number.replace(",", "") for number in NUMBER.findall(said)]
    return next((n.rstrip("0").rstrip(".") if "." in n else n for n in reversed(numbers)), None)


def repetition(ids: list[int], n: int = 4) -> float:
    """The share of n-grams that were there before: 0 for a text without repeats, near 1 for a loop.

    >>> repetition([1, 2, 3, 4, 5]), repetition([7] * 7)
    (0.0, 0.75)
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
