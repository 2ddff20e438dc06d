"""Copies what a URL names (hf://, s3://, file:// ..., by fsspec) to this machine, for as long as it takes to read; and
whether the Hugging Face hub can be reached."""

import contextlib
import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterator

from ..errors import UserError, first_line
from ..ranks.distributed import say

SECONDS = 5  # for the hub's first answer


@contextlib.contextmanager
def copy_of(place: str) -> Iterator[str]:
    """Yields the name of a copy of the file, glob or folder that a URL names, with its split behind it where it names
    one; errors of its reader, too, name the URL. Raises UserError where it can't be fetched."""
    import fsspec

    url, _, split = place.partition("::")
    if url.startswith("hf://"):
        look_for_hub("/".join(re.split("[/@]", url.removeprefix("hf://"))[:3]))
    with tempfile.TemporaryDirectory() as folder:
        try:
            system, path = fsspec.core.url_to_fs(url)
            system.get(path, f"{folder}/", recursive=True)
        except FileNotFoundError as error:
            raise UserError(f"{place}: no such file") from error
        except network_errors() as error:
            raise UserError(f"{place}: can't be fetched ({first_line(error)})") from error
        found = os.listdir(folder)
        here = os.path.join(folder, found[0] if len(found) == 1 else "*")
        try:
            yield f"{here}::{split}" if split else here
        except UserError as error:
            raise UserError(str(error).replace(folder, url.rpartition("/")[0])) from error


def look_for_hub(repository: str) -> None:
    """Where the hub does not answer, says so and tells its library, which then takes files from its cache. Else that
    asks six times for every file, half a minute each: minutes until a run starts on a machine without a network, or
    while the hub is busy. Asks for a file of this `repository`: the hub limits other kinds of requests otherwise."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, http_backoff  # slow to import

    if constants.HF_HUB_OFFLINE:
        return
    try:  # an error of the server is tried again, any other answer serves
        http_backoff("HEAD", f"{constants.ENDPOINT}/{repository}/resolve/main/README.md", headers=build_hf_headers(),
                     max_retries=2, retry_on_exceptions=(), timeout=SECONDS)
    except network_errors() as error:
        constants.HF_HUB_OFFLINE = True
        say(f"the Hugging Face hub can't be reached ({first_line(error)}): what its cache on this machine has is used. "
            "With HF_HUB_OFFLINE=1 in the environment it is not asked")


def where_full(error: Exception) -> str:
    """Words that say which disk has no room for what the hub is asked for; empty for another error."""
    from huggingface_hub import constants

    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return f"; the hub's cache is in {constants.HF_HOME}: make room there, or name another folder by HF_HOME" * full


def network_errors() -> tuple[type, ...]:
    """Errors of the network, of the libraries by which file systems reach it, and of settings that they can't follow,
    as of a proxy: ImportError where it needs another package."""
    named = (("httpx", "HTTPError"), ("httpx", "InvalidURL"), ("httpx2", "HTTPError"), ("httpx2", "InvalidURL"),
             ("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError"))
    return (OSError, ValueError, ImportError,
            *(getattr(sys.modules[library], name) for library, name in named if library in sys.modules))
