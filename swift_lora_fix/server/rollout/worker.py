"""In each ``llm_worker``: reads and checks an adapter, keeps it, then serves it; and tags rollouts with their policy.

Legend for shapes: r rank, in/out the wrapped layer's features. A is (r, in), B is (out, r).

ms-swift's worker runs a command as a method of its engine. If that raises, it logs the error and answers None. So there
is a single method (`wire.METHOD`), which returns errors as its answer.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Awaitable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Callable

import torch
from vllm.lora.request import LoRARequest

from ...common.log import info
from ...common.settings import Settings
from ...engine.vllm.handle import ADAPTER_ID, ADAPTER_NAME, ADAPTER_PATH
from ...errors import CacheResetError, EngineStateError, ProtocolError, StagingError
from ...memory import LoRATensorRequest, update
from ...memory.segment import DTYPES
from ...memory.sending import ledger_of
from ...policy.model_files import base_shapes
from ..shared import opened
from ..wire import (
    EXTENSION,
    GONE,
    METHOD,
    NO_NCCL,
    PROBE,
    RPC,
    SWIFT_EXTENSION,
    Address,
    Layout,
    Policy,
    http_status,
    limit_of,
)
from .checks import check_names, check_shapes, scales_nothing
from .receiver import Received, told

_STAGER = "swift_lora_fix_stager"
_UPDATES = {"update_named_param", "update_flattened_params", "process_weights_after_loading"}  # ms-swift's, of the base

# The request that ms-swift's server sends to an engine for which a batch has none (``SwiftRolloutDeploy.infer``): the
# gate's four prompts leave the third of three engines without one.
_PLACEHOLDER = [{"role": "user", "content": "<placeholder>"}]

_building: ContextVar[bool] = ContextVar("building", default=False)


@dataclass(frozen=True)
class Held:
    """A policy, and the request that makes vLLM serve it: one that has its tensors, or the id under which vLLM's
    workers hold them (`Receiver`). is_loaded: by vLLM's own loader."""

    policy: Policy
    request: Any
    is_loaded: bool = False


@dataclass(frozen=True)
class Served:
    """What rollouts are generated from: a policy, or the plain base; of which server process, on which base."""

    held: Held | None
    speaks: tuple[str, int]

    @property
    def request(self) -> Any:
        return self.held.request if self.held is not None else None

    def infos(self) -> dict[str, Any]:
        by = {"server_boot": self.speaks[0], "server_epoch": self.speaks[1]}
        if self.held is None:
            return {"policy_plain": True, **by}
        return {**{f"policy_{name}": value for name, value in self.held.policy.as_dict().items()}, **by}


class Stager:
    """Takes policies for one engine. ``engine`` is ms-swift's ``GRPOVllmEngine``."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.limit = limit_of()
        self.base = base_shapes(engine.model_dir)
        self.layout: Layout | None = None  # of what was announced last
        self.by_loader = ""  # key of a layout that vLLM's workers could not take: it goes through vLLM's loader
        self.announced: Policy | None = None
        self.pending: Held | None = None
        self.held: Held | None = None
        self.speaks = ("", 0)
        self.plain = False
        self.is_ours = Settings.from_environment().transport == "reload"  # else the trainer may lack this package
        self.failures: list[str] = []  # of ms-swift's own updates, which only logs them

    def served(self) -> Served:
        """Raises EngineStateError when there is nothing to generate rollouts from."""
        if self.held is None and not self.plain:
            raise EngineStateError("No policy was committed to this server, so no rollout can be made of it.")
        return Served(None if self.plain else self.held, self.speaks)

    # ---- the commands -----------------------------------------------------------------------------------------------

    async def command(self, name: str, speaks: tuple[str, int], **arguments: Any) -> dict[str, Any]:
        """Run a command. speaks: boot and epoch of the server. The answer has its error, if any."""
        commands: dict[str, Callable[..., Awaitable[dict[str, Any] | None]]] = {
            "stage": self.stage,
            "receive": self.receive,
            "commit": self.commit,
            "drop": self.drop,
            "serve": self.serve,
            "pushed": self.pushed,
            "forget_failures": self.forget_failures,
            "release": self.release,
        }
        try:
            self.speaks = speaks
            if "policy" in arguments:
                arguments["policy"] = Policy.model_validate(arguments["policy"])
            return await commands[name](**arguments) or {}
        except Exception as error:
            return {"error": type(error).__name__, "message": str(error), "status": http_status(error)}

    def command_now(self, name: str, **arguments: Any) -> dict[str, Any]:
        """The same for the synchronous engine, where no command ever awaits anything."""
        try:
            self.command(name, **arguments).__await__().send(None)
        except StopIteration as done:
            answer: dict[str, Any] = done.value
            return answer
        raise AssertionError(f"{name} waits for something")

    async def stage(self, policy: Policy, layout: Mapping[str, Any] | str, nccl: bool) -> dict[str, Any]:
        """Check the names and shapes of an adapter, and have vLLM's workers make room for it. The policy that is served
        stays. Answers the ``size`` of what must come, in bytes."""
        self.is_ours, self.announced, self.pending = True, None, None
        if not isinstance(layout, str):
            self.layout = None
            made = Layout.model_validate(layout)
            self._check(made)
            self.layout = made
        elif self.layout is None or layout != self.layout.key:
            raise StagingError("This layout is not the last one that this server was told: send it whole.", GONE)
        assert self.layout is not None
        why = self._why_by_loader()
        if why is None:
            why = await self._prepare(self.layout, nccl)
        if why is not None and nccl:
            raise StagingError(f"This server takes no such adapter over NCCL: {why}", NO_NCCL)
        self.announced = policy
        return {"size": Received.size_of(self.layout)}

    async def receive(self, policy: Policy, memory: Mapping[str, Any] | None) -> None:
        """Have the announced bytes received, over NCCL or from ``memory``, and the policy's digest proved of them."""
        announced, self.announced = self.announced, None
        if announced != policy:
            raise EngineStateError(f"This worker awaits {announced}, not {policy}.")
        assert self.layout is not None
        if self._why_by_loader() is None:
            await self._rpc("receive", digest=policy.digest, memory=memory)
            self.pending = Held(policy, LoRARequest(ADAPTER_NAME, ADAPTER_ID, ADAPTER_PATH))
        elif memory is None:
            raise StagingError("This server has vLLM's own loader take such adapters, not over NCCL.", NO_NCCL)
        else:
            received = Received(self.layout, torch.device("cpu"))
            with opened(Address.model_validate(memory)) as content:
                received.fill(content)
            received.prove(policy.digest)
            request = LoRATensorRequest(ADAPTER_NAME, ADAPTER_ID, self.layout.config, received.tensors())
            self.pending = Held(policy, request, True)

    async def commit(self, policy: Policy, by_reference: bool) -> None:
        """Have the engine serve what was received. After an error it serves nothing. by_reference: through vLLM's own
        loader, even with a write plan."""
        pending, self.pending = self.pending, None
        if pending is None or pending.policy != policy:
            raise EngineStateError(f"This worker has received {pending and str(pending.policy)}, not {policy}.")
        self._check_idle()
        self.held = None
        await self._load(pending, by_reference)
        self.held = pending
        self._set_plain(False)

    async def drop(self) -> None:
        """Serve nothing until the next commit."""
        self.held = self.pending = self.announced = None
        self._set_plain(False)

    async def release(self) -> None:
        """A trainer without this package changes the adapter: forget what is known of it."""
        await self.drop()
        self.is_ours = Settings.from_environment().transport == "reload"

    async def pushed(self) -> None:
        """Raise errors of ms-swift's own updates since ``forget_failures``."""
        if self.failures:
            first = self.failures[0]
            raise EngineStateError(f"{len(self.failures)} updates over NCCL failed in vLLM, the first: {first}")

    async def forget_failures(self) -> None:
        self.failures = []

    async def serve(self, plain: bool) -> None:
        """Serve with the adapter, or without it (``plain``), and drop the caches."""
        self._check_idle()
        self.is_ours = True
        self._set_plain(plain)
        await self._forget_caches()

    # ---- how --------------------------------------------------------------------------------------------------------

    def _why_by_loader(self) -> str | None:
        """Why adapters of the layout go through vLLM's own loader, in words; None if its workers have a `Receiver`, and
        keep what that gets."""
        parallel = self.engine.engine.vllm_config.parallel_config
        if parallel.worker_extension_cls != EXTENSION:
            return f"vLLM's worker_extension_cls is {parallel.worker_extension_cls!r}."
        if parallel.data_parallel_size > 1:
            return "with data parallelism in one asynchronous engine vLLM drops adapters while a rank is idle."
        assert self.layout is not None
        return "vLLM's workers could not take it before." if self.by_loader == self.layout.key else None

    async def _prepare(self, layout: Layout, nccl: bool) -> str | None:
        """Have vLLM's workers make room. Returns why they could not, in words; then its loader takes the adapter."""
        try:
            await self._rpc("prepare", layout=layout.as_dict(), nccl=nccl)
        except EngineStateError as error:
            self.by_loader = layout.key
            info(f"adapters like this go through vLLM's own loader, its workers cannot take them themselves: {error}")
            return str(error)
        return None

    def _check(self, layout: Layout) -> None:
        dtype, lora = getattr(torch, layout.dtype, None), self.engine.engine.vllm_config.lora_config
        if dtype not in DTYPES:
            raise ProtocolError(f"The layout's dtype is {layout.dtype!r}: one of {', '.join(map(str, DTYPES))}.")
        if dtype != lora.lora_dtype:
            raise StagingError(
                f"An adapter comes as the engine holds it, in {lora.lora_dtype}, not in {layout.dtype} (--torch_dtype, "
                "or lora_dtype of --vllm_engine_kwargs)."
            )
        if not scales_nothing(layout.config):
            raise ProtocolError(
                f"The layout's config has r={layout.config.get('r')!r} and lora_alpha="
                f"{layout.config.get('lora_alpha')!r}: the scaling is in B, and the config says 1 (r = lora_alpha, no "
                "patterns, no rsLoRA)."
            )
        if any(size < 1 for _, shape in layout.entries for size in shape):
            raise ProtocolError("The layout has a shape with a size below 1.")
        tensors = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in layout.entries}
        check_names(tensors, layout.config, lora.max_lora_rank)
        check_shapes(tensors, self.base)
        # vLLM checks the config itself
        ledger_of(self.engine.engine).check(LoRATensorRequest(ADAPTER_NAME, ADAPTER_ID, layout.config, tensors))
        size = Received.size_of(layout)
        if size > self.limit:
            raise StagingError(
                f"The adapter has {size} bytes, this server takes {self.limit}. Raise SWIFT_LORA_FIX_MAX_MIB (now "
                f"{self.limit >> 20}) where it is started, if such an adapter is meant.",
                413,
            )

    async def _rpc(self, command: str, **arguments: Any) -> None:
        """Run a `Receiver` command in vLLM's workers. Raises the error of a worker that failed."""
        try:
            await _value(self.engine.engine.collective_rpc(RPC, kwargs={"command": command, **arguments}))
        except Exception as error:
            raise told(error) from error

    async def _load(self, held: Held, by_reference: bool) -> None:
        if not held.is_loaded:
            try:
                await self._rpc("serve", digest=held.policy.digest, by_reference=by_reference)
            except Exception:
                self.by_loader = self.layout.key if self.layout is not None else ""  # for the next attempt
                raise
        elif not await _value(update(self.engine.engine, held.request)):
            raise EngineStateError(f"vLLM did not load the adapter of {held.policy}, and gave no reason.")
        elif self.engine.engine.vllm_config.parallel_config.worker_extension_cls == EXTENSION:
            await self._rpc("check_served")
        await self._forget_caches()

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

    def _set_plain(self, plain: bool) -> None:
        """ms-swift attaches the adapter that it finds in the engine, unless ``enable_lora`` is false."""
        self.plain, self.engine.enable_lora = plain, not plain


async def _value(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


# ---- the hooks -----------------------------------------------------------------------------------------------------


def build_engine(build: Callable[..., Any], arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps ``SwiftRolloutDeploy.get_infer_engine``: the engine loads the model's files and takes policies."""
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "swift_lora_fix" not in plugins.split(","):
        os.environ["VLLM_PLUGINS"] = f"{plugins},swift_lora_fix"  # otherwise vLLM's own processes could take no adapter
        info(f"VLLM_PLUGINS={os.environ['VLLM_PLUGINS']}: vLLM loads adapters from memory.")
    token = _building.set(True)
    try:
        engine = build(arguments, *args, **kwargs)
    finally:
        _building.reset(token)
    stager = Stager(engine)
    setattr(engine, _STAGER, stager)
    setattr(engine, METHOD, stager.command if arguments.vllm_use_async_engine else stager.command_now)
    _note_failures(stager, engine.engine)
    return engine


def _note_failures(stager: Stager, engine: Any) -> None:
    """Record errors of ms-swift's updates over NCCL: they go through ``collective_rpc``, and are only logged."""
    call = engine.collective_rpc

    def note(error: Exception) -> None:
        stager.failures = [*stager.failures[-9:], f"{type(error).__name__}: {error}"]

    async def awaited(result: Any) -> Any:
        try:
            return await result
        except Exception as error:
            note(error)
            raise

    def collective_rpc(method: Any, *args: Any, **kwargs: Any) -> Any:
        if method not in _UPDATES:
            return call(method, *args, **kwargs)
        try:
            result = call(method, *args, **kwargs)
        except Exception as error:
            note(error)
            raise
        return awaited(result) if inspect.isawaitable(result) else result

    engine.collective_rpc = collective_rpc


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


def stager_of(engine: Any) -> Stager | None:
    """The stager of an engine; None for a colocated engine, or while the trainer is one without this package."""
    stager: Stager | None = vars(engine).get(_STAGER)
    return stager if stager is not None and stager.is_ours else None


def tag_scheduler(engine: Any) -> None:
    """Tag the rollouts of a multi-turn scheduler (a result of ``get_rollout_engine_type``), too. The gate's requests
    and
    placeholders bypass the scheduler: they are not its tasks, and would use up its environment's turns."""
    inner = getattr(engine, "infer_engine", None)
    if inner is None or _STAGER not in vars(inner) or _STAGER in vars(engine):
        return
    wrapped = engine.async_infer

    async def async_infer(*args: Any, **kwargs: Any) -> Any:
        stager = stager_of(inner)
        if stager is None:
            return await wrapped(*args, **kwargs)
        if _is_probe(*args, **kwargs):
            return await inner.async_infer(*args, **kwargs)
        served = stager.served()
        return tag(stager, served, await wrapped(*args, **kwargs))

    engine.async_infer = async_infer


def _is_probe(infer_requests: Sequence[Any], *args: Any, **kwargs: Any) -> bool:
    fields = [each if isinstance(each, Mapping) else vars(each) for each in infer_requests]
    return bool(fields) and all(
        str(each.get("uuid")).startswith(PROBE) or each.get("messages") == _PLACEHOLDER for each in fields
    )


def tag(stager: Stager, served: Served, outputs: Any) -> Any:
    """Write the policy into ``rollout_infos`` of ms-swift's ``RolloutOutput``."""
    if stager.served() != served:
        raise EngineStateError("The policy was switched while rollouts were made of it; they are not handed out.")
    for output in outputs if isinstance(outputs, list) else ():
        infos = getattr(output, "rollout_infos", None)
        if isinstance(infos, dict):
            infos.update(served.infos())
    return outputs
