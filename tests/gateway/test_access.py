"""Keys and scopes: every route says what it needs, and nothing else gets through."""

import time

import httpx
import pytest
from starlette.routing import Route

from services.app import PUBLIC, declared_scope, needs, refuse_undeclared
from services.gateway.routes import ROUTES
from services.store import keys, projects
from services.store.base import uuid7
from services.store.models import SCOPES
from tests.gateway.parts import World, eventually

PATHS = {
    "/v1/chat/completions": {"model": "entities", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"model": "entities", "prompt": "hi", "max_tokens": 2},
    "/v1/embeddings": {"model": "entities", "input": "hi"},
    "/v1/classify": {"model": "entities", "input": ["hi"]},
    "/v1/rerank": {"model": "entities", "query": "hi", "documents": ["a", "b"]},
    "/tokenize": {"model": "entities", "prompt": "hi"},
    "/detokenize": {"tokens": [5, 6]},
    "/v1/feedback": {"interaction_id": str(uuid7()), "rating": 1},
}
PLACES = [(route.path, sorted((route.methods or set()) - {"HEAD"})[0], declared_scope(route)) for route in ROUTES]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("path", "method", "wanted"), PLACES)
def test_a_route_answers_its_own_scope_and_no_other(
    world: World, path: str, method: str, wanted: str | None, scope: str
) -> None:
    url = world.url + path.replace("{model}", "entities")
    body = PATHS.get(path) if method == "POST" else None
    response = httpx.request(method, url, json=body, headers=world.headers(scope))
    if wanted in (PUBLIC, scope):
        assert response.status_code in (200, 201), response.text
    else:
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "insufficient_scope"


@pytest.mark.parametrize(("path", "method", "wanted"), PLACES)
@pytest.mark.parametrize(
    "headers",
    [
        {}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": "Basic abc"},
        {"authorization": f"Bearer wh_{'a' * 8}_{'b' * 43}"}, {"authorization": "Bearer " + "é" * 55},
    ],
)  # fmt: skip
def test_without_a_good_key_only_public_routes_answer(
    world: World, path: str, method: str, wanted: str | None, headers: dict[str, str]
) -> None:
    url = world.url + path.replace("{model}", "entities")
    encoded = {name: value.encode() for name, value in headers.items()}
    status = httpx.request(method, url, headers=encoded).status_code
    assert status == (200 if wanted == PUBLIC else 401)


def test_an_application_with_an_undeclared_route_does_not_start() -> None:
    async def forgotten() -> None: ...

    @needs(PUBLIC)
    async def thought_about() -> None: ...

    with pytest.raises(RuntimeError, match="/forgotten"):
        refuse_undeclared([Route("/known", thought_about), Route("/forgotten", forgotten)])


def test_a_right_id_with_a_wrong_secret_is_refused(world: World) -> None:
    good = world.keys["app"]
    wrong = good[:-1] + ("a" if good[-1] != "a" else "b")
    response = httpx.get(f"{world.url}/v1/models", headers={"authorization": f"Bearer {wrong}"})
    assert response.status_code == 401


def test_a_new_key_works_and_a_revoked_one_stops_within_two_seconds(world: World) -> None:
    pepper = keys.load_pepper(world.settings)
    with world.sessions.begin() as session:
        key, plaintext = keys.create(session, pepper=pepper, name="brief", scopes=["infer"])

    def status() -> int:
        return httpx.get(f"{world.url}/v1/models", headers={"authorization": f"Bearer {plaintext}"}).status_code

    eventually(lambda: status() == 200, seconds=2)
    with world.sessions.begin() as session:
        keys.revoke(session, key.id)
    revoked = time.monotonic()
    eventually(lambda: status() == 401, seconds=2)
    assert time.monotonic() - revoked < 2


def test_an_expired_key_is_refused(world: World) -> None:
    pepper = keys.load_pepper(world.settings)
    with world.sessions.begin() as session:
        key, plaintext = keys.create(session, pepper=pepper, name="old", scopes=["infer"])
        key.expires_at = key.created_at
    headers = {"authorization": f"Bearer {plaintext}"}
    # Unknown and expired answer alike, so wait until the gateway must have seen it.
    time.sleep(1.5)
    assert httpx.get(f"{world.url}/v1/models", headers=headers).status_code == 401


def test_a_key_is_kept_only_as_a_hash(world: World) -> None:
    with world.sessions.begin() as session:
        stored = keys.list_all(session)
    secrets = [plaintext[-keys.SECRET_LENGTH :].encode() for plaintext in world.keys.values()]
    assert len(stored) >= len(secrets)
    for key in stored:
        assert len(key.hash) == 32
        assert not any(secret in key.hash for secret in secrets)


def test_a_key_of_one_project_does_not_read_the_metrics_of_all(world: World) -> None:
    with world.sessions.begin() as session:
        project_id = projects.get(session, "entities").id
        _, plaintext = keys.create(
            session, pepper=keys.load_pepper(world.settings), name="local", scopes=["admin"], project_id=project_id
        )
    headers = {"authorization": f"Bearer {plaintext}"}

    def answer() -> httpx.Response:
        return httpx.get(f"{world.url}/metrics", headers=headers)

    eventually(lambda: answer().status_code != 401, seconds=2)
    assert answer().status_code == 403
    assert answer().json()["error"]["code"] == "wrong_project"
