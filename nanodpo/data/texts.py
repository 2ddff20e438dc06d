"""One row's values -> texts of prompt, chosen and rejected, the same whatever the format was."""

import dataclasses
import os.path
import re

from ..errors import UserError
from .closing import close
from .rendering import Rendered, render_messages
from .template import Template
from .transcripts import (
    FOREIGN_OPENINGS,
    close_turn,
    header_at_end,
    holds_turns,
    lacks_template,
    question_in,
    split_transcript,
)

SYSTEMS = {"system", "developer"}  # roles that ask nothing
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # of Anthropic's HH and what is written like it
# Letters and digits of languages that put spaces between words.
JOINED = re.compile(r"[^\W_\u2e80-\ua4cf\uf900-\ufaff]")
GOES_ON = re.compile(r"[\w+\-*/=^.,('\"]\Z")  # the end of a text that the next one belongs to
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
    places: tuple[tuple[int, int], ...] = ()  # of what is scored of chosen, in characters; empty: all of it
    weight: float = 1.0
    answer_numbers: tuple[int, int] = (0, 0)  # numbers of chosen and rejected in lists of answers


def render_row(template: Template, number: int, prompt, chosen, rejected, has_rejected: bool, every: bool = False,
               alike: bool = False) -> Texts:
    """One row's values -> Texts. `every`: all answers of a conversation are scored, not the last alone; `alike`: plain
    sides begin with their prompt. Raises UserError naming the side that is wrong."""
    notes = []
    if alike and _is_plain(template, chosen) and _is_plain(template, rejected):
        prompt, chosen, rejected = split_pair(chosen, rejected)
        notes.append("prompt = the text with which chosen and rejected begin")
    # Of a pair the last answers are scored, in which its sides differ.
    first = _render_side(template, "chosen", prompt, chosen, notes, every and not has_rejected)
    rendered = _is_messages(prompt) or _is_messages(chosen) or holds_turns(template, first.prompt)
    notes += ["all of its answers are scored, and nothing between them"] * bool(first.places)
    if not has_rejected:
        return Texts(number, first.prompt, first.response, None, tuple(notes), rendered, places=first.places)
    second = _render_side(template, "rejected", prompt, rejected, notes)
    _meet(template, first, second)
    if first.prompt != second.prompt:
        _refuse_prompts(chosen, rejected, first.prompt, second.prompt)
    notes += _white_space(*(side.response.removesuffix(side.end) for side in (first, second)))
    return Texts(number, first.prompt, first.response, second.response, tuple(notes), rendered)


def _white_space(chosen: str, rejected: str) -> list[str]:
    """Notes on white space at the end of a pair's answers, where it may be what training learns."""
    ends = [side != side.rstrip() for side in (chosen, rejected)]
    return (["chosen and rejected differ in white space alone"] * (chosen.split() == rejected.split() != [])
            + ["one side alone ends in white space"] * (ends[0] != ends[1]))


def render_whole(template: Template, number: int, value) -> Texts | None:
    """A text without a prompt, for language modelling; None for messages and for what a chat template wrote. Raises
    UserError for one that is empty."""
    if not _is_plain(template, value):
        return None
    if not value.strip():
        raise UserError("the text is empty")
    _check_whole_characters("the text", value)
    end = template.tokenizer.eos_token or template.end
    text, dropped, added = close_turn(value, end)
    notes = (*["a second end of the text is left out"] * dropped, *["added the end of text"] * added)
    notes = ("one text without a prompt: all of its tokens but the first are scored", *notes)
    return Texts(number, "", text, None, notes)


def _check_whole_characters(what: str, text: str) -> None:
    """Raises UserError for half a character: JSON can write one, and no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds half a character, {error.object[error.start]!r}") from error


def _meet(template: Template, first: Rendered, second: Rendered) -> None:
    """Gives both sides the shorter of two prompts that differ only in how far the template opens an answer."""
    short, long = sorted((first, second), key=lambda side: len(side.prompt))
    opened = long.prompt.removeprefix(short.prompt)
    if opened and long.prompt.startswith(short.prompt) and template.header and template.header.endswith(opened):
        long.prompt, long.response = short.prompt, opened + long.response


def _refuse_prompts(chosen, rejected, first: str, second: str) -> None:
    """Raises UserError for a pair whose sides do not answer one prompt."""
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if _is_messages(side) and len(side) > 1 and {message["role"] for message in side} == {"assistant"}:
            raise UserError(f"{name} is a list of {len(side)} assistant messages, which is one conversation; give "
                            "several answers as a list of lists of messages")
    if _is_messages(chosen) and _is_messages(rejected):
        at = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), None)
        if at is not None and chosen[at]["role"] == rejected[at]["role"] == "assistant" and at + 1 < len(chosen):
            raise UserError(f"chosen and rejected differ before their last answers, in message {at}: what follows "
                            "answers another conversation; end both there, or give pairs whose last answers alone "
                            "differ (TRL scores all from the first difference on, what the user says too)")
    at = len(os.path.commonprefix([first, second]))
    only = ""
    if "".join(first.split()) == "".join(second.split()):
        only = " only in white space; strip the prompts in the data, or give them in a column of their own"
    raise UserError(f"prompts of chosen and rejected differ{only}: {first[at:at + 30]!r} against "
                    f"{second[at:at + 30]!r}")


def render_more(template: Template, prompt: str, name: str, value, asked: list[dict] | None = None
                ) -> tuple[str | None, list[str]]:
    """A further column's response to a rendered prompt, closed like the others, None where the row has none; and notes
    on what may be wrong with it. `asked` are the messages of which the chat template rendered the prompt.

    Raises UserError naming the column.
    """
    if value is None or isinstance(value, str) and not value.strip():
        return None, []
    if _is_messages(value) and {message["role"] for message in value} <= {"assistant", *SYSTEMS}:
        raise UserError(f"column {name} is an answer in messages; give it as text, or with the conversation before it")
    notes = []
    plain = asked is not None and _is_plain(template, value)
    found = _render_side(template, f"column {name}", asked if plain else prompt, value, notes)
    if plain and found.prompt.startswith(prompt):  # of a pair the shorter prompt of two is taken
        found.prompt, found.response = prompt, found.prompt[len(prompt):] + found.response
    # Plain text answers the prompt that the row has; a transcript brings its own, which must be the same.
    if found.prompt != prompt:
        raise UserError(f"column {name} answers another prompt: {found.prompt[-40:]!r}")
    return found.response, [note for note in notes if note.endswith(REPEATED)]


def _render_side(template: Template, side: str, prompt, value, notes: list[str], every: bool = False) -> Rendered:
    """(prompt column's value, this side's value) -> their texts, and notes on what was changed."""
    try:
        found = _split(template, prompt, value, every)
        if found is None:
            found = Rendered(_plain_prompt(prompt), value)
            if value.lstrip().startswith(HUMAN.strip()) and ASSISTANT in value:
                raise UserError(f"is a whole conversation (it opens with {HUMAN.strip()!r}) beside a prompt in a "
                                "column of its own; remove that column, or give the answer alone")
            notes += ["plain text, without the chat template"] * lacks_template(template, found.prompt)
            notes += [f"{side} {REPEATED}"] * _repeats(found.prompt, value)
        elif isinstance(prompt, str) and not _asks(question_in(template, found.prompt), question_in(template, prompt)):
            notes.append("prompt column differs from the transcript's prompt (the transcript is used)")
        if template.bos and not found.prompt.startswith(template.bos) and holds_turns(template, found.prompt):
            found.prompt = template.bos + found.prompt  # a transcript without what the template begins with
        notes += [found.note] * bool(found.note)
        close(template, side, found, value, notes)
    except UserError as error:
        raise UserError(f"{side} {error}") from error
    _check_whole_characters(f"{side} or its prompt", found.prompt + found.response)
    return found


def _asks(text: str, question: str) -> bool:
    """Does this text end with the question? Nothing before it goes on into it, as "2+" goes on into "2?"."""
    return text.endswith(question) and not GOES_ON.search(text.removesuffix(question))


def _split(template: Template, prompt, value, every: bool) -> Rendered | None:
    """The texts of messages or of a transcript; None for a plain response to a prompt that is text."""
    if isinstance(value, str):
        parts = split_transcript(template, value, prompt if isinstance(prompt, str) else None)
        if not parts and _is_messages(prompt):  # what the assistant says; some templates write a space before it
            return render_messages(template, [*prompt, {"role": "assistant", "content": value}])
        if not parts or not every:
            return parts and Rendered(*parts)
        asked = prompt if isinstance(prompt, str) and parts[0].startswith(prompt) else ""
        return _transcript(template, *parts, len(asked.removesuffix(header_at_end(template, asked))))
    if not _is_messages(value):
        raise UserError(f"is {_kind(value)}, not text or a list of messages")
    messages, asked = _conversation(template, prompt, value)
    return render_messages(template, messages, asked if every else None)


def _conversation(template: Template, prompt, value: list[dict]) -> tuple[list[dict], int]:
    """The messages of a prompt and of what follows it, and how many are in a prompt of messages."""
    asked = next((i for i, m in enumerate(value) if m["role"] == "assistant"), len(value))
    if isinstance(prompt, str) and prompt.strip() and {m["role"] for m in value[:asked]} <= SYSTEMS:
        if holds_turns(template, prompt):
            raise UserError("is a list of messages, and its prompt is rendered text; give both in one form")
        value = [*value[:asked], {"role": "user", "content": prompt}, *value[asked:]]
    lead = prompt if _is_messages(prompt) else []
    said = [[(m["role"], str(m.get("content") or "").strip()) for m in part] for part in (lead, value)]
    # Some sets repeat the prompt, or its last turns, in front of the reply.
    new = next(i for i in range(len(lead) + 1) if said[1][: len(lead) - i] == said[0][i:])
    return lead[:new] + value, len(lead)


def before_answer(template: Template, prompt, chosen) -> list[dict] | None:
    """The messages that the last answer of `chosen` answers; None where a row has none."""
    if _is_messages(chosen):
        return _conversation(template, prompt, chosen)[0][:-1]
    return prompt if _is_messages(prompt) and _is_plain(template, chosen) else None


def _transcript(template: Template, prompt: str, response: str, after: int) -> Rendered:
    """A rendered transcript that was split at its last header, from its first answer on: all that begin `after` this
    place are scored."""
    whole, header, places = prompt + response, template.written, []
    start, last = whole.index(header, after) + len(header), prompt.rindex(header) + len(header)
    while start < last:  # the header of the last one may be longer
        end, following = whole.find(template.end, start) + len(template.end), whole.index(header, start) + len(header)
        if not start < end < following:
            raise UserError(f"has an answer without an end of turn, {template.end!r}, before its last one; score the "
                            "last answers alone with --train_on last")
        places.append((start, end))
        start = following
    if not places:
        return Rendered(prompt, response)
    return Rendered.from_first_answer(whole, [*places, (len(prompt), len(whole))])


def _is_plain(template: Template, value) -> bool:
    """Is it text that no chat template wrote, as far as one can see?"""
    return isinstance(value, str) and not (template.header and template.written in value) and not (
        value.lstrip().startswith(FOREIGN_OPENINGS))


def split_pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two texts that begin alike -> (prompt, chosen, rejected). The prompt ends where a word ends in both; a space
    between goes to the responses, as tokenizers have it. Of texts with "Human:" and "Assistant:" it ends with the
    last "Assistant:". Raises UserError where they have no beginning in common.

    >>> split_pair("The sky is blue.", "The sky is black.")
    ('The sky is', ' blue.', ' black.')
    """
    shared = os.path.commonprefix([chosen, rejected])
    at = len(shared)
    if chosen.lstrip().startswith(HUMAN.strip()) and ASSISTANT in shared:
        at = shared.rindex(ASSISTANT) + len(ASSISTANT)
        if HUMAN in chosen[at:] or HUMAN in rejected[at:]:
            raise UserError("chosen and rejected differ before their last answers: what follows answers another "
                            "conversation; end both at the answer in which they differ")
        return chosen[:at], chosen[at:], rejected[at:]
    while at and any(JOINED.fullmatch(side[at - 1]) and JOINED.match(side[at:]) for side in (chosen, rejected)):
        at -= 1
    at = len(shared[:at].rstrip(" "))
    if not shared[:at].strip():
        raise UserError("chosen and rejected have no beginning in common, and there is no column of prompts: name one "
                        "with --prompt_field")
    for name, other, side in (("chosen", "rejected", chosen), ("rejected", "chosen", rejected)):
        if not side[at:].strip() and chosen != rejected:
            raise UserError(f"{name} is the beginning of {other}, and there is no column of prompts, so all of it "
                            "would be the prompt; name one with --prompt_field")
    return chosen[:at], chosen[at:], rejected[at:]


def _repeats(prompt, response: str) -> bool:
    """Does a plain response begin with its prompt, in whatever white space? No word goes on where the prompt ends."""
    if not isinstance(prompt, str):
        return False
    prompt, response = " ".join(prompt.split()), " ".join(response.split())
    goes_on = response[len(prompt) : len(prompt) + 1]
    return response.startswith(prompt) and not (goes_on and (prompt[-1:] + goes_on).isalnum())


def _plain_prompt(prompt) -> str:
    if prompt is None:
        raise UserError("has no prompt: name its column with --prompt_field, or, for a transcript, what opens the "
                        "assistant's turn with --assistant_header")
    if not isinstance(prompt, str):
        raise UserError(f"has a prompt that is {_kind(prompt)}, not text or a list of messages")
    if not prompt.strip():
        raise UserError("has an empty prompt")
    return prompt


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
