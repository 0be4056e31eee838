"""The webhooks page, its API and commands: operators only, the secret once, hostile text escaped; and the manual."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient
from typer.testing import CliRunner, Result

from services import cli, cli_client
from services.settings import Settings
from services.store import keys, webhook_deliveries, webhook_rules, webhooks
from services.store.base import Sessions
from services.store.models import Project, Webhook, WebhookDelivery
from services.store.webhook_deliveries import Outcome
from services.web import create_app
from tests.console import seed
from tests.console.conftest import PEPPER, SignIn

HERE = "/p/entities/webhooks"
HOSTILE = "<script>alert(1)</script>"
FORM = {"url": "https://hook.example/in?token=abc", "event": ["run.finished", "gate.decided"]}
ROOT = Path(__file__).parents[2]


def only(sessions: Sessions) -> Webhook:
    with sessions() as session:
        return session.scalars(select(Webhook)).one()


def add(sessions: Sessions, project: Project) -> Webhook:
    with sessions.begin() as session:
        return webhooks.create(
            session, session.get_one(Project, project.id), url=FORM["url"], events=list(webhooks.EVENTS), actor="user:1"
        )  # type: ignore[arg-type]


def test_an_operator_adds_one_and_sees_its_secret_once(sessions: Sessions, project: Project, sign_in: SignIn) -> None:
    client = sign_in("op@example.org", "operator", project.id)
    shown = client.post(HERE, data=FORM)
    webhook = only(sessions)
    secret = webhook_rules.secret(PEPPER.encode(), webhook.id, 1)
    assert shown.status_code == 200
    assert secret in shown.text
    for path in (HERE, f"{HERE}/{webhook.id}", f"{HERE}/{webhook.id}/live"):
        text = client.get(path).text
        assert "whsec_" not in text
    assert "token=abc" not in client.get(HERE).text, "the list names hosts"
    assert "token=abc" in client.get(f"{HERE}/{webhook.id}").text
    assert webhook.events == ["run.finished", "gate.decided"]
    rotated = client.post(f"{HERE}/{webhook.id}/rotate").text
    assert webhook_rules.secret(PEPPER.encode(), webhook.id, 2) in rotated
    assert secret not in rotated


def test_nobody_below_an_operator_sees_or_touches_webhooks(
    sessions: Sessions, project: Project, sign_in: SignIn
) -> None:
    webhook = add(sessions, project)
    lead = sign_in("lead@example.org", "lead", project.id)
    assert HERE not in lead.get("/p/entities").text
    for method, path in (
        ("GET", HERE), ("POST", HERE), ("GET", f"{HERE}/{webhook.id}"), ("POST", f"{HERE}/{webhook.id}/test"),
        ("POST", f"{HERE}/{webhook.id}/rotate"), ("POST", f"{HERE}/{webhook.id}/delete"),
    ):  # fmt: skip
        assert lead.request(method, path, data=FORM if method == "POST" else None).status_code == 403, path
    assert only(sessions).rotation == 1


def test_a_bad_address_is_refused_in_words(project: Project, sign_in: SignIn) -> None:
    client = sign_in("op@example.org", "operator", project.id)
    for url in ("http://hook.example/", "https://169.254.169.254/latest", "not an address"):
        refused = client.post(HERE, data=FORM | {"url": url}, headers={"accept": "text/html"})
        assert refused.status_code == 400
        assert "cannot be a webhook" in refused.text


def test_deliveries_are_shown_with_what_became_of_them_and_sent_again(
    sessions: Sessions, project: Project, sign_in: SignIn
) -> None:
    webhook = add(sessions, project)
    client = sign_in("op@example.org", "operator", project.id)
    assert client.post(f"{HERE}/{webhook.id}/test").status_code == 303
    with sessions.begin() as session:
        [sent] = webhooks.emit(session, project.id, "deployment.rolled_back", {"said": HOSTILE})
        webhook_deliveries.record(session, sent.id, sent.job_id, Outcome(500, "answered 500", 31.0))
    text = client.get(f"{HERE}/{webhook.id}").text
    assert HOSTILE not in text
    assert "&lt;script&gt;" in text
    assert "answered 500" in text
    assert "again at" in text
    assert client.post(f"{HERE}/{webhook.id}/deliveries/{sent.id}/resend").status_code == 303
    assert client.post(f"{HERE}/{webhook.id}/deliveries/{sent.id}/resend").status_code == 409
    assert client.post(f"{HERE}/{webhook.id}/deliveries/{UUID(int=7)}/resend").status_code == 404


def test_disabling_enabling_and_deleting(sessions: Sessions, project: Project, sign_in: SignIn) -> None:
    webhook = add(sessions, project)
    client = sign_in("op@example.org", "operator", project.id)
    client.post(f"{HERE}/{webhook.id}/disable", data={"reason": "too loud"})
    assert "too loud" in client.get(f"{HERE}/{webhook.id}").text
    assert client.post(f"{HERE}/{webhook.id}/test").status_code == 409
    client.post(f"{HERE}/{webhook.id}/enable")
    assert only(sessions).disabled_at is None
    client.post(f"{HERE}/{webhook.id}/delete")
    assert client.get(f"{HERE}/{webhook.id}").status_code == 404


# --- API and commands -------------------------------------------------------------------------------------


@pytest.fixture
def whet(console_settings: Settings, sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`whet webhook …` on this console, with a key that may train."""
    with sessions.begin() as session:
        key = keys.create(session, pepper=PEPPER.encode(), name="ci", scopes=["train"])[1]
    monkeypatch.setenv("WHET_API_KEY", key)
    app, headers = create_app(console_settings, sessions), {"authorization": f"Bearer {key}"}
    monkeypatch.setattr(cli_client.httpx, "Client", lambda **_: TestClient(app, headers=headers))
    return lambda *words: CliRunner().invoke(cli.app, ["webhook", *map(str, words)])


def test_the_commands_do_what_the_page_does(whet: Callable[..., Result], sessions: Sessions, project: Project) -> None:
    made = whet("create", "entities", "https://hook.example/in", "--event", "gate.decided")
    webhook = only(sessions)
    assert webhook_rules.secret(PEPPER.encode(), webhook.id, 1) in made.stdout
    assert webhook.events == ["gate.decided"]
    assert "hook.example" in whet("list", "entities").stdout
    assert webhook_rules.secret(PEPPER.encode(), webhook.id, 2) in whet("rotate", "entities", webhook.id).stdout
    assert whet("rotate", "entities", webhook.id).exit_code == 1
    assert (
        webhook_rules.secret(PEPPER.encode(), webhook.id, 3)
        in whet("rotate", "entities", webhook.id, "--at-once").stdout
    )
    assert whet("test", "entities", webhook.id).exit_code == 0
    with sessions.begin() as session:
        sent = session.scalars(select(WebhookDelivery)).one()
        webhook_deliveries.record(session, sent.id, sent.job_id, Outcome(500, "answered 500", 31.0))
    assert "given_up" in whet("deliveries", "entities", webhook.id).stdout
    assert whet("resend", "entities", webhook.id, sent.id).exit_code == 0
    assert whet("disable", "entities", webhook.id, "--reason", "too loud").exit_code == 0
    assert only(sessions).disabled_reason == "too loud"
    assert whet("enable", "entities", webhook.id).exit_code == 0
    assert whet("delete", "entities", webhook.id).exit_code == 0
    with sessions() as session:
        assert session.scalars(select(Webhook)).all() == []


def test_a_key_of_another_project_reaches_none_of_it(client: TestClient, sessions: Sessions, project: Project) -> None:
    webhook = add(sessions, project)
    with sessions.begin() as session:
        other = seed.project(session, "other", "Other")
        stranger = keys.create(session, pepper=PEPPER.encode(), name="x", scopes=["train"], project_id=other.id)[1]
        app = keys.create(session, pepper=PEPPER.encode(), name="y", scopes=["infer"])[1]
    path = f"/api/p/entities/webhooks/{webhook.id}/rotate"
    assert client.post(path, json={}, headers={"authorization": f"Bearer {stranger}"}).status_code == 404
    crossed = path.replace("entities", "other")
    assert client.post(crossed, json={}, headers={"authorization": f"Bearer {stranger}"}).status_code == 404
    assert client.post(path, json={}, headers={"authorization": f"Bearer {app}"}).status_code == 403


# --- the manual -------------------------------------------------------------------------------------------


def test_the_receiver_of_the_manual_verifies_what_is_sent_and_nothing_else() -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/webhooks.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line and not line.startswith("import")]) <= 10
    manual: dict[str, Callable[[str, dict[str, str], bytes], bool]] = {}
    exec(code, manual)  # type: ignore[arg-type]  # noqa: S102 - it is the manual's own example
    verified = manual["verified"]
    secret, old = (webhook_rules.secret(PEPPER.encode(), UUID(int=7), number) for number in (2, 1))
    body = json.dumps({"type": "run.finished", "said": "Zürich"}).encode()
    signed = webhook_rules.headers("msg_1", body, [secret, old])
    assert verified(secret, signed, body)
    assert verified(old, signed, body), "in the day after a rotation"
    assert not verified(secret, signed, body + b" ")
    assert not verified(webhook_rules.secret(PEPPER.encode(), UUID(int=8), 2), signed, body)
    assert not verified(secret, signed | {"webhook-id": "msg_2"}, body)
    stale = webhook_rules.headers("msg_1", body, [secret], at=int(time.time()) - 301)
    assert not verified(secret, stale, body)


def test_the_manual_lists_the_events_there_are() -> None:
    listed = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs/webhooks.md").read_text(), re.MULTILINE)
    assert listed == [*webhooks.EVENTS, webhook_deliveries.TEST]
