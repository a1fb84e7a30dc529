"""Guards ms-swift's own routes of a rollout server: which are refused now, and which change what it serves."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from ...errors import EngineStateError, PolicyMismatchError, ProtocolError, StagingError
from ..wire import POLICY_HEADER, PREFIX, Policy, parsed
from .requests import Refused, drain, refusal
from .routes import Policies

_INFER = "/infer"
_CONNECT = "/init_communicator"
# ms-swift's own routes that change what the engine serves: the adapter, and the base
_ADAPTER = {"/update_adapter_flattened_param", "/update_adapter_param"}
_BASE = {"/update_named_param", "/update_flattened_params", "/process_weights_after_loading"}
_FREE = {"/health", "/get_world_size", "/get_engine_type"}  # those that ask no worker

# ms-swift's trainer opens NCCL while it parses its arguments, before any plugin is loaded and without a key. With
# SWIFT_LORA_FIX_TRANSPORT=reload it is told that there is nobody to connect to: a group of one opens no NCCL (vLLM's
# PyNcclCommunicator).
_NOBODY = {"message": "no communicator: SWIFT_LORA_FIX_TRANSPORT=reload"}
_HANDSHAKE: dict[str, dict[str, Any]] = {
    "/get_world_size": {"world_size": 0},
    _CONNECT: _NOBODY,
    "/close_communicator": _NOBODY,
}


class Guard:
    """ASGI middleware around all routes."""

    def __init__(self, app: Any, policies: Policies) -> None:
        self.app, self.policies = app, policies

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"].rstrip("/") if scope["type"] == "http" else PREFIX
        request = Request(scope, receive) if scope["type"] == "http" else None
        answer: Any = self.app
        if request is not None and self.policies.is_reload and path in _HANDSHAKE:
            await drain(request)
            answer = JSONResponse(_HANDSHAKE[path])
        elif request is not None and not path.startswith(PREFIX) and path not in _FREE:
            async with self.policies.workers.alone:  # ms-swift's routes use the workers' pipes
                try:
                    self._check(path, request.headers.get(POLICY_HEADER))
                except Exception as error:
                    answer = await refusal(error, request)
                else:
                    if request.method == "POST" and self.policies.is_allowed(request):
                        await self._note(path)
                    await self.app(scope, receive, send)
                    return
        await answer(scope, receive, send)

    def _check(self, path: str, expected: str | None) -> None:
        """Raise what this route is refused with now, if it is. expected: the value of `POLICY_HEADER`."""
        policies, holder = self.policies, self.policies.living_holder()
        problem = policies.workers.what_is_wrong()
        if problem is not None:
            raise Refused(500, EngineStateError.__name__, problem)
        if policies.is_reload and path in _ADAPTER | _BASE:
            raise Refused(
                409,
                ProtocolError.__name__,
                f"{path}/ is refused: this server takes policies by SWIFT_LORA_FIX_TRANSPORT=reload. Set that for the "
                "trainer, too, or for neither.",
            )
        if holder is not None and (path in _ADAPTER | {_CONNECT} or (path in _BASE and not policies.is_pushing)):
            raise StagingError(
                f"{path}/ is refused: this rollout server is {holder}'s, which is alive. End it first, or give each "
                "trainer servers of its own.",
                409,
            )
        if path == _INFER:
            self._check_rollouts(expected)

    def _check_rollouts(self, expected: str | None) -> None:
        policies = self.policies
        if policies.policy is None and policies.is_ours and not policies.plain:
            raise Refused(
                503,
                EngineStateError.__name__,
                "No policy was committed to this rollout server yet (or since it restarted, or a commit failed): it "
                "has the base model alone. The trainer sends a policy before it asks for rollouts.",
            )
        if expected is None:
            return
        policy = parsed(Policy, expected, f"The header {POLICY_HEADER}")
        if policies.plain or policy != policies.policy:
            serves = "the plain base" if policies.plain else str(policies.policy)
            message = f"Rollouts of {policy} were asked for, this server has {serves}."
            raise Refused(409, PolicyMismatchError.__name__, message)

    async def _note(self, path: str) -> None:
        """Called before ms-swift's route: afterwards its workers wait for a trainer that waits for this answer."""
        if path in _BASE and not self.policies.is_pushing:
            await self.policies.base_changes()
        elif path in _ADAPTER | {_CONNECT}:
            await self.policies.release()
