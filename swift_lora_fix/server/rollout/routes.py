"""In the web server's process: the routes, who may call them, and that all workers do something or none.

The state of a server is here. A worker is told with each order what rollouts come from (worker.py).
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...common.log import info, warning
from ...common.settings import Settings
from ...engine.vllm.handle import logits_processors
from ...errors import AccessError, StagingError
from ...install import releases
from ...policy.model_files import base_sums
from .. import wire
from ..hosts import is_alive, this_host
from ..shared import Memory
from ..wire import ANOTHER, BYTES, POLICY_HEADER, PREFIX, Holder, Policy, parsed
from .pipes import Workers, failures
from .receiver import Received
from .requests import JSON_LIMIT, Refused, body_of, refusal

Answer = dict[str, Any]
_KEY = (
    "The request does not have --api_key of this server: `Authorization: Bearer KEY` is expected (for a trainer set "
    "SWIFT_LORA_FIX_API_KEY)."
)
LOGPROBS_MODE = "processed_logprobs"  # of each engine of ms-swift's
Work = Coroutine[Any, Any, "Answer | None"]


class Policies:
    """What one server has staged and serves. ``server`` is ms-swift's ``SwiftRolloutDeploy``."""

    def __init__(self, server: Any, is_reload: bool) -> None:
        settings = Settings.from_environment()
        self.server, self.is_reload = server, is_reload
        self.is_ours = is_reload  # else the trainer may be one without this package
        self.workers = Workers(server, settings.server_deadline)
        self.limit = settings.max_mib << 20  # bytes of an adapter
        self.boot, self.epoch = secrets.token_hex(8), 0
        self.holder: Holder | None = None
        self.is_pushing = False  # the holder sends a base
        self.size = 0  # bytes of the adapter that the workers made room for
        self.memory: Memory | None = None  # that adapters come in, but for NCCL
        self.announced: Policy | None = None
        self.staged: Policy | None = None
        self.policy: Policy | None = None
        self.plain = False
        self._sums: asyncio.Future[dict[str, list[Any]]] | None = None

    def install(self, app: Any) -> None:
        for ask in (self.status, self.base):
            app.add_route(f"{PREFIX}/{ask.__name__}/", self._route(ask), ["GET"])
        orders: dict[type[wire.Model], Callable[[Any], Work]] = {
            wire.Lease: self.lease,
            wire.Push: self.push,
            wire.Prepare: self.prepare,
            wire.Stage: self.stage,
            wire.Receive: self.receive,
            wire.Commit: self.commit,
            wire.Serve: self.serve,
        }
        for kind, work in orders.items():
            app.add_route(f"{PREFIX}/{work.__name__}/", self._route(partial(self._order, kind, work)), ["POST"])
        ways = "shared memory and HTTP" if self.is_reload else "NCCL, shared memory and HTTP"
        info(f"the rollout server takes adapters below {PREFIX}: by {ways}.")

    def _route(self, work: Callable[[Request], Work]) -> Any:
        async def answer(request: Request) -> Response:
            try:
                if not self.has_key(request):
                    raise Refused(401, AccessError.__name__, _KEY)
                found = await work(request)
            except Exception as error:
                return await refusal(error, request)
            return JSONResponse({"boot": self.boot, "epoch": self.epoch, **(found or {})})

        return answer

    async def _order(self, kind: type[Any], work: Callable[[Any], Any], request: Request) -> Answer | None:
        """One order at a time, and only for this process and base, from the holder."""
        if kind is wire.Receive and request.headers.get("Content-Type", "").startswith(BYTES):
            order = parsed(kind, request.headers.get(POLICY_HEADER, ""), f"The header {POLICY_HEADER}")
            await self._body(order, request)
            order = order.model_copy(update={"written": True})
        else:
            text = b"".join([chunk async for chunk in body_of(request, JSON_LIMIT)])
            order = parsed(kind, text, "The request's body")
        async with self.workers.alone:
            if kind is not wire.Lease:
                self._check(order.to)
            answer: Answer | None = await work(order)
            return answer

    def has_key(self, request: Request) -> bool:
        """The check of ms-swift 4.6.0, on every release."""
        key, given = self.server.args.api_key, request.headers.get("Authorization", "")
        return not key or hmac.compare_digest(given.encode(), f"Bearer {key}".encode())

    def is_allowed(self, request: Request) -> bool:
        """Whether ms-swift's own routes will accept this request: they check the key from 4.6.0 on."""
        return self.has_key(request) or not hasattr(self.server, "_require_api_key")

    # ---- what it is --------------------------------------------------------------------------------------------------

    async def status(self, _: Request) -> Answer:
        args, dtype = self.server.args, self._lora_dtype()
        return {
            "protocol": wire.PROTOCOL,
            "package": releases.installed_version(releases.OWN_DISTRIBUTION),
            "ms_swift": releases.installed_swift(),
            "vllm": releases.installed_vllm(),
            "host": this_host(),
            "holder": self.holder and str(self.holder),
            "enable_lora": bool(args.vllm_enable_lora),
            "max_lora_rank": args.vllm_max_lora_rank,
            "lora_dtype": str(dtype).split(".")[-1] if dtype is not None else None,
            "logits_processors": logits_processors(self._engine_kwargs().get("logits_processors"), LOGPROBS_MODE),
            "policy": self.policy and self.policy.as_dict(),
            "plain": self.plain,
            "workers": self.server.num_connections,
            "model": args.model,
        }

    async def base(self, _: Request) -> Answer:
        if self._sums is None or (self._sums.done() and self._sums.exception() is not None):
            arguments = self.server.args.model_dir, self._model_dtype()
            self._sums = asyncio.get_running_loop().run_in_executor(None, base_sums, *arguments)
        return {"sums": await asyncio.shield(self._sums)}  # once; others may wait for it too

    def _model_dtype(self) -> Any:
        info = getattr(self.server.args, "model_info", None)
        return getattr(info, "torch_dtype", None) or getattr(self.server.args, "torch_dtype", None)

    def _engine_kwargs(self) -> dict[str, Any]:
        return getattr(self.server.args, "vllm_engine_kwargs", None) or {}

    def _lora_dtype(self) -> Any:
        """The servers' LoRA dtype. vLLM's ``auto`` means the model's dtype."""
        asked = self._engine_kwargs().get("lora_dtype", "auto")
        return self._model_dtype() if asked == "auto" else getattr(torch, str(asked).split(".")[-1], None)

    # ---- who gives orders --------------------------------------------------------------------------------------------

    def living_holder(self) -> Holder | None:
        """Who has this server, if its process is known to be alive."""
        return self.holder if self.holder is not None and is_alive(self.holder) else None

    async def lease(self, order: wire.Lease) -> Answer:
        before, holder, displaced = self.holder, order.holder, None
        if before is not None and (before.host, before.pid, before.start) != (holder.host, holder.pid, holder.start):
            if is_alive(before):
                raise StagingError(
                    f"This rollout server is {before}'s, which is alive: end it first, or give each trainer servers of "
                    "its own.",
                    409,
                )
            displaced = str(before)
            warning(f"this rollout server was {before}'s and is {holder}'s from now on.")
        if before is not None and before.run != holder.run:
            await self._end()
        self.is_ours, self.holder, self.size, self.memory = True, holder, 0, None
        return {"before": displaced}

    def _check(self, to: wire.To) -> None:
        """Raise StagingError when the order is not for this process and base, or not from the holder."""
        if (to.boot, to.epoch) != (self.boot, self.epoch):
            raise StagingError(
                f"The order is for a server with boot {to.boot} and base {to.epoch}, this one has boot {self.boot} and "
                f"base {self.epoch}: it restarted, or its base was written over. Look at its base first.",
                ANOTHER,
            )
        if self.holder is None or to.run != self.holder.run:
            raise StagingError(f"This rollout server is not run {to.run}'s but {self.holder or 'nobody'}'s.", 409)
        problem = self.workers.what_is_wrong()
        if problem is not None:
            raise Refused(500, "EngineStateError", problem)

    # ---- the base ----------------------------------------------------------------------------------------------------

    async def push(self, order: wire.Push) -> None:
        if order.ends:
            await self._all(500, rpc={"command": "end_push"})
            self.is_pushing = False
        else:
            await self.base_changes()
            await self._all(500, rpc={"command": "begin_push"})
            self.is_pushing = True

    async def base_changes(self) -> None:
        """Somebody writes over the base: what was proved of it, and the policy that was served on it, end."""
        self.epoch += 1
        await self._end()

    async def _end(self) -> None:
        """Serve nothing until a policy is committed."""
        self.announced = self.staged = self.policy = None
        self.plain = self.is_pushing = False
        await self._tell()

    async def release(self) -> None:
        """A trainer without this package changes the adapter: forget what is known of it."""
        if self.is_ours:
            self.is_ours, self.holder = self.is_reload, None
            await self._end()

    # ---- policies ----------------------------------------------------------------------------------------------------

    async def prepare(self, order: wire.Prepare) -> None:
        self.size, self.memory, size = 0, None, Received.size_of(order.layout)
        if size > self.limit:
            raise StagingError(
                f"The adapter has {size} bytes, this server takes {self.limit}. Raise SWIFT_LORA_FIX_MAX_MIB (now "
                f"{self.limit >> 20}) where it is started, if such an adapter is meant.",
                413,
            )
        await self._all(rpc={"command": "prepare", "layout": order.layout.as_dict()})
        self.size = size

    async def stage(self, order: wire.Stage) -> Answer:
        policy, served = order.policy, self.policy
        if self.is_pushing:
            raise StagingError("A base was begun to be sent to this server and not ended: send it again.", 409)
        if not self.size:
            raise StagingError("This server has made no room for an adapter: send its layout first.", 409)
        if served not in (None, policy) and policy.run == served.run and policy.version <= served.version:
            raise StagingError(f"This server serves {served}, {policy} is not newer: send a newer version.", 409)
        self.announced = self.staged = None
        if order.nccl:
            await self._all(rpc={"command": "check_nccl"})
            self.announced = policy
            return {"policy": policy.as_dict()}
        self.memory = self.memory or Memory(self.size)
        self.announced = policy
        return {"policy": policy.as_dict(), "memory": self.memory.address.as_dict()}

    async def receive(self, order: wire.Receive) -> Answer:
        if order.policy != self.staged:  # equal: the trainer did not hear that it arrived
            self._check_announced(order)
            self.announced = None
            memory = self.memory.address.as_dict() if order.written and self.memory is not None else None
            await self._all(rpc={"command": "receive", "digest": order.policy.digest, "memory": memory})
            self.staged = order.policy
        return {"policy": order.policy.as_dict()}

    async def _body(self, order: wire.Receive, request: Request) -> None:
        """Write the body of what was announced into our memory."""
        self._check(order.to)
        self._check_announced(order)
        if self.memory is None:
            raise StagingError("The adapter was announced to come over NCCL, and came as a body.", 409)
        memory, at = self.memory, 0
        async for chunk in body_of(request, self.size):
            memory.view[at : at + len(chunk)] = chunk
            at += len(chunk)
        if at < memory.address.size:
            raise StagingError(f"The body has {at} bytes where {memory.address.size} were announced: send it again.")

    def _check_announced(self, order: wire.Receive) -> None:
        if order.policy not in (self.announced, self.staged):
            raise StagingError(f"{order.policy} was not announced to this server, it awaits {self.announced}.", 409)

    async def commit(self, order: wire.Commit) -> Answer:
        policy = order.policy
        if policy not in (self.policy, self.staged):
            staged = f"staged is {self.staged}" if self.staged is not None else "nothing is staged"
            raise StagingError(f"{policy} is not what every worker staged ({staged}): stage it first.", 409)
        if policy != self.policy:
            rpc = {"command": "serve", "digest": policy.digest, "by_reference": order.by_reference}
            await self._switch(policy, False, rpc)
            self.staged = None
        elif self.plain:
            await self._switch(policy, False)
        return {"policy": policy.as_dict()}

    async def serve(self, order: wire.Serve) -> Answer:
        await self._switch(self.policy, order.plain)
        return {"plain": self.plain}

    async def _switch(self, policy: Policy | None, plain: bool, rpc: Answer | None = None) -> None:
        """All workers serve this from now on; if that fails in one, the server serves nothing."""
        try:
            await self._all(500, serves=self._serves(policy, plain), rpc=rpc, switches=True)
        except Refused as refused:
            await self._end()
            nothing = " This server serves nothing until another policy is committed."
            raise Refused(refused.status, refused.kind, f"{refused}{nothing}") from None
        self.policy, self.plain = policy, plain

    # ---- the workers -------------------------------------------------------------------------------------------------

    def _serves(self, policy: Policy | None, plain: bool) -> Answer | None:
        """What rollouts come from (worker.py, ``Served``)."""
        if policy is None and not plain:
            return None
        about = {"boot": self.boot, "epoch": self.epoch, "plain": plain}
        return about if plain or policy is None else {**about, "policy": policy.as_dict()}

    async def _tell(self, **order: Any) -> list[Answer]:
        """An order to all workers. Unless it says what rollouts come from, that stays."""
        order = {"serves": self._serves(self.policy, self.plain), "ours": self.is_ours, **order}
        return await self.workers.ask(**order)

    async def _all(self, status: int = 422, **order: Any) -> None:
        """Have every worker do it. If any fails, raises Refused with what the failing ones said, each once."""
        failed = failures(await self._tell(**order))
        if failed:
            messages = " ".join(dict.fromkeys(answer["message"] for answer in failed))
            raise Refused(failed[0]["status"] or status, failed[0]["error"], messages)
