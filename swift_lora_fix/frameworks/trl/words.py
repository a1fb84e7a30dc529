"""What TRL's users call what a message speaks of."""

from __future__ import annotations

from ...common.words import Words

WORDS = Words(
    framework="TRL",
    with_lora="SWIFT_LORA_FIX_MODE=adapter",
    without_lora="SWIFT_LORA_FIX_MODE=fused",
    rank="LoraConfig's r",
    targets="LoraConfig's target_modules",
    start="a PeftModel loaded from",
    resume="resume_from_checkpoint",
)
