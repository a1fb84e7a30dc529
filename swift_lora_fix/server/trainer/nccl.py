"""Trainer side: ms-swift's NCCL connections, one per rollout server, and what we send over them."""

from __future__ import annotations

import atexit
import contextlib
import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
import torch

from ...common.log import info, warning
from ...errors import RolloutServerError, SettingsError
from ..wire import release_port

POLL_SECONDS = 0.0005
GOODBYE_SECONDS = 10.0
_CONNECTIONS = "swift_lora_fix_connections"


class Connections:
    """The connections that ms-swift's ``VLLMClient`` opened: ``pynccl_comms``, vLLM's ``PyNcclCommunicator``."""

    @classmethod
    def of(cls, client: Any, deadline: float) -> Connections:
        """The connections of this client; the same object each time. deadline: seconds for opening one again."""
        found: Connections = vars(client).setdefault(_CONNECTIONS, None) or cls(client, deadline)
        setattr(client, _CONNECTIONS, found)
        return found

    def __init__(self, client: Any, deadline: float) -> None:
        self._client, self._deadline = client, deadline
        self._lost: list[Any] = []  # kept alive: freeing one would make NCCL wait for a peer that is gone
        self._stuck: set[int] = set()  # NCCL waits there for a peer, and so would anything after it
        self._closed = {index for index in range(client.num_servers) if not _works(client, index)}
        atexit.unregister(client.close_communicator)  # it waits for a server that hangs
        atexit.register(self._say_goodbye)

    def is_open(self, index: int) -> bool:
        return index not in self._closed | self._stuck

    def all_are_open(self) -> bool:
        return not self._closed | self._stuck

    def close(self, index: int, why: str) -> None:
        """Do not use this connection any more, and log why."""
        if index not in self._closed:
            self._closed.add(index)
            warning(f"rollout server {self._client.base_urls[index]} gets adapters without NCCL from now on: {why}")

    def reopen(self, index: int) -> None:
        """Connect again to a server that restarted, by ms-swift's own code, on a copy of the client with one server."""
        client = self._client
        if index in self._closed:
            return
        one = copy.copy(client)
        one.num_servers = 1
        for name in ("base_urls", "hosts", "sessions", "group_ports"):
            setattr(one, name, [getattr(client, name)[index]])
        device = client.pynccl_comms[index].device
        connecting = _Attempt(lambda: one.init_communicator(device=device))
        connecting.join(self._deadline)
        if connecting.is_alive() or connecting.error is not None:
            problem = connecting.error or f"not within {self._deadline:g} s"
            self.close(index, f"the server restarted, and NCCL could not be opened again ({problem}).")
            return
        atexit.unregister(one.close_communicator)
        self._lost.append(client.pynccl_comms[index])
        client.pynccl_comms[index] = one.pynccl_comms[0]
        self._stuck.discard(index)
        info(f"NCCL to rollout server {client.base_urls[index]} is open again.")

    def send(self, index: int, buffer: torch.Tensor, ask: Callable[[], Any], deadline: float) -> None:
        """Broadcast ``buffer`` to the server's workers; ``ask`` makes them join. Raises what ``ask`` raises, or
        RolloutServerError when the broadcast takes longer than ``deadline`` seconds."""
        url, communicator = self._client.base_urls[index], self._client.pynccl_comms[index]
        end = time.monotonic() + deadline
        with ThreadPoolExecutor(max_workers=1) as pool:
            answer = pool.submit(ask)
            sending = _Attempt(lambda: _broadcast(communicator, buffer))
            while not sending.is_over() and not (answer.done() and answer.exception() is not None):
                if time.monotonic() > end:
                    break
                time.sleep(POLL_SECONDS)
            if not sending.is_over():
                self._stuck.add(index)
            answer.result()
        if sending.error is not None:
            raise RolloutServerError(f"NCCL to rollout server {url} failed: {sending.error}") from sending.error
        if not sending.is_over():
            raise RolloutServerError(
                f"Rollout server {url} did not take part in the NCCL broadcast within {deadline:g} s "
                "(SWIFT_LORA_FIX_SERVER_DEADLINE): restart server and trainer."
            )

    def _say_goodbye(self) -> None:
        """What ms-swift does at exit, but with a time limit."""
        for url, session in zip(self._client.base_urls, self._client.sessions):
            with contextlib.suppress(requests.RequestException):
                requests.post(f"{url}/close_communicator/", auth=session.auth, timeout=GOODBYE_SECONDS)


def drop(client: Any) -> None:
    """Drop connections in groups of one, which opened nothing but the port of their store. At exit ms-swift would call
    each server, and wait for one that hangs.

    Raises SettingsError when the servers did open NCCL.
    """
    for url, communicator in zip(client.base_urls, client.pynccl_comms):
        if communicator.world_size > 1:
            raise SettingsError(
                f"SWIFT_LORA_FIX_TRANSPORT='reload' is set for the trainer, and rollout server {url} has opened NCCL: "
                "set it for the servers, too, or for neither."
            )
    atexit.unregister(client.close_communicator)
    for communicator in client.pynccl_comms:
        release_port(communicator)
    client.pynccl_comms.clear()


def _works(client: Any, index: int) -> bool:
    """Whether it can send. Without an NCCL library vLLM's communicator exists too, and does nothing."""
    made = client.pynccl_comms[index] if index < len(client.pynccl_comms) else None
    return made is not None and made.world_size > 1 and not getattr(made, "disabled", False)


class _Attempt(threading.Thread):
    """Work that may never end, begun in a thread of its own. It may return a question: whether it is over by now."""

    def __init__(self, work: Callable[[], Callable[[], bool] | None]) -> None:
        super().__init__(daemon=True, name="swift-lora-fix-nccl")
        self.error: Exception | None = None
        self._work = work
        self._is_over: Callable[[], bool] = lambda: False
        self.start()

    def run(self) -> None:
        try:
            self._is_over = self._work() or (lambda: True)
        except Exception as error:
            self.error = error

    def is_over(self) -> bool:
        return self.error is not None or self._is_over()


def _broadcast(communicator: Any, buffer: torch.Tensor) -> Callable[[], bool] | None:
    """On its own stream: a broadcast that never ends must not block others on the device."""
    content = buffer.to(communicator.device).view(torch.uint8)
    if not content.is_cuda:
        communicator.broadcast(content, src=communicator.rank)
        return None
    with torch.cuda.device(content.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        communicator.broadcast(content, src=communicator.rank, stream=stream)
        content.record_stream(stream)
        return stream.record_event().query
