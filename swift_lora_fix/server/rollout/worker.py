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

import safetensors
import torch
from vllm.lora.request import LoRARequest

from ...common.log import info
from ...common.settings import Settings
from ...engine.vllm.handle import ADAPTER_ID, ADAPTER_NAME, ADAPTER_PATH
from ...errors import CacheResetError, EngineStateError, ProtocolError, StagingError
from ...memory import LoRATensorRequest, update
from ...memory.segment import DTYPES
from ...memory.sending import ledger_of
from ...memory.update import scales_of
from ..wire import (
    CONFIG,
    EXTENSION,
    GONE,
    METHOD,
    NO_NCCL,
    ORDER,
    PROBE,
    RPC,
    SWIFT_EXTENSION,
    WEIGHTS,
    Layout,
    Policy,
    http_status,
    limit_of,
    parse_object,
)
from .checks import cast_checked, check_names, check_shapes, order_of, scales_nothing
from .files import Source, base_shapes, too_large
from .receiver import told

_STAGER = "swift_lora_fix_stager"
_UPDATES = {"update_named_param", "update_flattened_params", "process_weights_after_loading"}  # ms-swift's, of the base

# The request that ms-swift's server sends to an engine for which a batch has none (``SwiftRolloutDeploy.infer``): the
# gate's four prompts leave the third of three engines without one.
_PLACEHOLDER = [{"role": "user", "content": "<placeholder>"}]

_building: ContextVar[bool] = ContextVar("building", default=False)


@dataclass(frozen=True)
class Held:
    """A policy, and the request that makes vLLM serve it. digest: under which vLLM's workers keep its tensors
    (`Receiver`); None when the request has the tensors."""

    policy: Policy
    request: Any
    digest: str | None = None


@dataclass(frozen=True)
class Served:
    """What rollouts are generated from: a policy, or the plain base."""

    held: Held | None

    @property
    def request(self) -> Any:
        return self.held.request if self.held is not None else None

    def infos(self) -> dict[str, Any]:
        if self.held is None:
            return {"policy_plain": True}
        return {f"policy_{name}": value for name, value in self.held.policy.as_dict().items()}


class Stager:
    """Takes policies for one engine. ``engine`` is ms-swift's ``GRPOVllmEngine``."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.limit = limit_of()
        self.base = base_shapes(engine.model_dir)
        self.pending: Held | None = None
        self.held: Held | None = None
        self.arriving: Held | None = None  # announced: the workers wait for its bytes
        self.before: Held | None = None  # served before, for ``restore``
        self.plain = False
        self.is_ours = Settings.from_environment().transport == "reload"  # else the trainer may lack this package
        self.layout = ""  # key of the layout that vLLM's workers have buffers for
        self.no_room = ""  # key of the last one that they could not take: it goes through vLLM's loader
        self.failures: list[str] = []  # of ms-swift's own updates, which only logs them

    def served(self) -> Served:
        """Raises EngineStateError when there is nothing to generate rollouts from."""
        if self.held is None and not self.plain:
            raise EngineStateError("No policy was committed to this server, so no rollout can be made of it.")
        return Served(None if self.plain else self.held)

    # ---- the commands -----------------------------------------------------------------------------------------------

    async def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Run a command. The answer has its error, if any, and the policy that is served afterwards."""
        commands: dict[str, Callable[..., Awaitable[None]]] = {
            "stage": self.stage,
            "prepare": self.prepare,
            "receive": self.receive,
            "find": self.find,
            "commit": self.commit,
            "restore": self.restore,
            "drop": self.drop,
            "abort": self.abort,
            "serve": self.serve,
            "pushed": self.pushed,
            "release": self.release,
        }
        answer: dict[str, Any] = {}
        try:
            await commands[name](**arguments)
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error), "status": http_status(error)}
        return {**answer, "serves": self.held and self.held.policy.as_dict()}

    def command_now(self, name: str, **arguments: Any) -> dict[str, Any]:
        """The same for the synchronous engine, where no command ever awaits anything."""
        try:
            self.command(name, **arguments).__await__().send(None)
        except StopIteration as done:
            answer: dict[str, Any] = done.value
            return answer
        raise AssertionError(f"{name} waits for something")

    async def stage(self, policy: Mapping[str, Any], source: Source) -> None:
        """Check an adapter, then have vLLM's workers read it, or keep it for vLLM's loader. It is not served yet."""
        self._begin()
        asked, request, order = Policy.from_dict(policy), *self._mapped(source)
        names = order or sorted(request.content.tensors)
        entries = tuple((name, tuple(request.content.tensors[name].shape)) for name in names)
        dtype = self.engine.engine.vllm_config.lora_config.lora_dtype
        layout = Layout(str(dtype).removeprefix("torch."), entries, request.content.config)
        is_proved = order is not None and all(tensor.dtype == dtype for tensor in request.content.tensors.values())
        digest = asked.digest if is_proved else source.digest
        if await self._has_room(layout, request.content) and await self._reads(source, digest, is_proved):
            self.pending = Held(asked, _request_by_id(), digest)
        else:
            request.content.tensors = cast_checked(request.content.tensors, dtype)
            self.pending = Held(asked, request)

    async def prepare(self, policy: Mapping[str, Any], layout: Mapping[str, Any] | str) -> None:
        """Check the names and shapes of an adapter, and have vLLM's workers make room for it."""
        self._begin()
        if layout != self.layout:
            if isinstance(layout, str):
                raise StagingError("This layout is not the last one that this server was told: send it whole.", GONE)
            await self._prepare(Layout.from_dict(layout))
        asked = Policy.from_dict(policy)
        self.arriving = Held(asked, _request_by_id(), asked.digest)

    async def receive(self, policy: Mapping[str, Any]) -> None:
        """Have the announced bytes received over NCCL, and checked."""
        arriving, self.arriving = self.arriving, None
        if arriving is None or arriving.policy.as_dict() != policy:
            raise EngineStateError(f"This worker awaits {arriving and str(arriving.policy)}, not {policy}.")
        await self._rpc("receive", digest=arriving.digest)
        self.pending = arriving

    async def find(self, policy: Mapping[str, Any]) -> None:
        """Stage again an adapter that was sent under another version."""
        self._begin()
        asked = Policy.from_dict(policy)
        self._check_receives()
        await self._rpc("find", digest=asked.digest)
        self.pending = Held(asked, _request_by_id(), asked.digest)

    async def commit(self, policy: Mapping[str, Any], by_reference: bool = False) -> None:
        """Have the engine serve what was staged. After an error it serves what it had. by_reference: through vLLM's own
        loader, even with a write plan."""
        pending, before = self.pending, self.held
        if pending is None or pending.policy.as_dict() != policy:
            raise EngineStateError(f"This worker staged {pending and str(pending.policy)}, not {policy}.")
        self._check_idle()
        try:
            await self._load(pending, by_reference)
        except Exception as error:
            await self._put_back(before, error)
            raise
        self.pending, self.held, self.before = None, pending, before
        self._set_plain(False)

    async def restore(self, policy: Mapping[str, Any]) -> None:
        """Another worker could not commit ``policy``: go back to what was served before."""
        if self.held is not None and self.held.policy.as_dict() == policy:
            await self._put_back(self.before)

    async def drop(self) -> None:
        """Serve nothing, because workers would serve different policies."""
        self.held = self.before = self.pending = self.arriving = None

    async def release(self) -> None:
        """A trainer without this package changes the adapter: forget what is known of it."""
        await self.drop()
        self._set_plain(False)
        self.is_ours = Settings.from_environment().transport == "reload"

    async def pushed(self) -> None:
        """Raise errors of ms-swift's own updates since the last call."""
        failures, self.failures = self.failures, []
        if failures:
            raise EngineStateError(f"{len(failures)} updates over NCCL failed in vLLM, the first: {failures[0]}")

    async def abort(self, policy: Mapping[str, Any]) -> None:
        if self.pending is not None and self.pending.policy.as_dict() == policy:
            self.pending = None
        if self.arriving is not None and self.arriving.policy.as_dict() == policy:
            self.arriving = None

    async def serve(self, plain: bool) -> None:
        """Serve with the adapter, or without it (``plain``), and drop the caches."""
        self._check_idle()
        self.is_ours = True
        self._set_plain(plain)
        await self._forget_caches()

    # ---- how --------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Drop what was staged before."""
        self.is_ours, self.pending, self.arriving, self.before = True, None, None, None

    def _why_none_receives(self) -> str | None:
        """Why vLLM's workers have no `Receiver`, or would not keep what it gets, in words; None if they do."""
        parallel = self.engine.engine.vllm_config.parallel_config
        if parallel.worker_extension_cls != EXTENSION:
            return f"vLLM's worker_extension_cls is {parallel.worker_extension_cls!r}"
        if parallel.data_parallel_size > 1:
            return "with data parallelism in one asynchronous engine vLLM drops adapters while a rank is idle"
        return None

    def _check_receives(self) -> None:
        """Raise StagingError (`NO_NCCL`) when adapters cannot come over NCCL."""
        why = self._why_none_receives()
        if why is not None:
            raise StagingError(f"This server takes no adapters over NCCL: {why}.", NO_NCCL)

    async def _prepare(self, layout: Layout) -> None:
        self._check_receives()
        self._check_announced(layout)
        before, self.layout = self.layout, ""
        try:
            await self._rpc("prepare", layout=layout.as_dict())
        except StagingError as refused:  # refused before the workers changed anything
            self.layout = before if refused.status == NO_NCCL else ""
            raise
        self.layout = layout.key

    async def _has_room(self, layout: Layout, content: Any) -> bool:
        """Whether vLLM's workers can read a file of this layout themselves; makes room if needed. Files never replace
        the
        buffers of the policy that is served: there would be no way back. (Over NCCL there is no other choice.)"""
        if layout.key in (self.layout, self.no_room):
            return layout.key != self.no_room
        serves = self.held is not None and self.held.digest is not None
        if self._why_none_receives() is not None or serves:
            return False
        self.layout = ""
        scales = {name: scale for name, scale in scales_of(content) if scale != 1.0}
        if await self._tries(layout.key, "make_room", layout=layout.as_dict(), scales=scales):
            self.layout = layout.key
        return bool(self.layout)

    async def _reads(self, source: Source, digest: str, is_proved: bool) -> bool:
        return await self._tries(self.layout, "read", path=source.weights, digest=digest, is_proved=is_proved)

    async def _tries(self, key: str, command: str, **arguments: Any) -> bool:
        """Run the command in vLLM's workers; whether they could. If not, later files of this layout go through vLLM's
        loader. Errors in the file itself are raised."""
        try:
            await self._rpc(command, **arguments)
        except EngineStateError as error:
            self.no_room = key
            info(f"adapters like this go through vLLM's own loader, its workers cannot take them themselves: {error}")
            return False
        return True

    def _check_announced(self, layout: Layout) -> None:
        dtype = getattr(torch, layout.dtype, None)
        if dtype not in DTYPES:
            raise ProtocolError(f"The layout's dtype is {layout.dtype!r}: one of {', '.join(map(str, DTYPES))}.")
        if not scales_nothing(layout.config):
            raise ProtocolError(
                f"The layout's config has r={layout.config.get('r')!r} and lora_alpha="
                f"{layout.config.get('lora_alpha')!r}: over NCCL the scaling is in B, and the config says 1 (r = "
                "lora_alpha, no patterns, no rsLoRA)."
            )
        tensors = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in layout.entries}
        check_names(tensors, layout.config, self.engine.engine.vllm_config.lora_config.max_lora_rank)
        check_shapes(tensors, self.base)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size > self.limit:
            raise too_large("The adapter", size, self.limit)

    async def _rpc(self, command: str, **arguments: Any) -> None:
        """Run a `Receiver` command in vLLM's workers. Raises the error of a worker that failed."""
        try:
            await _value(self.engine.engine.collective_rpc(RPC, kwargs={"command": command, **arguments}))
        except Exception as error:
            raise told(error) from error

    def _mapped(self, source: Source) -> tuple[Any, list[str] | None]:
        """A request with the file's tensors, and their `ORDER` if the file has it. Names, shapes, config are
        checked."""
        config = parse_object(source.config, CONFIG)
        try:
            with safetensors.safe_open(source.weights, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                text = (file.metadata() or {}).get(ORDER)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise StagingError(f"{WEIGHTS} is no safetensors file, or half of one: {error}.") from error
        check_names(tensors, config, self.engine.engine.vllm_config.lora_config.max_lora_rank)
        check_shapes(tensors, self.base)
        request = LoRATensorRequest(ADAPTER_NAME, ADAPTER_ID, config, tensors)
        ledger_of(self.engine.engine).check(request)  # vLLM checks the config itself
        return request, None if text is None else order_of(text, tensors)

    async def _load(self, held: Held, by_reference: bool = False) -> None:
        if held.digest is not None:
            try:
                await self._rpc("serve", digest=held.digest, by_reference=by_reference)
            except Exception:
                self.no_room = self.layout  # the next attempt uses vLLM's loader
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

    async def _put_back(self, before: Held | None, reason: Exception | None = None) -> None:
        """Serve ``before`` again. Raises EngineStateError if that fails too; the worker then serves nothing."""
        self.held = self.before = None
        if before is not None:
            try:
                await self._load(before)
            except Exception as error:
                first = f"{reason} " if reason is not None else ""
                raise EngineStateError(f"{first}The previous policy could not be put back either: {error}") from error
        self.held = before

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


def _request_by_id() -> Any:
    """For adapters that the workers hold: while the id is loaded, vLLM does not look at the path."""
    return LoRARequest(ADAPTER_NAME, ADAPTER_ID, ADAPTER_PATH)


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
    if stager.served().held is not served.held:
        raise EngineStateError("The policy was switched while rollouts were made of it; they are not handed out.")
    for output in outputs if isinstance(outputs, list) else ():
        infos = getattr(output, "rollout_infos", None)
        if isinstance(infos, dict):
            infos.update(served.infos())
    return outputs
