"""Messages -> the text that the chat template makes of them, with everything in it that went in."""

import json
import re

from ..errors import UserError
from .template import PROBE, Template, apply

REASONING = ("reasoning_content", "thinking", "reasoning")  # where messages keep what was thought before an answer
# Templates lay out white space in their own way, and take out the switches of models that think or don't.
FREE = re.compile(r"\s|/(?:no_?)?think\b|/system_override\b")


def render_prompt(template: Template, messages: list[dict]) -> str:
    """Messages -> their text and the header of the assistant's next turn."""
    if not template.tokenizer.chat_template:
        raise UserError("is a list of messages, but the tokenizer has no chat template; put one into the model's "
                        "folder as chat_template.jinja, or give text")
    text = apply(template, messages, add_generation_prompt=True)
    _check_written(template, messages, text)
    return text


def render_messages(template: Template, messages: list[dict]) -> tuple[str, str]:
    """A conversation that ends with an assistant message -> (prompt text, response text).

    Raises UserError where the template can't render it, loses a part of it, or writes the reply differently after the
    header.
    """
    *before, reply = messages
    if reply["role"] != "assistant":
        raise UserError(f"must end with an assistant message, ends with role {reply['role']!r}")
    if not before:
        raise UserError("has no message before the assistant's")
    prompt, whole = render_prompt(template, before), apply(template, messages)
    if not whole.startswith(prompt):
        raise UserError("the chat template writes the reply differently once it is in the conversation; "
                        f"give rendered text instead (expected it after {prompt[-40:]!r})")
    _check_written(template, messages, whole, reply)
    return prompt, whole[len(prompt):].removesuffix(template.rest)


def _check_written(template: Template, messages: list[dict], text: str, reply: dict | None = None) -> None:
    """Raises UserError naming the role whose message, or a part of it, is not in the text."""
    lost = _left_out(template, messages, reply)
    for i, message in enumerate(messages):
        for part in _parts(message, message is reply):
            if i in lost or not (part.strip() in text or _is_written(part, text)):
                raise UserError(f"has a message of role {message['role']!r} that the chat template leaves out, or a "
                                f"part of it ({part.strip()[:40]!r}): give it a role that the template writes, or put "
                                "its text into another message")


def _is_written(part: str, text: str) -> bool:
    """Is it there with other white space, or as JSON, the way some templates write contents?"""
    ways = part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1]
    bare = FREE.sub("", text)
    return any(FREE.sub("", way) in bare for way in ways)


def _parts(message: dict, is_reply: bool) -> list[str]:
    """What of a message must be in the text. Of earlier answers templates drop what was thought before them."""
    said = [message.get(name) for name in (("content", *REASONING) if is_reply else ("content",))]
    if message["role"] == "assistant" and not is_reply:
        said = [(said[0] or "").rpartition("</think>")[2]]
    calls = message.get("tool_calls") if isinstance(message.get("tool_calls"), list) else []
    calls = [call.get("function") or call for call in calls if isinstance(call, dict)]
    names = [call.get("name") for call in calls if isinstance(call, dict)]
    return [part for part in (*said, *names) if isinstance(part, str) and part.strip()]


def _left_out(template: Template, messages: list[dict], reply: dict | None) -> set[int]:
    """The messages of which a template, given words in their place that stand nowhere else, does not write these.

    A short content may stand in the text by chance. Conversations that differ only in their contents are asked once.
    """
    words = [{name: f"{PROBE}-{i}-{name}." for name in (("content", *REASONING) if message is reply else ("content",))
              if isinstance(message.get(name), str) and message[name].strip()} for i, message in enumerate(messages)]
    probes = [message | own for message, own in zip(messages, words)]
    key = json.dumps(probes, default=str)
    if key not in template.left_out:
        try:
            text = apply(template, probes)
            template.left_out[key] = {i for i, own in enumerate(words) if any(w not in text for w in own.values())}
        except UserError:  # a template that computes with contents
            template.left_out[key] = set()
    return template.left_out[key]
