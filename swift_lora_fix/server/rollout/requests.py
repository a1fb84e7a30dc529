"""Reads the bodies of requests to a rollout server, with limits, and answers refused requests."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import JSONResponse

from ...common.log import logger
from ...errors import StagingError
from ..wire import http_status

JSON_LIMIT = 16 << 20  # the layout of an adapter of a large MoE model takes a few megabytes
DRAIN_LIMIT = 256 << 20


class Refused(Exception):
    """The answer to a request that is refused. ``kind``: name of the error's class."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


async def refusal(error: Exception, request: Request) -> JSONResponse:
    """The answer, once the client has finished sending: only then does it read one."""
    kind, status = type(error).__name__, http_status(error) or 500
    if isinstance(error, Refused):
        kind = error.kind
    elif status == 500:
        logger.exception("a rollout server's route failed")
    await drain(request)
    return JSONResponse({"error": kind, "message": str(error)}, status)


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
        raise StagingError(f"The request's body has {size} bytes or more where {limit} are expected.", 413)


async def drain(request: Request) -> None:
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > DRAIN_LIMIT:
                return
    except Exception:  # already read, or the client is gone
        return
