"""The pipes to a server's workers: one order at a time, all workers at once, each answer within a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

from ...common.log import warning
from ..wire import METHOD


class Workers:
    """The workers of ms-swift's ``SwiftRolloutDeploy``.

    Answers come through a pipe in the order of the commands, and ms-swift's own routes use the same pipes: ``alone``
    must be held by whoever uses them. A worker that was late once is never asked again, because its next answer would
    be to this order.
    """

    def __init__(self, server: Any, seconds: float) -> None:
        self._server, self._seconds = server, seconds
        self.alone = asyncio.Lock()
        self.silent: set[int] = set()

    def what_is_wrong(self) -> str | None:
        """Why the pipes cannot be used any more, in words; None if they can."""
        return _gone(min(self.silent))["message"] if self.silent else None

    async def ask(self, **arguments: Any) -> list[dict[str, Any]]:
        """Send an order to all, and wait for all answers; the event loop goes on meanwhile. A pipe that takes nothing
        blocks a thread of its own, and no longer than the deadline anybody else."""
        order = {"type": "call", "method": METHOD, "args": (), "kwargs": arguments}
        answers = [self._asked(index, order) for index in range(len(self._server.connections))]
        await asyncio.wait([asyncio.wrap_future(answer) for answer in answers], timeout=self._seconds)
        for index, answer in enumerate(answers):
            if not answer.done():
                self.silent.add(index)
                warning(f"worker {index} did not answer within {self._seconds} s: restart this rollout server.")
        return [answer.result() if answer.done() else _gone(index) for index, answer in enumerate(answers)]

    def _asked(self, index: int, order: dict[str, Any]) -> Future[dict[str, Any]]:
        answer: Future[dict[str, Any]] = Future()

        def talk() -> None:
            try:
                self._server.connections[index].send(order)
                found = _checked(index, self._server.connections[index].recv())
            except (EOFError, OSError):
                found = _gone(index)
            with contextlib.suppress(InvalidStateError, RuntimeError):  # too late: the server has ended
                answer.set_result(found)

        if index in self.silent:
            answer.set_result(_gone(index))
        else:  # not the loop's executor: the process would wait for it at its end
            threading.Thread(target=talk, daemon=True).start()
        return answer


def failures(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer for answer in answers if "error" in answer]


def _checked(index: int, answer: Any) -> dict[str, Any]:
    if isinstance(answer, dict):
        return answer
    return _no_answer(f"Worker {index} of this rollout server does not know {METHOD}: its log says why.")


def _gone(index: int) -> dict[str, Any]:
    return _no_answer(f"Worker {index} of this rollout server has ended, or does not answer: restart the server.")


def _no_answer(message: str) -> dict[str, Any]:
    return {"error": "EngineStateError", "message": message, "status": 500}
