"""Copies what a URL names (hf://, s3://, file:// ..., by fsspec) to this machine, for as long as it takes to read."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from ..errors import UserError, first_line


@contextlib.contextmanager
def copy_of(place: str) -> Iterator[str]:
    """Yields the name of a copy of the file, glob or folder that a URL names, with its split behind it where it names
    one; errors of its reader, too, name the URL. Raises UserError where it can't be fetched."""
    import fsspec

    url, _, split = place.partition("::")
    with tempfile.TemporaryDirectory() as folder:
        try:
            system, path = fsspec.core.url_to_fs(url)
            system.get(path, f"{folder}/", recursive=True)
        except FileNotFoundError as error:
            raise UserError(f"{place}: no such file") from error
        except (OSError, ValueError, ImportError, *client_errors()) as error:
            raise UserError(f"{place}: can't be fetched ({first_line(error)})") from error
        found = os.listdir(folder)
        here = os.path.join(folder, found[0] if len(found) == 1 else "*")
        try:
            yield f"{here}::{split}" if split else here
        except UserError as error:
            raise UserError(str(error).replace(folder, url.rpartition("/")[0])) from error


def client_errors() -> list[type]:
    """Errors of the network, of the libraries by which file systems reach it, that are no OSError."""
    named = (("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("aiohttp", "ClientError"),
             ("botocore.exceptions", "BotoCoreError"))
    return [getattr(sys.modules[library], name) for library, name in named if library in sys.modules]
