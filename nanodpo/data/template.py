"""Reads a model's chat template: where the assistant's turn begins, and what ends it."""

import contextlib
import dataclasses
import datetime
import operator
import re
import signal
import threading
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

from ..errors import UserError
from .marks import added_tokens, shared_start
from .shapes import options_of

QUESTION, PROBE = "nanodpo-question", "nanodpo-probe"  # contents that no template writes on its own
ASK, REPLY = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": PROBE}
SECONDS = 10.0  # for one conversation, which takes milliseconds: a template is a program, and may loop for hours
BITS = 2**20  # of a whole number that a template computes: no alarm interrupts the making of a larger one
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

    @property
    def user(self) -> str | None:
        """The text that opens a user's turn; None where none is known."""
        return self.openings[0] if self.openings else None

    def given(self, options: dict) -> "Template":
        """The same template, given these options, too: those of one row."""
        return dataclasses.replace(self, options=self.options | options) if options else self


def template_for(tokenizer, args, date: str | None) -> Template:
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
        with _bounded_numbers():  # transformers compiles a template once
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
    try:
        asked, prompted, whole = (apply(template, [ASK]), apply(template, [ASK], add_generation_prompt=True),
                                  apply(template, [ASK, REPLY]))
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
    both = shared_start(template.tokenizer, prompted, before)
    with contextlib.suppress(UserError):
        earlier = apply(template, [ASK, REPLY, ASK, REPLY]).partition(PROBE)[0].rpartition(QUESTION)[2]
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
    user, answer = {"role": "user", "content": PROBE}, {"role": "assistant", "content": "A"}
    found = []
    for messages in ([user], [{"role": "system", "content": PROBE}, ASK]):
        with contextlib.suppress(UserError):  # many templates know no system turn
            before = apply(template, messages).partition(PROBE)[0]
            if messages == [user]:
                with contextlib.suppress(UserError):
                    later = apply(template, [ASK, answer, user]).partition(PROBE)[0]
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
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
            MemoryError) as error:  # templates compute with contents
        raise UserError(f"cannot be rendered by the chat template: {str(error) or type(error).__name__}") from error


def _bounded_numbers():
    """A template that is compiled within the block can't compute 9 ** (9 ** 9), nor square a number again and again."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

    def bounded(operation: Callable, bits: Callable) -> Callable:
        def compute(left, right):
            if isinstance(left, int) and isinstance(right, int) and bits(left, right) > BITS:
                raise OverflowError("it computes a number of more than 2^20 bits")
            return operation(left, right)

        return compute

    power = bounded(operator.pow, lambda left, right: left.bit_length() * right)
    product = bounded(operator.mul, lambda left, right: left.bit_length() + right.bit_length())
    return mock.patch.multiple(Sandbox, intercepted_binops=frozenset({"**", "*"}), default_binop_table={
        **Sandbox.default_binop_table, "**": power, "*": product})


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
