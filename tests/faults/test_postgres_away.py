"""Postgres stops while the gateway serves: nothing is lost, the spool drains, and keys are still checked."""

from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

import httpx
import pytest

from migrations.run import upgrade
from services.platform.accounts import server_account
from services.platform.paths import prepare_home, temporary_home
from services.platform.postgres import PostgresServer
from services.platform.process import Guarded
from services.store import keys, partitions
from services.store.base import make_sessions, uuid7
from tests.gateway.parts import TEMPLATE, World, eventually, make_world

CHAT = {"model": "entities", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@dataclass
class Switch:
    """A Postgres of the test's own, to turn off and on."""

    server: PostgresServer
    running: Guarded

    def off(self) -> None:
        self.running.stop()

    def on(self) -> None:
        self.running = Guarded(self.server.part(), self.running.log)
        self.running.wait_ready()


@pytest.fixture
def switch() -> Iterator[Switch]:
    """Running, with a migrated template."""
    with temporary_home("whet-test-") as home:
        prepare_home(home, home / "run", server_account())
        server = PostgresServer(home / "postgres", home / "run", server_account(), durable=False)
        made = Switch(server, Guarded(server.part(), home / "logs" / "postgres.log"))
        try:
            made.running.wait_ready()
            url = server.create_database(TEMPLATE)
            upgrade(url)
            sessions = make_sessions(url)
            with sessions.begin() as session:
                partitions.ensure(session)
            sessions.kw["bind"].dispose()
            yield made
        finally:
            made.running.stop()


@pytest.fixture
def world(switch: Switch) -> Iterator[World]:
    """Gateway and shipper on that Postgres."""
    with make_world(switch.server) as made:
        made.start_engine()
        made.start_shipper()
        made.start_gateway()
        yield made


def status_of(world: World) -> str:
    return str(httpx.get(f"{world.url}/health", timeout=30).json()["status"])


def test_serving_goes_on_and_the_log_catches_up(world: World, switch: Switch) -> None:
    pepper = keys.load_pepper(world.settings)
    with world.sessions.begin() as session:
        revoked, plaintext = keys.create(session, pepper=pepper, name="soon gone", scopes=["infer"])
    world.keys["revoked"] = plaintext
    eventually(lambda: world.get("/v1/models", key="revoked").status_code == 200)
    with world.sessions.begin() as session:
        keys.revoke(session, revoked.id)
    eventually(lambda: world.get("/v1/models", key="revoked").status_code == 401)

    switch.off()
    eventually(lambda: status_of(world) == "degraded")
    answers = [world.post("/v1/chat/completions", CHAT) for _ in range(20)]
    assert [answer.status_code for answer in answers] == [200] * 20
    assert world.post("/v1/chat/completions", CHAT, key="revoked").status_code == 401
    assert world.post("/v1/chat/completions", CHAT, key="feedback").status_code == 403
    told = world.post("/v1/feedback", {"interaction_id": str(uuid7()), "rating": 1})
    assert (told.status_code, told.json()["error"]["code"]) == (503, "unavailable")

    switch.on()
    for answer in answers:
        row = world.interaction(answer.json()["id"], seconds=60).interaction
        assert (row.id, row.finish_reason) == (UUID(answer.headers["x-whet-interaction-id"]), "length")
    eventually(lambda: status_of(world) == "ok")
    assert world.post("/v1/feedback", {"interaction_id": str(uuid7()), "rating": 1}).status_code == 201
    with world.sessions.begin() as session:
        fresh = keys.create(session, pepper=pepper, name="new", scopes=["infer"])[1]
    world.keys["fresh"] = fresh
    eventually(lambda: world.get("/v1/models", key="fresh").status_code == 200)
