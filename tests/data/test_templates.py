"""Chat templates as published models write them: what went in is found in what comes out, with the ids of inference."""

import datetime
import json
import signal

import pytest
import tiny_tokenizers as tiny
from conftest import ROOT, launch, make_model

from nanodpo.data import template as template_module
from nanodpo.data.template import read_template
from nanodpo.data.tokens import load_dataset
from nanodpo.data.transcripts import prompt_leads
from nanodpo.errors import UserError

GENERATION = "{% if add_generation_prompt %}"
# A default system prompt; roles that it does not know are left out.
QWEN25 = ("{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
          "{% else %}{{ '<|im_start|>system\nYou are Q.<|im_end|>\n' }}{% endif %}"
          "{% for m in messages %}{% if m.role in ('user', 'assistant') or (m.role == 'system' and not loop.first) %}"
          "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
          "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}"
          "{% endfor %}"
          "{{ '<|im_end|>\n' }}"
          "{% elif m.role == 'tool' %}"
          "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
          "{% endif %}{% endfor %}" + GENERATION + "{{ '<|im_start|>assistant\n' }}{% endif %}")
# What was thought is dropped from all turns before the last question, and white space around thoughts is its own.
QWEN3 = ("{% set ns = namespace(last=0) %}{% for m in messages %}"
         "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
         "{% for m in messages %}{% set content = m.content or '' %}"
         "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in content %}"
         "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
         "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
         "{% if loop.index0 > ns.last %}"
         "{% set content = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content %}"
         "{% endif %}{% endif %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
         + GENERATION + "{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = ("{% for m in messages %}{% set content = '<|h|>' + m.role + '<|/h|>\n\n' + m.content | trim + '<|eot|>' %}"
          "{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}")
LLAMA3_ALWAYS, LLAMA3 = (LLAMA3 + "{{ '<|h|>assistant<|/h|>\n\n' }}",
                         LLAMA3 + GENERATION + "{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}")
# The system prompt goes into the first question; there is no header but the end of the question.
MISTRAL = ("{% if messages[0].role == 'system' %}{% set system, talk = messages[0].content + '\n\n', messages[1:] %}"
           "{% else %}{% set system, talk = '', messages %}{% endif %}{{ bos_token }}{% for m in talk %}"
           "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
           "{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
           "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}")
GEMMA = ("{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
         "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
         "{{ '<turn>' + role + '\n' + m.content | trim + '</turn>\n' }}{% endfor %}"
         + GENERATION + "{{ '<turn>model\n' }}{% endif %}")
# Two ends, a turn's and the conversation's; its first version left out system prompts.
PHI3 = ("{% for m in messages %}{% if m.role != 'system' %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
        "{% endif %}{% endfor %}" + GENERATION + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
DEEPSEEK = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
            "{% for m in messages %}{% if m.role == 'user' %}{{ '<User>' + m.content }}{% elif m.role == 'assistant' %}"
            "{{ '<Assistant>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
            + GENERATION + "{{ '<Assistant>' }}{% endif %}")
ZEPHYR = ("{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
          + GENERATION + "{{ '<|assistant|>\n' }}{% endif %}")  # marks that are no tokens, and no BOS
VICUNA = ("{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}"
          "{% else %}{{ 'A chat. ' }}{% endif %}{% for m in messages %}"
          "{% if m.role == 'user' %}{{ 'USER: ' + m.content }}"
          "{% elif m.role == 'assistant' %}{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
          + GENERATION + "{{ ' ASSISTANT:' }}{% endif %}")
SWITCH = QWEN25.replace("messages[0].content +", "messages[0].content.replace('/no_think', '')"
                        ".replace('/system_override', '').rstrip() +")  # SmolLM3
IM, H = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<s>", "</s>", "<|h|>", "<|/h|>", "<|eot|>"]
IDIOMS = {  # special tokens, the first the BOS; does the tokenizer put it in front; what the template is found to write
    "qwen25": (QWEN25, IM, None, "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>", "<|im_start|>user", ""),
    "smollm2": (QWEN25, ["<|im_start|>", "<|im_end|>"], "<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n",
                "<|im_end|>", "<|im_start|>user", ""),
    "smollm3": (SWITCH, IM, None, "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>", "<|im_start|>user", ""),
    "qwen3": (QWEN3, IM, None, "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>", "<|im_start|>user", ""),
    "llama3": (LLAMA3, H, "<s>", "</s>", "<|h|>assistant<|/h|>\n\n", "<|eot|>", "<|h|>user<|/h|>", "<s>"),
    "llama3_always": (LLAMA3_ALWAYS, H, "<s>", "<|eot|>", "<|h|>assistant<|/h|>\n\n", "<|eot|>", "<|h|>user<|/h|>",
                      "<s>"),
    "mistral": (MISTRAL, ["<s>", "</s>"], "<s>", "</s>", "[/INST]", "</s>", "[INST]", "<s>"),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<turn>", "</turn>"], "<bos>", "<eos>", "<turn>model\n", "</turn>",
              "<turn>user", "<bos>"),
    "phi3": (PHI3, ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"], None, "<|endoftext|>", "<|assistant|>\n",
             "<|end|>", "<|user|>", ""),
    "deepseek": (DEEPSEEK, ["<bos>", "<eos>", "<User>", "<Assistant>"], "<bos>", "<eos>", "<Assistant>", "<eos>",
                 "<User>", "<bos>"),
    "zephyr": (ZEPHYR, ["<s>", "</s>"], "<s>", "</s>", "<|assistant|>\n", "</s>", "<|user|>", ""),
    "vicuna": (VICUNA, ["<s>", "</s>"], "<s>", "</s>", "ASSISTANT:", "</s>", "USER:", "<s>"),
}
NO_SYSTEM = ("gemma", "phi3")


def tokenizer_of(name, **changes):
    template, specials, bos, eos = IDIOMS[name][:4]
    named = {"eos_token": eos, "pad_token": eos} | ({"bos_token": bos} if bos else {}) | changes
    return tiny.make(specials, bos_first=bool(bos) and name != "smollm2", template=template, **named)


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def load(folder, tokenizer, *rows, more=(), **arguments):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset(str(path), read_template(tokenizer), tiny.DataArguments(**arguments), 10000, True, more)


def error_of(*values, **how):
    with pytest.raises(UserError) as caught:
        load(*values, **how)
    return str(caught.value)


def row(prompt, chosen="4", rejected="5"):
    return {"prompt": prompt, "chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}


TALK = [message("user", "2+2? \n"), message("assistant", "<think>\nI add.\n</think>\n\nfour"),
        message("user", 'And "as a digit"?')]


# Reading


@pytest.mark.parametrize("name", IDIOMS)
def test_header_end_and_marks_of_published_templates(name):
    template = read_template(tokenizer_of(name))
    header, end, user, bos = IDIOMS[name][4:]
    assert template.header.strip() == header.strip() and template.end == end
    assert (template.openings[0], template.bos) == (user, bos)
    assert all(template.openings)  # an empty text would be found in any text


@pytest.mark.parametrize("name", IDIOMS)
def test_ids_are_those_of_inference(name, tmp_path):
    """Prompt as apply_chat_template gives it, tokenised; then the answer, and exactly one end of turn. The same from
    messages, from a plain answer to a prompt of messages, from the rendered prompt, and from rendered transcripts."""
    tokenizer = tokenizer_of(name)
    talk = TALK if name in NO_SYSTEM else [message("system", "Be 'brief'.\n/system_override /no_think"), *TALK]
    asked = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    text = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*talk, message("assistant", "4")], tokenize=False)
    other = tokenizer.apply_chat_template([*talk, message("assistant", "5")], tokenize=False)
    said = whole[len(text):].partition(IDIOMS[name][5])[0]  # Qwen3 also writes that nothing was thought
    end = tokenizer.convert_tokens_to_ids(IDIOMS[name][5])
    rows = {"messages": row(talk), "both": {side: talk + answer for side, answer in row("").items() if answer},
            "transcripts": {"prompt": "Which?", "chosen": whole, "rejected": other}}
    if said == "4":
        rows |= {"plain answers": {"prompt": talk, "chosen": "4", "rejected": "5"},
                 "a rendered prompt": {"prompt": text, "chosen": "4", "rejected": "5"}}
    bos = IDIOMS[name][7]
    if bos:
        rows["no bos"] = {"chosen": whole.removeprefix(bos), "rejected": other.removeprefix(bos)}
    for how, data in rows.items():
        example, = load(tmp_path, tokenizer, data).examples
        assert example.prompt == asked, how
        assert example.chosen == [*said.encode(), end] and tokenizer.decode(example.rejected).count("5") == 1, how
        assert not bos or example.prompt.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", IDIOMS)
def test_a_plain_answer_to_a_prompt_of_messages_is_what_the_assistant_says(name, tmp_path):
    """The same ids as from a message: Mistral and Vicuna write a space before it, Qwen3 that nothing was thought."""
    tokenizer, talk = tokenizer_of(name), [message("user", "2+2?")]
    plain = {"prompt": talk, "chosen": "4", "rejected": "5" + IDIOMS[name][5]}
    example, other = load(tmp_path, tokenizer, row(talk), plain).examples
    assert (other.prompt, other.chosen, other.rejected) == (example.prompt, example.chosen, example.rejected)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": talk, "completion": said}) + "\n"
                            for said in ("4", [message("assistant", "4")])))
    sft = load_dataset(str(path), read_template(tokenizer), tiny.DataArguments(loss="sft"), 1000, False).examples
    assert sft[0].prompt == sft[1].prompt == example.prompt and sft[0].chosen == sft[1].chosen == example.chosen


@pytest.mark.parametrize("name", IDIOMS)
def test_a_plain_answer_of_a_further_column_is_what_the_assistant_says(name, tmp_path):
    """Beside messages it has the ids of the same answer as a message, so that their log-probs can be compared."""
    tokenizer, talk = tokenizer_of(name), [message("user", "2+2?")]
    whole = {"chosen": [*talk, message("assistant", "4")], "rejected": [*talk, message("assistant", "5")], "prompt": ""}
    for data in (row(talk), whole, {"prompt": talk, "chosen": "4", "rejected": "5"}):
        example, = load(tmp_path, tokenizer, data | {"third": "4"}, more=("third",)).examples
        assert example.more == {"third": example.chosen}


@pytest.mark.parametrize("name", ["qwen25", "qwen3"])
@pytest.mark.parametrize("nothing", ["", " \n"])
def test_an_empty_answer_is_refused_also_where_a_template_writes_something_around_it(name, nothing, tmp_path):
    """Qwen3's: that nothing was thought."""
    asked = [message("user", "2+2?")]
    for said in (nothing, [message("assistant", nothing)]):
        bad = {"prompt": asked, "chosen": "4", "rejected": said}
        assert "row 0: rejected is empty" in error_of(tmp_path, tokenizer_of(name), bad)


def test_plain_text_keeps_the_tokenizers_own_bos(tmp_path):
    """Zephyr's template writes none; text that it did not render is tokenised as this tokenizer tokenises text."""
    plain = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
    example, = load(tmp_path, tokenizer_of("zephyr"), plain).examples
    assert example.prompt == [258, *b"2+2="] and example.chosen == [*b"4", 259]


def test_a_template_that_draws_is_refused():
    for drawn in ("{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"):
        tokenizer = tokenizer_of("qwen25")
        tokenizer.chat_template = QWEN25 + drawn
        with pytest.raises(UserError, match="draws at random"):
            read_template(tokenizer)
    tokenizer.chat_template = QWEN25 + "{# no random, nor anything | randomised #}"
    assert read_template(tokenizer).end


def test_a_template_that_takes_hours_is_refused(monkeypatch):
    """Jinja bounds one loop, not loops in loops; the alarm that ends them is taken back."""
    monkeypatch.setattr(template_module, "SECONDS", 0.2)
    tokenizer, before = tiny.chatml(), signal.getsignal(signal.SIGALRM)
    loop = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loop + tiny.CHATML
    with pytest.raises(UserError, match="cannot be rendered by the chat template: it takes more than 0.2 s; mend"):
        read_template(tokenizer)
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_template_that_asks_for_more_memory_than_there_is_is_refused():
    tokenizer = tiny.chatml()
    tokenizer.chat_template = "{{ 'a' * 10**15 }}" + tiny.CHATML
    with pytest.raises(UserError, match="cannot be rendered by the chat template: MemoryError; mend chat_template"):
        read_template(tokenizer)


@pytest.mark.parametrize("endless", ["9 ** (9 ** 9)", "n.x", "(10 ** 300000) * (10 ** 300000)"])
def test_a_template_that_computes_endless_numbers_is_refused(endless):
    """No alarm interrupts Python in an operation; 3 squared 40 times has 5 x 10^11 digits."""
    tokenizer = tiny.chatml()
    squared = "{% set n = namespace(x=3) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}"
    tokenizer.chat_template = squared * (endless == "n.x") + "{% if " + endless + " > 1 %}{% endif %}" + tiny.CHATML
    with pytest.raises(UserError, match=r"by the chat template: it computes a number of more than 2\^20 bits; mend"):
        read_template(tokenizer)


def test_a_template_may_compute():
    tokenizer = tiny.chatml()
    tokenizer.chat_template = "{{ 2 ** 10 }}{{ 3 * 7 }}{{ 'ab' * 2 }}{{ 2.5 * 2 }}{{ 2 ** -1 }}" + tiny.CHATML
    text = template_module.apply(read_template(tokenizer), [message("user", "?")])
    assert text.startswith("102421abab5.00.5<|im_start|>user")


def test_a_template_that_loses_the_question_is_refused():
    tokenizer = tokenizer_of("qwen25")
    tokenizer.chat_template = QWEN25.replace("('user', 'assistant')", "('assistant',)")
    with pytest.raises(UserError, match="loses what the user says in the chat template"):
        read_template(tokenizer)


# What went in is in what comes out


LOST = {
    "a role that is not known": ("qwen25", [message("developer", "In French."), message("user", "2+2?")], "developer"),
    "the question": ("qwen25", [message("system", "Be brief."), message("human", "2+2?")], "human"),
    "a question that stands elsewhere by chance": ("qwen25", [message("user", "2+2?"), message("human", "a")], "human"),
    "a system prompt": ("phi3", [message("system", "Be brief."), message("user", "2+2?")], "system"),
    "a tool's name": ("phi3", [message("user", "2?"), message("assistant", "", tool_calls=[
        {"type": "function", "function": {"name": "weather", "arguments": {}}}])], "assistant"),
    "a call of a tool whose name stands elsewhere": ("qwen3", [message("user", "Ask weather!"), message(
        "assistant", "", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]),
        message("user", "And?")], "assistant"),
}


@pytest.mark.parametrize("name, prompt, role", LOST.values(), ids=LOST)
def test_a_message_that_the_template_leaves_out_makes_a_bad_row(name, prompt, role, tmp_path):
    """In a prompt column, in lists that hold the prompt, beside plain answers, in further columns."""
    tokenizer, good = tokenizer_of(name), row([message("user", "1+1?")], "2", "3")
    words = f"chosen has a message of role '{role}' that the chat template leaves out"
    answers = [message("assistant", "4")], [message("assistant", "5")]
    for bad in (row(prompt), {"prompt": prompt, "chosen": "4", "rejected": "5"},
                {"prompt": "", "chosen": prompt + answers[0], "rejected": prompt + answers[1]}):
        assert f"row 0: {words}" in error_of(tmp_path, tokenizer, bad, good)
        data = load(tmp_path, tokenizer, good, bad, on_bad_row="drop")
        assert [d["row"] for d in data.dropped] == [1] and data.dropped[0]["reason"].startswith(words)
    said = f"column third has a message of role '{role}'"
    assert said in error_of(tmp_path, tokenizer, good | {"third": prompt + answers[0]}, good, more=("third",))


def test_what_is_scored_must_be_whole(tmp_path):
    """Thoughts before an earlier answer may go; those of the answer that is trained on may not."""
    thought = "<think>\nI add.\n</think>\n\n4"
    words = "chosen has a message of role 'assistant' that the chat template leaves out, or a part of it"
    data = load(tmp_path, tokenizer_of("deepseek"), row(TALK, thought))  # leaves thoughts out of all answers
    kept, = data.examples
    assert kept.chosen == [*thought.encode(), tokenizer_of("deepseek").eos_token_id]
    assert data.notes == {"the chat template leaves out what was thought, once the answer is in the conversation; "
                          "scored whole, as the model writes it": 1}
    kept, = load(tmp_path, tokenizer_of("qwen3"), row(TALK, thought)).examples
    assert bytes(kept.chosen[:-1]).decode() == thought
    reasoned = {"chosen": [*TALK, message("assistant", "4", reasoning_content="I add.")],
                "rejected": [*TALK, message("assistant", "5", reasoning_content="I do not.")]}
    kept, = load(tmp_path, tokenizer_of("qwen3"), reasoned).examples
    assert bytes(kept.chosen[:-1]).decode() == thought
    assert f"{words} ('I add.')" in error_of(tmp_path, tokenizer_of("qwen25"), reasoned)


@pytest.mark.parametrize("empty, thought, opened, said", [
    ("<think></think>", None, "<think>", "</think>4"),  # Nemotron 3: the two differ in a newline
    ("<think></think>", "I add.", "<think>\n", "I add.\n</think>\n\n4"),
    ("<think>\n\n</think>\n\n", None, "<think>\n", "\n</think>\n\n4"),  # Qwen 3.5
    ("<think>\n\n</think>\n\n", "I add.", "<think>\n", "I add.\n</think>\n\n4"),
])
def test_templates_that_open_a_block_for_thoughts(empty, thought, opened, said, tmp_path):
    """Scored are the tokens of the conversation after the last one that the prompt of inference shares with it."""
    tokenizer = tiny.chatml()
    tokenizer.chat_template = tiny.CHATML.replace(
        "{{ m['content'] }}", "{% if m.role == 'assistant' %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' "
        f"if m.reasoning_content else {empty!r}" " }}{% endif %}{{ m['content'] }}").replace(
        "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    more = {"reasoning_content": thought} if thought else {}
    chosen, rejected = (message("assistant", text, **more) for text in "45")
    data = load(tmp_path, tokenizer, {"prompt": [message("user", "2+2?")], "chosen": chosen, "rejected": rejected})
    example, = data.examples
    assert tokenizer.decode(example.prompt) == f"<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n{opened}"
    assert tokenizer.decode(example.chosen) == f"{said}<|im_end|>"
    assert any("not once it is in the conversation" in note for note in data.notes) == (opened == "<think>")


@pytest.mark.parametrize("writes, opens, first, last", [
    ("true", "<think>\n", "\n</think>\n\n4", "hm\n</think>\n\nyes"),  # before every answer
    ("loop.last", "<think>\n", "4", "hm\n</think>\n\nyes"),  # before the last alone: Qwen 3.5
    ("loop.last", "<think>\n\n</think>\n\n", "4", "<think>\nhm\n</think>\n\nyes"),  # there; it is not to think
    ("false", "<think>\n", "4", "yes"),  # in the prompt of inference alone
    ("m.thought", "<think>\n", "4", "hm\n</think>\n\nyes")])  # a transcript as DeepSeek R1 writes, with its thoughts
def test_all_answers_of_a_transcript_are_scored_whichever_have_a_block(writes, opens, first, last, tmp_path):
    """By hand: each from where the header ends that its turn has, to its end of turn."""
    tokenizer, path = tiny.chatml(), tmp_path / "rows.jsonl"
    tokenizer.chat_template = tiny.CHATML.replace("{{ m['content'] }}", (
        "{% if m.role == 'assistant' and " + writes + " %}{{ '<think>\n' + (m.thought or '') + '\n</think>\n\n' }}"
        "{% endif %}{{ m['content'] }}")).replace("assistant\n{% endif %}", f"assistant\n{opens}{{% endif %}}")
    text = tokenizer.apply_chat_template([
        message("user", "2?"), message("assistant", "4"), message("user", "Sure?"),
        message("assistant", "yes", thought="hm")], tokenize=False)
    asked = "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
    for begin, row in (("", {"text": text}), (asked + opens, {"prompt": asked + opens, "completion": text})):
        if not text.startswith(begin):
            continue
        path.write_text(json.dumps(row))
        data = load_dataset(str(path), read_template(tokenizer), tiny.DataArguments(loss="sft"), 1000, False)
        example, = data.examples
        assert tokenizer.decode(example.prompt + list(example.chosen)) + "\n" == text
        scored = tokenizer.decode([example.chosen[place] for place in example.chosen.scored])
        assert scored == f"{first}<|im_end|>{last}<|im_end|>"
        assert not any("differs from the transcript" in note for note in data.notes)


def test_an_empty_block_before_thoughts_that_are_there_goes(tmp_path):
    """A template that writes a block of its own, empty where no thoughts are given apart: as Kimi K2's. The model would
    write one."""
    tokenizer, thought = tiny.chatml(), "<think>\nI {}.\n</think>\n\n{}"
    tokenizer.chat_template = tiny.CHATML.replace(
        "{{ m['content'] }}", "{% if m.role == 'assistant' %}{{ '<think>' + (m.reasoning_content or '') + '</think>' }}"
        "{% endif %}{{ m['content'] }}")
    example, = load(tmp_path, tokenizer, row([message("user", "2?")], thought.format("add", 4), "5")).examples
    assert tokenizer.decode(example.prompt) == "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(example.chosen) == "<think>\nI add.\n</think>\n\n4<|im_end|>"
    assert tokenizer.decode(example.rejected) == "<think></think>5<|im_end|>"


def test_thoughts_of_a_content_come_in_the_block_that_the_prompt_opens(tmp_path):
    """A template that writes a block of its own and opens it for inference: the model would write its thoughts there,
    and not close it empty to open another one."""
    tokenizer, thought = tiny.chatml(), "<think>\nI {}.\n</think>\n\n{}"
    tokenizer.chat_template = tiny.CHATML.replace(
        "{{ m['content'] }}", "{% if m.role == 'assistant' %}{{ '<think>\n' + (m.reasoning_content or '') + "
        "'\n</think>\n\n' }}{% endif %}{{ m['content'] }}").replace("assistant\n{% end", "assistant\n<think>\n{% end")
    in_content = row([message("user", "2?")], thought.format("add", 4), thought.format("do", 5))
    apart = {"prompt": [message("user", "2?")], "chosen": [message("assistant", "4", reasoning_content="I add.")],
             "rejected": [message("assistant", "5", reasoning_content="I do.")]}
    example, other = load(tmp_path, tokenizer, in_content, apart).examples
    asked = "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert tokenizer.decode(example.prompt) == asked
    assert tokenizer.decode(example.chosen) == "I add.\n</think>\n\n4<|im_end|>"
    assert (example.prompt, example.chosen, example.rejected) == (other.prompt, other.chosen, other.rejected)


def test_contents_that_are_written_as_json_are_there(tmp_path):
    tokenizer = tokenizer_of("qwen25")
    tokenizer.chat_template = QWEN25.replace("m.content + '\n</tool", "(m.content | tojson) + '\n</tool")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    prompt = [message("user", "Weather?"), message("assistant", None, tool_calls=[call]),
              message("tool", 'A "line" \\ é\nand another')]
    example, = load(tmp_path, tokenizer, row(prompt)).examples
    assert r'"A \"line\" \\ é\nand another"' in bytes(i for i in example.prompt if i < 256).decode()


def test_keys_that_arrow_fills_with_none_are_nobodys_words(tmp_path):
    """Two calls of tools with other arguments: the same tokens from .jsonl and from Parquet, by hand from the first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": [message("user", "Go?")], "rejected": [message("assistant", "No.", tool_calls=None)],
             "chosen": [message("assistant", None, tool_calls=[
                 {"type": "function", "function": {"name": name, "arguments": arguments}}])]}
            for name, arguments in (("f", {"city": "Oslo", "at": [{"day": 1}]}), ("g", {"a": 2, "at": [{"hour": 3}]}))]
    tokenizer = tokenizer_of("qwen25")
    first = load(tmp_path, tokenizer, *rows).examples
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    again = load_dataset(str(tmp_path / "rows.parquet"), read_template(tokenizer), tiny.DataArguments(), 1000, True)
    said = '<tool_call>{"name": "f", "arguments": {"city": "Oslo", "at": [{"day": 1}]}}</tool_call>'
    assert bytes(first[0].chosen[:-1]).decode() == said
    assert again.examples[0] == first[0] and tokenizer.decode(again.examples[1].chosen).count("null") == 0
    assert sorted(again.examples[1].chosen) == sorted(first[1].chosen)  # Arrow has one order of keys for all rows


# A block for thoughts that the prompt of inference closes, and the conversation lacks
EMPTY = ["<think>\n\n</think>\n\n", "<|channel>thought\n<channel|>", "[THINK][/THINK]",
         "<|START_THINKING|><|END_THINKING|>"]


def not_thinking(block: str, always: bool = False):
    """ChatML that opens the assistant's turn with this block, and, `always`, whether asked to or not."""
    tokenizer = tiny.chatml()
    opens = "{{ '<|im_start|>assistant\n" + block.replace("\n", "\\n") + "' }}"
    opens = opens if always else f"{GENERATION}{opens}{{% endif %}}"
    tokenizer.chat_template = tiny.CHATML.partition("{% if add")[0] + opens
    return tokenizer


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("block", EMPTY)
def test_where_a_model_is_not_to_think_the_answer_comes_after_the_closed_block(block, always, tmp_path):
    """From messages as from a plain answer to a prompt; earlier answers are as the conversation has them."""
    tokenizer = not_thinking(block, always)
    user, more = [message("user", "2+2?")], [message("assistant", "4"), message("user", "Sure?")]
    for talk in (user, user + more):
        asked = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert tokenizer.decode(asked).endswith(block)
        for data in (row(talk), {"prompt": talk, "chosen": "4", "rejected": "5"}):
            loaded = load(tmp_path, tokenizer, data)
            example, = loaded.examples
            assert (example.prompt, example.chosen, example.rejected) == (asked, [*b"4", 260], [*b"5", 260])
            assert not any("opens an answer" in note for note in loaded.notes)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [*user, *more, message("assistant", "yes")]}))
    example, = load_dataset(str(path), read_template(tokenizer), tiny.DataArguments(loss="sft"), 1000, False).examples
    scored = [example.chosen[i] for i in example.chosen.scored]
    assert scored == [*b"4", 260, *b"yes", 260]
    assert tokenizer.decode(example.prompt + example.chosen).endswith(f"assistant\n{block}yes<|im_end|>")


def test_thoughts_after_a_block_that_is_closed_are_refused(tmp_path):
    """The template leaves them out, and a model that is told not to think would not write them."""
    tokenizer = not_thinking(EMPTY[0])
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'].split('</think>')[-1]")
    said = error_of(tmp_path, tokenizer, row([message("user", "2+2?")], "<think>\nI add.\n</think>\n\n4"))
    assert "has thoughts, and the chat template closes them before the answer begins" in said
    assert "--chat_template_kwargs" in said


def test_a_tag_that_is_no_token_is_not_cut(tmp_path):
    """<think> in the prompt and </think> in the conversation begin alike."""
    tokenizer = tiny.chatml()
    tokenizer.chat_template = tiny.CHATML.replace(
        "{{ m['content'] }}", "{{ '</think>' if m.role == 'assistant' }}{{ m['content'] }}").replace(
        "assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    example, = load(tmp_path, tokenizer, row([message("user", "2?")])).examples
    assert tokenizer.decode(example.prompt) == "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(example.chosen) == "</think>4<|im_end|>"


def test_a_system_prompt_that_goes_into_the_last_question_is_in_the_prompt(tmp_path):
    """As Mistral's: once the question is answered, the template does not write it any more. Where all answers are
    scored, the earlier ones have no such place, and the row is refused."""
    tokenizer = tokenizer_of("mistral")
    tokenizer.chat_template = MISTRAL.replace("loop.first", "loop.last")
    talk = [message("system", "Be brief."), message("user", "2+2?"), message("assistant", "3"), message("user", "Oh?")]
    for asked in (talk[:2], talk):
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert "Be brief." in tokenizer.decode(prompt)
        example, = load(tmp_path, tokenizer, row(asked)).examples
        assert (example.prompt, example.chosen, example.rejected) == (prompt, [*b" 4", 259], [*b" 5", 259])
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [*talk, message("assistant", "4")]}))
    with pytest.raises(UserError, match="writes what is before the reply differently once the reply is there"):
        load_dataset(str(path), read_template(tokenizer), tiny.DataArguments(loss="sft"), 1000, False)


# Ends


def test_an_answer_and_its_turn_may_end_with_a_token_each(tmp_path):
    """As Command R's: the model writes both, and stops at the second. A call of tools has another first one."""
    tokenizer = tiny.make(["<bos>", "<eot>", "<user>", "<model>", "<say>", "</say>", "<act>", "</act>"], template=(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% if m.tool_calls %}"
        "{{ '<model><act>' + m.tool_calls[0].function.name + '</act>' }}{% else %}"
        "{{ '<model><say>' + m.content + '</say>' }}{% endif %}{% else %}{{ '<user>' + m.content }}{% endif %}"
        "{{ '<eot>' }}{% endfor %}" + GENERATION + "{{ '<model>' }}{% endif %}"), bos_first=True, bos_token="<bos>",
        eos_token="<eot>", pad_token="<eot>")
    call = message("assistant", None, tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    talk = [message("user", "2+2?"), message("assistant", "3"), message("user", "Sure?")]
    example, = load(tmp_path, tokenizer, row(talk)).examples
    assert tokenizer.decode(example.prompt) == "<bos><user>2+2?<eot><model><say>3</say><eot><user>Sure?<eot><model>"
    assert tokenizer.decode(example.chosen) == "<say>4</say><eot>"
    example, = load(tmp_path, tokenizer, {"prompt": talk, "chosen": [call], "rejected": [message("assistant", "5")]}
                    ).examples
    assert tokenizer.decode(example.chosen) == "<act>f</act><eot>"
    assert tokenizer.decode(example.rejected) == "<say>5</say><eot>"


@pytest.mark.parametrize("block", ["", "<think></think>"])
def test_what_opens_the_next_turn_unasked_is_no_part_of_a_transcript(block, tmp_path):
    """As Command R7B's template does, with an empty block for thoughts, after an answer that has two ends of which a
    question has one: what closes the question is no part of the header."""
    tokenizer, path = tiny.make(["<eot>", "<user>", "<model>", "</say>"], eos_token="<eot>", template=(
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<model>' }}{{ m.content }}"
        "{{ '</say>' if m.role == 'assistant' }}<eot>{% endfor %}<model>" + block)), tmp_path / "rows.jsonl"
    text = f"<user>2+2?<eot><model>3</say><eot><user>Sure?<eot><model>4</say><eot><model>{block}"
    template = read_template(tokenizer)
    assert (template.header, template.written, template.end) == (f"<model>{block}", "<model>", "</say><eot>")
    path.write_text(json.dumps({"text": text}))
    example, = load_dataset(str(path), template, tiny.DataArguments(loss="sft"), 1000, False).examples
    assert tokenizer.decode(example.prompt + list(example.chosen)) == text.removesuffix(f"<model>{block}")
    assert tokenizer.decode([example.chosen[i] for i in example.chosen.scored]) == "3</say><eot>4</say><eot>"


@pytest.mark.parametrize("calls", [1, 2])
def test_a_tag_that_closes_a_call_is_not_the_end_of_its_turn(calls, tmp_path):
    """As GLM-4.5's, whose answers the template does not close: they get the eos, whatever they are."""
    tokenizer = tiny.make(["<eos>", "<user>", "<model>", "<tool_call>", "</tool_call>"], eos_token="<eos>", template=(
        "{% for m in messages %}{{ ('<model>' if m.role == 'assistant' else '<user>') + (m.content or '') }}"
        "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name + '</tool_call>' }}{% endfor %}"
        "{% endfor %}" + GENERATION + "{{ '<model>' }}{% endif %}"), pad_token="<eos>")
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    example, = load(tmp_path, tokenizer, {"prompt": [message("user", "2?")], "rejected": [message("assistant", "5")],
                                          "chosen": [message("assistant", None, tool_calls=[call] * calls)]}).examples
    assert tokenizer.decode(example.chosen) == "<tool_call>f</tool_call>" * calls + "<eos>"


def test_an_end_that_is_written_before_the_next_turn_alone_is_scored(tmp_path):
    """As Apertus': the last answer gets its end, and the earlier ones have theirs in the conversation."""
    tokenizer = tiny.chatml()
    tokenizer.chat_template = tiny.CHATML.replace("<|im_end|>\n", "{% if not (loop.last and m.role == 'assistant') %}"
                                                                  "<|im_end|>{% endif %}")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [message("user", "2?"), message("assistant", "4"), message("user", "3?"),
                                             message("assistant", "9")]}))
    example, = load_dataset(str(path), read_template(tokenizer), tiny.DataArguments(loss="sft"), 1000, False).examples
    assert [example.chosen[i] for i in example.chosen.scored] == [*b"4", 260, *b"9", 260]


def test_answers_that_a_template_does_not_close_are_told(tmp_path):
    """As GLM-4's, whose answers end where the next turn begins: the last one is given the eos, the others have none."""
    tokenizer = tiny.make(["<eos>", "<user>", "<model>"], eos_token="<eos>", pad_token="<eos>", template=(
        "{% for m in messages %}{{ ('<model>' if m.role == 'assistant' else '<user>') + m.content }}{% endfor %}"
        + GENERATION + "{{ '<model>' }}{% endif %}"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [message("user", "2?"), message("assistant", "4"), message("user", "3?"),
                                             message("assistant", "9")]}))
    data = load_dataset(str(path), read_template(tokenizer), tiny.DataArguments(loss="sft"), 1000, False)
    example, = data.examples
    assert tokenizer.decode([example.chosen[i] for i in example.chosen.scored]) == "49<eos>"
    assert any("no end of turn after earlier answers" in note for note in data.notes)


# Other turns, and leads


@pytest.mark.parametrize("name", ["smollm2", "zephyr", "vicuna", "mistral"])
def test_leads_are_found_whatever_the_marks_are(name):
    """A BOS that is the turns' mark, and marks that are no tokens: what stands before the first question."""
    tokenizer = tokenizer_of(name)
    template, user = read_template(tokenizer), [message("user", "2+2?")]
    prompts = [tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
               for talk in (user, [message("system", "Be brief."), *user])]
    leads = {"smollm2": ["<|im_start|>system\nBe brief.<|im_end|>\n", "<|im_start|>system\nYou are Q.<|im_end|>\n"],
             "zephyr": ["", "<|system|>\nBe brief.</s>\n"], "vicuna": ["<s>A chat. ", "<s>Be brief. "],
             "mistral": ["<s>"]}[name]  # its system prompt is a part of the question
    assert prompt_leads(template, prompts) == leads


@pytest.mark.parametrize("name, tail", [("smollm2", "\n<|im_start|>user\nSure?"), ("zephyr", "\n<|user|>\nSure?"),
                                        ("llama3", "<|h|>user<|/h|>\n\nSure?")])
def test_another_turn_within_an_answer_is_found_whatever_the_mark(name, tail, tmp_path):
    tokenizer = tokenizer_of(name)
    text = tokenizer.apply_chat_template([message("user", "2+2?")], add_generation_prompt=True, tokenize=False)
    bad = {"chosen": text + "four" + tail, "rejected": text + "five"}
    assert "chosen holds a turn that is not the assistant's" in error_of(tmp_path, tokenizer, bad)


def test_an_answer_may_speak_of_a_mark_that_is_no_token(tmp_path):
    """Zephyr's <|user|> is text: within a line it opens nothing."""
    text = "<|user|>\nWhat opens a turn?</s>\n<|assistant|>\n"
    rows = [{"chosen": text + "It is <|user|>.", "rejected": text + "No."}]
    example, = load(tmp_path, tokenizer_of("zephyr"), *rows).examples
    assert example.chosen == [*b"It is <|user|>.", 259]


# Prompts and answers that were rendered apart, or twice


def test_a_question_that_ends_with_another_token_than_an_answer_is_the_same_question(tmp_path):
    """As gpt-oss's, which ends the last answer with <|return|>; what follows the question is not a part of it."""
    tokenizer = tiny.make(["<eos>", "<end>", "<user>", "<model>"], eos_token="<eos>", template=(
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<model>' }}{{ m.content }}"
        "{{ '<eos>' if m.role == 'assistant' else '<end>' }}{% endfor %}" + GENERATION + "<model>{% endif %}"))
    for question, differs in (("2+2?", False), ("3+3?", True)):
        data = load(tmp_path, tokenizer, {"prompt": question, "chosen": "<user>2+2?<end><model>4<eos>",
                                          "rejected": "<user>2+2?<end><model>5<eos>"})
        assert any("differs from the transcript's prompt" in note for note in data.notes) == differs


@pytest.mark.parametrize("opening", ["<s>[INST] ", "[INST] "])
def test_a_whole_transcript_is_not_put_behind_another_prompt(opening, tmp_path):
    """Mistral's writes a system prompt into the last question alone, so that a rendered prompt has it, and the rendered
    conversation does not: the question would stand there twice. An answer that goes on with more turns goes behind."""
    prompt = "<s>[INST] Be brief.\n\n2+2? [/INST]"
    data = load(tmp_path, tokenizer_of("mistral"), {"prompt": prompt, "chosen": opening + "2+2? [/INST] 4</s>",
                                                    "rejected": opening + "2+2? [/INST] 5</s>"})
    example, = data.examples
    assert example.prompt == [258, *b"[INST] 2+2? [/INST]"] and example.chosen == [*b" 4", 259]
    assert data.notes == {"prompt column differs from the transcript's prompt (the transcript is used)": 1}
    more = " 3</s>[INST] Sure? [/INST]"
    example, = load(tmp_path, tokenizer_of("mistral"), {"prompt": prompt, "chosen": more + " 4</s>",
                                                        "rejected": more + " 5</s>"}).examples
    assert tokenizer_of("mistral").decode(example.prompt) == prompt + more


@pytest.mark.parametrize("lead", ["<|im_start|>system\nYou are Q.<|im_end|>\n", ""])
@pytest.mark.parametrize("generation", [True, False])
def test_prompt_and_answers_rendered_apart_are_put_together(lead, generation, tmp_path):
    """With the system prompt again before the answer's header, as alignment-handbook wrote them, and without."""
    tokenizer = tokenizer_of("qwen25")
    user = [message("user", "2+2?")]
    prompt = tokenizer.apply_chat_template(user, add_generation_prompt=generation, tokenize=False)
    sides = [f"{lead}<|im_start|>assistant\n{said}<|im_end|>\n" for said in "45"]
    example, = load(tmp_path, tokenizer, {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}).examples
    assert example.prompt == tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False)
    assert example.chosen == [*b"4", 260] and example.rejected == [*b"5", 260]


def test_a_bos_that_stands_again_before_the_answer_goes(tmp_path):
    tokenizer = tokenizer_of("llama3")
    user = [message("user", "2+2?")]
    prompt = tokenizer.apply_chat_template(user, tokenize=False)
    for first in (prompt, prompt.removeprefix("<s>")):
        sides = [f"<s><|h|>assistant<|/h|>\n\n{said}<|eot|>" for said in "45"]
        example, = load(tmp_path, tokenizer, {"prompt": first, "chosen": sides[0], "rejected": sides[1]}).examples
        assert example.prompt == tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("prompt", ["2+2?", "<|im_start|>user\n2+2?<|im_end|>\n"])
def test_a_question_that_a_transcript_lacks_is_not_lost(prompt, tmp_path):
    """The transcript has a system prompt, another one than the prompt column, and no question."""
    sides = [f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n" for said in "45"]
    data = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
    assert "so the prompt would be lost" in error_of(tmp_path, tokenizer_of("qwen25"), data)


def test_a_prompt_that_messages_repeat_in_part_stands_once(tmp_path):
    """Its last turn, or all of it with other white space."""
    tokenizer, answers = tokenizer_of("qwen25"), ([message("assistant", "4")], [message("assistant", "5")])
    prompt = [message("system", "Be brief."), message("user", "2+2?")]
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    for again in (prompt, prompt[1:], []):
        example, = load(tmp_path, tokenizer, {"prompt": prompt, "chosen": again + answers[0],
                                              "rejected": again + answers[1]}).examples
        assert example.prompt == asked
    spaced = [message("system", "Be brief."), message("user", "2+2? ")]
    example, = load(tmp_path, tokenizer, {"prompt": spaced, "chosen": prompt + answers[0],
                                          "rejected": prompt + answers[1]}).examples
    assert example.prompt == asked


@pytest.mark.parametrize("answers", [
    [message("assistant", "4")],
    pytest.param([message("system", "You are Q."), message("assistant", "4")], id="system")])
def test_a_text_prompt_of_message_answers_is_what_the_user_says(answers, tmp_path):
    tokenizer = tokenizer_of("qwen25")
    example, = load(tmp_path, tokenizer, {"prompt": "2+2?", "chosen": answers,
                                          "rejected": [*answers[:-1], message("assistant", "5")]}).examples
    assert example.prompt == tokenizer.apply_chat_template([message("user", "2+2?")], add_generation_prompt=True,
                                                           return_dict=False)
    assert example.chosen == [*b"4", 260]
    data = row("<|im_start|>user\n2+2?<|im_end|>\n")
    assert "its prompt is rendered text; give both in one form" in error_of(tmp_path, tokenizer, data)
    assert "no chat template; give one with --chat_template" in error_of(tmp_path, tiny.plain(), row("2+2?"))


def test_a_transcript_of_a_model_without_a_header_says_what_is_missing(tmp_path):
    """It has a chat template, so that is not what is missing."""
    tokenizer = tokenizer_of("qwen25")
    tokenizer.chat_template = QWEN25[: QWEN25.index(GENERATION)]
    data = {"chosen": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n4<|im_end|>", "rejected": "5"}
    assert "the model's chat template writes no assistant header; name" in error_of(tmp_path, tokenizer, data)


# The date


def dated():
    tokenizer = tokenizer_of("qwen25")
    tokenizer.chat_template = QWEN25.replace("You are Q.", "Today: ' + strftime_now('%d %b %Y %H') + '")
    return tokenizer


def test_a_template_is_told_the_date_that_it_should_write(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row([message("user", "2+2?")])))
    for date, words in (("2024-07-26", "Today: 26 Jul 2024 00"), (None, f"Today: {datetime.date.today():%d %b %Y} 00")):
        template = read_template(dated(), None, date)
        example, = load_dataset(str(path), template, tiny.DataArguments(), 1000, True).examples
        assert words in template.tokenizer.decode(example.prompt)
    assert read_template(tokenizer_of("qwen25"), None, "2024-07-26").date is None
    with pytest.raises(UserError, match="the run's date, '26 July'"):
        read_template(dated(), None, "26 July")


def test_a_run_keeps_its_date(tmp_path):
    """Started yesterday, it is told yesterday's date for ever: the same command finds its own data today, and so does
    score.py, which compares what prompts open with."""
    tokenizer = dated()
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [row([message("user", f"{i}+{i}?")], str(2 * i), "no") for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "yesterday.py").write_text(f"""
import datetime, runpy, sys
class Day(datetime.date):
    today = classmethod(lambda cls: cls.fromordinal(super().today().toordinal() - 1))
datetime.date = Day
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
    flags = ["--model_name", tmp_path / "model", "--train_file_path", tmp_path / "rows.jsonl", "--output_dir",
             tmp_path / "run", "--cache_dir", tmp_path / "cache", "--draw", "false", "--max_steps", "1"]
    launch(tmp_path / "yesterday.py", *flags, launcher="fork")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    yesterday = datetime.date.today() - datetime.timedelta(1)
    assert record["date"] == str(yesterday) and f"Today: {yesterday:%d %b %Y} 00" in record["prompt_leads"][0]
    assert "this run is finished" in launch(ROOT / "train.py", *flags, launcher="fork").stdout
    scoring = [ROOT / "score.py", tmp_path / "run", "--output_dir", tmp_path / "scores", "--responses", "chosen"]
    launch(*scoring, launcher="fork")
