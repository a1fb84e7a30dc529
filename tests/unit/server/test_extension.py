"""The extension of a rollout server's vLLM workers, on ms-swift's own class.

In a process of their own: importing ms-swift changes how other tests log.
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")


def made() -> Any:
    """Not by its own ``__new__``, after which this process would end with its parent."""
    from swift_lora_fix.server.rollout.extension import RolloutWorkerExtension

    worker = object.__new__(RolloutWorkerExtension)
    worker.communicator = worker.client_rank = None
    return worker


def what_ms_swift_only_logs_is_kept() -> None:
    from swift_lora_fix import errors

    worker = made()
    for update in (
        lambda: worker.update_named_param("a.weight", "torch.float32", (1,)),
        lambda: worker.update_flattened_params([{"end_idx": 1}]),
    ):
        with pytest.raises(Exception):  # noqa: B017  (whatever ms-swift raises)
            update()
    state = worker.swift_lora_fix_state
    assert len(state.failures) == 2
    with pytest.raises(
        errors.EngineStateError, match="2 updates over NCCL failed in vLLM, the first: RuntimeError: Comm"
    ):
        state.end_push()
    state.begin_push()
    state.end_push()


def what_nccl_holds_is_freed_where_vllm_can() -> None:
    """An older vLLM needs the trainer for it, which may be gone: then its communicator is kept."""
    worker, freed = made(), list[int]()
    able = SimpleNamespace(group=SimpleNamespace(), destroy=lambda: freed.append(1), nccl=SimpleNamespace())
    able.nccl.ncclCommAbort = None
    unable = SimpleNamespace(group=SimpleNamespace(), destroy=lambda: freed.append(2), nccl=SimpleNamespace())
    for communicator in (able, unable):
        worker.communicator = communicator
        worker.close_communicator()
        assert worker.communicator is None and communicator.group is None
    assert freed == [1] and worker.swift_lora_fix_kept == (unable,)


def test_the_extension() -> None:
    """Both of the above."""
    calls = f"{what_ms_swift_only_logs_is_kept.__name__}(), test.{what_nccl_holds_is_freed_where_vllm_can.__name__}()"
    code = f"from tests.unit.server import test_extension as test; test.{calls}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
