"""Seconds by name."""

from __future__ import annotations

import time


class Clock:
    """Seconds by name; a name that comes again adds up. last: when it was looked at last, on ``time.perf_counter``."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """Leave out what has passed since the last look."""
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now
