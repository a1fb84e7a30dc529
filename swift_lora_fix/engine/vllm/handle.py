"""A trainer's colocated vLLM engine: the few things that a sync needs of it. Nothing is cached, vLLM is asked."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, ClassVar

import torch

from ...errors import CacheResetError, EngineStateError
from ...install import releases
from ...trainer import TrainerPort
from .prefix_cache import sparing_reset

# One fixed id on every release. ms-swift from 4.2 on looks for exactly this one (VLLM_LORA_INT_ID, swift_lora); older
# releases take the only adapter that is loaded.
ADAPTER_ID = releases.FIXED_ADAPTER_ID
ADAPTER_NAME = "swift_lora"
ADAPTER_PATH = "swift_dummy_lora_path"


def logits_processors(given: Sequence[Any] | None, logprobs_mode: str) -> tuple[str, ...]:
    """Names of the logits processors in an engine's logprobs, but for vLLM's own.

    given: the engine's argument ``logits_processors``. vLLM adds those of its entry point group in installed packages
    (``build_logitsprocs``). Logprobs are taken before or after them (``raw_...``, ``processed_...``).
    """
    if logprobs_mode.startswith("raw"):
        return ()
    names = [one if isinstance(one, str) else one.__qualname__ for one in given or ()]
    return (*names, *_installed_logits_processors())


@cache
def _installed_logits_processors() -> tuple[str, ...]:
    found, group = metadata.entry_points(), "vllm.logits_processors"
    entries: Any = found.select(group=group) if hasattr(found, "select") else found.get(group, ())  # Python 3.9: a dict
    return tuple(entry.value for entry in entries)


@dataclass(frozen=True)
class EngineHandle:
    """``llm_engine`` is a ``vllm.LLMEngine`` whose executor runs in this process (colocate)."""

    llm_engine: Any

    is_shared: ClassVar[bool] = False

    def is_of(self, trainer: TrainerPort) -> bool:
        """Whether this is (still) the trainer's engine."""
        return trainer.vllm_engine is self.llm_engine

    def make_ready(self) -> bool:
        """Nothing to restore: this engine is in our process."""
        return False

    def generate(self, infer: Callable[[], Any]) -> Any:
        """Run ``infer``, the framework's own rollout call."""
        return infer()

    @property
    def executor(self) -> Any:
        return self.llm_engine.model_executor

    @property
    def model(self) -> torch.nn.Module:
        return self.worker.model_runner.model

    @property
    def lora_config(self) -> Any:
        return self.llm_engine.vllm_config.lora_config

    @property
    def worker(self) -> Any:
        return self.executor.driver_worker.worker

    @property
    def manager(self) -> Any:
        """vLLM's ``LRUCacheLoRAModelManager`` of this process's worker."""
        return self.worker.model_runner.lora_manager._adapter_manager

    @property
    def lora_dtype(self) -> torch.dtype:
        return self.lora_config.lora_dtype

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.llm_engine.vllm_config.model_config.dtype

    @property
    def quantization(self) -> str | None:
        """vLLM's name of how the engine holds its weights, or None."""
        return self.llm_engine.vllm_config.model_config.quantization

    @property
    def model_folder(self) -> str:
        return str(self.llm_engine.vllm_config.model_config.model)

    @property
    def load_format(self) -> str:
        return str(self.llm_engine.vllm_config.load_config.load_format)

    @property
    def cache_block(self) -> int:
        """Tokens per block of vLLM's prefix cache; 16 while the engine has not chosen a size."""
        return int(self.llm_engine.vllm_config.cache_config.block_size or 16)

    @property
    def logits_processors(self) -> Sequence[str]:
        config = self.llm_engine.vllm_config.model_config
        return logits_processors(config.logits_processors, config.logprobs_mode)

    @property
    def is_asleep(self) -> bool:
        return bool(self.executor.is_sleeping)

    def slot_index(self) -> int | None:
        """The LoRA slot that holds the adapter; None if none does."""
        slots = list(self.manager.lora_index_to_id)
        return slots.index(ADAPTER_ID) if ADAPTER_ID in slots else None

    def what_is_missing(self) -> str | None:
        """Why the adapter cannot be served, or None when a rollout would use it."""
        listed = set(self.llm_engine.list_loras())
        if ADAPTER_ID not in listed:
            return f"adapter {ADAPTER_ID} ({ADAPTER_NAME}) is not loaded; loaded are {sorted(listed) or 'none'}"
        if self.slot_index() is None:
            slots = list(self.manager.lora_index_to_id)
            return f"adapter {ADAPTER_ID} ({ADAPTER_NAME}) is in no LoRA slot; the slots hold {slots}"
        return None

    def check_idle(self) -> None:
        """Raise EngineStateError while requests are running: a write would mix two policies in them."""
        if self.llm_engine.has_unfinished_requests():
            raise EngineStateError(
                "The engine still has unfinished requests, so its policy cannot be replaced now: they would be "
                "finished by another policy than they began with. Wait for them, or abort them, before the sync."
            )

    def abort_unfinished(self) -> None:
        """Abort all requests that it has: of a call of its own that raised, they are still there."""
        unfinished = list(self.llm_engine.output_processor.request_states)
        abort = self.llm_engine.abort_request
        # these are vLLM's own ids; before it had them (0.11), they were the caller's
        abort(unfinished, **({"internal": True} if "internal" in inspect.signature(abort).parameters else {}))

    def reset_caches(self) -> None:
        """Drop what the engine computed with the previous policy: prefix (KV) cache and encoder cache.

        Raises CacheResetError when vLLM could not reset one (``BlockPool.reset_prefix_cache`` returns False while
        blocks are in use).
        """
        for name, sparing in (("reset_prefix_cache", sparing_reset), ("reset_encoder_cache", contextlib.nullcontext)):
            reset = getattr(self.llm_engine, name, None)
            if reset is None:
                continue
            with sparing(self.llm_engine):
                done = reset()
            if done is False:
                raise CacheResetError(
                    f"vLLM's {name}() reported that it was not done, so rollouts could reuse values computed with the "
                    "previous policy. Usually a request is still running or a KV connector holds blocks."
                )


@dataclass(frozen=True)
class WorkerHandle(EngineHandle):
    """The same, from inside one of vLLM's workers. ``llm_engine`` is the worker, which also has ``vllm_config``,
    ``add_lora``, ``remove_lora`` and ``list_loras``."""

    @property
    def worker(self) -> Any:
        return self.llm_engine

    def clear_kv_memory(self) -> None:
        """Fill the memory of the KV cache with zeros; no request may be running. NaN that a broken policy left there
        would reach every later answer: attention also multiplies what it masks (seen on the CPU)."""
        left = list(getattr(self.worker.model_runner, "kv_caches", ()))
        while left:
            one = left.pop()
            if isinstance(one, torch.Tensor):
                one.zero_()
            elif isinstance(one, (list, tuple)):
                left += one

    @property
    def model(self) -> torch.nn.Module:
        return self.worker.get_model()
