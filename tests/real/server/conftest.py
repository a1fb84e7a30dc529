"""Two real servers and a trainer take 10 GB: one environment at a time."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

from swift_lora_fix.install import releases
from tests.support.driver import make_model, this_python

# A run each: what does not depend on ms-swift's release is shown with one.
IS_NEWEST = Version(releases.installed_swift() or "0") >= Version("4.6")
newest = pytest.mark.skipif(not IS_NEWEST, reason="shown with the newer release")
older = pytest.mark.skipif(IS_NEWEST, reason="shown with the older release")


@pytest.fixture(scope="session", autouse=True)
def alone() -> Iterator[None]:
    with open(Path(tempfile.gettempdir()) / "swift-lora-fix-server-tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """In the ``folder`` of the module that asks."""
    return make_model(this_python(), folder / "models")
