"""How fast a preference data set is prepared, and in how much memory: rows of the size of UltraFeedback's.

    python bench/data.py [--rows 61000] [--tokenizer examples/piles/sft]

Rows are drawn from the words of the shipped puzzles: prompts of 100 words, responses of 250 and 200, as message lists
in a Parquet file. Three fresh processes read it: the first prepares it, the second finds it in the cache, the third
prepares it without forks and cache. Prints for each the seconds, those of its processors, and the growth of its peak
memory.
"""

import argparse
import functools
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from nanodpo.data import prepared  # noqa: E402
from nanodpo.data.template import read_template  # noqa: E402
from nanodpo.data.tokens import load_dataset  # noqa: E402
from nanodpo.errors import run_script  # noqa: E402
from nanodpo.flags.arguments import parse  # noqa: E402
from nanodpo.folder import data_cache  # noqa: E402
from nanodpo.model.source import open_source  # noqa: E402


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


def used() -> tuple[float, float, float, float]:
    """Seconds, processor seconds of this process and its forks, peak memory of this one and of the largest fork, MiB.
    """
    own, forks = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    spent = sum(each.ru_utime + each.ru_stime for each in (own, forks))
    # ru_maxrss of this process is also that of the one that started it.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return time.perf_counter(), spent, int(peak.split()[1]) / 2**10, forks.ru_maxrss / 2**10


def read(file: str, tokenizer: str, cache: str | None) -> str:
    args = parse(["--model_name", tokenizer, "--train_file_path", file], Path(file))
    template = read_template(open_source(tokenizer, False).tokenizer, None)
    keep = cache and functools.partial(data_cache.keep, cache)
    prepared.cores = prepared.cores if cache else lambda alone: 1
    before = used()
    data = load_dataset(file, template, args, 10**6, pairs=True, keep=keep)
    after = used()
    seconds, spent, peak, _ = (b - a for a, b in zip(before, after))
    tokens = sum(len(e.prompt) + len(e.chosen) + len(e.rejected) for e in data.examples) / len(data.examples)
    forks = f", the largest fork {after[3]:.0f} MiB" if after[3] else ""
    return (f"{len(data.examples)} rows of {tokens:.0f} tokens: {seconds:.1f} s, {spent:.1f} s of processors; memory "
            f"{before[2]:.0f} MiB, {peak:.0f} MiB more at the peak{forks}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=61_000)
    parser.add_argument("--tokenizer", default=str(ROOT / "examples" / "piles" / "sft"))
    known = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "pairs.parquet")
        make_rows(known.rows).to_parquet(file)
        for name, cache in (("first start", folder), ("second start", folder), ("one process, no cache", None)):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # its peak is its own
                print(f"{name}: {process.submit(read, file, known.tokenizer, cache).result()}", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main))
