"""What a vLLM worker of a rollout server makes of what arrives. No engine: what it serves is in tests/real/server."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_lora_fix import errors
from swift_lora_fix.engine.vllm.handle import ADAPTER_ID, ADAPTER_PATH
from swift_lora_fix.server.rollout import receiver
from swift_lora_fix.server.shared import Mapped, Memory, Opened
from swift_lora_fix.server.wire import NO_NCCL, UNSEEN, Address, Layout
from tests.support.parcels import Sent, staged

A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")
CONFIGURATION = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
LAYOUT = Layout(dtype="bfloat16", entries=((B, (6, 2)), (A, (2, 8))), config=CONFIGURATION)
OTHER = LAYOUT.model_copy(update={"config": {**CONFIGURATION, "target_modules": ["q_proj", "k_proj"]}})


def sent(value: float, digest: str | None = None) -> Sent:
    """B begins with ``value``."""
    torch.manual_seed(0)
    tensors = {B: torch.randn(6, 2), A: torch.randn(2, 8)}
    tensors[B][0, 0] = value
    return staged({name: tensor.bfloat16() for name, tensor in tensors.items()}, CONFIGURATION, digest)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> receiver.Receiver:
    monkeypatch.setattr(receiver, "_request_class", lambda worker: SimpleNamespace)
    manager = SimpleNamespace(_load_adapter=lambda request: request)
    runner = SimpleNamespace(device=torch.device("cpu"), lora_manager=manager)
    lora, model = SimpleNamespace(lora_dtype=torch.bfloat16, max_lora_rank=4), SimpleNamespace(model=str(tmp_path))
    config = SimpleNamespace(lora_config=lora, model_config=model)
    found = receiver.Receiver(SimpleNamespace(model_runner=runner, vllm_config=config, communicator=None))
    found.prepare(LAYOUT.as_dict())
    return found


def arrive(made: receiver.Receiver, what: Sent) -> None:
    made.receive(digest=what.digest, memory=what.memory.address.as_dict())


def test_what_arrives_is_laid_out_as_it_was_staged(made: receiver.Receiver) -> None:
    arrive(made, sent(1.5))
    assert made.received is not None and made.received.digest == sent(1.5).digest
    held = made.received.tensors()
    assert list(held) == [B, A] and held[B].shape == (6, 2) and held[B][0, 0] == 1.5


@pytest.mark.parametrize(
    "what, kind, phrase",
    [
        (sent(1.5, "0123456789abcdef"), errors.StagingError, "has digest .*, 0123456789abcdef was announced"),
        (sent(float("nan")), errors.NonFiniteAdapterError, "lora_B"),
        (sent(float("inf")), errors.NonFiniteAdapterError, "lora_B"),
    ],
)
def test_what_is_not_the_policy_is_refused(
    made: receiver.Receiver, slots: Slots, what: Sent, kind: Any, phrase: str
) -> None:
    arrive(made, sent(1.5))
    with pytest.raises(kind, match=phrase):
        arrive(made, what)
    for digest in (what.digest, sent(1.5).digest):  # what there was is overwritten
        with pytest.raises(errors.StagingError, match="no longer has the adapter") as caught:
            made.serve(digest=digest)
        assert caught.value.status == 422
    assert slots.served == []


def test_memory_of_another_size(made: receiver.Receiver) -> None:
    memory = Memory(60)
    with pytest.raises(errors.StagingError, match="60 bytes came where 64 were announced"):
        made.receive(digest="0", memory=memory.address.as_dict())
    lying = memory.address.model_copy(update={"size": 64})
    with pytest.raises(errors.StagingError, match="has 60 bytes where 64 were sent"):
        Opened().at(lying, pins=False)


def test_what_is_no_policys_memory_is_not_opened() -> None:
    with open("/etc/passwd") as file:
        address = Address(pid=Memory(8).address.pid, descriptor=file.fileno(), size=8)
        with pytest.raises(errors.StagingError, match="but ./etc/passwd.") as caught:
            Opened().at(address, pins=False)
    assert caught.value.status == UNSEEN


def test_memory_is_mapped_once_as_long_as_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(Mapped, "pin", lambda mapped: pinned.append(mapped.tensor.data_ptr()))
    opened, memory = Opened(), Memory(8)
    memory.tensor.fill_(1)
    first = opened.at(memory.address, pins=True)
    assert first.tolist() == [1] * 8 and pinned == [first.data_ptr()]
    memory.tensor.fill_(2)
    again = opened.at(memory.address, pins=False)
    assert again.data_ptr() == first.data_ptr() and again.tolist() == [2] * 8 and len(pinned) == 1
    other = Memory(8)
    other.tensor.fill_(3)
    os.dup2(other.address.descriptor, memory.address.descriptor)  # another one, of the same process and number
    assert opened.at(memory.address, pins=False).tolist() == [3] * 8


def test_memory_that_is_gone(made: receiver.Receiver) -> None:
    what = sent(1.5)
    digest, address = what.digest, what.memory.address.as_dict()
    del what
    with pytest.raises(errors.StagingError, match="cannot be opened here") as caught:
        made.receive(digest=digest, memory=address)
    assert caught.value.status == UNSEEN


def test_a_worker_without_nccl(made: receiver.Receiver) -> None:
    for communicator in (None, SimpleNamespace(disabled=True)):
        made.worker.communicator = communicator
        with pytest.raises(errors.StagingError, match="no NCCL connection") as caught:
            made.check_nccl()
        assert caught.value.status == NO_NCCL
    made.worker.communicator = SimpleNamespace(device="cpu")
    made.check_nccl()


class Slots:
    """What ``AdapterWriter`` writes: the values that the engine serves. ``fail`` is raised by the next write."""

    plan = None

    def __init__(self, made: receiver.Receiver) -> None:
        assert made.received is not None
        self.adapter, self.staging = made.received.adapter, made.received.staging
        self.served: list[float] = []
        self.ways: list[str] = []
        self.fail: list[Exception] = []
        self.digest = ""

    def is_current(self) -> bool:
        return True

    def write(self, way: str = "direct") -> Any:
        if self.fail:
            raise self.fail.pop(0)
        self.ways.append(way)
        self.served.append(self.adapter.parameters[0][0, 0].item())
        return SimpleNamespace(digest=self.digest or self.staging.digest())

    def write_by_reference(self) -> Any:
        return self.write("loader")

    def finish(self) -> None:
        pass

    accept = finish


@pytest.fixture
def slots(made: receiver.Receiver) -> Slots:
    made.writer = Slots(made)  # type: ignore[assignment]
    return made.writer  # type: ignore[return-value]


def test_it_is_written_when_it_is_to_be_served(made: receiver.Receiver, slots: Slots) -> None:
    first, second = sent(1.5), sent(3.0)
    arrive(made, first)
    made.serve(digest=first.digest)
    arrive(made, second)
    assert slots.served == [1.5], "what arrives is not served yet"
    slots.fail = [RuntimeError("no")]
    with pytest.raises(RuntimeError):
        made.serve(digest=second.digest)
    made.serve(digest=second.digest, by_reference=True)
    assert slots.served == [1.5, 3.0] and slots.ways == ["direct", "loader"]
    slots.digest = "0123"
    with pytest.raises(errors.EngineStateError, match=f"were given 0123 where {second.digest} was to be served"):
        made.serve(digest=second.digest)


def test_a_repair_clears_the_memory_of_the_kv_cache(made: receiver.Receiver, slots: Slots) -> None:
    """NaN that was there would reach the answers of the policy that is repaired."""
    memory = [torch.full((2, 3), float("nan")) for _ in range(3)]
    made.worker.model_runner.kv_caches = [memory[0], memory[1:]]
    arrive(made, sent(1.5))
    made.serve(digest=sent(1.5).digest)
    assert all(part.isnan().all() for part in memory), "a sync costs nothing"
    made.serve(digest=sent(1.5).digest, by_reference=True)
    assert all((part == 0).all() for part in memory)


def test_room_is_kept_for_the_same_layout(made: receiver.Receiver) -> None:
    arrive(made, sent(1.5))
    before = made.received
    made.prepare(LAYOUT.as_dict())
    assert made.received is before
    made.prepare(OTHER.as_dict())
    with pytest.raises(errors.StagingError, match="no longer has"):
        made.serve(digest=sent(1.5).digest)


@pytest.mark.parametrize("asked, direct", [("", True), ("direct", True), ("loader", False)])
def test_the_writer_that_was_asked_for(
    made: receiver.Receiver, monkeypatch: pytest.MonkeyPatch, asked: str, direct: bool
) -> None:
    monkeypatch.setenv("SWIFT_LORA_FIX_WRITER", asked)
    made.prepare(OTHER.as_dict())
    assert made.writer is not None and made.writer.wants_plan is direct


def test_without_room_on_the_device_it_comes_into_host_memory(
    made: receiver.Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And vLLM's own loader takes it from there, but not over NCCL."""

    class Full(receiver.Received):
        def __init__(self, layout: Layout, device: torch.device) -> None:
            if device is not receiver.CPU:
                raise torch.OutOfMemoryError("Tried to allocate 20 GiB.")
            super().__init__(layout, device)

    monkeypatch.setattr(receiver, "Received", Full)
    made.prepare(OTHER.as_dict())
    assert made.writer is not None and not made.writer.wants_plan
    arrive(made, sent(1.5))
    made.worker.communicator = SimpleNamespace(device="cuda:0")
    with pytest.raises(errors.StagingError, match="no room for the adapter on their devices"):
        made.check_nccl()


def test_what_vllm_drops_it_loads_again(made: receiver.Receiver, slots: Slots) -> None:
    """With data parallelism an idle rank does. Never with what has come since."""
    first = sent(1.5)
    arrive(made, first)
    made.serve(digest=first.digest)
    made.serve(digest=first.digest)
    load = made.worker.model_runner.lora_manager._load_adapter
    ours = SimpleNamespace(lora_int_id=ADAPTER_ID, lora_path=ADAPTER_PATH)
    loaded = load(ours)
    assert loaded.lora_tensors[B][0, 0] == 1.5 and loaded.peft_config["r"] == loaded.peft_config["lora_alpha"] == 2
    for other in (SimpleNamespace(lora_int_id=1, lora_path=ADAPTER_PATH), loaded):
        assert load(other) is other
    arrive(made, sent(3.0))
    with pytest.raises(errors.EngineStateError, match="the next one is here already"):
        load(ours)


@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_in_one_worker_is_raised_in_the_last(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """And by none of the others: vLLM would leave the answers of those after it to its next call."""
    problem = errors.StagingError("What was read has another digest.", 422)
    texts = [receiver._tell(problem) if rank == failing else None for rank in range(2)]

    def gather(found: list[Any], mine: Any, group: Any) -> None:
        assert mine in texts
        found[:] = texts

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank in range(2):
        group = SimpleNamespace(world_size=2, rank_in_group=rank, cpu_group=None)
        monkeypatch.setattr("vllm.distributed.parallel_state.get_tp_group", lambda group=group: group)
        mine = problem if rank == failing else None
        if rank == 0:
            receiver.raise_together(mine)
            continue
        with pytest.raises(errors.EngineStateError) as caught:
            receiver.raise_together(mine)
        told = receiver.told(caught.value)
        assert told == {"error": "StagingError", "message": str(problem), "status": 422}
