"""Fixtures of several test files: a tiny model and tokenizer made on the spot, and launches of the real scripts."""

import atexit
import functools
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported; two test processes share the cores
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: the hub's library looks when it is imported

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def make_tokenizer():
    """Byte-level, one token a byte, ChatML; the pad token is not the end of turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=["<|im_start|>"])
    fast.chat_template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    return fast


def make_model(seed: int = 0, tied: bool = True, dtype=torch.float32, width: int = 32):
    """A random Llama of 2 layers; its vocabulary is padded past make_tokenizer's 259, as real ones are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=264, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, eos_token_id=258,
        pad_token_id=256)).to(dtype)


@pytest.fixture(scope="module", autouse=True)
def libraries_are_no_garbage():
    """A run in this process collects garbage before it loads a model: without what was there before, in no time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a model (model/), an untied one (untied/) and pairs of ragged lengths (train.jsonl, 11 rows)."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, tied in (("model", True), ("untied", False)):
        make_model(tied=tied).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"What is {i}+{i}? ", "chosen": f"It is {2 * i}, " + "sure " * (i % 4),
             "rejected": "No idea" + "!" * (3 * i + 1)} for i in range(11)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def environment() -> dict[str, str]:
    """Of a process that no launcher started yet, whatever this one was told."""
    told = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in told}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # where optional packages may be
    return clean | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def launch(*arguments, ranks: int = 1, launcher: str = "python", check: bool = True, cwd=ROOT):
    """Runs a script as a user would ("python", which is torchrun for several ranks, "deepspeed", "torchrun"), or by
    "fork". Returns the finished process, its output as text; of forks both kinds of it in both."""
    if launcher == "fork":
        codes, said = forked(*arguments, ranks=ranks, cwd=cwd)
        done = subprocess.CompletedProcess(arguments, max(codes), said, said)
    else:
        port = str(20000 + (os.getpid() * 7 + next(NUMBERS) * 13) % 20000)  # side by side with other test processes
        start = {"python": [sys.executable], "deepspeed": [str(Path(sys.executable).with_name("deepspeed")),
                                                           "--num_gpus", str(ranks), "--master_port", port],
                 "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
                              "--master_port", port]}["torchrun" if launcher == "python" and ranks > 1 else launcher]
        done = subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, env=environment(),
                              cwd=cwd, timeout=600)
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


NUMBERS = itertools.count()


@functools.cache
def fork_server() -> tuple[subprocess.Popen, Path]:
    """A process that has imported the libraries, and a folder for what its forks print."""
    server = subprocess.Popen([sys.executable, ROOT / "tests" / "forking.py"], env=environment(), text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    folder = tempfile.TemporaryDirectory()
    atexit.register(lambda: (server.stdin.close(), server.wait(30), server.stdout.close(), folder.cleanup()))
    return server, Path(folder.name)


def forked(*arguments, ranks: int = 1, cwd=ROOT) -> tuple[list[int], str]:
    """A script on ranks that are forks, which start ten times as fast: exit codes by rank, and what all printed. It
    draws figures, and makes a page, only where its flags have --draw."""
    server, folder = fork_server()
    log = folder / f"{next(NUMBERS)}.log"
    server.stdin.write(json.dumps([[str(x) for x in arguments], ranks, str(log), str(cwd)]) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline()), log.read_text()


def train(tiny: Path, output: Path, *flags, model: str = "model", launcher: str = "fork", **how) -> list[dict]:
    """A run of train.py on the tiny model; returns the lines of its metrics.jsonl."""
    launch(ROOT / "train.py", "--model_name", tiny / model, "--train_file_path", tiny / "train.jsonl", "--output_dir",
           output, "--cache_dir", output.parent / "cache", "--draw", "false", *flags, launcher=launcher, **how)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict]) -> list[dict]:
    """Lines of metrics.jsonl without what no two runs have in common: times and memory."""
    return [{name: value for name, value in line.items() if not name.startswith(("perf/", "mem/"))} for line in lines]


def lines_of(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without times and memory."""
    return without_times([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])


def zero(folder: Path, stage: int) -> Path:
    """A DeepSpeed file with this ZeRO stage; the third lets go of every weight, also the smallest, as it does of large
    ones."""
    file = folder / f"zero{stage}.json"
    more = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    file.write_text(json.dumps({"zero_optimization": {"stage": stage} | more}))
    return file


@pytest.fixture
def stand_in(tmp_path):
    """stand_in(name, text): a shell's script in tmp_path, in place of a command that is not there."""

    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
        return tmp_path / name

    return write


@pytest.fixture
def another_user(tmp_path, monkeypatch):
    """another_user(): makes this process one of a user who owns nothing, until os.seteuid(0) or the test's end. It is
    in tmp_path, since it would not be let through the folders above."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    yield lambda: os.seteuid(65534)
    os.seteuid(0)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB; small_disk / "filler" takes what a test wants to be gone."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)
