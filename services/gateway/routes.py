"""The gateway's HTTP routes. Each says which scope it needs; `services.app` refuses one that does not."""

import time
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine.messages import Status
from services.app import PUBLIC, declared_scope, needs
from services.errors import Forbidden
from services.gateway import access, canary, feedback, pinned, tokenization, vectors, worked
from services.gateway.bodies import CHAT, TEXT, Ask, parse_chat, parse_text
from services.gateway.planning import make_plan
from services.gateway.service import Gateway
from services.gateway.snapshot import KnownKey, KnownProject
from services.gateway.streaming import answer


def gateway_of(request: Request) -> Gateway:
    """The gateway this application was built around."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def caller(request: Request) -> KnownKey:
    """The request's key, with the scope its route declares. Raises Unauthenticated or Forbidden."""
    gateway = gateway_of(request)
    scope = declared_scope(request.scope["route"])
    assert scope is not None
    return access.authenticate(request, gateway.keeper.current, gateway.pepper, scope)


@needs("infer")
async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions"""
    return await _complete(request, parse_chat)


@needs("infer")
async def completions(request: Request) -> Response:
    """POST /v1/completions"""
    return await _complete(request, parse_text)


async def _complete(request: Request, parse: Callable[[bytes], Ask]) -> Response:
    started = time.perf_counter()
    key = caller(request)
    gateway = gateway_of(request)
    ask = parse(await request.body())
    target = canary.placed(access.resolve(gateway.keeper.current, key, ask.model), ask, key.id)
    engine = await gateway.live.link.describe()
    plan = await make_plan(ask, target, key.id, gateway.tokenizer, engine, started)
    at_once = gateway.keeper.current.instant
    plan = pinned.applied(plan, at_once.boards.get(target.project.id), gateway.tokenizer)
    if shelf := at_once.shelves.get(target.project.id):
        plan = await worked.applied(plan, shelf, key.id, gateway.tokenizer, engine, gateway.live.link)
    return await answer(request, plan, gateway.live)


@needs("infer")
async def tokenize(request: Request) -> Response:
    """POST /tokenize: a text or a chat as the model's tokens."""
    key = caller(request)
    gateway = gateway_of(request)
    body = tokenization.parse_tokenize(await request.body())
    if body.model is not None:
        access.resolve(gateway.keeper.current, key, body.model)
    engine = await gateway.live.link.describe()
    return JSONResponse(await run_in_threadpool(tokenization.tokenize, body, gateway.tokenizer, engine.max_context))


@needs("infer")
async def detokenize(request: Request) -> Response:
    """POST /detokenize: the model's tokens as a text."""
    key = caller(request)
    gateway = gateway_of(request)
    body = tokenization.parse_detokenize(await request.body())
    if body.model is not None:
        access.resolve(gateway.keeper.current, key, body.model)
    return JSONResponse(await run_in_threadpool(tokenization.detokenize, body, gateway.tokenizer))


@needs("infer")
async def list_models(request: Request) -> Response:
    """GET /v1/models: the projects this key may use, with the digests they serve."""
    key = caller(request)
    gateway = gateway_of(request)
    engine = gateway.live.link.known
    projects = access.visible(gateway.keeper.current, key)
    data = [_model(project, project.slug, project.active, engine) for project in projects]
    return JSONResponse({"object": "list", "data": data})


@needs("infer")
async def get_model(request: Request) -> Response:
    """GET /v1/models/{model}: a pinned one shows the digest it pins."""
    key = caller(request)
    model = request.path_params["model"]
    gateway = gateway_of(request)
    target = access.resolve(gateway.keeper.current, key, model)
    return JSONResponse(_model(target.project, model, target.candidates[0], gateway.live.link.known))


def _model(project: KnownProject, name: str, adapter: str | None, engine: Status | None) -> dict[str, object]:
    """A project as a model; what only the engine knows is null while it is away."""
    return {
        "id": name,
        "object": "model",
        "created": int(project.created_at.timestamp()),
        "owned_by": "whet",
        "max_model_len": engine.max_context if engine else None,
        "whet": {
            "base": engine.base if engine else None,
            "adapter": adapter,
            "generation": project.generation,
            "artifacts": sorted(project.artifacts),
        },
    }


@needs("feedback")
async def give_feedback(request: Request) -> Response:
    """POST /v1/feedback: 201 when stored, 200 when it was stored before."""
    key = caller(request)
    gateway = gateway_of(request)
    body = feedback.parse(await request.body(), request.headers.get("idempotency-key"))
    project_id = feedback.project_of(gateway.keeper.current, key, body)
    stored = await run_in_threadpool(feedback.store, gateway.sessions, project_id, body, key.id)
    return JSONResponse(stored.described, status_code=201 if stored.created else 200)


@needs(PUBLIC)
async def health(request: Request) -> Response:
    """GET /health: 200 while it serves, even on an old snapshot; 503 while it cannot."""
    report = gateway_of(request).health()
    return JSONResponse(report, status_code=503 if report["status"] == "unavailable" else 200)


@needs("admin")
async def metrics(request: Request) -> Response:
    """GET /metrics in Prometheus' text form; it names projects, so it wants a key that reaches them all."""
    if caller(request).project_id is not None:
        raise Forbidden("this key reaches one project only; this takes a key for all of them", code="wrong_project")
    gateway = gateway_of(request)
    engine = await gateway.live.link.look()
    text = gateway.metrics.render(
        engine=engine, spool_bytes=gateway.live.spool.used_bytes, snapshot_age=gateway.keeper.current.age_seconds
    )
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


ROUTES = [
    Route(CHAT, chat_completions, methods=["POST"]),
    Route(TEXT, completions, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{model}", get_model, methods=["GET"]),
    *vectors.ROUTES,
    Route("/v1/feedback", give_feedback, methods=["POST"]),
    Route("/health", health, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
]
