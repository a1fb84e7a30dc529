"""The hook into PEFT, for every framework. No logic here: it tells policy/origin.py."""

from __future__ import annotations

from typing import Any, Callable

from ..install.registry import Patch, PatchSet
from ..policy import origin


def _load_adapter(wrapped: Callable[..., Any], model: Any, args: Any, kwargs: Any) -> Any:
    result = wrapped(*args, **kwargs)
    origin.record_load(model, *_adapter_and_folder(*args, **kwargs))
    return result


def _adapter_and_folder(model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> tuple[str, Any]:
    return adapter_name, model_id


LOADS = PatchSet(
    "PEFT adapter loads",
    (
        Patch(
            "PeftModel.load_adapter",
            _load_adapter,
            why="nothing else tells at the first sync which file the trainer's adapter was read from",
            goes_when="the frameworks or PEFT keep the folder an adapter was loaded from",
        ),
    ),
)
