"""Inside a run of ``swift-lora-fix verify``: measures each sync from outside, in the same way for stock and for us.

After each sync the engine answers the agreement gate's probe, the trainer scores it, and the trainer's base is summed.
That makes one JSON line a sync in ``$SWIFT_LORA_FIX_VERIFY_FILE``. The floors need an engine with the trainer's own
base, so our run measures them; the stock run gets them in ``$SWIFT_LORA_FIX_VERIFY_FLOORS``.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from typing import Any, Callable

import torch
import wrapt

from ...common.digest import checksum
from ...engine.port import ServingPort
from ...engine.vllm.colocated import AdapterServing
from ...engine.vllm.handle import EngineHandle
from ...errors import PolicyMismatchError
from ...frameworks.swift.port import SwiftTrainer
from ...frameworks.swift.rollouts import SwiftRollout
from ...install import releases
from ...policy import adapter
from ...proof.gate import Gate
from ...proof.probe import SHORT
from ...proof.verdict import Floor
from ...trainer import RolloutPort, TrainerPort

FILE = "SWIFT_LORA_FIX_VERIFY_FILE"
FLOORS = "SWIFT_LORA_FIX_VERIFY_FLOORS"


class Observer:
    """Watches one trainer. serving: tells how its engine serves the adapter; None: in LoRA layers, or stock's way."""

    def __init__(self, trainer: TrainerPort, serving: Callable[[], ServingPort] | None = None) -> None:
        self.trainer, self.serving = trainer, serving
        self.model: Any = trainer.model
        self.base = self._base_checksums()
        self.gate: Gate | None = None
        self.seconds = 0.0
        self.lora_changed = 0
        self.is_new = False

    def sync(self, wrapped: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = self._lora()
        _wait_for_device()
        started = time.perf_counter()
        result = wrapped(*args, **kwargs)
        _wait_for_device()
        self.seconds, self.is_new = time.perf_counter() - started, True
        self.lora_changed = sum(a != b for a, b in zip(before, self._lora()))
        return result

    def look(self, rollout: RolloutPort) -> None:
        """Called at each rollout; measures at the first one after a sync."""
        if not self.is_new or not rollout.has_requests:
            return
        self.is_new = False
        if self.gate is None:
            bound, engine = adapter.bind(self.model), EngineHandle(self.trainer.vllm_engine)
            serving = self.serving() if self.serving else AdapterServing(self.trainer, engine, bound)
            self.gate = Gate(self.trainer, bound, serving, engine.cache_block, bool)
            for kind, floors in json.loads(os.environ.get(FLOORS, "{}")).items():
                self.gate.floors[kind] = [Floor(**{name: tuple(row) for name, row in one.items()}) for one in floors]
        judged = self.gate.judge(self.gate.ask(rollout, bool), rollout)
        if judged.finding is not None and SHORT not in judged.verdicts:
            raise PolicyMismatchError(f"Nothing can be compared: {judged.finding}", judged.finding)
        verdict = judged.verdicts[SHORT]
        now = self._base_checksums()
        record = {
            "step": self.trainer.step,
            "seconds": self.seconds,
            "verdict": asdict(verdict),
            "agrees": verdict.agrees,
            "is_distinguishable": verdict.is_distinguishable,
            "cause": judged.finding.cause if judged.finding else None,
            "floors": {kind: [asdict(floor) for floor in floors] for kind, floors in self.gate.floors.items()},
            "base_tensors": len(now),
            "base_changed": sum(a != b for a, b in zip(self.base, now)),
            "lora_tensors": len(self._lora()),
            "lora_changed": self.lora_changed,
        }
        with open(os.environ[FILE], "a") as file:
            file.write(json.dumps(record) + "\n")

    @torch.no_grad()
    def _base_checksums(self) -> list[int]:
        return [_sum_up(parameter)[0] for _, parameter in adapter.frozen_parameters(self.model)]

    @torch.no_grad()
    def _lora(self) -> list[tuple[int, torch.dtype]]:
        return [_sum_up(parameter) for name, parameter in self.model.named_parameters() if "lora_" in name]


def keep_weights_on_a_cpu() -> None:
    """vLLM's CPU backend packs linear weights after loading, and then no base can be sent to it. This makes linear
    layers keep their weights. On a GPU it is not called."""

    def keep(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias)

    def patch(module: Any) -> None:
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = keep

    wrapt.register_post_import_hook(patch, "vllm.model_executor.layers.utils")


def install() -> None:
    """Wrap ms-swift's sync and rollout once their module is loaded. Our own wrappers, if any, are inside of these."""
    for name in releases.rollout_modules():
        wrapt.register_post_import_hook(_wrap, name)


def _wrap(module: Any) -> None:
    observers: dict[int, Observer] = {}

    def of(trainer: Any) -> Observer:
        return observers.setdefault(id(trainer), observers.get(id(trainer)) or Observer(SwiftTrainer(trainer)))

    def sync(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
        return of(trainer).sync(wrapped, *args, **kwargs)

    def infer(wrapped: Any, trainer: Any, args: Any, kwargs: Any) -> Any:
        of(trainer).look(SwiftRollout(SwiftTrainer(trainer), wrapped, *args, **kwargs))
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, "RolloutTrainerMixin._move_model_to_vllm", sync)
    wrapt.wrap_function_wrapper(module, "RolloutTrainerMixin._engine_infer", infer)


def _sum_up(parameter: torch.nn.Parameter) -> tuple[int, torch.dtype]:
    return int(checksum(adapter.local_part(parameter))), parameter.dtype


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
