"""The writer of fused mode and its audit, on a stand-in engine that packs; the real engines are in tests/real/vllm."""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import swift_lora_fix
from swift_lora_fix import auto, errors, scope
from swift_lora_fix.common.settings import Settings
from swift_lora_fix.engine.vllm.colocated import FusedModeWriter, FusedServing, standing_in
from swift_lora_fix.engine.vllm.weights import base, folding
from swift_lora_fix.engine.vllm.weights.fused import FusedWriter
from swift_lora_fix.policy import adapter, merging
from swift_lora_fix.policy.rounding import rounded, seed_of
from swift_lora_fix.proof import audit
from tests.support.fakes.trainer import port_of
from tests.support.peft_models import peft_model

FIRST = "base_model.model.first.base_layer.weight"


class Engine(torch.nn.Module):
    """Rows 4 to 16 of ``packed`` are the trainer's first layer; its second lies transposed, as no copy would put it."""

    def __init__(self, transposes: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(8, 10, bias=False, dtype=torch.bfloat16)
        self.packed = torch.nn.Linear(8, 20, bias=False, dtype=torch.bfloat16)
        self.second = torch.nn.Linear(4, 12, bias=False, dtype=torch.bfloat16) if transposes else None
        self.plain_second = None if transposes else torch.nn.Linear(12, 4, bias=False, dtype=torch.bfloat16)

    def load(self, weights: Any) -> None:
        for name, value in weights.items():
            if "embed" in name:
                self.embed.weight.data.copy_(value)
            elif "first" in name:
                self.packed.weight.data.narrow(0, 4, 12).copy_(value)
            elif "second" in name and self.plain_second is not None:
                self.plain_second.weight.data.copy_(value)
            elif "second" in name:
                assert self.second is not None
                self.second.weight.data.copy_(value.clone().t())


def writer_for(model: torch.nn.Module, engine: Engine) -> tuple[FusedWriter, base.Pushed]:
    trainer, bound = port_of(model, take=engine.load, has_lora=False), adapter.bind(model, apart=False)
    handle: Any = SimpleNamespace(model=engine, load_format="auto")
    cpu = torch.device("cpu")
    reload = partial(base.reload, trainer, handle, bound)
    writer = FusedWriter(handle, bound, merging.bind(model, "default"), cpu, reload)
    pushed = base.push(trainer, handle, bound, writer.changing)
    writer.accept_base(pushed)
    return writer, pushed


@pytest.fixture
def made() -> tuple[torch.nn.Module, Engine, FusedWriter, base.Pushed]:
    model, engine = peft_model(), Engine()
    return model, engine, *writer_for(model, engine)


def weight(model: torch.nn.Module, name: str = "first") -> torch.Tensor:
    layer = getattr(model.base_model.model, name)
    w, delta = layer.base_layer.weight, layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    value = (w + delta * layer.scaling["default"]).detach()
    return rounded(value, w.detach(), torch.bfloat16, seed_of(FIRST.replace("first", name)))


def test_the_weights_land_where_the_push_put_the_base(made: tuple) -> None:
    model, engine, writer, pushed = made
    rest = engine.packed.weight[:4].clone(), engine.embed.weight.clone()
    report = writer.write()
    writer.finish()
    assert report.path == "fused" and report.bytes_written == (12 * 8 + 4 * 12) * 2 and len(report.digest) == 16
    assert torch.equal(engine.packed.weight[4:16], weight(model))
    assert torch.equal(engine.plain_second.weight, weight(model, "second"))
    assert torch.equal(engine.packed.weight[:4], rest[0]) and torch.equal(engine.embed.weight, rest[1])
    assert audit.merged(writer)[0] is None and audit.base(pushed.record, set()) is None
    assert report.digest == writer.digest_of(adapter.read_to_host(writer.adapter, torch.device("cpu")))


def test_the_digest_is_of_the_policy(made: tuple) -> None:
    model, _, writer, _ = made
    digests = []
    for factor in (1.0, 1.0, 1.01):
        with torch.no_grad():
            model.base_model.model.first.lora_A["default"].weight.mul_(factor)
        digests.append(writer.write())
        writer.finish()
    first, same, other = (report.digest for report in digests)
    assert first == same != other


def test_without_the_adapter_the_engine_is_the_base_again_and_then_the_policy(made: tuple) -> None:
    model, engine, writer, _ = made
    writer.write()
    merged = engine.packed.weight.clone()
    with pytest.raises(RuntimeError, match="out of memory"), writer.plain_base():
        assert torch.equal(engine.packed.weight[4:16], model.base_model.model.first.base_layer.weight.bfloat16())
        raise RuntimeError("out of memory")
    assert torch.equal(engine.packed.weight, merged)


def test_what_vllm_does_not_copy_goes_through_its_own_loading(caplog: pytest.LogCaptureFixture) -> None:
    model, engine = peft_model(), Engine(transposes=True)
    writer, pushed = writer_for(model, engine)
    assert writer.regions is None
    assert writer.write().path == "reload"
    assert audit.base(pushed.record, set()) is None, "what changes is no part of the base"
    assert torch.equal(engine.packed.weight[4:16], weight(model))
    assert torch.equal(engine.second.weight.t(), weight(model, "second"))  # type: ignore[union-attr]
    with writer.plain_base():
        assert torch.equal(engine.packed.weight[4:16], model.base_model.model.first.base_layer.weight.bfloat16())
    assert torch.equal(engine.packed.weight[4:16], weight(model))
    assert audit.merged(writer) == (None, None), "nobody knows where they lie"


def test_a_place_that_does_not_hold_the_base_is_not_written_to() -> None:
    model, engine = peft_model(), Engine()
    writer, pushed = writer_for(model, engine)
    engine.packed.weight.data[5, 0] += 1
    assert "does not hold" in str(writer._misplaced(pushed)) and FIRST in str(writer._misplaced(pushed))
    writer, pushed = writer_for(model, engine)
    engine.packed.weight = torch.nn.Parameter(engine.packed.weight.clone())  # what a repacking after the load does
    assert "moved" in str(writer._misplaced(pushed))


def test_what_vllm_makes_out_of_a_weight_cannot_follow_it() -> None:
    """As MLA's absorbed weights: the copy itself is fine, but somebody reads a product of it."""
    model, engine = peft_model(), Engine()
    load = engine.load

    def load_and_derive(weights: Any) -> None:
        load(weights)
        engine.absorbed = engine.packed.weight.data[4:16].float().t().contiguous()

    engine.load = load_and_derive  # type: ignore[method-assign]
    with pytest.raises(errors.UnsupportedAdapterError, match=f"another tensor out of {FIRST}.*in adapter mode"):
        writer_for(model, engine)


def test_what_vllm_makes_and_throws_away_does_no_harm() -> None:
    model, engine = peft_model(), Engine()
    load = engine.load

    def load_and_look(weights: Any) -> None:
        load(weights)
        assert bool((engine.packed.weight.data.float() * 2).isfinite().all())

    engine.load = load_and_look  # type: ignore[method-assign]
    assert writer_for(model, engine)[0].regions is not None


def test_what_vllm_puts_in_the_place_of_a_weight_goes_through_its_own_loading() -> None:
    """As the layouts of its MoE kernels."""
    model, engine = peft_model(), Engine()
    load = engine.load

    def load_and_replace(weights: Any) -> None:
        engine.packed.weight = torch.nn.Parameter(engine.packed.weight.data.clone())
        load(weights)
        engine.packed.weight = torch.nn.Parameter(engine.packed.weight.data.float().bfloat16())

    engine.load = load_and_replace  # type: ignore[method-assign]
    writer, _ = writer_for(model, engine)
    assert writer.regions is None and writer.write().path == "reload"
    assert torch.equal(engine.packed.weight[4:16], weight(model))


def test_whether_it_is_current_is_known_whatever_happens(made: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, writer, _ = made
    assert not writer.is_current()
    writer.write()
    assert writer.is_current()
    writer.forget()
    assert not writer.is_current()
    writer.write()
    monkeypatch.setattr(merging.MergedModule, "values", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.write()
    assert not writer.is_current(), "half of it may be written"


def test_a_lora_request_on_top_of_the_merged_weights_is_noticed() -> None:
    model, engine = peft_model(), Engine()
    trainer = port_of(model, take=engine.load, has_lora=False, names_adapter=False)
    handle: Any = SimpleNamespace(
        model=engine, load_format="auto", reset_caches=None, abort_unfinished=None, dtype=None
    )
    bound = adapter.bind(model, apart=False)
    writer = FusedModeWriter(trainer, handle, bound, merging.bind(model, "default"))
    assert writer.what_is_missing() is None
    trainer.attach_adapter(True)
    assert "on top of the merged weights" in str(writer.what_is_missing())


def doubled(model: torch.nn.Module, engine: Engine) -> None:
    for name, rows in (("first", engine.packed.weight.data[4:16]), ("second", engine.plain_second.weight.data)):  # type: ignore[union-attr]
        layer = getattr(model.base_model.model, name)
        rows.add_((layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2).bfloat16())


FAULTS = {
    "not-applied": lambda model, engine: engine.load(
        {n: getattr(model.base_model.model, n).base_layer.weight for n in ("first", "second")}
    ),
    "double-count": doubled,
    "not-finite": lambda _, engine: engine.packed.weight.data[4:5].fill_(float("nan")),
    "weights-changed": lambda _, engine: engine.packed.weight.data[9].mul_(1.5),
}


@pytest.mark.parametrize("cause", FAULTS)
def test_the_audit_names_what_is_wrong(cause: str) -> None:
    model, engine = peft_model(), Engine()
    writer, _ = writer_for(model, engine)
    writer.write()
    assert audit.merged(writer)[0] is None
    FAULTS[cause](model, engine)  # type: ignore[no-untyped-call]
    finding, rounding = audit.merged(writer)
    assert finding is not None and finding.cause == cause and rounding is None
    assert "weights differ: base_model.model." in finding.evidence
    writer.write()
    assert audit.merged(writer)[0] is None


def test_each_part_of_the_audit_looks_at_its_modules_and_all_at_all(made: tuple) -> None:
    _, engine, writer, _ = made
    writer.write()
    engine.plain_second.weight.data[0, 0] += 1
    found = [audit.merged(writer, part, 2)[0] for part in range(2)]
    assert [finding is not None for finding in found] == [False, True]
    assert audit.merged(writer, 5, 16) == (None, None), "a turn without a module"


@pytest.mark.parametrize("nearest", [False, True], ids=["as we round", "to the nearest"])
def test_the_lost_share_is_what_rounding_takes_of_the_update(
    made: tuple, nearest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, writer, _ = made
    if nearest:
        monkeypatch.setattr(merging, "rounded", lambda value, plain, dtype, seed: value.to(dtype))
    with torch.no_grad():
        model.base_model.model.first.base_layer.weight.copy_(torch.ones(12, 8))
        model.base_model.model.second.base_layer.weight.copy_(torch.ones(4, 12))
    shares = []
    for size in (1e-3, 3e-3, 1.0, 0.0):
        with torch.no_grad():
            for parameter in writer.adapter.parameters:
                parameter.fill_(size)
        writer.accept_base(writer_for(model, writer.engine.model)[1])  # type: ignore[arg-type]
        writer.write()
        _, rounding = audit.merged(writer)
        assert rounding is not None
        shares.append(rounding.lost_share)
    tiny, small, large, none = shares
    expected = pytest.approx(1.0, abs=0.2) if nearest else pytest.approx(0.0, abs=0.2)
    assert tiny == expected and small == expected, "below half a step of bf16 nothing arrives, or all but for chance"
    assert large == 0.0 and none is None


def test_the_kernel_also_computes_what_the_trainer_is_to_compute_with(made: tuple) -> None:
    model, engine, writer, pushed = made
    with torch.no_grad():
        for name in ("first", "second"):
            layer = getattr(model.base_model.model, name).base_layer
            layer.weight.copy_(layer.weight.bfloat16())
    folded: list[tuple[int, ...]] = []

    def fold(out: torch.Tensor, factors: merging.Factors) -> None:
        folded.append(tuple(out.shape))
        value = factors.w.float() + factors.scale * (factors.b.float() @ factors.a.float())
        out.copy_(rounded(value, factors.w, out.dtype, factors.seed, factors.row, factors.column))

    writer._folding = folding.Folding(fold)
    _, pushed = writer_for(model, engine)
    writer.accept_base(pushed)
    for module in writer.modules:
        with writer.whole(module) as whole:
            before = len(folded)
            (found,) = writer.held(module, whole).values()
            (expected,) = module.rounded(module.values(whole), whole, writer.dtype_of).values()
            assert torch.equal(found, expected) and folded[before:] == [tuple(found.shape)]
            writer._folding._proved.clear()
            (found,) = writer.held(module, whole).values()
            assert torch.equal(found, expected) and len(folded) == before + 1, "no kind is trusted unproved"
            writer.accept_base(pushed)


def test_the_trainer_computes_as_the_engine_holds_and_is_itself_again(made: tuple) -> None:
    model, _, writer, _ = made
    ids = torch.arange(5)
    held = model(ids)
    with standing_in(writer, merged=False), model.disable_adapter():
        base_alone = model(ids)
    with standing_in(writer, merged=False):
        assert torch.equal(model(ids), base_alone)
    with standing_in(writer, merged=True):
        rounded = model(ids)
    assert 0 < (rounded - held).abs().max() < 0.05 * held.abs().max()
    inner = model.base_model.model
    by_hand = inner.embed(ids) @ weight(model).float().t() @ weight(model, "second").float().t()
    torch.testing.assert_close(rounded, by_hand)
    assert torch.equal(model(ids), held) and "forward" not in vars(inner.first)


def test_a_forward_that_somebody_put_there_is_theirs_again_and_not_the_twins() -> None:
    """As accelerate's hooks do: a partial of the layer's own forward, in its place."""
    model = peft_model(target_modules=["first"], modules_to_save=["second"])
    with torch.no_grad():
        model.base_model.model.second.modules_to_save["default"].weight.normal_()
    writer, _ = writer_for(model, Engine())
    ids, inner = torch.arange(5), model.base_model.model
    held = model(ids)
    with standing_in(writer, merged=False):
        plain = model(ids)
    theirs = {}
    for module in (inner.first, inner.first.base_layer, inner.second, inner.second.modules_to_save["default"]):
        theirs[module] = module.forward = partial(type(module).forward, module)
    with standing_in(writer, merged=True):
        torch.testing.assert_close(model(ids), held, rtol=0.05, atol=0.05)
    with standing_in(writer, merged=False):
        assert torch.equal(model(ids), plain) and not torch.allclose(plain, held, rtol=0.05)
    assert all(vars(module)["forward"] is forward for module, forward in theirs.items())


def given(model: torch.nn.Module, enable_lora: bool = False, quantization: str | None = None) -> Any:
    config = SimpleNamespace(model_config=SimpleNamespace(quantization=quantization))
    return port_of(model, has_lora=enable_lora, llm=SimpleNamespace(vllm_config=config))


@pytest.mark.parametrize(
    "asked, enable_lora, mode",
    [("", True, "adapter"), ("", False, "fused"), ("fused", True, "fused"), ("adapter", True, "adapter")],
)
def test_the_mode_is_what_was_asked_for_or_what_the_flag_says(
    asked: str, enable_lora: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWIFT_LORA_FIX_MODE", asked)
    monkeypatch.setattr(scope.fitting, "why_not", lambda *_: None)  # the engine's LoRA layers can take the adapter
    decision = scope.decide(given(peft_model(), enable_lora))
    assert decision.ours and decision.mode == mode and ("fused mode" in decision.reason) is (mode == "fused")


def test_adapter_mode_needs_vllms_lora_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_LORA_FIX_MODE", "adapter")
    with pytest.raises(errors.SettingsError, match="start with --vllm_enable_lora true"):
        scope.decide(given(peft_model()))


def quantised() -> torch.nn.Module:
    model = peft_model()
    layer = model.base_model.model.first.base_layer
    layer.weight = torch.nn.Parameter(torch.zeros(48, 1, dtype=torch.uint8), requires_grad=False)
    return model


class Packed(torch.nn.Module):
    """As HQQ's and EETQ's layers: what they hold is under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.W_q = torch.nn.Parameter(torch.zeros(4), requires_grad=False)


def weightless() -> torch.nn.Module:
    model = peft_model()
    model.base_model.model.first.base_layer = Packed()
    return model


@pytest.mark.parametrize(
    "model, quantization, words",
    [
        (peft_model, "fp8", "the engine holds the base quantised \\(fp8\\)"),
        (quantised, None, "holds base_model.model.first.base_layer.weight quantised \\(torch.uint8\\)"),
        (lambda: peft_model(tie=True, target_modules=["tied"]), None, "is tied to"),
        (weightless, None, "first is a Linear around a Packed, which has no weight of its own"),
    ],
)
def test_what_cannot_be_folded_in_is_said_up_front_with_the_way_out(
    model: Any, quantization: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = scope.decide(given(model(), quantization=quantization))
    assert not decision.ours and "--vllm_enable_lora true" in decision.reason and "unchanged" in decision.reason
    monkeypatch.setenv("SWIFT_LORA_FIX_MODE", "fused")
    with pytest.raises(errors.UnsupportedAdapterError, match=f"{words}.*--vllm_enable_lora true"):
        scope.decide(given(model(), quantization=quantization))


def test_the_settings_of_this_mode() -> None:
    given = {"SWIFT_LORA_FIX_MODE": "Fused", "SWIFT_LORA_FIX_LOST_SHARE": "0.25"}
    assert Settings.from_environment(given).mode == "fused" and Settings.from_environment(given).lost_share == 0.25
    with pytest.raises(errors.SettingsError, match="SWIFT_LORA_FIX_MODE='merged'.*'adapter', 'auto', 'fused'"):
        Settings.from_environment({"SWIFT_LORA_FIX_MODE": "merged"})
    with pytest.raises(errors.SettingsError, match="SWIFT_LORA_FIX_LOST_SHARE='lots'.*from 0 to 1"):
        Settings.from_environment({"SWIFT_LORA_FIX_LOST_SHARE": "lots"})


def test_the_mode_as_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_LORA_FIX_MODE", "adapter")
    monkeypatch.setenv("SWIFT_LORA_FIX", "off")  # nothing is patched here
    with pytest.raises(errors.SettingsError, match="SWIFT_LORA_FIX_MODE='merged'"):
        swift_lora_fix.apply(mode="merged")
    swift_lora_fix.apply()
    assert Settings.from_environment().mode == "adapter"
    swift_lora_fix.apply(mode="Fused")
    assert Settings.from_environment().mode == "fused"


COSTS = {"fast sync": auto.Costs(0.002, 1000.0), "fast generation": auto.Costs(0.02, 1400.0)}


@pytest.mark.parametrize("tokens, faster", [(10, False), (60, False), (70, True), (100_000, True)])
def test_auto_weighs_the_sync_against_the_rollout(tokens: int, faster: bool) -> None:
    measured = auto.Measured(COSTS["fast sync"], COSTS["fast generation"], tokens)
    assert measured.fused_is_faster is faster
    assert str(measured).splitlines()[1].split()[:3] == ["adapter", "2", "ms"]


def test_auto_starts_apart_where_that_can_be_and_else_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_LORA_FIX_MODE", "auto")
    monkeypatch.setattr(scope.fitting, "why_not", lambda *_: None)
    plain, dora = scope.decide(given(peft_model(), True)), scope.decide(given(peft_model(use_dora=True), True))
    assert plain.mode == "adapter" and plain.is_open
    assert dora.mode == "fused" and not dora.is_open
    assert scope.decide(given(peft_model(), False)).mode == "fused"


@pytest.mark.parametrize("share, change", [(0.7, "adapter"), (0.3, None), (None, None)])
def test_auto_gives_the_fused_mode_up_where_too_much_is_lost(
    share: float | None, change: str | None, made: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, writer, _ = made
    monkeypatch.setattr(auto.audit, "rounding", lambda weights: audit.Rounding(share))
    choice, using = auto.Auto(), SimpleNamespace(weights=writer, mode="fused")
    assert choice.choose(None, using, bool, bound=0.5) == change  # type: ignore[arg-type]
    assert choice.is_settled is (change is not None)


def test_auto_goes_the_way_that_all_ranks_go(made: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank measures times of its own. One that decided by its own would enter other collectives than the rest."""
    _, _, writer, _ = made
    choice: Any = auto.Auto()
    choice._throughput, choice.measured = (
        {"adapter": 1000.0, "fused": 1400.0},
        auto.Measured(COSTS["fast sync"], COSTS["fast generation"], 100_000),
    )
    assert choice.measured.fused_is_faster
    asked: list[bool] = []

    def another_rank_is_slower(fine: bool) -> bool:
        asked.append(fine)
        return fine and len(asked) != 4  # known, foldable, an update, then: faster

    monkeypatch.setattr(auto.audit, "rounding", lambda weights: audit.Rounding(0.1))
    monkeypatch.setattr(auto, "FusedModeWriter", lambda *_: SimpleNamespace(weights=writer))
    monkeypatch.setattr(auto.scope, "why_not_fused", lambda trainer: None)
    trainer, using = port_of(made[0]), SimpleNamespace(weights=None, mode="adapter")
    assert choice.choose(trainer, using, another_rank_is_slower, bound=0.5) is None
    assert asked == [True] * 5 and choice.is_settled, "settled for good on this rank, as on the slower one"


def test_auto_serves_an_adapter_that_adds_nothing_exactly_and_says_so_once(
    made: tuple, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    choice: Any = auto.Auto()
    choice._throughput = {"adapter": 1000.0, "fused": 1400.0}
    monkeypatch.setattr(auto.audit, "rounding", lambda weights: audit.Rounding(None))
    monkeypatch.setattr(auto, "FusedModeWriter", lambda *_: SimpleNamespace(weights=made[2]))
    monkeypatch.setattr(auto.scope, "why_not_fused", lambda trainer: None)
    trainer, using = port_of(made[0]), SimpleNamespace(weights=None, mode="adapter")
    with caplog.at_level(logging.INFO, logger="swift.lora_fix"):
        assert [choice.choose(trainer, using, bool, bound=0.5) for _ in range(2)] == [None, None]
    assert len([text for text in caplog.messages if "adds nothing yet" in text]) == 1 and not choice.is_settled


def test_an_engine_that_fails_is_named_before_the_cache_reset_that_fails_with_it() -> None:
    """Seen with Qwen3.5 on a CPU: the log ended in a cache that could not be reset, because requests were left over."""

    def reset() -> None:
        if failed:
            raise errors.CacheResetError("vLLM's reset_prefix_cache() reported that it was not done.")

    failed: list[bool] = []
    held = SimpleNamespace(modules=(), adapter=SimpleNamespace(sharding="none"), plain_base=contextlib.nullcontext)
    serving = FusedServing(SimpleNamespace(reset_caches=reset, abort_unfinished=None, dtype=None), held)  # type: ignore[arg-type]
    with pytest.raises(errors.CacheResetError, match="The engine had failed before: RuntimeError: head dim"):
        with serving.engine_without_adapter():
            failed.append(True)
            raise RuntimeError("head dim 32")
