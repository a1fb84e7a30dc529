"""Validation and the guard over the slots; parity with vLLM's own loader is in tests/real/vllm."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from swift_lora_fix import errors
from swift_lora_fix.engine.vllm.slots import plan, writer
from swift_lora_fix.policy import adapter
from tests.support.fakes.engine import plan_of
from tests.support.peft_models import peft_model


def writer_for(model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> writer.AdapterWriter:
    engine = SimpleNamespace(lora_dtype=dtype)
    return writer.AdapterWriter(engine, adapter.bind(model), request_class=None, device=torch.device("cpu"))  # type: ignore[arg-type]


def validate(guard: writer.AdapterWriter) -> None:
    guard.begin_validation()
    guard.validate()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, 3])
def test_a_value_that_is_not_finite_is_named(value: float, index: int) -> None:
    model = peft_model()
    guard = writer_for(model)
    validate(guard)
    entry = guard.adapter.entries[index]
    with torch.no_grad():
        entry.parameter.view(-1)[1] = value
    with pytest.raises(errors.NonFiniteAdapterError) as caught:
        validate(guard)
    assert (
        entry.key in str(caught.value)
        and "(1 tensors)" in str(caught.value)
        and "keeps the previous policy" in str(caught.value)
    )


def test_a_value_that_overflows_the_lora_dtype_once_scaled_is_named() -> None:
    model = peft_model()  # scaling 2
    guard = writer_for(model, torch.float16)
    (entry,) = [e for e in guard.adapter.entries if e.key.endswith("first.lora_B.weight")]
    with torch.no_grad():
        entry.parameter.view(-1)[0] = 30000.0
        validate(guard)
        entry.parameter.view(-1)[0] = 40000.0
    with pytest.raises(errors.NonFiniteAdapterError, match="not finite in torch.float16: .*first.lora_B.weight"):
        validate(guard)


def planned(model: torch.nn.Module) -> tuple[writer.AdapterWriter, torch.Tensor]:
    """A writer with a hand-made plan: one slot buffer that every A and B goes to, one after the other."""
    made = writer_for(model)
    made.plan, slot = plan_of(made.adapter, unused=8)
    made.engine.slot_index = lambda: 0  # type: ignore[method-assign]
    return made, slot


def test_the_first_write_and_the_one_after_a_sleep_clear_what_is_unused() -> None:
    model = peft_model()
    made, slot = planned(model)
    slot.fill_(9.0)
    assert not made.is_current()
    assert made.write().path == "direct"
    assert made.is_current() and not slot[-8:].any(), "unused rank rows are zero"
    slot[-8:] = 5.0
    made.forget()
    made.write()
    assert not slot[-8:].any()


def test_a_stranger_in_the_slots_is_noticed() -> None:
    model = peft_model()
    made, slot = planned(model)
    made.write()
    before = slot.clone()
    slot[0] = slot[0]  # the same value: the counter tells all the same
    assert not made.is_current() and torch.equal(before, slot)


def test_writes_follow_the_live_parameters_wherever_they_move() -> None:
    model = peft_model()
    made, slot = planned(model)

    def expected() -> torch.Tensor:
        parts = [(e.parameter.detach() * e.scale).bfloat16().flatten() for e in made.adapter.entries]
        return torch.cat([*parts, torch.zeros(8, dtype=torch.bfloat16)])

    for change in ("none", "in place", "new storage", "offload"):
        with torch.no_grad():
            for entry in made.adapter.entries:
                if change == "in place":
                    entry.parameter.mul_(1.5)
                elif change != "none":
                    entry.parameter.data = entry.parameter.data * 0.7
        made.write(keep_views=change != "offload")
        assert torch.equal(slot, expected()), change


def test_a_proof_finds_what_vllm_wrote_otherwise_or_besides() -> None:
    model = peft_model()
    made, slot = planned(model)
    assert made.plan is not None
    values = plan.signature(made.adapter, torch.bfloat16)

    def load() -> None:
        for _, copies in made.plan.copies:  # type: ignore[union-attr]
            for copy in copies:
                copy.destination.copy_((values[copy.entry.key].float() * copy.entry.scale).bfloat16())

    load()
    with torch.no_grad():
        plan.prove(made.plan, values, made._write_chunk)
        load()
        slot[0] += 1
        with pytest.raises(plan.PlanError, match="gives other values than vLLM's loader wrote"):
            plan.prove(made.plan, values, made._write_chunk)
        load()
        slot[-1] = 1
        with pytest.raises(plan.PlanError, match="what no recorded copy explains"):
            plan.prove(made.plan, values, made._write_chunk)


def test_settings() -> None:
    from swift_lora_fix.common.settings import Settings

    assert Settings.from_environment({}).writer == "direct"
    assert Settings.from_environment({"SWIFT_LORA_FIX_WRITER": "Loader"}).writer == "loader"
    with pytest.raises(errors.SettingsError, match="SWIFT_LORA_FIX_WRITER='fast'"):
        Settings.from_environment({"SWIFT_LORA_FIX_WRITER": "fast"})


def test_ranks_that_gather_together_go_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    made = writer_for(peft_model())
    assert made.all_ranks(True) and not made.all_ranks(False), "alone, a rank decides for itself"
    made.adapter = dataclasses.replace(made.adapter, sharding="zero3")
    other_rank = 0
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, op: flag.clamp_(max=other_rank))
    assert not made.all_ranks(True)
    other_rank = 1
    assert made.all_ranks(True) and not made.all_ranks(False)


def test_a_parameter_that_is_not_contiguous_is_read_anew_each_time() -> None:
    model = peft_model()
    made, slot = planned(model)
    entry = made.adapter.entries[0]
    entry.parameter.data = entry.parameter.data.t().contiguous().t()
    for _ in range(3):
        with torch.no_grad():
            entry.parameter.mul_(1.5)
        made.write()
        count = entry.parameter.numel()
        assert torch.equal(slot[:count].view(entry.parameter.shape), (entry.parameter * entry.scale).bfloat16())
