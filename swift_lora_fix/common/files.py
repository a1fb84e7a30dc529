"""Folders that a user names for results."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def make_folder(folder: Path) -> None:
    """Make it and its parents where they are missing. Raises OSError; where a file is in the way, NotADirectoryError
    (``Path.mkdir`` says "File exists" then, of what the user wanted to be a folder)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
