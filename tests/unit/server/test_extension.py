"""The extension of a rollout server's vLLM workers, on ms-swift's own class."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from swift_lora_fix import errors

pytest.importorskip("vllm")
extension = pytest.importorskip("swift_lora_fix.server.rollout.extension")


@pytest.fixture
def worker() -> Any:
    """Not by its own ``__new__``, after which this process would end with its parent."""
    made = object.__new__(extension.RolloutWorkerExtension)
    made.communicator = made.client_rank = None
    return made


def test_what_ms_swift_only_logs_is_kept(worker: Any) -> None:
    for update in (
        lambda: worker.update_named_param("a.weight", "torch.float32", (1,)),
        lambda: worker.update_flattened_params([{"end_idx": 1}]),
    ):
        with pytest.raises(Exception):  # noqa: B017  (whatever ms-swift raises)
            update()
    assert len(worker.swift_lora_fix_state.failures) == 2
    with pytest.raises(
        errors.EngineStateError, match="2 updates over NCCL failed in vLLM, the first: RuntimeError: Comm"
    ):
        worker.swift_lora_fix_state.end_push()
    worker.swift_lora_fix_state.begin_push()
    worker.swift_lora_fix_state.end_push()


def test_what_nccl_holds_is_freed_where_vllm_can(worker: Any) -> None:
    """An older vLLM needs the trainer for it, which may be gone: then its communicator is kept."""
    freed: list[int] = []
    able = SimpleNamespace(group=SimpleNamespace(), destroy=lambda: freed.append(1))
    unable = SimpleNamespace(group=SimpleNamespace())
    for communicator in (able, unable):
        worker.communicator = communicator
        worker.close_communicator()
        assert worker.communicator is None and communicator.group is None
    assert freed == [1] and worker.swift_lora_fix_kept == (unable,)
