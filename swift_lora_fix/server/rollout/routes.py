"""In the web server's process: the routes, who may call them, and that all workers do something or none."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import threading
from collections.abc import Callable
from typing import Any

import torch
from fastapi import APIRouter
from starlette.requests import Request

from ...common.log import info, warning
from ...common.settings import Settings
from ...errors import AccessError, StagingError
from ...install import releases
from ...policy.model_files import base_sums
from .. import wire as protocol
from ..hosts import is_alive, this_host
from ..shared import Memory
from ..wire import (
    ANOTHER,
    BYTES,
    POLICY_HEADER,
    PROTOCOL,
    Commit,
    Holder,
    Lease,
    Policy,
    Push,
    Receive,
    Serve,
    Stage,
    To,
    parsed,
)
from .pipes import Workers, failures
from .requests import Refused, body_of, route_class

Answer = dict[str, Any]


class Policies:
    """What one server has staged and serves. ``server`` is ms-swift's ``SwiftRolloutDeploy``."""

    def __init__(self, server: Any, is_reload: bool) -> None:
        self.server, self.is_reload = server, is_reload
        self.is_ours = is_reload  # else the trainer may be one without this package
        self.workers = Workers(server, Settings.from_environment().server_deadline)
        self.boot, self.epoch = secrets.token_hex(8), 0
        self.holder: Holder | None = None
        self.is_pushing = False  # the holder sends a base
        self.announced: Policy | None = None
        self.size = 0  # bytes of what was announced
        self.staged: Policy | None = None
        self.policy: Policy | None = None
        self.plain = False
        self._sums: dict[str, list[Any]] | None = None
        self._summing = threading.Lock()

    def install(self, app: Any) -> None:
        router = APIRouter(prefix=protocol.PREFIX, route_class=route_class(self.check_key), include_in_schema=False)
        for path, work in {"status": self.status, "base": self.base}.items():
            router.get(f"/{path}/", response_model=None)(work)
        orders: dict[str, Callable[..., Any]] = {
            "lease": self.lease,
            "push": self.push,
            "stage": self.stage,
            "receive": self.receive,
            "commit": self.commit,
            "serve": self.serve,
        }
        for path, work in orders.items():
            router.post(f"/{path}/", response_model=None)(work)
        app.include_router(router)
        ways = "shared memory and HTTP" if self.is_reload else "NCCL, shared memory and HTTP"
        info(f"the rollout server takes adapters below {protocol.PREFIX}: by {ways}.")

    def check_key(self, request: Request) -> None:
        """The check of ms-swift 4.6.0, on every release. Raises Refused."""
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

    def is_allowed(self, request: Request) -> bool:
        """Whether ms-swift's own routes will accept this request: they check the key from 4.6.0 on."""
        try:
            self.check_key(request)
        except Refused:
            return not hasattr(self.server, "_require_api_key")
        return True

    # ---- what it is --------------------------------------------------------------------------------------------------

    def _speaking(self, answer: Answer) -> Answer:
        return {"boot": self.boot, "epoch": self.epoch, **answer}

    async def status(self) -> Answer:
        args = self.server.args
        dtype = self._lora_dtype()
        return self._speaking(
            {
                "protocol": PROTOCOL,
                "package": releases.installed_version(releases.OWN_DISTRIBUTION),
                "ms_swift": releases.installed_swift(),
                "vllm": releases.installed_vllm(),
                "host": this_host(),
                "holder": self.holder and str(self.holder),
                "enable_lora": bool(args.vllm_enable_lora),
                "max_lora_rank": args.vllm_max_lora_rank,
                "lora_dtype": str(dtype).split(".")[-1] if dtype is not None else None,
                "policy": self.policy and self.policy.as_dict(),
                "plain": self.plain,
                "workers": self.server.num_connections,
                "model": args.model,
            }
        )

    async def base(self) -> Answer:
        return self._speaking({"sums": await asyncio.get_running_loop().run_in_executor(None, self._base_sums)})

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

    # ---- who gives orders --------------------------------------------------------------------------------------------

    def living_holder(self) -> Holder | None:
        """Who has this server, if its process is known to be alive."""
        return self.holder if self.holder is not None and is_alive(self.holder) else None

    async def lease(self, order: Lease) -> Answer:
        async with self.workers.alone:
            before, holder = self.holder, order.holder
            if before is None or (before.host, before.pid, before.start) == (holder.host, holder.pid, holder.start):
                displaced = None
            elif is_alive(before):
                raise StagingError(
                    f"This rollout server is {before}'s, which is alive: end it first, or give each trainer servers of "
                    "its own.",
                    409,
                )
            else:
                displaced = str(before)
                warning(f"this rollout server was {before}'s and is {holder}'s from now on.")
            if before is not None and before.run != holder.run:
                await self._end()
            self.is_ours, self.holder = True, holder
            return self._speaking({"before": displaced})

    def _check(self, to: To) -> None:
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

    async def push(self, order: Push) -> Answer:
        async with self.workers.alone:
            self._check(order.to)
            if not order.ends:
                await self.base_changes()
                self.is_pushing = True
            else:
                await self._all("pushed", 500)
                self.is_pushing = False
            return self._speaking({})

    async def base_changes(self) -> None:
        """Somebody writes over the base: what was proved of it, and the policy that was served on it, end."""
        self.epoch += 1
        await self._end()
        await self._ask("forget_failures")

    async def _end(self) -> None:
        """Serve nothing until a policy is committed."""
        self.announced = self.staged = self.policy = None
        self.plain = self.is_pushing = False
        await self._ask("drop")

    async def release(self) -> None:
        """A trainer without this package changes the adapter: forget what is known of it."""
        if self.is_ours:
            await self._end()
            await self._ask("release")
            self.is_ours, self.holder = False, None

    # ---- policies ----------------------------------------------------------------------------------------------------

    async def stage(self, order: Stage) -> Answer:
        async with self.workers.alone:
            self._check(order.to)
            policy, served = order.policy, self.policy
            if self.is_pushing:
                raise StagingError("A base was begun to be sent to this server and not ended: send it again.", 409)
            if served not in (None, policy) and policy.run == served.run and policy.version <= served.version:
                raise StagingError(f"This server serves {served}, {policy} is not newer: send a newer version.", 409)
            self.announced = self.staged = None
            layout = order.layout if isinstance(order.layout, str) else order.layout.as_dict()
            answers = await self._all("stage", policy=policy, layout=layout, nccl=order.nccl)
            self.size = answers[0]["size"]
            self.announced = policy
            return self._speaking({"policy": policy.as_dict()})

    async def receive(self, request: Request) -> Answer:
        if request.headers.get("Content-Type", "").startswith(BYTES):
            order = parsed(Receive, request.headers.get(POLICY_HEADER, ""), f"The header {POLICY_HEADER}")
            memory = await self._body(order, request)
            order = order.model_copy(update={"memory": memory.address})
        else:
            order = parsed(Receive, await request.body(), "The request's body")
        async with self.workers.alone:
            self._check(order.to)
            if order.policy != self.staged:  # equal: the trainer did not hear that it arrived
                self._check_announced(order)
                self.announced = None
                await self._all("receive", policy=order.policy, memory=order.memory and order.memory.as_dict())
                self.staged = order.policy
            return self._speaking({"policy": order.policy.as_dict()})

    async def _body(self, order: Receive, request: Request) -> Memory:
        """The body of what was announced, in memory of this process that the workers can open."""
        self._check(order.to)
        self._check_announced(order)
        memory, at = Memory(self.size), 0
        async for chunk in body_of(request, self.size):
            memory.view[at : at + len(chunk)] = chunk
            at += len(chunk)
        if at < memory.address.size:
            raise StagingError(f"The body has {at} bytes where {memory.address.size} were announced: send it again.")
        return memory

    def _check_announced(self, order: Receive) -> None:
        if order.policy not in (self.announced, self.staged):
            raise StagingError(f"{order.policy} was not announced to this server, it awaits {self.announced}.", 409)

    async def commit(self, order: Commit) -> Answer:
        async with self.workers.alone:
            self._check(order.to)
            policy = order.policy
            if policy != self.policy:
                if policy != self.staged:
                    staged = f"staged is {self.staged}" if self.staged is not None else "nothing is staged"
                    raise StagingError(f"{policy} is not what every worker staged ({staged}): stage it first.", 409)
                try:
                    await self._all("commit", 500, policy=policy, by_reference=order.by_reference)
                except Refused as refused:
                    await self._end()
                    nothing = " This server serves nothing until another policy is committed."
                    raise Refused(refused.status, refused.kind, f"{refused}{nothing}") from None
                self.policy, self.plain, self.staged = policy, False, None
            elif self.plain:
                await self._serve(False)
            return self._speaking({"policy": policy.as_dict()})

    async def serve(self, order: Serve) -> Answer:
        async with self.workers.alone:
            self._check(order.to)
            await self._serve(order.plain)
            return self._speaking({"plain": self.plain})

    async def _serve(self, plain: bool) -> None:
        try:
            await self._all("serve", 500, plain=plain)
        except Refused:
            await self._end()
            raise
        self.plain = plain

    # ---- the workers -------------------------------------------------------------------------------------------------

    async def _ask(self, command: str, **arguments: Any) -> list[Answer]:
        arguments = {name: value.as_dict() if isinstance(value, Policy) else value for name, value in arguments.items()}
        return await self.workers.ask(command, speaks=(self.boot, self.epoch), **arguments)

    async def _all(self, command: str, status: int = 422, **arguments: Any) -> list[Answer]:
        """Have every worker do it. If any fails, raises Refused with what the failing ones said, each once."""
        answers = await self._ask(command, **arguments)
        failed = failures(answers)
        if failed:
            messages = " ".join(dict.fromkeys(answer["message"] for answer in failed))
            raise Refused(failed[0]["status"] or status, failed[0]["error"], messages)
        return answers
