"""The model or adapter that a run starts from: its config and tokenizer, and checks of its files, without its weights.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import re
import struct
import warnings
from logging.handlers import MemoryHandler
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from ..errors import UserError, first_line
from ..files import check_regular, read_text, why
from .hub import commit_of, place_of

# The errors that libraries raise where a file of a model is broken or a setting in it makes no sense.
BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, ArithmeticError,
          AssertionError, EOFError, struct.error, pickle.UnpicklingError, re.error, SafetensorError,
          StrictDataclassError)


@dataclasses.dataclass
class Source:
    """Where a run starts: a base model and, perhaps, an adapter on it."""

    base: str
    adapter: str | None
    config: object
    tokenizer: object

    @property
    def stored(self) -> dict | None:
        """How bitsandbytes has quantised the weights on disk; None where they are not."""
        return getattr(self.config, "quantization_config", None)

    @property
    def context(self) -> int | None:
        """The longest sequence the model's config allows, in tokens."""
        config = self.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("longrope", "dynamic"):
            # Past this length these scale positions by the longest sequence of the row, so a log-prob would depend on
            # its neighbours.
            return rope.get("original_max_position_embeddings") or config.max_position_embeddings
        return getattr(config, "max_position_embeddings", None)


@contextlib.contextmanager
def hold_logs():
    """Holds the log of transformers until the end of the block, and drops it where the block raises an error, which
    then is the only message."""
    logger = logging.getLogger("transformers")
    handlers, held = logger.handlers, MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)
    passed_on, logger.propagate = logger.propagate, False  # transformers sets it where the environment has CI
    logger.handlers = [held]
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, passed_on
    for record in held.buffer:
        logger.handle(record)


def _missing(place: Path) -> str:
    """In words, that a folder is not there, and which are beside it; empty where it is there, or may be a hub id."""
    if os.path.exists(place) or not os.path.isdir(place.parent) or len(place.parts) < 2:  # which refuse no name
        return ""
    beside = []
    with contextlib.suppress(OSError):  # of a folder that nobody may look into
        beside = sorted(folder.name for folder in place.parent.iterdir() if folder.is_dir())
    return f"{place.parent} has no {place.name}" + f"; it has {', '.join(beside[:12])}" * bool(beside)


def open_source(name: str, trust_remote_code: bool) -> Source:
    """Reads config and tokenizer of a model or adapter, without its weights. Raises UserError for a file that is
    missing or broken."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for every file read or written, on every rank
    # Names that transformers 6 will drop; PEFT and the range of releases supported here still need them.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
    # PEFT imports bitsandbytes wherever it is installed, which warns then of a kernel for CPUs that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").disabled = True
    base, adapter = base_of(name)
    has_tokenizer = adapter and (Path(adapter) / "tokenizer_config.json").is_file()
    where, what = name if base == name else f"{name}: its base {base}", "config.json"
    with hold_logs():
        try:
            place = place_of(base)
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
            vocabulary, what = config.get_text_config().vocab_size, "the tokenizer"
            quantised = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
            tokenizer = AutoTokenizer.from_pretrained(adapter if has_tokenizer else place,
                                                      trust_remote_code=trust_remote_code)
            tokenizer("a")  # settings of a wrong type may raise only here
        except BROKEN as error:
            moved = (f". If the base has moved, write its place into {Path(adapter or '') / 'adapter_config.json'}, "
                     "base_model_name_or_path, and take that file's entry out of manifest.json beside it"
                     ) * bool(adapter and what == "config.json")
            no_folder = f"there is no folder {base}, and on the hub: " * (not os.path.exists(base))
            reason = _missing(Path(base)) or no_folder + first_line(error, 2 if no_folder else 1)
            raise UserError(f"model {where}: {what} can't be opened: {reason}{moved}") from error
        check_attention(config, where)
        if quantised and not (isinstance(quantised, dict) and quantised.get("quant_method") == "bitsandbytes"):
            raise UserError(f"model {where}: its weights are quantised (quantization_config in config.json), and only "
                            "those of bitsandbytes are supported; name the model that they come from")
        check_weight_files(name)
        if vocabulary < 1:
            raise UserError(f"model {where}: config.json says vocab_size {vocabulary}; it must be above 0")
        source = Source(base, adapter, config, tokenizer)
        if source.context is not None and source.context < 1:
            raise UserError(f"model {where}: config.json says max_position_embeddings {source.context}; it must "
                            "be above 0")
    return source


def check_attention(config, where: str) -> None:
    """Raises UserError for a config.json that names code on the Hub for attention, which transformers would fetch and
    run without trust_remote_code."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if "/" in (asked := str(getattr(part, "_attn_implementation", ""))):
            raise UserError(f"model {where}: config.json asks for attention by code from the Hub ({asked}), which is "
                            "not run; take attn_implementation out of it")


def check_weight_files(name: str) -> None:
    """Raises UserError for a model or adapter without weights, or with a broken file of them; reads their heads."""
    base, adapter = base_of(name)
    folder = Path(adapter or place_of(base))
    _check_files(folder)
    if adapter and not any((folder / f"adapter_model.{kind}").exists() for kind in ("safetensors", "bin")):
        raise UserError(f"model {name}: has adapter_config.json, but no adapter_model.safetensors")


def check_reference(source: Source, reference: Source, name: str, path: str, examples) -> None:
    """Raises UserError where the model `reference`, called `name`, can't read these examples' token ids, which the
    policy's tokenizer gave, as the same text: another token has the id, or a row is longer than its context."""
    checked = set()
    for example in examples:
        ids = {*example.prompt, *example.chosen, *(example.rejected or [])} - checked
        for id in sorted(ids):
            ours, theirs = (each.tokenizer.convert_ids_to_tokens(id) for each in (source, reference))
            if ours != theirs:
                raise UserError(f"--reference {name}: has another vocabulary than --model_name: token {id} is "
                                f"{theirs!r} there and {ours!r} here (first used in {path}, row {example.row}); "
                                "name a reference of the same tokenizer")
        checked |= ids
        if reference.context and example.length > reference.context:
            raise UserError(f"--reference {name}: its context is {reference.context} tokens (max_position_embeddings), "
                            f"and {path}, row {example.row} has {example.length}; give a --max_length, with --overlong")
    check_ids(reference, path, examples)


def check_heads(config, size: int, name: str) -> None:
    """Raises UserError where so many ranks can't share the heads of the model `name`, as model/ulysses.py needs it:
    each gets as many query heads, and as many key/value heads, or a copy of one."""
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None) or heads
    if size == 1 or not type(heads) is type(shared) is int:  # of other models selfcheck.py finds out
        return
    fit = [n for n in range(2, heads + 1) if heads % n == 0 and (shared % n == 0 or n % shared == 0)]
    if size not in fit:
        raise UserError(f"--sequence_parallel_size {size}: {name} has {heads} attention heads and {shared} key/value "
                        f"heads, which {size} ranks can't share; give {', '.join(map(str, [1, *fit]))}")


def check_ids(source: Source, path: str, examples) -> None:
    """Raises UserError for a token of the data beyond the model's embedding. Tokens that no row uses may be beyond it,
    as those for images are in published models of text."""
    vocabulary = source.config.get_text_config().vocab_size
    if max(source.tokenizer.get_vocab().values(), default=0) < vocabulary:
        return
    mend = "put the tokenizer's files of this very model there"
    if source.adapter:
        mend = ("an adapter of a model whose vocabulary was grown must be merged where that model is (PEFT's "
                "merge_and_unload), and the merged model be named; else " + mend)
    for example in examples:
        for ids in (example.prompt, example.chosen, example.rejected or [], *example.more.values()):
            if (largest := max(ids, default=0)) >= vocabulary:
                token = source.tokenizer.convert_ids_to_tokens(largest)
                raise UserError(f"model {source.adapter or source.base}: its tokenizer gives {token!r} the id {largest}"
                                f", and its embedding has {vocabulary} places, from 0 (first used in {path}, row "
                                f"{example.row}); {mend}")


def _check_files(folder: Path) -> None:
    """Raises UserError for a file of weights that is cut short or broken, which its header shows, and for a model that
    has its weights twice."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            check_regular(file)
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: can't be read: {first_line(error)}; copy it anew") from error
    if all((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise UserError(f"model {folder}: has its weights twice, in model.safetensors and in the files that "
                        "model.safetensors.index.json lists; remove those that are not meant")


def base_of(name: str) -> tuple[str, str | None]:
    """(name of the base model, folder of the adapter or None) of a model or adapter. Raises UserError for a folder that
    is neither."""
    try:
        folder = place_of(name)
        file = Path(folder) / "adapter_config.json"
        if not file.is_file():
            _check_model(Path(folder), name)
            return name, None
        config = json.loads(read_text(file))
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except OSError as error:
        raise UserError(f"model {name}: can't be opened: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: no base_model_name_or_path can be read from it: {first_line(error)}") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{file}: base_model_name_or_path is {base!r}, not a model's name")
    if os.path.isfile(os.path.join(base, "adapter_config.json")) and not os.path.samefile(base, folder):
        raise UserError(f"{file}: base_model_name_or_path is {base}, which is an adapter itself; merge that one into "
                        "its base (PEFT's merge_and_unload), and write the merged model's place there")
    if isinstance(revision, str) and revision not in ("", "main") and not os.path.exists(base):
        base += f"@{revision}"  # of a base on the hub, as AutoPeftModel reads it
    return base, folder


def _check_model(path: Path, name: str) -> None:
    """Raises UserError for a folder that is no model, and for one that is not there. A hub id is not checked."""
    if (path / "run.json").is_file():
        raise UserError(f"model {name}: is a run; name one of its checkpoints, {path / 'checkpoint-<step>'}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"model {name}: has neither config.json nor adapter_config.json")
    if name.startswith(("/", "./", "../")) and not path.exists():
        raise UserError(f"model {name}: no such folder")


def name_and_revision(base: str) -> tuple[str, str | None]:
    """A base as an adapter_config.json names it: as `absolute`, a hub id with its revision apart."""
    if Path(base).is_dir():
        return absolute(base), None
    name, _, revision = absolute(base).partition("@")
    return name, revision or None


def absolute(name: str) -> str:
    """A local folder by its full path, so that a checkpoint finds its base from anywhere; a hub id with its revision,
    or, where it has none, with the commit that the cache has of it: the hub may have another one tomorrow."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    commit = "" if "@" in name else commit_of(name)
    return f"{name}@{commit}" if commit else name


def read_template_file(file: str) -> str:
    """A chat template. Raises UserError for a file that can't be read, or holds nothing."""
    try:
        text = read_text(Path(file)).rstrip("\n")  # an editor ends a file with one
    except (OSError, ValueError) as error:
        raise UserError(f"--chat_template {file}: can't be read ({why(error)})") from error
    if not text.strip():
        raise UserError(f"--chat_template {file}: is empty")
    return text
