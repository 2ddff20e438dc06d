"""Models and adapters of the Hugging Face hub, which are fetched to its cache on this machine."""

import functools
import os
import re
from pathlib import Path

from ..data.urls import look_for_hub, network_errors, where_full
from ..errors import UserError, first_line

# Settings, tokenizer and code.
TEXTS = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]
# Weights may be there twice: OTHERS are what other programs read; PICKLES are fetched where there is nothing else.
OTHERS = ["consolidated*", "*/*.safetensors"]
PICKLES = ["pytorch_model*.bin", "adapter_model*.bin"]


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

    look_for_hub(repository)
    try:
        if not revision and not find_adapter_config_file(repository):
            return name
        fetch = functools.partial(snapshot_download, repository, revision=revision or None)
        folder = fetch(allow_patterns=["*.safetensors", *TEXTS], ignore_patterns=OTHERS)
        return folder if any(Path(folder).glob("*.safetensors")) else fetch(allow_patterns=PICKLES)
    except network_errors() as error:
        raise UserError(f"model {name}: can't be fetched from the hub: {first_line(error, 2)}{where_full(error)}"
                        ) from error


def commit_of(name: str) -> str:
    """The commit of a hub id's files in the cache, which holds a folder for each; empty where there is none."""
    from huggingface_hub import try_to_load_from_cache  # slow to import
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no hub id; whoever opens it says so
        file = None
    return Path(file).parent.name if isinstance(file, str) else ""
