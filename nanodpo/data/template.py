"""Reads a model's chat template: where the assistant's turn begins, what ends it, which text holds turns."""

import contextlib
import dataclasses
import datetime
import re
import signal
import threading
from collections.abc import Iterable
from types import SimpleNamespace
from unittest import mock

from ..errors import UserError
from .marks import added_tokens, shared_start
from .shapes import options_of

# How other models' transcripts begin; a text that opens so is a transcript, whatever the model at hand.
FOREIGN_OPENINGS = ("<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>",
                    "<bos>", "[INST]", "<s>[INST]", "<|system|>", "<|user|>", "<|assistant|>", "<|start|>", "<|turn>",
                    "<｜begin▁of▁sentence｜>", "<｜User｜>")
QUESTION, PROBE = "nanodpo-question", "nanodpo-probe"  # contents that no template writes on its own
SECONDS = 10.0  # for one conversation, which takes milliseconds: a template is a program, and may loop for hours
RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")  # what Jinja offers to draw with


@dataclasses.dataclass
class Template:
    """`header` opens an assistant turn and `end` closes one, in text; None and the eos token without a template.

    `written` is the part of the header that stands before every answer in a conversation as well: some templates open a
    block for thoughts, and leave it out later, or before earlier answers. `rest` is what the template writes after the
    end of the last turn, `openings` what opens a user and a system turn (the user's first), `bos` what begins every
    conversation. `date` is the day to write, None where none is written; `options` are what else the template is given.
    """

    tokenizer: object
    header: str | None
    end: str | None
    written: str | None = None
    rest: str = ""
    openings: tuple[str, ...] = ()
    places: tuple[re.Pattern, ...] = ()  # where an opening counts as one
    bos: str = ""
    date: datetime.date | None = None
    options: dict = dataclasses.field(default_factory=dict)
    left_out: dict = dataclasses.field(default_factory=dict)  # what rendering.py found out about roles
    asked: tuple[str, str] = ("", "")  # the last prompt that it rendered: (messages and options, text)

    def given(self, options: dict) -> "Template":
        """The same template, given these options, too: those of one row."""
        return dataclasses.replace(self, options=self.options | options) if options else self


def template_for(tokenizer, args, date: str | None = None) -> Template:
    """The template as a run's flags have it: its --assistant_header and --chat_template_kwargs. Raises UserError."""
    return read_template(tokenizer, args.assistant_header, date, options_of(args.chat_template_kwargs))


def read_template(tokenizer, assistant_header: str | None = None, date: str | None = None,
                  options: dict | None = None) -> Template:
    """Finds header and ends of turns by rendering short exchanges. `date` (ISO) is the day to write; default: today.
    `options` are what apply_chat_template is given beside the messages.

    Raises UserError for a template that has no end, and for one that draws at random.
    """
    template = Template(tokenizer, assistant_header or None, None, options=options or {})
    if tokenizer.chat_template:
        if drawn := RANDOM.search(str(tokenizer.chat_template)):
            raise UserError(f"{tokenizer.name_or_path}: the chat template draws at random ({drawn[0]!r}), so no run "
                            "could be made again; take that out of chat_template.jinja")
        if "strftime_now" in str(tokenizer.chat_template):
            template.date = _day(date)
        _read(template)
    template.end = template.end or tokenizer.eos_token
    template.written = template.written or template.header
    if not template.end:
        raise UserError("the tokenizer has neither an eos_token nor a chat template that ends turns; set its eos_token")
    return template


def _day(date: str | None) -> datetime.date:
    try:
        return datetime.date.fromisoformat(date) if date else datetime.date.today()
    except (TypeError, ValueError) as error:
        raise UserError(f"the run's date, {date!r} in its run.json, is none; it must be like 2026-01-31") from error


def _read(template: Template) -> None:
    """Fills in what the chat template of the tokenizer writes."""
    tokenizer, given = template.tokenizer, template.header
    user, reply = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": PROBE}
    try:
        asked, prompted, whole = (apply(template, [user]), apply(template, [user], add_generation_prompt=True),
                                  apply(template, [user, reply]))
        if PROBE not in whole or QUESTION not in prompted:
            raise UserError(f"loses what the {'user' if PROBE in whole else 'assistant'} says in the chat template")
    except UserError as error:
        raise UserError(f"{tokenizer.name_or_path}: a question and its answer: {error}; mend chat_template.jinja, "
                        "or chat_template in tokenizer_config.json") from error
    before, _, tail = whole.rpartition(PROBE)
    asked, prompted, before = (text.rpartition(QUESTION)[2] for text in (asked, prompted, before))
    template.end = _first_end(tokenizer, tail, asked)
    template.rest = tail.partition(template.end)[2] if template.end else ""
    header = prompted[len(shared_start(tokenizer, asked, prompted)):]
    if asked == prompted:  # it opens the assistant's turn whether asked to or not
        header = prompted.lstrip().removeprefix(template.end or "").removeprefix(tokenizer.eos_token or "").lstrip()
    template.header = given or header or None
    template.written = None if given else _before_every_answer(template, prompted, before, header)
    if given and not (header and given.strip().startswith(header.strip())):
        return  # the transcripts are another model's, and so are their marks
    bos = tokenizer.bos_token or ""
    opens_turns = bool(bos) and bos in before  # SmolLM2's bos is <|im_start|>
    template.openings = _openings(template, "" if opens_turns else bos)
    # A mark without a token of its own is one where a line begins: answers may well say "User:".
    added = added_tokens(tokenizer)
    template.places = tuple(re.compile(re.escape(mark) if any(token in mark for token in added)
                                       else rf"^[ \t]*{re.escape(mark)}", re.MULTILINE) for mark in template.openings)
    template.bos = bos if whole.startswith(bos) and not opens_turns else ""


def _before_every_answer(template: Template, prompted: str, before: str, header: str) -> str:
    """The part of the header that the template writes before the last answer, whose turn begins as in `before`, and
    before earlier ones, too: Qwen 3.5 opens a block for thoughts before the last alone."""
    user, reply = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": PROBE}
    both = shared_start(template.tokenizer, prompted, before)
    with contextlib.suppress(UserError):
        earlier = apply(template, [user, reply, user, reply]).partition(PROBE)[0].rpartition(QUESTION)[2]
        shared = shared_start(template.tokenizer, both, earlier)
        both = shared if shared[len(prompted) - len(header):].strip() else both
    return both[len(prompted) - len(header):]


def _first_end(tokenizer, text: str, asked: str) -> str | None:
    """The end of an answer that this text follows: a token, or, where there is none, a word. ChatML of a base model
    closes turns with a token that is not its eos. Command R closes answers with one that questions, which the text
    `asked` follows, do not have, and then the turn with its eos: both are the end."""
    tokens = "|".join(map(re.escape, added_tokens(tokenizer))) or "(?!)"
    if not (found := re.search(f"({tokens})(?:{tokens})*", text)):
        return (text.split() or [None])[0]
    before, eos, _ = found[0].partition(tokenizer.eos_token or found[1])
    return before + eos if eos and found[1] not in asked else found[1]


def _openings(template: Template, bos: str) -> tuple[str, ...]:
    """The texts that the template writes before a user and a system message. Its own system prompt precedes both."""
    probe, ask, reply = {"content": PROBE}, {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "A"}
    user = {"role": "user", **probe}
    found = []
    for messages in ([user], [{"role": "system", **probe}, ask]):
        with contextlib.suppress(UserError):  # many templates know no system turn
            before = apply(template, messages).partition(PROBE)[0]
            if messages == [user]:
                with contextlib.suppress(UserError):
                    later = apply(template, [ask, reply, user]).partition(PROBE)[0]
                    before = shared_start(template.tokenizer, before, later, at_end=True) or before
            turn = before.rpartition(template.end)[2] if template.end else before
            found.append(turn.strip().removeprefix(bos).strip().partition("\n")[0])
    return tuple(dict.fromkeys(mark for mark in found if mark)) if found and found[0] else ()


def apply(template: Template, messages: list[dict], **options) -> str:
    """The chat template's text. Raises UserError for what it can't render."""
    from jinja2 import TemplateError  # a dependency of transformers' chat templates
    from transformers.utils import chat_template_utils

    messages = [_present(message) for message in messages]
    if bare := [message for message in messages if message.keys() <= {"role", "name"}]:
        raise UserError(f"has a message of role {bare[0].get('role')!r} without content")
    if odd := [content for m in messages if not isinstance(content := m.get("content", ""), str)]:
        raise UserError(f"has a message whose content is of type {type(odd[0]).__name__}, not text")
    clock = contextlib.nullcontext()
    if template.date:  # transformers lets nobody hand templates another strftime_now, but its own asks this clock
        day = datetime.datetime.combine(template.date, datetime.time())
        clock = mock.patch.object(chat_template_utils, "datetime", SimpleNamespace(now=lambda: day))
    try:
        with clock, _time_limit(SECONDS):
            return template.tokenizer.apply_chat_template(messages, tokenize=False, **template.options, **options)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
            RecursionError) as error:  # templates compute with contents
        raise UserError(f"cannot be rendered by the chat template: {error}") from error


@contextlib.contextmanager
def _time_limit(seconds: float):
    """Raises UserError within the block where that takes longer. Without a limit in other threads than the main one,
    which alone can be interrupted."""
    def late(*_):
        raise UserError(f"it takes more than {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _present(value):
    """Without the keys, at any depth, that Arrow fills with None since other rows have them; templates print None."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def split_transcript(template: Template, text: str, prompt: str | None = None) -> tuple[str, str] | None:
    """A rendered transcript -> (prompt text with the last assistant header, response text); None for plain text.

    A rendered `prompt` whose transcript `text` only continues is put in front. Raises UserError for a transcript that
    has no header of this model, and where a prompt would be lost.
    """
    header, prompt = template.header, prompt or ""
    if header and header in template.rest:  # the template has opened the next turn
        text = text.rstrip().removesuffix(template.rest.strip())
    if header and text.rfind(template.written) > text.rfind(header):  # a conversation, where the header is shorter
        header = template.written
    if header and header in text:
        before, _, response = _joined(template, header, text, prompt).rpartition(header)
        user = template.openings[0] if template.openings else None
        # Without a prompt column a text without a question is text that nobody asked for, and fine.
        if prompt and not (user in before if user else before.strip()):
            raise UserError(f"has no turn before the assistant header {header!r}, so the prompt would be lost")
        return before + header, response
    opening = next((o for o in FOREIGN_OPENINGS if text.lstrip().startswith(o)), None)
    if opening and not (header and prompt.endswith(header)):
        lacks = f"without this model's assistant header, {header!r}"
        if not header:
            lacks = ("and the model's chat template writes no assistant header" if template.tokenizer.chat_template
                     else "and the model has no chat template")
        raise UserError(f"is a transcript (it opens with {opening!r}) {lacks}; name the transcript's own header with "
                        "--assistant_header")
    return None


def _joined(template: Template, header: str, text: str, prompt: str) -> str:
    """A rendered prompt and the transcript that goes on from it, as one; a transcript that is whole as it is.

    Prompt and answer that were rendered apart both have what the template writes first: a bos, a system prompt.
    """
    if text.startswith(prompt):
        return text
    lead, user = text.partition(header)[0].strip(), template.openings[0] if template.openings else None
    rendered = prompt.endswith(header) or template.end in prompt or bool(user and user in prompt)
    bos = template.tokenizer.bos_token or ""
    again = prompt.strip().removeprefix(bos).strip().startswith(lead.removeprefix(bos).strip())
    if rendered and again and not (user and user in lead):
        return prompt.removesuffix(header) + header + text.partition(header)[2]
    whole = text.lstrip().startswith(tuple(filter(None, (template.bos, *template.openings))))
    return prompt + text if prompt.endswith(header) and not whole else text


def holds_turns(template: Template, text: str) -> bool:
    """Was this text written by the model's chat template? Of another model's transcript nothing is known."""
    ours = bool(template.openings) and bool(template.header) and text.endswith(template.header)
    return ours or opening_in(template, text) is not None


def opening_in(template: Template, text: str) -> str | None:
    """The text that opens a user or system turn in this text."""
    return next((mark for mark, place in zip(template.openings, template.places) if place.search(text)), None)


def lacks_template(template: Template, prompt: str) -> bool:
    """Has the model a chat template, and is this prompt's text without any?"""
    marks = [template.header, *template.openings]
    return bool(template.tokenizer.chat_template) and not (
        any(mark and mark in prompt for mark in marks) or prompt.lstrip().startswith(FOREIGN_OPENINGS))


def prompt_leads(template: Template, prompts: Iterable[list[int]]) -> list[str | None]:
    """The texts before the user's first turn (a system prompt, say), each that occurs; None for plain text.

    Log-probs under another lead than that of training answer another question.
    """
    user = template.openings[0] if template.openings else None
    texts = (template.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in prompts)
    leads = {text.partition(user)[0] if user and user in text else None for text in texts}
    return sorted(leads, key=lambda lead: (lead is None, lead))


def leads_to_keep(leads: list[str | None]) -> list[str | None] | None:
    """Those for run.json: all, or None where they are so long that each row may have its own. Then one more is no other
    question, and run.json would grow beyond what can be read."""
    return leads if sum(len(lead or "") for lead in leads) <= 2**20 else None


def header_at_end(template: Template, prompt: str) -> str:
    """The assistant header with which a prompt ends, or the part of it that a conversation has; empty without one."""
    return next((mark for mark in (template.header, template.written) if mark and prompt.endswith(mark)), "")


def question_in(template: Template, prompt: str) -> str:
    """The text of a rendered prompt up to the end of its last user turn, for comparing with a column."""
    before = prompt.removesuffix(header_at_end(template, prompt)).rstrip()
    ends = template.end, *added_tokens(template.tokenizer)  # a question may end with another token than an answer
    while end := next((end for end in ends if before.endswith(end)), None):
        before = before.removesuffix(end).rstrip()
    return before.strip()


def close_turn(text: str, end: str, also: str | None = None) -> tuple[str, bool, bool]:
    """Response text -> (text with exactly one `end`, was more than white space after it dropped, was `end` added).

    `also` (the eos, where the template closes turns with another token) is dropped like a second `end`.

    >>> close_turn("four<eot>\\n", "<eot>")
    ('four<eot>', False, False)
    >>> close_turn("four ", "<eot>")
    ('four <eot>', False, True)
    >>> close_turn("four<eot>\\n</s>", "<eot>", "</s>")
    ('four<eot>', True, False)
    """
    core, closed = text, False
    while found := next((mark for mark in (end, also) if mark and core.rstrip().endswith(mark)), None):
        core = core.rstrip().removesuffix(found)
        closed = closed or found == end
    return core + end, text[len(core) :].strip() not in ("", end), not closed
