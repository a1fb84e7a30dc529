"""Trainer side of server mode: the rollout servers as one engine for a sync, the gate and a rollout.

All servers receive and prove the policy, then all switch to it. Every order names the process and the base that it is
for: a server that restarted, or whose base somebody wrote over, refuses it, and is looked after. Only the main rank
talks to servers (ms-swift gives no other rank a client); the other ranks are told the result.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ...common.clock import Clock
from ...common.log import info, warning
from ...common.settings import Settings
from ...errors import EngineStateError, PolicyMismatchError, RolloutServerError, StagingError
from ...trainer import TrainerPort
from ..hosts import this_host, this_process
from ..shared import Opened
from ..wire import BYTES, NO_NCCL, POLICY_HEADER, PROTOCOL, UNSEEN, Address, Layout, Lease, Policy, Receive, To
from .client import Bearer, Fresh, Servers
from .nccl import Connections, drop
from .parcel import Parcel


class RemoteEngine:
    """The rollout servers of one trainer. engine: ms-swift's ``VLLMClient``, on the main rank only, else None."""

    is_shared = True
    is_asleep = False
    cache_block = 128  # vLLM's largest default, that of its CPU backend

    def __init__(self, trainer: TrainerPort) -> None:
        settings = Settings.from_environment()
        self.engine = trainer.server_client
        self.run = uuid.uuid4().hex[:16]
        self.servers = Servers((), "", settings.server_deadline)  # none on other ranks
        self.policy: Policy | None = None  # the one that all of them serve
        self.seconds: dict[str, float] = {}  # of the last switch: ``stage`` and ``commit``
        self._is_plain = self._has_restored = False
        self._proved: dict[int, To] = {}  # by server: the process and the base that orders are for
        self._prepared: set[int] = set()  # servers that have made room
        self._opened: defaultdict[int, Opened] = defaultdict(Opened)  # by server: its memory, where it is on this host
        self._restore: Callable[[], None] = lambda: None
        self._only_nccl = settings.transport == "nccl"
        self.nccl: Connections | None = None
        if self.engine is not None:
            if settings.transport == "reload":
                drop(self.engine)
            else:
                self.nccl = Connections.of(self.engine, settings.server_deadline)
            _mount(self.engine, settings.rollout_deadline)  # without a deadline it would wait for a rollout for ever
            self.servers = Servers(self.engine.base_urls, settings.api_key, settings.server_deadline)
            self.check_fit()

    @property
    def lora_dtype(self) -> torch.dtype:
        """The dtype that all servers hold the adapter in; float32 on ranks that do not talk to them."""
        return getattr(torch, self.statuses[0]["lora_dtype"]) if self.engine is not None else torch.float32

    @property
    def logits_processors(self) -> list[str]:
        """Of all servers, each once; none on ranks that do not talk to them."""
        statuses = self.statuses if self.engine is not None else ()
        return list(dict.fromkeys(name for status in statuses for name in status["logits_processors"]))

    @property
    def max_lora_rank(self) -> int:
        return min(int(status["max_lora_rank"]) for status in self.statuses)

    def is_of(self, trainer: TrainerPort) -> bool:
        """Whether the trainer still has this client. Other ranks have none to lose."""
        return self.engine is None or trainer.server_client is self.engine

    def on_restart(self, restore: Callable[[], None]) -> None:
        """Set ``restore``, which sends the policy again where it was lost. It is called on the main rank."""
        self._restore = restore

    def _ask(self, route: str = "status") -> list[dict[str, Any]]:
        return self.servers.each(lambda index: self.servers.get(index, route))

    def check_fit(self) -> None:
        """Take the servers. Raises RolloutServerError when one cannot take policies from this trainer, or is another
        living trainer's."""
        self.statuses = self._ask()
        dtypes = {status.get("lora_dtype") for status in self.statuses}
        for url, status in zip(self.servers.urls, self.statuses):
            if status.get("protocol") != PROTOCOL:
                raise RolloutServerError(
                    f"Rollout server {url} speaks protocol {status.get('protocol')!r} of swift_lora_fix, this trainer "
                    f"{PROTOCOL}: install the same version on both sides."
                )
            if not status.get("enable_lora"):
                raise RolloutServerError(f"Rollout server {url} has no LoRA layers: add --vllm_enable_lora true there.")
        if len(dtypes) != 1 or not isinstance(getattr(torch, str(*dtypes), None), torch.dtype):
            raise RolloutServerError(
                f"The rollout servers hold a LoRA in {sorted(map(str, dtypes))}: start all of them with the same "
                "--torch_dtype."
            )
        self._prepared = set()
        lease = Lease(holder=this_process(self.run)).as_dict()
        answers = self.servers.each(lambda index: self.servers.post(index, "lease", json=lease))
        for url, answer in zip(self.servers.urls, answers):
            if answer["before"] is not None:
                warning(f"rollout server {url} was {answer['before']}'s until now: its orders are refused there.")

    def prove(self, answers: list[dict[str, Any]]) -> None:
        """From now on, orders are for the processes and bases that these answers came from."""
        self._proved = {
            index: To(boot=answer["boot"], epoch=answer["epoch"], run=self.run) for index, answer in enumerate(answers)
        }

    def base_sums(self) -> list[dict[str, Any]]:
        return self._ask("base")

    def _serves(self, index: int, status: dict[str, Any]) -> bool:
        """Whether this server serves ``policy``, as the process and on the base that were proved."""
        to = self._proved.get(index)
        is_proved = to is not None and (status["boot"], status["epoch"]) == (to.boot, to.epoch)
        return (
            is_proved and not status["plain"] and self.policy is not None and status["policy"] == self.policy.as_dict()
        )

    def have_policy(self) -> bool:
        """Whether all servers still serve ``policy``: they may have restarted, or were given another one. Asks them."""
        if self.policy is None:
            return True
        statuses = enumerate(zip(self.servers.urls, self._ask()))
        lost = [url for index, (url, status) in statuses if not self._serves(index, status)]
        for url in lost:
            warning(f"rollout server {url} does not serve the policy of step {self.policy.step}.")
        return not lost

    @property
    def reaches_all(self) -> bool:
        """Whether NCCL is open to every server, so that ms-swift can send a base."""
        return self.nccl is not None and self.nccl.all_are_open()

    def push(self, ends: bool) -> list[dict[str, Any]]:
        """Called before and after ms-swift sends the base over NCCL. Raises RolloutServerError if a worker failed."""
        return self._order("push", ends=ends)

    def renew(self) -> None:
        """Take the servers again, reopen NCCL to those that restarted, and have the next rollout checked whole again.
        Raises RolloutServerError for a server that cannot take policies."""
        self._has_restored = True
        for index, status in enumerate(self._ask()):  # before it is anybody's: then it refuses to be connected
            if self.nccl is not None and index in self._proved and self._proved[index].boot != status["boot"]:
                self.nccl.reopen(index)
        self.check_fit()  # it may be a different server now

    def switch(self, parcel: Parcel, layout: Layout, by_reference: bool = False) -> None:
        """Have all servers serve a policy. by_reference: through vLLM's own loader. Raises RolloutServerError with the
        failing servers' own messages: before the first commit all serve what they served, after it nothing is
        generated until a switch succeeds."""
        clock = Clock()
        self.servers.each(lambda index: self._stage(index, parcel, layout))
        clock.lap("stage")
        self.policy = None
        self._order("commit", policy=parcel.policy.as_dict(), by_reference=by_reference)
        self.policy = parcel.policy
        self._announce(parcel.policy)
        clock.lap("commit")
        self.seconds = clock.laps

    def _post(self, index: int, route: str, **content: Any) -> dict[str, Any]:
        """An order to one server."""
        if index not in self._proved:
            raise EngineStateError("No base was compared with this rollout server's yet.")
        return self.servers.post(index, route, json={"to": self._proved[index].as_dict(), **content})

    def _order(self, route: str, **content: Any) -> list[dict[str, Any]]:
        return self.servers.each(lambda index: self._post(index, route, **content))

    def _stage(self, index: int, parcel: Parcel, layout: Layout) -> None:
        """Over NCCL if that is open; otherwise by shared memory of this host, or in the body."""
        policy, url = parcel.policy.as_dict(), self.servers.urls[index]
        if index not in self._prepared:
            self._post(index, "prepare", layout=layout.as_dict())
            self._prepared.add(index)
        if self.nccl is not None and self.nccl.is_open(index):
            try:
                self._post(index, "stage", policy=policy, nccl=True)
            except RolloutServerError as error:
                if error.status != NO_NCCL or self._only_nccl:
                    raise
                self.nccl.close(index, str(error))
            else:
                ask = partial(self._post, index, "receive", policy=policy)
                self.nccl.send(index, parcel.buffer, ask, self.servers.deadline)
                return
        elif self._only_nccl:
            raise RolloutServerError(
                f"There is no NCCL connection to rollout server {url}, which SWIFT_LORA_FIX_TRANSPORT=nccl asks for: "
                "unset it, or use reload."
            )
        memory, content = self._post(index, "stage", policy=policy, nccl=False)["memory"], parcel.content
        if this_host() and self.statuses[index]["host"] == this_host():
            try:
                self._opened[index].at(Address.model_validate(memory), pins=content.is_cuda).copy_(content)
                self._post(index, "receive", policy=policy, written=True)
                return
            except StagingError as error:
                info(f"rollout server {url} gets the adapter as a body: {error}")
        order = Receive(to=self._proved[index], policy=parcel.policy).model_dump_json()
        headers = {POLICY_HEADER: order, "Content-Type": BYTES, "Content-Length": str(content.numel())}
        self.servers.post(index, "receive", blocks=parcel.blocks, headers=headers)

    def _announce(self, policy: Policy | None) -> None:
        """Make ms-swift's own rollout requests name the policy that they need."""
        for session in self.engine.sessions if self.engine is not None else ():
            session.headers.pop(POLICY_HEADER, None)
            if policy is not None:
                session.headers[POLICY_HEADER] = policy.model_dump_json()

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """The servers without the adapter, for the gate."""
        self._announce(None)
        self._is_plain = True
        try:
            self._order("serve", plain=True)
            yield
        finally:
            self._is_plain = False
            try:
                self._order("serve", plain=False)
            finally:
                self._announce(self.policy)

    def reset_caches(self) -> None:
        """Make all servers drop their caches."""
        self._order("serve", plain=False)

    def make_ready(self) -> bool:
        """Before rollouts: send the policy again to servers that lost it. Returns whether any did. Raises
        RolloutServerError for a server that does not come back within the deadline."""
        if not self.have_policy():
            self._restore()
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
            warning(f"a rollout failed: {str(error)[:500]}; looking after the rollout servers.")
            if plain or self.have_policy():
                raise
            self._restore()
            outputs = infer()
        proved = {(to.boot, to.epoch) for to in self._proved.values()}
        for output in outputs:
            infos = getattr(output, "rollout_infos", None) or {}
            if plain and not infos.get("policy_plain"):
                raise PolicyMismatchError("A rollout server made a rollout by an adapter while the base was asked for.")
            if not plain and infos.get("policy_digest") != policy.digest:
                raise PolicyMismatchError(
                    f"A rollout was made by policy {infos.get('policy_digest')} of step {infos.get('policy_step')}, "
                    f"asked for was {policy.digest} of step {policy.step}. Nothing of this batch was used."
                )
            if (infos.get("server_boot"), infos.get("server_epoch")) not in proved:
                raise PolicyMismatchError(
                    f"A rollout was made by a server process (boot {infos.get('server_boot')}) or on a base (epoch "
                    f"{infos.get('server_epoch')}) that nobody proved. Nothing of this batch was used."
                )
        return outputs


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
        bare = [error for error in failed if error.status == UNSEEN]
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
