"""Puts the console's routes on an application and refuses to start while one of them says nothing about access."""

import json
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ExceptionHandler

from services.app import ERROR_HANDLERS, render
from services.console import (
    account,
    artifacts,
    audit,
    browsing,
    bulk,
    dataset_imports,
    datasets,
    deployment,
    erasure,
    evaluations,
    exporting,
    home,
    joining,
    keys,
    people,
    pins,
    queue,
    review,
    review_guide,
    rollout,
    runs,
    setting_pages,
    sign_in,
    speculator,
    webhooks,
)
from services.console.access import undeclared
from services.console.embedder import Embedder
from services.console.memo import Memo
from services.console.oidc import Provider
from services.console.tokens import TokenReader
from services.console.views import WEB, error_page, wants_page
from services.errors import InvalidRequest, NotFound, Unauthenticated, Unavailable, Unprocessable, WhetError
from services.settings import Settings

TRAFFIC_SECONDS = 20.0
QUEUE_SECONDS = 5.0
# A ratio over a day; the home page asks for every project at once.
GAIN_SECONDS = 60.0
# The whole audit chain is walked.
VERDICT_SECONDS = 30.0
QUALITY_SECONDS = 20.0
# Some thousand prompts are read, and days are compared.
DRIFT_SECONDS = 900.0
log = structlog.get_logger()
ROUTERS: tuple[APIRouter, ...] = (
    home.router, sign_in.router, review.router, queue.router, bulk.router, exporting.router, browsing.router,
    dataset_imports.router, datasets.router, runs.router, setting_pages.router, evaluations.router, deployment.router,
    rollout.router, speculator.router, pins.router, joining.router, account.router, people.router, keys.router,
    audit.router, erasure.router, review_guide.router, webhooks.router, artifacts.router,
)  # fmt: skip


def add_console(app: FastAPI) -> None:
    """Routes, static files and error pages. `app.state` must hold settings, sessions and pepper."""
    for router in ROUTERS:
        silent = undeclared(router.routes)
        if silent:
            raise RuntimeError(f"these routes do not say who may call them: {', '.join(silent)}")
        app.include_router(router)
    settings: Settings = app.state.settings
    app.state.oidc = Provider(settings, app.state.pepper)
    app.state.verdicts = Memo(VERDICT_SECONDS)
    app.state.token_reader = TokenReader(settings)
    app.state.embedder = Embedder(settings)
    app.router.on_shutdown.append(app.state.embedder.close)
    app.state.traffic = Memo(TRAFFIC_SECONDS)
    app.state.queues = Memo(QUEUE_SECONDS)
    app.state.figures = Memo(TRAFFIC_SECONDS)
    app.state.gains = Memo(GAIN_SECONDS)
    app.state.quality = Memo(QUALITY_SECONDS)
    app.state.answered = Memo(GAIN_SECONDS)
    app.state.earned = Memo(TRAFFIC_SECONDS)
    app.state.drift = Memo(DRIFT_SECONDS)
    app.state.queue_figures = Memo(QUALITY_SECONDS)
    app.mount("/static", StaticFiles(directory=WEB / "static"), name="static")
    for kind, handler in _handlers().items():
        app.add_exception_handler(kind, handler)


def _handlers() -> dict[Any, ExceptionHandler]:
    """The shared handlers, with a page in place of JSON where a person's browser asked."""
    shared = dict(ERROR_HANDLERS)

    async def on_whet_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, WhetError)
        if not wants_page(request):
            return await _as_shared(shared, WhetError, request, error)
        if isinstance(error, Unauthenticated):
            return RedirectResponse("/sign-in", status_code=303)
        return error_page(error)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if wants_page(request) and error.status_code == 404:
            return error_page(NotFound("there is nothing at this address"))
        return await _as_shared(shared, HTTPException, request, error)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        failure = _sentence(error)
        return error_page(failure) if wants_page(request) else render(failure)

    async def on_database_away(request: Request, error: Exception) -> Response:
        log.warning("database_away", path=request.url.path, error=str(error))
        away = Unavailable("the database cannot be reached; serving goes on, the console waits for it")
        return await on_whet_error(request, away)

    async def on_unexpected(request: Request, error: Exception) -> Response:
        answer = await _as_shared(shared, Exception, request, error)
        said = json.loads(bytes(answer.body))["error"]["message"]
        return error_page(WhetError(said)) if wants_page(request) else answer

    return shared | {
        Exception: on_unexpected,
        WhetError: on_whet_error,
        HTTPException: on_http_exception,
        RequestValidationError: on_invalid,
        OperationalError: on_database_away,
    }


async def _as_shared(
    shared: dict[Any, ExceptionHandler], kind: type[Exception], request: Request, error: Exception
) -> Response:
    answer: Response = await shared[kind](request, error)  # type: ignore[misc, arg-type]
    return answer


def _sentence(error: RequestValidationError) -> WhetError:
    """The first thing that is wrong with a request, in words."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]) or None
    if first["type"] == "json_invalid":
        return InvalidRequest("the body is not valid JSON", code="invalid_json")
    where = f"{place}: " if place else ""
    return Unprocessable(f"{where}{first['msg']}", param=place)
