"""Every answer that is scored ends with exactly one end of turn, and holds nothing but an answer."""

from ..errors import UserError
from .marks import added_tokens
from .rendering import Rendered
from .template import Template
from .transcripts import close_turn, header_at_end, opening_in

# Notes on the end of a response: they are true as long as it is not cut.
SCORED_BEFORE = "before the end of turn is scored as well"
DOUBLED = "a second end of the turn is left out"
ADDED = "added the end of turn"
OF_ENDS = (SCORED_BEFORE, DOUBLED, ADDED)


def close(template: Template, side: str, found: Rendered, value, notes: list[str]) -> None:
    """Gives the response exactly one end of turn. Raises UserError for one that is empty or holds other turns."""
    eos, reply = template.tokenizer.eos_token, value[-1] if isinstance(value, list) else {}
    end = _end_of(template, found.prompt, found.response, reply)
    response, dropped, added = close_turn(found.response, end, eos)
    if reply:  # what the template wrote after the message is no news
        _, doubled, open_ended = close_turn(reply.get("content") or "", end, eos)
        dropped = doubled or not open_ended
    for first, last in found.places[:-1]:
        try:
            _check_answer(template, found.response[first:last].rstrip().removesuffix(end), end)
        except UserError as error:
            raise UserError(f"has an answer before its last one that {error}") from error
    last = found.places[-1][0] if found.places else 0
    body = response[last:].removesuffix(end)
    _check_answer(template, body, end)
    if marks := [token for token in template.tokenizer.all_special_tokens if token and body.rstrip().endswith(token)]:
        notes.append(f"{side}: the special token {marks[0]!r} {SCORED_BEFORE}")
    if found.places:
        found.places = (*found.places[:-1], (last, len(response)))
    found.response, found.end = response, end
    notes += [f"{side}: {DOUBLED}"] * dropped
    notes += [f"{side}: {ADDED}"] * added


def _check_answer(template: Template, body: str, end: str) -> None:
    """Raises UserError for an answer, without its end of turn, that is empty or holds more than an answer."""
    if not body.strip():
        raise UserError("is empty")
    if end in body:
        raise UserError(f"goes on after its end of turn {end!r}; it must end with the assistant's turn")
    if opening := opening_in(template, body):
        raise UserError(f"holds a turn that is not the assistant's ({opening!r})")
    bos = template.tokenizer.bos_token  # SmolLM2's opens turns, and s1's data have it within an answer
    if bos and bos != end and bos in body and bos not in (template.header or ""):
        raise UserError(f"holds the token that begins a text, {bos!r}; take it out")


def _end_of(template: Template, prompt: str, response: str, reply: dict) -> str:
    """A turn's end inside a chat, the eos token in plain text; of a call of tools the end that the template wrote."""
    said = response.rstrip()
    if reply.get("tool_calls") and not said.endswith(template.end):
        own = next((token for token in added_tokens(template.tokenizer) if said.endswith(token)), "")
        if said.count(own) == 1 and own.replace("</", "<") not in said.removesuffix(own):  # of GLM's calls
            return own
    if header_at_end(template, prompt) or response.rstrip().endswith(template.end):
        return template.end
    return template.tokenizer.eos_token or template.end
