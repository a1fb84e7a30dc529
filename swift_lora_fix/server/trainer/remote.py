"""Trainer side of server mode: the rollout servers as one engine for a sync, the gate and a rollout.

All or nothing: every server stages and checks the policy, then all switch to it. Before each rollout, a server that
restarted is recognised by its boot id and the policy it says it serves, and is sent everything again. Only the main
rank talks to servers (ms-swift gives no other rank a client); the other ranks are told the result.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ...common.clock import Clock
from ...common.log import info, warning
from ...common.settings import Settings
from ...errors import EngineStateError, PolicyMismatchError, RolloutServerError
from ...trainer import TrainerPort
from ..wire import BYTES, GONE, NO_NCCL, POLICY_HEADER, PROTOCOL, Layout, Policy
from .client import Bearer, Fresh, Servers
from .nccl import Connections, drop
from .parcel import Parcel
from .store import Stored

ABORT_SECONDS = 10.0  # short: a server that hangs has used up its deadline already
BLOCK = 1 << 20  # bytes of a body that are sent at once
MISSING = 404  # the status of a server that cannot see our folders


class RemoteEngine:
    """The rollout servers of one trainer. engine: ms-swift's ``VLLMClient``, on the main rank only, else None."""

    is_shared = True
    is_asleep = False
    cache_block = 128  # vLLM's largest default, that of its CPU backend

    def __init__(self, trainer: TrainerPort) -> None:
        settings = Settings.from_environment()
        self.engine = trainer.server_client
        self.servers: Servers | None = None
        self.policy: Policy | None = None  # the one that all of them serve
        self.seconds: dict[str, float] = {}  # of the last switch: ``stage`` and ``commit``
        self._is_plain = self._has_restored = False
        self._boots: dict[int, str] = {}  # boot id by server
        self._restore: Callable[[list[int]], None] = lambda lost: None
        self._inlined: set[int] = set()  # servers that cannot see our folders
        self._told: dict[int, str] = {}  # by server: key of the layout sent last
        self._only_nccl = settings.transport == "nccl"
        self.nccl: Connections | None = None
        if self.engine is not None:
            if settings.transport == "reload":
                drop(self.engine)
            else:
                self.nccl = Connections.of(self.engine)
            _mount(self.engine, settings.rollout_deadline)  # without a deadline it would wait for a rollout for ever
            self.servers = Servers(self.engine.base_urls, settings.api_key, settings.server_deadline)
            self.check_fit()

    @property
    def lora_dtype(self) -> torch.dtype | None:
        """The dtype that the servers hold the adapter in; None if they do not say, or differ."""
        told = {status.get("lora_dtype") for status in self.statuses} if self.servers else set()
        dtype = getattr(torch, str(told.pop()).removeprefix("torch."), None) if len(told) == 1 else None
        return dtype if isinstance(dtype, torch.dtype) else None

    @property
    def max_lora_rank(self) -> int:
        return min(int(status["max_lora_rank"]) for status in self.statuses)

    def is_of(self, trainer: TrainerPort) -> bool:
        """Whether the trainer still has this client. Other ranks have none to lose."""
        return self.engine is None or trainer.server_client is self.engine

    def on_restart(self, restore: Callable[[list[int]], None]) -> None:
        """Set ``restore``, which sends the policy again to servers that lost it. It is called on the main rank."""
        self._restore = restore

    def _ask(self) -> list[dict[str, Any]]:
        assert self.servers is not None
        return self.servers.each(lambda index: self.servers.get(index, "status"))  # type: ignore[union-attr]

    def check_fit(self) -> None:
        """Raise RolloutServerError when a server cannot take policies from this trainer."""
        assert self.servers is not None
        self.statuses = self._ask()
        for url, status in zip(self.servers.urls, self.statuses):
            if status.get("protocol") != PROTOCOL:
                raise RolloutServerError(
                    f"Rollout server {url} speaks protocol {status.get('protocol')!r} of swift_lora_fix, this trainer "
                    f"{PROTOCOL}: install the same version on both sides."
                )
            if not status.get("enable_lora"):
                raise RolloutServerError(f"Rollout server {url} has no LoRA layers: add --vllm_enable_lora true there.")

    def lost(self) -> list[int]:
        """Servers that do not serve ``policy``: they restarted, or were given another one. All must answer."""
        if self.servers is None or self.policy is None:
            return []
        statuses = self._ask()
        boots = [status["boot"] for status in statuses]
        served = [status["policy"] == self.policy.as_dict() and not status["plain"] for status in statuses]
        found = [i for i, fine in enumerate(served) if not fine or boots[i] != self._boots[i]]
        for index in found:
            warning(f"rollout server {self.servers.urls[index]} does not serve the policy of step {self.policy.step}.")
        return found

    @property
    def reaches_all(self) -> bool:
        """Whether NCCL is open to every server, so that ms-swift can send a base."""
        return self.nccl is not None and self.nccl.all_are_open()

    def check_pushed(self) -> None:
        """Called after ms-swift sent the base over NCCL. Raises RolloutServerError if a worker failed."""
        self._post("pushed", {})

    def forget_failures(self) -> None:
        """Discard failures that earlier runs left behind."""
        with contextlib.suppress(RolloutServerError):
            self.check_pushed()

    def restarted(self) -> list[int]:
        """Servers that restarted since the last switch. All must answer."""
        boots = [status["boot"] for status in self._ask()] if self._boots else []
        return [index for index, boot in enumerate(boots) if boot != self._boots[index]]

    def renew(self, lost: list[int]) -> None:
        """Reopen NCCL to those of ``lost`` that restarted, and have the next rollout checked whole again. Raises
        RolloutServerError for a server that cannot take policies."""
        before, self._has_restored = self._boots, True
        self.check_fit()  # it may be a different server now
        for index in lost if self.nccl is not None else ():
            if before[index] != self.statuses[index]["boot"]:
                self.nccl.reopen(index)  # type: ignore[union-attr]
                self._boots[index] = self.statuses[index]["boot"]

    def switch(self, parcel: Parcel, only: list[int] | None = None, by_reference: bool = False) -> None:
        """Have all servers (or those in ``only``) serve a policy. by_reference: through vLLM's own loader. Raises
        RolloutServerError with the failing servers' own messages; all servers then serve what they served before,
        unless the message says otherwise."""
        assert self.servers is not None
        policy, clock = {"policy": parcel.policy.as_dict()}, Clock()
        try:
            self.servers.each(lambda index: self._stage(index, parcel), only)
        except BaseException:
            with contextlib.suppress(RolloutServerError):
                self._post("abort", policy, only, ABORT_SECONDS)
            raise
        clock.lap("stage")
        self.policy = None  # until commit returns, servers may differ
        answers = self._post("commit", {**policy, **({"by_reference": True} if by_reference else {})}, only)
        for index, answer in zip(range(len(self.servers.urls)) if only is None else only, answers):
            self._boots[index] = answer["boot"]
        self.policy = parcel.policy
        self._announce(parcel.policy)
        clock.lap("commit")
        self.seconds = clock.laps

    def _post(
        self, route: str, content: dict[str, Any], only: list[int] | None = None, deadline: float | None = None
    ) -> list[dict[str, Any]]:
        servers = self.servers
        assert servers is not None
        return servers.each(lambda index: servers.post(index, route, deadline, json=content), only)

    def _stage(self, index: int, parcel: Parcel) -> None:
        """Send over NCCL if that is open; otherwise by the folder if the server sees it, or in the body."""
        assert self.servers is not None
        policy = {"policy": parcel.policy.as_dict()}
        if self.nccl is not None and self.nccl.is_open(index):
            try:
                if parcel.is_here:
                    self._announce_to(index, parcel.layout, policy)
                    self._send(index, parcel, policy)
                else:
                    self.servers.post(index, "find", json=policy)
                return
            except RolloutServerError as error:
                if error.status != NO_NCCL or self._only_nccl:
                    raise
                self.nccl.close(index, str(error))
        elif self._only_nccl:
            raise RolloutServerError(
                f"There is no NCCL connection to rollout server {self.servers.urls[index]}, which "
                "SWIFT_LORA_FIX_TRANSPORT=nccl asks for: unset it, or use reload."
            )
        self._hand_over(index, parcel.policy, parcel.stored())

    def _announce_to(self, index: int, layout: Layout, policy: dict[str, Any]) -> None:
        """Announce the next bytes. The whole layout is sent only if this server does not have it yet."""
        assert self.servers is not None
        if self._told.get(index) == layout.key:
            try:
                self.servers.post(index, "stage", json={**policy, "layout": layout.key})
                return
            except RolloutServerError as error:
                if error.status != GONE:
                    raise
        self.servers.post(index, "stage", json={**policy, "layout": layout.as_dict()})
        self._told[index] = layout.key

    def _send(self, index: int, parcel: Parcel, policy: dict[str, Any]) -> None:
        servers, nccl = self.servers, self.nccl
        assert servers is not None and nccl is not None
        ask = partial(servers.post, index, "receive", json=policy)
        nccl.send(index, parcel.buffer, ask, servers.deadline)

    def _hand_over(self, index: int, policy: Policy, stored: Stored) -> None:
        servers = self.servers
        assert servers is not None
        about = {"policy": policy.as_dict(), "digest": stored.digest}
        if index not in self._inlined:
            try:
                servers.post(index, "stage", json={**about, "folder": str(stored.folder)})
                return
            except RolloutServerError as error:
                if error.status != MISSING:
                    raise
            self._inlined.add(index)
            info(f"rollout server {servers.urls[index]} does not see {stored.folder.parent}: adapters go over HTTP.")
        headers = {
            POLICY_HEADER: json.dumps({**about, "config": stored.config}),
            "Content-Type": BYTES,
        }
        weights = memoryview(stored.weights)
        headers["Content-Length"] = str(len(weights))
        blocks = lambda: (bytes(weights[at : at + BLOCK]) for at in range(0, len(weights), BLOCK))  # noqa: E731
        servers.post(index, "stage", blocks=blocks, headers=headers)

    def _announce(self, policy: Policy | None) -> None:
        """Make ms-swift's own rollout requests name the policy that they need."""
        for session in self.engine.sessions if self.engine is not None else ():
            session.headers.pop(POLICY_HEADER, None)
            if policy is not None:
                session.headers[POLICY_HEADER] = json.dumps(policy.as_dict())

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """The servers without the adapter, for the gate."""
        self._announce(None)
        self._is_plain = True
        try:
            self._post("serve", {"plain": True})
            yield
        finally:
            self._is_plain = False
            try:
                self._post("serve", {"plain": False})
            finally:
                self._announce(self.policy)

    def reset_caches(self) -> None:
        """Make all servers drop their caches."""
        self._post("serve", {"plain": False})

    def make_ready(self) -> bool:
        """Before rollouts: send the policy again to servers that lost it. Returns whether any did. Raises
        RolloutServerError for a server that does not come back within the deadline."""
        lost = self.lost()
        if lost:
            self._restore(lost)
        restored, self._has_restored = self._has_restored, False
        return restored

    def generate(self, infer: Callable[[], Any]) -> Any:
        """Run the rollouts, and check that the right policy made each. If servers restarted meanwhile, wait for them,
        send the policy again and retry once. Raises PolicyMismatchError for a rollout of another policy."""
        policy, plain = self.policy, self._is_plain
        if policy is None:
            raise EngineStateError(
                "The rollout servers may serve different policies: nothing is generated until a sync."
            )
        try:
            outputs = infer()
        except (RuntimeError, OSError) as error:  # ms-swift's client turns every failure into a RuntimeError
            if not self._came_back(error):
                raise
            outputs = infer()
        for output in outputs:
            infos = getattr(output, "rollout_infos", None) or {}
            if plain and not infos.get("policy_plain"):
                raise PolicyMismatchError("A rollout server made a rollout by an adapter while the base was asked for.")
            if not plain and infos.get("policy_digest") != policy.digest:
                raise PolicyMismatchError(
                    f"A rollout was made by policy {infos.get('policy_digest')} of step {infos.get('policy_step')}, "
                    f"asked for was {policy.digest} of step {policy.step}. Nothing of this batch was used."
                )
        return outputs

    def _came_back(self, error: Exception) -> bool:
        """Whether servers had lost the policy and now have it again."""
        warning(f"a rollout failed: {str(error)[:500]}; looking after the rollout servers.")
        try:
            lost = [] if self._is_plain else self.lost()
            if not lost:
                return False
            self._restore(lost)
        except RolloutServerError as gone:
            raise gone from error
        return True


def prepare_client(client: Any) -> None:
    """Before ms-swift's ``VLLMClient`` asks servers anything: make it send the key of SWIFT_LORA_FIX_API_KEY, which it
    does not know, and use a new connection for each call. None: there is no client."""
    settings = Settings.from_environment()
    if client is None:
        return
    for session in client.sessions if settings.api_key else ():
        session.auth = Bearer(settings.api_key)
    _mount(client, settings.rollout_deadline if settings.transport == "reload" else None)


def _mount(client: Any, seconds: float | None) -> None:
    """Make its sessions, each used by one thread, send through `Fresh`."""
    for session in client.sessions:
        for scheme in ("http://", "https://"):
            session.mount(scheme, Fresh(seconds))


def why_not(trainer: TrainerPort) -> str | None:
    """Why the trainer's rollout servers cannot take policies, in words; None when they can. All ranks together.

    Only servers that are all without this package are a reason. Raises RolloutServerError for anything else: a run that
    stepped aside because of it would train on what this package exists to prevent.
    """
    settings = Settings.from_environment()
    reason: list[str | None] = [None, None]
    if trainer.is_main_rank:
        servers = Servers(trainer.server_client.base_urls, settings.api_key, settings.server_deadline)
        answers = servers.tried(lambda index: servers.get(index, "status"))
        failed = [answer for answer in answers if isinstance(answer, RolloutServerError)]
        bare = [error for error in failed if error.status == MISSING]
        if len(bare) == len(answers):
            reason[0] = "the rollout server is without swift_lora_fix: start it with --external_plugins, too"
        elif bare == failed != []:
            reason[1] = (
                f"{len(bare)} of {len(answers)} rollout servers are without swift_lora_fix, start them with "
                f"--external_plugins, too: {'; '.join(map(str, bare))}."
            )
        elif failed:
            reason[1] = "; ".join(map(str, failed))
    if trainer.ranks > 1:
        torch.distributed.broadcast_object_list(reason, src=0, device=trainer.device)
    if reason[1] is not None:
        raise RolloutServerError(f"{reason[1]} Nothing was trained.")
    return reason[0]
