"""The states of a session, as no CPU engine can show them: sleep, refused resets, running requests, ranks that differ.

The engine is a fake; its LoRA slots are tensors of which a plan is known.
"""

from __future__ import annotations

import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_lora_fix import errors, examiner, scope
from swift_lora_fix import session as sessions
from swift_lora_fix.engine.vllm.colocated import AdapterModeWriter
from swift_lora_fix.engine.vllm.fitting import check_fits
from swift_lora_fix.engine.vllm.handle import EngineHandle
from swift_lora_fix.engine.vllm.weights import base
from swift_lora_fix.examiner import SMALL_LOOKS
from swift_lora_fix.frameworks.swift.port import SwiftTrainer
from swift_lora_fix.install import releases
from swift_lora_fix.policy import adapter
from swift_lora_fix.proof import gate, probe
from swift_lora_fix.proof.causes import Finding
from swift_lora_fix.proof.verdict import Distance, Hypothesis, Verdict
from swift_lora_fix.session import Phase, Session
from swift_lora_fix.trainer import Scored
from tests.support.fakes.engine import FakeEngine, planned
from tests.support.fakes.trainer import port_of
from tests.support.peft_models import peft_model


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def session(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Of a run that has synced once, by a plan. No gate: the trainer's model speaks no language."""
    monkeypatch.setenv("SWIFT_LORA_FIX_GATE_EVERY", "0")
    trainer = port_of(peft_model(), llm=engine, take=engine.model.load)
    made = planned(Session(trainer, "adapter"))
    made.synchronize()
    return made


class Rollout:
    has_requests, has_media, most_tokens = True, False, 1

    def ask(self, prompts: Any, new_tokens: int, with_media: bool = False) -> Any:
        raise AssertionError("nobody is to be asked here")


def roll_out(session: Session) -> None:
    session.before_rollout(Rollout())  # type: ignore[arg-type]


def test_a_sync_and_a_look_go_through_the_states_in_order(engine: FakeEngine, session: Session) -> None:
    assert session.phase is Phase.SERVED and session.base is not None and session.base_pushes == 1
    roll_out(session)
    assert session.phase is Phase.EXAMINED
    session.trainer.learner.updates = 1  # type: ignore[attr-defined]
    session.synchronize()
    assert (session.phase, session.served_step, session.base_pushes) == (Phase.SERVED, 1, 1), "the base goes once"


def test_after_a_sleep_what_can_be_compared_is_not_sent_again(session: Session, engine: FakeEngine) -> None:
    learner = session.trainer.learner  # type: ignore[attr-defined]
    session.invalidate_if_lost()
    assert session.phase is Phase.SERVED and not learner.must_sync, "an engine that is awake keeps what it holds"
    roll_out(session)
    engine.model_executor.is_sleeping, learner.naps = True, 1
    session.invalidate_if_lost()
    assert session.phase is Phase.SERVED and not learner.must_sync, "no full wake-up only for that"
    held = session.slot.clone()  # type: ignore[attr-defined]
    roll_out(session)
    assert session.phase is Phase.EXAMINED and session.syncs == 1
    session.invalidate_if_lost()
    session.slot.zero_()  # type: ignore[attr-defined]  # what vLLM 39934 and 53888 tell of
    roll_out(session)
    assert torch.equal(session.slot, held), "the adapter alone was written again"  # type: ignore[attr-defined]


def test_after_a_sleep_that_throws_the_base_away_all_is_sent_again(session: Session, engine: FakeEngine) -> None:
    learner = session.trainer.learner  # type: ignore[attr-defined]
    engine.model_executor.is_sleeping, learner.naps = True, 2
    session.invalidate_if_lost()
    assert session.phase is Phase.UNBOUND and learner.must_sync and session.base is None
    with pytest.raises(errors.EngineStateError, match="no sync has completed since the engine was started or slept"):
        roll_out(session)


def test_a_sleep_whose_loss_nobody_could_tell_is_followed_by_a_sync(session: Session, engine: FakeEngine) -> None:
    session.writer.slots.expected = None  # type: ignore[union-attr]  # vLLM's own loader wrote
    engine.model_executor.is_sleeping = True
    session.invalidate_if_lost()
    assert session.phase is Phase.BASE_HELD and session.trainer.learner.must_sync  # type: ignore[attr-defined]


def test_ranks_sync_together_whichever_of_them_lost_something(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger wrote to the slots of one rank: alone in a sync, it would wait for the others for ever."""
    learner = session.trainer.learner  # type: ignore[attr-defined]
    learner.world = 2
    told: list[bool] = []

    def ranks_agree(fine: bool, device: Any) -> bool:
        told.append(fine)
        return False  # the other one has lost something

    monkeypatch.setattr(examiner, "ranks_agree", ranks_agree)
    session.invalidate_if_lost()
    assert told == [True] and session.phase is Phase.BASE_HELD and learner.must_sync


def test_without_the_gate_the_base_is_looked_at_all_the_same(session: Session, engine: FakeEngine) -> None:
    roll_out(session)
    session.trainer.learner.updates = 1  # type: ignore[attr-defined]
    session.synchronize()
    engine.model.first.weight.data.view(torch.int32)[0, 0] ^= 1
    with pytest.raises(errors.PolicyMismatchError, match="base-changed.*first.weight"):
        roll_out(session)


def test_a_rollout_needs_the_adapter_loaded_and_in_a_slot(session: Session, engine: FakeEngine) -> None:
    roll_out(session)
    engine.slots[0] = None
    with pytest.raises(errors.EngineStateError, match="in no LoRA slot"):
        roll_out(session)
    engine.loaded.clear()
    with pytest.raises(errors.EngineStateError, match="adapter 111 .* is not loaded; loaded are none"):
        roll_out(session)


def test_a_reset_that_was_not_done_is_an_error(engine: FakeEngine) -> None:
    handle = EngineHandle(engine)
    handle.reset_caches()
    engine.prefix_reset = None  # vLLM 0.11 answers nothing
    handle.reset_caches()
    engine.prefix_reset = False
    with pytest.raises(errors.CacheResetError, match=r"reset_prefix_cache\(\) reported that it was not done"):
        handle.reset_caches()


def test_running_requests_keep_their_policy(session: Session, engine: FakeEngine) -> None:
    engine.busy, before = True, session.slot.clone()  # type: ignore[attr-defined]
    with pytest.raises(errors.EngineStateError, match="unfinished requests"):
        session.synchronize()
    assert torch.equal(session.slot, before)  # type: ignore[attr-defined]


def test_a_rank_above_the_engines_is_refused_with_the_way_out(engine: FakeEngine) -> None:
    check_fits(adapter.bind(peft_model(r=4)), EngineHandle(engine))
    with pytest.raises(errors.UnsupportedAdapterError, match="has rank 8 .*max_lora_rank=4.*the LoRA's rank to 8"):
        check_fits(adapter.bind(peft_model(r=8)), EngineHandle(engine))


def test_one_lora_for_a_layer_that_vllm_takes_in_parts_is_refused(engine: FakeEngine) -> None:
    """GLM-4's gate_up_proj: one module in transformers, two for vLLM's LoRA layers."""
    manager = engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
    manager.packed_modules = {"second": ["second"]}
    check_fits(adapter.bind(peft_model(r=4)), EngineHandle(engine))
    manager.packed_modules = {"second": ["second_gate", "second_up"]}
    with pytest.raises(errors.UnsupportedAdapterError, match="take second .*in parts .*fused mode"):
        check_fits(adapter.bind(peft_model(r=4)), EngineHandle(engine))
    manager.modules["second"] = type("MergedColumnParallelLinearVariableSliceWithLoRA", (), {})()
    check_fits(adapter.bind(peft_model(r=4)), EngineHandle(engine))


def test_a_module_without_a_lora_layer_is_refused_before_anything_is_sent(engine: FakeEngine) -> None:
    del engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager.modules["second"]
    sent: list[Any] = []
    with pytest.raises(errors.UnsupportedAdapterError, match="no LoRA layer for 1 of .*second.*fused mode"):
        Session(port_of(peft_model(), llm=engine, take=sent.append), "adapter").synchronize()
    assert not sent


def test_a_push_that_fails_leaves_the_trainer_as_it_was() -> None:
    model = peft_model()

    class Trainer:
        accelerator = SimpleNamespace(unwrap_model=lambda m: m)

        def __init__(self) -> None:
            self.model = model

        def _load_state_dict_to_vllm(self, weights: Any) -> None: ...

        def _move_full_model_to_vllm(self) -> None:
            self.model.merge_adapter()  # what stock does; shadowed, it does nothing
            raise RuntimeError("vLLM is out of memory")

    trainer = Trainer()
    with pytest.raises(RuntimeError, match="out of memory"):
        base.push(SwiftTrainer(trainer), EngineHandle(FakeEngine()), adapter.bind(model))
    assert not model.base_model.model.first.merged
    assert "merge_adapter" not in vars(model) and "_move_adapter_to_vllm" not in vars(trainer)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"with_vllm": False}, "rollouts do not use vLLM"),
        ({"algorithm": "full"}, "the tuner is 'full'"),
        ({"place": "server", "has_lora": False}, "the rollout servers have no LoRA layers"),
        ({"place": "other"}, "vllm_mode is 'other'"),
    ],
)
def test_whatever_is_not_ours_is_left_alone_and_said_once(
    changes: dict, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    port = port_of(peft_model(), **changes)
    with caplog.at_level(logging.INFO, logger="swift.lora_fix"):
        sessions.begin(port.learner, port)
    assert len(caplog.messages) == 1 and reason in caplog.messages[0] and "unchanged" in caplog.messages[0]
    assert sessions.session_of(port.learner) is None and sessions.is_known(port.learner)


def test_the_old_name_of_the_tuner_argument() -> None:
    arguments = {"use_vllm": True, "train_type": "lora"}
    holder = type("Trainer", (), {})()
    holder.args, holder.vllm_mode, holder.rollout_enable_lora = SimpleNamespace(**arguments), "colocate", True
    holder.model, holder.accelerator = peft_model(), SimpleNamespace(unwrap_model=lambda model: model)
    holder.engine = SimpleNamespace(engine=FakeEngine())
    assert scope.decide(SwiftTrainer(holder)).ours


def test_towers_that_vllm_makes_no_lora_layers_in_are_served_by_folding(engine: FakeEngine) -> None:
    """Where even ``enable_tower_connector_lora`` gives none."""
    model = peft_model(target_modules=["first", "visual"], visual=True)
    decided = scope.decide(port_of(model, llm=engine))
    assert decided.ours and decided.mode == "fused" and "base_model.model.visual" not in decided.reason
    assert "no LoRA layer for 1 of the modules of adapter 'default' (visual)" in decided.reason
    assert scope.decide(port_of(peft_model(), llm=engine)).mode == "adapter"


def test_what_the_lora_layers_cannot_take_is_folded_unless_they_were_asked_for_by_name(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
    manager.packed_modules = {"second": ["second_gate", "second_up"]}
    for asked in ("", "auto"):
        monkeypatch.setenv("SWIFT_LORA_FIX_MODE", asked)
        decided = scope.decide(port_of(peft_model(), llm=engine))
        assert decided.mode == "fused" and not decided.is_open and "take second in parts" in decided.reason
    monkeypatch.setattr(scope, "why_not_fused", lambda trainer: "it is tied")
    assert scope.decide(port_of(peft_model(), llm=engine)).mode == "adapter", "refused when it is bound"
    monkeypatch.undo()
    monkeypatch.setenv("SWIFT_LORA_FIX_MODE", "adapter")
    port = port_of(peft_model(), llm=engine)
    with pytest.raises(errors.UnsupportedAdapterError, match="take second in parts"):
        sessions.begin(port.learner, port)


def test_a_lora_beside_towers_that_are_trained_whole_is_folded(engine: FakeEngine) -> None:
    """lora_llm: ms-swift's engine has no LoRA layers for it."""
    model = peft_model(target_modules=["first"])
    model.base_model.model.second.requires_grad_(True)
    decided = scope.decide(port_of(model, llm=engine, algorithm="lora_llm", has_lora=False))
    assert decided.ours and decided.mode == "fused"


def test_a_session_does_not_keep_its_trainer_alive(engine: FakeEngine) -> None:
    """Nor does the gate, which is as old as the session."""
    port = port_of(peft_model(), llm=engine, take=engine.model.load)
    trainer = port.learner
    session = sessions.begin(trainer, port)
    assert session is not None and session.examiner._gate() is session.examiner.gate
    del port.kept
    gone = weakref.ref(trainer)
    del trainer, port
    gc.collect()
    assert gone() is None and sessions.latest() is not session


def test_release_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    import swift_lora_fix

    monkeypatch.setattr(releases, "installed_trl", lambda: None)
    monkeypatch.setattr(releases, "installed_swift", lambda: "3.9.3")
    with pytest.raises(errors.UnsupportedReleaseError, match="3.9.3 is older than 3.10.0"):
        swift_lora_fix.apply()
    monkeypatch.setattr(releases, "installed_swift", lambda: None)
    with pytest.raises(errors.MissingPackageError, match="ms-swift is not installed"):
        swift_lora_fix.apply()


def test_a_repair_takes_a_changed_scaling_over_and_keeps_its_step(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWIFT_LORA_FIX_ON_MISMATCH", "repair")
    monkeypatch.setattr(AdapterModeWriter, "write_by_reference", AdapterModeWriter.write)  # there is no loader here
    session.trainer.learner.updates = 5  # type: ignore[attr-defined]
    session.synchronize()
    session.adapter.layers[0].scaling["default"] *= 1.5
    roll_out(session)
    assert (session.phase, session.served_step) == (Phase.EXAMINED, 5) and not adapter.changed_scalings(session.adapter)


def test_custody_names_what_was_looked_at_after_a_repair_and_names_it_once(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SWIFT_LORA_FIX_ON_MISMATCH", "repair")
    monkeypatch.setattr(AdapterModeWriter, "write_by_reference", AdapterModeWriter.write)  # there is no loader here
    caplog.set_level(logging.INFO, logger="swift.lora_fix")
    session.base.engine_differences = lambda: ["embed.weight"] * (session.base_pushes == 1)  # type: ignore[union-attr, method-assign]
    roll_out(session)
    (custody,) = [message for message in caplog.messages if "chain of custody" in message]
    assert custody.count("the LoRA slots' values") == 1 and custody.count("the base's bits on both sides") == 1, custody


class ScoredBatch:
    """Two tokens that the engine and the trainer are half a nat apart on; a quarter where nothing is dropped out."""

    why_not, temperature = "", 1.0

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def scored(self, anew: bool) -> list[Scored]:
        self.asked.append(anew)
        trainer = torch.full((1, 2), -1.25 if anew else -1.5)
        return [Scored([[-1.0, -1.0]], trainer, torch.ones(1, 2))]


def test_the_rollouts_are_compared_with_what_the_trainer_makes_of_them(session: Session) -> None:
    numbers = session.trainer.metrics()
    assert numbers is not None
    session.trainer.model.eval()
    for _ in range(2):
        session.note_batch(ScoredBatch())
    assert numbers["lora_sync/batch_mean"] == [0.5, 0.5] and numbers["lora_sync/batch_max"] == [0.5]
    assert numbers["lora_sync/batch_tokens"] == [2.0, 2.0] and numbers["lora_sync/batch_kl"][0] > 0
    assert session.examination.batch is not None and "over the 2 tokens" in session.summary()["batch"]
    session.synchronize()
    assert session.examination.batch is None


@pytest.mark.parametrize("logprob, warned", [(-1.46, 0), (-1.44, 1), (float("nan"), 1)])
def test_rollouts_far_beyond_what_the_gate_explains_are_a_warning(
    session: Session, logprob: float, warned: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate's noise is 0.01, so 0.05 are allowed; the trainer has -1.5. Once a step, beside a sound verdict."""
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    session.trainer.model.eval()
    scored = ScoredBatch()
    part = Scored([[logprob, logprob]], torch.full((1, 2), -1.5), torch.ones(1, 2))
    monkeypatch.setattr(scored, "scored", lambda anew: [part])
    with caplog.at_level(logging.WARNING, logger="swift.lora_fix"):
        session.note_batch(scored)
        session.examination.verdicts = judged("disagrees", cause="stale").verdicts
        session.note_batch(scored)
        assert not caplog.messages, "the gate did not look, or has said worse"
        session.examination.verdicts = judged().verdicts
        for _ in range(2):
            session.note_batch(scored)
    assert len([message for message in caplog.messages if "the rollouts are farther" in message]) == warned


def test_a_low_temperature_magnifies_what_is_explained(
    session: Session, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    session.trainer.model.eval()
    session.examination.verdicts = judged().verdicts
    scored = ScoredBatch()
    for temperature in (0.05, 2.0):  # half a nat apart, where 0.05 nats are allowed at 1
        scored.temperature = temperature
        session.note_batch(scored)
        said = [message for message in caplog.messages if "the rollouts are farther" in message]
        assert len(said) == (temperature > 1)


def test_a_resume_after_an_evaluation_is_compared_with_its_file(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="swift.lora_fix")
    before, session.origin = session.origin, None
    session.forget_origin()
    session.trainer.learner.updates += 1  # type: ignore[attr-defined]
    session.synchronize()
    roll_out(session)
    assert session.origin == before is not None and any("LoRA weights from" in message for message in caplog.messages)
    assert any("chain of custody" in message for message in caplog.messages)


def test_with_dropout_rollouts_are_scored_anew_where_the_gate_asked(session: Session) -> None:
    session.trainer.model.train()
    session.trainer.model.dropout = torch.nn.Dropout(0.1)
    scored = ScoredBatch()
    session.note_batch(scored)
    assert not scored.asked, "the gate did not ask at this sync"
    session.examination.verdicts = judged().verdicts
    for _ in range(2):
        session.note_batch(scored)
    assert scored.asked == [True], "once a sync"
    numbers = session.trainer.metrics()
    assert numbers is not None and numbers["lora_sync/batch_mean"] == [0.25]


def test_ranks_score_anew_together(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    session.trainer.learner.world = 2  # type: ignore[attr-defined]
    session.trainer.model.train()
    session.trainer.model.dropout = torch.nn.Dropout(0.1)
    session.examination.verdicts = judged().verdicts
    session.examiner._is_altered = False
    monkeypatch.setattr(examiner, "ranks_agree", lambda fine, device: False)  # the other one's gate did not ask
    scored = ScoredBatch()
    session.note_batch(scored)
    assert not scored.asked, "a sharded trainer would wait for it for ever"


def test_ranks_leave_out_together_what_one_of_them_knows_to_be_altered(
    session: Session, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rollout servers only the main rank knows; a comparison is all ranks'."""
    caplog.set_level(logging.INFO, logger="swift.lora_fix")
    session.trainer.learner.world = 2  # type: ignore[attr-defined]
    session.trainer.model.eval()
    asked: list[bool] = []
    monkeypatch.setattr(examiner, "ranks_agree", lambda fine, device: asked.append(fine) or False)
    scored = ScoredBatch()
    for _ in range(2):
        session.note_batch(scored)
    assert not scored.asked and asked == [True], "once a run"
    assert any("logits processors have changed them" in message for message in caplog.messages)


def test_what_is_not_like_with_like_is_said_once_and_not_recorded(
    session: Session, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    session.trainer.model.eval()
    scored = ScoredBatch()
    with caplog.at_level(logging.INFO, logger="swift.lora_fix"):
        scored.why_not = "sampling altered them (top_p 0.9)"
        for _ in range(2):
            session.note_batch(scored)
        scored.why_not = ""
        session.trainer.learner.updates = 1  # type: ignore[attr-defined]
        session.note_batch(scored)
        session.served_step = None
        session.note_batch(scored)
        session.served_step = 1
        monkeypatch.setattr(type(session.trainer), "is_asynchronous", True)
        session.note_batch(scored)
    reasons = [message.partition("the trainer's: ")[2] for message in caplog.messages]
    assert reasons == ["sampling altered them (top_p 0.9).", "they were made by an earlier policy."]
    assert not scored.asked and "lora_sync/batch_mean" not in (session.trainer.metrics() or {})


def test_rows_that_do_not_fit_are_said_once_whatever_their_lengths(
    session: Session, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    session.trainer.model.eval()
    scored = ScoredBatch()
    with caplog.at_level(logging.INFO, logger="swift.lora_fix"):
        for length in (3, 4):
            part = Scored([[-1.0]], torch.zeros(1, length), torch.ones(1, length))
            monkeypatch.setattr(scored, "scored", lambda anew, part=part: [part])
            session.note_batch(scored)
    assert len(caplog.messages) == 1 and "a rollout has 1 logprobs for 3 tokens" in caplog.messages[0]


def test_a_rollout_in_the_background_leaves_the_trainer_alone(session: Session) -> None:
    """With --async_generate true the trainer takes its next step meanwhile: no probe, no talk with other ranks."""
    session.trainer.learner.world = 2  # type: ignore[attr-defined]  # whatever it would ask the other rank fails
    session.adapter.layers[0].scaling["default"] = 7.0
    with ThreadPoolExecutor(1) as thread:
        with pytest.raises(errors.PolicyMismatchError, match="2 -> 7"):
            thread.submit(roll_out, session).result()
        session.adapter.layers[0].scaling["default"] = 2.0
        thread.submit(roll_out, session).result()
    assert session.phase is Phase.EXAMINED and session.examination.verdict is None
    session.phase = Phase.SERVED
    with pytest.raises(ValueError, match="process group"):
        roll_out(session)


class FakeGate:
    """Says what it is told to say."""

    def __init__(self, *outcomes: Any) -> None:
        self.floors: dict[str, Any] = {probe.SHORT: []}
        self.outcomes = list(outcomes)

    def ask(self, rollout: Any, together: Any, ahead: bool = False) -> Any:
        return [gate.Asked(probe.SHORT, ())]

    def judge(self, asked: Any, rollout: Any = None) -> gate.Judgement:
        return self.outcomes.pop(0)


def judged(outcome: str = "agrees", weight: float = 100.0, cause: str = "", noisy: str = "") -> gate.Judgement:
    hypotheses = (Hypothesis("not-applied", weight, 0.0, 0.01, 1.0, 100.0),)
    distance = Distance(0.01, 0.02, 0.0)
    told = Verdict(outcome, cause, "", distance, distance, 1.0, 1.0, ratio=1.0, noise=0.01, hypotheses=hypotheses)
    finding = Finding(cause, gate.GATE, str(told)) if outcome == "disagrees" else None
    return gate.Judgement({probe.SHORT: told}, [noisy] if noisy else [], {}, finding)


@pytest.fixture
def gated(session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Session:
    monkeypatch.setenv("SWIFT_LORA_FIX_GATE_EVERY", "1")
    caplog.set_level(logging.INFO, logger="swift.lora_fix")
    return session


def steps_with(session: Session, *outcomes: Any) -> None:
    session.examiner.gate = FakeGate(*outcomes)  # type: ignore[assignment]
    for _ in outcomes:
        session.trainer.learner.updates += 1  # type: ignore[attr-defined]
        session.synchronize()
        roll_out(session)


def test_a_probe_that_fails_is_a_warning_and_a_number(gated: Session, caplog: pytest.LogCaptureFixture) -> None:
    failed = gate.Judgement(failed={probe.SHORT: "KeyError: 'pixel_values'"})
    steps_with(gated, failed, gate.Judgement(failed={probe.SHORT: "again", probe.LONG: "again"}))
    said = [message for message in caplog.messages if "the probe with short prompts failed" in message]
    assert len(said) == 1 and "KeyError: 'pixel_values'" in said[0]
    assert gated.phase is Phase.EXAMINED and gated.trainer.metrics()["lora_sync/probes_failed"] == [1.0, 2.0]  # type: ignore[index]
    custody = next(message for message in caplog.messages if "chain of custody" in message)
    assert "looked at: the LoRA slots' values" in custody
    assert "not looked at: answers of the engine (no probe could be judged at this sync)" in custody


class Ban:
    """As a user's logits processor for vLLM."""


def test_an_engine_with_logits_processors_is_not_asked(
    gated: Session, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.vllm_config.model_config.logits_processors = ["mine:Ban", Ban]
    gated.examiner.gate = FakeGate()  # type: ignore[assignment]  # which has no answers
    for _ in range(2):
        gated.trainer.learner.updates += 1  # type: ignore[attr-defined]
        gated.synchronize()
        roll_out(gated)
    said = [message for message in caplog.messages if "logits processors" in message]
    assert len(said) == 1 and "(mine:Ban, Ban)" in said[0] and "the engine is not asked" in said[0]
    custody = next(message for message in caplog.messages if "chain of custody" in message)
    assert "looked at: the LoRA slots' values" in custody and "not looked at: answers of the engine" in custody
    engine.vllm_config.model_config.logprobs_mode = "raw_logprobs"  # taken before them
    steps_with(gated, judged())


def test_a_probe_that_leaves_it_open_is_a_warning_and_the_next_sync_is_asked(
    gated: Session, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = gated.examiner.schedule
    schedule.due = 1
    monkeypatch.setenv("SWIFT_LORA_FIX_GATE_EVERY", "1000")
    steps_with(gated, judged("unsure", noisy="short prompts: 2.1 times"))
    assert not schedule.is_due(gated.syncs, 1000) and schedule.is_due(gated.syncs + 1, 1000)
    assert gated.phase is Phase.EXAMINED
    assert any("left open which policy the engine serves" in message for message in caplog.messages)
    assert any("short prompts: 2.1 times; up to 1.5 is usual" in message for message in caplog.messages)
    custody = next(message for message in caplog.messages if "chain of custody" in message)
    assert "not looked at: answers to short prompts" in custody, "what was not decided is not claimed"


def test_an_adapter_that_stays_too_small_to_tell_is_said_once(gated: Session, caplog: pytest.LogCaptureFixture) -> None:
    steps_with(gated, *[judged(weight=1.0)] * (2 * SMALL_LOOKS))
    said = [message for message in caplog.messages if "does less than the noise" in message]
    assert len(said) == 1 and f"after {SMALL_LOOKS + 1} syncs" in said[0]
    assert "(not distinguishable yet from the plain base)" in said[0]
    caplog.clear()
    steps_with(gated, judged(), *[judged(weight=1.0)] * (SMALL_LOOKS - 1))
    assert not any("does less than the noise" in message for message in caplog.messages)


def test_custody_claims_nothing_after_a_mismatch(
    gated: Session, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWIFT_LORA_FIX_ON_MISMATCH", "warn")
    steps_with(gated, judged("disagrees", cause="double-count"))
    assert any("[double-count]" in message for message in caplog.messages)
    assert not any("chain of custody" in message for message in caplog.messages)
    assert gated.trainer.metrics()["lora_sync/agrees"] == [0.0]  # type: ignore[index]


def test_answers_that_are_no_numbers_name_the_kernel_that_is_known_for_them(
    gated: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated.examiner, "_known_faults", lambda: releases.kernel_faults("0.20.2", 9))
    with pytest.raises(errors.PolicyMismatchError, match="engine-not-finite.*known: vLLM issue 48590"):
        steps_with(gated, judged("disagrees", cause="engine-not-finite"))


@pytest.mark.parametrize("parked", [False, True])
def test_the_mode_is_measured_whether_the_gate_judges_now_or_later(gated: Session, parked: bool) -> None:
    """With --offload_model it was said to be measured soon, and never was."""
    gated.trainer.learner.parks_policy = parked  # type: ignore[attr-defined]
    watched: list[Any] = []
    choice = SimpleNamespace(is_settled=False, choose=lambda *_: None, watch=lambda *given: watched.append(given))
    gated.auto = choice  # type: ignore[assignment]
    gated.examiner.gate = FakeGate(judged())  # type: ignore[assignment]
    gated.trainer.learner.updates += 1  # type: ignore[attr-defined]
    gated.synchronize()
    roll_out(gated)
    assert (gated.pending is not None) is parked and len(watched) == 1
    gated.after_rollout()
    assert gated.examination.verdict is not None and len(watched) == 1


def test_with_the_trainers_model_away_a_lost_adapter_is_repaired_after_the_rollouts(
    session: Session, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made without it, and made again."""
    session.trainer.learner.parks_policy = True  # type: ignore[attr-defined]
    engine.loaded.clear()
    with pytest.raises(errors.EngineStateError, match="is not loaded"):
        roll_out(session)
    monkeypatch.setenv("SWIFT_LORA_FIX_ON_MISMATCH", "repair")
    roll_out(session)
    assert session.pending is not None and session.pending.finding is not None
    assert session.pending.finding.cause == "not-loaded"
    assert session.after_rollout(), "again, after a sync"
    assert session.phase is Phase.UNBOUND and session.trainer.learner.must_sync  # type: ignore[attr-defined]


def test_where_rollouts_are_made_in_the_background_a_mismatch_is_repaired_before_any_is_asked_for(
    gated: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With --async_generate those of this policy are made while the next step is trained: what is judged after the call
    that asks for them comes too late to keep them out of the next batch."""
    monkeypatch.setenv("SWIFT_LORA_FIX_ON_MISMATCH", "repair")
    monkeypatch.setattr(AdapterModeWriter, "write_by_reference", AdapterModeWriter.write)  # there is no loader here
    gated.trainer.learner.parks_policy = True  # type: ignore[attr-defined]  # it judges later, as several ranks do
    gated.examiner.gate = FakeGate(judged("disagrees", cause="stale"), judged())  # type: ignore[assignment]
    gated.trainer.learner.updates += 1  # type: ignore[attr-defined]
    gated.synchronize()
    gated.look_at_once(Rollout())  # type: ignore[arg-type]
    assert gated.phase is Phase.EXAMINED and gated.pending is None
    assert (gated.served_step, gated.syncs, gated.base_pushes) == (1, 3, 2), "base and adapter went again, at this step"
    assert any("repaired: the engine serves the trainer's policy again" in message for message in caplog.messages)

    gated.examiner.gate = FakeGate(*[judged("disagrees", cause="stale")] * 2)  # type: ignore[assignment]
    gated.trainer.learner.updates += 1  # type: ignore[attr-defined]
    gated.synchronize()
    with pytest.raises(errors.PolicyMismatchError, match=r"of step 2: .*Nothing was generated\."):
        gated.look_at_once(Rollout())  # type: ignore[arg-type]


@pytest.mark.parametrize("audited, cause", [("slots-changed", "double-count"), ("misplaced", "misplaced")])
def test_an_audit_that_only_knows_of_a_change_takes_its_name_from_the_answers(
    gated: Session, audited: str, cause: str
) -> None:
    gated.examiner.gate = FakeGate(judged("disagrees", cause="double-count"))  # type: ignore[assignment]
    found = gated.examiner.judge(examiner.Served(1, 2, None), (), Finding(audited, "audit", "2 tensors"))
    assert found is not None and found.cause == cause and found.test == "audit and the agreement gate"


def test_nan_in_the_slots_is_cleared_before_rollouts_that_a_repair_throws_away(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts would leave it in the memory of the KV cache, where attention meets it after the repair."""
    monkeypatch.setenv("SWIFT_LORA_FIX_ON_MISMATCH", "repair")
    session.trainer.learner.parks_policy = True  # type: ignore[attr-defined]
    slot: torch.Tensor = session.slot  # type: ignore[attr-defined]
    slot[3] = float("nan")
    roll_out(session)
    assert session.pending is not None and session.pending.finding is not None
    assert session.pending.finding.cause == "not-finite" and not slot.any()
    assert session.after_rollout()
