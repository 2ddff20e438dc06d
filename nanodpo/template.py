"""What a model's chat template says about turns: where the assistant begins, what ends it, how messages become text."""

import contextlib
import dataclasses

from .errors import UserError

# How other models' transcripts begin; a text that opens so is a transcript, whatever the model at hand.
FOREIGN_OPENINGS = ("<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>",
                    "<bos>", "[INST]", "<s>[INST]", "<|system|>", "<|user|>", "<|assistant|>", "<|start|>", "<|turn>",
                    "<｜begin▁of▁sentence｜>", "<｜User｜>")
PROBE = "nanodpo-probe"  # a content that no template writes on its own


@dataclasses.dataclass
class Template:
    """`header` opens an assistant turn and `end` closes one, in text; None and the eos token without a template.

    `openings` are what opens a system or user turn, where the tokenizer has tokens for it.
    """

    tokenizer: object
    header: str | None
    end: str
    openings: tuple[str, ...] = ()


def read_template(tokenizer, assistant_header: str | None = None) -> Template:
    """Finds header and ends of turns by rendering short exchanges. Raises UserError for a template that has no end."""
    header, end, openings = assistant_header, None, ()
    if tokenizer.chat_template:
        user, reply = {"role": "user", "content": "Q"}, {"role": "assistant", "content": PROBE}
        try:
            asked, prompted = _apply(tokenizer, [user]), _apply(tokenizer, [user], add_generation_prompt=True)
            _, said, tail = _apply(tokenizer, [user, reply]).rpartition(PROBE)
            if not said:
                raise UserError("loses what the assistant says in the chat template")
        except UserError as error:
            raise UserError(f"{tokenizer.name_or_path}: a question and its answer: {error}; mend chat_template.jinja, "
                            "or chat_template in tokenizer_config.json") from error
        if not header and prompted.startswith(asked):
            header = prompted[len(asked):] or None
        tail = tail.strip()
        specials = sorted((token for token in tokenizer.all_special_tokens if token in tail), key=tail.index)
        # ChatML of a base model: the template closes turns with a token that is not the tokenizer's eos.
        end = specials[0] if specials else (tail.split() or [None])[0]
        openings = _openings(tokenizer, end or tokenizer.eos_token)
    if not (end or tokenizer.eos_token):
        raise UserError("the tokenizer has neither an eos_token nor a chat template that ends turns; set its eos_token")
    return Template(tokenizer, header, end or tokenizer.eos_token, openings)


def _openings(tokenizer, end: str | None) -> tuple[str, ...]:
    """What the template writes before a system and a user message; only what holds a token of its own counts."""
    probe = {"content": PROBE}
    found = []
    for messages in ([{"role": "user", **probe}],
                     [{"role": "system", **probe}, {"role": "user", "content": "Q"}]):
        with contextlib.suppress(UserError):  # many templates know no system turn
            before = _apply(tokenizer, messages).partition(PROBE)[0]
            turn = before.rpartition(end)[2] if end else before
            mark = turn.strip().removeprefix(tokenizer.bos_token or "").strip().partition("\n")[0]
            if any(token in mark for token in tokenizer.get_added_vocab()):
                found.append(mark)
    return tuple(dict.fromkeys(found))


def _apply(tokenizer, messages: list[dict], **options) -> str:
    """The chat template's text. Raises UserError for what it can't render."""
    from jinja2 import TemplateError  # a dependency of transformers' chat templates

    # Arrow fills keys that some messages lack with None; templates would print it.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if odd := [content for m in messages if not isinstance(content := m.get("content", ""), str)]:
        raise UserError(f"has a message whose content is of type {type(odd[0]).__name__}, not text")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
            RecursionError) as error:  # templates compute with contents
        raise UserError(f"cannot be rendered by the chat template: {error}") from error


def render_prompt(template: Template, messages: list[dict]) -> str:
    """Messages -> their text and the header of the assistant's next turn."""
    if not template.tokenizer.chat_template:
        raise UserError("is a list of messages, but the tokenizer has no chat template")
    return _apply(template.tokenizer, messages, add_generation_prompt=True)


def render_messages(template: Template, messages: list[dict]) -> tuple[str, str]:
    """A conversation that ends with an assistant message -> (prompt text, response text).

    Raises UserError where the template can't render it or writes the reply differently after the header.
    """
    *before, reply = messages
    if reply["role"] != "assistant":
        raise UserError(f"must end with an assistant message, ends with role {reply['role']!r}")
    if not before:
        raise UserError("has no message before the assistant's")
    prompt = render_prompt(template, before)
    whole = _apply(template.tokenizer, messages)
    if not whole.startswith(prompt):
        raise UserError("the chat template writes the reply differently once it is in the conversation; "
                        f"give rendered text instead (expected it after {prompt[-40:]!r})")
    return prompt, whole[len(prompt):]


def split_transcript(template: Template, text: str, prompt: str | None = None) -> tuple[str, str] | None:
    """A rendered transcript -> (prompt text with the last assistant header, response text); None for plain text.

    A rendered `prompt` whose transcript `text` only continues is put in front. Raises UserError for a transcript that
    has no header of this model.
    """
    header, prompt = template.header, prompt or ""
    continues = bool(header) and (prompt.endswith(header) or (text.startswith(header) and template.end in prompt))
    if continues and header in text and not text.startswith(prompt):
        text = prompt + text
    if header and header in text:
        before, _, response = text.rpartition(header)
        if prompt and not before.strip():  # without a prompt column this is text that nobody asked for, and fine
            raise UserError(f"has no turn before the assistant header {header!r}, so the prompt would be lost")
        return before + header, response
    opening = next((o for o in FOREIGN_OPENINGS if text.lstrip().startswith(o)), None)
    if opening and not continues:
        lacks = f"without this model's assistant header, {header!r}" if header else "and the model has no chat template"
        raise UserError(f"is a transcript (it opens with {opening!r}) {lacks}; name the transcript's own header with "
                        "--assistant_header")
    return None


def lacks_template(template: Template, prompt: str) -> bool:
    """Has the model a chat template, and is this prompt's text without any?"""
    marks = [template.header, *template.openings]
    return bool(template.tokenizer.chat_template) and not (
        any(mark and mark in prompt for mark in marks) or prompt.lstrip().startswith(FOREIGN_OPENINGS))


def prompt_leads(template: Template, prompts: list[list[int]]) -> list[str | None]:
    """What stands before the user's first turn (a system prompt, say), every form that occurs; None for plain text.

    Log-probs under another lead than that of training answer another question.
    """
    user = template.openings[0] if template.openings else None
    texts = template.tokenizer.batch_decode(prompts, clean_up_tokenization_spaces=False)
    leads = {text.partition(user)[0] if user and user in text else None for text in texts}
    return sorted(leads, key=lambda lead: (lead is None, lead))


def question_in(template: Template, prompt: str) -> str:
    """The text of a rendered prompt up to the end of its last user turn, for comparing with a column."""
    before = prompt.removesuffix(template.header or "").rstrip()
    return before.removesuffix(template.end).strip()


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
