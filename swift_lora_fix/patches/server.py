"""The hooks into ms-swift's rollout server for the ``reload`` transport. No logic: ``swift_lora_fix.server`` has it.

Its modules are imported by the hooks: FastAPI and vLLM are loaded only where a server runs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Callable

from .. import releases
from .registry import Patch, PatchSet

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_GONE = "ms-swift's server takes adapters without NCCL and says which policy a rollout came from"


def _register_rl_rollout_app(wrapped: Callable[..., Any], server: Any, args: Args, kwargs: Kwargs) -> Any:
    from ..server import routes

    routes.install(server)
    return wrapped(*args, **kwargs)


def _get_infer_engine(wrapped: Callable[..., Any], instance: Any, args: Args, kwargs: Kwargs) -> Any:
    from ..server import worker

    return worker.build_engine(wrapped, *args, **kwargs)


def _get_rollout_engine_type(wrapped: Callable[..., Any], instance: Any, args: Args, kwargs: Kwargs) -> Any:
    from ..server import worker

    engine = wrapped(*args, **kwargs)
    worker.tag_scheduler(engine)
    return engine


def _init(wrapped: Callable[..., Any], engine: Any, args: Args, kwargs: Kwargs) -> Any:
    from ..server import worker

    return wrapped(*args, **worker.load_base_from_files(kwargs))


def _infer(wrapped: Callable[..., Any], engine: Any, args: Args, kwargs: Kwargs) -> Any:
    from ..server import worker

    stager = worker.stager_of(engine)
    if stager is None:
        return wrapped(*args, **kwargs)
    served = stager.served()
    return worker.tag(stager, served, wrapped(*args, **{**kwargs, "adapter_request": served.request}))


async def _async_infer(wrapped: Callable[..., Any], engine: Any, args: Args, kwargs: Kwargs) -> Any:
    from ..server import worker

    stager = worker.stager_of(engine)
    if stager is None:
        return await wrapped(*args, **kwargs)
    served = stager.served()
    return worker.tag(stager, served, await wrapped(*args, **kwargs))


def _infer_async(wrapped: Callable[..., Any], engine: Any, args: Args, kwargs: Kwargs) -> Any:
    from ..server import worker

    stager = worker.stager_of(engine)
    if stager is None:
        return wrapped(*args, **kwargs)
    return wrapped(*args, **{**kwargs, "adapter_request": stager.served().request})


SERVER = PatchSet(
    "ms-swift rollout server",
    (
        Patch(
            "SwiftRolloutDeploy._register_rl_rollout_app",
            _register_rl_rollout_app,
            why="adapters come over NCCL only, and a failing update is answered like one that worked",
            goes_when=_GONE,
        ),
        Patch(
            "SwiftRolloutDeploy.get_infer_engine",
            _get_infer_engine,
            why="the worker has no command that says what went wrong",
            goes_when=_GONE,
        ),
        Patch(
            "get_rollout_engine_type",
            _get_rollout_engine_type,
            why="rollouts of a multi-turn scheduler do not say which policy they came from",
            goes_when=_GONE,
        ),
    ),
)
ENGINE = PatchSet(
    "ms-swift rollout server's engine",
    (
        Patch(
            "GRPOVllmEngine.__init__",
            _init,
            why="up to 4.1.1 the server starts with random weights, which only NCCL replaces",
            goes_when="4.1.1 is no longer supported",
        ),
        Patch(
            "GRPOVllmEngine.infer",
            _infer,
            why="without the adapter in the engine, rollouts silently come from the base model",
            goes_when=_GONE,
        ),
        Patch(
            "GRPOVllmEngine.async_infer",
            _async_infer,
            why="rollouts do not say which policy they came from",
            goes_when=_GONE,
        ),
        Patch(
            "GRPOVllmEngine.infer_async",
            _infer_async,
            why="before 4.5.0 the asynchronous engine never uses the adapter (ms-swift 9855)",
            goes_when=_GONE,
        ),
    ),
)


def of(module: ModuleType) -> PatchSet:
    """Which of them is for a module of ms-swift's."""
    return SERVER if hasattr(module, "SwiftRolloutDeploy") else ENGINE


def modules() -> tuple[str, ...]:
    """Where they go in, on any release."""
    layouts = dict.fromkeys(family.layout for family in releases.FAMILIES)
    return tuple(name for layout in layouts for name in (layout.server_module, layout.engine_module))
