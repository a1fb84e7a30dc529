"""Trainer side: calls the routes of rollout servers. Every call has a deadline, every error names the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import requests
import requests.adapters

from ...common.log import info
from ...errors import RolloutServerError
from ..wire import PREFIX

Answer = TypeVar("Answer")
BUSY = {429, 502, 503, 504}  # retried, as is a connection that is refused or broken
CONNECT_SECONDS = 5.0
SLOW_SECONDS = 30.0  # after each of these the log says that a server keeps us waiting
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0


class Servers:
    """The rollout servers of one trainer, called in parallel.

    urls: as ms-swift's client has them. key: of ``--api_key``, or empty. deadline: seconds for one call, with all
        retries and waits.
    """

    def __init__(self, urls: Sequence[str], key: str = "", deadline: float = 300.0) -> None:
        self.urls, self.deadline = tuple(url.rstrip("/") for url in urls), deadline
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._sessions = [requests.Session() for _ in self.urls]  # connections are kept between calls

    def each(self, call: Callable[[int], Answer], only: Sequence[int] | None = None) -> list[Answer]:
        """Run ``call`` with the index of each server, or of those in ``only``, in parallel. Raises RolloutServerError
        with the message of each that failed."""
        with ThreadPoolExecutor(max_workers=len(self.urls)) as pool:
            futures = [pool.submit(call, index) for index in (range(len(self.urls)) if only is None else only)]
        failed = [error for error in (future.exception() for future in futures) if error is not None]
        ours = [error for error in failed if isinstance(error, RolloutServerError)]
        if len(ours) < len(failed):
            raise next(error for error in failed if not isinstance(error, RolloutServerError))
        if ours:
            error = RolloutServerError("; ".join(map(str, ours)))
            error.status = ours[0].status if len({failure.status for failure in ours}) == 1 else None
            raise error
        return [future.result() for future in futures]

    def get(self, index: int, route: str, deadline: float | None = None) -> dict[str, Any]:
        return self._call("GET", index, route, deadline)

    def post(self, index: int, route: str, deadline: float | None = None, **content: Any) -> dict[str, Any]:
        """``content``: what ``requests`` takes, ``json=`` or ``data=`` and ``headers=``."""
        return self._call("POST", index, route, deadline, **content)

    def _call(self, method: str, index: int, route: str, deadline: float | None, **content: Any) -> dict[str, Any]:
        url = f"{self.urls[index]}{PREFIX}/{route}/"
        content["headers"] = {**self.headers, **content.get("headers", {})}
        patience = _Patience(url, self.deadline if deadline is None else deadline)
        while True:
            try:
                # no shorter read timeout: a slow server is not a lost one, it answers when it is done
                timeout = (CONNECT_SECONDS, patience.left())
                response = self._sessions[index].request(method, url, timeout=timeout, **content)
            except (requests.ConnectionError, requests.Timeout) as error:
                patience.wait(_reason(error))
                continue
            if response.status_code in BUSY:
                patience.wait(f"{response.status_code} {_message(response)}", response.headers.get("Retry-After"))
                continue
            if response.status_code != 200:
                failure = RolloutServerError(
                    f"Rollout server {url} answered {response.status_code}: {_message(response)}"
                )
                failure.status = response.status_code
                raise failure
            return _json(url, response)


class Fresh(requests.adapters.HTTPAdapter):
    """For a session that calls rarely, one call at a time: each call opens its own connection. A server closes an idle
    one (uvicorn: after 5 s), possibly just as the next call is sent.

    seconds: read timeout for calls that set none; None: no limit."""

    def __init__(self, seconds: float | None = None) -> None:
        super().__init__()
        self.seconds = seconds

    def send(self, request: Any, stream: Any = False, timeout: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.close()  # pooled ones; calls in progress keep theirs
        if timeout is None and self.seconds is not None:
            timeout = (CONNECT_SECONDS, self.seconds)
        return super().send(request, stream, timeout, *args, **kwargs)


class _Patience:
    """Waits with growing pauses until the deadline, and logs what it waits for."""

    def __init__(self, url: str, deadline: float) -> None:
        self.url, self.deadline = url, deadline
        self.started = self.said = time.monotonic()
        self.pause = FIRST_WAIT

    def left(self) -> float:
        return max(0.1, self.started + self.deadline - time.monotonic())

    def wait(self, reason: str, retry_after: str | None = None) -> None:
        now = time.monotonic()
        pause = max(self.pause, float(retry_after)) if retry_after and retry_after.isdecimal() else self.pause
        if now + pause >= self.started + self.deadline:
            raise RolloutServerError(
                f"Rollout server {self.url} did not answer within {self.deadline:g} s "
                f"(SWIFT_LORA_FIX_SERVER_DEADLINE): {reason}."
            )
        if now - self.said >= SLOW_SECONDS:
            self.said = now
            info(f"waiting for rollout server {self.url} for {now - self.started:.0f} s: {reason}.")
        time.sleep(pause)
        self.pause = min(2 * self.pause, LONGEST_WAIT)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _message(response: requests.Response) -> str:
    """The server's own message, in our format or FastAPI's."""
    try:
        said = response.json()
    except ValueError:
        return response.text[:500]
    if isinstance(said, dict):
        return str(said.get("message") or said.get("detail") or said)
    return str(said)


def _json(url: str, response: requests.Response) -> dict[str, Any]:
    try:
        said = response.json()
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise RolloutServerError(f"Rollout server {url} answered what is no JSON object: {response.text[:200]!r}")
    return said
