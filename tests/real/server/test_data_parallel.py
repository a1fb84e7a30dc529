"""One asynchronous engine with two data-parallel ranks: each has a core, and a worker, of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift_lora_fix.server.wire import Policy
from tests.real.server.conftest import newest
from tests.support.driver import make_model, this_python
from tests.support.reload_client import ReloadServer, made_adapter, sent_of

pytestmark = pytest.mark.e2e


@newest
def test_every_rank_serves_what_was_committed(tmp_path: Path) -> None:
    arguments = {"vllm_use_async_engine": "true", "vllm_data_parallel_size": 2}
    with ReloadServer(make_model(this_python(), tmp_path, "qwen2"), tmp_path, arguments) as server:
        found = []
        for version, seed in enumerate((1, 2, 1)):
            sent = sent_of(made_adapter(server.model, seed))
            policy = Policy(version=version, step=version, digest=sent.digest, run="5eed")
            for answer in (server.stage(policy, sent), server.commit(policy)):
                assert answer.status_code == 200, answer.text + server.log[-3000:]
            answers = [server.rollouts(policy)[0] for _ in range(3)]  # vLLM gives each rank some of the prompts
            assert answers[0] == answers[1] == answers[2]
            found.append(answers[0])
    assert found[0] == found[2] != found[1]
    assert server.log.count("goes straight into vLLM's LoRA slots") == 2
