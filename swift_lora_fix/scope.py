"""Which trainers' sync is ours."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from .errors import UnsupportedTrainerError


@dataclass(frozen=True)
class Scope:
    ours: bool
    reason: str


def decide(trainer: Any) -> Scope:
    """Decide from the trainer as ms-swift prepared it; ``reason`` is one line for the log."""
    args = trainer.args
    tuner = getattr(args, "tuner_type", None) or getattr(args, "train_type", None)
    if not args.use_vllm:
        return _aside("rollouts do not use vLLM")
    if tuner != "lora":
        return _aside(f"the tuner is {tuner!r}, not 'lora'")
    if trainer.vllm_mode != "colocate":
        return _aside(f"vllm_mode is {trainer.vllm_mode!r}, not 'colocate'")
    if not trainer.rollout_enable_lora:
        return _aside("vllm_enable_lora is false, so ms-swift merges the adapter into what it sends")
    return Scope(True, "armed: the engine gets the unmerged base once and the adapter once, the trainer is only read.")


def request_class(trainer: Any) -> Any:
    """ms-swift's ``TensorLoRARequest``, from the module that defines the trainer's rollout mixin."""
    return rollout_module(type(trainer)).TensorLoRARequest


def rollout_module(trainer_class: type) -> Any:
    """The module of ms-swift's ``RolloutTrainerMixin`` in the trainer's bases."""
    for cls in trainer_class.__mro__:
        if cls.__name__ == "RolloutTrainerMixin":
            return sys.modules[cls.__module__]
    raise UnsupportedTrainerError(f"{trainer_class.__name__} is not built on ms-swift's RolloutTrainerMixin.")


def _aside(why: str) -> Scope:
    return Scope(False, f"stepping aside: {why}. ms-swift's own weight sync runs unchanged.")
