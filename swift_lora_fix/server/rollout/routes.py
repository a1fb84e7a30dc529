"""In the web server's process: the routes, who may call them, and that all workers do something or none.

Like most of ms-swift's own routes, a call blocks the event loop until all workers have answered: the answers on a
worker's pipe come in the order of the commands, so no other call may use the pipe meanwhile.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import threading
from collections.abc import Awaitable, Sequence
from typing import Any, Callable

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse

from ...common.log import info, warning
from ...common.settings import Settings
from ...errors import AccessError, ProtocolError, StagingError
from ...install import releases
from .. import wire as protocol
from ..wire import METHOD, POLICY_HEADER, PROTOCOL, Policy, config_bytes, limit_of, parse_object, root_of
from .files import Source, Spool, base_sums, spooled
from .requests import Refused, body_of, check_fields, drain, flag_of, json_of, text_of


class Policies:
    """What one server has staged and serves. ``server`` is ms-swift's ``SwiftRolloutDeploy``."""

    def __init__(self, server: Any, is_reload: bool) -> None:
        self.server, self.is_reload = server, is_reload
        self.is_ours = is_reload  # else the trainer may be one without this package
        self.base_is_pushed = False  # a trainer wrote over the base of the model's files
        self.arriving: Policy | None = None
        self.root, self.limit = root_of(), limit_of()
        self.boot = secrets.token_hex(8)
        self.staged: Policy | None = None
        self.policy: Policy | None = None
        self.plain = False
        self._sums: dict[str, list[Any]] | None = None
        self._summing = threading.Lock()
        self._patience = Settings.from_environment().server_deadline
        self._silent: set[int] = set()  # workers that did not answer in time

    def install(self, app: Any) -> None:
        for path, method, work in (
            (protocol.STATUS, "GET", self.status),
            (protocol.BASE, "GET", self.base),
            (protocol.STAGE, "POST", self.stage),
            (protocol.RECEIVE, "POST", self.receive),
            (protocol.FIND, "POST", self.find),
            (protocol.PUSHED, "POST", self.pushed),
            (protocol.COMMIT, "POST", self.commit),
            (protocol.ABORT, "POST", self.abort),
            (protocol.SERVE, "POST", self.serve),
        ):
            app.router.add_route(path, self._endpoint(work), methods=[method], include_in_schema=False)
        ways = ([] if self.is_reload else ["NCCL"]) + [f"folders in {self.root}", "HTTP"]
        info(f"the rollout server takes adapters below {protocol.PREFIX}: by {', '.join(ways)}.")

    def _endpoint(self, work: Callable[[Request], Awaitable[dict[str, Any]]]) -> Callable[[Request], Awaitable[Any]]:
        async def answer(request: Request) -> JSONResponse:
            try:
                self._check_key(request)
                return JSONResponse(await work(request))
            except Exception as error:
                refused = Refused.of(error)
            await drain(request)
            return refused.response()

        return answer

    def is_allowed(self, request: Request) -> bool:
        """Whether ms-swift's own routes will accept this request: they check the key from 4.6.0 on."""
        try:
            self._check_key(request)
        except Refused:
            return not hasattr(self.server, "_require_api_key")
        return True

    def _check_key(self, request: Request) -> None:
        """The check of ms-swift 4.6.0, on every release."""
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
            "package": releases.installed_version(releases.OWN_DISTRIBUTION),
            "ms_swift": releases.installed_swift(),
            "vllm": releases.installed_vllm(),
            "boot": self.boot,
            "enable_lora": bool(args.vllm_enable_lora),
            "max_lora_rank": args.vllm_max_lora_rank,
            "lora_dtype": str(dtype).split(".")[-1] if dtype is not None else None,
            "root": self.root,
            "policy": self.policy and self.policy.as_dict(),
            "plain": self.plain,
            "base_is_pushed": self.base_is_pushed,
            "workers": self.server.num_connections,
            "model": args.model,
        }

    async def base(self, request: Request) -> dict[str, Any]:
        return {"sums": await asyncio.get_running_loop().run_in_executor(None, self._base_sums)}

    async def stage(self, request: Request) -> dict[str, Any]:
        if not request.headers.get("Content-Type", "").startswith(protocol.BYTES):
            body = await json_of(request, ("policy",))
            if "layout" in body:
                return self._announce(Policy.from_dict(body["policy"]), body["layout"])
            check_fields(body, ("digest", "folder"))
            policy, digest = Policy.from_dict(body["policy"]), text_of(body, "digest")
            with spooled(text_of(body, "folder"), self.root, self.limit) as spool:
                return self._stage(policy, spool.sealed(digest))
        about = check_fields(
            parse_object(request.headers.get(POLICY_HEADER, ""), f"The header {POLICY_HEADER}"),
            ("policy", "digest", "config"),
        )
        policy, digest = Policy.from_dict(about["policy"]), text_of(about, "digest")
        if not isinstance(about["config"], dict):
            raise ProtocolError(f"config is {about['config']!r}: the object of an {protocol.CONFIG} is expected.")
        config = config_bytes(about["config"])
        with Spool(config, self.limit) as spool:
            async for chunk in body_of(request, self.limit):
                spool.write(chunk)
            return self._stage(policy, spool.sealed(digest))

    def _stage(self, policy: Policy, source: Source) -> dict[str, Any]:
        if policy != self.policy:  # equal: the trainer did not hear of its commit
            self._begin(policy)
            self._all("stage", policy, source=source)
            self.staged = policy
        return {"policy": policy.as_dict()}

    def _announce(self, policy: Policy, layout: Any) -> dict[str, Any]:
        self._begin(policy)
        self._all("prepare", policy, layout=layout)
        self.arriving = policy
        return {"policy": policy.as_dict()}

    async def receive(self, request: Request) -> dict[str, Any]:
        policy = Policy.from_dict((await json_of(request, ("policy",)))["policy"])
        if policy != self.arriving:
            raise StagingError(f"{policy} was not announced to this server, it awaits {self.arriving}.", 409)
        self.arriving = None
        self._all("receive", policy)
        self.staged = policy
        return {"policy": policy.as_dict()}

    async def find(self, request: Request) -> dict[str, Any]:
        policy = Policy.from_dict((await json_of(request, ("policy",)))["policy"])
        self._begin(policy)
        self._all("find", policy)
        self.staged = policy
        return {"policy": policy.as_dict()}

    async def pushed(self, request: Request) -> dict[str, Any]:
        failed = _failures(self._ask("pushed"))
        if failed:
            raise _refused(failed, 500)
        return {"base_is_pushed": self.base_is_pushed}

    def _begin(self, policy: Policy) -> None:
        """Drop what was staged. Raises StagingError (409) for a policy that is not newer than the one served."""
        served = self.policy
        if served not in (None, policy) and policy.run == served.run and policy.version <= served.version:
            raise StagingError(f"This server serves {self.policy}, {policy} is not newer: send a newer version.", 409)
        self.is_ours, self.staged, self.arriving = True, None, None

    def _all(self, command: str, policy: Policy, **arguments: Any) -> None:
        """Have every worker do it. If any fails, nothing is staged and this raises what the failing ones said."""
        failed = _failures(self._ask(command, policy=policy.as_dict(), **arguments))
        if failed:
            self._ask("abort", policy=policy.as_dict())
            raise _refused(failed, 422)

    def release(self) -> None:
        """A trainer without this package changes the adapter: forget what is known of it."""
        if self.is_ours:
            self._ask("release")
            self.policy = self.staged = self.arriving = None
            self.is_ours = self.plain = False

    async def commit(self, request: Request) -> dict[str, Any]:
        body = await json_of(request, ("policy",))
        policy, by_reference = Policy.from_dict(body["policy"]), flag_of(body, "by_reference")
        if policy != self.policy:
            self._commit(policy, by_reference)
        elif self.plain:
            self._serve(False)
        return {"policy": policy.as_dict(), "boot": self.boot}

    def _commit(self, policy: Policy, by_reference: bool) -> None:
        if policy != self.staged:
            staged = f"staged is {self.staged}" if self.staged is not None else "nothing is staged"
            raise StagingError(f"{policy} is not what every worker staged ({staged}): stage it first.", 409)
        self.staged = None
        failed = _failures(self._ask("commit", policy=policy.as_dict(), by_reference=by_reference))
        if failed:
            raise _refused(failed, 500, self._go_back(policy))
        self.policy, self.plain = policy, False

    def _go_back(self, policy: Policy) -> str:
        """Have every worker serve what it served before ``policy``, or else all nothing. Returns which, in words."""
        before = self.policy and self.policy.as_dict()
        answers = self._ask("restore", policy=policy.as_dict())
        if not _failures(answers) and all(answer["serves"] == before for answer in answers):
            self._ask("serve", plain=self.plain)  # a commit ended plain mode in some
            return f" Every worker serves {self.policy or 'nothing'}, as before."
        self._ask("drop")
        self.policy = None
        return " Not every worker could go back, so this server serves nothing until another policy is committed."

    async def abort(self, request: Request) -> dict[str, Any]:
        policy = Policy.from_dict((await json_of(request, ("policy",)))["policy"])
        if policy == self.staged:
            self.staged = None
        if policy == self.arriving:
            self.arriving = None
        self._ask("abort", policy=policy.as_dict())
        return {"policy": self.policy and self.policy.as_dict()}

    async def serve(self, request: Request) -> dict[str, Any]:
        plain = flag_of(await json_of(request, ("plain",)), "plain")
        self._serve(plain)
        return {"plain": plain}

    def _serve(self, plain: bool) -> None:
        self.is_ours = True
        failed = _failures(self._ask("serve", plain=plain))
        if failed:
            self._ask("serve", plain=self.plain)
            raise _refused(failed, 500)
        self.plain = plain

    # ---- the workers ------------------------------------------------------------------------------------------------

    def _ask(self, command: str, **arguments: Any) -> list[dict[str, Any]]:
        """Send a command to all workers at once, and wait for all answers."""
        order = {"type": "call", "method": METHOD, "args": (command,), "kwargs": arguments}
        connections = self.server.connections
        sent = [index not in self._silent and _send(each, order) for index, each in enumerate(connections)]
        return [self._receive(index, each) if sent[index] else _gone(index) for index, each in enumerate(connections)]

    def _receive(self, index: int, connection: Any) -> dict[str, Any]:
        """A worker's answer. One that is late is not asked again: its next answer would belong to this command."""
        try:
            if connection.poll(self._patience):
                answer = connection.recv()
            else:
                self._silent.add(index)
                warning(f"worker {index} did not answer within {self._patience} s: restart this rollout server.")
                return _gone(index)
        except (EOFError, OSError):
            return _gone(index)
        if isinstance(answer, dict):
            return answer
        return _no_answer(f"Worker {index} of this rollout server does not know {METHOD}: its log says why.")

    def _base_sums(self) -> dict[str, list[Any]]:
        with self._summing:
            if self._sums is None:
                self._sums = base_sums(self.server.args.model_dir, self._model_dtype())
            return self._sums

    def _model_dtype(self) -> Any:
        info = getattr(self.server.args, "model_info", None)
        return getattr(info, "torch_dtype", None) or getattr(self.server.args, "torch_dtype", None)

    def _lora_dtype(self) -> Any:
        """The servers' LoRA dtype. vLLM's ``auto`` means the model's dtype."""
        asked = (getattr(self.server.args, "vllm_engine_kwargs", None) or {}).get("lora_dtype", "auto")
        return self._model_dtype() if asked == "auto" else getattr(torch, str(asked).split(".")[-1], None)


def _send(connection: Any, order: dict[str, Any]) -> bool:
    try:
        connection.send(order)
    except OSError:
        return False
    return True


def _gone(index: int) -> dict[str, Any]:
    return _no_answer(f"Worker {index} of this rollout server has ended, or does not answer: restart the server.")


def _no_answer(message: str) -> dict[str, Any]:
    return {"error": "EngineStateError", "message": message, "status": 500, "serves": None}


def _failures(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer for answer in answers if "error" in answer]


def _refused(failed: Sequence[dict[str, Any]], status: int, more: str = "") -> Refused:
    """The messages of the failed workers, each once."""
    messages = " ".join(dict.fromkeys(answer["message"] for answer in failed))
    return Refused(failed[0]["status"] or status, failed[0]["error"], messages + more)
