"""What ms-swift's users call what a message speaks of."""

from __future__ import annotations

from ...common.words import Words

WORDS = Words(
    framework="ms-swift",
    with_lora="--vllm_enable_lora true",
    without_lora="--vllm_enable_lora false",
    rank="--lora_rank",
    targets="--target_modules",
    start="--adapters",
    resume="--resume_from_checkpoint",
    more="--vllm_engine_kwargs '{}'",
    verify="swift-lora-fix verify --adapter CHECKPOINT",
)
