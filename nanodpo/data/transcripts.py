"""Text that is rendered already: which turns it holds, where its last answer begins, what ends one."""

from collections.abc import Iterable

from ..errors import UserError
from .marks import added_tokens
from .template import Template

# How other models' transcripts begin; a text that opens so is a transcript, whatever the model at hand.
FOREIGN_OPENINGS = ("<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<start_of_turn>",
                    "<bos>", "[INST]", "<s>[INST]", "<|system|>", "<|user|>", "<|assistant|>", "<|start|>", "<|turn>",
                    "<｜begin▁of▁sentence｜>", "<｜User｜>")


def split_transcript(template: Template, text: str, prompt: str | None) -> tuple[str, str] | None:
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
        # Without a prompt column a text without a question is text that nobody asked for, and fine.
        if prompt and not (template.user in before if template.user else before.strip()):
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
    lead, user = text.partition(header)[0].strip(), template.user
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
    user = template.user
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
