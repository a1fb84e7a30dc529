"""The package's logger: a child of ms-swift's own, so that its lines go wherever ms-swift's go."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("swift.lora_fix")


def info(message: str) -> None:
    logger.info(message)


def warning(message: str) -> None:
    logger.warning(message)


def show() -> None:
    """Without ms-swift nobody shows these lines. INFO on the main rank, warnings elsewhere; to stderr where no handler
    is set. A level that a program gave this logger stays."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(levelname)s:%(name)s] %(message)s"))
        logger.addHandler(handler)
