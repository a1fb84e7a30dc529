"""Reads requests to a rollout server, with limits, and answers refused ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ...common.log import logger
from ...errors import ProtocolError, StagingError
from ..wire import BYTES, http_status, problems

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
        if isinstance(error, RequestValidationError):
            return cls(400, ProtocolError.__name__, f"The request is not understood: {problems(error.errors())}")
        if isinstance(error, HTTPException):  # FastAPI's own, of a body that is no JSON
            return cls(error.status_code, ProtocolError.__name__, str(error.detail))
        status = http_status(error) or 500
        if status == 500:
            logger.exception("a rollout server's route failed")
        return cls(status, type(error).__name__, str(error))


def route_class(check: Callable[[Request], None]) -> type[APIRoute]:
    """Routes that call ``check`` before a byte of the body is read (FastAPI reads it before its dependencies), limit
    JSON, and answer every error in the protocol's form."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def answer(request: Request) -> Response:
                try:
                    check(request)
                    if not request.headers.get("Content-Type", "").startswith(BYTES):
                        request._body = b"".join([chunk async for chunk in body_of(request, JSON_LIMIT)])
                    return await handle(request)
                except Exception as error:
                    refused = Refused.of(error)
                await drain(request)
                return refused.response()

            return answer

    return Route


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
    """Read the rest of the body, so that the client finishes sending and reads the answer."""
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > DRAIN_LIMIT:
                return
    except Exception:  # already read, or the client is gone
        return
