"""Trainer side: one policy to send. One buffer on the trainer's device holds it; a folder is written if needed."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

import torch

from ...engine.vllm.slots.staging import Staging
from ...errors import EngineStateError
from ..wire import Layout, Policy
from .store import Store, Stored


@dataclass
class Parcel:
    """A policy, and the ``staging`` buffer that holds it (LoRA dtype, scaling in B) until the next policy is staged."""

    policy: Policy
    layout: Layout
    staging: Staging
    store: Store
    is_here: bool = True  # the staging buffer still holds it
    folder: Stored | None = None
    _making: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def buffer(self) -> torch.Tensor:
        """The whole adapter, one-dimensional, on the trainer's device."""
        return self.staging.buffer

    def stored(self) -> Stored:
        """The policy as a PEFT folder, written at the first call. Raises AdapterFileError, or EngineStateError when the
        buffer holds another policy by now."""
        with self._making:
            if self.folder is None:
                if not self.is_here:
                    raise EngineStateError(f"The trainer no longer has the adapter of {self.policy}.")
                self.folder = self.store.write(self.policy, self.layout.config, self.staging.on_host())
            return self.folder

    def again(self, version: int) -> Parcel:
        """The same adapter under another version."""
        return replace(self, policy=replace(self.policy, version=version))
