"""What the gateway and the console share: routes that say who may call them, errors in OpenAI's shape, a body limit.

It stands on the floor beside `services.errors`: parts import it, it imports no part.
"""

import logging
import math
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, TypeVar

import structlog
from anyio import CancelScope
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, ExceptionHandler, Message, Receive, Scope, Send

from services.errors import InvalidRequest, NotFound, TooLarge, WhetError
from services.store.base import uuid7

PUBLIC = "public"
SCOPE_ATTRIBUTE = "whet_scope"

log = structlog.get_logger()
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def needs(scope: str) -> Callable[[Endpoint], Endpoint]:
    """Declare who may call an endpoint: a key's scope, a role, or PUBLIC. `refuse_undeclared` insists on it."""

    def declare(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, SCOPE_ATTRIBUTE, scope)
        return endpoint

    return declare


def declared_scope(route: BaseRoute) -> str | None:
    """What `needs` said about a route's endpoint; None when it said nothing."""
    return getattr(getattr(route, "endpoint", None), SCOPE_ATTRIBUTE, None)


def refuse_undeclared(routes: Iterable[BaseRoute]) -> None:
    """Deny by default: an application with a route nobody thought about does not start."""
    silent = [getattr(route, "path", repr(route)) for route in routes if declared_scope(route) is None]
    if silent:
        raise RuntimeError(f"these routes do not say who may call them: {', '.join(silent)}")


def render(error: WhetError) -> Response:
    """An expected failure as OpenAI's clients understand it."""
    headers = None if error.retry_after is None else {"retry-after": str(math.ceil(error.retry_after))}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _on_whet_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, WhetError)
    if error.status >= 500:
        log.warning("request_failed", path=request.url.path, status=error.status, error=error.message)
    return render(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: unknown path, wrong method, a body that is not what its header says."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return render(NotFound(f"there is nothing at {request.url.path}"))
    refusal = InvalidRequest(str(error.detail), code=f"http_{error.status_code}")
    refusal.status = error.status_code
    response = render(refusal)
    response.headers.update(error.headers or {})
    return response


async def _on_unexpected(request: Request, error: Exception) -> Response:
    """Our own bug: the log gets everything, the caller an id to quote."""
    request_id = request.scope.get("request_id", "")
    log.error("unexpected_error", path=request.url.path, request_id=request_id, exc_info=error)
    return render(WhetError(f"an unexpected error happened; it is logged as {request_id}", code="internal"))


ERROR_HANDLERS: dict[Any, ExceptionHandler] = {
    WhetError: _on_whet_error,
    HTTPException: _on_http_exception,
    Exception: _on_unexpected,
}


def configure_logs(level: str) -> None:
    """One JSON line an event on stderr, ours and the libraries' alike; the supervisor keeps them."""
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    renderer = structlog.processors.JSONRenderer()
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    # Libraries say on every start what we say once.
    logging.basicConfig(level=max(logging.WARNING, logging.getLevelName(level.upper())), handlers=[handler], force=True)


class Streamed(StreamingResponse):
    """A response from a generator that holds a transaction, which ends with the response, however that ends.

    A client that goes away in the middle would leave it open until the generator is collected, and erasures wait for
    every transaction that may have read what they erase.
    """

    def __init__(
        self, source: Generator[bytes] | Generator[str], media_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(source, media_type=media_type, headers=headers)
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):
                await run_in_threadpool(self._source.close)


class Shell:
    """Around the application: an `x-request-id` on every answer, and a limit on the body however it is sent.

    A body whose length is not announced is counted as it is read; the endpoint reading it gets TooLarge.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid7().hex
        scope["request_id"] = request_id
        header = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        if self._announced(scope) > self._limit:
            await render(self._too_large())(scope, receive, send_with_id)
        else:
            await self._app(scope, self._counted(receive), send_with_id)

    def _announced(self, scope: Scope) -> int:
        value = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        return int(value) if value.isdigit() else 0

    def _counted(self, receive: Receive) -> Receive:
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the request body is larger than {self._limit} bytes")
