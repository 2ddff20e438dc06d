"""What a model's chat template says about turns: where the assistant begins, what ends it, how messages become text."""

import dataclasses

from .errors import UserError

# How other models' transcripts begin; a text that opens so is a transcript, whatever the model at hand.
FOREIGN_OPENINGS = ("<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>", "[INST]",
                    "<s>[INST]", "<bos>", "<|system|>", "<|user|>", "<|assistant|>", "<|start|>", "<|turn>",
                    "<｜begin▁of▁sentence｜>", "<｜User｜>")


@dataclasses.dataclass
class Template:
    """`header` opens an assistant turn and `end` closes one, in text; None and the eos token without a template."""

    tokenizer: object
    header: str | None
    end: str


def read_template(tokenizer, assistant_header: str | None = None) -> Template:
    """Finds header and end of turn by rendering a short exchange. Raises UserError for a template that has no end."""
    eos = tokenizer.eos_token
    header, end = assistant_header, None
    if tokenizer.chat_template:
        user, reply = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
        asked = tokenizer.apply_chat_template([user], tokenize=False)
        prompted = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        header = header or prompted.removeprefix(asked) or None
        answered = tokenizer.apply_chat_template([user, reply], tokenize=False)
        tail = answered.rpartition("A")[2].strip()
        specials = sorted((token for token in tokenizer.all_special_tokens if token in tail), key=tail.index)
        # ChatML of a base model: the template closes turns with a token that is not the tokenizer's eos.
        end = specials[0] if specials else (tail.split() or [None])[0]
    if not (end or eos):
        raise UserError("the tokenizer has neither an eos_token nor a chat template that ends turns; set its eos_token")
    return Template(tokenizer, header, end or eos)


def render_messages(template: Template, messages: list[dict]) -> tuple[str, str]:
    """A conversation that ends with an assistant message -> (prompt text, response text).

    Raises UserError where the template can't render it or writes the reply differently after the header.
    """
    from jinja2 import TemplateError  # a dependency of transformers' chat templates

    if not template.tokenizer.chat_template:
        raise UserError("is a list of messages, but the tokenizer has no chat template")
    # Arrow fills keys that some messages lack with None; templates would print it.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if messages[-1].get("role") != "assistant":
        raise UserError(f"must end with an assistant message, ends with role {messages[-1].get('role')!r}")
    apply = template.tokenizer.apply_chat_template
    try:
        prompt = apply(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = apply(messages, tokenize=False)
    except TemplateError as error:
        raise UserError(f"cannot be rendered by the chat template: {error}") from error
    if not whole.startswith(prompt):
        raise UserError("the chat template writes the reply differently once it is in the conversation; "
                        f"give rendered text instead (expected it after {prompt[-40:]!r})")
    return prompt, whole[len(prompt):]


def split_transcript(template: Template, text: str) -> tuple[str, str] | None:
    """A rendered transcript -> (prompt text with the last assistant header, response text); None for plain text.

    Raises UserError for a transcript that has no header of this model.
    """
    if template.header and template.header in text:
        before, header, response = text.rpartition(template.header)
        return before + header, response
    opening = next((o for o in FOREIGN_OPENINGS if text.lstrip().startswith(o)), None)
    if opening:
        raise UserError(f"is a transcript (it opens with {opening!r}) without the assistant header {template.header!r} "
                        "of this model; name the right one with --assistant_header")
    return None


def question_in(template: Template, prompt: str) -> str:
    """The text of a rendered prompt up to the end of its last user turn, for comparing with a column."""
    before = prompt.removesuffix(template.header or "").rstrip()
    return before.removesuffix(template.end).rstrip()


def close_turn(text: str, end: str) -> tuple[str, bool, bool]:
    """Response text -> (text with exactly one `end`, was anything after or doubled dropped, was `end` added).

    >>> close_turn("four<eot>\\n", "<eot>")
    ('four<eot>', True, False)
    >>> close_turn("four ", "<eot>")
    ('four <eot>', False, True)
    """
    core = text
    while core.rstrip().endswith(end):
        core = core.rstrip().removesuffix(end)
    if core == text:
        return text + end, False, True
    return core + end, core + end != text, False
