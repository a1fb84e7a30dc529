"""Trainer side: calls the routes of rollout servers. Every call has a deadline, every error names the server."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
import requests
import requests.adapters
import requests.auth

from ...common.log import info
from ...errors import RolloutServerError
from ..wire import PREFIX

Answer = TypeVar("Answer")
BUSY = {429, 502, 503, 504}  # retried, as is a connection that is refused, broken, or cut in the middle of an answer
CONNECT_SECONDS = 5.0
STALL_SECONDS = 30.0  # a body that is sent may make no progress for so long; the whole of it takes what it takes
SLOW_SECONDS = 30.0  # after each of these the log says that a server keeps us waiting
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0

# httpx logs each request at INFO: not ours, several at each sync
logging.getLogger("httpx").addFilter(lambda record: PREFIX not in record.getMessage())


class Servers:
    """The rollout servers of one trainer, called in parallel.

    urls: as ms-swift's client has them. key: of ``--api_key``, or empty. deadline: seconds for one call, with all
        retries and waits, but without the time in which a body makes progress.
    """

    def __init__(self, urls: Sequence[str], key: str = "", deadline: float = 300.0) -> None:
        self.urls, self.deadline = tuple(url.rstrip("/") for url in urls), deadline
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._clients = [httpx.Client(headers=headers) for _ in self.urls]  # connections are kept between calls

    def each(self, call: Callable[[int], Answer]) -> list[Answer]:
        """Run ``call`` with the index of each server, in parallel. Raises RolloutServerError with the message of each
        that failed."""
        answers = self.tried(call)
        failed = [answer for answer in answers if isinstance(answer, RolloutServerError)]
        if failed:
            error = RolloutServerError("; ".join(map(str, failed)))
            error.status = failed[0].status if len({failure.status for failure in failed}) == 1 else None
            raise error
        return [answer for answer in answers if not isinstance(answer, RolloutServerError)]

    def tried(self, call: Callable[[int], Answer]) -> list[Answer | RolloutServerError]:
        """The same, with the error of a server that failed in place of its answer."""

        def attempt(index: int) -> Answer | RolloutServerError:
            try:
                return call(index)
            except RolloutServerError as error:
                return error

        with ThreadPoolExecutor(max_workers=max(1, len(self.urls))) as pool:
            return list(pool.map(attempt, range(len(self.urls))))

    def get(self, index: int, route: str) -> dict[str, Any]:
        return self._call("GET", index, route)

    def post(
        self,
        index: int,
        route: str,
        json: Any = None,
        blocks: Callable[[], Iterable[bytes]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """Send ``json``, or a body in blocks. blocks: called for each attempt; ``headers`` then say how long it is."""
        return self._call("POST", index, route, blocks, json=json, headers=headers)

    def _call(
        self,
        method: str,
        index: int,
        route: str,
        blocks: Callable[[], Iterable[bytes]] | None = None,
        **content: Any,
    ) -> dict[str, Any]:
        url = f"{self.urls[index]}{PREFIX}/{route}/"
        patience = _Patience(url, self.deadline)
        while True:
            # no shorter read timeout: a slow server is not a lost one, it answers when it is done
            left = patience.left()
            content["timeout"] = httpx.Timeout(left, connect=min(left, CONNECT_SECONDS), write=min(left, STALL_SECONDS))
            if blocks is not None:
                content["content"] = patience.sending(blocks())
            try:
                response = self._clients[index].request(method, url, **content)
            except (httpx.TransportError, httpx.DecodingError) as error:
                patience.wait(f"{type(error).__name__}: {str(error)[:200]}")
                continue
            said = _said(response)
            message = said.get("message") or said.get("detail") or str(said)
            if response.status_code in BUSY:
                patience.wait(f"{response.status_code} {message}", response.headers.get("Retry-After"))
            elif response.status_code == 200 and "boot" in said:
                return said
            else:
                failure = RolloutServerError(f"Rollout server {url} answered {response.status_code}: {message}")
                failure.status = response.status_code
                raise failure


class Fresh(requests.adapters.HTTPAdapter):
    """For a session that calls rarely, one call at a time: each call opens its own connection. A server closes an idle
    one (uvicorn: after 5 s), possibly just as the next call is sent.

    seconds: for calls that set no timeout, the limit on sending and on waiting for the answer, each; None: no limit.
        (requests sends a body under its timeout for connecting, so that one must be as long.)"""

    def __init__(self, seconds: float | None = None) -> None:
        super().__init__()
        self.seconds = seconds

    def send(self, request: Any, stream: Any = False, timeout: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.close()  # pooled ones; calls in progress keep theirs
        return super().send(request, stream, self.seconds if timeout is None else timeout, *args, **kwargs)


class Bearer(requests.auth.AuthBase):
    """The key, for a session of ms-swift's client. (A header alone would be replaced by what .netrc has.)"""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self.key}"
        return request


class _Patience:
    """Waits with growing pauses until the deadline, and logs what it waits for."""

    def __init__(self, url: str, deadline: float) -> None:
        self.url, self.deadline = url, deadline
        self.started = self.said = time.monotonic()
        self.pause = FIRST_WAIT

    def left(self) -> float:
        return max(0.1, self.started + self.deadline - time.monotonic())

    def sending(self, blocks: Iterable[bytes]) -> Iterable[bytes]:
        """The blocks; the time that each takes to be sent does not count."""
        for block in blocks:
            before = time.monotonic()
            yield block
            self.started += time.monotonic() - before

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


def _said(response: httpx.Response) -> dict[str, Any]:
    """A server's answer: ours, FastAPI's, or a text as ``message``."""
    try:
        said = response.json()
    except ValueError:
        said = None
    return said if isinstance(said, dict) else {"message": response.text[:500]}
