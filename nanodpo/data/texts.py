"""One row's values -> texts of prompt, chosen and rejected, the same whatever the format was."""

import dataclasses

from ..errors import UserError
from .rendering import render_messages, render_prompt
from .template import Template, close_turn, holds_turns, lacks_template, opening_in, question_in, split_transcript

ANSWERS = {"system", "developer", "assistant"}  # roles of message lists that ask nothing
REPEATED = "begins with the prompt itself, which then stands twice"


@dataclasses.dataclass
class Texts:
    """One row as rendered text. Responses end with exactly one end of turn; rejected is None in SFT data."""

    row: int
    prompt: str
    chosen: str
    rejected: str | None
    notes: tuple[str, ...]  # what was normalised, for the report
    rendered: bool = False  # by the chat template, which then has written all special tokens
    more: dict[str, str] = dataclasses.field(default_factory=dict)  # responses of further columns


def render_row(template: Template, number: int, prompt, chosen, rejected, has_rejected: bool,
               may_be_equal: bool = False) -> Texts:
    """One row's values -> Texts. Raises UserError naming the side that is wrong, or for equal sides."""
    notes, chosen_value = [], chosen
    chosen_prompt, chosen = _render_side(template, "chosen", prompt, chosen, notes)
    rendered = _is_messages(prompt) or _is_messages(chosen_value) or holds_turns(template, chosen_prompt)
    if not has_rejected:
        return Texts(number, chosen_prompt, chosen, None, tuple(notes), rendered)
    rejected_prompt, rejected = _render_side(template, "rejected", prompt, rejected, notes)
    if chosen_prompt != rejected_prompt:
        at = next((i for i, (a, b) in enumerate(zip(chosen_prompt, rejected_prompt)) if a != b),
                  min(len(chosen_prompt), len(rejected_prompt)))
        only = ""
        if "".join(chosen_prompt.split()) == "".join(rejected_prompt.split()):
            only = " only in white space; strip the prompts in the data, or give them in a column of their own"
        raise UserError(f"prompts of chosen and rejected differ{only}: {chosen_prompt[at:at + 30]!r} against "
                        f"{rejected_prompt[at:at + 30]!r}")
    if chosen == rejected and not may_be_equal:
        raise UserError("chosen and rejected are equal")
    return Texts(number, chosen_prompt, chosen, rejected, tuple(notes), rendered)


def render_more(template: Template, prompt: str, name: str, value) -> tuple[str | None, list[str]]:
    """A further column's response to a rendered prompt, closed like the others, None where the row has none; and notes
    on what may be wrong with it.

    Raises UserError naming the column.
    """
    if value is None or isinstance(value, str) and not value.strip():
        return None, []
    notes = []
    own, response = _render_side(template, f"column {name}", prompt, value, notes)
    # Plain text answers the prompt that the row has; a transcript brings its own, which must be the same.
    if own != prompt:
        raise UserError(f"column {name} answers another prompt: {own[-40:]!r}")
    return response, [note for note in notes if note.endswith(REPEATED)]


def _render_side(template: Template, side: str, prompt, value, notes: list[str]) -> tuple[str, str]:
    """(prompt column's value, this side's value) -> (prompt text, response text), and notes on what was changed."""
    try:
        parts = _split(template, prompt, value)
        if parts is None:
            parts = _plain_prompt(template, prompt), value
            notes += ["plain text, without the chat template"] * lacks_template(template, parts[0])
            notes += [f"{side} {REPEATED}"] * _repeats(parts[0], value)
        elif isinstance(prompt, str) and not question_in(template, parts[0]).endswith(question_in(template, prompt)):
            notes.append("prompt column differs from the transcript's prompt (the transcript is used)")
        if template.bos and not parts[0].startswith(template.bos) and holds_turns(template, parts[0]):
            parts = template.bos + parts[0], parts[1]  # a transcript without what the template begins with
        end = _end_of(template, *parts)
        response, dropped, added = close_turn(parts[1], end, template.tokenizer.eos_token)
        if not isinstance(value, str):  # what the template wrote after the message is no news
            _, doubled, open_ended = close_turn(value[-1].get("content") or "", end, template.tokenizer.eos_token)
            dropped = doubled or not open_ended
        body = response.removesuffix(end)
        if not body.strip():
            raise UserError("is empty")
        if end in body:
            raise UserError(f"goes on after its end of turn {end!r}; it must end with the assistant's turn")
        if opening := opening_in(template, body):
            raise UserError(f"holds a turn that is not the assistant's ({opening!r})")
        (parts[0] + response).encode()
    except UnicodeEncodeError as error:  # JSON can write one, and no tokenizer reads it
        raise UserError(f"{side} or its prompt holds half a character, {error.object[error.start]!r}") from error
    except UserError as error:
        raise UserError(f"{side} {error}") from error
    notes += [f"{side}: a second end of the turn is left out"] * dropped
    notes += [f"{side}: added the end of turn"] * added
    return parts[0], response


def _split(template: Template, prompt, value) -> tuple[str, str] | None:
    """(prompt text, response text) of messages or of a transcript; None for a plain response."""
    if isinstance(value, str):
        return split_transcript(template, value, prompt if isinstance(prompt, str) else None)
    if not _is_messages(value):
        raise UserError(f"is {_kind(value)}, not text or a list of messages")
    if isinstance(prompt, str) and prompt.strip() and {m["role"] for m in value} <= ANSWERS:
        if holds_turns(template, prompt):
            raise UserError("is a list of messages, and its prompt is rendered text; give both in one form")
        asked = next((i for i, m in enumerate(value) if m["role"] == "assistant"), len(value))
        value = [*value[:asked], {"role": "user", "content": prompt}, *value[asked:]]
    lead = prompt if _is_messages(prompt) else []
    said = [[(m["role"], str(m.get("content") or "").strip()) for m in part] for part in (lead, value)]
    # Some sets repeat the prompt, or its last turns, in front of the reply.
    new = next(i for i in range(len(lead) + 1) if said[1][: len(lead) - i] == said[0][i:])
    return render_messages(template, lead[:new] + value)


def _repeats(prompt, response: str) -> bool:
    """Does a plain response begin with its prompt, in whatever white space? No word goes on where the prompt ends."""
    if not isinstance(prompt, str):
        return False
    prompt, response = " ".join(prompt.split()), " ".join(response.split())
    return response.startswith(prompt) and not (prompt[-1:] + response[len(prompt) : len(prompt) + 1]).isalnum()


def _plain_prompt(template: Template, prompt) -> str:
    if _is_messages(prompt):
        return render_prompt(template, prompt)
    if prompt is None:
        raise UserError("has no prompt: name its column with --prompt_field, or, for a transcript, what opens the "
                        "assistant's turn with --assistant_header")
    if not isinstance(prompt, str):
        raise UserError(f"has a prompt that is {_kind(prompt)}, not text or a list of messages")
    if not prompt.strip():
        raise UserError("has an empty prompt")
    return prompt


def _end_of(template: Template, prompt: str, response: str) -> str:
    """A turn's end inside a chat, the eos token in plain text."""
    in_chat = template.header and prompt.endswith(template.header)
    if in_chat or response.rstrip().endswith(template.end):
        return template.end
    return template.tokenizer.eos_token or template.end


def _is_messages(value) -> bool:
    return (isinstance(value, list) and bool(value)
            and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value))


def _kind(value) -> str:
    if value is None or value == []:
        return "missing" if value is None else "an empty list"
    kind = f"of type {type(value).__name__}"
    first = value[0] if isinstance(value, list) else value
    if not isinstance(first, dict):
        return kind
    if isinstance(first.get("role"), str):
        return f"{kind}, one message: put it into a list" if first is value else f"{kind}, some of it without a role"
    return (f"{kind} with {', '.join(map(str, first))} where messages have role and content (name them so; ShareGPT's "
            "human is user, and its gpt assistant)")
