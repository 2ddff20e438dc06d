"""Data as people have them: of each shape of a row the token ids of prompt and responses, and which of them are scored.

A byte's id is its value, so all ids here are written by hand; they are those of apply_chat_template, cut by eye.
"""

import hashlib
import json
import re
import struct

import pytest
import tiny_tokenizers as tiny

from nanodpo.core.packing import scored_places
from nanodpo.data.example import Example
from nanodpo.data.inspection import inspect
from nanodpo.data.template import read_template
from nanodpo.data.texts import split_pair
from nanodpo.data.tokens import load_dataset
from nanodpo.errors import UserError
from nanodpo.folder.reference import data_hash

SPECIAL = {"<|endoftext|>": 258, "<|im_start|>": 259, "<|im_end|>": 260}
ASKED = "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
BRIEF = "<|im_start|>system\nBe brief.<|im_end|>\n"
AGAIN = "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
Q, A, B = ({"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"},
           {"role": "assistant", "content": "five"})
SURE, YES = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "Be brief."}


def ids(text: str) -> list[int]:
    """By hand: a mark's own id, a byte's value; the texts here have nothing that merges."""
    pieces = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
    return [i for piece in pieces for i in ([SPECIAL[piece]] if piece in SPECIAL else piece.encode())]


def load(folder, *rows, tokenizer=None, name="rows.jsonl", **arguments):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = arguments.get("loss") != "sft"
    return load_dataset(str(folder / name), read_template(tokenizer or tiny.chatml()), tiny.DataArguments(**arguments),
                        1000, pairs)


def error_of(*values, **how):
    with pytest.raises(UserError) as caught:
        load(*values, **how)
    return str(caught.value)


def turns(*said):
    """ShareGPT's way to write them."""
    return [{"from": speaker, "value": text} for speaker, text in said]


def parts(message):
    return message | {"content": [{"type": "text", "text": text, "image_url": None} for text in message["content"]]}


# Pairs: the row and the prompt's text; the responses are 4 and five, each with its end
PAIRS = {
    "messages": ({"prompt": [Q], "chosen": [A], "rejected": [B]}, ASKED),
    "the prompt within": ({"chosen": [Q, A], "rejected": [Q, B]}, ASKED),
    "a text and one message a side": ({"prompt": "2?", "chosen": [A], "rejected": [B]}, ASKED),
    "a text and a message that is in no list": ({"prompt": "2?", "chosen": A, "rejected": B}, ASKED),
    "contents in parts": ({"prompt": [parts(Q)], "chosen": [parts(A)], "rejected": [parts(B)]}, ASKED),
    "parts whose text is called value": ({"prompt": [Q | {"content": [{"type": "text", "value": "2?"}]}], "chosen": [A],
                                          "rejected": [B]}, ASKED),
    "a system column beside messages": ({"system": "Be brief.", "prompt": [Q], "chosen": [A], "rejected": [B]},
                                        BRIEF + ASKED),
    "a system column, and a system message": ({"system": "Be long.", "chosen": [SYSTEM, Q, A],
                                               "rejected": [SYSTEM, Q, B]}, BRIEF + ASKED),
    "ShareGPT": ({"conversations": turns(("human", "2?")), "chosen": {"from": "gpt", "value": "4"},
                  "rejected": {"from": "gpt", "value": "five"}}, ASKED),
    "ShareGPT with a system column, answers as text": (
        {"system": "Be brief.", "conversations": turns(("human", "2?")), "chosen": "4", "rejected": "five"},
        BRIEF + ASKED),
    "ShareGPT within chosen and rejected": ({"chosen": turns(("human", "2?"), ("gpt", "4")),
                                             "rejected": turns(("human", "2?"), ("gpt", "five"))}, ASKED),
    "OpenAI": ({"input": {"messages": [Q], "tools": [], "parallel_tool_calls": True}, "preferred_output": [A],
                "non_preferred_output": [B]}, ASKED),
    "Alpaca": ({"instruction": "2?", "input": "", "chosen": "4", "rejected": "five"}, ASKED),
    "Alpaca with an input": ({"system": "Be brief.", "instruction": "2", "input": "?", "chosen": "4",
                              "rejected": "five"}, BRIEF + ASKED.replace("2?", "2\n?")),
    "rendered": ({"question": "2?", "text": ASKED + "4<|im_end|>\n", "worse-text": ASKED + "five<|im_end|>\n"}, ASKED),
}


@pytest.mark.parametrize("row, prompt", PAIRS.values(), ids=PAIRS)
def test_shapes_of_pairs(row, prompt, tmp_path):
    """Two tokens of chosen and five of rejected are scored, and nothing of the prompt."""
    example, = load(tmp_path, row).examples
    assert example.prompt == ids(prompt) and len(ids(ASKED)) == 21
    assert (example.chosen, example.rejected) == ([*b"4", 260], [*b"five", 260])
    assert scored_places(example.chosen) == range(2) and scored_places(example.rejected) == range(5)


# SFT: the row, the prompt's text, then what follows it, scored stretches and others in turn
ALL = ["4<|im_end|>", "\n" + AGAIN, "yes<|im_end|>"]
SFT = {
    "messages, one answer": ({"messages": [Q, A]}, ASKED, ALL[:1]),
    "messages, two answers": ({"messages": [Q, A, SURE, YES]}, ASKED, ALL),
    "an answer that is not to be trained on": ({"messages": [Q, A | {"weight": 0}, SURE, YES | {"weight": 1}]},
                                               ASKED + ALL[0] + ALL[1], ALL[2:]),
    "role and value": ({"messages": [{"role": m["role"], "value": m["content"]} for m in (Q, A, SURE, YES)]}, ASKED,
                       ALL),
    "the same in parts": ({"messages": [parts(Q), parts(A), parts(SURE), parts(YES)]}, ASKED, ALL),
    "ShareGPT": ({"conversations": turns(("system", "Be brief."), ("human", "2?"), ("gpt", "4"), ("human", "Sure?"),
                                         ("gpt", "yes"))}, BRIEF + ASKED, ALL),
    "questions with answers": ({"system": "Be brief.", "conversation": [{"human": "2?", "assistant": "4"},
                                                                        {"human": "Sure?", "assistant": "yes"}]},
                               BRIEF + ASKED, ALL),
    "a prompt with an answer in it": ({"prompt": [Q, A, SURE], "completion": [YES]},
                                      ASKED + ALL[0] + ALL[1], ALL[2:]),
    "a completion of two answers": ({"prompt": [Q], "completion": [A, SURE, YES]}, ASKED, ALL),
    "a prompt that the completion repeats": ({"prompt": [Q, A, SURE], "completion": [Q, A, SURE, YES]},
                                             ASKED + ALL[0] + ALL[1], ALL[2:]),
    "plain prompt and completion": ({"prompt": "2?", "completion": "4"}, "2?", ["4<|im_end|>"]),
    "Alpaca": ({"instruction": "2?", "input": "", "output": "4"}, ASKED, ALL[:1]),
    "Alpaca with all columns": ({"instruction": "2", "input": "?", "output": "yes", "system": "Be brief.",
                                 "history": [["2?", "4"]]},
                                BRIEF + ASKED + ALL[0] + "\n" + ASKED.replace("2?", "2\n?"), ALL[2:]),
    "query and response": ({"query": "2?", "response": "4", "history": []}, ASKED, ALL[:1]),
    "one text": ({"text": "A river."}, "A", [" river.<|im_end|>"]),
    "a rendered text": ({"text": ASKED + "4<|im_end|>\n" + AGAIN + "yes<|im_end|>\n"}, ASKED, ALL),
    "s1's text": ({"question": "2?", "text": BRIEF + ASKED + "<|im_start|>think\nhm<|im_start|>answer\n4<|im_end|>\n"},
                  BRIEF + ASKED, ["<|im_start|>think\nhm<|im_start|>answer\n4<|im_end|>"]),
}


@pytest.mark.parametrize("row, prompt, stretches", SFT.values(), ids=SFT)
def test_shapes_of_sft(row, prompt, stretches, tmp_path):
    """Every answer is scored, with its end of turn; what lies between answers is not. With --train_on last the last."""
    example, = load(tmp_path, row, loss="sft").examples
    assert example.prompt == ids(prompt) and example.chosen == ids("".join(stretches)) and example.rejected is None
    ends = [len(ids("".join(stretches[: i + 1]))) for i in range(len(stretches))]
    scored = [i for i in range(ends[-1]) if len([end for end in ends if end <= i]) % 2 == 0]
    assert [*scored_places(example.chosen)] == scored and len(scored) == {1: ends[-1], 3: 2 + 4}[len(stretches)]
    last, = load(tmp_path, row, loss="sft", train_on="last").examples
    assert last.prompt == ids(prompt + "".join(stretches[:-1])) and last.chosen == ids(stretches[-1])
    assert [*scored_places(last.chosen)] == [*range(len(last.chosen))] and example.last_answer() == last


def test_a_cut_leaves_what_is_scored_within_it(tmp_path):
    row = {"messages": [Q, A, SURE, YES]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    args = tiny.DataArguments(loss="sft", overlong="truncate")
    for room, chosen, scored in ((2 + 25 + 1, ALL[0] + ALL[1] + "y", [0, 1, 27]), (2 + 25, ALL[0], [0, 1]),
                                 (1, "4", [0])):
        data = load_dataset(str(path), read_template(tiny.chatml()), args, 21 + room, False)
        assert data.examples[0].chosen == ids(chosen) and data.examples[0].chosen.scored == scored


def test_the_last_answer_may_end_with_a_token_of_its_own(tmp_path):
    """As gpt-oss has it: each answer with the end that it has in the conversation."""
    tokenizer = tiny.chatml()
    tokenizer.chat_template = tiny.CHATML.replace(
        "<|im_end|>\n{% endfor %}", "{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}"
        "\n{% endfor %}")
    example, = load(tmp_path, {"messages": [Q, A, SURE, YES]}, tokenizer=tokenizer, loss="sft").examples
    assert example.prompt == ids(ASKED) and example.chosen == ids(ALL[0] + ALL[1] + "yes<|endoftext|>")
    assert [example.chosen[place] for place in example.chosen.scored] == ids("4<|im_end|>yes<|endoftext|>")


def test_inspect_puts_brackets_and_stars_on_what_is_scored_alone(tmp_path):
    tokenizer = tiny.chatml()
    text = inspect(load(tmp_path, {"messages": [Q, A, SURE, YES]}, loss="sft"), tokenizer, 100)
    assert "--- chosen: 21 prompt + 6 scored tokens, 25 others between them" in text
    assert ASKED + "[4][<|im_end|>]\n" + AGAIN + "[y][e][s][<|im_end|>]\n" in text
    # An answer of one token and its end, then the line break and the next turn, which are not scored.
    assert "10:'\\n'  *52:'4'  *260:'<|im_end|>'  10:'\\n'  259:'<|im_start|>'  117:'u'" in text


def test_another_choice_of_what_is_scored_is_another_data_set(tmp_path):
    """Its hash, by which a run is known again, tells them apart; without such a choice the hash is that of the ids."""
    row = {"messages": [Q, A, SURE, YES]}
    every, last = (load(tmp_path, row, loss="sft", train_on=which).examples for which in ("all", "last"))
    plain = [Example(0, every[0].prompt, [*every[0].chosen], None)]
    assert len({data_hash(every), data_hash(last), data_hash(plain)}) == 3
    ids = [numbers for numbers in (plain[0].prompt, plain[0].chosen, [])]
    assert data_hash(plain) == hashlib.sha256(b"".join(
        struct.pack(f"<{1 + len(numbers)}q", len(numbers), *numbers) for numbers in ids)).hexdigest()


def test_thoughts_that_a_template_leaves_out_of_earlier_answers_are_not_scored(tmp_path):
    """The tokens are those of the whole conversation, as the template writes it."""
    tokenizer = tiny.chatml()
    tokenizer.chat_template = tiny.CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}")
    row = {"messages": [Q, A | {"content": "<think>hm</think>4"}, SURE, YES]}
    data = load(tmp_path, row, tokenizer=tokenizer, loss="sft")
    assert data.examples[0].prompt == ids(ASKED) and data.examples[0].chosen == ids("".join(ALL))
    assert len(data.examples[0].chosen.scored) == 2 + 4
    assert data.notes == {"the chat template writes earlier answers differently; scored as in the conversation": 1,
                          "all of its answers are scored, and nothing between them": 1}


# Texts that begin alike


@pytest.mark.parametrize("chosen, rejected, split", [
    ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),  # within a word
    ("The sky is blue.", "The sky is not blue.", ("The sky is", " blue.", " not blue.")),
    ("Q: 2?\nA: 4", "Q: 2?\nA: 42", ("Q: 2?\nA:", " 4", " 42")),  # one answer begins as the other
    ("Q: 2?\n\n4", "Q: 2?\n\nfive", ("Q: 2?\n\n", "4", "five")),
    ("天空是蓝的", "天空是黑的", ("天空是", "蓝的", "黑的")),  # no spaces between words
    ("하늘은 파란색이다", "하늘은 파랗다", ("하늘은", " 파란색이다", " 파랗다")),  # Korean has some
    ("\n\nHuman: 2?\n\nAssistant: It is 4", "\n\nHuman: 2?\n\nAssistant: It is 5",
     ("\n\nHuman: 2?\n\nAssistant:", " It is 4", " It is 5")),  # whole answers
    ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
     "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
     ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d", " e")),
])
def test_the_prompt_of_two_texts_is_how_both_begin(chosen, rejected, split):
    assert split_pair(chosen, rejected) == split
    assert split_pair(rejected, chosen) == (split[0], split[2], split[1])


def test_a_side_that_is_the_beginning_of_the_other_is_named(tmp_path):
    row = {"chosen": "The sky is blue.", "rejected": "The sky is blue. Yes"}
    assert "chosen is the beginning of rejected, and there is no column of prompts" in error_of(tmp_path, row)
    row = {"chosen": row["rejected"], "rejected": row["chosen"]}
    assert "rejected is the beginning of chosen" in error_of(tmp_path, row)


def test_pairs_of_texts_without_a_prompt(tmp_path):
    """10 tokens of prompt, 7 and 8 of responses with their end. The report says what was done."""
    data = load(tmp_path, {"chosen": "The sky is blue.", "rejected": "The sky is black."}, tokenizer=tiny.plain())
    example, = data.examples
    assert (example.prompt, example.chosen, example.rejected) == (
        [*b"The sky is"], [*b" blue.", 258], [*b" black.", 258])
    assert data.notes["prompt = the text with which chosen and rejected begin"] == 1
    hh = {"chosen": "\n\nHuman: 2?\n\nAssistant: It is 4.", "rejected": "\n\nHuman: 2?\n\nAssistant: It is five."}
    data = load(tmp_path, hh)  # a chat model; plain text it stays, and that is said
    assert data.examples[0].prompt == [*b"\n\nHuman: 2?\n\nAssistant:"]
    assert data.examples[0].chosen == [*b" It is 4.", 260] and data.notes["plain text, without the chat template"] == 1


def test_a_column_that_may_be_the_prompt_is_asked_for(tmp_path):
    """Its answers begin alike by chance."""
    row = {"input": "2?", "chosen": "It is 4", "rejected": "It is 5"}
    assert "chosen has no prompt: name its column with --prompt_field" in error_of(tmp_path, row)
    assert load(tmp_path, row, prompt_field="input").examples[0].prompt == [*b"2?"]


def test_whole_conversations_need_no_column_beside_them(tmp_path):
    """The text of an instruction column beside them is no turn of the user, unless it is the same."""
    for column in ({"instruction": "Answer."}, {"instruction": "2?"}, {"conversations": turns(("human", "Hi"))}):
        example, = load(tmp_path, column | {"chosen": [Q, A], "rejected": [Q, B]}).examples
        assert example.prompt == ids(ASKED)


@pytest.mark.parametrize("row, words", [
    ({"chosen": "Yes", "rejected": "No"}, "have no beginning in common, and there is no column of prompts: name one"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "rejected": "\n\nHuman: a\n\nAssistant: x"},
     "chosen and rejected differ before their last answers"),
    ({"chosen": [Q, A, SURE, YES], "rejected": [Q, B, SURE, YES]},
     "chosen and rejected differ before their last answers, in message 1: what follows answers another conversation"),
    ({"prompt": [Q], "chosen": [A, SURE, YES], "rejected": [B, SURE, YES]}, "in message 0: what follows answers"),
    ({"prompt": [Q], "chosen": [A | {"content": [{"type": "image_url"}]}], "rejected": [B]},
     "row 0: chosen has a message with a part of type 'image_url', which a model of text can't read"),
    ({"conversations": turns(("human", "2?"), ("function_call", "f(2)")), "chosen": "4", "rejected": "5"},
     "has a tool call that can't be read as JSON"),
    ({"conversations": turns(("human", "2?"), ("gpt", "4")), "chosen": [], "rejected": "5"}, "chosen is an empty list"),
    ({"instruction": [], "chosen": "4", "rejected": "5"}, "chosen has a prompt that is an empty list"),
    ({"instruction": "2?", "input": {}, "chosen": [1], "rejected": "5", "system": "x"}, "chosen is of type list"),
    ({"query": "2?", "history": ["1?"], "chosen": "4", "rejected": "5"}, "a history that is not a list of [question"),
])
def test_what_can_be_no_pair_is_refused_in_clear_words(row, words, tmp_path):
    message = error_of(tmp_path, row)
    assert "rows.jsonl: 1 of 1 row can't be used; row 0: " in message and words in message


def test_a_text_prompt_stands_before_all_answers(tmp_path):
    """Also before a conversation that goes on."""
    example, = load(tmp_path, {"prompt": "2?", "completion": [A, SURE, YES]}, loss="sft").examples
    assert (example.prompt, example.chosen) == (ids(ASKED), ids("".join(ALL)))
    pair = {"prompt": "2?", "chosen": [A, SURE, YES], "rejected": [A, SURE, B]}
    example, = load(tmp_path, pair).examples
    assert example.prompt == ids(ASKED + ALL[0] + ALL[1]) and example.rejected == [*b"five", 260]


def test_answers_that_are_tokenised_apart(tmp_path):
    """Where nothing merges, --boundary concat changes nothing."""
    row = {"messages": [Q, A, SURE, YES]}
    apart, together = (load(tmp_path, row, loss="sft", boundary=how).examples for how in ("concat", "error"))
    assert apart == together and apart[0].chosen.scored == together[0].chosen.scored


@pytest.mark.parametrize("way", ["prepend", "first", "always"])
def test_answers_of_tokenizers_that_put_a_space_before_every_text(way, tmp_path):
    """The ids are those of the whole conversation; what is scored is Yes and its end, twice."""
    tokenizer = tiny.spaced(way)
    tokenizer.chat_template = ("{% for m in messages %}{{ '<a>' + m.content if m.role == 'user' else ':' + m.content + "
                               "'</s>' }}{% endfor %}{{ ':' if add_generation_prompt }}")
    talk = [{"role": role, "content": "Yes"} for role in ("user", "assistant")] * 2
    example, = load(tmp_path, {"messages": talk}, tokenizer=tokenizer, loss="sft").examples
    assert example.prompt + example.chosen == tokenizer.apply_chat_template(talk, return_dict=False)
    said = tokenizer.convert_ids_to_tokens([example.chosen[place] for place in example.chosen.scored])
    assert said == ["Yes", "</s>"] * 2


def test_each_text_without_a_prompt_is_a_problem_of_its_own(tmp_path):
    """Though their first tokens are the same; of equal texts there is one."""
    examples = load(tmp_path, *({"text": text} for text in ("A river.", "A lake.", "A river.")), loss="sft").examples
    first, second, third = (example.problem for example in examples)
    assert first == third != second


def test_a_last_answer_that_is_not_to_be_trained_on_is_refused(tmp_path):
    row = {"messages": [Q, A, SURE, YES | {"train": False}]}
    assert "ends with an answer that is marked as not to be trained on" in error_of(tmp_path, row, loss="sft")


def test_answers_with_scores_are_no_pairs_yet(tmp_path):
    row = {"instruction": "2?", "completions": [{"response": "4", "overall_score": 9}, {"response": "5"}]}
    for how in ({}, {"loss": "sft"}):
        assert "HuggingFaceH4/ultrafeedback_binarized::train_prefs" in error_of(tmp_path, row, **how)
    for row in ({"prompt": "2?", "completions": ["4", "5"], "ranks": [0, 1]},
                {"prompt": "2?", "answers": [{"answer": "4", "rank": 1}, {"answer": "5", "rank": 2}]},
                {"info": {}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}):
        assert "several answers a row with their scores" in error_of(tmp_path, row)


@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_a_label_of_unpaired_answers_is_not_passed_over(loss, tmp_path):
    """KTO's rows: what is labelled false would be trained on as good. Without such rows SFT takes them."""
    good, bad = ({"prompt": "2?", "completion": text, "label": text == "4"} for text in ("4", "5"))
    said = "1 of 2 with label false or 0; join a true and a false one"
    assert said in error_of(tmp_path, good, bad, loss=loss)
    texts = [row | {"label": str(row["label"])} for row in (good, bad)]  # as a CSV file that pandas wrote has them
    assert said in error_of(tmp_path, *texts, loss=loss)
    for one, nought in ((1, 0), ("1", "0"), (1.0, 0.0), (None, 0)):
        assert said in error_of(tmp_path, good | {"label": one}, bad | {"label": nought}, loss=loss)
    classes = [good | {"label": 2}, bad | {"label": 0}]  # of a text, say
    assert len(load(tmp_path, *classes, loss="sft").examples) == 2
    assert [e.chosen for e in load(tmp_path, good, loss="sft").examples] == [[*b"4", 260]]


@pytest.mark.parametrize("first, second, more", [
    ("human_ref_A", "human_ref_B", {"history": "2?", "labels": 1}), ("response_0", "response_1", {"prompt": "2?"}),
    ("answer_0", "answer_1", {"question": "2?", "score_0": 1.0, "score_1": 0.0}),
    ("response1", "response2", {"context": "2?", "overall_preference": -1}),
    ("conversation_a", "conversation_b", {"winner": "model_a"})])
@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_two_answers_of_which_another_column_names_the_better_are_no_pair_yet(loss, first, second, more, tmp_path):
    """The advice to name one of them as chosen would swap half of the pairs."""
    said = error_of(tmp_path, more | {first: "4", second: "5"}, loss=loss)
    assert f"has {first} and {second}, two answers a row" in said and "--chosen_field" not in said
    named = {"chosen_field": first, "rejected_field": second} if loss == "dpo" else {"chosen_field": first}
    assert len(load(tmp_path, {"prompt": "2?", first: "4", second: "5"}, loss=loss, **named).examples) == 1


# What a template is given beside the messages

CALLED = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]<|endoftext|>{% endfor %}"
TOOLED = ("{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
          "{% if loud is defined and loud %}LOUD;{% endif %}"
          + tiny.CHATML.replace("{{ m['content'] }}", "{{ m['content'] or '' }}" + CALLED).replace(
              "<|im_end|>\n{% endfor %}", "{{ '' if m.tool_calls else '<|im_end|>' }}\n{% endfor %}"))
ADD = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def tooled():
    tokenizer = tiny.chatml()
    tokenizer.chat_template = TOOLED
    return tokenizer


@pytest.mark.parametrize("tools", [ADD, json.dumps(ADD)])
def test_tools_go_to_the_template(tools, tmp_path):
    """As a list or as JSON, in a column or in OpenAI's input, for text answers, too; beside a row without any."""
    rows = [{"prompt": [Q], "chosen": [A], "rejected": [B], "tools": given} for given in (tools, None)]
    first, second = load(tmp_path, *rows, tokenizer=tooled()).examples
    assert first.prompt == ids("add;" + ASKED) and second.prompt == ids(ASKED)
    assert first.chosen == second.chosen == [*b"4", 260]
    text, = load(tmp_path, rows[0] | {"chosen": "4", "rejected": "five"}, tokenizer=tooled()).examples
    assert text == first
    openai = {"input": {"messages": [Q], "tools": ADD}, "preferred_output": [A], "non_preferred_output": [B]}
    assert load(tmp_path, openai, tokenizer=tooled()).examples == [first]
    message = error_of(tmp_path, rows[0])  # ChatML alone
    assert "row 0: chosen has the tool 'add', which the chat template does not write" in message
    assert "has tools that can't be read as JSON" in error_of(tmp_path, rows[0] | {"tools": "[{"}, tokenizer=tooled())
    assert "has tools of type dict; they must be a list" in error_of(tmp_path, rows[0] | {"tools": ADD[0]},
                                                                    tokenizer=tooled())


def test_a_call_of_a_tool_has_the_end_that_the_template_gives_it(tmp_path):
    """No second end follows it. ShareGPT's function_call and observation are a call and what the tool answers."""
    call = {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {}}}]}
    example, = load(tmp_path, {"prompt": [Q], "chosen": [call], "rejected": [B], "tools": ADD},
                    tokenizer=tooled()).examples
    assert example.chosen == ids("[add]<|endoftext|>") and example.rejected == ids("five<|im_end|>")
    talk = turns(("human", "2?"), ("function_call", '{"name": "add", "arguments": {}}'), ("observation", "4"))
    example, = load(tmp_path, {"conversations": talk, "chosen": "4", "rejected": "five", "tools": ADD},
                    tokenizer=tooled()).examples
    assert example.prompt == ids("add;" + ASKED + "[add]<|endoftext|>\n<|im_start|>tool\n4<|im_end|>\n"
                                 "<|im_start|>assistant\n")


def test_a_rows_own_options_of_the_template(tmp_path):
    row = {"prompt": [Q], "chosen": [A], "rejected": [B]}
    options = [{"loud": True}, '{"loud": true}', {"loud": False}, None]
    data = load(tmp_path, *(row | {"chat_template_kwargs": given} for given in options), tokenizer=tooled())
    loud, quiet = ids("LOUD;" + ASKED), ids(ASKED)
    assert [example.prompt for example in data.examples] == [loud, loud, quiet, quiet]
    assert "columns: prompt, chosen, rejected; with chat_template_kwargs" in data.report()
    for given, words in (("[1]", "of type list; they must be an object"), ({"tokenize": True}, "tokenize in chat_t")):
        assert words in error_of(tmp_path, row | {"chat_template_kwargs": given}, tokenizer=tooled())


# Columns


def test_columns_that_belong_to_the_prompt_are_used_or_named(tmp_path):
    """Of plain text nothing is put together that a file keeps apart; that is said."""
    orca = {"system": "Be brief.", "question": "2?", "chosen": "4", "rejected": "five"}
    data = load(tmp_path, orca)
    assert data.examples[0].prompt == [*b"2?"]
    assert data.notes["column system is not read; if it is part of what is asked, put it into the prompt"] == 1
    alpaca = {"instruction": "2", "input": "?", "output": "4", "system": ""}
    assert "columns: prompt = instruction, chosen = output; with input; not read: system" in load(
        tmp_path, alpaca, loss="sft").report()
    named = load(tmp_path, alpaca, loss="sft", prompt_field="instruction")
    assert named.examples[0].prompt == [*b"2"] and any("column input is not read" in note for note in named.notes)


# Lists of rows in one JSON object

ROW = {"prompt": "2?", "chosen": "4", "rejected": "five"}


@pytest.mark.parametrize("indent", [None, 2])
def test_rows_in_one_json_object(indent, tmp_path):
    """The one list of it, or the split that is named; an object that is a row is one."""
    file, args = tmp_path / "rows.json", tiny.DataArguments()

    def rows(name, content):
        file.write_text(json.dumps(content, indent=indent))
        return [e.row for e in load_dataset(f"{file}{name}", read_template(tiny.plain()), args, 1000, True).examples]

    assert rows("", {"train": [ROW, ROW]}) == rows("", {"data": [ROW, ROW]}) == [0, 1]
    assert rows("::test", {"train": [ROW, ROW], "test": [ROW]}) == [0]
    assert rows("", ROW) == [0]
    with pytest.raises(UserError, match=r"rows.json: holds several splits \(train, test\); name one, like .*::train"):
        rows("", {"train": [ROW], "test": [ROW]})
