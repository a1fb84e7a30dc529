"""Checksums, staging, findings and the gate's arithmetic; the real faults are in tests/real/swift/test_proof.py."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_lora_fix import errors, metrics, session
from swift_lora_fix.common import digest
from swift_lora_fix.common.settings import Settings
from swift_lora_fix.engine.vllm.slots import loader, staging
from swift_lora_fix.engine.vllm.watch import WriteRecorder
from swift_lora_fix.engine.vllm.weights import base
from swift_lora_fix.policy import adapter
from swift_lora_fix.proof import audit, gate, probe
from swift_lora_fix.proof.verdict import Distance, FloorRule
from swift_lora_fix.trainer import Answer
from tests.support.fakes.trainer import port_of
from tests.support.peft_models import peft_model
from tests.unit.engine.test_slots_writer import planned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8])
def test_every_changed_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    values = (torch.arange(5000) % 100).to(dtype)
    before = int(digest.checksum(values))
    bits = values.view(torch.uint8)
    for position in (0, 1, 7, 777, bits.numel() - 1):
        for bit in (1, 2, 64, 127):
            bits[position] ^= bit
            assert int(digest.checksum(values)) != before, (position, bit)
            bits[position] ^= bit
    assert int(digest.checksum(values)) == before


def test_values_that_change_places_change_the_checksum() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3 * digest.COLUMNS * 4 + 12, generator=generator).bfloat16()
    sums = {int(digest.checksum(values))}
    for first, second in ((0, 1), (0, 4), (5, digest.COLUMNS * 4 + 5), (2, values.numel() - 1)):
        swapped = values.clone()
        swapped[first], swapped[second] = values[second], values[first]
        sums.add(int(digest.checksum(swapped)))
    assert len(sums) == 5


def test_a_checksum_is_of_the_bits_however_they_lie_in_memory() -> None:
    whole = torch.randn(40, 30).bfloat16()
    part = whole[3:17, 1:8]  # strided, and not aligned to 8 bytes
    assert int(digest.checksum(part)) == int(digest.checksum(part.clone()))
    assert int(digest.checksum(whole.new_empty(0))) == 0
    assert digest.combine([1, 2]) != digest.combine([2, 1]) and len(digest.combine([1, 2])) == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_staging_is_what_the_loader_is_given(dtype: torch.dtype) -> None:
    model = peft_model(use_rslora=True, lora_alpha=12)
    bound = adapter.bind(model)
    held = adapter.read_to_host(bound, torch.device("cpu"))
    staged = loader.stage(bound, held, dtype)
    buffer = staging.Staging(bound, dtype, torch.device("cpu"))
    for chunk in bound.chunks:
        for entry, view in zip(chunk.entries, buffer.fill(chunk, [held[entry.key] for entry in chunk.entries])):
            assert torch.equal(view, staged[entry.key]), entry.key
    digests = {
        staging.host_digest(bound, held, dtype),
        staging.host_digest(bound, staged, dtype, fold=False),
    }
    assert len(digests) == 1
    held[bound.entries[0].key][0, 0] += 1
    assert staging.host_digest(bound, held, dtype) not in digests


def test_a_write_leaves_the_digest_of_the_policy_and_an_audit_finds_it() -> None:
    model = peft_model()
    made, slot = planned(model)
    report = made.write()
    made.finish()
    held = adapter.read_to_host(made.adapter, torch.device("cpu"))
    assert report.digest == staging.host_digest(made.adapter, held, torch.bfloat16)
    assert audit.adapter(made) is None
    slot[0] += 1
    finding = audit.adapter(made)
    assert finding is not None and finding.cause == "slots-changed" and made.adapter.entries[0].key in finding.evidence
    assert "1 of 4 tensors" in finding.evidence
    assert audit.adapter(made, trainer_is_here=False).evidence == "1 of 1 parts of the adapter differ"  # type: ignore[union-attr]


def test_an_audit_tells_the_policy_of_the_sync_before() -> None:
    model = peft_model()
    made, slot = planned(model)
    for factor in (1.0, 1.5):
        old = slot.clone()
        with torch.no_grad():
            for entry in made.adapter.entries:
                entry.parameter.mul_(factor)
        made.write()
        made.finish()
    slot.copy_(old)
    assert audit.adapter(made).cause == "stale"  # type: ignore[union-attr]


class Engine(torch.nn.Module):
    """Two layers, of which vLLM would hold the second with a LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(8, 8, bias=False)
        self.packed = torch.nn.Linear(8, 16, bias=False)


def pushed() -> tuple[Any, Engine, base.BaseRecord]:
    """A base of the trainer, pushed in two parts into one packed parameter of the engine."""
    model, engine = peft_model(), Engine()
    trained = dict(adapter.frozen_parameters(model))
    first = next(value for name, value in trained.items() if "first" in name)

    def take(weights: Any) -> None:
        engine.embed.weight.data.copy_(torch.ones(8, 8))
        for part in range(2):
            engine.packed.weight.data[part * 8 : part * 8 + 8].copy_(first.data[:8] * (part + 1))

    trainer, handle = port_of(model, take=take), SimpleNamespace(model=engine, load_format="auto")
    return model, engine, base.push(trainer, handle, adapter.bind(model)).record  # type: ignore[arg-type]


def test_an_audit_of_the_base_sees_one_bit_on_either_side() -> None:
    model, engine, record = pushed()
    assert len(record.pieces) == 3 and record.bytes_covered == (64 + 128) * 4
    assert audit.base(record, set()) is None
    engine.packed.weight.data.view(torch.int32)[9, 3] ^= 1
    finding = audit.base(record, set())
    assert finding is not None and finding.cause == "base-changed" and "packed.weight" in finding.evidence
    engine.packed.weight.data.view(torch.int32)[9, 3] ^= 1
    name, parameter = adapter.frozen_parameters(model)[0]
    parameter.data.view(torch.int32)[0, 0] ^= 1
    finding = audit.base(record, set())
    assert finding is not None and finding.cause == "trainer-base-changed" and name in finding.evidence
    assert audit.base(record, set(), trainer_is_here=False) is None


def recorded(engine: Engine) -> WriteRecorder:
    return WriteRecorder(engine, lambda value: None, ())


def test_what_was_written_over_is_not_expected_any_more() -> None:
    engine = Engine()
    with recorded(engine) as recorder:
        engine.packed.weight.data.copy_(torch.ones(16, 8))
        engine.packed.weight.data[:8].copy_(torch.zeros(8, 8))
        engine.embed.weight.data.copy_(torch.ones(8, 8))
        engine.embed.weight.data.zero_()
    assert [piece.destination.shape for piece in recorder.frozen()] == [torch.Size([8, 8])]


def test_one_part_of_a_packed_weight_is_not_all_of_it() -> None:
    """By bytes: a q shard alone, or one expert of many, leaves the rest as it was."""
    engine = Engine()
    with recorded(engine) as recorder:
        engine.embed.weight.data.copy_(torch.ones(8, 8))
        engine.packed.weight.data.zero_()  # cleared, not loaded
        engine.packed.weight.data[:4].copy_(torch.ones(4, 8))
        engine.packed.weight.data[:4].copy_(torch.ones(4, 8))  # twice the same
    assert recorder.unwritten(engine) == {"packed.weight": 0.25}
    handle = SimpleNamespace(model=engine, load_format="dummy")
    with pytest.raises(errors.EngineStateError, match=r"packed.weight \(only 25% of it\).*random weights"):
        base._check_complete(handle, recorder)  # type: ignore[arg-type]
    with recorder:
        engine.packed.weight.data[4:12].copy_(torch.ones(8, 8))
        engine.packed.weight.data[12:].fill_(0)  # padding
    assert not recorder.unwritten(engine)


def test_a_weight_that_the_engine_replaced_is_not_compared_in_its_old_place() -> None:
    _, engine, record = pushed()
    assert audit.base(record, set()) is None
    engine.packed.weight = torch.nn.Parameter(engine.packed.weight.data.clone())
    finding = audit.base(record, set())
    assert finding is not None and "packed.weight" in finding.evidence, (
        "the same bits in another tensor"
    )


def test_all_layers_with_a_lora_changed_is_a_double_count_and_most_others_another_model() -> None:
    _, engine, record = pushed()
    engine.embed.weight.data.add_(1)
    engine.packed.weight.data.add_(1)
    assert audit.base(record, {"embed.weight", "packed.weight"}).cause == "double-count"  # type: ignore[union-attr]
    assert audit.base(record, {"packed.weight"}).cause == "base-replaced"  # type: ignore[union-attr]


def verdict(mean: float, floor: float = 0.01, controls: tuple[float, float] = (0.5, 0.4)) -> FloorRule:
    return FloorRule(Distance(mean, 0.0, 0.0), Distance(floor, 0.0, 0.0), *controls)


def test_a_verdict_is_relative_to_the_floor_and_says_what_it_cannot_tell() -> None:
    assert verdict(0.04).agrees and not verdict(0.041).agrees and not verdict(float("nan")).agrees
    assert verdict(0.01).is_distinguishable and verdict(0.01).reservation == ""
    assert not verdict(0.01, controls=(0.5, 0.04)).is_distinguishable
    assert verdict(0.01, controls=(0.5, 0.04)).reservation == " (not distinguishable yet from twice the adapter)"
    assert verdict(0.01, controls=(0.01, 0.01)).reservation.count("plain base") == 1
    assert verdict(1e-6, floor=0.0).agrees, "two sides that compute alike have no noise to measure"


def test_distance_is_mean_max_and_k3() -> None:
    answers = [Answer((1,), (2, 3), (-1.0, -2.0))]
    found = probe.gap_of(answers, [[-1.5, -2.0]])
    assert found.mean == 0.25 and found.max == 0.5
    assert found.kl == pytest.approx((2.718281828**-0.5 - 1 + 0.5) / 2)
    assert not probe.gap_of(answers, [[float("nan"), 0.0]]).mean == 0


@pytest.mark.parametrize("left, shortened", [(True, False), (False, False), (True, True), (False, True)])
def test_scores_are_the_models_own_whatever_the_padding(left: bool, shortened: bool) -> None:
    torch.manual_seed(0)
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    answers = [Answer((1, 2, 3), (4, 5), (0.0, 0.0)), Answer((7,), (8,), (0.0,))]
    inputs = dict(port_of(model).encoded(answers))
    if not left:  # the fake framework's own padding is on the left
        inputs = {
            "input_ids": torch.tensor([[1, 2, 3, 4, 5], [7, 8, 0, 0, 0]]),
            "labels": torch.tensor([[-100, -100, -100, 4, 5], [-100, 8, -100, -100, -100]]),
        }
    labels = inputs.pop("labels")
    if shortened:
        inputs["logits_to_keep"] = 3 if left else 5
    with torch.no_grad():
        together = probe.logprobs_of(model, inputs, labels)
        for answer, scores in zip(answers, together):
            ids = torch.tensor([[*answer.prompt, *answer.tokens]])
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
            expected = [float(logits[len(answer.prompt) - 1 + i, t]) for i, t in enumerate(answer.tokens)]
            assert scores == pytest.approx(expected, abs=1e-5)
        with pytest.raises(ValueError, match="1 logits a row do not reach back to the first of 5 labels"):
            probe.logprobs_of(model, {**inputs, "logits_to_keep": 1}, labels)


def test_scaling_the_adapter_changes_numbers_only_and_changes_them_back() -> None:
    model = peft_model()
    bound = adapter.bind(model)
    ids = torch.tensor([[1, 2]])
    before, tensors = model(ids), {n: p.clone() for n, p in model.named_parameters()}
    with adapter.scaled(bound, 0.0):
        plain = model(ids)
        assert adapter.changed_scalings(bound)
    with adapter.scaled(bound, 2.0), pytest.raises(RuntimeError):
        assert not torch.equal(model(ids), before)
        raise RuntimeError
    with model.disable_adapter():
        assert torch.equal(model(ids), plain)
    assert torch.equal(model(ids), before) and not adapter.changed_scalings(bound)
    assert all(torch.equal(tensors[n], p) for n, p in model.named_parameters())


def test_metrics_go_where_the_framework_averages_them() -> None:
    made, _ = planned(peft_model())
    write = made.write()
    made.finish()
    trainer = port_of(peft_model())
    held: Any = SimpleNamespace(
        last_write=write, examination=session.Examination(), last_seconds=0.1, served_step=7, mode="adapter"
    )
    for mean in (0.01, 0.03):
        held.examination.verdict = FloorRule(Distance(mean, mean * 2, 0), Distance(0.01, 0, 0), 0.5, 0.4)
        metrics.record(trainer, held)
    lists = trainer.metrics()
    assert lists["lora_sync/mismatch_mean"] == [0.01, 0.03] and lists["lora_sync/mismatch_max"] == [0.06]
    assert lists["lora_sync/policy_step"] == [7.0] and lists["lora_sync/bytes"] == [write.bytes_written] * 2
    json.dumps(lists)
    trainer.metrics = lambda: None
    metrics.record(trainer, held)  # a trainer without such metrics is left alone


def test_settings_of_the_proof() -> None:
    assert Settings.from_environment({}).on_mismatch == "raise" and Settings.from_environment({}).gate_every == 50
    given = {"SWIFT_LORA_FIX_ON_MISMATCH": "Repair", "SWIFT_LORA_FIX_GATE_EVERY": "0"}
    assert Settings.from_environment(given).on_mismatch == "repair" and Settings.from_environment(given).gate_every == 0
    with pytest.raises(errors.SettingsError, match="SWIFT_LORA_FIX_ON_MISMATCH='ignore'.*'raise'"):
        Settings.from_environment({"SWIFT_LORA_FIX_ON_MISMATCH": "ignore"})
    with pytest.raises(errors.SettingsError, match="SWIFT_LORA_FIX_GATE_EVERY='-1'.*whole number"):
        Settings.from_environment({"SWIFT_LORA_FIX_GATE_EVERY": "-1"})


def test_a_whole_look_is_due_again_after_a_disturbance() -> None:
    schedule = session.Schedule(due=0)
    schedule.note_disturbance(sleep=True)
    assert schedule.due == session.FIRST_SYNCS
    schedule.due = 0
    schedule.note_disturbance(sleep=True)
    assert schedule.due == 0, "a run that sleeps at each step is looked at as one that does not"
    schedule.note_disturbance()
    assert schedule.due == session.FIRST_SYNCS and schedule.is_due(7, 50)
    for _ in range(session.FIRST_SYNCS):
        schedule.note_look()
    assert [sync for sync in range(1, 101) if schedule.is_due(sync, 50)] == [50, 100]


class Rollout:
    """Answers with what PyTorch draws, as vLLM's sampler does."""

    has_requests, has_media, most_tokens = True, False, 64

    def ask(self, prompts: Any, new_tokens: int, with_media: bool = False) -> list[Answer]:
        torch.rand(3)
        return [Answer((1, 2), (3,), (-1.0,)) for _ in prompts]


def made_gate() -> gate.Gate:
    model = peft_model()
    serving: Any = SimpleNamespace(
        copies=1, rounds=False, reset_caches=None, engine_without_adapter=contextlib.nullcontext,
        trainer_without_adapter=contextlib.nullcontext,
    )  # fmt: skip
    return gate.Gate(port_of(model), adapter.bind(model), serving, 16, bool)


def test_the_gate_leaves_the_random_state_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_gate()
    monkeypatch.setattr(probe, "prompts", lambda *_: ["one"])
    monkeypatch.setattr(probe, "logprobs_of", lambda model, inputs, labels: [[-1.0 - 1e-3 * torch.rand(1).item()]])
    before = torch.get_rng_state()
    asked = made.ask(Rollout())
    made.judge(asked)
    assert asked.plain is not None and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("floor, cause", [(0.06, None), (0.7, "base-not-served"), (float("nan"), "base-not-served")])
def test_a_floor_that_no_rounding_explains_is_a_finding(
    floor: float, cause: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_gate()
    made.floor = Distance(floor, floor, floor)
    monkeypatch.setattr(made, "_compare", lambda *_: (verdict(0.01, floor=floor), []))
    _, finding = made.judge(gate.Asked(()))
    assert (finding.cause if finding else None) == cause
    assert (made.floor is None) is (cause is not None), "such a floor is not kept"
