"""Reads requests to a rollout server, with limits, and answers refused ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from ...common.log import logger
from ...errors import ProtocolError
from ..wire import http_status, parse_object
from .files import too_large

JSON_LIMIT = 16 << 20  # the layout of an adapter of a large MoE model takes a few megabytes
DRAIN_LIMIT = 256 << 20


class Refused(Exception):
    """The answer to a request that is refused. ``kind``: name of the error's class."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.kind, "message": str(self)}, self.status)

    @classmethod
    def of(cls, error: Exception) -> Refused:
        if isinstance(error, Refused):
            return error
        status = http_status(error) or 500
        if status == 500:
            logger.exception("a rollout server's route failed")
        return cls(status, type(error).__name__, str(error))


async def body_of(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body's chunks. Raises StagingError (413) as soon as the body is known to exceed the limit."""
    announced = request.headers.get("Content-Length", "")
    size = int(announced) if announced.isdecimal() else 0
    if size <= limit:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                break
            yield chunk
    if size > limit:
        raise too_large("The request's body", size, limit)


async def json_of(request: Request, names: Sequence[str]) -> dict[str, Any]:
    chunks = [chunk async for chunk in body_of(request, JSON_LIMIT)]
    return check_fields(parse_object(b"".join(chunks), "The request's body"), names)


def check_fields(body: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    missing = [name for name in names if name not in body]
    if missing:
        raise ProtocolError(f"The request has no {', '.join(missing)}; it has {', '.join(sorted(body)) or 'nothing'}.")
    return body


def text_of(body: dict[str, Any], name: str) -> str:
    value = body[name]
    if not isinstance(value, str) or not value:
        raise ProtocolError(f"{name} is {value!r}: text is expected.")
    return value


def flag_of(body: dict[str, Any], name: str) -> bool:
    """The flag; False if it is missing."""
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise ProtocolError(f"{name} is {value!r}: true or false is expected.")
    return value


async def drain(request: Request) -> None:
    """Read the rest of the body, so that the client finishes sending and reads the answer."""
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > DRAIN_LIMIT:
                return
    except Exception:  # already read, or the client is gone
        return
