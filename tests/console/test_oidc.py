"""Signing in through a provider: who gets in, and every lie that must not let anybody in."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from services.settings import Settings
from services.store import invitations, people, roles
from services.store.base import Sessions
from services.store.models import LoginSession, Project, UserAccount, UserIdentity
from services.store.roles import Authority
from services.web import create_app
from tests.console import oidc_provider as lies
from tests.console import seed
from tests.console.oidc_provider import CLIENT_ID, CLIENT_SECRET, Provider, serving

ATTEMPT_COOKIE = "whet_oidc"
ROOT = Authority("key:tests", "admin")


@pytest.fixture
def provider() -> Iterator[Provider]:
    with serving() as made:
        yield made


@pytest.fixture
def browser(console_settings: Settings, sessions: Sessions, provider: Provider) -> Callable[..., TestClient]:
    """`browser()` is a fresh one; settings may be given."""

    def opened(**settings: str) -> TestClient:
        wanted = {"oidc_issuer": provider.issuer, "oidc_client_id": CLIENT_ID, "oidc_client_secret": CLIENT_SECRET}
        chosen = console_settings.model_copy(update=wanted | settings)
        return TestClient(create_app(chosen, sessions), base_url="http://console", follow_redirects=False)

    return opened


def begin(client: TestClient, provider: Provider) -> dict[str, str]:
    """To the provider and back: what the callback is called with."""
    sent = client.get("/oidc/start")
    assert sent.status_code == 303, sent.text
    assert sent.headers["location"].startswith(f"{provider.issuer}/authorize?")
    return provider.authorize(sent.headers["location"])


def come_in(client: TestClient, provider: Provider) -> int:
    return client.get("/oidc/callback", params=begin(client, provider)).status_code


def invited(sessions: Sessions, project: Project, email: str = "ada@example.org") -> None:
    with sessions.begin() as session:
        invitations.invite(session, ROOT, email=email, role="reviewer", project_id=project.id)


def accounts(sessions: Sessions) -> list[str]:
    with sessions() as session:
        return sorted(session.scalars(select(UserAccount.email)))


def test_an_invited_person_signs_in_with_the_role_promised(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project
) -> None:
    invited(sessions, project)
    client = browser()
    assert "Sign in with OpenID Connect" in client.get("/sign-in").text
    assert come_in(client, provider) == 303
    assert client.get("/p/entities/people").status_code == 403  # a reviewer, and no more
    assert client.post("/p/entities/review/lease", json={}).status_code == 200
    with sessions() as session:
        assert session.scalars(select(LoginSession.method)).all() == ["oidc"]
    again = browser()  # the second time, without an invitation, under a new address
    provider.person |= {"email": "ada@elsewhere.example", "email_verified": False}
    assert come_in(again, provider) == 303
    assert accounts(sessions) == ["ada@example.org"]


def test_a_stranger_gets_no_account(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project
) -> None:
    refused = browser().get("/oidc/callback", params=begin(client := browser(), provider))
    assert refused.status_code == 401  # another browser's attempt
    answer = client.get("/oidc/callback", params=begin(client, provider))
    assert answer.status_code == 403
    assert "nobody has invited you" in answer.text.lower()
    assert accounts(sessions) == []


def test_an_allow_listed_domain_needs_no_invitation_and_its_lookalikes_do(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project
) -> None:
    settings = {"oidc_domains": "Example.org, other.org", "oidc_role": "viewer"}
    for number, email in enumerate(("x@evil-example.org", "x@example.org.evil.com", "x@sub.example.org")):
        provider.person = {"sub": f"x{number}", "email": email, "email_verified": True}
        assert come_in(browser(**settings), provider) == 403, email
    provider.person = {"sub": "grace", "email": "Grace@Example.org", "email_verified": True, "name": "Grace"}
    assert come_in(client := browser(**settings), provider) == 303
    assert client.get("/p/entities").status_code == 200
    assert accounts(sessions) == ["grace@example.org"]


LIES: dict[str, dict[str, Any]] = {
    "wrong issuer": {"claims": {"iss": "https://evil.example"}},
    "wrong audience": {"claims": {"aud": "another-client"}},
    "another client's audience beside ours": {"claims": {"aud": [CLIENT_ID, "other"], "azp": "other"}},
    "no audience": {"claims": {"aud": None}},
    "wrong nonce": {"claims": {"nonce": "replayed"}},
    "no nonce": {"claims": {"nonce": None}},
    "expired": {"claims": {"exp": int(time.time()) - 3600}},
    "no expiry": {"claims": {"exp": None}},
    "not valid yet": {"claims": {"nbf": int(time.time()) + 3600}},
    "no subject": {"claims": {"sub": None}},
    "unsigned": {"sign": lies.unsigned},
    "signed with the client secret": {"sign": lies.with_the_secret},
    "signed by a stranger": {"sign": lies.by_a_stranger},
    "changed after signing": {"sign": lies.tampered},
    "another access token's hash": {"claims": {"at_hash": "AAAAAAAAAAAAAAAAAAAAAA"}},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_token_that_lies_lets_nobody_in(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project, lie: str
) -> None:
    invited(sessions, project)
    for name, value in LIES[lie].items():
        setattr(provider, name, value)
    client = browser()
    answer = client.get("/oidc/callback", params=begin(client, provider))
    assert answer.status_code == 401
    assert "cannot be trusted" in answer.text
    assert client.get("/live").status_code == 401
    assert accounts(sessions) == []


def test_an_answer_that_does_not_belong_to_the_attempt_is_refused(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project
) -> None:
    invited(sessions, project)
    client = browser()
    honest = begin(client, provider)
    sealed = client.cookies[ATTEMPT_COOKIE]
    attempts = {
        "state mismatch": honest | {"state": "another"},
        "no state": {"code": honest["code"]},
        "another provider answers": honest | {"iss": "https://evil.example"},
        "the provider refuses": {"error": "access_denied", "state": honest["state"]},
        "no code": {"state": honest["state"]},
    }
    for name, answer in attempts.items():
        client.cookies.set(ATTEMPT_COOKIE, sealed, domain="console.local", path="/")
        assert client.get("/oidc/callback", params=answer).status_code == 401, name
    assert accounts(sessions) == []


@pytest.mark.parametrize("change", ["", "x", "e30.00", "body"])
def test_a_forged_attempt_is_refused(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project, change: str
) -> None:
    invited(sessions, project)
    client = browser()
    answer = begin(client, provider)
    sealed = client.cookies[ATTEMPT_COOKIE]
    client.cookies.clear()
    forged = f"A{sealed[1:]}" if change == "body" else change
    headers = {"cookie": f"{ATTEMPT_COOKIE}={forged}"}
    assert client.get("/oidc/callback", params=answer, headers=headers).status_code == 401
    assert accounts(sessions) == []


def test_a_code_without_its_verifier_is_worth_nothing(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project
) -> None:
    """A stolen code, put into the thief's own attempt: PKCE stops it at the provider."""
    invited(sessions, project)
    stolen = begin(browser(), provider)["code"]
    thief = browser()
    own = begin(thief, provider)
    assert thief.get("/oidc/callback", params=own | {"code": stolen}).status_code == 401
    assert provider.refused == ["pkce"]
    assert accounts(sessions) == []


def test_metadata_of_another_issuer_is_not_believed(
    browser: Callable[..., TestClient], provider: Provider, project: Project
) -> None:
    provider.metadata = {"issuer": "https://evil.example"}
    assert browser().get("/oidc/start").status_code == 503
    provider.metadata = {"authorization_endpoint": "http://evil.example/authorize"}
    assert browser().get("/oidc/start").status_code == 503


def test_an_unverified_address_opens_no_account(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        seed.person(session, "boss@example.org", "admin")
    for verified in (False, None, "false", 1):
        provider.person = {"sub": "mallory", "email": "boss@example.org", "email_verified": verified}
        assert come_in(browser(), provider) == 403, verified
    with sessions() as session:
        assert session.scalars(select(UserIdentity)).all() == []


def test_an_address_given_to_somebody_new_does_not_open_the_old_account(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project
) -> None:
    invited(sessions, project)
    assert come_in(browser(), provider) == 303
    provider.person |= {"sub": "ada-2"}
    assert come_in(browser(), provider) == 403


def test_a_letter_that_only_looks_like_one_of_an_address_is_another(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project
) -> None:
    invited(sessions, project, "kim@example.org")
    provider.person = {"sub": "not-kim", "email": "\u212aim@example.org", "email_verified": True}
    assert "\u212aim".lower() == "kim"
    assert come_in(browser(), provider) == 403
    assert accounts(sessions) == []


def test_a_provider_that_always_names_itself_is_held_to_it(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project
) -> None:
    invited(sessions, project)
    provider.metadata = {"authorization_response_iss_parameter_supported": True}
    assert come_in(browser(), provider) == 401
    client = browser()
    answer = begin(client, provider) | {"iss": provider.issuer}
    assert client.get("/oidc/callback", params=answer).status_code == 303


def test_behind_https_no_neighbouring_host_plants_an_attempt(
    browser: Callable[..., TestClient], provider: Provider
) -> None:
    cookie = browser(public_console_url="https://whet.example.org").get("/oidc/start").headers["set-cookie"]
    assert cookie.startswith("__Host-whet-oidc=")
    assert "Secure" in cookie
    assert "Path=/;" in cookie


def test_a_shut_account_stays_shut(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project
) -> None:
    invited(sessions, project)
    assert come_in(browser(), provider) == 303
    with sessions.begin() as session:
        people.disable(session, people.find_user(session, "ada@example.org").id)
    assert come_in(browser(), provider) == 403


def test_keys_the_provider_changed_are_fetched_again(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("services.console.oidc.KEYS_SECONDS", 0.0)
    invited(sessions, project)
    client = browser()
    assert come_in(client, provider) == 303
    provider.key = lies.RSAKey.generate_key(2048, {"kid": "two"})
    assert come_in(client, provider) == 303


def test_an_invitation_by_somebody_who_lost_the_right_counts_for_nothing(
    browser: Callable[..., TestClient], provider: Provider, sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        lead = seed.person(session, "lea@example.org", "lead", project.id).user
        by = Authority.of_user(session, lead.id)
        invitations.invite(session, by, email="ada@example.org", role="reviewer", project_id=project.id)
        roles.take(session, ROOT, lead.id, project.id)
    assert come_in(browser(), provider) == 403


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"oidc_issuer": "http://login.example.org", "oidc_client_id": "x"}, "must be an https"),
        ({"oidc_issuer": "https://login.example.org"}, "go together"),
    ],
)
def test_half_a_provider_stops_the_start(settings: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Settings(**settings)  # type: ignore[arg-type]
