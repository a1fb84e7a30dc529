"""One thing that a demonstration has to show, and whether it did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    passed: bool
    text: str
    bound: str
