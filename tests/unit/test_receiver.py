"""What a vLLM worker of a rollout server makes of a file. No engine: what it serves is shown in tests/server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from swift_lora_fix import errors
from swift_lora_fix.digest import checksum, combine
from swift_lora_fix.server import receiver
from swift_lora_fix.server.protocol import GONE, Layout

A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")
LAYOUT = Layout("bfloat16", ((B, (6, 2)), (A, (2, 8))), {"r": 2, "lora_alpha": 3})


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {A: torch.randn(2, 8), B: torch.randn(6, 2)}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> receiver.Receiver:
    monkeypatch.setattr(receiver, "_request_class", lambda worker: None)
    config = SimpleNamespace(lora_config=SimpleNamespace(lora_dtype=torch.bfloat16))
    found = receiver.Receiver(SimpleNamespace(device="cpu", vllm_config=config, communicator=None))
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


def test_room_is_kept_for_the_same_layout(made: receiver.Receiver, tmp_path: Path, tensors: dict[str, Any]) -> None:
    made.do("read", path=file_of(tmp_path, tensors), digest="a-file", is_proved=False)
    made.do("make_room", layout=LAYOUT.as_dict(), scales={B: 1.5})
    made.do("find", digest="a-file")
    made.do("make_room", layout={**LAYOUT.as_dict(), "config": {"r": 2, "lora_alpha": 2}}, scales={})
    with pytest.raises(errors.StagingError):
        made.do("find", digest="a-file")
