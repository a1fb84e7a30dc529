"""A policy's way into a rollout server, all workers or none."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fastapi.testclient import TestClient

from swift_lora_fix.engine.vllm.handle import ADAPTER_ID
from tests.support.parcels import Sent, write
from tests.support.rollout_routes import (
    CONFIGURATION,
    MODULE,
    A,
    B,
    Server,
    adapter,
    announce,
    commit,
    lease,
    order,
    policies_of,
    policy,
    prepare,
    receive,
    refused,
    rpcs,
    send_body,
    served_by,
    stage,
    status,
    wired,
)


def test_all_workers_serve_what_was_received(server: Server, client: TestClient, served: Sent) -> None:
    assert [c.llm.loads for c in server.connections] == [[1.0], [1.0]]
    assert served_by(client) == policy(1, served).as_dict() and status(client)["workers"] == 2
    second = adapter(2.0)
    assert stage(client, 2, second).status_code == 200
    assert [c.llm.loads for c in server.connections] == [[1.0], [1.0]], "staging touches no engine"
    assert served_by(client) == policy(1, served).as_dict()
    assert commit(client, 2, second).status_code == commit(client, 2, second).status_code == 200
    assert [c.llm.loads for c in server.connections] == [[1.0, 2.0]] * 2, "the second commit loads nothing"
    infos = [c.switch.served().infos() for c in server.connections]
    assert [(i["policy_version"], i["server_boot"], i["server_epoch"]) for i in infos] == [
        (2, status(client)["boot"], 0)
    ] * 2
    assert rpcs(server) == [["receive", "serve"] * 2] * 2


def test_what_is_repeated_is_done_once(server: Server, client: TestClient) -> None:
    """The trainer did not hear the answer."""
    sent = adapter(1.0)
    assert [announce(client, 1, sent).status_code for _ in range(2)] == [200] * 2
    assert [receive(client, 1, sent).status_code for _ in range(2)] == [200] * 2
    assert [commit(client, 1, sent).status_code for _ in range(2)] == [200] * 2
    assert rpcs(server)[0] == ["receive", "serve"]
    assert stage(client, 1, sent).status_code == commit(client, 1, sent).status_code == 200


def test_the_layout_is_told_once_for_each_lease(server: Server, client: TestClient, served: Sent) -> None:
    named = {"policy": policy(2, served).as_dict(), "nccl": False}
    room = [c.llm.receiver.received for c in server.connections]
    assert order(client, "stage", named).status_code == prepare(client, served).status_code == 200
    assert lease(client).status_code == 200
    refused(order(client, "stage", named), 409, "StagingError", "has made no room", "its layout first")
    assert prepare(client, served).status_code == order(client, "stage", named).status_code == 200
    assert room == [c.llm.receiver.received for c in server.connections], "the same buffer"


def test_bytes_in_the_body(server: Server, client: TestClient) -> None:
    sent = adapter(3.0)
    assert announce(client, 1, sent).status_code == 200
    refused(send_body(client, 1, sent, sent.body[:-4]), 422, "StagingError", "has 60 bytes where 64 were announced")
    assert [c.orders[-1] for c in server.connections] == ["prepare"] * 2, "what is cut is not shown to the workers"
    assert send_body(client, 1, sent).status_code == commit(client, 1, sent).status_code == 200
    assert [c.llm.loads for c in server.connections] == [[3.0], [3.0]]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large(client: TestClient, announced: bool) -> None:
    sent = adapter(1.0)
    assert announce(client, 1, sent).status_code == 200
    content: Any = sent.body * 2 if announced else iter([sent.body, sent.body])
    refused(send_body(client, 1, sent, content), 413, "StagingError", "128 bytes or more where 64")
    config = {**CONFIGURATION, "target_modules": ["q_proj"] * (17 << 18)}
    refused(
        announce(client, 1, replace(sent, layout=sent.layout.model_copy(update={"config": config}))),
        413,
        "StagingError",
    )


def test_an_adapter_that_is_too_large(server: Server, client: TestClient) -> None:
    refused(announce(client, 1, adapter(1.0, **{A: torch.ones(2, 1 << 19)})), 413, "StagingError", "MAX_MIB (now 1)")
    assert not any(c.llm.rpcs for c in server.connections)


def test_one_memory_for_all_policies_of_a_layout(server: Server, client: TestClient) -> None:
    """Written by the trainer or as bodies; another layout or another trainer gets another."""
    sent, other = adapter(1.0), adapter(2.0)
    memory = announce(client, 1, sent).json()["memory"]
    assert memory["size"] == len(sent.body)
    assert send_body(client, 1, sent).status_code == commit(client, 1, sent).status_code == 200
    again = order(client, "stage", {"policy": policy(2, other).as_dict(), "nccl": False}).json()["memory"]
    assert again == memory
    refused(receive(client, 2, other), 422, "StagingError", f"has digest {sent.digest}, {other.digest} was announced")
    assert served_by(client)["version"] == 1, "the one that it has"
    for renewed in (partial(prepare, client, sent), partial(lease, client)):
        assert policies_of(server).memory is not None
        assert renewed().status_code == 200 and policies_of(server).memory is None
        assert stage(client, 2, other).status_code == 200


def test_a_body_that_was_to_come_over_nccl(open_server: Server, nccl: TestClient) -> None:
    sent = adapter(1.0)
    wired(open_server, sent)
    assert announce(nccl, 1, sent, nccl=True).json().get("memory") is None
    refused(send_body(nccl, 1, sent), 409, "StagingError", "announced to come over NCCL, and came as a body")


def test_by_reference(server: Server, client: TestClient) -> None:
    sent = adapter(1.0)
    assert stage(client, 1, sent).status_code == 200
    refused(commit(client, 1, sent, by_reference="yes"), 400, "ProtocolError", "by_reference is 'yes'")
    assert commit(client, 1, sent, by_reference=True).status_code == 200
    assert server.connections[0].llm.rpcs[-1][1]["by_reference"] is True


@pytest.mark.parametrize("changes", [{"boot": "0" * 16}, {"epoch": 1}])
def test_orders_for_another_process_or_base_are_refused(server: Server, client: TestClient, changes: Any) -> None:
    sent = adapter(1.0)
    named = policy(1, sent).as_dict()
    orders: list[tuple[str, dict[str, Any]]] = [
        ("prepare", {"layout": sent.layout.as_dict()}),
        ("stage", {"policy": named, "nccl": False}),
        ("receive", {"policy": named, "written": True}),
        ("commit", {"policy": named}),
        ("serve", {"plain": True}),
        ("push", {"ends": False}),
    ]
    for route, content in orders:
        refused(order(client, route, content, **changes), 412, "StagingError", "it restarted, or its base was written")
        if route != "push":
            answer = order(client, route, content)
            assert answer.status_code == 200
            if route == "stage":
                write(answer.json()["memory"], sent)


def test_a_base_that_is_written_over_ends_the_policy(open_server: Server, nccl: TestClient) -> None:
    """By its own trainer, which says so before and after."""
    sent = adapter(1.0)
    assert stage(nccl, 1, sent).status_code == commit(nccl, 1, sent).status_code == 200
    refused(nccl.post("/update_named_param/"), 409, "StagingError", "is alive")
    assert order(nccl, "push", {"ends": False}).json()["epoch"] == 1
    assert served_by(nccl) is None
    refused(nccl.post("/infer/"), 503, "EngineStateError")
    refused(announce(nccl, 2, sent), 409, "StagingError", "begun to be sent to this server and not ended")
    assert nccl.post("/update_named_param/").status_code == 200
    assert order(nccl, "push", {"ends": True}).json()["epoch"] == 1
    assert stage(nccl, 2, sent).status_code == commit(nccl, 2, sent).status_code == 200


def test_what_ms_swift_only_logs_is_told(open_server: Server, nccl: TestClient) -> None:
    """Each time that it is asked: the answer may have been lost."""
    assert order(nccl, "push", {"ends": False}).status_code == 200
    open_server.connections[1].llm.receiver.failures.append("RuntimeError: no such parameter")
    for _ in range(2):
        refused(order(nccl, "push", {"ends": True}), 500, "EngineStateError", "1 updates over NCCL failed", "no such")
    refused(announce(nccl, 2, adapter(1.0)), 409, "StagingError", "not ended")
    assert order(nccl, "push", {"ends": False}).status_code == order(nccl, "push", {"ends": True}).status_code == 200


def test_an_adapter_comes_over_nccl(open_server: Server, nccl: TestClient) -> None:
    sent = adapter(1.0)
    wired(open_server, sent)
    assert announce(nccl, 1, sent, nccl=True).status_code == 200
    refused(commit(nccl, 1, sent), 409, "StagingError", "nothing is staged")
    refused(receive(nccl, 2, sent, False), 409, "StagingError", "was not announced")
    assert receive(nccl, 1, sent, False).status_code == commit(nccl, 1, sent).status_code == 200
    assert rpcs(open_server) == [["check_nccl", "receive", "serve"]] * 2
    assert [c.llm.loads for c in open_server.connections] == [[1.0], [1.0]]
    request = open_server.connections[0].switch.served().request
    assert (request.lora_int_id, request.load_inplace) == (ADAPTER_ID, False)


def test_a_server_without_nccl_says_so_and_takes_it_otherwise(
    open_server: Server, nccl: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = adapter(1.0)
    refused(announce(nccl, 1, sent, nccl=True), 501, "StagingError", "no NCCL connection")
    assert stage(nccl, 1, sent).status_code == commit(nccl, 1, sent).status_code == 200
    wired(open_server, sent)
    assert announce(nccl, 2, sent, nccl=True).status_code == 200
    open_server.connections[1].llm.worker.communicator.device = "cuda:0"
    refused(announce(nccl, 2, sent, nccl=True), 501, "StagingError", "no room for the adapter on their devices")


IN_A = f"base_model.model.{MODULE.replace('q_proj', 'in_A_proj')}"


@pytest.mark.parametrize(
    "tensors, changes, status_code, phrase",
    [
        ({B: torch.ones(6, 3)}, {}, 422, "A has rank 2 and B 3"),
        ({B: torch.ones(7, 2)}, {}, 422, "are for (7, 8)"),
        ({B: None}, {}, 422, "has only lora_A"),
        ({A: None, B: None, "a.b": torch.ones(2, 2)}, {}, 422, "no LoRA matrix"),
        ({f"{IN_A}.lora_A.weight": torch.ones(2, 8), f"{IN_A}.lora_B.weight": torch.ones(5, 2)}, {}, 422, "in_A_proj"),
        ({}, {"dtype": "int8"}, 422, "in bfloat16, not in int8"),
        ({}, {"dtype": "float32"}, 422, "in bfloat16, not in float32"),
        ({}, {"config": {**CONFIGURATION, "use_dora": True}}, 422, "DoRA"),
        ({}, {"entries": ()}, 422, "has no tensors"),
        ({}, {"config": {**CONFIGURATION, "r": 1, "lora_alpha": 1}}, 422, "rank 2"),
        ({}, {"config": {**CONFIGURATION, "lora_alpha": 4}}, 400, "r=2 and lora_alpha=4: the scaling is in B"),
    ],
)
def test_what_is_announced_is_checked_before_any_byte(
    tmp_path: Path, open_server: Server, nccl: TestClient, tensors: Any, changes: Any, status_code: int, phrase: str
) -> None:
    weights = {f"{m}.weight": torch.zeros(6, 8) for m in (MODULE, MODULE.replace("q_proj", "in_A_proj"))}
    safetensors.torch.save_file(weights, str(tmp_path / "model.safetensors"))
    sent = adapter(1.0, **tensors)
    answer = announce(nccl, 1, replace(sent, layout=sent.layout.model_copy(update=changes)), nccl=True)
    assert answer.status_code == status_code and phrase in answer.json()["message"], answer.text
    assert rpcs(open_server) == [[], []]
    assert receive(nccl, 1, sent, False).status_code == 409


def test_a_layout_that_is_none(nccl: TestClient) -> None:
    sent = adapter(1.0)
    for layout in (None, [], {"dtype": "bfloat16"}, {**sent.layout.as_dict(), "more": 1}):
        refused(order(nccl, "prepare", {"layout": layout}), 400, "ProtocolError", "layout")
    shape = {**sent.layout.as_dict(), "entries": [[A, [0, 8]]]}
    refused(order(nccl, "prepare", {"layout": shape}), 400, "ProtocolError", "entries.0.1.0 is '0'", "greater than 0")
