"""What a vLLM worker of a rollout server makes of a file. No engine: what it serves is shown in tests/real/server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from swift_lora_fix import errors
from swift_lora_fix.common.digest import checksum, combine
from swift_lora_fix.engine.vllm.handle import ADAPTER_ID
from swift_lora_fix.server.rollout import receiver
from swift_lora_fix.server.wire import GONE, Layout

A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")
LAYOUT = Layout("bfloat16", ((B, (6, 2)), (A, (2, 8))), {"r": 2, "lora_alpha": 3})


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {A: torch.randn(2, 8), B: torch.randn(6, 2)}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> receiver.Receiver:
    monkeypatch.setattr(receiver, "_request_class", lambda worker: None)
    runner = SimpleNamespace(device=torch.device("cpu"))
    config = SimpleNamespace(lora_config=SimpleNamespace(lora_dtype=torch.bfloat16))
    found = receiver.Receiver(SimpleNamespace(model_runner=runner, vllm_config=config, communicator=None))
    found.do("make_room", layout=LAYOUT.as_dict(), scales={B: 1.5})
    return found


def file_of(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    safetensors.torch.save_file(tensors, str(folder / "adapter.safetensors"))
    return str(folder / "adapter.safetensors")


def held(made: receiver.Receiver) -> dict[str, torch.Tensor]:
    assert made.other is not None
    return {entry.key: entry.parameter.clone() for entry in made.other.adapter.entries}


def test_a_file_is_laid_out_scaled_and_cast(
    made: receiver.Receiver, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    made.do("read", path=file_of(tmp_path, tensors), digest="a-file", is_proved=False)
    expected = {B: (tensors[B] * 1.5).bfloat16(), A: tensors[A].bfloat16()}
    assert list(held(made)) == [B, A] and all(torch.equal(held(made)[key], expected[key]) for key in expected)
    made.do("find", digest="a-file")
    with pytest.raises(errors.StagingError, match="no longer has the adapter with digest other") as caught:
        made.do("find", digest="other")
    assert caught.value.status == GONE


def test_the_policys_digest_is_proved(
    made: receiver.Receiver, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    scaled = torch.cat(
        [(tensors[B] * 1.5).bfloat16().view(-1), tensors[A].bfloat16().view(-1), torch.zeros(4)]
    ).bfloat16()
    digest = combine([int(checksum(scaled))])
    path = file_of(tmp_path, tensors)
    made.do("read", path=path, digest=digest, is_proved=True)
    made.do("find", digest=digest)
    with pytest.raises(errors.StagingError, match=f"What was read has digest {digest}, 0123 was announced"):
        made.do("read", path=path, digest="0123", is_proved=True)
    with pytest.raises(errors.StagingError, match="no longer has"):  # what there was is overwritten
        made.do("find", digest=digest)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_what_is_not_finite_as_the_engine_holds_it(
    made: receiver.Receiver, tmp_path: Path, tensors: dict[str, torch.Tensor], value: float
) -> None:
    tensors[B][0, 0] = value
    with pytest.raises(errors.NonFiniteAdapterError, match="lora_B"):
        made.do("read", path=file_of(tmp_path, tensors), digest="a-file", is_proved=False)
    with pytest.raises(errors.StagingError):
        made.do("find", digest="a-file")


class Slots:
    """What ``AdapterWriter`` writes: the values that the engine serves. ``fail`` is raised by the next write."""

    plan = None

    def __init__(self, made: receiver.Receiver) -> None:
        assert made.served is not None
        self.adapter, self.staging = made.served.adapter, made.served.staging
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
def slots(made: receiver.Receiver, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Slots:
    """The policy ``one``, whose B begins with 1.5, is served."""
    slots = Slots(made)
    made.writer = slots  # type: ignore[assignment]
    arrive(made, tmp_path, tensors, 1.0, "one")
    made.do("serve", digest="one")
    return slots


def arrive(made: receiver.Receiver, folder: Path, tensors: dict[str, torch.Tensor], value: float, digest: str) -> None:
    tensors[B][0, 0] = value
    made.do("read", path=file_of(folder, tensors), digest=digest, is_proved=False)


def test_what_was_served_before_is_there_to_go_back_to(
    made: receiver.Receiver, slots: Slots, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    arrive(made, tmp_path, tensors, 2.0, "two")
    assert slots.served == [1.5], "what arrives is not served yet"
    slots.fail = [RuntimeError("no")]
    with pytest.raises(errors.EngineStateError, match="RuntimeError"):
        try:
            made.do("serve", digest="two")
        except RuntimeError as error:
            raise receiver.told(RuntimeError(receiver._tell(error))) from error
    made.do("serve", digest="one")
    made.do("serve", digest="two", by_reference=True)
    made.do("serve", digest="one")
    made.do("serve", digest="one")
    assert slots.served == [1.5, 1.5, 3.0, 1.5, 1.5] and slots.ways[1:3] == ["direct", "loader"]
    arrive(made, tmp_path, tensors, 4.0, "three")
    made.do("find", digest="one")
    with pytest.raises(errors.StagingError, match="no longer has"):
        made.do("serve", digest="two")


def test_what_was_written_is_what_was_to_be_served(made: receiver.Receiver, slots: Slots) -> None:
    slots.digest = "0123"
    with pytest.raises(errors.EngineStateError, match="were given 0123 where [0-9a-f]+ was to be served"):
        made.do("serve", digest="one")


@pytest.mark.parametrize("asked, direct", [("", True), ("direct", True), ("loader", False)])
def test_the_writer_that_was_asked_for(
    made: receiver.Receiver, monkeypatch: pytest.MonkeyPatch, asked: str, direct: bool
) -> None:
    monkeypatch.setenv("SWIFT_LORA_FIX_WRITER", asked)
    made.do("make_room", layout={**LAYOUT.as_dict(), "config": {"r": 2, "lora_alpha": 2}}, scales={})
    assert made.writer is not None and made.writer.wants_plan is direct


def test_modules_that_vllm_does_not_serve(made: receiver.Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(receiver.loader, "check_served", asked.append)
    for loras, times in ((set(), 0), ({ADAPTER_ID}, 1)):
        made.worker.list_loras = lambda found=loras: found
        made.do("check_served")
        assert asked == [made.engine] * times


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
        assert isinstance(told, errors.StagingError) and str(told) == str(problem) and told.status == 422


def test_room_is_kept_for_the_same_layout(made: receiver.Receiver, tmp_path: Path, tensors: dict[str, Any]) -> None:
    made.do("read", path=file_of(tmp_path, tensors), digest="a-file", is_proved=False)
    made.do("make_room", layout=LAYOUT.as_dict(), scales={B: 1.5})
    made.do("find", digest="a-file")
    made.do("make_room", layout={**LAYOUT.as_dict(), "config": {"r": 2, "lora_alpha": 2}}, scales={})
    with pytest.raises(errors.StagingError):
        made.do("find", digest="a-file")
