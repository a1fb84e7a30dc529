"""What is decided from model and accelerator before ``VLLMGeneration`` has made its engine or reached its server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ...engine.vllm import folders
from ...errors import UnsupportedAdapterError
from ...install import releases
from ...policy import adapter as adapters
from ...policy.adapter import DEFAULT_ADAPTER
from .words import WORDS

# While a ``VLLMGeneration`` is made: what its engine needs beyond TRL's own arguments.
engine_arguments: ContextVar[Mapping[str, Any] | None] = ContextVar("engine_arguments", default=None)
server_seen: ContextVar[ServerSeen | None] = ContextVar("server_seen", default=None)


def sharding_of(accelerator: Any) -> str:
    """How accelerate shards the model; "" where each rank has all of it."""
    if accelerator.distributed_type.name == "FSDP":
        return f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    plugin = accelerator.state.deepspeed_plugin
    return "DeepSpeed ZeRO-3" if plugin is not None and plugin.zero_stage == 3 else ""


def tuner_of(model: Any) -> str:
    """``lora`` when a LoRA is trained; otherwise what is, in words."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return "full"
    config = model.peft_config.get(DEFAULT_ADAPTER)
    return config.peft_type.value.lower() if config is not None else f"none named {DEFAULT_ADAPTER}"


def lora_arguments(model: Any, limits: Sequence[int]) -> dict[str, Any]:
    """What vLLM's engine needs to hold ``model``'s adapter in LoRA layers.

    limits: the ranks that vLLM takes (``MaxLoRARanks``). Raises UnsupportedAdapterError when the rank is above them.
    """
    rank = _rank_of(model)
    room = releases.engine_rank(rank, limits)
    if room is None:
        raise UnsupportedAdapterError(
            f"The adapter has rank {rank}, and vLLM's LoRA layers end at {max(limits)}: train a smaller one, or leave "
            "SWIFT_LORA_FIX_MODE unset (fused mode)."
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


def _rank_of(model: Any) -> int:
    config = model.peft_config[DEFAULT_ADAPTER]
    return max([int(config.r), *map(int, (config.rank_pattern or {}).values())])


# values of PEFT's init_lora_weights (LoraConfig) that take the adapter's first values out of the base
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class ServerSeen:
    """What a trainer's vLLM server says while TRL connects to it. rank: the adapter's; 0: it is not to be asked.
    problem: why it does not get the adapter as a folder, "" if it does. is_said: it was logged."""

    rank: int
    problem: str
    is_said: bool = False

    def look(self, client: Any) -> bool:
        """Whether it gets the adapter as a folder."""
        if self.rank:
            self.problem = folders.why_not(client.base_url, client.get_server_info()["lora_config"], self.rank)
        return not self.problem


def server_of(model: Any, accelerator: Any, mode: str) -> ServerSeen:
    """What is known before TRL has connected. mode: SWIFT_LORA_FIX_MODE."""
    if tuner_of(model) != "lora":
        return ServerSeen(0, f"the tuner is {tuner_of(model)!r}, not 'lora'")
    if mode not in ("", "adapter"):
        return ServerSeen(0, f"SWIFT_LORA_FIX_MODE={mode!r} is for colocated engines")
    made = str(model.peft_config[DEFAULT_ADAPTER].init_lora_weights)
    if made.startswith(CHANGE_THE_BASE):
        return ServerSeen(0, f"init_lora_weights={made!r} changes the base, and the server has its model folder's")
    if sharding_of(accelerator):
        return ServerSeen(0, f"the model is sharded by {sharding_of(accelerator)}, and that is not tried with servers")
    try:
        adapters.bind(model, words=WORDS)
    except UnsupportedAdapterError as error:
        return ServerSeen(0, str(error).rstrip("."))
    return ServerSeen(_rank_of(model), "before TRL 1.11 servers are TRL's own, which have no LoRA layers")


@contextlib.contextmanager
def making_engine(arguments: Mapping[str, Any], server: ServerSeen | None = None) -> Iterator[None]:
    """Context in which an ``LLM`` is made with ``arguments`` beside its own, or a client connects to ``server``."""
    tokens = engine_arguments.set(arguments), server_seen.set(server)
    try:
        yield
    finally:
        engine_arguments.reset(tokens[0])
        server_seen.reset(tokens[1])
