"""``SWIFT_LORA_FIX_MODE=auto``: the mode is chosen by what it costs in this run, measured as the run starts.

In an engine with LoRA layers both modes can be had: the adapter apart, or folded into the weights and no LoRA asked
for. What is compared is the time of a sync and of the run's own rollout, and what the one rounding takes of the update.
While the adapter is still zero there is no update to lose, so the exact mode stays until there is one; and a fused mode
that comes to lose too much gives way to the exact one again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import scope, sync
from .common.log import info
from .engine.vllm.handle import EngineHandle
from .engine.vllm.slots.writer import AdapterWriter
from .engine.vllm.weights.fused import FusedWriter
from .errors import UnsupportedAdapterError
from .proof import audit
from .proof.gate import Infer, altered, same_random_state
from .proof.serving import Apart
from .server.trainer.writer import RemoteWriter
from .state import SyncState

REPEATS = 3
TOKENS = 64  # of each answer that is timed, at most


@dataclass(frozen=True)
class Costs:
    """Of one mode, measured: seconds of a sync (median), output tokens a second of the run's own rollout."""

    sync: float
    throughput: float

    def of_step(self, tokens: int) -> float:
        """Seconds of a sync and of a rollout of so many tokens."""
        return self.sync + tokens / self.throughput


@dataclass(frozen=True)
class Measured:
    """Both modes, beside each other, and the output tokens of one rollout (an upper bound: no answer ends early)."""

    adapter: Costs
    fused: Costs
    tokens: int

    @property
    def fused_is_faster(self) -> bool:
        return self.fused.of_step(self.tokens) < self.adapter.of_step(self.tokens)

    def __str__(self) -> str:
        rows = [("mode", "sync", "generation", "sync and rollout")]
        for name, costs in (("adapter", self.adapter), ("fused", self.fused)):
            seconds = f"{costs.of_step(self.tokens):.3g} s"
            rows.append((name, f"{1e3 * costs.sync:.3g} ms", f"{costs.throughput:,.0f} tok/s", seconds))
        return "\n".join("  ".join(f"{cell:<16}" for cell in row).rstrip() for row in rows)


def consider(
    trainer: Any,
    state: SyncState,
    everywhere: Callable[[bool], bool],
    infer: Infer,
    requests: Sequence[Any],
    config: Any,
    bound: float,
) -> bool:
    """After a sync that passed the gate: take the other mode if it is the better one; whether it was taken.

    everywhere: whether something is so on all ranks, which come here together and go the same way.
    bound: the share of the update that may be lost to rounding.
    """
    if isinstance(state.writer, FusedWriter):
        rounding = state.proof.rounding
        share = rounding.lost_share if rounding is not None else None
        if not everywhere(share is None or share <= bound):
            state.auto = False
            info(
                f"auto mode: rounding now loses {share or 0:.1%} of the adapter's update, above {bound:.1%}: back to "
                "the adapter mode, which is exact, for the rest of this run."
            )
            sync.change_mode(trainer, state, "adapter")
            return True
        return False
    problem = scope.why_not_fused(trainer)
    if not everywhere(problem is None):
        state.auto = False
        info(f"auto mode: the adapter mode it is, {problem or 'another rank cannot fold its adapter in'}.")
        return False
    fused = sync.fused_writer(trainer)
    share = audit.rounding(fused).lost_share
    if share is None:
        if not state.auto_is_said:
            state.auto_is_said = True
            info("auto mode: the adapter adds nothing yet, so it is served exactly, apart; decided at a later sync.")
        return False
    if state.measured is None:
        try:
            sync.learn_places(trainer, fused)
        except UnsupportedAdapterError as error:
            state.auto = False
            info(f"auto mode: the adapter mode it is: {error}")
            return False
        state.measured = _measure(trainer, state, fused, infer, requests, config)
    measured: Measured = state.measured
    better = measured.fused_is_faster and share <= bound
    info(
        f"auto mode, measured on this run (rounding would lose {share:.1%} of the update, allowed {bound:.1%}):\n"
        f"{measured}\nchosen: {'fused' if better else 'adapter'}."
    )
    if everywhere(better):
        sync.change_mode(trainer, state, "fused")
        return True
    if not measured.fused_is_faster:
        state.auto = False  # that will not change
    return False


def _measure(
    trainer: Any, state: SyncState, fused: FusedWriter, infer: Infer, requests: Sequence[Any], config: Any
) -> Measured:
    short = altered(config, max_tokens=min(TOKENS, int(config.max_tokens or TOKENS)), return_details=True)
    here = state.writer
    assert isinstance(state.engine, EngineHandle) and not isinstance(here, RemoteWriter)
    apart = Apart(state.engine, state.adapter)
    throughput: dict[str, list[float]] = {"adapter": [], "fused": []}
    with same_random_state(trainer.accelerator.device):
        for repeat in range(REPEATS + 1):  # the first warms up
            for name, rates in throughput.items():
                state.engine.reset_caches()
                if name == "adapter":
                    rate = _throughput(infer, requests, short)
                else:  # of the plain base: the same kernels on the same shapes
                    with apart.engine_without_adapter():
                        rate = _throughput(infer, requests, short)
                if repeat:
                    rates.append(rate)
    state.engine.reset_caches()
    try:
        seconds = {"fused": _seconds(lambda: _write(fused)), "adapter": _seconds(lambda: _write(here))}
    finally:
        fused.write_plain()
    costs = {name: Costs(seconds[name], statistics.median(rates)) for name, rates in throughput.items()}
    whole = int(getattr(config, "max_tokens", None) or TOKENS)
    return Measured(costs["adapter"], costs["fused"], whole * len(requests) * int(getattr(config, "n", 1) or 1))


def _write(writer: FusedWriter | AdapterWriter) -> None:
    writer.begin_validation()
    writer.validate()
    writer.write()
    writer.finish()


def _seconds(work: Callable[[], None]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _throughput(infer: Infer, requests: Sequence[Any], config: Any) -> float:
    started = time.perf_counter()
    outputs = infer(requests, config)
    seconds = time.perf_counter() - started
    tokens = sum(len(choice.token_ids or ()) for output in outputs for choice in output.response.choices)
    return max(1, tokens) / seconds
