"""The shipped world is what it says it is: right sums, true inverses, a clean split, and files that can be rebuilt."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from examples import piles

FOLDER = Path(piles.__file__).parent / "piles"
HEADER = "<|im_start|>assistant\n"
# Told once more in other terms, so that a slip in the generator's tables cannot hide in the test of them.
VERBS = [
    (r"(?:buys|finds) (\d+) more", lambda x, n: x + n, lambda x, n: x - n),
    (r"(?:gives away|loses) (\d+)", lambda x, n: x - n, lambda x, n: x + n),
    (r"doubles the pile()", lambda x, _: x * 2, lambda x, _: x / 2),
    (r"triples the pile()", lambda x, _: x * 3, lambda x, _: x / 3),
    (r"gives away half()", lambda x, _: x / 2, lambda x, _: x * 2),
]


@pytest.fixture(scope="module")
def parts():
    return {part: pq.read_table(FOLDER / f"{part}.parquet").to_pylist() for part in ("train", "test")}


@pytest.fixture(scope="module")
def rows(parts):
    return parts["train"] + parts["test"]


@pytest.fixture(scope="module")
def tokenizer():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(FOLDER / "start")


def read(question):
    """Reads a question as a person would: is it a forward one, what happens, and the pile from first to last."""
    form = r"\w+ has (\d+|some) \w+\. \w+ (.+?)\. (?:Now \w+ has (\d+) \w+\. )?How many \w+ .+\?"
    start, told, end = re.fullmatch(form, question).groups()
    events = []
    for event in re.fullmatch(r"first (.+), then (.+) and last (.+)", told).groups():
        [(kind, n)] = [(k, match[1]) for k, (verb, _, _) in enumerate(VERBS) if (match := re.fullmatch(verb, event))]
        events.append((kind, int(n or 0)))
    if start != "some":
        assert end is None
        values = [int(start)]
        for kind, n in events:
            values.append(VERBS[kind][1](values[-1], n))
    else:
        values = [int(end)]
        for kind, n in reversed(events):
            values.insert(0, VERBS[kind][2](values[0], n))
    return start != "some", tuple(events), values


def test_every_equation_holds_and_every_number_is_in_the_table(rows):
    count = 0
    for row in rows:
        for text in (row["text"], row["worse-text"]):
            equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text)
            assert len(equations) == text.count("=") == 6
            for left, sign, n, result in equations:
                left, n = int(left), int(n)
                assert int(result) == {"+": left + n, "-": left - n, "*": left * n, "/": left / n}[sign], text
                count += 1
            assert all(1 <= int(number) <= 99 for number in re.findall(r"\d+", text))
    assert count == 6 * 2 * 2400


def test_the_relevant_question_is_the_true_inverse(rows):
    for row in rows:
        (forward, events, values), inverse = read(row["question"]), read(row["relevant-question"])
        assert inverse == (not forward, events, values), "the same pile, told from its other end"
        assert forward == (row["sample_type"] == "original")


def test_a_chain_visits_the_pile_in_order_and_gives_the_answer(rows):
    for row in rows:
        for text, question in ((row["text"], row["question"]), (row["worse-text"], row["relevant-question"])):
            forward, _, values = read(question)
            path = values if forward else values[::-1]
            solution, check = text.split(HEADER)[1].split("Check:")
            assert [int(n) for n in re.findall(r"= (\d+)", solution)] == path[1:]
            assert [int(n) for n in re.findall(r"= (\d+)", check)] == path[-2::-1]
            assert text.endswith(f"\n<|im_start|>answer\nThe answer is {int(path[-1])}.<|im_end|>\n")


def test_rows_come_in_mirrored_pairs(parts):
    assert (len(parts["train"]), len(parts["test"])) == (2000, 400)
    for part in parts.values():
        for original, flipped in zip(part[::2], part[1::2], strict=True):
            assert original["question"] == flipped["relevant-question"]
            responses = [[row[key].split(HEADER)[1] for key in ("text", "worse-text")] for row in (original, flipped)]
            assert responses[0] == responses[1][::-1]


def test_no_problem_is_in_two_places(parts):
    """A problem counts as the same whoever has the pile, whatever is in it, and whichever end is asked for."""

    def problems(texts):
        return [(values[0], events) for _, events, values in map(read, texts)]

    train, test = (problems([row["question"] for row in parts[part][::2]]) for part in ("train", "test"))
    assert len(set(train + test)) == 1200
    prompts = [text.split("<|im_end|>")[0].split("user\n") for text in piles.corpus(0, 2000)]
    assert not set(problems([prompt[1] for prompt in prompts if len(prompt) > 1])) & set(train + test)


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_shipped_files_can_be_rebuilt(part, tmp_path):
    piles.write(piles.dataset(0, part)[0], tmp_path / "again.parquet")
    assert pq.read_table(tmp_path / "again.parquet").equals(pq.read_table(FOLDER / f"{part}.parquet"))


def test_directions_divide_the_mixed_set(parts):
    for direction, kind in (("forward", "original"), ("reverse", "flipped")):
        assert piles.dataset(0, "test", direction)[0] == [row for row in parts["test"] if row["sample_type"] == kind]


def test_the_corpus_repeats_itself_and_leaves_out_some_prompts():
    documents = piles.corpus(1, 300)
    assert documents == piles.corpus(1, 300) and documents != piles.corpus(2, 300)
    assert 0 < sum(document.startswith(HEADER) for document in documents) < 300


def test_the_template_renders_the_texts(rows, tokenizer):
    for row in rows[::20]:
        for text in (row["text"], row["worse-text"]):
            prompt, response = text.split(HEADER)
            user = {"role": "user", "content": row["question"]}
            whole = [user, {"role": "assistant", "content": response.removesuffix("<|im_end|>\n")}]
            assert tokenizer.apply_chat_template(whole, tokenize=False) == text
            rendered = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
            assert rendered == prompt + HEADER
    assert tokenizer.apply_chat_template(whole[1:], tokenize=False) == HEADER + response


def test_tokens(rows, tokenizer):
    numbers = [tokenizer(f" {n}")["input_ids"] for n in range(100)]
    assert all(len(ids) == 1 for ids in numbers)
    assert len({ids[0] for ids in numbers}) == 100
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    for row in rows[::20]:
        ids = tokenizer(row["text"])["input_ids"]
        assert tokenizer.decode(ids) == row["text"]
        # The number of the answer is the very token that the chain has computed last.
        assert len(ids) < 200 and ids[-4] in ids[:-8] and [ids[-4]] in numbers
        assert ids.count(tokenizer.eos_token_id) == 2, "one end of turn each, a single token"


def test_the_config_fits_the_tokenizer(tokenizer):
    config = json.loads((FOLDER / "start" / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["vocab_size"] == len(tokenizer)
    assert (config["eos_token_id"], config["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_the_floor_is_the_log_prob_of_the_words():
    """A list of four openers costs ln 4, whichever is drawn, and a repeated aside is as likely as it is frequent."""
    writer = piles.Writer(piles.random.Random(0))
    writer.pick(["a", "b", "c", "d"])
    assert writer.logp == pytest.approx(-piles.math.log(4))
    writer = piles.Writer(piles.random.Random(0))
    drawn = writer.pick(["", "", "", "x"])
    assert writer.logp == pytest.approx(piles.math.log(0.25 if drawn else 0.75))
