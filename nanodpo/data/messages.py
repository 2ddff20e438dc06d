"""Messages in any of the forms that people have -> messages with role and content, both text."""

import ast
import contextlib
import json
import re

from ..errors import UserError

# ShareGPT's names of who speaks.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
         "observation": "tool", "function_response": "tool", "tool_response": "tool"}
LISTED = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:""")  # as JSON or Python write messages
CALLS = ("function_call", "tool_call")  # whose value is the call as JSON


def in_messages(name: str, value):
    """The messages of a value, as `as_messages` reads them. Raises UserError with this name before its message."""
    try:
        return as_messages(value)
    except UserError as error:
        raise UserError(f"{name} {error}") from error


def as_messages(value):
    """A message, a list of them in any of the known forms, or questions with answers -> messages; else the same value.

    >>> as_messages([{"from": "human", "value": "2?"}, {"from": "gpt", "value": [{"type": "text", "text": "4"}]}])
    [{'role': 'user', 'content': '2?'}, {'role': 'assistant', 'content': '4'}]
    """
    if isinstance(value, str) and LISTED.match(value):
        value = _listed(value)
    if isinstance(value, dict) and (_speaker(value) or "from" in value):
        value = [value]
    if not (isinstance(value, list) and value and all(isinstance(item, dict) for item in value)):
        return value
    if all({"human", "assistant"} <= {*item} for item in value):
        return turns_of([(item["human"], item["assistant"]) for item in value])
    return [_message(item) for item in value]


def _listed(text: str):
    """The messages that a text holds as JSON, or as Python writes lists: a CSV file has none. Other text is itself."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = read(text)
            listed = isinstance(value, list) and all(isinstance(item, dict) and _speaker(item) for item in value)
            return value if listed else text
    raise UserError("is text that looks like a list of messages, and can't be read as JSON; write it as JSON, or the "
                    "data as Parquet or JSONL")


def _speaker(message: dict) -> str | None:
    """The role that a message names, in whatever form."""
    return next((message[name] for name in ("role", "from") if isinstance(message.get(name), str)), None)


def first_role(messages) -> str | None:
    """The role of the first of a list of messages; None for anything else."""
    first = messages[0] if isinstance(messages, list) and messages else None
    return first.get("role") if isinstance(first, dict) else None


def turns_of(pairs) -> list[dict]:
    """Turns of [question, answer] each."""
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise UserError("has a history that is not a list of [question, answer]")
    return [turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair)]


def _message(message: dict) -> dict:
    """A message with role and content, its content as text."""
    if _speaker(message) is None:
        return message
    if "role" not in message or "content" not in message and "value" in message:
        rest = {name: value for name, value in message.items() if name not in ("role", "from", "content", "value")}
        speaker, value = _speaker(message), message.get("content", message.get("value"))
        if speaker in CALLS:
            return {"role": "assistant", "content": "", "tool_calls": _calls(value)} | rest
        message = {**turn(ROLES.get(speaker, speaker), value), **rest}
    parts = message.get("content")
    if not (isinstance(parts, list) and parts and all(isinstance(part, dict) for part in parts)):
        return message
    if odd := next((part for part in parts if part.get("type", "text") != "text"), None):
        raise UserError(f"has a message with a part of type {odd['type']!r}, which a model of text can't read")
    texts = [next((part[name] for name in ("text", "value") if isinstance(part.get(name), str)), None)
             for part in parts]
    return message if None in texts else message | {"content": "".join(texts)}


def _calls(value) -> list[dict]:
    """The calls of tools that a text holds as JSON."""
    calls = read_json("a tool call", value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise UserError(f"has a tool call without a name: {str(value)[:60]!r}")
    return [{"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
            for call in calls]


def read_json(name: str, value):
    """The value of a column that some files write as JSON in text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"has {name} that can't be read as JSON: {' '.join(str(error).split())[:100]}") from error


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}
