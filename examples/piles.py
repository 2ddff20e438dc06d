"""Piles: a tiny world of forward and reverse word problems, the data that nanodpo trains on out of the box.

A forward problem gives the start of a pile and asks for its end; its inverse gives the end and asks for the start. Each
has a chain of thought that works its way through the events, onward or backward. Everything here is a pure function of
the seed, so the shipped files can be rebuilt and checked:

    python examples/piles.py                                  # train.parquet and test.parquet in examples/piles
    python examples/piles.py --tokenizer                      # and start/: tokenizer and config of the tiny model
    python examples/piles.py --corpus --out runs/base         # and the corpus that its base model is trained on
    python examples/piles.py --direction forward --out runs/forward
"""

import argparse
import math
import random
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

TRAIN_PROBLEMS, TEST_PROBLEMS, CORPUS_DOCUMENTS = 1000, 200, 44_000
LARGEST = 99  # a number is one token, so the model learns a table of sums; the table has to stay small
COLUMNS = ("question", "text", "worse-text", "relevant-question", "sample_type")  # the paper's

# Three-letter names, of which a tokenizer makes one token each.
PEOPLE = {"Ivy": "she", "Ben": "he", "Ana": "she", "Tom": "he", "Mia": "she", "Max": "he",
          "Eva": "she", "Leo": "he", "Zoe": "she", "Sam": "he", "Kim": "she", "Dan": "he"}  # fmt: skip
ITEMS = ["books", "coins", "stamps", "shells", "cards", "marbles", "apples", "stones", "pens", "buttons"]


class Event(NamedTuple):
    # Multiplying and dividing are rarer: they reach the edge of the table fast.
    weight: int
    sign: str
    undo: str
    amounts: range
    told: list[str]


EVENTS = {
    "add": Event(4, "+", "-", range(2, 10), ["buys {n} more", "finds {n} more"]),
    "subtract": Event(4, "-", "+", range(2, 10), ["gives away {n}", "loses {n}"]),
    "double": Event(2, "*", "/", range(2, 3), ["doubles the pile"]),
    "triple": Event(1, "*", "/", range(3, 4), ["triples the pile"]),
    "halve": Event(1, "/", "*", range(2, 3), ["gives away half"]),
}

# The first entry of each list is the plain wording, most of what the base model reads; the data draw evenly, so that
# fine-tuning has a style to learn as well as a direction. Opener, plan, check and answer read the same in both
# directions, which keeps them close for a model trained on both; the tense of the steps tells them apart for one that
# has seen only the other.
ORDER = "first {}, then {} and last {}"  # a tiny model counts badly, so question, plan and steps all number the events
OPENERS = ["Let me think.", "Okay, let me see.", "Alright, step by step.", "Let's work it out."]
CONNECTIVES = [["First", "To begin", "To start"], ["Then", "Next", "After that"], ["Last", "Finally", "At last"]]
STEPS = ["{eq}.", "we get {eq}.", "the pile is {eq}.", "{name} has {eq}.", "{they} has {eq}."]
STEPS_BACK = ["{eq}.", "it was {eq}.", "the pile was {eq}.", "{name} had {eq}.", "{they} had {eq}."]
ASIDES = [""] * 6 + [" Wait.", " Hmm.", " Okay."]  # repeats make an entry likelier: one step in three has an aside
STARTS = ["{name} starts with {n}.", "At first there are {n}.", "The first pile is {n}."]
ENDS = ["{name} ends with {n}.", "In the end there are {n}.", "The last pile is {n}."]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Problem(NamedTuple):
    name: str
    item: str
    start: int
    events: tuple[tuple[str, int], ...]

    @property
    def numbers(self):
        """Name and item are decoration: two problems with the same numbers are the same problem."""
        return self.start, self.events

    @property
    def onward(self):
        return [(EVENTS[kind].sign, n) for kind, n in self.events]

    @property
    def backward(self):
        return [(EVENTS[kind].undo, n) for kind, n in reversed(self.events)]

    @property
    def end(self):
        return walk(self.start, self.onward)[1]


class Writer:
    """Draws wordings and adds up how likely they were, which is what makes the floor of the loss known."""

    def __init__(self, rng, plain=0.0):
        self.rng, self.plain, self.logp = rng, plain, 0.0

    def pick(self, options):
        # Distinct entries give distinct texts, so the probability of the choice is that of the text.
        choice = options[0] if self.rng.random() < self.plain else self.rng.choice(options)
        even = options.count(choice) / len(options)
        self.logp += math.log((1 - self.plain) * even + self.plain * (choice == options[0]))
        return choice


def apply(value, sign, n):
    """The result of one step, or None where it is no whole number or leaves the table."""
    # Dividing only where it is exact is what makes every problem invertible.
    if sign == "/" and value % n:
        return None
    result = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[sign]
    return result if 1 <= result <= LARGEST else None


def draw_events(rng, value, count):
    events = []
    while len(events) < count:
        kind = rng.choices(list(EVENTS), [event.weight for event in EVENTS.values()])[0]
        n = rng.choice(EVENTS[kind].amounts)
        result = apply(value, EVENTS[kind].sign, n)
        if result is not None:
            events.append((kind, n))
            value = result
    return tuple(events)


def draw_problem(rng):
    start = rng.randint(2, 30)
    return Problem(rng.choice(list(PEOPLE)), rng.choice(ITEMS), start, draw_events(rng, start, 3))


def split(seed):
    """Distinct problems for training and testing; a problem stands for both of its directions."""
    # A string seeds each stream by its hash, so that streams of one seed have nothing in common.
    rng, found = random.Random(f"problems {seed}"), {}
    while len(found) < TRAIN_PROBLEMS + TEST_PROBLEMS:
        problem = draw_problem(rng)
        found.setdefault(problem.numbers, problem)
    found = list(found.values())
    return {"train": found[:TRAIN_PROBLEMS], "test": found[TRAIN_PROBLEMS:]}


def walk(value, steps):
    """The equations of a chain, and where it ends."""
    equations = []
    for sign, n in steps:
        result = apply(value, sign, n)
        equations.append(f"{value} {sign} {n} = {result}")
        value = result
    return equations, value


def questions(problem, rng):
    """The problem told forward and in reverse, in the same words."""
    # The events read the same both ways: only what is given and what is asked for says which way to go.
    name, item, they = problem.name, problem.item, PEOPLE[problem.name].capitalize()
    told = ORDER.format(*(rng.choice(EVENTS[kind].told).format(n=n) for kind, n in problem.events))
    forward = f"{name} has {problem.start} {item}. {they} {told}. How many {item} does {name} have now?"
    reverse = f"{name} has some {item}. {they} {told}. Now {name} has {problem.end} {item}. "
    return forward, reverse + f"How many {item} did {name} have at first?"


def chain(problem, forward, writer):
    """One response: think and answer sections inside one assistant turn, as in the paper's traces."""
    words = {"name": problem.name, "they": PEOPLE[problem.name]}
    if forward:
        first, steps, checks = problem.start, problem.onward, problem.backward
        heads, forms, tails = STARTS, STEPS, ENDS
    else:
        first, steps, checks = problem.end, problem.backward, problem.onward
        heads, forms, tails = ENDS, STEPS_BACK, STARTS
    equations, last = walk(first, steps)

    # The plan lists the events as they were told, also for the reverse chain, which then undoes them last to first:
    # up to here the two chains of a problem are alike, and a model that writes one has not yet refused the other.
    plan = ORDER.format(*(f"{sign} {n}" for sign, n in problem.onward))
    lines = [f"{writer.pick(OPENERS)} The steps are {plan}. {writer.pick(heads).format(n=first, **words)}"]
    for equation, connectives in zip(equations, CONNECTIVES):
        step = writer.pick(connectives) + " " + writer.pick(forms).format(eq=equation, **words)
        lines.append(step + writer.pick(ASIDES))
    # The check runs the other way, so that each chain shows the equations of both.
    check = ", ".join(walk(last, checks)[0])
    lines.append(f"{writer.pick(tails).format(n=last, **words)} Check: {check}.")
    # A space before the answer's number keeps it the token that the chain has just computed.
    return "<|im_start|>think\n" + "\n".join(lines) + f"\n<|im_start|>answer\nThe answer is {last}."


def render(response, question=None):
    """The transcript as the chat template writes it; without a question there is no user turn."""
    user = f"<|im_start|>user\n{question}<|im_end|>\n" if question else ""
    return f"{user}<|im_start|>assistant\n{response}<|im_end|>\n"


def dataset(seed, part, direction="mixed"):
    """Rows of one part, and the log-prob of each chosen response under the process that wrote it."""
    rng, rows, logps = random.Random(f"{part} {seed}"), [], []
    for problem in split(seed)[part]:
        told, writers = questions(problem, rng), (Writer(rng), Writer(rng))
        chains = chain(problem, True, writers[0]), chain(problem, False, writers[1])
        for right, kind in enumerate(("original", "flipped")):
            # One direction is drawn along with the other and left out here, so the three sets share their wordings.
            if direction in ("mixed", "forward" if kind == "original" else "reverse"):
                text, worse = (render(chains[side], told[right]) for side in (right, 1 - right))
                rows.append(dict(zip(COLUMNS, (told[right], text, worse, told[1 - right], kind))))
                logps.append(writers[right].logp)
    return rows, logps


def floor(tokenizer, seed=0, part="test", direction="mixed"):
    """Log-prob per token of the chosen responses under the process that wrote them, averaged as a figure averages them.

    The wording is random and all else follows from the question, so this is what a perfect model would reach.
    """
    rows, logps = dataset(seed, part, direction)
    # The end of turn counts as a token, as it does for the trainer; the newline after it belongs to the template.
    responses = [row["text"].split("<|im_start|>assistant\n")[1].removesuffix("\n") for row in rows]
    return sum(logp / len(tokenizer(r)["input_ids"]) for r, logp in zip(responses, logps, strict=True)) / len(rows)


def corpus(seed, count=CORPUS_DOCUMENTS):
    """The texts for the base model: the same world in plain wording, and none of the problems of train or test."""
    rng = random.Random(f"corpus {seed}")
    held_out = {problem.numbers for part in split(seed).values() for problem in part}
    documents = []
    while len(documents) < count:
        problem, share = draw_problem(rng), rng.random()
        if problem.numbers in held_out:
            continue
        if share < 0.25:
            # Sums by themselves, each going on from the last: the cheapest way to learn the table.
            value = rng.randint(1, LARGEST)
            steps = [(EVENTS[kind].sign, n) for kind, n in draw_events(rng, value, 20)]
            documents.append(render("Sums: " + ", ".join(walk(value, steps)[0]) + "."))
        else:
            # The direction of the chain has nothing to do with the question, so the base model can write either: that
            # a question calls for one of them is what the fine-tuning has to teach. A few have no question at all.
            response = chain(problem, rng.random() < 0.5, Writer(rng, plain=0.6))
            documents.append(render(response, rng.choice(questions(problem, rng)) if share < 0.9 else None))
    return documents


def write_start(folder, seed):
    """Tokenizer and config of the tiny model, from which the base model starts with random weights."""
    # Imported here: the data alone need no transformers.
    from transformers import AddedToken, Qwen2Config, Qwen2TokenizerFast

    # Transformers gives every model of type qwen2 this class, which splits text in its own way whatever the file says.
    blank = Qwen2TokenizerFast(
        eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )  # the end of turn must be learnt, so no pad
    rows = dataset(seed, "train")[0]
    texts = [text for row in rows for text in (row["text"], row["worse-text"])]
    fast = blank.train_new_from_iterator(
        texts, 1024, new_special_tokens=["<|im_start|>"], min_frequency=100, show_progress=False
    )
    # That way takes numbers apart, digit by digit, and a tiny model adds digits badly: so every number is a token,
    # together with the space before it, which in this world every number has.
    fast.add_tokens([AddedToken(f" {n}", normalized=False) for n in range(LARGEST + 1)])
    fast.model_max_length = 1024
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    config = Qwen2Config(vocab_size=len(fast), tie_word_embeddings=True, **sizes, **heads, **ids)
    config.architectures = ["Qwen2ForCausalLM"]
    # Wider than the usual 0.02, from which so small a model takes far longer to get going.
    config.initializer_range = 0.04
    config.save_pretrained(folder)


def write(rows, path):
    # The hardest compression: these files live in the repository.
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd", compression_level=19)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "piles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--direction", choices=["mixed", "forward", "reverse"], default="mixed")
    parser.add_argument("--corpus", action="store_true", help="also write the base model's corpus.parquet")
    parser.add_argument("--tokenizer", action="store_true", help="also write start/, tokenizer and config")
    args = parser.parse_args()
    if args.direction != "mixed" and args.out == parser.get_default("out"):
        parser.error("one direction alone would replace the shipped files: say where it should go with --out")
    args.out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        write(dataset(args.seed, part, args.direction)[0], args.out / f"{part}.parquet")
    if args.corpus:
        write([{"text": text} for text in corpus(args.seed)], args.out / "corpus.parquet")
    if args.tokenizer:
        write_start(args.out / "start", args.seed)


if __name__ == "__main__":
    main()
