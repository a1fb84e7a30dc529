"""In the process of the web server: the routes, who may call them, and that all workers do it or none.

Like ms-swift's own routes they hold the event loop from the first word to the workers until the last answer: a pipe's
answers come in the order of its commands, so nobody else may use it meanwhile.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, Callable

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse

import swift_lora_fix

from .. import releases
from ..errors import AccessError, ProtocolError, SettingsError, StagingError
from ..log import info, logger, warning
from ..memory import hooks
from . import protocol
from .files import Source, Spool, base_sums, different_digest, too_large
from .protocol import (
    METHOD,
    POLICY_HEADER,
    PROTOCOL,
    Policy,
    config_bytes,
    http_status,
    limit_of,
    parse_object,
    root_of,
)

JSON_LIMIT = 1 << 20
DRAIN_LIMIT = 256 << 20
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_INFER = "/infer"
# ms-swift's own ways to change what the engine serves, behind our back
_NCCL = {
    "/update_named_param",
    "/update_adapter_flattened_param",
    "/update_adapter_param",
    "/update_flattened_params",
    "/process_weights_after_loading",
}

# ms-swift's trainer connects for NCCL as it parses its arguments, before any plugin and without a key. It is told that
# there is nobody to connect to: a group of its own alone opens no NCCL (vLLM's PyNcclCommunicator).
_HANDSHAKE: dict[str, dict[str, Any]] = {
    "/get_world_size": {"world_size": 0},
    "/init_communicator": {"message": "no communicator: SWIFT_LORA_FIX_TRANSPORT=reload"},
    "/close_communicator": {"message": "no communicator: SWIFT_LORA_FIX_TRANSPORT=reload"},
}


def install(server: Any) -> None:
    """Add the routes to a ``SwiftRolloutDeploy`` that is being made.

    Raises SettingsError where it takes no LoRA, ContractError where its vLLM cannot take adapters from memory.
    """
    if not server.args.vllm_enable_lora:
        raise SettingsError(
            "SWIFT_LORA_FIX_TRANSPORT=reload needs LoRA layers in the engine: start `swift rollout` with "
            "--vllm_enable_lora true (and --vllm_max_lora_rank as large as the adapter's rank)."
        )
    hooks.install()  # the workers and vLLM's processes inherit what it puts in the environment
    Reload(server).install(server.app)
    _keep_port(server.args, sys.argv)
    _warn_if_open(server)


def _keep_port(args: Any, command: Sequence[str]) -> None:
    """Have a server that restarts be where its trainer looks for it: ms-swift silently takes the next port while
    connections of the server before linger (``find_free_port`` binds without SO_REUSEADDR, uvicorn with it)."""
    given = [value for name, value in zip(command, command[1:]) if name == "--port"]
    given += [word.removeprefix("--port=") for word in command if word.startswith("--port=")]
    asked = given[-1] if given else ""
    if not asked.isdecimal() or int(asked) in (0, args.port):
        return
    with socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, int(asked)))
        except OSError as error:
            warning(f"port {asked} is taken ({error}): this rollout server listens on {args.port} instead.")
            return
    args.port = int(asked)


def _warn_if_open(server: Any) -> None:
    args, ignores_key = server.args, not hasattr(server, "_require_api_key")
    if not args.api_key and args.host not in _LOOPBACK:
        warning(
            f"the rollout server listens on {args.host}:{args.port} without --api_key: whoever reaches this port can "
            "replace the policy. Set --api_key, or --host 127.0.0.1."
        )
    elif args.api_key and ignores_key:
        warning(
            f"--api_key guards the routes below {protocol.PREFIX}; ms-swift {releases.installed_swift()} ignores it "
            "for its own (rollouts among them), which anyone who reaches this port can call."
        )


class Refused(Exception):
    """What a request is answered with when it is not done. ``kind``: name of the error's class."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.kind, "message": str(self)}, self.status)

    @classmethod
    def of(cls, error: Exception) -> Refused:
        if isinstance(error, Refused):
            return error
        status = http_status(error) or 500
        if status == 500:
            logger.exception("a rollout server's route failed")
        return cls(status, type(error).__name__, str(error))


class Reload:
    """What one server has staged and serves. ``server`` is ms-swift's ``SwiftRolloutDeploy``."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.root, self.limit = root_of(), limit_of()
        self.boot = secrets.token_hex(8)
        self.staged: Policy | None = None
        self.policy: Policy | None = None
        self.plain = False
        self._sums: dict[str, list[Any]] | None = None
        self._summing = threading.Lock()

    def install(self, app: Any) -> None:
        for path, method, work in (
            (protocol.STATUS, "GET", self.status),
            (protocol.BASE, "GET", self.base),
            (protocol.STAGE, "POST", self.stage),
            (protocol.COMMIT, "POST", self.commit),
            (protocol.ABORT, "POST", self.abort),
            (protocol.SERVE, "POST", self.serve),
        ):
            app.router.add_route(path, self._endpoint(work), methods=[method], include_in_schema=False)
        app.add_middleware(Guard, reload=self)
        info(f"the rollout server takes adapters below {protocol.PREFIX}, from folders in {self.root} or over HTTP.")

    def _endpoint(self, work: Callable[[Request], Awaitable[dict[str, Any]]]) -> Callable[[Request], Awaitable[Any]]:
        async def answer(request: Request) -> JSONResponse:
            try:
                self._check_key(request)
                return JSONResponse(await work(request))
            except Exception as error:
                refused = Refused.of(error)
            await _drain(request)
            return refused.response()

        return answer

    def _check_key(self, request: Request) -> None:
        """As ms-swift 4.6.0 does it, on every release."""
        key = self.server.args.api_key
        given = request.headers.get("Authorization", "")
        if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            what = "has another key" if given else "has no key"
            raise Refused(
                401,
                AccessError.__name__,
                f"The request {what} than --api_key of this server: `Authorization: Bearer KEY` is expected (for a "
                "trainer set SWIFT_LORA_FIX_API_KEY).",
            )

    # ---- the routes -------------------------------------------------------------------------------------------------

    async def status(self, request: Request) -> dict[str, Any]:
        args = self.server.args
        dtype = self._lora_dtype()
        return {
            "protocol": PROTOCOL,
            "package": swift_lora_fix.__version__,
            "ms_swift": releases.installed_swift(),
            "vllm": releases.installed_vllm(),
            "boot": self.boot,
            "enable_lora": bool(args.vllm_enable_lora),
            "max_lora_rank": args.vllm_max_lora_rank,
            "lora_dtype": str(dtype).split(".")[-1] if dtype is not None else None,
            "root": self.root,
            "policy": self.policy and self.policy.as_dict(),
            "plain": self.plain,
            "workers": self.server.num_connections,
            "model": args.model,
        }

    async def base(self, request: Request) -> dict[str, Any]:
        return {"sums": await asyncio.get_running_loop().run_in_executor(None, self._base_sums)}

    async def stage(self, request: Request) -> dict[str, Any]:
        if not request.headers.get("Content-Type", "").startswith(protocol.BYTES):
            body = await _json(request, ("policy", "digest", "folder"))
            source = Source(_text(body, "digest"), folder=_text(body, "folder"))
            return self._stage(Policy.from_dict(body["policy"]), source)
        about = _fields(
            parse_object(request.headers.get(POLICY_HEADER, ""), f"The header {POLICY_HEADER}"),
            ("policy", "digest", "config"),
        )
        policy, digest = Policy.from_dict(about["policy"]), _text(about, "digest")
        if not isinstance(about["config"], dict):
            raise ProtocolError(f"config is {about['config']!r}: the object of an {protocol.CONFIG} is expected.")
        config = config_bytes(about["config"])
        with Spool(config, self.limit) as spool:
            async for chunk in _body(request, self.limit):
                spool.write(chunk)
            if spool.digest != digest:
                raise different_digest(digest, spool.digest, spool.size)
            return self._stage(policy, Source(digest, spool=spool.path, config=config))

    def _stage(self, policy: Policy, source: Source) -> dict[str, Any]:
        if policy == self.policy:  # a trainer that did not hear of its commit
            return {"policy": policy.as_dict()}
        if self.policy is not None and policy.run == self.policy.run and policy.version <= self.policy.version:
            raise StagingError(f"This server serves {self.policy}, {policy} is not newer: send a newer version.", 409)
        self.staged = None
        failed = _failures(self._ask("stage", policy=policy.as_dict(), source=source))
        if failed:
            self._ask("abort", policy=policy.as_dict())
            raise _refused(failed, 422)
        self.staged = policy
        return {"policy": policy.as_dict()}

    async def commit(self, request: Request) -> dict[str, Any]:
        policy = Policy.from_dict((await _json(request, ("policy",)))["policy"])
        if policy != self.policy:
            self._commit(policy)
        elif self.plain:
            self._serve(False)
        return {"policy": policy.as_dict()}

    def _commit(self, policy: Policy) -> None:
        if policy != self.staged:
            staged = f"staged is {self.staged}" if self.staged is not None else "nothing is staged"
            raise StagingError(f"{policy} is not what every worker staged ({staged}): stage it first.", 409)
        self.staged = None
        failed = _failures(self._ask("commit", policy=policy.as_dict()))
        if failed:
            raise _refused(failed, 500, self._go_back(policy))
        self.policy, self.plain = policy, False

    def _go_back(self, policy: Policy) -> str:
        """Have every worker serve what it served before ``policy``, or all of them nothing; in words which."""
        before = self.policy and self.policy.as_dict()
        answers = self._ask("restore", policy=policy.as_dict())
        if not _failures(answers) and all(answer["serves"] == before for answer in answers):
            self._ask("serve", plain=self.plain)  # those that committed left that
            return f" Every worker serves {self.policy or 'nothing'}, as before."
        self._ask("drop")
        self.policy = None
        return " Not every worker could go back, so this server serves nothing until another policy is committed."

    async def abort(self, request: Request) -> dict[str, Any]:
        policy = Policy.from_dict((await _json(request, ("policy",)))["policy"])
        if policy == self.staged:
            self.staged = None
        self._ask("abort", policy=policy.as_dict())
        return {"policy": self.policy and self.policy.as_dict()}

    async def serve(self, request: Request) -> dict[str, Any]:
        plain = (await _json(request, ("plain",)))["plain"]
        if not isinstance(plain, bool):
            raise ProtocolError(f"plain is {plain!r}: true or false is expected.")
        self._serve(plain)
        return {"plain": plain}

    def _serve(self, plain: bool) -> None:
        failed = _failures(self._ask("serve", plain=plain))
        if failed:
            self._ask("serve", plain=self.plain)
            raise _refused(failed, 500)
        self.plain = plain

    def refusal(self, path: str, expected: str | None) -> Refused | None:
        """Why one of ms-swift's own routes is not called now. ``expected``: the value of `POLICY_HEADER`."""
        if path in _NCCL:
            return Refused(
                409,
                ProtocolError.__name__,
                f"{path}/ is refused: this server takes policies by SWIFT_LORA_FIX_TRANSPORT=reload. Set that for the "
                "trainer, too, or for neither.",
            )
        if path != _INFER:
            return None
        if self.policy is None and not self.plain:
            return Refused(
                503,
                "EngineStateError",
                "No policy was committed to this rollout server yet (or since it restarted, or a commit failed): it "
                "has the base model alone. The trainer sends a policy before it asks for rollouts.",
            )
        if expected is None:
            return None
        try:
            policy = Policy.from_dict(parse_object(expected, f"The header {POLICY_HEADER}"))
        except ProtocolError as error:
            return Refused.of(error)
        if self.plain or policy != self.policy:
            serves = "the plain base" if self.plain else str(self.policy)
            message = f"Rollouts of {policy} were asked for, this server has {serves}."
            return Refused(409, "PolicyMismatchError", message)
        return None

    # ---- the workers ------------------------------------------------------------------------------------------------

    def _ask(self, command: str, **arguments: Any) -> list[dict[str, Any]]:
        """Tell all workers at the same time, and wait for all of them."""
        order = {"type": "call", "method": METHOD, "args": (command,), "kwargs": arguments}
        sent = [_send(connection, order) for connection in self.server.connections]
        return [
            _receive(index, connection) if went else _gone(index)
            for index, (connection, went) in enumerate(zip(self.server.connections, sent))
        ]

    def _base_sums(self) -> dict[str, list[Any]]:
        with self._summing:
            if self._sums is None:
                self._sums = base_sums(self.server.args.model_dir, self._model_dtype())
            return self._sums

    def _model_dtype(self) -> Any:
        info = getattr(self.server.args, "model_info", None)
        return getattr(info, "torch_dtype", None) or getattr(self.server.args, "torch_dtype", None)

    def _lora_dtype(self) -> Any:
        """vLLM's ``auto`` is the model's."""
        asked = (getattr(self.server.args, "vllm_engine_kwargs", None) or {}).get("lora_dtype", "auto")
        return self._model_dtype() if asked == "auto" else getattr(torch, str(asked).split(".")[-1], None)


def _send(connection: Any, order: dict[str, Any]) -> bool:
    try:
        connection.send(order)
    except OSError:
        return False
    return True


def _receive(index: int, connection: Any) -> dict[str, Any]:
    try:
        answer = connection.recv()
    except (EOFError, OSError):
        return _gone(index)
    if isinstance(answer, dict):
        return answer
    return _no_answer(f"Worker {index} of this rollout server does not know {METHOD}: its log says why.")


def _gone(index: int) -> dict[str, Any]:
    return _no_answer(f"Worker {index} of this rollout server has ended: restart the server.")


def _no_answer(message: str) -> dict[str, Any]:
    return {"error": "EngineStateError", "message": message, "status": 500, "serves": None}


def _failures(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer for answer in answers if "error" in answer]


def _refused(failed: Sequence[dict[str, Any]], status: int, more: str = "") -> Refused:
    """The workers' own messages, each once."""
    messages = " ".join(dict.fromkeys(answer["message"] for answer in failed))
    return Refused(failed[0]["status"] or status, failed[0]["error"], messages + more)


# ---- requests ------------------------------------------------------------------------------------------------------


async def _body(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Its chunks. Raises StagingError (413) as soon as it is known to be larger."""
    announced = request.headers.get("Content-Length", "")
    size = int(announced) if announced.isdecimal() else 0
    if size <= limit:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                break
            yield chunk
    if size > limit:
        raise too_large("The request's body", size, limit)


async def _json(request: Request, names: Sequence[str]) -> dict[str, Any]:
    chunks = [chunk async for chunk in _body(request, JSON_LIMIT)]
    return _fields(parse_object(b"".join(chunks), "The request's body"), names)


def _fields(body: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    missing = [name for name in names if name not in body]
    if missing:
        raise ProtocolError(f"The request has no {', '.join(missing)}; it has {', '.join(sorted(body)) or 'nothing'}.")
    return body


def _text(body: dict[str, Any], name: str) -> str:
    value = body[name]
    if not isinstance(value, str) or not value:
        raise ProtocolError(f"{name} is {value!r}: text is expected.")
    return value


async def _drain(request: Request) -> None:
    """Read what is left of the body, so that the client is through with sending and sees the answer."""
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > DRAIN_LIMIT:
                return
    except Exception:  # it was read already, or the client is gone
        return


class Guard:
    """ASGI middleware around all routes: refuses those of ms-swift that would hand out or make another policy, and
    answers those with which a trainer opens NCCL."""

    def __init__(self, app: Any, reload: Reload) -> None:
        self.app, self.reload = app, reload

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, path = Request(scope, receive), scope["path"].rstrip("/")
        if path in _HANDSHAKE:
            await _drain(request)
            await JSONResponse(_HANDSHAKE[path])(scope, receive, send)
            return
        refused = self.reload.refusal(path, request.headers.get(POLICY_HEADER))
        if refused is None:
            await self.app(scope, receive, send)
            return
        await _drain(request)
        await refused.response()(scope, receive, send)
