"""A folder that appears with all of its content, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..errors import AdapterFileError, SwiftLoraFixError


@contextlib.contextmanager
def all_or_nothing(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target``. It is renamed to ``target`` in one step, or removed if anything fails.

    ``target`` must not exist or be empty; its parent must exist. Raises AdapterFileError when it cannot be written.
    """
    from safetensors import SafetensorError

    # named before it is created: a Ctrl-C may come between the two
    temporary = target.parent / f".{target.name}.fork-{uuid.uuid4().hex}"
    left = "nothing was left of it"
    try:
        temporary.mkdir()
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for path in (*temporary.rglob("*"), temporary):
            if path.is_file():
                path.chmod(0o666 & ~umask)  # safetensors makes its file private to the owner
            _flush(path)
        os.rename(temporary, target)  # also replaces an empty folder
        left = "it is there and whole, but might not survive a crash of this machine"
        _flush(target.parent)
    except BaseException as error:  # Ctrl-C too
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)) and not isinstance(error, SwiftLoraFixError):
            raise AdapterFileError(f"TARGET {target} could not be written, {left}: {error}") from error
        raise


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
