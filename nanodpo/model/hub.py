"""Models and adapters of the Hugging Face hub, which are fetched to its cache on this machine."""

import functools
import os
import re
from pathlib import Path

from ..data.urls import look_for_hub
from ..errors import UserError, first_line

# Settings, tokenizer and code.
TEXTS = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]
# Weights by the names that are read: a model may be there twice, in files of other names or kinds, too.
WEIGHTS = ["model*.safetensors", "adapter_model*.safetensors"]
OLD_WEIGHTS = ["pytorch_model*.bin", "adapter_model*.bin"]


@functools.cache
def place_of(name: str) -> str:
    """Where a model or adapter is read from. Of an adapter on the hub, and of a hub id with a revision, NAME@REVISION,
    this is the folder of its files in the hub's cache, where they are fetched to; all other names stay. Raises
    UserError where the hub has no such files."""
    repository, _, revision = name.partition("@")
    if os.path.lexists(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) or repository.startswith("."):
        return name
    from huggingface_hub import snapshot_download  # slow to import
    from transformers.utils.peft_utils import find_adapter_config_file

    look_for_hub()
    try:
        if not revision and not find_adapter_config_file(repository):
            return name
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=WEIGHTS + TEXTS)
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(repository, revision=revision or None, allow_patterns=OLD_WEIGHTS)
        return folder
    except (OSError, ValueError) as error:
        raise UserError(f"model {name}: can't be fetched from the hub: {first_line(error, 2)}") from error


def commit_of(name: str) -> str:
    """The commit of a hub id's files in the cache, which holds a folder for each; empty where there is none."""
    from huggingface_hub import try_to_load_from_cache  # slow to import
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no hub id; whoever opens it says so
        file = None
    return Path(file).parent.name if isinstance(file, str) else ""
