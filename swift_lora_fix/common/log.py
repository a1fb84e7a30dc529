"""The package's logger: a child of ms-swift's own, so that its lines go wherever ms-swift's go."""

from __future__ import annotations

import logging

logger = logging.getLogger("swift.lora_fix")


def info(message: str) -> None:
    logger.info(message)


def warning(message: str) -> None:
    logger.warning(message)
