"""The run pages: a form for every kind with errors beside the fields, filters, curves, sweep, preflight, retry."""

import html
import re
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from services.console import run_charts
from services.store import reviews, runs
from services.store.base import Sessions
from services.store.models import Project, Revision, Run, RunEvent
from services.store.run_params import KINDS, PARAMS
from tests.console import seed, seed_rollout, seed_runs
from tests.console.conftest import SignIn

PAGE = {"accept": "text/html"}
RUNS = "/p/entities/runs"


@pytest.fixture
def lead(sign_in: SignIn) -> TestClient:
    return sign_in("lead@example.org", "lead")


def text_of(client: TestClient, path: str) -> str:
    answer = client.get(path, headers=PAGE)
    assert answer.status_code == 200, (path, answer.text[:300])
    return html.unescape(answer.text)


# --- the form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_shows_every_parameter_of_its_kind_with_its_default(
    kind: str, lead: TestClient, lived_in: Project
) -> None:
    text = text_of(lead, f"{RUNS}/new?kind={kind}")

    for name, field in PARAMS[kind].model_fields.items():
        assert f'name="{name}"' in text, name
        assert (field.description or "?") in text, name
    shown = re.search(r'name="lr"[^>]*placeholder="([^"]+)"', text)
    assert shown is not None
    assert float(shown[1]) == PARAMS[kind].model_fields["lr"].default


def test_what_the_project_configured_is_the_value_shown(
    lead: TestClient, lived_in: Project, sessions: Sessions
) -> None:
    with sessions.begin() as session:
        session.get_one(Project, lived_in.id).config = {"train": {"epochs": 7, "kto": {"beta": 0.42}}}

    assert 'placeholder="7"' in text_of(lead, f"{RUNS}/new?kind=sft")
    kto = text_of(lead, f"{RUNS}/new?kind=kto")
    assert 'placeholder="0.42"' in kto
    assert 'placeholder="7"' not in kto


def test_a_run_starts_with_what_was_filled_in_and_defaults_elsewhere(
    lead: TestClient, lived_in: Project, sessions: Sessions
) -> None:
    sent = {"kind": "dpo", "dataset": "golden", "lr": "0.0007", "epochs": "", "targets": "q_proj, v_proj", "sweep": "3"}

    answer = lead.post(RUNS, headers=PAGE, data=sent, follow_redirects=False)

    assert answer.status_code == 303
    with sessions() as session:
        run = session.scalars(select(Run).where(Run.state == "queued")).one()
    assert answer.headers["location"] == f"{RUNS}/{run.id}"
    assert (run.kind, run.params["lr"], run.params["sweep"], run.params["targets"]) == (
        "dpo", 0.0007, 3, ["q_proj", "v_proj"],
    )  # fmt: skip
    assert run.params["epochs"] == PARAMS["dpo"].model_fields["epochs"].default


def test_errors_stand_beside_their_fields_and_nothing_starts(
    lead: TestClient, lived_in: Project, sessions: Sessions
) -> None:
    sent = {"kind": "kto", "dataset": "golden", "lr": "fast", "beta": "0.5", "batch_size": "1", "rank": "9000"}

    answer = lead.post(RUNS, headers=PAGE, data=sent)

    assert answer.status_code == 422
    wrong = re.findall(r'id="wrong-([a-z_]+)"', answer.text)
    assert sorted(wrong) == ["batch_size", "lr", "rank"]
    assert 'value="fast"' in answer.text
    assert 'value="0.5"' in answer.text
    assert '<details class="more" open>' in answer.text
    with sessions() as session:
        assert session.scalars(select(Run).where(Run.state == "queued")).all() == []


def test_a_script_hears_of_an_error_as_json(lead: TestClient, lived_in: Project) -> None:
    answer = lead.post(RUNS, data={"kind": "dpo", "beta": "-1"}, headers={"accept": "application/json"})
    assert answer.status_code == 400
    assert "beta" in answer.json()["error"]["message"]
    assert lead.post(RUNS, data={"kind": "grpo"}).status_code == 400
    assert lead.post(RUNS, data={"dataset": "no such/name"}).status_code == 400


def test_hostile_values_stay_text(lead: TestClient, lived_in: Project) -> None:
    attack = '"><script>alert(1)</script>'
    answer = lead.post(RUNS, headers=PAGE, data={"kind": "sft", "lr": attack, "dataset": attack})
    assert answer.status_code == 422
    assert "<script>alert" not in answer.text


def test_a_viewer_sees_no_form(sign_in: SignIn, lived_in: Project) -> None:
    viewer = sign_in("viewer@example.org", "viewer")
    assert viewer.get(f"{RUNS}/new", headers=PAGE).status_code == 403
    assert viewer.post(RUNS, data={"kind": "sft"}).status_code == 403


# --- what is known before a run ------------------------------------------------------------------------------


def corrected(sessions: Sessions, project: Project, count: int, reviewers: int) -> None:
    """Held-out answers that so many people have corrected alike, each a group of its own."""
    with sessions.begin() as session:
        people = [seed.person(session, f"{n}@example.org", "reviewer", project.id).user for n in range(reviewers)]
        for item in seed.queue(session, project.id, [f"wrong {index}" for index in range(count)], overlap=2):
            for user in people:
                item.lease_user_id, item.lease_token = user.id, uuid4()
                item.lease_expires_at = datetime.now(UTC) + timedelta(minutes=1)
                session.flush()
                said = reviews.Judgement("correct", uuid4().hex, correction="right")
                reviews.submit(session, project.id, item.id, user.id, item.lease_token, said)


@pytest.mark.parametrize("page", [RUNS, f"{RUNS}/new"])
def test_who_corrects_alone_hears_before_the_run_that_nothing_is_held_out(
    page: str, lead: TestClient, project: Project, sessions: Sessions
) -> None:
    corrected(sessions, project, 31, reviewers=1)

    text = text_of(lead, page)

    assert "The gate needs held-out corrections of 30 groups and has 0" in text
    assert "31 held-out answers wait for a second reviewer" in text
    assert f'href="/p/{project.slug}/queue"' in text
    assert f'href="/p/{project.slug}/people"' in text
    assert "watch" not in text, "nothing is promised that the gate would refuse"


@pytest.mark.parametrize("page", [RUNS, f"{RUNS}/new"])
def test_nothing_is_warned_of_where_two_people_agree_on_enough(
    page: str, lead: TestClient, project: Project, sessions: Sessions
) -> None:
    corrected(sessions, project, 30, reviewers=2)

    text = text_of(lead, page)

    assert "Too little is held out" not in text
    assert "Promotion is frozen" not in text
    if page == RUNS:
        assert "60 judgements are there to learn from. Press" in text
        assert "60 judgements are there to learn from. Press" in text_of(lead, f"{RUNS}/live")


def test_one_judgement_is_one(lead: TestClient, project: Project, sessions: Sessions) -> None:
    corrected(sessions, project, 1, reviewers=1)
    assert "One judgement is there to learn from, but too few" in text_of(lead, RUNS)


def test_heads_are_not_judged_by_corrections(lead: TestClient, project: Project) -> None:
    assert "Too little is held out" not in text_of(lead, f"{RUNS}/new?kind=speculator")


def test_a_freeze_is_told_before_a_run_and_only_to_those_it_concerns(lead: TestClient, sessions: Sessions) -> None:
    with sessions.begin() as session:
        seed_rollout.frozen(session)
        seed.project(session, "open", "Open")

    for page in ("runs", "runs/new"):
        told = text_of(lead, f"/p/frozen/{page}")
        assert "Promotion is frozen" in told
        assert 'href="/p/frozen/deployment"' in told
        assert "Promotion is frozen" not in text_of(lead, f"/p/open/{page}")


def test_a_candidate_that_waits_for_a_person_is_shown_as_one(
    lead: TestClient, shown: dict[str, Run], sessions: Sessions
) -> None:
    with sessions.begin() as session:
        run = session.merge(shown["working"])
        runs.enter_phase(session, run, "deploying")
        runs.finish(session, run, "succeeded", runs.WAITING, "it waits: promotion is frozen")

    text = text_of(lead, f"{RUNS}/{shown['working'].id}")

    assert "it waits: promotion is frozen" in text
    assert "an operator puts it on trial by hand" in text
    assert re.search(r'<li class="step now"><i></i><span>Deploy</span>', text)
    assert "Try again" not in text


# --- list and page ----------------------------------------------------------------------------------------


@pytest.fixture
def shown(sessions: Sessions, lived_in: Project) -> dict[str, Run]:
    with sessions.begin() as session:
        project = session.get_one(Project, lived_in.id)
        revision = session.scalars(select(Revision).order_by(Revision.id.desc())).first()
        assert revision is not None
        broken = seed_runs.broken(session, project, revision)
        return {"broken": broken, "working": seed_runs.at_work(session, project, revision)}


def test_the_list_is_narrowed_by_kind_and_state(lead: TestClient, shown: dict[str, Run]) -> None:
    working, broken = str(shown["working"].id), str(shown["broken"].id)

    assert working in text_of(lead, RUNS)
    assert broken in text_of(lead, RUNS)
    only = text_of(lead, f"{RUNS}?kind=kto&state=failed")
    assert broken in only
    assert working not in only
    assert "No such run" in text_of(lead, f"{RUNS}?kind=kto&state=working")
    assert lead.get(f"{RUNS}?kind=grpo", headers=PAGE).status_code == 422


def test_a_run_at_work_shows_its_curves_its_sweep_and_its_checks(lead: TestClient, shown: dict[str, Run]) -> None:
    text = text_of(lead, f"{RUNS}/{shown['working'].id}")

    for title in (
        "Loss", "Validation, nats a token", "Reward margin, better less worse", "Pairs won by the better answer",
        "Learning rate", "Gradient norm", "Tokens per second", "Memory, MB", "Sweep", "Where the time went",
        "Rows by tokens learned from",
    ):  # fmt: skip
        assert title in text, title
    assert "300 answers were reviewed since the last run" in text
    assert "step 60 of 104, about 26.4 s left · went on from checkpoint 25" in text
    assert "23 older examples" in text
    assert "both answers of the pair are the same" in text
    assert "Cancel run" in text
    assert "Distance from the base" not in text


def test_a_failed_run_says_why_and_is_tried_again_three_times_at_most(
    lead: TestClient, shown: dict[str, Run], sessions: Sessions
) -> None:
    with sessions.begin() as session:
        runs.finish(session, session.merge(shown["working"]), "cancelled", "cancelled")
    at = shown["broken"].id
    assert "Leak of held-out rows: 3 prompts" in text_of(lead, f"{RUNS}/{at}")
    for number in (1, 2, 3):
        answer = lead.post(f"{RUNS}/{at}/retry", headers=PAGE, follow_redirects=False)
        assert answer.status_code == 303
        assert lead.post(f"{RUNS}/{at}/retry").status_code == 409, "one is at work"
        with sessions.begin() as session:
            run = session.scalars(select(Run).where(Run.state == "queued")).one()
            runs.finish(session, run, "failed", "failed", "again")
            assert (run.kind, run.revision_id) == ("kto", shown["broken"].revision_id)
        at = run.id
        assert f"retry {number} of 3" in text_of(lead, f"{RUNS}/{at}")
    for one in (at, shown["broken"].id):
        answer = lead.post(f"{RUNS}/{one}/retry")
        assert answer.status_code == 409
        assert "tried again 3 times already" in answer.text


def test_a_run_that_did_not_fail_cannot_be_tried_again(lead: TestClient, shown: dict[str, Run]) -> None:
    assert lead.post(f"{RUNS}/{shown['working'].id}/retry").status_code == 409


def test_when_runs_begin_by_themselves_is_said_on_a_page(
    lead: TestClient, sign_in: SignIn, lived_in: Project, sessions: Sessions
) -> None:
    at = f"{RUNS}/triggers"
    wrong = lead.post(at, headers=PAGE, data={"examples": "200", "daily_at": "25:00"})
    assert wrong.status_code == 422
    assert 'value="25:00"' in wrong.text
    assert "A time is HH:MM, from 00:00 to 23:59." in wrong.text

    done = lead.post(at, headers=PAGE, data={"kind": "kto", "examples": "200", "every_hours": ""})

    assert done.status_code == 303
    assert "after 200 answers reviewed or imported" in text_of(lead, RUNS)
    assert 'value="200"' in lead.get(at, headers=PAGE).text
    with sessions() as session:
        config = session.get_one(Project, lived_in.id).config
    assert config["train_when"] == {"kind": "kto", "examples": 200}
    assert sign_in("v@example.org", "viewer", lived_in.id).get(at, headers=PAGE).status_code == 403
    assert lead.post(at, headers=PAGE, data={}).status_code == 303
    with sessions() as session:
        assert "train_when" not in session.get_one(Project, lived_in.id).config


# --- drawings ---------------------------------------------------------------------------------------------


def test_a_curve_goes_on_where_the_checkpoint_was() -> None:
    told = [(1.0, 9.0), (2.0, 8.0), (3.0, 7.0), (2.0, 8.5), (3.0, 7.5), (4.0, 6.0)]
    assert run_charts.going_on(told) == [(1.0, 9.0), (2.0, 8.5), (3.0, 7.5), (4.0, 6.0)]


def test_the_timeline_adds_up() -> None:
    start = datetime(2027, 1, 1, tzinfo=UTC)
    told = [("queued", 0), ("training", 10), ("canary", 40), ("live", 90)]
    events = [RunEvent(kind="phase", payload={"phase": name}, at=start + timedelta(seconds=at)) for name, at in told]

    drawn = run_charts.timeline(events, start + timedelta(seconds=40))

    assert drawn is not None
    assert [(span.name, span.seconds) for span in drawn.spans] == [("queued", 10.0), ("training", 30.0)]
    assert drawn.spans[1].width == pytest.approx(3 * drawn.spans[0].width, rel=0.01)


def test_buckets_stand_in_their_order() -> None:
    drawn = run_charts.histogram({">1024": 1, "<=128": 4, "<=16": 2})
    assert drawn is not None
    assert [(bar.label, bar.rows) for bar in drawn.bars] == [("≤ 16", 2), ("≤ 128", 4), ("> 1024", 1)]
    heights = {bar.rows: bar.height for bar in drawn.bars}
    assert heights[4] == pytest.approx(2 * heights[2], rel=0.02)
    assert run_charts.histogram({}) is None


def test_a_sweep_is_drawn_once_however_often_it_was_told() -> None:
    told = [dict(zip(("candidate", "rung", "steps", "loss", "kept"), row, strict=True)) for row in (
        (0, 0, 25, 0.6, True), (1, 0, 25, 1e9, False), (0, 0, 25, 0.6, True),
    )]  # fmt: skip
    events = [RunEvent(kind="trial", payload=row) for row in told]
    rows = run_charts.trial_rows(events)
    assert [(row["candidate"], row["rung"]) for row in rows] == [(0, 0), (1, 0)]
    drawn = run_charts.trial_plot(rows)
    assert drawn is not None
    assert [(line.candidate, line.chosen) for line in drawn.lines] == [(0, True)]
