"""How fast a preference data set is prepared, and in how much memory: rows of the size of UltraFeedback's.

    python bench/data.py [--rows 5000] [--tokenizer examples/piles/sft]

Rows are drawn from the words of the shipped puzzles: prompts of 100 words, responses of 250 and 200, as message lists
in a Parquet file. Prints seconds and the growth of the process's peak memory, for these rows and for 61,000 of them.
"""

import argparse
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from nanodpo.data.template import read_template  # noqa: E402
from nanodpo.data.tokens import load_dataset  # noqa: E402
from nanodpo.errors import run_script  # noqa: E402
from nanodpo.flags.arguments import parse  # noqa: E402
from nanodpo.model.source import open_source  # noqa: E402

WHOLE = 61_000  # rows of UltraFeedback


def make_rows(count: int) -> pandas.DataFrame:
    words = " ".join(pandas.read_parquet(ROOT / "examples" / "piles" / "train.parquet")["text"]).split()
    words = [word for word in words if "<" not in word]  # no special tokens of a chat template
    draw = random.Random(0)

    def text(length: int) -> str:
        start = draw.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    def conversation(prompt: str, length: int) -> list[dict]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text(length)}]

    prompts = [text(100) for _ in range(count)]
    return pandas.DataFrame({"prompt": prompts, "chosen": [conversation(prompt, 250) for prompt in prompts],
                             "rejected": [conversation(prompt, 200) for prompt in prompts]})


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--tokenizer", default=str(ROOT / "examples" / "piles" / "sft"))
    known = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.parquet"
        make_rows(known.rows).to_parquet(file)
        args = parse(["--model_name", known.tokenizer, "--train_file_path", str(file)], file)
        template = read_template(open_source(known.tokenizer, False).tokenizer, None)
        before, began = peak_mib(), time.perf_counter()
        data = load_dataset(str(file), template, args, 10**6, pairs=True)
        seconds, mib = time.perf_counter() - began, peak_mib() - before
    tokens = sum(len(e.prompt) + len(e.chosen) + len(e.rejected) for e in data.examples) / known.rows
    more = WHOLE / known.rows
    print(f"{known.rows} rows of {tokens:.0f} tokens: {seconds:.1f} s, {mib:.0f} MiB more at the peak; "
          f"{WHOLE} rows by this rate: {more * seconds:.0f} s, {more * mib / 1024:.1f} GiB")


if __name__ == "__main__":
    sys.exit(run_script(main))
