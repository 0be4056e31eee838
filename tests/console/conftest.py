"""The console as an application on a fresh database, and people who are signed in to it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from services.platform.postgres import PostgresServer
from services.settings import Settings
from services.store import keys
from services.store.base import Sessions, make_sessions, uuid7
from services.store.models import Project
from services.web import create_app
from tests.conftest import TEMPLATE
from tests.console import seed

PEPPER = "a pepper for tests only, long enough"
SignIn = Callable[..., TestClient]
# Parts of pages, files, JSON, and steps on the way to a provider.
NO_PAGES = {
    "/health", "/live", "/oidc/start", "/oidc/callback", "/audit/verdict", "/audit/export", "/p/{slug}/live",
    "/p/{slug}/audit/export",
    "/p/{slug}/queue/live", "/p/{slug}/runs/live", "/p/{slug}/runs/{run_id}/live", "/p/{slug}/deployment/live",
    "/p/{slug}/webhooks/{webhook_id}/live",
    "/p/{slug}/erasure/live", "/p/{slug}/erasure/{request_id}/certificate", "/p/{slug}/review/progress",
    "/p/{slug}/review/history", "/p/{slug}/datasets/{name}/{digest}/export",
    "/p/{slug}/interactions/bulk/{action_id}/live",
}  # fmt: skip


@pytest.fixture
def console_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("WHET_HOME", str(tmp_path))
    monkeypatch.setenv("WHET_SECRET", PEPPER)
    return Settings()


@pytest.fixture
def client(console_settings: Settings, sessions: Sessions) -> Iterator[TestClient]:
    """Somebody who is not signed in."""
    with TestClient(create_app(console_settings, sessions), base_url="http://console") as made:
        yield made


@pytest.fixture(scope="session")
def lived_in_template(postgres: PostgresServer) -> str:
    """A database with a lived-in project, made once: filling it takes longer than most of the tests that read it."""
    made = make_sessions(postgres.create_database(f"{TEMPLATE}_lived_in", template=TEMPLATE))
    with made.begin() as session:
        seed.lived_in(session, size=24)
    made.kw["bind"].dispose()
    return f"{TEMPLATE}_lived_in"


@pytest.fixture
def database_url(postgres: PostgresServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh database of the test's own, lived in where it asks for that."""
    name = f"test_{uuid7().hex}"
    lived = "lived_in" in request.fixturenames
    yield postgres.create_database(
        name, template=request.getfixturevalue("lived_in_template") if lived else TEMPLATE
    )  # fmt: skip
    postgres.drop_database(name)


@pytest.fixture
def lived_in(sessions: Sessions) -> Project:
    """The project of `seed.lived_in`."""
    with sessions() as session:
        return session.scalars(select(Project).where(Project.slug == "entities")).one()


@pytest.fixture
def project(sessions: Sessions) -> Project:
    with sessions.begin() as session:
        return seed.project(session)


@pytest.fixture
def sign_in(console_settings: Settings, sessions: Sessions) -> SignIn:
    """`sign_in("a@b.c", "reviewer", project.id)` is a client with that person's session."""

    def signed_in(email: str, role: str | None, project_id: object = None) -> TestClient:
        with sessions.begin() as session:
            somebody = seed.person(session, email, role, project_id)  # type: ignore[arg-type]
        client = TestClient(create_app(console_settings, sessions), base_url="http://console", follow_redirects=False)
        answer = client.post(f"/sign-in/{somebody.token}")
        assert answer.status_code == 303
        return client

    return signed_in


@pytest.fixture
def admin_key(sessions: Sessions) -> str:
    with sessions.begin() as session:
        return keys.create(session, pepper=PEPPER.encode(), name="tests", scopes=["admin"])[1]
