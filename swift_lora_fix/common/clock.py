"""Seconds by name."""

from __future__ import annotations

import time


class Clock:
    """Seconds by name; times of the same name add up. last: the last reading of ``time.perf_counter``."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """Skip the time since the last reading."""
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now
