"""The ``worker_extension_cls`` of a rollout server's vLLM workers: what ms-swift's does, and more.

vLLM finds the class by name in each worker's process; nothing is patched there.
"""

from __future__ import annotations

import importlib
from typing import Any

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


class RolloutWorkerExtension(_swift_extension()):  # type: ignore[misc]
    """ms-swift's extension, plus a `Receiver`. ``self`` is vLLM's worker."""

    communicator: Any  # ms-swift's
    swift_lora_fix_state: Receiver | None = None
    swift_lora_fix_kept: tuple[Any, ...] = ()  # kept alive: freeing one would make NCCL wait for a trainer that is gone

    def init_communicator(self, *args: Any, **kwargs: Any) -> None:
        """A new trainer connects, so the last one is gone, even if it was killed and did not close. (ms-swift's own
        method would keep the old connection.)"""
        self.close_communicator()
        super().init_communicator(*args, **kwargs)

    def close_communicator(self) -> None:
        """Also release the port, which the next trainer needs."""
        communicator, self.communicator, self.client_rank = self.communicator, None, None
        if communicator is not None:
            release_port(communicator)
            self.swift_lora_fix_kept += (communicator,)

    def swift_lora_fix_receiver(self, command: str, **arguments: Any) -> None:
        """`wire.RPC`: run one command of the `Receiver`. If it fails in one worker, it fails for all."""
        if self.swift_lora_fix_state is None:
            self.swift_lora_fix_state = Receiver(self)
        try:
            self.swift_lora_fix_state.do(command, **arguments)
            problem = None
        except Exception as error:
            problem = error
        raise_together(problem)
