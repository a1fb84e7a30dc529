"""Folders that a user names for results."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def make_folder(folder: Path) -> None:
    """Create it, with missing parents. Raises OSError; NotADirectoryError when a file is in the way (``Path.mkdir``
    would say "File exists" about what the user meant to be a folder)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
