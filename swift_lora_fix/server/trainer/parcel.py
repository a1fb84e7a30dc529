"""Trainer side: one policy as it is sent, from one buffer on the trainer's device; a folder is made where one is asked
for."""

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
    """A policy, and ``staging``, which holds it (LoRA dtype, scaling in B) until the next one is staged there."""

    policy: Policy
    layout: Layout
    staging: Staging
    store: Store
    is_here: bool = True  # staging still holds it
    folder: Stored | None = None
    _making: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def buffer(self) -> torch.Tensor:
        """The whole adapter, one-dimensional, on the trainer's device."""
        return self.staging.buffer

    def stored(self) -> Stored:
        """As a PEFT folder, made once, whoever asks first. Raises AdapterFileError, or EngineStateError where the
        values are gone."""
        with self._making:
            if self.folder is None:
                if not self.is_here:
                    raise EngineStateError(f"The trainer no longer has the adapter of {self.policy}.")
                self.folder = self.store.write(self.policy, self.layout.config, self.staging.on_host())
            return self.folder

    def again(self, version: int) -> Parcel:
        """The same adapter as another version."""
        return replace(self, policy=replace(self.policy, version=version))
