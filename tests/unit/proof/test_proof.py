"""Checksums, staging, findings and the gate's arithmetic; the real faults are in tests/real/swift/test_proof.py."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_lora_fix import errors, looks, metrics
from swift_lora_fix.common import digest
from swift_lora_fix.common.settings import Settings
from swift_lora_fix.engine.vllm.slots import loader, staging
from swift_lora_fix.engine.vllm.watch import WriteRecorder
from swift_lora_fix.engine.vllm.weights import base
from swift_lora_fix.policy import adapter
from swift_lora_fix.proof import audit, gate, probe
from swift_lora_fix.proof.noise import shaken
from swift_lora_fix.proof.verdict import Distance, Verdict, distance_between
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
    assert finding is not None and "packed.weight" in finding.evidence, "the same bits in another tensor"


def test_all_layers_with_a_lora_changed_is_a_double_count_and_most_others_another_model() -> None:
    _, engine, record = pushed()
    engine.embed.weight.data.add_(1)
    engine.packed.weight.data.add_(1)
    assert audit.base(record, {"embed.weight", "packed.weight"}).cause == "double-count"  # type: ignore[union-attr]
    assert audit.base(record, {"packed.weight"}).cause == "base-replaced"  # type: ignore[union-attr]


def test_distance_is_mean_max_and_k3() -> None:
    found = distance_between([-0.5, 0.0])
    assert found.mean == 0.25 and found.max == 0.5
    assert found.kl == pytest.approx((2.718281828**-0.5 - 1 + 0.5) / 2)
    assert not distance_between([float("nan"), 0.0]).mean == 0


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


def test_answers_are_encoded_once_for_all_scorings_whatever_a_forward_hook_does_with_them() -> None:
    torch.manual_seed(0)
    model: Any = torch.nn.Embedding(9, 9)
    hooked: list[int] = []

    def forward(input_ids: torch.Tensor, more: list[torch.Tensor], **_: Any) -> Any:
        hooked.append(int(more[0]))
        logits = torch.nn.functional.embedding(input_ids, model.weight)
        input_ids.zero_(), more[0].zero_()  # as a hook may that makes embeddings of them
        return SimpleNamespace(logits=logits)

    model.forward = forward
    answers, encoded = [Answer((1, 2), (3, 4), (0.0, 0.0))], []

    class Port(type(port_of(model))):  # type: ignore[misc]
        def encoded(self, answers: Any) -> Any:
            encoded.append(answers)
            rows = torch.tensor([[1, 2, 3, 4]])
            labels = torch.tensor([[-100, -100, 3, 4]])
            return {"input_ids": rows, "more": [torch.tensor(5)], "labels": labels}

    kept = port_of(model)
    port = Port(kept.learner)
    entered: list[str] = []

    @contextlib.contextmanager
    def way(name: str) -> Any:
        entered.append(name)
        yield

    first, second = probe.scores(port, answers, [way("one"), way("two")])
    assert encoded == [answers] and entered == ["one", "two"] and hooked == [5, 5]
    assert first == second == probe.score(port, answers)


def test_the_text_of_prompts_is_made_once_for_each_kind() -> None:
    counted: list[str] = []

    class Tokenizer:
        def encode(self, text: str, add_special_tokens: bool) -> list[str]:
            if not text.startswith("0 "):  # of an opening, to know how much room there is
                counted.append(text)
            return text.split()

    port = port_of(peft_model(), text=Tokenizer())
    texts = probe.Texts(port, 16)
    first = texts.prompts()
    made = len(counted)
    assert [len(text.split()) > 24 for text in first] == [True] * 4 and made > 1
    others = texts.prompts(variant=3)
    assert len(counted) == made and not set(first) & set(others)
    assert [text.split(maxsplit=1)[1] for text in first] == [text.split(maxsplit=1)[1] for text in others]
    texts.prompts(kind=probe.LONG)
    assert len(counted) > made


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
        last_write=write, examination=looks.Examination(), last_seconds=0.1, served_step=7, mode="adapter"
    )
    for mean in (0.01, 0.03):
        outcome = "agrees" if mean < 0.02 else "disagrees"
        verdict = Verdict(outcome, "", "", Distance(mean, mean * 2, 0), Distance(0.01, 0, 0), 0.5, 0.4)
        held.examination.verdicts = {probe.SHORT: verdict, probe.LONG: verdict}
        metrics.record(trainer, held)
    lists = trainer.metrics()
    assert lists["lora_sync/mismatch_mean"] == [0.01, 0.03] and lists["lora_sync/mismatch_max"] == [0.06]
    assert lists["lora_sync/agrees"] == [0.0], "the worst of a logging interval"
    assert lists["lora_sync/long_mismatch_mean"] == [0.01, 0.03] and "lora_sync/probes_failed" not in lists
    assert lists["lora_sync/policy_step"] == [7.0] and lists["lora_sync/bytes"] == [write.bytes_written] * 2
    json.dumps(lists)
    trainer.metrics = lambda: None
    metrics.record(trainer, held)  # a trainer without such metrics is left alone


class Words:
    def encode(self, text: str, add_special_tokens: bool) -> list[str]:
        return text.split()


@pytest.mark.parametrize("around", [0, 20, 60])
def test_a_prompt_leaves_room_for_what_the_template_writes_around_it(around: int) -> None:
    port = port_of(peft_model(), text=Words())
    port.template_tokens = around
    longest = max(len(text.split()) for text in probe.Texts(port, 544).prompts())
    assert longest + around + probe.NEW_TOKENS <= port.longest_prompt


def test_settings_of_the_proof() -> None:
    assert Settings.from_environment({}).on_mismatch == "raise" and Settings.from_environment({}).gate_every == 50
    given = {"SWIFT_LORA_FIX_ON_MISMATCH": "Repair", "SWIFT_LORA_FIX_GATE_EVERY": "0"}
    assert Settings.from_environment(given).on_mismatch == "repair" and Settings.from_environment(given).gate_every == 0
    with pytest.raises(errors.SettingsError, match="SWIFT_LORA_FIX_ON_MISMATCH='ignore'.*'raise'"):
        Settings.from_environment({"SWIFT_LORA_FIX_ON_MISMATCH": "ignore"})
    with pytest.raises(errors.SettingsError, match="SWIFT_LORA_FIX_GATE_EVERY='-1'.*whole number"):
        Settings.from_environment({"SWIFT_LORA_FIX_GATE_EVERY": "-1"})


def test_a_whole_look_is_due_again_after_a_disturbance() -> None:
    schedule = looks.Schedule(due=0)
    schedule.note_disturbance(sleep=True)
    assert schedule.due == looks.FIRST_SYNCS
    schedule.due = 0
    schedule.note_disturbance(sleep=True)
    assert schedule.due == 0, "a run that sleeps at each step is looked at as one that does not"
    schedule.note_disturbance()
    assert schedule.due == looks.FIRST_SYNCS and schedule.is_due(7, 50)
    for _ in range(looks.FIRST_SYNCS):
        schedule.note_look()
    assert [sync for sync in range(1, 101) if schedule.is_due(sync, 50)] == [50, 100]


def test_what_a_look_left_open_is_asked_again_ever_more_rarely_until_it_is_told() -> None:
    schedule, looked_at = looks.Schedule(due=0), []
    for sync in range(61, 310):
        if schedule.is_due(sync, 50):
            looked_at.append(sync)
            schedule.note_look()
            schedule.note_told(sync, is_open=sync < 120 or sync == 250)
        assert not schedule.is_due(sync, 50) or sync % 50 == 0, "once a sync"
    assert looked_at == [100, 101, 103, 107, 115, 131, 150, 200, 250, 251, 300]


class Rollout:
    """An engine that is ``off`` nats off the trainer (without the adapter ``plain_off``), and draws from PyTorch's
    random state as vLLM does."""

    has_requests, has_media, most_tokens = True, False, 64

    def __init__(self, off: float = 0.0, plain_off: float = 0.0) -> None:
        self.off, self.plain_off, self.cached, self.is_plain = off, plain_off, "", False
        self.asked: list[str] = []
        self.resets = 0

    def ask(self, prompts: Any, new_tokens: int, with_media: bool = False) -> list[Answer]:
        torch.rand(3)
        self.asked += prompts
        return [self._answer(text) for text in prompts]

    def _answer(self, text: str) -> Answer:
        off = self.plain_off if self.is_plain else self.off
        number, effect = int(text.split()[0]), -0.4 if self.is_plain else 0.0
        logprobs = (said(number, at) + effect * (-1) ** (at // 2) + off * (-1) ** at for at in range(16))
        return Answer((number,), tuple(range(16)), tuple(logprobs))


def said(number: int, at: int) -> float:
    """What the trainer says of this token, as a wave."""
    return -1.0 - 0.5 * ((7 * number + 3 * at) % 5)


def scored(trainer: Any, answers: Any, how: Any) -> list[list[float]]:
    """With the adapter as ``said``, without it 0.4 less, with twice the adapter 0.4 more, shaken by 0.01."""
    with how:
        model = trainer.model
        scale = next(m.scaling["default"] for m in model.modules() if hasattr(m, "scaling"))
        shift = 0.4 * (scale / 2.0 - 1.0)  # lora_alpha / r is 2 here
        is_shaken = any(module._forward_hooks for module in model.modules())
    return [
        [said(a.prompt[0], at) + (shift + 0.01 * is_shaken) * (-1) ** (at // 2) for at in range(16)] for a in answers
    ]


def made_gate(monkeypatch: pytest.MonkeyPatch, rollout: Rollout) -> gate.Gate:
    model = peft_model()
    bound = adapter.bind(model)

    @contextlib.contextmanager
    def plain() -> Any:
        rollout.is_plain = True
        yield
        rollout.is_plain = False

    def reset() -> None:
        rollout.cached, rollout.resets = "", rollout.resets + 1

    serving: Any = SimpleNamespace(
        copies=1, rounds=False, reset_caches=reset, abort_unfinished=None, engine_without_adapter=plain, stand_ins=(),
        dtype=None, trainer_without_adapter=lambda: adapter.scaled(bound, 0.0),
    )  # fmt: skip
    texts = lambda self, variant=0, kind="": [f"{n + 7 * variant} a" for n in range(4)]  # noqa: E731
    monkeypatch.setattr(probe.Texts, "prompts", texts)
    monkeypatch.setattr(probe, "kinds", lambda trainer, has_media: [probe.SHORT])
    monkeypatch.setattr(probe, "scores", lambda trainer, answers, hows: [scored(trainer, answers, how) for how in hows])
    return gate.Gate(port_of(model), bound, serving, 16, bool)


def test_the_gate_leaves_the_random_state_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = Rollout(0.005, 0.005)
    made = made_gate(monkeypatch, rollout)
    before = torch.get_rng_state()
    asked = made.ask(rollout, bool)
    judged = made.judge(asked)
    assert asked[0].plain and torch.equal(before, torch.get_rng_state())
    assert judged.verdicts[probe.SHORT].agrees and judged.finding is None, judged
    again = made.ask(rollout, bool)
    assert not again[0].plain and len(again[0].probes) == 1, "the floor is measured once"
    before = rollout.resets
    made.judge(again, rollout)
    assert rollout.resets == before + 1, "what the probe left in the caches is gone"


@pytest.mark.parametrize(
    "off, outcome", [(0.005, None), (0.03, "noisy"), (0.2, "base-not-served"), (float("nan"), "base-not-served")]
)
def test_a_floor_that_no_rounding_explains_is_a_finding(
    off: float, outcome: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = Rollout(off, off)
    made = made_gate(monkeypatch, rollout)
    judged = made.judge(made.ask(rollout, bool), rollout)
    cause = judged.finding.cause if judged.finding else "noisy" if judged.noisy else None
    assert cause == outcome, judged
    assert (probe.SHORT in made.floors) is (outcome != "base-not-served"), "such a floor is not kept"


def test_a_disagreement_counts_when_other_prompts_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = Rollout(0.3, 0.005)
    made = made_gate(monkeypatch, rollout)
    asked = made.ask(rollout, bool)
    assert made.judge(asked).finding is None, "with nobody to ask it stays open"
    judged = made.judge(asked, rollout)
    assert judged.finding is not None and judged.verdicts[probe.SHORT].probes == 2, judged
    ahead = made.judge(made.ask(rollout, bool, ahead=True))
    assert ahead.finding is not None, "what was asked ahead is enough"


@pytest.mark.parametrize("ahead", [False, True])
def test_what_a_reset_of_the_caches_mends_is_a_stale_cache(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = Rollout(0.005, 0.005)
    made = made_gate(monkeypatch, rollout)
    assert made.judge(made.ask(rollout, bool), rollout).finding is None
    monkeypatch.setattr(rollout, "_answer", _stale_for_the_first_prompts(rollout))
    rollout.cached = "yes"
    judged = made.judge(made.ask(rollout, bool, ahead), None if ahead else rollout)
    assert judged.finding is not None and judged.finding.cause == "stale-cache", judged


def test_only_the_first_prompts_are_asked_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = Rollout(0.005, 0.005)
    made = made_gate(monkeypatch, rollout)
    made.judge(made.ask(rollout, bool))
    asked = []
    for _ in range(2):
        rollout.asked.clear()
        made.ask(rollout, bool, ahead=True)
        asked.append(set(rollout.asked))
    assert asked[0] & asked[1] == {f"{number} a" for number in range(4)} and len(asked[0]) == len(asked[1]) == 8


def _stale_for_the_first_prompts(rollout: Rollout) -> Any:
    own = rollout._answer

    def answer(text: str) -> Answer:
        found = own(text)
        if not rollout.cached or found.prompt[0] >= 7:
            return found
        return Answer(found.prompt, found.tokens, tuple(v + 0.4 * (-1) ** at for at, v in enumerate(found.logprobs)))

    return answer


def test_a_probe_that_fails_fails_on_all_ranks_in_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = Rollout()
    made = made_gate(monkeypatch, rollout)
    told: list[bool] = []

    def together(fine: bool) -> bool:
        told.append(fine)
        return fine

    monkeypatch.setattr(rollout, "ask", lambda *_, **__: 1 / 0)
    asked = made.ask(rollout, together)
    assert told == [False, True, False], "no images, the kinds of prompts, and then no answers"
    assert "ZeroDivisionError" in made.judge(asked).failed[probe.SHORT]
    monkeypatch.undo()
    made = made_gate(monkeypatch, rollout)
    asked = made.ask(rollout, lambda fine: False)
    assert made.judge(asked).failed == {probe.SHORT: "on another rank"}


def test_an_engine_that_dies_in_a_question_is_named_beside_what_it_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its requests, so that its caches cannot be reset: that alone would be in the log."""
    rollout = Rollout()
    made = made_gate(monkeypatch, rollout)
    monkeypatch.setattr(rollout, "ask", lambda *_, **__: {}["cpu_gemm_wna16"])
    asked = made.ask(rollout, bool)

    def still_running() -> None:
        raise errors.CacheResetError("a request is still running.")

    monkeypatch.setattr(made.serving, "reset_caches", still_running)
    with pytest.raises(
        errors.CacheResetError, match=r"still running. Before that, .*short.* KeyError: 'cpu_gemm_wna16'"
    ):
        made.judge(asked, rollout)


def test_prompts_that_cannot_be_made_are_a_probe_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = Rollout()
    made = made_gate(monkeypatch, rollout)
    monkeypatch.setattr(probe, "kinds", lambda trainer, has_media: 1 / 0)
    judged = made.judge(made.ask(rollout, bool), rollout)
    assert list(judged.failed) == [probe.SHORT] and "ZeroDivisionError" in judged.failed[probe.SHORT]


def test_a_tokenizer_that_knows_no_english_makes_no_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of digits, or of amino acids: it was asked for ever."""
    digits = SimpleNamespace(encode=lambda text, add_special_tokens: [int(each) for each in text if each.isdigit()])
    trainer: Any = SimpleNamespace(tokenizer=digits, template_tokens=1, longest_prompt=1024)
    for kind in (probe.SHORT, probe.LONG):
        with pytest.raises(ValueError, match="the tokenizer makes no .* tokens of .* English words"):
            probe.Texts(trainer, 16).prompts(kind=kind)


@pytest.mark.parametrize("ahead", [False, True])
def test_what_a_question_that_failed_left_in_the_engine_is_aborted_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    rollout, left, done = Rollout(), ["request"], []
    made = made_gate(monkeypatch, rollout)

    def reset() -> None:
        done.append("reset")
        if left:
            raise errors.CacheResetError("a request is still running.")

    monkeypatch.setattr(rollout, "ask", lambda *_, **__: {}["set_offset"])
    monkeypatch.setattr(made.serving, "reset_caches", reset)
    monkeypatch.setattr(made.serving, "abort_unfinished", lambda: (done.append("abort"), left.clear()))
    judged = made.judge(made.ask(rollout, bool, ahead), None if ahead else rollout)
    assert judged.failed == {probe.SHORT: "KeyError: 'set_offset'"} and done == ["abort", "reset"]


def test_a_kind_of_prompts_that_fails_takes_no_verdict_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = Rollout(0.005, 0.005)
    made = made_gate(monkeypatch, rollout)
    monkeypatch.setattr(probe, "kinds", lambda *_: [probe.LONG, probe.SHORT])
    own = made._evidence
    monkeypatch.setattr(made, "_evidence", lambda kind, *a, **k: own(kind, *a, **k) if kind != probe.LONG else 1 / 0)
    judged = made.judge(made.ask(rollout, bool), rollout)
    assert judged.verdicts[probe.SHORT].agrees and "ZeroDivisionError" in judged.failed[probe.LONG]


def test_shaking_moves_every_layer_by_a_rounding_step_and_leaves_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 512), torch.nn.Dropout(), torch.nn.Identity()).bfloat16().eval()
    given = torch.ones(1, 4).bfloat16()
    before = model(given).float()
    with shaken(model):
        moved, again = model(given).float(), None
    with shaken(model):
        again = model(given).float()
    off = ((moved - before) / before).abs()
    assert 0 < off.max() <= 2.0**-7 and torch.equal(moved, again), "a step, and the rounding of it"
    assert torch.equal(model(given).float(), before) and not any(m._forward_hooks for m in model.modules())
    wide, given = torch.nn.Sequential(torch.nn.Linear(4, 512)).eval(), torch.ones(1, 4)
    for engine, step in ((None, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        with shaken(wide, engine=engine):
            off = ((wide(given) - wide[0].forward(given)) / wide[0].forward(given)).abs()
        assert step / 2 < off.max() <= 1.01 * step, "the engine's rounding, where it is the coarser"
    before = wide(given)
    with shaken(wide):
        off = ((wide(given) - before) / before).abs().max()
    assert 2.0**-13 < off <= 2.0**-11 * 1.01, "float32 as TF32"
