"""The pipes to a server's workers: one order at a time, all workers at once, each answer within a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import threading
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
        loop, answers = asyncio.get_running_loop(), dict[int, dict[str, Any]]()
        asked = [index for index in range(len(self._server.connections)) if index not in self.silent]
        all_answered = asyncio.Event()

        def note(index: int, answer: dict[str, Any]) -> None:
            answers[index] = answer
            if len(answers) == len(asked):
                all_answered.set()

        def talk(index: int) -> None:
            try:
                self._server.connections[index].send(order)
                answer = _checked(index, self._server.connections[index].recv())
            except (EOFError, OSError):
                answer = _gone(index)
            with contextlib.suppress(RuntimeError):  # too late: the server has ended
                loop.call_soon_threadsafe(note, index, answer)

        for index in asked:  # not the loop's executor: the process would wait for it at its end
            threading.Thread(target=talk, args=(index,), daemon=True).start()
        if asked:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(all_answered.wait(), self._seconds)
        for index in asked:
            if index not in answers:
                self.silent.add(index)
                warning(f"worker {index} did not answer within {self._seconds} s: restart this rollout server.")
        return [answers[index] if index in answers else _gone(index) for index in range(len(self._server.connections))]


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
