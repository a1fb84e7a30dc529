"""In each ``llm_worker``: an adapter is read and checked, kept, and then served; and rollouts tell what they came from.

Legend for shapes: r rank, in/out the wrapped layer's features. A is (r, in), B is (out, r).

ms-swift's worker looks a command up as a method of its engine, logs what that raises and answers None: so there is one
method (`protocol.METHOD`), and it answers with what went wrong.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Awaitable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Callable

import safetensors
import safetensors.torch
import torch

from ..adapter_files import TensorHeader
from ..engine.handle import ADAPTER_ID, ADAPTER_NAME
from ..errors import CacheResetError, EngineStateError, NonFiniteAdapterError, StagingError
from ..log import info
from ..memory import LoRATensorRequest, update
from ..memory.segment import DTYPES, is_finite
from ..memory.sending import ledger_of
from .files import Source, base_shapes
from .protocol import CONFIG, METHOD, WEIGHTS, Policy, http_status, limit_of, parse_object, root_of

_STAGER = "swift_lora_fix_stager"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(embedding_)?(?P<side>[AB])(\.weight)?")
_FLOATS = ("F64", "F32", "BF16", "F16", "F8")

_building: ContextVar[bool] = ContextVar("building", default=False)


@dataclass(frozen=True)
class Held:
    """A policy and the request that makes vLLM serve it, its tensors included."""

    policy: Policy
    request: Any


@dataclass(frozen=True)
class Served:
    """What rollouts come from: a policy, or the plain base."""

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
        self.root, self.limit = root_of(), limit_of()
        self.base = base_shapes(engine.model_dir)
        self.pending: Held | None = None
        self.held: Held | None = None
        self.before: Held | None = None  # what a restore goes back to
        self.plain = False

    def served(self) -> Served:
        """Raises EngineStateError where there is nothing to make rollouts from."""
        if self.held is None and not self.plain:
            raise EngineStateError("No policy was committed to this server, so no rollout can be made of it.")
        return Served(None if self.plain else self.held)

    # ---- the commands -----------------------------------------------------------------------------------------------

    async def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Do it; what is raised is answered, and which policy is served afterwards."""
        commands: dict[str, Callable[..., Awaitable[None]]] = {
            "stage": self.stage,
            "commit": self.commit,
            "restore": self.restore,
            "drop": self.drop,
            "abort": self.abort,
            "serve": self.serve,
        }
        answer: dict[str, Any] = {}
        try:
            await commands[name](**arguments)
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error), "status": http_status(error)}
        return {**answer, "serves": self.held and self.held.policy.as_dict()}

    def command_now(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Of the engine that is not asynchronous, where nothing is ever waited for."""
        try:
            self.command(name, **arguments).__await__().send(None)
        except StopIteration as done:
            answer: dict[str, Any] = done.value
            return answer
        raise AssertionError(f"{name} waits for something")

    async def stage(self, policy: Mapping[str, Any], source: Source) -> None:
        """Read and check an adapter, and keep it for `commit`. The engine is not touched."""
        self.pending = self.before = None
        self.pending = Held(Policy.from_dict(policy), self._request(source))

    async def commit(self, policy: Mapping[str, Any]) -> None:
        """Have the engine serve what was staged. What fails leaves it with what it had."""
        pending, before = self.pending, self.held
        if pending is None or pending.policy.as_dict() != policy:
            raise EngineStateError(f"This worker staged {pending and str(pending.policy)}, not {policy}.")
        self._check_idle()
        try:
            await self._load(pending)
        except Exception as error:
            await self._put_back(before, error)
            raise
        self.pending, self.held, self.before = None, pending, before
        self._set_plain(False)

    async def restore(self, policy: Mapping[str, Any]) -> None:
        """Another worker could not commit ``policy``: back to what was served before."""
        if self.held is not None and self.held.policy.as_dict() == policy:
            await self._put_back(self.before)

    async def drop(self) -> None:
        """Serve nothing: workers would differ."""
        self.held = self.before = self.pending = None

    async def abort(self, policy: Mapping[str, Any]) -> None:
        if self.pending is not None and self.pending.policy.as_dict() == policy:
            self.pending = None

    async def serve(self, plain: bool) -> None:
        self._check_idle()
        self._set_plain(plain)

    # ---- how --------------------------------------------------------------------------------------------------------

    def _request(self, source: Source) -> Any:
        config_bytes, weights = source.read(self.root, self.limit)
        config = parse_object(config_bytes, CONFIG)
        try:
            tensors = safetensors.torch.load(weights)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise StagingError(f"{WEIGHTS} is no safetensors file, or half of one: {error}.") from error
        del weights
        lora_config = self.engine.engine.vllm_config.lora_config
        check_names(tensors, config, lora_config.max_lora_rank)
        check_shapes(tensors, self.base)
        tensors = cast_checked(tensors, lora_config.lora_dtype)
        request = LoRATensorRequest(ADAPTER_NAME, ADAPTER_ID, config, tensors)
        ledger_of(self.engine.engine).check(request)  # vLLM's own judgement of the config
        return request

    async def _load(self, held: Held) -> None:
        if not await _value(update(self.engine.engine, held.request)):
            raise EngineStateError(f"vLLM did not load the adapter of {held.policy}, and gave no reason.")
        for name in ("reset_prefix_cache", "reset_encoder_cache"):
            reset = getattr(self.engine.engine, name, None)
            if reset is not None and await _value(reset()) is False:
                raise CacheResetError(
                    f"vLLM's {name}() reported that it was not done, so rollouts could reuse values computed with the "
                    "previous policy. Usually a request is still running or a KV connector holds blocks."
                )

    async def _put_back(self, before: Held | None, reason: Exception | None = None) -> None:
        """Raises EngineStateError where not even that is possible; the worker then serves nothing."""
        self.held = self.before = None
        if before is not None:
            try:
                await self._load(before)
            except Exception as error:
                first = f"{reason} " if reason is not None else ""
                raise EngineStateError(f"{first}The previous policy could not be put back either: {error}") from error
        self.held = before

    def _check_idle(self) -> None:
        # not asked of the engine: with data parallelism that is a collective call
        if self.engine.engine.output_processor.has_unfinished_requests():
            raise EngineStateError(
                "The engine still has unfinished requests: they would be finished by another policy than they began "
                "with. Wait for them."
            )

    def _set_plain(self, plain: bool) -> None:
        """ms-swift attaches the adapter it finds in the engine, unless it believes that there are none."""
        self.plain, self.engine.enable_lora = plain, not plain


async def _value(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


# ---- what is an adapter --------------------------------------------------------------------------------------------


def check_names(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], max_rank: int) -> None:
    """Raise StagingError where these are not pairs of A and B of a rank that config and engine agree on."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or tensor.dim() != 2 or tensor.dtype not in DTYPES:
            raise StagingError(
                f"{WEIGHTS} has {name!r} ({tuple(tensor.shape)}, {tensor.dtype}), which is no LoRA matrix: floats are "
                "expected, with names as in 'base_model.model.<module>.lora_A.weight'."
            )
        sides.setdefault(found["module"], {})[found["side"]] = tensor
    if not sides:
        raise StagingError(f"{WEIGHTS} has no tensors: an adapter has at least one lora_A and one lora_B.")
    ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
    for module, pair in sides.items():
        if len(pair) < 2:
            raise StagingError(f"{WEIGHTS} has only lora_{next(iter(pair))} of {module!r}: A and B go together.")
        (rank, _), (_, columns) = pair["A"].shape, pair["B"].shape
        if rank != columns:
            raise StagingError(f"Of {module!r}, A has rank {rank} and B {columns}: these are not one adapter.")
        if rank > max_rank:
            raise StagingError(
                f"{module!r} has rank {rank}, this server has room for {max_rank}: start it with "
                f"--vllm_max_lora_rank {rank}."
            )
        if rank not in ranks:
            raise StagingError(f"{module!r} has rank {rank}, {CONFIG} says {sorted(map(str, ranks))}.")


def check_shapes(tensors: Mapping[str, torch.Tensor], base: Mapping[str, TensorHeader]) -> None:
    """Raise StagingError where a module is not the base's. What the model's files do not name, vLLM's loader judges."""
    modules = {name[: -len(".weight")] for name in base if name.endswith(".weight")}
    wanted = {found["module"]: name for name in tensors if (found := _NAME.fullmatch(name)) and found["side"] == "A"}
    if not modules.intersection(wanted):
        return  # named otherwise in the files than in PEFT
    layers, kinds = {_kind(name) for name in modules}, {name.split(".")[-1] for name in modules}
    for module, name in wanted.items():
        if module in modules:
            _check_shape(module, tensors[name], tensors[name.replace("_A", "_B")], base[f"{module}.weight"])
        elif _kind(module) in layers or (module.split(".")[-1] not in kinds and ".experts" not in module):
            raise StagingError(f"The server's model has no module {module!r}: is the adapter one of another model?")


def _kind(module: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", module)


def _check_shape(module: str, a: torch.Tensor, b: torch.Tensor, weight: TensorHeader) -> None:
    shape = (b.shape[0], a.shape[1])
    if weight.dtype.startswith(_FLOATS) and sorted(shape) != sorted(weight.shape):  # Conv1D and embeddings: (in, out)
        raise StagingError(
            f"{module!r} is {tuple(weight.shape)} in the server's model, A {tuple(a.shape)} and B {tuple(b.shape)} are "
            f"for {shape}: is the adapter one of another model?"
        )


def cast_checked(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """As vLLM will hold them. Raises NonFiniteAdapterError naming those with NaN or infinity, then or before."""
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    bad = [name for name, tensor in cast.items() if not is_finite(tensor)]
    if bad:
        raise NonFiniteAdapterError(
            f"{len(bad)} of the adapter's {len(cast)} tensors are not finite in {dtype}, the first {min(bad)!r}. The "
            "server keeps the policy that it has."
        )
    return cast


# ---- the hooks -----------------------------------------------------------------------------------------------------


def build_engine(build: Callable[..., Any], arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """``SwiftRolloutDeploy.get_infer_engine``: the engine starts from the model's files and takes policies."""
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "swift_lora_fix" not in plugins.split(","):
        os.environ["VLLM_PLUGINS"] = f"{plugins},swift_lora_fix"  # or vLLM's own processes could take no adapter
        info(f"VLLM_PLUGINS={os.environ['VLLM_PLUGINS']}: vLLM loads adapters from memory.")
    token = _building.set(True)
    try:
        engine = build(arguments, *args, **kwargs)
    finally:
        _building.reset(token)
    stager = Stager(engine)
    setattr(engine, _STAGER, stager)
    setattr(engine, METHOD, stager.command if arguments.vllm_use_async_engine else stager.command_now)
    return engine


def load_base_from_files(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``GRPOVllmEngine`` without random weights, which are for a trainer that sends the base."""
    if not _building.get():
        return kwargs
    inner = dict(kwargs.get("engine_kwargs") or {})
    found = inner.pop("load_format", None) or kwargs.get("load_format") or "auto"
    return {**kwargs, "engine_kwargs": inner, "load_format": "auto" if found == "dummy" else found}


def stager_of(engine: Any) -> Stager | None:
    """None: not an engine of a server that takes policies this way (a colocated one)."""
    return vars(engine).get(_STAGER)


def tag_scheduler(engine: Any) -> None:
    """What ``get_rollout_engine_type`` made: where that is a scheduler, its rollouts are tagged, too."""
    inner = getattr(engine, "infer_engine", None)
    stager = stager_of(inner) if inner is not None else None
    if stager is None or stager_of(engine) is not None:
        return
    wrapped = engine.async_infer

    async def async_infer(*args: Any, **kwargs: Any) -> Any:
        served = stager.served()
        return tag(stager, served, await wrapped(*args, **kwargs))

    engine.async_infer = async_infer


def tag(stager: Stager, served: Served, outputs: Any) -> Any:
    """Write what made them into ``rollout_infos`` of ms-swift's ``RolloutOutput``."""
    if stager.served().held is not served.held:
        raise EngineStateError("The policy was switched while rollouts were made of it; they are not handed out.")
    for output in outputs if isinstance(outputs, list) else ():
        infos = getattr(output, "rollout_infos", None)
        if isinstance(infos, dict):
            infos.update(served.infos())
    return outputs
