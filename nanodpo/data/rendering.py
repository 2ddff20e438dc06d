"""Messages -> the text that the chat template makes of them, with everything in it that went in."""

import copy
import dataclasses
import json
import re

from ..errors import UserError
from .marks import added_tokens, shared_start
from .template import PROBE, Template, apply

OPEN, CLOSE = r"(?:<think>|<\|START_THINKING\|>|<\|channel>thought|\[THINK\])", (
    r"(?:</think>|<\|END_THINKING\|>|<channel\|>|\[/THINK\])")  # what templates write around thoughts
REASONING = ("reasoning_content", "thinking", "reasoning")  # where messages keep what was thought before an answer
# Templates lay out white space in their own way, and take out the switches of models that think or don't.
FREE = re.compile(r"\s|/(?:no_?)?think\b|/system_override\b")


@dataclasses.dataclass
class Rendered:
    """A conversation as text. `places` are the stretches of the response that are scored, [start, end) in characters;
    empty: all of it is."""

    prompt: str
    response: str
    places: tuple[tuple[int, int], ...] = ()
    note: str = ""  # what the template did to it, for the report
    end: str = ""  # the end of turn that closes the response, once closing.py has seen to it

    @classmethod
    def from_first_answer(cls, whole: str, places: list[tuple[int, int]], note: str = "") -> "Rendered":
        """A whole conversation, whose scored answers lie at `places`: the response begins with the first of them."""
        first = places[0][0]
        return cls(whole[:first], whole[first:], tuple((a - first, b - first) for a, b in places), note)


def render_prompt(template: Template, messages: list[dict]) -> str:
    """Messages -> their text and the header of the assistant's next turn. Of a pair both sides ask for the same."""
    key = repr((messages, template.options))  # in which 1 is not True
    if template.asked[0] == key:
        return template.asked[1]
    if not template.tokenizer.chat_template:
        raise UserError("is a conversation, but the tokenizer has no chat template; give one with --chat_template, "
                        "such as examples/plain.jinja beside train.py, or put it into the model's folder as "
                        "chat_template.jinja, or give text")
    text = apply(template, messages, add_generation_prompt=True)
    _check_written(template, messages, text)
    _check_tools(template, text)
    template.asked = key, text
    return text


def render_messages(template: Template, messages: list[dict], first: int | None = None) -> Rendered:
    """A conversation that ends with an assistant message -> its texts. Scored is the last answer; given `first`, all
    answers from the message of this number on.

    Raises UserError where the template can't render it, or loses a part of it.
    """
    *before, reply = messages
    if reply["role"] != "assistant":
        raise UserError(f"must end with an assistant message, ends with role {reply['role']!r}")
    if not before:
        raise UserError("has no message before the assistant's")
    if not _says(reply):  # around which some templates write a block for thoughts
        raise UserError("is empty")
    rendered = _last_reply(template, before, reply)
    if first is not None and not _is_trained_on(reply):
        raise UserError("ends with an answer that is marked as not to be trained on; end the conversation before it")
    earlier = [i for i in range(len(before) if first is None else first, len(before))
               if before[i]["role"] == "assistant" and _is_trained_on(before[i])]
    if 0 in earlier:
        raise UserError("begins with an answer, which nothing asks for; put a message before it, or score last answers "
                        "alone with --train_on last")
    if not all(_says(before[i]) for i in earlier):
        raise UserError("has an answer before its last one that is empty")
    return _every_reply(template, messages, earlier, rendered) if earlier else rendered


def _last_reply(template: Template, before: list[dict], reply: dict) -> Rendered:
    """The reply to what is before it, as the model writes it at inference."""
    asked, whole = render_prompt(template, before), apply(template, [*before, reply])
    if not whole.startswith(asked) and _asks_otherwise(template, before, reply, asked, whole):
        whole = asked.removesuffix(template.header) + template.written + whole.rpartition(template.written)[2]
    prompt = _until_reply(template, before, asked, whole)
    opened = asked[len(prompt):]
    if _loses_thought(reply, whole):
        if closed := re.search(rf"(?:{OPEN}\s*)?{CLOSE}\s*$", asked):
            raise UserError("has thoughts, and the chat template closes them before the answer begins, with "
                            f"{closed[0]!r}: turn them on with an option of the template, as in --chat_template_kwargs "
                            "'{\"enable_thinking\": true}', or take them out of the answer")
        text = _as_generated(str(reply["content"]), opened) + template.end
        rendered = Rendered(asked, text, note="the chat template leaves out what was thought, once the answer is in "
                            "the conversation; scored whole, as the model writes it")
    else:
        _check_written(template, [*before, reply], whole, reply)
        rendered = Rendered(prompt, whole[len(prompt):].removesuffix(template.rest))
        rendered.response = _without_empty_block(rendered.prompt, rendered.response)
        if _thinks_nothing(opened) and not re.match(rf"\s*(?:{OPEN}|{CLOSE})", rendered.response):
            rendered.prompt = asked  # as at inference, where the answer comes after it
        elif opened:
            rendered.note = (f"the chat template opens an answer with {opened!r}, and not once it is in the "
                             "conversation; scored as in the conversation")
    if before[-1]["role"] == "assistant":
        rendered.note = rendered.note or ("the prompt ends with an assistant's turn, which is closed; the answer is a "
                                          "new one")
    return rendered


def _asks_otherwise(template: Template, before: list[dict], reply: dict, asked: str, whole: str) -> bool:
    """Does the template leave out a message of the prompt once it is answered? Mistral's write a system prompt into a
    question that is the last message."""
    lost = {i for i, _ in _left_out(template, [*before, reply], reply)} - {len(before)}
    return bool(lost and template.header) and asked.endswith(template.header) and template.written in whole


def _says(reply: dict) -> bool:
    """Is there something in this answer? One without content has an error of its own, in `apply`."""
    parts = [reply.get(name) for name in ("content", *REASONING)]
    return bool(reply.get("tool_calls")) or parts[0] is None or any(
        not isinstance(part, (str, type(None))) or part and part.strip() for part in parts)


def _is_trained_on(message: dict) -> bool:
    """Messages may say that they are not, as OpenAI's (weight), Axolotl's (train) and others do. Raises UserError for
    one that counts in part."""
    said = {name: message[name] for name in ("weight", "train", "loss_weight", "loss") if name in message}
    if part := [name for name, value in said.items() if isinstance(value, (int, float)) and value not in (0, 1)]:
        raise UserError(f"has an answer whose {part[0]} is {said[part[0]]}; an answer counts (1) or does not (0), and "
                        "a column weight is for whole rows")
    return not any(value in (0, False) for value in said.values())


def _until_reply(template: Template, before: list[dict], asked: str, whole: str) -> str:
    """The part of the whole conversation before its reply: the prompt `asked`, or what is left of it there."""
    if whole.startswith(asked):
        return asked
    shared = shared_start(template.tokenizer, asked, whole)
    if (len(shared) <= len(shared_start(template.tokenizer, asked, apply(template, before)))
            and not _thinks_nothing(asked[len(shared):])):
        raise UserError("the chat template writes what is before the reply differently once the reply is there; "
                        f"give rendered text instead (expected {asked[len(shared) - 20:][:60]!r})")
    return shared


def _thinks_nothing(opened: str) -> bool:
    """Is it an empty block for thoughts? Templates write one where a model should not think, in the prompt alone."""
    return re.fullmatch(rf"{OPEN}\s*{CLOSE}\s*", opened) is not None


def _loses_thought(reply: dict, whole: str) -> bool:
    """Is what was thought before the answer not in the conversation? Of a call of tools nothing else is known."""
    thought, closed, _ = str(reply.get("content") or "").partition("</think>")
    thought = thought.strip().removeprefix("<think>")
    return bool(closed and thought.strip()) and not reply.get("tool_calls") and not _is_written(thought, whole)


def _as_generated(content: str, opened: str) -> str:
    """An answer with its thoughts, without the beginning `opened` that the prompt already has."""
    mark = opened.strip()
    if not mark or not content.lstrip().startswith(mark):
        return content
    return content.lstrip().removeprefix(mark).removeprefix(opened[opened.index(mark) + len(mark):])


def _without_empty_block(prompt: str, response: str) -> str:
    """The response without an empty block for thoughts that the template writes before the one with which the content
    begins. Where the prompt opens this block, the thoughts of the content are what comes in it."""
    opened = re.search(rf"{OPEN}\s*\Z", prompt)
    block = re.match(rf"\s*{'' if opened else OPEN}\s*{CLOSE}\s*(?=<think>)", response)
    rest = response[block.end() if block else 0 :]
    return _as_generated(rest, opened[0]) if block and opened else rest


def _every_reply(template: Template, messages: list[dict], earlier: list[int], last: Rendered) -> Rendered:
    """The conversation from its first answer on, with the places of all answers in it, each to its end of turn."""
    whole, places, note = last.prompt + last.response, [], last.note
    for i in earlier:
        asked = apply(template, messages[:i], add_generation_prompt=True)
        prompt = _until_reply(template, messages[:i], asked, whole)
        said = apply(template, messages[: i + 1]).removesuffix(template.rest)
        end = len(said)
        if not whole.startswith(said):
            end = _end_of_earlier(template, said.removesuffix(template.end), len(prompt), whole)
            note = note or "the chat template writes earlier answers differently; scored as in the conversation"
        elif not said.endswith(template.end) and (closed := re.match(rf"\s*{re.escape(template.end)}", whole[end:])):
            end += closed.end()  # which it writes before the next turn alone
        elif not said.rstrip().endswith((template.end, *added_tokens(template.tokenizer))):  # or a call
            note = note or "the chat template writes no end of turn after earlier answers; they are scored without one"
        if not len(prompt) < end <= len(last.prompt) or places and places[-1][1] > len(prompt):
            raise UserError(f"the chat template does not show where the answer of message {i} ends; score the last "
                            "answers alone with --train_on last")
        places.append((len(prompt), end))
    return Rendered.from_first_answer(whole, [*places, (len(last.prompt), len(whole))], note)


def _end_of_earlier(template: Template, said: str, start: int, whole: str) -> int:
    """Where an answer ends that the template writes differently from `said`, its form as the last one; 0 where it is
    not found. gpt-oss closes the last answer with another token; Qwen3 leaves out the thoughts before the others."""
    if whole.startswith(said):
        token = next((token for token in added_tokens(template.tokenizer) if whole.startswith(token, len(said))), "")
        return len(said + token) if token else 0
    return whole.find(template.end, start) + len(template.end)


def _check_written(template: Template, messages: list[dict], text: str, reply: dict | None = None) -> None:
    """Raises UserError naming the role whose message, or a part of it, is not in the text: of all messages, or of their
    last, `reply`, the prompt of which was looked at before."""
    lost = _left_out(template, messages, reply)
    for i, message in enumerate(messages):
        if reply is not None and message is not reply:
            continue
        for name, part in _parts(message, message is reply).items():
            if (i, name) in lost or not (part.strip() in text or _is_written(part, text)):
                raise UserError(f"has a message of role {message['role']!r} that the chat template leaves out, or a "
                                f"part of it ({part.strip()[:40]!r}): give it a role that the template writes, or put "
                                "its text into another message")


def _check_tools(template: Template, text: str) -> None:
    """Raises UserError for a tool of which the text does not speak."""
    for tool in template.options.get("tools") or []:
        name = (tool.get("function") or tool).get("name") if isinstance(tool, dict) else None
        if not isinstance(name, str) or name not in text:
            raise UserError(f"has the tool {name or tool!r}, which the chat template does not write; remove the column "
                            "tools, or give a chat template that knows them")


def _is_written(part: str, text: str) -> bool:
    """Is it there with other white space, or as JSON, the way some templates write contents?"""
    ways = part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1]
    bare = FREE.sub("", text)
    return any(FREE.sub("", way) in bare for way in ways)


def _parts(message: dict, is_reply: bool) -> dict[str, str]:
    """The parts of a message that must be in the text. Templates drop the thoughts before earlier answers."""
    said = {name: message.get(name) for name in (("content", *REASONING) if is_reply else ("content",))}
    if message["role"] == "assistant" and not is_reply:
        said["content"] = (said["content"] or "").rpartition("</think>")[2]
    said |= {f"call {k}": call.get("name") for k, call in enumerate(_calls(message))}
    return {name: part for name, part in said.items() if isinstance(part, str) and part.strip()}


def _calls(message: dict) -> list[dict]:
    """The functions that a message calls."""
    calls = message.get("tool_calls") if isinstance(message.get("tool_calls"), list) else []
    calls = [call.get("function") or call for call in calls if isinstance(call, dict)]
    return [call for call in calls if isinstance(call, dict)]


def _left_out(template: Template, messages: list[dict], reply: dict | None) -> set[tuple[int, str]]:
    """The messages, and which part of each, that a template does not write, given words in its place that stand nowhere
    else: a short content may stand in the text by chance, and a called function among the tools.

    Conversations that differ only in these are asked once.
    """
    probes, words = copy.deepcopy(messages), {}
    for i, message in enumerate(probes):
        for name in _parts(messages[i], messages[i] is reply):
            words[i, name] = f"{PROBE}-{i}-{name.replace(' ', '-')}."
            if name in message:
                message[name] = words[i, name]
        for k, call in enumerate(_calls(message)):
            if word := words.get((i, f"call {k}")):
                own = {PROBE: word}  # some templates write a call's arguments, and in place of its name its id
                call |= {"name": word, "arguments": json.dumps(own) if isinstance(call.get("arguments"), str) else own}
    key = json.dumps([probes, template.options], default=str)
    if key not in template.left_out:
        try:
            text = apply(template, probes)
            template.left_out[key] = {part for part, word in words.items() if word not in text}
        except UserError:  # a template that computes with contents
            template.left_out[key] = set()
    return template.left_out[key]
