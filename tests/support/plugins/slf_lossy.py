"""Loses a little of each update as merged weights are rounded: an engine in float16 rounds to the nearest."""

from swift_lora_fix.policy import merging

LOST = 0.01

merging.rounded = lambda value, plain, dtype, seed: (value - LOST * (value - plain.float())).to(dtype)
