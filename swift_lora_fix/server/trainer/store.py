"""Trainer side: each policy as a PEFT folder below a root that the servers can read. Complete or not there."""

from __future__ import annotations

import atexit
import json
import mmap
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...common.atomic import all_or_nothing
from ...common.settings import Settings
from ...errors import SettingsError
from ..content import content_digest
from ..wire import CONFIG, ORDER, WEIGHTS, Policy, config_bytes

KEPT = 3  # newest folders of a run to keep: a server that comes back late may still read one


@dataclass(frozen=True)
class Stored:
    """A policy's adapter in ``folder``. digest: of the bytes of both files."""

    folder: Path
    digest: str

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / CONFIG).read_text()))

    @property
    def weights(self) -> bytes:
        return (self.folder / WEIGHTS).read_bytes()


class Store:
    """The folders of one run below ``root``, which is created if missing, readable by this user only."""

    def __init__(self, root: Path, run: str) -> None:
        self.root, self.run = root, run
        self._folders: list[Path] = []

        atexit.register(self.clear)

    def _make_root(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.root.stat().st_uid != os.geteuid() and str(self.root) == Settings.root:
            raise SettingsError(
                f"{self.root} belongs to somebody else: set SWIFT_LORA_FIX_ROOT to a folder of your own."
            )

    def write(self, policy: Policy, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Stored:
        """Write a policy's ``config`` (JSON types only) and its CPU ``tensors`` by PEFT key, in the order of its policy
        digest. Raises AdapterFileError and leaves nothing behind when that fails."""
        from safetensors.torch import save_file

        self._make_root()
        folder = self.root / f"{self.run}-v{policy.version}"
        with all_or_nothing(folder) as temporary:
            (temporary / CONFIG).write_bytes(config_bytes(config))
            about = {"format": "pt", ORDER: json.dumps(list(tensors))}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / WEIGHTS, about)
        self._folders.append(folder)
        while len(self._folders) > KEPT:
            shutil.rmtree(self._folders.pop(0), ignore_errors=True)
        with (
            open(folder / WEIGHTS, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as weights,
        ):
            return Stored(folder, content_digest((folder / CONFIG).read_bytes(), weights))

    def clear(self) -> None:
        """Remove this run's folders, at its end."""
        while self._folders:
            shutil.rmtree(self._folders.pop(), ignore_errors=True)
