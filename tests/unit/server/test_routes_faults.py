"""One of a rollout server's workers fails: all or none."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from fastapi.testclient import TestClient

from swift_lora_fix import errors
from swift_lora_fix.server.wire import POLICY_HEADER
from tests.support.parcels import Sent
from tests.support.rollout_routes import (
    CONFIGURATION,
    Server,
    adapter,
    announce,
    broken,
    commit,
    order,
    policies_of,
    policy,
    receive,
    refused,
    served_by,
    stage,
    status,
)


def test_one_worker_that_cannot_stage(server: Server, client: TestClient, served: Sent) -> None:
    server.connections[1].llm.vllm_config.lora_config.max_lora_rank = 1
    sent = adapter(2.0, config={**CONFIGURATION, "target_modules": ["k_proj"]})  # another layout: it is looked at
    refused(stage(client, 2, sent), 422, "StagingError", "has rank 2, this server has room for 1")
    refused(receive(client, 2, sent), 409, "StagingError", "was not announced")
    refused(commit(client, 2, sent), 409, "StagingError", "nothing is staged")
    assert served_by(client) == policy(1, served).as_dict()


def test_one_worker_that_does_not_get_it(server: Server, client: TestClient, served: Sent) -> None:
    sent = adapter(2.0)
    assert announce(client, 2, sent).status_code == 200
    server.connections[1].llm.fail = [broken(errors.StagingError("What arrived has digest x."))]
    refused(receive(client, 2, sent), 422, "StagingError", "What arrived has digest x.")
    refused(commit(client, 2, sent), 409, "StagingError", "nothing is staged")
    assert served_by(client) == policy(1, served).as_dict(), "which goes on"
    assert client.post("/infer/", headers={POLICY_HEADER: json.dumps(served_by(client))}).status_code == 200


@pytest.mark.parametrize("failing", [0, 1])
def test_one_worker_that_cannot_commit(server: Server, client: TestClient, served: Sent, failing: int) -> None:
    """None serves anything until it is told again."""
    sent = adapter(2.0)
    assert stage(client, 2, sent).status_code == 200
    server.connections[failing].llm.fail = [errors.UnsupportedAdapterError("vLLM says no.")]
    refused(commit(client, 2, sent), 500, "UnsupportedAdapterError", "vLLM says no.", "serves nothing until another")
    assert served_by(client) is None
    refused(client.post("/infer/"), 503, "EngineStateError")
    for connection in server.connections:
        with pytest.raises(errors.EngineStateError, match="No policy was committed"):
            connection.switch.served()
    third = adapter(3.0)
    assert stage(client, 3, third).status_code == commit(client, 3, third).status_code == 200
    assert [c.llm.loads[-1] for c in server.connections] == [3.0, 3.0]


def test_a_cache_that_is_not_reset(server: Server, client: TestClient, served: Sent) -> None:
    sent = adapter(2.0)
    assert stage(client, 2, sent).status_code == 200
    server.connections[1].llm.resets = False
    refused(commit(client, 2, sent), 500, "CacheResetError", "reset_prefix_cache()", "serves nothing")


def test_requests_that_are_not_finished(server: Server, client: TestClient, served: Sent) -> None:
    sent = adapter(2.0)
    assert stage(client, 2, sent).status_code == 200
    server.connections[0].llm.unfinished = True
    refused(order(client, "serve", {"plain": True}), 500, "EngineStateError", "unfinished requests")
    assert status(client)["plain"] is False and [c.engine.enable_lora for c in server.connections] == [True, True]
    assert served_by(client) is None
    assert stage(client, 3, sent).status_code == 200
    refused(commit(client, 3, sent), 500, "EngineStateError", "unfinished requests", "serves nothing")


def test_workers_that_ended_or_do_not_know_us(server: Server, client: TestClient, served: Sent) -> None:
    sent = adapter(2.0)
    server.connections[0].is_mute = True
    refused(stage(client, 2, sent), 500, "EngineStateError", "Worker 0", "its log says why")
    server.connections[0].is_mute = False
    assert stage(client, 2, sent).status_code == 200
    server.connections[1].is_gone = True
    refused(commit(client, 2, sent), 500, "EngineStateError", "Worker 1 of this rollout server has ended", "nothing")
    assert served_by(client) is None


@pytest.mark.parametrize("what", ["sending", "answering"])
def test_a_worker_that_hangs(server: Server, client: TestClient, served: Sent, what: str) -> None:
    """Its pipe takes no order, or brings no answer: the next answer would be to something else, ms-swift's rollouts
    too. Meanwhile the server answers what needs no worker."""
    policies_of(server).workers._seconds = 1
    sent = adapter(2.0)
    assert announce(client, 2, sent).status_code == 200
    hangs = getattr(server.connections[0], what)
    hangs.clear()
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(receive(client, 2, sent)))
    thread.start()
    started = time.monotonic()
    assert client.post("/health/").status_code == 200 and time.monotonic() - started < 0.5
    thread.join()
    refused(answers[0], 500, "EngineStateError", "Worker 0", "restart the server")
    hangs.set()
    refused(announce(client, 3, sent), 500, "EngineStateError", "Worker 0")
    refused(client.post("/infer/"), 500, "EngineStateError", "Worker 0")
    refused(client.post("/infer/", headers={POLICY_HEADER: json.dumps(served_by(client))}), 500, "EngineStateError")
