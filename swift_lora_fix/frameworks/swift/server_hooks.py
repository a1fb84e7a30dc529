"""The hooks into ms-swift's rollout server. No logic here: ``swift_lora_fix.server`` has it.

The hooks themselves import its modules, so that FastAPI and vLLM are loaded only in a process with a server. The
engine's hooks go in when a server creates one, so a colocated engine never has them.
"""

from __future__ import annotations

import sys
from typing import Any, Callable

from ...install import releases
from ...install.registry import Patch, PatchSet
from ...server.rollout import installing

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_GONE = "ms-swift's server takes a policy on all workers or none, and says which one a rollout came from"


def _register_rl_rollout_app(wrapped: Callable[..., Any], server: Any, args: Args, kwargs: Kwargs) -> Any:
    installing.install(server)
    return wrapped(*args, **kwargs)


def _get_infer_engine(wrapped: Callable[..., Any], instance: Any, args: Args, kwargs: Kwargs) -> Any:
    if not installing.takes_policies():
        return wrapped(*args, **kwargs)
    for name in releases.engine_modules():
        if name in sys.modules:
            ENGINE.apply(sys.modules[name])
    from ...server.rollout import worker

    return worker.build_engine(wrapped, *args, **kwargs)


def _get_rollout_engine_type(wrapped: Callable[..., Any], instance: Any, args: Args, kwargs: Kwargs) -> Any:
    engine = wrapped(*args, **kwargs)
    if not installing.takes_policies():
        return engine
    from ...server.rollout import worker

    worker.tag_scheduler(engine)
    return engine


def _init(wrapped: Callable[..., Any], engine: Any, args: Args, kwargs: Kwargs) -> Any:
    from ...server.rollout import worker

    return wrapped(*args, **worker.engine_arguments(kwargs))


def _infer(wrapped: Callable[..., Any], engine: Any, args: Args, kwargs: Kwargs) -> Any:
    from ...server.rollout import worker

    switch = worker.switch_of(engine)
    if switch is None:
        return wrapped(*args, **kwargs)
    served = switch.served()
    return worker.tag(switch, served, wrapped(*args, **{**kwargs, "adapter_request": served.request}))


async def _async_infer(wrapped: Callable[..., Any], engine: Any, args: Args, kwargs: Kwargs) -> Any:
    from ...server.rollout import worker

    switch = worker.switch_of(engine)
    if switch is None:
        return await wrapped(*args, **kwargs)
    served = switch.served()
    return worker.tag(switch, served, await wrapped(*args, **kwargs))


def _infer_async(wrapped: Callable[..., Any], engine: Any, args: Args, kwargs: Kwargs) -> Any:
    from ...server.rollout import worker

    switch = worker.switch_of(engine)
    if switch is None:
        return wrapped(*args, **kwargs)
    return wrapped(*args, **{**kwargs, "adapter_request": switch.served().request})


SERVER = PatchSet(
    "ms-swift rollout server",
    (
        Patch(
            "SwiftRolloutDeploy._register_rl_rollout_app",
            _register_rl_rollout_app,
            why="a failing update is answered like one that worked, and rollouts do not say which policy made them",
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
