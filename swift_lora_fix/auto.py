"""``SWIFT_LORA_FIX_MODE=auto``: choose the mode by its cost in this run, measured at the start.

An engine with LoRA layers can serve both modes: the adapter apart, or folded into the weights with no LoRA request.
Three things are compared: the time of a sync, the time of the run's own rollout, and the share of the update that
fused mode loses to rounding. Rollouts are timed while the engine makes them (``watch``). At the next sync, where the
trainer's model is on its device, ``choose`` times the syncs and picks the mode.

While the adapter is still zero there is no update to lose: adapter mode, which is exact, stays until there is one. If
fused mode later loses too much, the run goes back to adapter mode.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from . import scope
from .common.log import info
from .engine.port import WriterPort
from .engine.vllm.colocated import FusedModeWriter
from .engine.vllm.handle import EngineHandle
from .errors import UnsupportedAdapterError
from .policy import adapter as adapters
from .policy import merging
from .proof import audit
from .proof.probe import same_random_state
from .trainer import RolloutPort, TrainerPort

REPEATS = 3
TOKENS = 64  # output tokens of each timed answer, at most
Mode = Literal["adapter", "fused"]


@dataclass(frozen=True)
class Costs:
    """One mode, measured. sync: median seconds. throughput: output tokens a second of the run's own rollout."""

    sync: float
    throughput: float

    def of_step(self, tokens: int) -> float:
        """Seconds of one sync and one rollout of ``tokens`` output tokens."""
        return self.sync + tokens / self.throughput


@dataclass(frozen=True)
class Measured:
    """Both modes. tokens: upper bound on the output tokens of one rollout, as if no answer ended early."""

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


class Auto:
    """The choice of one run. is_settled: the mode will not change any more."""

    def __init__(self) -> None:
        self.is_settled = False
        self.measured: Measured | None = None
        self._throughput: dict[str, float] | None = None
        self._tokens = 0
        self._said_nothing_yet = False

    def watch(self, rollout: RolloutPort, writer: WriterPort, device: torch.device) -> None:
        """Time the coming rollout with and without the adapter. Without it the base model runs the kernels of fused
        mode, on the same shapes. All ranks together; the random state is restored."""
        if self._throughput is not None or writer.mode == "fused":
            return
        serving = writer.serving
        reset = serving.reset_caches
        assert reset is not None, "rollout servers have one mode"
        rates: dict[str, list[float]] = {"adapter": [], "fused": []}
        with same_random_state(device):
            for repeat in range(REPEATS + 1):  # the first round warms up
                for name, found in rates.items():
                    reset()
                    if name == "adapter":
                        rate = rollout.tokens_per_second(TOKENS)
                    else:
                        with serving.engine_without_adapter():
                            rate = rollout.tokens_per_second(TOKENS)
                    if repeat:
                        found.append(rate)
        reset()
        self._throughput = {name: statistics.median(found) for name, found in rates.items()}
        self._tokens = rollout.most_tokens

    def choose(
        self,
        trainer: TrainerPort,
        writer: WriterPort,
        all_ranks: Callable[[bool], bool],
        bound: float,
    ) -> Mode | None:
        """The mode to serve the policy in from now on. None: keep the current one, the engine was not touched.

        All ranks decide together: each has its own timings, but all must choose the same mode.

        Args:
            writer: the current one. Its engine is awake and idle, and holds the trainer's base and policy.
            all_ranks: whether something is true on all ranks.
            bound: the share of the update that rounding may lose.
        """
        if writer.weights is not None:
            return self._keep_fused(writer, all_ranks, bound)
        if not all_ranks(self._throughput is not None):
            return None
        problem = scope.why_not_fused(trainer)
        if not all_ranks(problem is None):
            self._stay(problem or "another rank cannot fold its adapter in")
            return None
        adapter = adapters.bind(trainer.model, apart=False, words=trainer.words)
        fused = FusedModeWriter(
            trainer, EngineHandle(trainer.vllm_engine), adapter, merging.bind(trainer.model, adapter.name)
        )
        share = audit.rounding(fused.weights).lost_share
        if not all_ranks(share is not None):
            if not self._said_nothing_yet:
                self._said_nothing_yet = True
                info(
                    "auto mode: the adapter adds nothing yet, so it is served exactly, apart; decided at a later sync."
                )
            return None
        assert share is not None
        wrote = self.measured is None
        if self.measured is None:
            problem = self._measure(fused, writer)
            if not all_ranks(problem is None):
                self._stay(problem or "another rank cannot fold its adapter in")
                return "adapter"
        assert self.measured is not None
        faster, fits = all_ranks(self.measured.fused_is_faster), all_ranks(share <= bound)
        mode: Mode = "fused" if faster and fits else "adapter"
        info(
            f"auto mode, measured on this run (rounding would lose {share:.1%} of the update, allowed {bound:.1%}):\n"
            f"{self.measured}\nchosen: {mode}."
        )
        if not faster:
            self.is_settled = True  # later steps will not change that
        return mode if wrote or mode == "fused" else None

    def _keep_fused(self, writer: WriterPort, all_ranks: Callable[[bool], bool], bound: float) -> Mode | None:
        assert writer.weights is not None
        share = audit.rounding(writer.weights).lost_share
        if all_ranks(share is None or share <= bound):
            return None
        self.is_settled = True
        info(
            f"auto mode: rounding now loses {share or 0:.1%} of the adapter's update, above {bound:.1%}: back to "
            "the adapter mode, which is exact, for the rest of this run."
        )
        return "adapter"

    def _stay(self, why: str) -> None:
        self.is_settled = True
        info(f"auto mode: the adapter mode it is: {why}.")

    def _measure(self, fused: FusedModeWriter, here: WriterPort) -> str | None:
        """Time both syncs, then restore the plain base. Returns why fused mode cannot be used, or None."""
        assert self._throughput is not None
        try:
            fused.send_base()
        except UnsupportedAdapterError as error:
            return str(error)
        try:
            seconds = {"fused": _seconds(fused), "adapter": _seconds(here)}
        finally:
            fused.weights.write_plain()
        costs = {name: Costs(seconds[name], self._throughput[name]) for name in seconds}
        self.measured = Measured(costs["adapter"], costs["fused"], self._tokens)
        return None


def _seconds(writer: WriterPort) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        writer.begin_validation()
        writer.validate()
        writer.write()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
