"""Who gets in: sign-in links, cookies, other sites' requests, and every route against every role."""

import re
import uuid

import pytest
from fastapi import APIRouter
from starlette.testclient import TestClient

from services.admin import api
from services.admin.access import scope_of
from services.admin.access import undeclared as undeclared_in_api
from services.console import setup
from services.console.access import ADMINISTRATOR, ANYONE, SIGNED_IN, needs_of, undeclared
from services.settings import Settings
from services.store import people
from services.store.base import Sessions
from services.store.models import ROLES, LoginSession, Project, SignInLink
from services.web import create_app
from tests.console import seed
from tests.console.conftest import PEPPER, SignIn

PAGE = {"accept": "text/html"}
CONSOLE_ROUTES = [
    (method, route.path, needs_of(route) or "")
    for router in setup.ROUTERS
    for route in router.routes
    for method in sorted(route.methods)  # type: ignore[attr-defined]
]


# --- signing in -------------------------------------------------------------------------------------------


def test_opening_a_link_does_not_use_it_up_and_pressing_the_button_does(
    client: TestClient, sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        token = seed.person(session, "ada@example.org", "viewer").token
    for _ in range(2):
        shown = client.get(f"/sign-in/{token}", headers=PAGE)
        assert shown.status_code == 200
        assert "Sign in" in shown.text
    pressed = client.post(f"/sign-in/{token}", follow_redirects=False)
    assert pressed.status_code == 303
    assert client.get("/", headers=PAGE).text.count("Named entities") >= 1
    again = client.post(f"/sign-in/{token}", headers=PAGE)
    assert again.status_code == 401
    assert "used already" in again.text


def test_the_database_holds_neither_links_nor_cookies_in_plain_text(
    client: TestClient, sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        token = seed.person(session, "ada@example.org", "viewer").token
    client.post(f"/sign-in/{token}", follow_redirects=False)
    cookie = client.cookies["whet_session"]
    with sessions() as session:
        link, login = session.query(SignInLink).one(), session.query(LoginSession).one()
    for secret in (token, cookie):
        assert secret.encode() not in link.token_hash + login.token_hash
    assert people._session_hash(PEPPER.encode(), cookie) == login.token_hash
    assert people._session_hash(b"another pepper", cookie) != login.token_hash


def test_the_cookie_is_locked_down(client: TestClient, sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        token = seed.person(session, "ada@example.org", "viewer").token
    given = client.post(f"/sign-in/{token}", follow_redirects=False).headers["set-cookie"].lower()
    assert "httponly" in given
    assert "samesite=lax" in given
    assert "secure" not in given  # plain http on a laptop


def test_behind_https_the_cookie_is_bound_to_the_host(
    console_settings: Settings, sessions: Sessions, project: Project
) -> None:
    settings = console_settings.model_copy(update={"public_console_url": "https://whet.example.org"})
    with sessions.begin() as session:
        token = seed.person(session, "ada@example.org", "viewer").token
    client = TestClient(create_app(settings, sessions), base_url="https://whet.example.org")
    given = client.post(f"/sign-in/{token}", follow_redirects=False).headers["set-cookie"]
    assert given.startswith("__Host-whet=")
    assert "Secure" in given
    assert "Path=/" in given
    assert client.get("/live").status_code == 200


def test_signing_out_ends_the_session_in_the_database_too(sign_in: SignIn, project: Project) -> None:
    client = sign_in("ada@example.org", "viewer")
    cookie = client.cookies["whet_session"]
    assert client.get("/live").status_code == 200
    client.post("/sign-out")
    client.cookies.set("whet_session", cookie)
    assert client.get("/live").status_code == 401


def test_a_disabled_account_loses_its_session_at_once(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    client = sign_in("ada@example.org", "viewer")
    with sessions.begin() as session:
        people.disable(session, people.find_user(session, "ada@example.org").id)
    assert client.get("/live").status_code == 401


def test_a_forged_cookie_is_nobody(client: TestClient, project: Project) -> None:
    for cookie in ("", "x", "é" * 40, "a" * 5000, "\udcff"):
        header = b"whet_session=" + cookie.encode(errors="surrogateescape")
        assert client.get("/live", headers={"cookie": header}).status_code == 401, cookie  # type: ignore[dict-item]


def test_a_page_sends_strangers_to_sign_in_and_a_script_gets_401(client: TestClient, project: Project) -> None:
    page = client.get("/p/entities/runs", headers=PAGE, follow_redirects=False)
    assert (page.status_code, page.headers["location"]) == (303, "/sign-in")
    assert client.get("/p/entities/runs").status_code == 401


# --- other sites ------------------------------------------------------------------------------------------


ORIGINS: list[tuple[dict[str, str], int]] = [
    ({"sec-fetch-site": "cross-site"}, 403),
    ({"sec-fetch-site": "same-site"}, 403),
    ({"sec-fetch-site": "none"}, 403),
    ({"sec-fetch-site": "cross-site", "origin": "http://console"}, 403),
    ({"origin": "http://evil.example"}, 403),
    ({"origin": "null"}, 403),
    ({"origin": "http://console.evil.example"}, 403),
    ({"sec-fetch-site": "same-origin"}, 200),
    ({"origin": "http://console"}, 200),
    ({}, 200),
]


def test_a_request_another_site_made_the_browser_send_is_refused(sign_in: SignIn, project: Project) -> None:
    client = sign_in("ada@example.org", "reviewer")
    for headers, status in ORIGINS:
        assert client.post("/p/entities/review/lease", json={}, headers=headers).status_code == status, headers


def test_every_answer_carries_the_security_headers(client: TestClient, project: Project) -> None:
    for path in ("/sign-in", "/static/app.css", "/nowhere", "/api/projects", "/health"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"


def test_no_page_has_a_script_or_a_style_inside(sign_in: SignIn, sessions: Sessions) -> None:
    with sessions.begin() as session:
        seed.lived_in(session, size=12)
    client = sign_in("boss@example.org", "admin")
    for method, path, _ in CONSOLE_ROUTES:
        if method == "GET" and path.count("{") == path.count("{slug}"):
            text = client.get(path.replace("{slug}", "entities"), headers=PAGE).text
            assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text), path
            assert not re.search(r"<script(?![^>]*\ssrc=)", text), path


# --- routes × roles ---------------------------------------------------------------------------------------


def test_every_route_says_who_may_call_it() -> None:
    assert CONSOLE_ROUTES
    for router in setup.ROUTERS:
        assert undeclared(router.routes) == []
    assert undeclared_in_api(api.router.routes) == []
    assert {scope_of(route) for route in api.router.routes} == {"train", "admin"}


def test_a_route_that_says_nothing_is_found() -> None:
    router = APIRouter()

    @router.get("/p/{slug}/secrets")
    def secrets(slug: str) -> str:
        return slug

    assert undeclared(router.routes) == ["/p/{slug}/secrets"]
    assert undeclared_in_api(router.routes) == ["/p/{slug}/secrets"]


@pytest.mark.parametrize("role", [None, *ROLES])
def test_every_route_admits_the_roles_it_declares_and_no_other(
    sign_in: SignIn, sessions: Sessions, role: str | None
) -> None:
    with sessions.begin() as session:
        project = seed.project(session)
        seed.project(session, "other", "Another")
    client = sign_in("somebody@example.org", role, project.id)
    for method, path, needs in CONSOLE_ROUTES:
        if needs == ANYONE:
            continue
        answer = client.request(method, _filled(path, "entities"))
        if needs == ADMINISTRATOR:  # an admin of one project administers that project only
            assert answer.status_code == 403, (method, path, role)
            continue
        admitted = needs == SIGNED_IN or people.rank(role) >= people.rank(needs)
        assert (answer.status_code not in (401, 403)) == (admitted or role is None), (method, path, role)
        if role is None and needs != SIGNED_IN:
            assert answer.status_code == 404, (method, path)
        if "{slug}" in path:
            assert client.request(method, _filled(path, "other")).status_code == 404, (method, path, role)


@pytest.mark.parametrize("role", ROLES)
def test_only_admins_of_every_project_reach_what_concerns_all_of_them(
    sign_in: SignIn, project: Project, role: str
) -> None:
    client = sign_in("somebody@example.org", role)
    guarded = [(method, path) for method, path, needs in CONSOLE_ROUTES if needs == ADMINISTRATOR]
    assert len(guarded) > 10
    for method, path in guarded:
        answer = client.request(method, _filled(path, "entities"))
        assert (answer.status_code != 403) == (role == "admin"), (method, path)


def _filled(path: str, slug: str) -> str:
    path = path.replace("{slug}", slug).replace("{name}", "golden").replace("{digest}", "d" * 64)
    return re.sub(r"\{\w+\}", str(uuid.UUID(int=7)), path)


def test_strangers_reach_nothing_but_sign_in_and_health(client: TestClient, project: Project) -> None:
    open_to_all = {(method, path) for method, path, needs in CONSOLE_ROUTES if needs == ANYONE}
    assert open_to_all == {
        ("GET", "/sign-in"), ("GET", "/sign-in/{token}"), ("POST", "/sign-in/{token}"), ("POST", "/sign-out"),
        ("GET", "/health"), ("GET", "/invitation/{token}"), ("POST", "/invitation/{token}"), ("GET", "/oidc/start"),
        ("GET", "/oidc/callback"),
    }  # fmt: skip
    for method, path, needs in CONSOLE_ROUTES:
        if needs != ANYONE:
            assert client.request(method, _filled(path, "entities")).status_code == 401, (method, path)


def test_a_reviewer_may_not_look_into_the_escalated_queue(sign_in: SignIn, project: Project) -> None:
    client = sign_in("ada@example.org", "reviewer")
    assert client.get("/p/entities/review?queue=escalated", headers=PAGE).status_code == 403
    assert client.post("/p/entities/review/lease", json={"queue": "escalated"}).status_code == 403


def test_our_own_bug_is_a_page_for_people_and_json_for_programs(
    console_settings: Settings, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sessions.begin() as session:
        token = seed.person(session, "ada@example.org", "viewer").token
    app = create_app(console_settings, sessions)
    client = TestClient(app, base_url="http://console", follow_redirects=False, raise_server_exceptions=False)
    client.post(f"/sign-in/{token}")

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("services.console.account.logins.of_user", broken)
    page = client.get("/account", headers=PAGE)
    assert page.status_code == 500
    assert "That did not work" in page.text
    assert "An unexpected error happened; it is logged as" in page.text
    assert "a bug" not in page.text
    assert client.get("/account").json()["error"]["code"] == "internal"


def test_scripts_are_asked_for_each_time_and_pages_are_kept_by_nobody(client: TestClient) -> None:
    kept = {path: client.get(path).headers["cache-control"] for path in (
        "/static/review/main.js", "/static/app.css", "/static/favicon.svg", "/sign-in",
    )}  # fmt: skip
    assert list(kept.values()) == ["no-cache", "no-cache", "max-age=86400", "no-store"]
    etag = client.get("/static/app.css").headers["etag"]
    assert client.get("/static/app.css", headers={"if-none-match": etag}).status_code == 304
