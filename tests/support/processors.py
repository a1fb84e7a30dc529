"""A user's logits processor for vLLM, which keeps the logits as they are."""

from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor


class Keep(LogitsProcessor):
    def __init__(self, *_: Any) -> None: ...

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None: ...

    def apply(self, logits: Any) -> Any:
        return logits
