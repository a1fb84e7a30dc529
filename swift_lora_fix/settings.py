"""What the user can set, read once from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import SettingsError

_ON = {"", "on", "1", "true", "yes"}
_OFF = {"off", "0", "false", "no"}
_WRITERS = {"direct", "loader"}


@dataclass(frozen=True)
class Settings:
    """Settings of this process.

    enabled: ``SWIFT_LORA_FIX`` (``on``, the default, or ``off``, which keeps every patch out).
    writer: ``SWIFT_LORA_FIX_WRITER`` (``direct``, the default: straight into vLLM's LoRA slots; ``loader``: always
        through vLLM's own adapter loader, the slow reference path).
    """

    enabled: bool = True
    writer: str = "direct"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings. Raises SettingsError naming the variable, its value and what it may be."""
        environment = os.environ if environment is None else environment
        value = environment.get("SWIFT_LORA_FIX", "").strip().lower()
        if value not in _ON | _OFF:
            raise SettingsError(f"SWIFT_LORA_FIX={value!r} is not understood: set it to 'on' or 'off', or unset it.")
        writer = environment.get("SWIFT_LORA_FIX_WRITER", "").strip().lower() or "direct"
        if writer not in _WRITERS:
            raise SettingsError(f"SWIFT_LORA_FIX_WRITER={writer!r} is not understood: set it to 'direct' or 'loader'.")
        return cls(enabled=value not in _OFF, writer=writer)
