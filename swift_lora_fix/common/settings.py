"""What the user can set, read once from the environment."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import SettingsError

_ON = {"", "on", "1", "true", "yes"}
_OFF = {"off", "0", "false", "no"}
_WRITERS = {"direct", "loader"}
_ON_MISMATCH = {"raise", "repair", "warn"}
_MODES = {"", "adapter", "fused", "auto"}
_TRANSPORTS = {"", "nccl", "reload"}
_KERNELS = {"auto", "vllm", "dense"}


@dataclass(frozen=True)
class Settings:
    """Settings of this process.

    enabled: ``SWIFT_LORA_FIX``: ``on``, the default, or ``off``, which keeps every patch out.
    mode: ``SWIFT_LORA_FIX_MODE``: ``adapter`` (base and adapter apart, in vLLM's LoRA layers), ``fused`` (the adapter
        folded into the engine's own weights), ``auto`` (measured at the start of the run). Not set: by
        ``--vllm_enable_lora``, true for ``adapter`` and false for ``fused``.
    writer: ``SWIFT_LORA_FIX_WRITER``: ``direct``, the default: straight into vLLM's LoRA slots; ``loader``: always
        through vLLM's own adapter loader, the slow reference path.
    kernels: ``SWIFT_LORA_FIX_KERNELS``, in adapter mode: ``vllm`` (vLLM's own LoRA kernels), ``dense`` (the adapter's
        A lies below the base weight, so that one matrix product computes both; an error where no layer of the engine
        allows it) or ``auto`` (the default: dense on a GPU where a layer allows it, else vLLM's).
    on_mismatch: ``SWIFT_LORA_FIX_ON_MISMATCH``, when the engine does not serve the trainer's policy: ``raise`` (the
        default), ``repair`` (send base and adapter through the reference path, raise if that does not help) or ``warn``
        (log it and go on).
    gate_every: ``SWIFT_LORA_FIX_GATE_EVERY``: after the first syncs, run the agreement gate at every Nth sync; 50 is
        the default. 0 switches the gate off; the audits stay.
    lost_share: ``SWIFT_LORA_FIX_LOST_SHARE``: in fused mode, the share of the adapter's update that rounding
        may lose before there is a warning, and before ``auto`` takes the other mode; 0.5 is the default.
    transport: ``SWIFT_LORA_FIX_TRANSPORT``, in server mode: ``nccl`` (the adapter goes over ms-swift's own NCCL
        connection), ``reload`` (by shared memory of one host, or in the request body; NCCL is not opened; set it for
        the servers too). Not set: NCCL if it works, otherwise as ``reload``.
    server_deadline: ``SWIFT_LORA_FIX_SERVER_DEADLINE``: seconds in which a rollout server must have answered a call,
        retries included; 300 is the default.
    rollout_deadline: ``SWIFT_LORA_FIX_ROLLOUT_DEADLINE``: seconds that one rollout call may take; 3600 is the default.
        A server that makes rollouts answers nothing else, so a hang cannot be noticed earlier.
    api_key: ``SWIFT_LORA_FIX_API_KEY``: the servers' ``--api_key``.
    max_mib: ``SWIFT_LORA_FIX_MAX_MIB``: the largest adapter, in MiB, that a rollout server takes; 8192 is the default.
    """

    enabled: bool = True
    mode: str = ""
    writer: str = "direct"
    kernels: str = "auto"
    on_mismatch: str = "raise"
    gate_every: int = 50
    lost_share: float = 0.5
    transport: str = ""
    server_deadline: int = 300
    rollout_deadline: int = 3600
    api_key: str = field(default="", repr=False)
    max_mib: int = 8192

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings. Raises SettingsError naming the variable, its value and what it may be."""
        environment = os.environ if environment is None else environment
        value = environment.get("SWIFT_LORA_FIX", "").strip().lower()
        if value not in _ON | _OFF:
            raise SettingsError(f"SWIFT_LORA_FIX={value!r} is not understood: set it to 'on' or 'off', or unset it.")
        return cls(
            enabled=value not in _OFF,
            mode=_choice(environment, "SWIFT_LORA_FIX_MODE", cls.mode, _MODES),
            writer=_choice(environment, "SWIFT_LORA_FIX_WRITER", cls.writer, _WRITERS),
            kernels=_choice(environment, "SWIFT_LORA_FIX_KERNELS", cls.kernels, _KERNELS),
            on_mismatch=_choice(environment, "SWIFT_LORA_FIX_ON_MISMATCH", cls.on_mismatch, _ON_MISMATCH),
            gate_every=_count(environment, "SWIFT_LORA_FIX_GATE_EVERY", cls.gate_every),
            lost_share=_share(environment, "SWIFT_LORA_FIX_LOST_SHARE", cls.lost_share),
            transport=_choice(environment, "SWIFT_LORA_FIX_TRANSPORT", cls.transport, _TRANSPORTS),
            server_deadline=_count(environment, "SWIFT_LORA_FIX_SERVER_DEADLINE", cls.server_deadline, least=1),
            rollout_deadline=_count(environment, "SWIFT_LORA_FIX_ROLLOUT_DEADLINE", cls.rollout_deadline, least=1),
            api_key=environment.get("SWIFT_LORA_FIX_API_KEY", "").strip(),
            max_mib=_count(environment, "SWIFT_LORA_FIX_MAX_MIB", cls.max_mib, least=1),
        )


def _choice(environment: Mapping[str, str], name: str, default: str, allowed: set[str]) -> str:
    value = environment.get(name, "").strip().lower() or default
    if value not in allowed:
        words = ", ".join(map(repr, sorted(allowed - {""})))
        raise SettingsError(f"{name}={value!r} is not understood: set it to one of {words}, or unset it.")
    return value


def _count(environment: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    value = environment.get(name, "").strip() or str(default)
    if not value.isdecimal() or int(value) < least:
        words = f"set it to a whole number from {least} on, or unset it"
        raise SettingsError(f"{name}={value!r} is not understood: {words}.")
    return int(value)


def _share(environment: Mapping[str, str], name: str, default: float) -> float:
    value = environment.get(name, "").strip() or str(default)
    try:
        share = float(value)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise SettingsError(f"{name}={value!r} is not understood: set it to a number from 0 to 1, or unset it.")
    return share
