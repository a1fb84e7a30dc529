"""Trainer side of server mode: what a sync, the gate and a rollout ask of an engine, answered by rollout servers.

All or nothing: every server stages and checks the policy, then all switch to it. A server that restarted is found out
before each rollout, by its boot id and the policy it says it serves, and is sent everything again. Only the main rank
talks to servers (ms-swift gives only that one a client); the others learn how it went.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import adapter as adapters
from ..adapter import Adapter
from ..digest import checksum
from ..engine import loader
from ..engine.finite import FiniteCheck
from ..engine.staging import host_digest
from ..engine.writer import Clock, WriteReport, ranks_agree
from ..errors import (
    BaseMismatchError,
    EngineStateError,
    PolicyMismatchError,
    RolloutServerError,
    UnsupportedAdapterError,
)
from ..log import info, warning
from ..settings import Settings
from .client import Patient, Servers
from .protocol import BYTES, POLICY_HEADER, PROTOCOL, Policy, root_of
from .store import Store, Stored

ABORT_SECONDS = 10.0  # a server that hangs has cost its deadline already
MISSING = 404  # what a server answers that does not see our folders


Sums = dict[str, tuple[torch.dtype, tuple[int, ...], int]]  # by name: dtype, whole shape, checksum


class RemoteEngine:
    """The rollout servers of one trainer. ``engine`` is ms-swift's ``VLLMClient``, None but on the main rank."""

    is_remote = True
    is_asleep = False

    def __init__(self, trainer: Any) -> None:
        settings = Settings.from_environment()
        self.engine = getattr(trainer, "vllm_client", None) if trainer.accelerator.is_main_process else None
        self.servers: Servers | None = None
        self.policy: Policy | None = None  # what all of them serve
        self._is_plain = self._has_restored = False
        self._boots: list[str] = []
        self._restore: Callable[[list[int]], None] = lambda lost: None
        self._inlined: set[int] = set()  # servers that do not see our folders
        if self.engine is not None:
            _drop_communicators(self.engine)
            self.servers = Servers(self.engine.base_urls, settings.api_key, settings.server_deadline)
            self.check_fit()

    @property
    def lora_dtype(self) -> torch.dtype | None:
        """What the servers hold the adapter in; None where they do not tell."""
        told = {status.get("lora_dtype") for status in self.statuses} if self.servers else set()
        dtype = getattr(torch, str(told.pop()).removeprefix("torch."), None) if len(told) == 1 else None
        return dtype if isinstance(dtype, torch.dtype) else None

    @property
    def max_lora_rank(self) -> int:
        return min(int(status["max_lora_rank"]) for status in self.statuses)

    def check_idle(self) -> None:
        """Servers take one command at a time: a policy waits for the rollouts before it."""

    def reset_caches(self) -> None:
        """Servers do that when they switch."""

    def on_restart(self, restore: Callable[[list[int]], None]) -> None:
        """``restore`` sends the policy to these servers, which lost it; from the main rank alone."""
        self._restore = restore

    def _ask(self) -> list[dict[str, Any]]:
        assert self.servers is not None
        return self.servers.each(lambda index: self.servers.get(index, "status"))  # type: ignore[union-attr]

    def check_fit(self) -> None:
        """Raise RolloutServerError where one cannot take policies from this trainer."""
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
        """Servers that do not serve ``policy``: restarted, or given another one. All must answer."""
        if self.servers is None or self.policy is None:
            return []
        statuses = self._ask()
        boots = [status["boot"] for status in statuses]
        served = [status["policy"] == self.policy.as_dict() and not status["plain"] for status in statuses]
        found = [i for i, fine in enumerate(served) if not fine or boots[i] != self._boots[i]]
        for index in found:
            warning(f"rollout server {self.servers.urls[index]} does not serve the policy of step {self.policy.step}.")
        return found

    def switch(self, stored: Stored, only: list[int] | None = None) -> None:
        """Have all servers (or ``only`` some) serve a policy. Raises RolloutServerError with the failing servers' own
        messages: then all of them serve what they served before, unless the message says otherwise."""
        assert self.servers is not None
        try:
            self.servers.each(lambda index: self._stage(index, stored), only)
        except BaseException:
            with contextlib.suppress(RolloutServerError):
                self._post("abort", {"policy": stored.policy.as_dict()}, only, ABORT_SECONDS)
            raise
        self.policy = None  # from here on they may differ
        self._post("commit", {"policy": stored.policy.as_dict()}, only)
        self.statuses = self._ask()
        self._boots = [status["boot"] for status in self.statuses]
        self.policy = stored.policy
        self._announce(stored.policy)

    def _post(
        self, route: str, content: dict[str, Any], only: list[int] | None = None, deadline: float | None = None
    ) -> None:
        servers = self.servers
        assert servers is not None
        servers.each(lambda index: servers.post(index, route, deadline, json=content), only)

    def _stage(self, index: int, stored: Stored) -> None:
        """By its folder where the server sees that, else in the body of the request."""
        servers = self.servers
        assert servers is not None
        about = {"policy": stored.policy.as_dict(), "digest": stored.digest}
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
        servers.post(index, "stage", data=stored.weights, headers=headers)

    def _announce(self, policy: Policy | None) -> None:
        """From now on ms-swift's own rollout requests say which policy they want."""
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

    def make_ready(self) -> bool:
        """Before rollouts: servers that lost the policy get it again; whether any did. Raises RolloutServerError for
        one that does not come back within the deadline."""
        restored, self._has_restored = self._has_restored, False
        lost = self.lost()
        if lost:
            self._restore(lost)
            restored = True
        return restored

    def generate(self, infer: Callable[[], Any]) -> Any:
        """Rollouts, each of the policy that was asked for. Servers that restart meanwhile are waited for, sent the
        policy again, and asked once more. Raises PolicyMismatchError for a rollout of another policy."""
        policy, plain = self.policy, self._is_plain
        if policy is None:
            raise EngineStateError(
                "The rollout servers may serve different policies: nothing is generated until a sync."
            )
        try:
            outputs = infer()
        except (RuntimeError, OSError) as error:  # ms-swift's client makes one RuntimeError of all that went wrong
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
        """Whether servers lost the policy, and have it again now."""
        warning(f"a rollout failed: {str(error)[:500]}; looking after the rollout servers.")
        try:
            lost = [] if self._is_plain else self.lost()
            if not lost:
                return False
            self._restore(lost)
        except RolloutServerError as gone:
            raise gone from error
        self._has_restored = True
        return True


class RemoteWriter:
    """Sends one trainer's adapter to its servers, again and again. ``device`` is the trainer's."""

    changing: frozenset[str] = frozenset()
    plan = expected = None  # nobody here sees the servers' slots: they check what they load

    def __init__(self, trainer: Any, engine: RemoteEngine, adapter: Adapter) -> None:
        self.engine, self.adapter = engine, adapter
        self.device, self.ranks = trainer.accelerator.device, int(trainer.accelerator.num_processes)
        self._trainer = weakref.ref(trainer)
        self._dtype = engine.lora_dtype or torch.bfloat16
        self._report = WriteReport("none")
        self._stored: Stored | None = None
        self._version = 0
        self._sums: Sums = {}
        self._run = uuid.uuid4().hex[:16]
        self._check = FiniteCheck(adapter, self._dtype, self.device, self.everywhere)
        if engine.servers is not None:
            self._store = Store(Path(root_of()), self._run)
            if adapter.max_rank > engine.max_lora_rank:
                raise UnsupportedAdapterError(
                    f"Adapter {adapter.name!r} has rank {adapter.max_rank}, a rollout server has room for "
                    f"{engine.max_lora_rank}: start it with --vllm_max_lora_rank {adapter.max_rank}."
                )
        engine.on_restart(self._send_to)

    @property
    def place(self) -> str:
        """Where the adapter ends up, in words."""
        return f"{len(self.engine.servers.urls) if self.engine.servers else 0} rollout servers"

    def everywhere(self, fine: bool) -> bool:
        """Whether it is fine on all ranks: only the main one sees the servers."""
        return fine if self.ranks == 1 else ranks_agree(fine, self.device)

    def is_current(self) -> bool:
        """Whether each server serves what was sent last. Asks them; True on the other ranks."""
        return not self.engine.lost()

    def what_is_missing(self) -> str | None:
        """Servers refuse rollouts of a policy that they do not serve."""
        return None

    def accept(self) -> None:
        """Nothing was looked at."""

    def forget(self) -> None:
        """All servers are sent everything at the next sync anyway."""

    def adapted_parameters(self) -> set[str]:
        return set()

    def accept_base(self, pushed: Any) -> None:
        raise AssertionError("no base is pushed to rollout servers")

    def prove_base(self, model: torch.nn.Module) -> None:
        """Compare the trainer's base with the model folders that the servers started from, tensor by tensor.

        All ranks together. Raises BaseMismatchError where one differs: servers keep the base of their folder.
        """
        self._sums = _sums(model, self.adapter, self.device)
        problem = self._on_main(lambda: self._compare(self._sums))
        if problem is not None:
            raise problem

    def _compare(self, sums: Sums) -> None:
        servers = self.engine.servers
        assert servers is not None
        for url, answer in zip(servers.urls, servers.each(lambda index: servers.get(index, "base"))):
            held = {name: (dtype, tuple(shape), value) for name, (dtype, shape, value) in answer["sums"].items()}
            values, shapes = {(s, v) for _, s, v in held.values()}, {s for _, s, _ in held.values()}
            differing = [name for name, (_, shape, value) in sums.items() if (shape, value) not in values]
            elsewhere = [name for name in differing if sums[name][1] not in shapes]
            if len(differing) > len(elsewhere):
                name = next(name for name in differing if name not in elsewhere)
                raise BaseMismatchError(
                    f"The trainer's base differs from the model folder of rollout server {url} in {len(differing)} of "
                    f"{len(sums)} parameters ({name}, ...). Start the server from the trainer's own model, in the same "
                    "--torch_dtype; PiSSA and OLoRA change the base: train them with colocated engines."
                )
            if elsewhere:
                warning(
                    f"{len(elsewhere)} of {len(sums)} parameters have another layout in the files of rollout server "
                    f"{url} ({elsewhere[0]}) and were not compared; the agreement gate looks at what it computes."
                )

    def begin_validation(self) -> None:
        self._check.begin([parameter.data_ptr() for parameter in self.adapter.parameters])

    def validate(self) -> None:
        """Before anything is sent. Raises NonFiniteAdapterError: the servers then keep the previous policy."""
        self._check.finish()

    def digest_of(self, held: dict[str, torch.Tensor]) -> str:
        """The policy digest of whole CPU values by PEFT key: of the adapter as the servers are to hold it."""
        return host_digest(self.adapter, held, self._dtype)

    def write(self, keep_views: bool = True) -> WriteReport:
        """Have every server serve the trainer's adapter as it is now, or none of them. All ranks together."""
        clock = Clock()
        held = adapters.read_to_host(self.adapter, self.device)
        staged = loader.stage(self.adapter, held, self._dtype)
        digest = host_digest(self.adapter, staged, self._dtype, fold=False)
        clock.lap("read")
        self._version += 1
        problem = self._on_main(lambda: self._send(digest, staged))
        if problem is not None:
            raise problem
        clock.lap("write")
        size = sum(tensor.numel() * tensor.element_size() for tensor in staged.values())
        self._report = WriteReport("reload", clock.laps, size, digest)
        return self._report

    write_by_reference = write

    def finish(self) -> None:
        """The servers have answered."""

    def _send(self, digest: str, staged: Mapping[str, torch.Tensor]) -> None:
        trainer = self._trainer()
        assert trainer is not None
        policy = Policy(self._version, trainer.state.global_step, digest, self._run)
        stored = self._store.write(policy, loader.plain_config(self.adapter), staged)
        try:
            self.engine.switch(stored)
        except Exception:
            if self.engine.policy is None and self._stored is not None:
                self._go_back(self._stored)
            raise
        self._stored = stored

    def _go_back(self, previous: Stored) -> None:
        """Some servers may have switched: all get the previous policy again, as a version of its own."""
        self._version += 1
        again = replace(previous, policy=replace(previous.policy, version=self._version))
        try:
            self.engine.switch(again)
        except Exception as error:
            warning(f"nor could the rollout servers be given the previous policy again: {error}.")
            return
        self._stored = again
        info(f"the rollout servers serve the previous policy, of step {previous.policy.step}.")

    def _send_to(self, lost: list[int]) -> None:
        if self._stored is None:
            raise EngineStateError("A rollout server restarted before the first policy was sent.")
        self.engine.check_fit()  # it may be another server by now
        if self._sums:
            self._compare(self._sums)
        try:
            self.engine.switch(self._stored, lost)
        except RolloutServerError:
            self.engine.policy = self._stored.policy  # which the others serve, and this one shall
            raise
        info(f"sent the policy of step {self._stored.policy.step} again to {len(lost)} rollout servers.")

    def _on_main(self, work: Callable[[], None]) -> Exception | None:
        """Do it on the main rank; every rank gets its error, or None."""
        problem: Exception | None = None
        if self.engine.servers is not None:
            try:
                work()
            except Exception as error:
                problem = error
        if self.ranks > 1:
            told = [None if problem is None else f"{type(problem).__name__}: {problem}"]
            torch.distributed.broadcast_object_list(told, src=0, device=self.device)
            if told[0] is not None and problem is None:
                problem = RolloutServerError(f"On the main rank: {told[0]}")
        return problem


def _sums(model: torch.nn.Module, adapter: Adapter, device: torch.device) -> Sums:
    """Dtype, whole shape and checksum of each frozen parameter; gathered one at a time where they are sharded."""
    found = {}
    for name, parameter in adapters.frozen_parameters(model):
        with adapters.whole([parameter], adapter.sharding, device) as (value,):
            found[name] = (value.dtype, tuple(value.shape), int(checksum(value.detach())))
    return found


def _drop_communicators(client: Any) -> None:
    """Of groups of one, which opened nothing but the port of their store. ms-swift would say good-bye to each server as
    the process ends, and wait for one that hangs; and of vLLM 0.17's group, Python closes the socket that the store
    goes on listening on, which ends the process with SIGABRT."""
    atexit.unregister(client.close_communicator)
    for communicator in client.pynccl_comms:
        listening = getattr(communicator.group, "socket", None)
        if listening is not None:
            listening.detach()  # the store closes it
    client.pynccl_comms.clear()


def prepare_client(client: Any) -> None:
    """Have ms-swift's ``VLLMClient``, which knows no key and waits for ever, send that of SWIFT_LORA_FIX_API_KEY and
    give a rollout up after SWIFT_LORA_FIX_ROLLOUT_DEADLINE. Before it asks servers anything; None is no client."""
    settings = Settings.from_environment()
    if client is None or settings.transport != "reload":
        return
    for session in client.sessions:
        if settings.api_key:
            session.headers["Authorization"] = f"Bearer {settings.api_key}"
        for scheme in ("http://", "https://"):
            session.mount(scheme, Patient(settings.rollout_deadline))
