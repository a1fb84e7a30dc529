"""What a claim needs before it means anything. It is made (plugins/slf_grow.py), and checked here.

A failure that begins with "premise:" says that a claim was not tested, not that it is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.support import bounds


def premise(holds: bool, what: str) -> None:
    if not holds:
        pytest.fail(f"premise: {what}. The claim was not tested.", pytrace=False)


def plain_base(probe: bounds.Probe) -> None:
    premise(probe["lora_effect"] == 0.0, f"the first rollout is not the plain base's, lora_B is not zero: {probe}")


def large_lora(probes: Iterable[bounds.Probe], floor: float, factor: float = bounds.LARGE_LORA_FACTOR) -> None:
    """In each of these rollouts a LoRA that was served wrongly would show."""
    probes = list(probes)
    premise(bool(probes), "there was no rollout to look at")
    for probe in probes:
        effect, step = probe["lora_effect"], probe["step"]
        what = f"at step {step} the LoRA's effect is {effect:.4f}, not {factor:g} floors of {floor:.4f}"
        premise(effect > factor * floor, what)
