"""Events are told with what happened or not at all, tried again for a day, and signed so that a receiver can tell."""

import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from services.errors import Conflict, InvalidRequest, NotFound
from services.settings import Settings
from services.store import audit, deployments, evaluations, jobs, runs, webhook_deliveries, webhook_rules, webhooks
from services.store.base import Sessions
from services.store.models import Job, Project, Revision, Webhook, WebhookDelivery
from services.store.webhook_deliveries import PAUSES, TRIES, Outcome
from tests.console import seed, seed_evaluation
from tests.hooks.receiver import Receiver, receiving
from worker.tasks import perform

PEPPER = b"a pepper for tests only, long enough"
ALL = list(webhooks.EVENTS)
WORDS = "a sentence out of somebody's prompt"


@pytest.fixture
def hook_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("WHET_HOME", str(tmp_path))
    monkeypatch.setenv("WHET_SECRET", PEPPER.decode())
    monkeypatch.setenv("WHET_WEBHOOK_PRIVATE_TARGETS", "true")
    return Settings()


@pytest.fixture
def project(sessions: Sessions) -> Project:
    with sessions.begin() as session:
        return seed.project(session)


def hooked(
    session: Session, project: Project, url: str = "https://hook.example/in", events: list[str] = ALL
) -> Webhook:
    return webhooks.create(session, project, url=url, events=events, actor="user:1", private=True)


def work(sessions: Sessions, settings: Settings, *, now: bool = True) -> int:
    """Do every delivery job there is, waiting ones too when `now`; how many."""
    with sessions.begin() as session:
        if now:
            session.execute(update(Job).where(Job.state == "queued").values(not_before=func.now() - timedelta(1)))
        ids = session.scalars(select(Job.id).where(Job.state == "queued", Job.kind == "webhook.deliver")).all()
    for job_id in ids:
        perform(sessions, settings, job_id)
    return len(ids)


def only(sessions: Sessions) -> WebhookDelivery:
    with sessions() as session:
        return session.scalars(select(WebhookDelivery)).one()


def told(receiver: Receiver) -> list[dict[str, object]]:
    return [json.loads(body) for _, _, body in receiver.came]


# --- what is told -----------------------------------------------------------------------------------------


def test_an_event_is_told_with_what_happened_or_not_at_all(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        hooked(session, project)
    with sessions() as session:
        webhooks.emit(session, project.id, "run.finished", {})
        session.rollback()
    with sessions.begin() as session:
        assert session.scalars(select(WebhookDelivery)).all() == []
        webhooks.emit(session, project.id, "run.finished", {})
    with sessions() as session:
        assert session.scalars(select(Job.kind)).all() == ["webhook.deliver"]


def test_only_what_was_asked_for_is_told_and_only_to_the_own_project(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        other = seed.project(session, "other", "Other")
        wanted = hooked(session, project, events=["gate.decided"])
        shut = hooked(session, project)
        webhooks.disable(session, project.id, shut.id, "user:1", "asked to")
        hooked(session, other)
        assert webhooks.emit(session, project.id, "run.finished", {}) == []
        assert [one.webhook_id for one in webhooks.emit(session, project.id, "gate.decided", {})] == [wanted.id]


def test_a_whole_life_is_told_in_ids_and_words_and_without_anybodys_text(
    sessions: Sessions, hook_settings: Settings
) -> None:
    with receiving() as receiver:
        with sessions.begin() as session:
            project = seed.lived_in(session, size=16)
            hooked(session, project, f"http://127.0.0.1:{receiver.port}/in")
            revision = session.scalars(select(Revision).order_by(Revision.id.desc())).first()
            run = runs.start(session, project, params={}, created_by="ada@example.org", revision=revision)
            evaluation = evaluations.create(
                session, run, revision_id=run.revision_id or uuid4(), candidate_digest="c" * 64, baseline_digest=None
            )
            evaluations.decide(
                session, evaluation, [], decision="refuse", reasons=["not shown to be better"], summary={}
            )
            runs.finish(session, run, "failed", "failed", error=f"could not read: {WORDS}")
            deployments.roll_back(session, project.id, actor="ada@example.org", reason="worse answers")
        work(sessions, hook_settings)
    by_type = {str(one["type"]): one["data"] for one in told(receiver)}
    assert set(by_type) == set(ALL)
    gate, ended, back = by_type["gate.decided"], by_type["run.finished"], by_type["deployment.rolled_back"]
    assert isinstance(gate, dict)
    assert isinstance(ended, dict)
    assert isinstance(back, dict)
    assert (gate["decision"], gate["reasons"], gate["candidate_digest"]) == (
        "refuse",
        ["not shown to be better"],
        "c" * 64,
    )
    assert (ended["state"], ended["run_id"]) == ("failed", str(run.id))
    assert ended["url"] == f"{hook_settings.console_url}/p/entities/runs/{run.id}"
    assert (back["generation"], back["to_digest"], back["said"]) == (3, None, "worse answers")
    everything = json.dumps(told(receiver))
    assert WORDS not in everything
    assert "ada@example.org" not in everything


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_every_ending_of_a_run_is_told_once(sessions: Sessions, project: Project, state: str) -> None:
    with sessions.begin() as session:
        hooked(session, project)
        run = runs.start(session, project, params={}, created_by="ada")
        for _ in range(2):
            runs.finish(session, run, state, state)  # type: ignore[arg-type]
        said = session.scalars(select(WebhookDelivery.payload)).one()["said"]
    assert said.startswith("The sft run ")


def test_heads_that_go_back_are_no_roll_back_of_answers(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        hooked(session, project)
        deployment = deployments.locked(session, project.id)
        deployments.record_change(
            session, deployment, "speculator_rolled_back", old=None, to=None, actor="a", reason="slower"
        )
        assert session.scalars(select(WebhookDelivery)).all() == []


# --- attempts ---------------------------------------------------------------------------------------------


def test_what_is_taken_is_delivered_once(sessions: Sessions, project: Project, hook_settings: Settings) -> None:
    with receiving() as receiver:
        with sessions.begin() as session:
            hooked(session, project, f"http://127.0.0.1:{receiver.port}/in?key=1")
            webhooks.emit(session, project.id, "run.finished", {"n": 1})
        assert work(sessions, hook_settings) == 1
        assert work(sessions, hook_settings) == 0
    delivery = only(sessions)
    assert (delivery.state, delivery.status, delivery.error, delivery.attempts) == ("delivered", 204, None, 1)
    assert delivery.delivered_at is not None
    assert [path for path, _, _ in receiver.came] == ["/in?key=1"]


def test_a_failing_receiver_is_tried_eight_times_over_a_day_then_given_up(
    sessions: Sessions, project: Project, hook_settings: Settings
) -> None:
    with receiving() as receiver:
        receiver.status = 500
        with sessions.begin() as session:
            hooked(session, project, f"http://127.0.0.1:{receiver.port}/in")
            webhooks.emit(session, project.id, "run.finished", {})
        pauses = []
        for attempt in range(1, TRIES):
            assert work(sessions, hook_settings) == 1
            delivery = only(sessions)
            assert (delivery.state, delivery.attempts, delivery.error) == ("pending", attempt, "answered 500")
            assert delivery.next_at is not None
            pauses.append((delivery.next_at - datetime.now(UTC)).total_seconds())
        work(sessions, hook_settings)
    assert only(sessions).state == "given_up"
    assert len(receiver.came) == TRIES == 8
    assert len({headers["webhook-id"] for _, headers, _ in receiver.came}) == 1
    assert len({body for _, _, body in receiver.came}) == 1
    assert all(0.79 * wanted < pause < 1.21 * wanted for pause, wanted in zip(pauses, PAUSES, strict=True))
    assert 20 * 3600 < sum(PAUSES) < 28 * 3600


def test_a_try_does_not_come_before_its_time(sessions: Sessions, project: Project, hook_settings: Settings) -> None:
    with sessions.begin() as session:
        hooked(session, project, "http://127.0.0.1:9/in")
        webhooks.emit(session, project.id, "run.finished", {})
    work(sessions, hook_settings)
    assert work(sessions, hook_settings, now=False) == 1, "the job is there"
    assert only(sessions).attempts == 1, "and not yet due"


def test_five_events_given_up_in_a_row_disable_a_webhook_and_one_that_gets_through_forgives(
    sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        webhook = hooked(session, project)

        def gone(outcome: Outcome) -> None:
            [delivery] = webhooks.emit(session, project.id, "run.finished", {})
            delivery.attempts = TRIES - 1
            webhook_deliveries.record(session, delivery.id, delivery.job_id, outcome)

        for _ in range(4):
            gone(Outcome(500, "answered 500", 1.0))
        gone(Outcome(200, None, 1.0))
        for _ in range(4):
            gone(Outcome(None, "no connection", 1.0))
        assert webhook.disabled_at is None
        waiting = webhooks.emit(session, project.id, "run.finished", {})[0]
        gone(Outcome(None, "no connection", 1.0))
        assert webhook.disabled_reason == "5 events in a row could not be delivered"
        assert waiting.state == "cancelled"
        assert webhooks.emit(session, project.id, "run.finished", {}) == []
        webhooks.enable(session, project.id, webhook.id, "user:1")
        assert webhook.given_up == 0
        assert len(webhooks.emit(session, project.id, "run.finished", {})) == 1


def test_an_override_is_told_as_what_it_is(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        refused = seed_evaluation.compared(session, session.merge(project))[-1]
        hooked(session, project, events=["gate.decided"])
        evaluations.override(session, refused, actor="ada", reason="known to be better")
        [told] = session.scalars(select(WebhookDelivery.payload))
    assert (told["decision"], told["run_id"]) == ("override", str(refused.run_id))
    assert "somebody has overridden that" in told["said"]


def test_gone_for_good_means_it(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        webhook = hooked(session, project)
        [delivery] = webhooks.emit(session, project.id, "run.finished", {})
        webhook_deliveries.record(session, delivery.id, delivery.job_id, Outcome(410, "answered 410", 1.0))
        assert (delivery.state, webhook.disabled_at is None) == ("given_up", False)
        told = text("SELECT actor FROM audit_event WHERE action = 'webhook.disable'")
        assert session.scalars(told).all() == ["worker"]


def test_an_event_told_while_somebody_disables_the_webhook_is_cancelled(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        webhook = hooked(session, project)
    with sessions.begin() as telling:
        [delivery] = webhooks.emit(telling, project.id, "run.finished", {})
        with sessions.begin() as session:
            webhooks.disable(session, project.id, webhook.id, "user:1", "too loud")
    with sessions.begin() as session:
        session.execute(update(Job).values(state="succeeded"))  # it found nothing to send
        assert webhook_deliveries.settle(session) == 1
        found = session.get_one(WebhookDelivery, delivery.id)
        assert (found.state, found.attempts) == ("cancelled", 0)


def test_a_webhook_that_is_being_deleted_takes_nothing_down_with_it(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        webhook = hooked(session, project)
    with sessions.begin() as deleting:
        webhooks.remove(deleting, project.id, webhook.id, "user:1")
        with sessions.begin() as session:
            session.execute(text("SET LOCAL lock_timeout = '2s'"))
            assert webhooks.emit(session, project.id, "run.finished", {}) == []


def test_a_delivery_whose_worker_died_three_times_goes_on(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        hooked(session, project)
        [delivery] = webhooks.emit(session, project.id, "run.finished", {})
        assert webhook_deliveries.settle(session) == 0, "its job is still there"
        session.execute(update(Job).values(state="dead"))
        first = delivery.job_id
        assert webhook_deliveries.settle(session) == 1
        assert (delivery.attempts, delivery.state) == (1, "pending")
        assert delivery.job_id != first
        assert webhook_deliveries.settle(session) == 0


def test_a_job_that_rings_late_sends_nothing(sessions: Sessions, project: Project, hook_settings: Settings) -> None:
    """After a re-send the old job's delivery is another job's; after a removal there is none."""
    with receiving() as receiver:
        with sessions.begin() as session:
            webhook = hooked(session, project, f"http://127.0.0.1:{receiver.port}/in")
            [delivery] = webhooks.emit(session, project.id, "run.finished", {})
            late = jobs.enqueue(session, "webhook.deliver", {"delivery_id": str(delivery.id)}, project_id=project.id)
        perform(sessions, hook_settings, late.id)
        assert receiver.came == []
        with sessions.begin() as session:
            webhooks.remove(session, project.id, webhook.id, "user:1")
        work(sessions, hook_settings)
    assert receiver.came == []
    with sessions() as session:
        assert set(session.scalars(select(Job.state))) == {"succeeded"}


def test_what_an_overtaken_try_says_is_ignored(sessions: Sessions, project: Project) -> None:
    """It was sent again by hand while a worker had the old try in hand."""
    with sessions.begin() as session:
        webhook = hooked(session, project)
        [delivery] = webhooks.emit(session, project.id, "run.finished", {})
        delivery.attempts, old = 1, delivery.job_id
        session.flush()
        webhooks.resend(session, project.id, webhook.id, delivery.id)
        webhook_deliveries.record(session, delivery.id, old, Outcome(500, "answered 500", 1.0))
        assert (delivery.attempts, delivery.state, delivery.error) == (0, "pending", None)


def test_a_resent_event_keeps_its_id_and_has_all_its_tries(
    sessions: Sessions, project: Project, hook_settings: Settings
) -> None:
    with receiving() as receiver:
        with sessions.begin() as session:
            webhook = hooked(session, project, f"http://127.0.0.1:{receiver.port}/in")
            [delivery] = webhooks.emit(session, project.id, "run.finished", {})
            with pytest.raises(Conflict, match="on its way"):
                webhooks.resend(session, project.id, webhook.id, delivery.id)
        receiver.status = 503
        work(sessions, hook_settings)
        with sessions.begin() as session:
            webhooks.resend(session, project.id, webhook.id, delivery.id)
        receiver.status = 200
        work(sessions, hook_settings)
        assert work(sessions, hook_settings) == 0, "the try that waited was dropped"
    assert [headers["webhook-id"] for _, headers, _ in receiver.came] == [f"msg_{delivery.id.hex}"] * 2
    assert only(sessions).state == "delivered"


def test_a_test_is_sent_once_and_counts_for_nothing(
    sessions: Sessions, project: Project, hook_settings: Settings
) -> None:
    with sessions.begin() as session:
        webhook = hooked(session, project, "http://127.0.0.1:9/in", events=["gate.decided"])
        webhooks.try_out(session, project.id, webhook.id)
    work(sessions, hook_settings)
    assert (only(sessions).state, only(sessions).error) == ("given_up", "no connection to 127.0.0.1")
    with sessions() as session:
        assert session.get_one(Webhook, webhook.id).given_up == 0


def test_the_setting_taken_back_stops_what_it_allowed(
    sessions: Sessions, project: Project, hook_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as receiver:
        with sessions.begin() as session:
            hooked(session, project, f"http://127.0.0.1:{receiver.port}/in")
            webhooks.emit(session, project.id, "run.finished", {})
        work(sessions, hook_settings.model_copy(update={"webhook_private_targets": False}))
    assert receiver.came == []
    assert "private address" in (only(sessions).error or "")


def test_old_deliveries_are_forgotten_and_waiting_ones_are_not(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        hooked(session, project)
        for state in ("pending", "delivered", "given_up"):
            [one] = webhooks.emit(session, project.id, "run.finished", {})
            one.state, one.created_at = state, datetime.now(UTC) - timedelta(days=31)
        session.flush()
        assert webhook_deliveries.prune(session) == 2
        assert session.scalars(select(WebhookDelivery.state)).all() == ["pending"]


# --- secrets and signatures -------------------------------------------------------------------------------


def test_no_table_holds_a_secret(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        webhook = hooked(session, project)
        webhooks.rotate(session, project.id, webhook.id, "user:1")
        shown = {webhook_rules.secret(PEPPER, webhook.id, number) for number in (1, 2)}
        assert len(shown) == 2
        for table in ("webhook", "webhook_delivery", "audit_event", "job"):
            rows = str(session.execute(text(f"SELECT * FROM {table}")).all())
            for secret in shown:
                assert secret.removeprefix("whsec_") not in rows
        assert "/in" not in str(session.execute(text("SELECT * FROM audit_event")).all()), "a path may be a password"


def test_secrets_differ_by_webhook_rotation_and_pepper() -> None:
    one, other = uuid4(), uuid4()
    made = {
        webhook_rules.secret(pepper, webhook, number)
        for pepper in (PEPPER, b"another pepper, just as long as it")
        for webhook in (one, other)
        for number in (1, 2)
    }
    assert len(made) == 8
    assert all(len(base64.b64decode(secret.removeprefix("whsec_"))) == 32 for secret in made)


def test_the_signature_is_that_of_the_published_scheme() -> None:
    """The example of standardwebhooks.com's own libraries."""
    signed = webhook_rules.headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        b'{"test": 2432232314}',
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        at=1614265330,
    )
    assert signed["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_after_a_rotation_both_secrets_sign_for_a_day_and_at_once_only_the_new_one(
    sessions: Sessions, project: Project, hook_settings: Settings
) -> None:
    def secrets(webhook: Webhook, later: timedelta = timedelta()) -> list[str]:
        return webhook_rules.secrets_of(
            PEPPER, webhook.id, webhook.rotation, webhook.rotated_at, datetime.now(UTC) + later
        )

    with sessions.begin() as session:
        webhook = hooked(session, project)
        [first] = secrets(webhook)
        webhooks.rotate(session, project.id, webhook.id, "user:1")
        new, old = secrets(webhook)
        assert old == first
        assert secrets(webhook, timedelta(hours=25)) == [new]
        with pytest.raises(Conflict, match="at once"):
            webhooks.rotate(session, project.id, webhook.id, "user:1")
        webhooks.rotate(session, project.id, webhook.id, "user:1", at_once=True)
        [newest] = secrets(webhook)
        assert newest not in (first, new)


def test_each_attempt_is_signed_anew_with_its_time(
    sessions: Sessions, project: Project, hook_settings: Settings
) -> None:
    with receiving() as receiver:
        with sessions.begin() as session:
            webhook = hooked(session, project, f"http://127.0.0.1:{receiver.port}/in")
            webhooks.emit(session, project.id, "run.finished", {"text": "Zürich"})
        work(sessions, hook_settings)
    [(_, headers, body)] = receiver.came
    key = base64.b64decode(webhook_rules.secret(PEPPER, webhook.id, 1).removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    wanted = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{wanted}"
    assert abs(int(headers["webhook-timestamp"]) - datetime.now(UTC).timestamp()) < 30
    assert headers["content-type"] == "application/json"


# --- operators --------------------------------------------------------------------------------------------


def test_bad_addresses_unknown_events_and_too_many_are_refused(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        for url, events in (
            ("http://hook.example/", ALL), ("https://10.0.0.1/", ALL), ("https://hook.example/", []),
            ("https://hook.example/", ["run.started"]),
        ):  # fmt: skip
            with pytest.raises(InvalidRequest):
                webhooks.create(session, project, url=url, events=events, actor="user:1")
        for number in range(webhooks.MOST):
            hooked(session, project, f"https://hook.example/{number}")
        with pytest.raises(Conflict, match="at most"):
            hooked(session, project)


def test_a_webhook_of_another_project_is_not_there(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        other = seed.project(session, "other", "Other")
        webhook, mine = hooked(session, project), hooked(session, other)
        [delivery] = webhooks.emit(session, project.id, "run.finished", {})
        for what in (
            lambda: webhooks.get(session, other.id, webhook.id),
            lambda: webhooks.rotate(session, other.id, webhook.id, "x"),
            lambda: webhooks.resend(session, other.id, mine.id, delivery.id),
            lambda: webhooks.get(session, project.id, UUID(int=7)),
        ):
            with pytest.raises(NotFound):
                what()


def test_who_did_what_is_in_the_audit_log(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        webhook = hooked(session, project)
        webhooks.disable(session, project.id, webhook.id, "user:2", "too loud")
        webhooks.enable(session, project.id, webhook.id, "user:2")
        webhooks.remove(session, project.id, webhook.id, "user:3")
        said = [row[0] for row in session.execute(text("SELECT action FROM audit_event ORDER BY id"))]
        assert [one for one in said if one.startswith("webhook.")] == [
            "webhook.create", "webhook.disable", "webhook.enable", "webhook.delete",
        ]  # fmt: skip
        assert audit.verify(session).intact
