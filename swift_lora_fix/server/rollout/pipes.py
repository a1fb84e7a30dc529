"""The pipes to a server's workers: one order at a time, all workers at once, each answer within a deadline."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
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

    async def ask(self, command: str, **arguments: Any) -> list[dict[str, Any]]:
        """Send a command to all, and wait for all answers; the event loop goes on meanwhile. A pipe that takes nothing
        blocks a thread of its own, and no longer than the deadline anybody else."""
        order = {"type": "call", "method": METHOD, "args": (command,), "kwargs": arguments}
        answers: dict[int, dict[str, Any]] = {}

        def talk(index: int, connection: Any) -> None:
            try:
                connection.send(order)
                answers[index] = _checked(index, connection.recv())
            except (EOFError, OSError):
                answers[index] = _gone(index)

        threads = {
            index: threading.Thread(target=talk, args=(index, connection), daemon=True)
            for index, connection in enumerate(self._server.connections)
            if index not in self.silent
        }
        for thread in threads.values():
            thread.start()
        await asyncio.get_running_loop().run_in_executor(None, self._join, list(threads.values()))
        for index in threads:
            if index not in answers:
                self.silent.add(index)
                warning(f"worker {index} did not answer within {self._seconds} s: restart this rollout server.")
        return [answers[index] if index in answers else _gone(index) for index in range(len(self._server.connections))]

    def _join(self, threads: Sequence[threading.Thread]) -> None:
        end = time.monotonic() + self._seconds
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))


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
