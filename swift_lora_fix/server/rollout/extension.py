"""The ``worker_extension_cls`` of a rollout server's vLLM workers: what ms-swift's does, and more.

vLLM finds the class by name in each worker's process.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any

from ...engine.vllm.prefix_cache import spare_every_reset
from ...install import releases
from ..wire import SWIFT_EXTENSION, release_port
from .receiver import Receiver, raise_together


def _swift_extension() -> Any:
    problem: Exception | None = None
    for module in releases.server_modules():
        try:
            return getattr(importlib.import_module(module), SWIFT_EXTENSION)
        except (ImportError, AttributeError) as error:
            problem = problem or error  # keep the first: of the newest layout, which most releases have
    raise ImportError(f"ms-swift {releases.installed_swift()}: no {SWIFT_EXTENSION} could be loaded") from problem


_SWIFTS = _swift_extension()


def _noted(name: str) -> Any:
    """ms-swift's update of the base with this name. Its server only logs an error of it: the receiver keeps it."""
    update: Any = getattr(_SWIFTS, name, None)

    def noted(self: RolloutWorkerExtension, *args: Any, **kwargs: Any) -> Any:
        try:
            return update(self, *args, **kwargs)
        except Exception as error:
            self.swift_lora_fix_state.failures.append(f"{type(error).__name__}: {error}")
            raise

    return noted


class RolloutWorkerExtension(_SWIFTS):  # type: ignore[misc, valid-type]
    """ms-swift's extension, plus a `Receiver`. ``self`` is vLLM's worker."""

    communicator: Any  # ms-swift's
    swift_lora_fix_kept: tuple[Any, ...] = ()  # kept alive: freeing one would make NCCL wait for a trainer that is gone

    update_named_param = _noted("update_named_param")
    update_flattened_params = _noted("update_flattened_params")
    process_weights_after_loading = _noted("process_weights_after_loading")

    @cached_property
    def swift_lora_fix_state(self) -> Receiver:
        spare_every_reset()  # with one worker, the engine core is in this process
        return Receiver(self)

    def init_communicator(self, *args: Any, **kwargs: Any) -> None:
        """A new trainer connects, so the last one is gone, even if it was killed and did not close. (ms-swift's own
        method would keep the old connection.)"""
        self.close_communicator()
        super().init_communicator(*args, **kwargs)

    def close_communicator(self) -> None:
        """Also release the port, which the next trainer needs, and what NCCL holds on the device, for which older
        releases of vLLM need the other side."""
        communicator, self.communicator, self.client_rank = self.communicator, None, None
        if communicator is None:
            return
        release_port(communicator)
        if hasattr(communicator, "destroy") and hasattr(communicator.nccl, "ncclCommAbort"):
            communicator.destroy()  # an abort, with a time limit of vLLM's
        else:
            self.swift_lora_fix_kept += (communicator,)

    def swift_lora_fix_receiver(self, command: str, **arguments: Any) -> None:
        """`wire.RPC`: run one command of the `Receiver`. If it fails in one worker, it fails for all."""
        problem: Exception | None = None
        try:
            getattr(self.swift_lora_fix_state, command)(**arguments)
        except Exception as error:
            problem = error
        raise_together(problem)
