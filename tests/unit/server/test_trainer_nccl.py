"""The trainer's side over NCCL, whose wire is a stand-in; real ones are in tests/real/server."""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_lora_fix import errors
from swift_lora_fix.engine.vllm.weights import base
from swift_lora_fix.frameworks.swift.port import SwiftTrainer
from swift_lora_fix.policy import model_files
from swift_lora_fix.server.trainer import remote
from tests.support.scripted_servers import (
    FIRST,
    SENT,
    Scripted,
    change,
    remote_writer,
    send,
    trainer_for,
    writer_for,
)


class Wire:
    """In place of vLLM's ``PyNcclCommunicator``."""

    def __init__(self, world_size: int = 2) -> None:
        self.world_size, self.rank, self.device = world_size, world_size - 1, torch.device("cpu")
        self.disabled, self.group = False, SimpleNamespace()
        self.sent: list[bytes] = []
        self.works: Any = lambda: None

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        self.works()
        self.sent.append(bytes(tensor.numpy().tobytes()))


@pytest.fixture
def wired(model: Any, scripts: list[Scripted], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trainer, writer and wires where no transport is asked for by name."""
    monkeypatch.delenv("SWIFT_LORA_FIX_TRANSPORT")
    trainer = trainer_for(model, scripts)
    wires = trainer.vllm_client.pynccl_comms = [Wire() for _ in scripts]
    trainer.vllm_client.hosts, trainer.vllm_client.group_ports = ["127.0.0.1"] * 2, [1, 2]
    return trainer, remote_writer(trainer, model), wires


def test_both_sides_of_nccl(model: Any, scripts: list[Scripted], wired: Any) -> None:
    _, writer, wires = wired
    digest = send(writer)
    for script, wire in zip(scripts, wires):
        assert script.routes() == FIRST and script.policy["digest"] == digest
        assert len(wire.sent) == 1 and len(wire.sent[0]) == 2 * writer._staging.buffer.numel()
        assert script.layout.dtype == "bfloat16"
    assert wires[0].sent == wires[1].sent and writer._parcel.host is None, "no host memory was needed"
    change(model)
    send(writer)
    assert scripts[0].routes() == [*FIRST, *SENT], "the layout is told once"


def test_a_server_that_takes_nothing_over_nccl_reads_memory(
    model: Any, scripts: list[Scripted], wired: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, writer, wires = wired
    scripts[1].faults["stage"] = [(501, {"message": "no NCCL connection"}, {})]
    send(writer)
    assert scripts[0].routes() == FIRST
    assert scripts[1].routes() == ["prepare", "stage", *SENT] and scripts[1].calls[-2][1]["written"]
    assert not writer.engine.reaches_all and not wires[1].sent
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "nccl")
    named = remote_writer(wired[0], model)
    with pytest.raises(errors.RolloutServerError, match=f"no NCCL connection to .*{scripts[1].url}"):
        send(named)


def test_a_broadcast_that_nobody_takes_part_in_is_given_up(model: Any, scripts: list[Scripted], wired: Any) -> None:
    _, writer, wires = wired
    over = threading.Event()
    wires[1].works = over.wait
    with pytest.raises(errors.RolloutServerError, match=f"{scripts[1].url} did not take part .* within 3 s"):
        send(writer)
    over.set()
    assert scripts[0].policy is None, "nobody switched"
    while not wires[1].sent:
        time.sleep(0.01)
    send(writer)
    assert len(wires[1].sent) == 1, "what waits on it would come before whatever is sent next"


def test_a_server_that_dies_within_a_broadcast_is_connected_again(
    model: Any, scripts: list[Scripted], wired: Any
) -> None:
    trainer, writer, wires = wired
    send(writer)
    change(model)
    trainer.vllm_client.connect = lambda one: fresh
    fresh, over = Wire(), threading.Event()
    wires[1].works = over.wait
    scripts[1].faults["receive"] = [lambda: scripts[1].restart()]
    digest = send(writer)
    over.set()
    assert [script.policy["digest"] for script in scripts] == [digest] * 2 and writer.engine.nccl.all_are_open()
    assert len(fresh.sent) == 1, "and it came over NCCL"


def test_a_connection_that_does_not_open_again_is_given_up(
    model: Any, scripts: list[Scripted], wired: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, writer, _ = wired
    logging.getLogger("swift").propagate = True
    send(writer)
    over = threading.Event()
    trainer.vllm_client.connect = lambda one: over.wait()
    scripts[1].restart()
    assert writer.engine.make_ready() and not writer.engine.nccl.is_open(1) and writer.is_current()
    over.set()
    assert "NCCL could not be opened again (not within 3 s)" in caplog.text
    assert any(content.get("written") for route, content in scripts[1].calls if route == "receive")


def test_what_a_server_refuses_to_receive_closes_nccl(model: Any, scripts: list[Scripted], wired: Any) -> None:
    _, writer, wires = wired
    over = threading.Event()
    wires[0].works = over.wait
    scripts[0].faults["receive"] = [(422, {"message": "digest differs"}, {})]
    with pytest.raises(errors.RolloutServerError, match="digest differs"):
        send(writer)
    over.set()
    assert not writer.engine.nccl.is_open(0) and writer.engine.nccl.is_open(1)


def test_a_base_that_differs_is_sent_and_sent_again(
    model: Any, scripts: list[Scripted], wired: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, writer, _ = wired
    trainer.vllm_client.connect = lambda one: Wire()
    pushes: list[list[str]] = []
    monkeypatch.setattr(base, "send", lambda *_: pushes.append([s.routes()[-1] for s in scripts]))
    with torch.no_grad():
        model.base_model.model.first.base_layer.weight[0, 0] += 1e-3
    writer.send_base()
    assert pushes == [["push", "push"]] and [s.epoch for s in scripts] == [1, 1], "begun before it"
    assert scripts[0].calls[-1][1]["ends"] is True, "and ended after it"
    send(writer)
    assert scripts[0].routes()[-3:] == SENT and writer.is_current()
    scripts[1].restart()
    writer.ranks = 2  # the other ranks are elsewhere while the main one looks after servers
    writer._on_main = None
    writer.engine.make_ready()
    assert len(pushes) == 2 and writer.is_current()
    assert [s.epoch for s in scripts] == [2, 1], "ms-swift can only send a base to all: the others begin anew, too"
    scripts[0].faults["push"] = [None, (500, {"message": "1 updates over NCCL failed"}, {})]
    del writer._on_main
    writer.ranks = 1
    with pytest.raises(errors.RolloutServerError, match="1 updates over NCCL failed"):
        writer.send_base()


def test_a_server_with_a_base_of_another_run(
    model: Any, scripts: list[Scripted], wired: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model folder says nothing of what it computes with."""
    pushes: list[int] = []
    monkeypatch.setattr(base, "send", lambda *_: pushes.append(1))
    trainer, writer, _ = wired
    writer.send_base()
    assert not pushes
    scripts[1].epoch = 1
    writer.engine.check_fit()
    writer.send_base()
    assert pushes == [1], "so it is sent the trainer's"
    writer.engine.nccl.close(1, "a test")
    with pytest.raises(errors.BaseMismatchError, match=f"{scripts[0].url} has a base that was sent to it"):
        writer.engine.check_fit()
        writer.send_base()


def test_a_base_that_somebody_writes_over_is_noticed(model: Any, scripts: list[Scripted]) -> None:
    _, writer = writer_for(model, scripts)
    send(writer)
    scripts[1].epoch = 1
    assert not writer.is_current()
    with pytest.raises(errors.BaseMismatchError, match=scripts[1].url):
        send(writer)


def test_layers_that_changed_places_are_another_base(model: Any) -> None:
    shape = (2, 2)
    mine = {f"model.layers.{n}.up.weight": (torch.bfloat16, shape, 10 + n) for n in range(3)}
    theirs = {name: ["bfloat16", list(shape), value] for name, (_, _, value) in mine.items()}
    renamed = {name.replace("model.", "language."): content for name, content in theirs.items()}
    assert model_files.compared(mine, theirs) == model_files.compared(mine, renamed) == ([], [])
    for held in (theirs, renamed):
        first, second = list(held)[:2]
        held[first], held[second] = held[second], held[first]
        assert model_files.compared(mine, held)[0] == list(mine)[:2]
    assert model_files.compared({"a.weight": (torch.bfloat16, (9,), 1)}, theirs) == ([], ["a.weight"])


def test_nccl_on_one_side_alone_is_an_error(model: Any, scripts: list[Scripted], wired: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "reload")
    with pytest.raises(errors.SettingsError, match=f"{scripts[0].url} has opened NCCL"):
        remote.RemoteEngine(SwiftTrainer(wired[0]))


def test_a_restarted_server_is_connected_again(model: Any, scripts: list[Scripted], wired: Any) -> None:
    trainer, writer, wires = wired
    send(writer)
    fresh = Wire()
    seen: list[Any] = []

    def connect(one: Any) -> Wire:
        seen.append((one.base_urls, one.group_ports, one.num_servers))
        return fresh

    client = trainer.vllm_client
    client.connect = connect
    scripts[1].restart()
    assert writer.engine.make_ready()
    assert seen == [([scripts[1].url], [2], 1)] and client.num_servers == 2
    assert len(fresh.sent) == 1 and len(wires[0].sent) == 2 and scripts[1].policy == scripts[0].policy
