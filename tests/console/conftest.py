"""The console as an application on a fresh database, and people who are signed in to it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from services.settings import Settings
from services.store import keys
from services.store.base import Sessions
from services.store.models import Project
from services.web import create_app
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
