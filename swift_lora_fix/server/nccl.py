"""Trainer side: ms-swift's NCCL connections, one for each rollout server, and what is sent over them."""

from __future__ import annotations

import atexit
import contextlib
import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
import torch

from ..errors import RolloutServerError
from ..log import info, warning

POLL_SECONDS = 0.0005
GOODBYE_SECONDS = 10.0
_CONNECTIONS = "swift_lora_fix_connections"


class Connections:
    """Of ms-swift's ``VLLMClient``, which has opened them: ``pynccl_comms``, vLLM's ``PyNcclCommunicator``."""

    @classmethod
    def of(cls, client: Any) -> Connections:
        """Those of this client, the same ones each time."""
        found: Connections = vars(client).setdefault(_CONNECTIONS, None) or cls(client)
        setattr(client, _CONNECTIONS, found)
        return found

    def __init__(self, client: Any) -> None:
        self._client = client
        self._lost: list[Any] = []  # not freed: NCCL would wait for a peer that is gone
        self._closed = {index for index in range(client.num_servers) if not _works(client, index)}
        atexit.unregister(client.close_communicator)  # it waits for a server that hangs
        atexit.register(self._say_goodbye)

    def is_open(self, index: int) -> bool:
        return index not in self._closed

    def all_are_open(self) -> bool:
        return not self._closed

    def close(self, index: int, why: str) -> None:
        """Never use it again, and say so."""
        if index not in self._closed:
            self._closed.add(index)
            warning(f"rollout server {self._client.base_urls[index]} gets adapters without NCCL from now on: {why}")

    def reopen(self, index: int) -> None:
        """To a server that restarted, by ms-swift's own way, shown one server."""
        client = self._client
        if index in self._closed:
            return
        one = copy.copy(client)
        one.num_servers = 1
        for name in ("base_urls", "hosts", "sessions", "group_ports"):
            setattr(one, name, [getattr(client, name)[index]])
        try:
            one.init_communicator(device=client.pynccl_comms[index].device)
            atexit.unregister(one.close_communicator)
        except Exception as error:
            self.close(index, f"the server restarted, and NCCL could not be opened again ({error}).")
            return
        self._lost.append(client.pynccl_comms[index])
        client.pynccl_comms[index] = one.pynccl_comms[0]
        info(f"NCCL to rollout server {client.base_urls[index]} is open again.")

    def send(self, index: int, buffer: torch.Tensor, ask: Callable[[], Any], deadline: float) -> None:
        """Broadcast ``buffer`` to the server's workers, which ``ask`` has take part. Raises what ``ask`` raises, or
        RolloutServerError where NCCL is not through within ``deadline`` seconds."""
        url, communicator = self._client.base_urls[index], self._client.pynccl_comms[index]
        started = time.monotonic()
        with ThreadPoolExecutor(max_workers=1) as pool:
            answer = pool.submit(ask)
            is_sent = _broadcast(communicator, buffer)
            while not is_sent() and not (answer.done() and answer.exception() is not None):
                if time.monotonic() - started > deadline:
                    self._closed.add(index)
                    raise RolloutServerError(
                        f"Rollout server {url} did not take part in the NCCL broadcast within {deadline:g} s "
                        "(SWIFT_LORA_FIX_SERVER_DEADLINE): restart server and trainer."
                    )
                time.sleep(POLL_SECONDS)
            answer.result()

    def _say_goodbye(self) -> None:
        """As ms-swift does, with a time limit."""
        for url, session in zip(self._client.base_urls, self._client.sessions):
            with contextlib.suppress(requests.RequestException):
                requests.post(f"{url}/close_communicator/", headers=dict(session.headers), timeout=GOODBYE_SECONDS)


def drop(client: Any) -> None:
    """Connections of groups of one, which opened nothing but the port of their store. ms-swift would say good-bye to
    each server as the process ends, and wait for one that hangs; and of vLLM 0.17's group, Python closes the socket
    that the store goes on listening on, which ends the process with SIGABRT."""
    atexit.unregister(client.close_communicator)
    for communicator in client.pynccl_comms:
        listening = getattr(communicator.group, "socket", None)
        if listening is not None:
            listening.detach()  # the store closes it
    client.pynccl_comms.clear()


def _works(client: Any, index: int) -> bool:
    """Without a NCCL library vLLM's communicator is made all the same, and does nothing."""
    made = client.pynccl_comms[index] if index < len(client.pynccl_comms) else None
    return made is not None and made.world_size > 1 and not getattr(made, "disabled", False)


def _broadcast(communicator: Any, buffer: torch.Tensor) -> Callable[[], bool]:
    """Begin; the answer tells whether it is done. On a stream of its own: what never ends must not hold up others."""
    content = buffer.to(communicator.device).view(torch.uint8)
    if not content.is_cuda:
        communicator.broadcast(content, src=communicator.rank)
        return lambda: True
    with torch.cuda.device(content.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        communicator.broadcast(content, src=communicator.rank, stream=stream)
        content.record_stream(stream)
        done = stream.record_event()
    return done.query
