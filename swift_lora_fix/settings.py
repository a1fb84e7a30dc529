"""What the user can set, read once from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import SettingsError

_ON = {"", "on", "1", "true", "yes"}
_OFF = {"off", "0", "false", "no"}


@dataclass(frozen=True)
class Settings:
    """Settings of this process.

    enabled: ``SWIFT_LORA_FIX`` (``on``, the default, or ``off``, which keeps every patch out).
    """

    enabled: bool = True

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings. Raises SettingsError naming the variable, its value and what it may be."""
        environment = os.environ if environment is None else environment
        value = environment.get("SWIFT_LORA_FIX", "").strip().lower()
        if value not in _ON | _OFF:
            raise SettingsError(f"SWIFT_LORA_FIX={value!r} is not understood: set it to 'on' or 'off', or unset it.")
        return cls(enabled=value not in _OFF)
