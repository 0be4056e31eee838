"""An event reaches its receiver through the real dispatcher and a real worker process."""

import json
from collections.abc import Callable

import pytest

from services.settings import Settings
from services.store import keys, projects, webhook_rules, webhooks
from services.store.base import Sessions
from services.store.models import WebhookDelivery
from tests.hooks.receiver import receiving
from tests.worker_jobs.conftest import Process, eventually
from worker.dispatcher import Dispatcher


def test_what_happened_is_told_and_signed_with_the_homes_own_secret(
    sessions: Sessions,
    settings: Settings,
    start: Callable[..., Process],
    dispatcher: Dispatcher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WHET_WEBHOOK_PRIVATE_TARGETS", "true")
    start("worker.main")
    with receiving() as receiver:
        with sessions.begin() as session:
            project = projects.create(session, "support")
            url = f"http://127.0.0.1:{receiver.port}/in"
            webhook = webhooks.create(
                session, project, url=url, events=list(webhooks.EVENTS), actor="user:1", private=True
            )
            [sent] = webhooks.emit(session, project.id, "gate.decided", {"said": "The candidate was refused."})

        def state() -> str:
            with sessions() as session:
                return session.get_one(WebhookDelivery, sent.id).state

        eventually(lambda: state() == "delivered")
    [(_, headers, body)] = receiver.came
    secret = webhook_rules.secret(keys.load_pepper(settings), webhook.id, 1)
    moment = int(headers["webhook-timestamp"])
    assert (
        headers["webhook-signature"]
        == webhook_rules.headers(f"msg_{sent.id.hex}", body, [secret], at=moment)["webhook-signature"]
    )
    assert json.loads(body)["data"] == {"project": "support", "said": "The candidate was refused."}
