"""Where a run starts: a model or an adapter on one, opened far enough to check everything but the weights."""

import dataclasses
import json
import warnings
from pathlib import Path

from .errors import UserError, first_line


@dataclasses.dataclass
class Source:
    """Where a run starts: a base model and, perhaps, an adapter on it."""

    base: str
    adapter: str | None
    config: object
    tokenizer: object

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


def open_source(name: str, trust_remote_code: bool) -> Source:
    """Reads config and tokenizer of a model or adapter, without its weights. Raises UserError for what is not there."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for every file read or written, on every rank
    # Names that transformers 6 will drop; PEFT and the range of releases supported here still need them.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
    adapter_config = Path(name) / "adapter_config.json"
    base, adapter = name, None
    if adapter_config.is_file():
        try:
            base, adapter = json.loads(adapter_config.read_text())["base_model_name_or_path"], name
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{adapter_config}: no base_model_name_or_path can be read from it: {error}") from error
        if not isinstance(base, str):
            raise UserError(f"{adapter_config}: base_model_name_or_path is {base!r}, not a model's name")
    elif Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"--model_name {name}: has neither config.json nor adapter_config.json")
    has_tokenizer = adapter and (Path(adapter) / "tokenizer_config.json").is_file()
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(adapter if has_tokenizer else base,
                                                  trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        where = name if base == name else f"{name}: its base {base}"
        raise UserError(f"--model_name {where}: can't be opened: {first_line(error)}") from error
    vocabulary = config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise UserError(f"--model_name {name}: the tokenizer has {len(tokenizer)} entries, the model only {vocabulary}")
    return Source(base, adapter, config, tokenizer)


def absolute(name: str) -> str:
    """A local folder by its full path, so that a checkpoint finds its base from anywhere; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name
