"""Trainer side of server mode: sends one trainer's adapter to its servers, and its base if theirs is another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch

from ...common.clock import Clock
from ...common.log import info, warning
from ...common.ranks import on_main_rank, ranks_agree
from ...engine.port import ServingPort, WriteReport
from ...engine.vllm.colocated import AdapterServing
from ...engine.vllm.finite import FiniteCheck
from ...engine.vllm.slots import loader
from ...engine.vllm.slots.staging import Staging, host_digest
from ...engine.vllm.weights import base
from ...errors import BaseMismatchError, RolloutServerError, UnsupportedAdapterError
from ...install import releases
from ...policy import adapter as adapters
from ...policy.adapter import Adapter
from ...policy.model_files import Sums, compared, trainer_sums
from ...trainer import TrainerPort
from ..wire import ANOTHER, Layout, Policy
from .parcel import Parcel
from .remote import RemoteEngine


class RemoteWriter:
    """Sends one trainer's adapter to its servers, at each sync."""

    mode: ClassVar[Literal["adapter", "fused"]] = "adapter"
    keeps_base = False  # only this object knows what the servers were sent
    slots = weights = None  # we cannot see the servers' memory; they compare what they load

    def __init__(self, trainer: TrainerPort, engine: RemoteEngine, adapter: Adapter) -> None:
        self.trainer, self.engine, self.adapter = trainer, engine, adapter
        self.device, self.ranks = trainer.device, trainer.ranks
        self.serving: ServingPort = RemoteServing(engine, adapter)
        self._dtype = engine.lora_dtype
        self._staging: Staging | None = None
        self._parcel: Parcel | None = None
        self._layout: Layout | None = None
        self._version = 0
        self._sums: Sums = {}
        self._has_pushed = False  # the base was sent over NCCL
        self._check = FiniteCheck(adapter, self._dtype, self.device, self.all_ranks)
        if self.is_main and adapter.max_rank > engine.max_lora_rank:
            raise UnsupportedAdapterError(
                f"Adapter {adapter.name!r} has rank {adapter.max_rank}, a rollout server has room for "
                f"{engine.max_lora_rank}: start it with --vllm_max_lora_rank "
                f"{releases.engine_rank(adapter.max_rank) or adapter.max_rank}."
            )
        engine.on_restart(self._send_again)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that talks to the servers."""
        return self.engine.engine is not None

    @property
    def place(self) -> str:
        """Where the adapter ends up, in words for the log."""
        return f"{len(self.engine.servers.urls)} rollout servers"

    def all_ranks(self, fine: bool) -> bool:
        """Whether ``fine`` is true on all ranks. (Only the main one sees the servers.)"""
        return fine if self.ranks == 1 else ranks_agree(fine, self.device)

    def is_current(self) -> bool:
        """Whether each server serves what was sent last. Asks the servers; always True on other ranks."""
        return self.engine.have_policy()

    def what_is_missing(self) -> str | None:
        """Nothing to check here: servers refuse rollouts of a policy that they do not serve."""
        return None

    def adapted_parameters(self) -> set[str]:
        return set()  # the engine's parameters are unknown here

    def send_base(self, straight: bool = False) -> None:
        """Compare the trainer's base with the model folders that the servers loaded, tensor by tensor. If it differs,
        send it, provided that NCCL is open to all of them.

        All ranks together. Raises BaseMismatchError when it differs and cannot be sent.
        """
        self._sums = trainer_sums(self.trainer.model, self.adapter, self.device)
        problem = self._on_main(self._look_and_compare)
        if problem is None:
            return
        sends = isinstance(problem, BaseMismatchError) and self.engine.reaches_all
        if not self.all_ranks(sends or not self.is_main):
            raise problem
        self._push_base(str(problem), self._on_main)

    def _push_base(self, why: str, on_main: Callable[[Callable[[], None]], Exception | None]) -> None:
        """All ranks together, because sharded parameters are all-gathered."""
        problem = on_main(lambda: self._begin_push(why))
        if problem is None:
            base.send(self.trainer, self.adapter)
            self._has_pushed = True
            problem = on_main(lambda: self.engine.prove(self.engine.push(ends=True)))
        if problem is not None:
            raise problem

    def _begin_push(self, why: str) -> None:
        info(f"the base is sent over NCCL, unmerged. {why}")
        self.engine.prove(self.engine.statuses)
        self.engine.prove(self.engine.push(ends=False))

    def _look_and_compare(self) -> None:
        self.engine.check_fit()
        self._compare()

    def _compare(self) -> None:
        """Compare the trainer's base with each server's. Raises BaseMismatchError."""
        answers = self.engine.base_sums()
        for url, answer in zip(self.engine.servers.urls, answers):
            if answer["epoch"]:
                raise BaseMismatchError(
                    f"Rollout server {url} has a base that was sent to it over NCCL, in place of its model folder's: "
                    "restart it, or leave SWIFT_LORA_FIX_TRANSPORT unset on both sides, so that it is sent this one."
                )
            differing, elsewhere = compared(self._sums, answer["sums"])
            if differing:
                raise BaseMismatchError(
                    f"The trainer's base differs from the model folder of rollout server {url} in {len(differing)} of "
                    f"{len(self._sums)} parameters ({differing[0]}, ...). Start the server from the trainer's own "
                    "model, in the same --torch_dtype; PiSSA and OLoRA change the base: that takes NCCL, or colocated "
                    "engines."
                )
            if elsewhere:
                warning(
                    f"{len(elsewhere)} of {len(self._sums)} parameters have another layout in the files of rollout "
                    f"server {url} ({elsewhere[0]}) and were not compared; the agreement gate looks at what it "
                    "computes."
                )
        self.engine.prove(answers)

    def begin_validation(self) -> None:
        self._check.begin([parameter.data_ptr() for parameter in self.adapter.parameters])

    def validate(self) -> None:
        """Before anything is sent. Raises NonFiniteAdapterError; the servers then keep the previous policy."""
        self._check.finish()

    def digest_of(self, held: dict[str, torch.Tensor]) -> str:
        """The policy digest of whole CPU values by PEFT key: the adapter as the servers should hold it."""
        return host_digest(self.adapter, held, self._dtype)

    def write(self) -> WriteReport:
        """Have every server serve the trainer's current adapter, or none of them. All ranks together."""
        return self._write(False)

    def write_by_reference(self) -> WriteReport:
        """The same, through vLLM's own loader in each server."""
        return self._write(True)

    def _write(self, by_reference: bool) -> WriteReport:
        clock = Clock()
        staging, digest = self._stage()
        clock.lap("read")
        self._version += 1
        problem = self._on_main(lambda: self._send(digest, staging, by_reference))
        if problem is not None:
            raise problem
        clock.lap("write")
        clock.laps.update(self.engine.seconds)
        path = "nccl" if self.engine.reaches_all else "reload"
        return WriteReport(path, clock.laps, staging.buffer.numel() * staging.buffer.element_size(), digest)

    @torch.no_grad()
    def _stage(self) -> tuple[Staging, str]:
        """The whole adapter as the servers should hold it, on the trainer's device, and its policy digest."""
        if self._staging is None:
            self._staging = Staging(self.adapter, self._dtype, self.device, whole=True)
        for chunk in self.adapter.chunks:
            with adapters.whole_values(self.adapter, chunk, self.device) as values:
                self._staging.fill(chunk, values)
        return self._staging, self._staging.digest()

    def _send(self, digest: str, staging: Staging, by_reference: bool) -> None:
        parcel = self._parcel = self._parcel or Parcel(staging.buffer)
        parcel.now_holds(Policy(version=self._version, step=self.trainer.step, digest=digest, run=self.engine.run))
        try:
            self._switch(by_reference)
        except RolloutServerError as error:
            if error.status != ANOTHER:
                raise
            info(f"a rollout server is not the one that was looked at before: {error}")
            self._renew()
            self._switch(by_reference)

    def _switch(self, by_reference: bool = False) -> None:
        assert self._parcel is not None
        self._layout = self._layout or self._describe()
        self.engine.switch(self._parcel, self._layout, by_reference)

    def _describe(self) -> Layout:
        entries = tuple((entry.key, tuple(entry.shape)) for entry in self.adapter.entries)
        config = loader.plain_config(self.adapter)
        return Layout(dtype=str(self._dtype).removeprefix("torch."), entries=entries, config=config)

    def _send_again(self) -> None:
        """Servers lost the policy that was sent last, which is still staged."""
        self._renew()
        self._switch()
        info(f"sent the policy of step {self.engine.policy and self.engine.policy.step} again to the rollout servers.")

    def _renew(self) -> None:
        """Servers may have restarted: take them again, and make sure that they have the trainer's base."""
        self.engine.renew()
        if not self._has_pushed:
            self._compare()
            return
        # called on the main rank alone; ms-swift can only send a base to all servers
        if not self.engine.reaches_all or self.adapter.sharding != "none":
            raise BaseMismatchError(
                "A rollout server has lost the base that went to it over NCCL, and it cannot be sent again while a run "
                "goes on (a sharded trainer, or NCCL is gone): resume from a checkpoint."
            )
        self._push_base("A rollout server restarted.", _here)

    def _on_main(self, work: Callable[[], None]) -> Exception | None:
        """Run it on the main rank. Every rank gets its error, or None."""
        return on_main_rank(work, self.is_main, self.ranks, self.device)


def _here(work: Callable[[], None]) -> None:
    """On this rank, which is the main one; the others are elsewhere."""
    work()


class RemoteServing(AdapterServing):
    """The servers' vLLM LoRA layers apply the adapter."""

    def __init__(self, engine: RemoteEngine, adapter: Adapter) -> None:
        self._servers, self._adapter = engine, adapter
        # only the main rank talks to the servers
        self.reset_caches = engine.reset_caches if engine.engine is not None else None
        self.abort_unfinished = self.dtype = None
        # ms-swift's client splits the requests among the servers, in contiguous parts
        self.copies = len(engine.servers.urls) or 1

    @contextlib.contextmanager
    def engine_without_adapter(self) -> Iterator[None]:
        with self._servers.plain():
            yield
