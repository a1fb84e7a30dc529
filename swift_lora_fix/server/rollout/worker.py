"""In each ``llm_worker``: passes orders on to vLLM's workers, and tags rollouts with what they come from.

ms-swift's worker runs a command as a method of its engine. If that raises, it logs the error and answers None. So there
is a single method (`wire.METHOD`), which returns errors as its answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Callable

from vllm.lora.request import LoRARequest

from ...common.settings import Settings
from ...engine.vllm.handle import ADAPTER_ID, ADAPTER_NAME, ADAPTER_PATH
from ...errors import CacheResetError, EngineStateError
from ..wire import EXTENSION, METHOD, PROBE, RPC, SWIFT_EXTENSION
from .receiver import told

_SWITCH = "swift_lora_fix_switch"

# The request that ms-swift's server sends to an engine for which a batch has none (``SwiftRolloutDeploy.infer``): the
# gate's four prompts leave the third of three engines without one.
_PLACEHOLDER = [{"role": "user", "content": "<placeholder>"}]

_building: ContextVar[bool] = ContextVar("building", default=False)


@dataclass(frozen=True)
class Served:
    """What rollouts are generated from: a policy, or the plain base; of which server process, on which base."""

    boot: str
    epoch: int
    plain: bool
    policy: Mapping[str, Any] = field(default_factory=dict)

    @property
    def request(self) -> Any:
        """With which vLLM's workers use what they hold (receiver.py)."""
        return None if self.plain else LoRARequest(ADAPTER_NAME, ADAPTER_ID, ADAPTER_PATH)

    def infos(self) -> dict[str, Any]:
        by = {"server_boot": self.boot, "server_epoch": self.epoch}
        if self.plain:
            return {"policy_plain": True, **by}
        return {**{f"policy_{name}": value for name, value in self.policy.items()}, **by}


class Switch:
    """What one engine serves. ``engine`` is ms-swift's ``GRPOVllmEngine``."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.is_ours = Settings.from_environment().transport == "reload"  # else the trainer may lack this package
        self._served: Served | None = None

    def served(self) -> Served:
        """Raises EngineStateError when there is nothing to generate rollouts from."""
        if self._served is None:
            raise EngineStateError("No policy was committed to this server, so no rollout can be made of it.")
        return self._served

    async def command(
        self,
        serves: dict[str, Any] | None,
        ours: bool,
        switches: bool = False,
        rpc: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Carry out one order. The answer has its error, if any.

        serves: what rollouts come from afterwards (`Served`), None for nothing. rpc: a command of the `Receiver`, and
        its arguments. switches: something else is served than before, so requests must have ended and caches go; after
        an error nothing is served.
        """
        try:
            self.is_ours = ours
            if switches:
                self._set(None)
                self._check_idle()
            if rpc is not None:
                await _value(self.engine.engine.collective_rpc(RPC, kwargs=rpc))
            if switches:
                await self._forget_caches()
            self._set(Served(**serves) if serves is not None else None)
        except Exception as error:
            return told(error)
        return {}

    def command_now(self, **order: Any) -> dict[str, Any]:
        """The same for the synchronous engine, where no command ever awaits anything."""
        try:
            self.command(**order).__await__().send(None)
        except StopIteration as done:
            answer: dict[str, Any] = done.value
            return answer
        raise AssertionError("a command of the synchronous engine waits for something")

    def _set(self, served: Served | None) -> None:
        """ms-swift attaches the adapter that it finds in the engine, unless ``enable_lora`` is false."""
        self._served = served
        self.engine.enable_lora = served is None or not served.plain

    async def _forget_caches(self) -> None:
        for name in ("reset_prefix_cache", "reset_encoder_cache"):
            reset = getattr(self.engine.engine, name, None)
            if reset is not None and await _value(reset()) is False:
                raise CacheResetError(
                    f"vLLM's {name}() reported that it was not done, so rollouts could reuse values computed with the "
                    "previous policy. Usually a request is still running or a KV connector holds blocks."
                )

    def _check_idle(self) -> None:
        # the engine is not asked: with data parallelism that is a collective call
        if self.engine.engine.output_processor.has_unfinished_requests():
            raise EngineStateError(
                "The engine still has unfinished requests: they would be finished by another policy than they began "
                "with. Wait for them."
            )


async def _value(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


# ---- the hooks -----------------------------------------------------------------------------------------------------


def build_engine(build: Callable[..., Any], arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps ``SwiftRolloutDeploy.get_infer_engine``: the engine loads the model's files and takes policies."""
    token = _building.set(True)
    try:
        engine = build(arguments, *args, **kwargs)
    finally:
        _building.reset(token)
    switch = Switch(engine)
    setattr(engine, _SWITCH, switch)
    setattr(engine, METHOD, switch.command if arguments.vllm_use_async_engine else switch.command_now)
    return engine


def engine_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``GRPOVllmEngine`` without random weights, which would need a trainer that sends the base, and with
    our extension of vLLM's workers in place of ms-swift's, which it includes."""
    if not _building.get():
        return kwargs
    inner = dict(kwargs.get("engine_kwargs") or {})
    if str(inner.get("worker_extension_cls", "")).endswith(f".{SWIFT_EXTENSION}"):
        inner["worker_extension_cls"] = EXTENSION
    found = inner.pop("load_format", None) or kwargs.get("load_format") or "auto"
    return {**kwargs, "engine_kwargs": inner, "load_format": "auto" if found == "dummy" else found}


def switch_of(engine: Any) -> Switch | None:
    """The switch of an engine; None for a colocated engine, or while the trainer is one without this package."""
    switch: Switch | None = vars(engine).get(_SWITCH)
    return switch if switch is not None and switch.is_ours else None


def tag_scheduler(engine: Any) -> None:
    """Tag the rollouts of a multi-turn scheduler (a result of ``get_rollout_engine_type``), too. The gate's requests
    and placeholders bypass the scheduler: they are not its tasks, and would use up its environment's turns."""
    inner = getattr(engine, "infer_engine", None)
    if inner is None or _SWITCH not in vars(inner) or _SWITCH in vars(engine):
        return
    wrapped = engine.async_infer

    async def async_infer(*args: Any, **kwargs: Any) -> Any:
        switch = switch_of(inner)
        if switch is None:
            return await wrapped(*args, **kwargs)
        if _is_probe(*args, **kwargs):
            return await inner.async_infer(*args, **kwargs)
        served = switch.served()
        return tag(switch, served, await wrapped(*args, **kwargs))

    engine.async_infer = async_infer


def _is_probe(infer_requests: Sequence[Any], *args: Any, **kwargs: Any) -> bool:
    fields = [each if isinstance(each, Mapping) else vars(each) for each in infer_requests]
    return bool(fields) and all(
        str(each.get("uuid")).startswith(PROBE) or each.get("messages") == _PLACEHOLDER for each in fields
    )


def tag(switch: Switch, served: Served, outputs: Any) -> Any:
    """Write the policy into ``rollout_infos`` of ms-swift's ``RolloutOutput``."""
    if switch.served() != served:
        raise EngineStateError("The policy was switched while rollouts were made of it; they are not handed out.")
    for output in outputs if isinstance(outputs, list) else ():
        infos = getattr(output, "rollout_infos", None)
        if isinstance(infos, dict):
            infos.update(served.infos())
    return outputs
