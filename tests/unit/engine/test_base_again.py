"""A base that an engine lost goes straight to where the push had put it, or through vLLM's loading again."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_lora_fix.engine.vllm.watch import WriteRecorder
from swift_lora_fix.engine.vllm.weights import base
from swift_lora_fix.policy import adapter, merging
from swift_lora_fix.proof import audit
from tests.support.fakes.trainer import port_of
from tests.support.peft_models import peft_model

Write = Callable[["Engine", str, torch.Tensor], None]


class Engine(torch.nn.Module):
    """Rows 0 to 12 of ``packed`` are the trainer's first layer. write: what vLLM does beside the copies."""

    def __init__(self, write: Write = lambda engine, name, value: None) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(8, 10, bias=False, dtype=torch.bfloat16)
        self.packed = torch.nn.Linear(8, 12, bias=False, dtype=torch.bfloat16)
        self.second = torch.nn.Linear(12, 4, bias=False, dtype=torch.bfloat16)
        self.derived: torch.Tensor | None = None
        self.pool = torch.zeros(1, 4, 12)
        self.loads, self._write = 0, write

    def load(self, weights: Any) -> None:
        self.loads += 1
        for name, value in weights.items():
            if "embed" in name:
                self.embed.weight.data.copy_(value)
            elif "first" in name:
                for row in (0, 6):
                    self.packed.weight.data.narrow(0, row, 6).copy_(value[row : row + 6])
            elif "second" in name:
                self.second.weight.data.copy_(value)
            self._write(self, name, value)

    def lose(self) -> dict[str, torch.Tensor]:
        """What it held."""
        held = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        for parameter in self.parameters():
            parameter.data.fill_(torch.nan)
        return held


def pushed_to(model: torch.nn.Module, engine: Engine, changing: bool = False) -> tuple[Any, Any, base.Pushed]:
    trainer, bound = port_of(model, take=engine.load, has_lora=False), adapter.bind(model, apart=False)
    handle: Any = SimpleNamespace(model=engine, load_format="auto")
    sources = {source for module in merging.bind(model, "default") for source in module.sources}
    return trainer, bound, base.push(trainer, handle, bound, sources if changing else ())


def test_it_is_copied_straight_to_where_it_was() -> None:
    model, engine = peft_model(), Engine()
    trainer, bound, pushed = pushed_to(model, engine)
    held = engine.lose()
    assert base.repeat(trainer, bound, pushed) and engine.loads == 1
    assert all(torch.equal(value, held[name]) for name, value in engine.named_parameters())


def test_what_will_be_overwritten_anyway_is_left_out() -> None:
    model, engine = peft_model(), Engine()
    trainer, bound, pushed = pushed_to(model, engine, changing=True)
    held = engine.lose()
    assert base.repeat(trainer, bound, pushed)
    assert torch.equal(engine.embed.weight, held["embed.weight"]) and engine.packed.weight.isnan().all()


def derives(engine: Engine, name: str, value: torch.Tensor) -> None:
    """As vLLM computes MLA's absorbed weights: a sleep would lose them, too."""
    if "second" in name:
        engine.derived = engine.second.weight.data.float() * 2


def scales_in_place(engine: Engine, name: str, value: torch.Tensor) -> None:
    if "second" in name:
        engine.second.weight.data.mul_(2)


def repacks(engine: Engine, name: str, value: torch.Tensor) -> None:
    if "second" in name:
        engine.second.weight = torch.nn.Parameter(engine.second.weight.data.clone())


def makes_another(engine: Engine, name: str, value: torch.Tensor) -> None:
    if "second" in name:
        engine.second.weight.data.copy_(value.clone())


def joins(engine: Engine, name: str, value: torch.Tensor) -> None:
    if "second" in name:
        engine.derived = torch.cat([engine.second.weight.data, engine.second.weight.data])


def notes_a_scale(engine: Engine, name: str, value: torch.Tensor) -> None:
    if "second" in name:
        engine.derived = engine.second.weight.data.abs().amax().reshape(1)


def derives_from_what_came(engine: Engine, name: str, value: torch.Tensor) -> None:
    if "second" in name:
        engine.derived = value.float() * 2


def fills_a_pool(engine: Engine, name: str, value: torch.Tensor) -> None:
    if "second" in name:
        engine.pool.copy_(torch.stack([engine.second.weight.data.float()]))


MORE = [derives, scales_in_place, repacks, makes_another, joins, notes_a_scale, derives_from_what_came, fills_a_pool]


@pytest.mark.parametrize("write", MORE)
def test_what_is_more_than_copies_goes_through_vllms_loading_again(write: Write) -> None:
    model, engine = peft_model(), Engine(write)
    trainer, bound, pushed = pushed_to(model, engine)
    engine.lose()
    assert not base.repeat(trainer, bound, pushed)


def fills_a_buffer(engine: Engine, name: str, value: torch.Tensor) -> None:
    """vLLM keeps these through a sleep by itself."""
    if "second" in name:
        engine.get_buffer("scale").copy_(engine.second.weight.data.abs().amax())


def test_what_is_made_for_a_buffer_stays_there() -> None:
    model, engine = peft_model(), Engine(fills_a_buffer)
    engine.register_buffer("scale", torch.zeros(()))
    trainer, bound, pushed = pushed_to(model, engine)
    engine.lose()
    assert base.repeat(trainer, bound, pushed)


@pytest.mark.parametrize("changing", [False, True])
def test_a_trainers_base_that_drifts_is_not_taken_for_the_one_that_was_sent(changing: bool) -> None:
    model, engine = peft_model(), Engine()
    trainer, bound, pushed = pushed_to(model, engine, changing)
    engine.lose()
    with torch.no_grad():
        model.base_model.model.embed.weight[0, 0] += 1
    assert not base.repeat(trainer, bound, pushed)
    handle: Any = SimpleNamespace(model=engine, load_format="auto")
    again = base.push(trainer, handle, bound, before=pushed)
    finding = audit.base(again.record, set())
    assert finding is not None and finding.cause == "trainer-base-changed" and "embed" in finding.evidence


@pytest.mark.parametrize("changing", [False, True])
def test_an_engine_whose_weights_were_replaced_is_loaded_again(changing: bool) -> None:
    model, engine = peft_model(), Engine()
    trainer, bound, pushed = pushed_to(model, engine, changing)
    engine.lose()
    engine.packed.weight = torch.nn.Parameter(engine.packed.weight.data.clone())
    assert not base.repeat(trainer, bound, pushed)


class Wrapping(torch.Tensor):
    """As a DTensor is: it has no memory of its own."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapping:
        made: Wrapping = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = [value.inner if isinstance(value, Wrapping) else value for value in args]
        return Wrapping(func(*inner, **(kwargs or {})))


def test_tensors_without_memory_of_their_own_are_let_through() -> None:
    """Under FSDP2 the trainer's parameters are such, and are made whole while the push is watched."""
    engine = Engine()
    with WriteRecorder(engine, lambda part: None, ()):
        engine.second.weight.data.copy_(torch.ones(4, 12))
        assert torch.equal((Wrapping(torch.ones(2)) + 1).inner, torch.full((2,), 2.0))
