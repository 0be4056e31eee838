"""Pages with real content: hostile text stays text, filters find, buttons do what they say."""

import html
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from engine.text.tokenizer import Tokenizer
from services.console.tokens import TokenReader
from services.settings import Settings
from services.store import deployments, people, reviews
from services.store.base import Sessions, make_sessions
from services.store.models import (
    AuditEvent,
    Example,
    Feedback,
    Interaction,
    InteractionBody,
    Job,
    Project,
    Revision,
    Run,
)
from services.web import create_app
from tests.console import seed
from tests.console.conftest import SignIn

PAGE = {"accept": "text/html"}
HOSTILE = [
    "<script>document.title='owned'</script>",
    '"><img src=x onerror=alert(1)>',
    "</textarea></title><svg/onload=alert(1)>",
    "{{ 7 * 7 }} {% raw %} ${7*7}",
    "javascript:alert(1) \u202e\u2028 \ufeff",
]


def text_of(client: TestClient, path: str) -> str:
    answer = client.get(path, headers=PAGE)
    assert answer.status_code == 200, (path, answer.text[:200])
    return answer.text


@pytest.fixture
def reader(sign_in: SignIn) -> TestClient:
    return sign_in("boss@example.org", "admin")


# --- hostile text -----------------------------------------------------------------------------------------


def test_hostile_text_is_shown_and_never_becomes_markup(sessions: Sessions, reader: TestClient) -> None:
    attack = " ".join(HOSTILE)
    with sessions.begin() as session:
        project = seed.project(session, "entities", attack, tags=[attack[:60]], guidelines=attack)
        logged = seed.interaction(
            session, project.id, output=attack, messages=[{"role": attack, "content": attack}], error=attack,
            finish_reason="error", session_key=attack, end_user=attack, tags={attack: attack},
        )  # fmt: skip
        session.add(
            Feedback(
                project_id=project.id, interaction_id=logged.id, idempotency_key="k", rating=-1, comment=attack,
                correction=attack + "!", author=attack,
            )
        )  # fmt: skip
        item = seed.item(session, logged)
        ada = seed.person(session, "ada@example.org", "reviewer").user
        [held] = reviews.lease(session, project.id, ada.id)
        sent = reviews.Judgement("correct", "k", correction=attack + "?", comment=attack)
        reviews.submit(session, project.id, item.id, ada.id, held.lease_token or uuid.uuid4(), sent)
    for path in (
        "/", "/p/entities", "/p/entities/live", "/p/entities/review", "/p/entities/interactions",
        f"/p/entities/interactions/{logged.id}", f"/p/entities/interactions?q={'%3Cscript%3E'}",
    ):  # fmt: skip
        text = text_of(reader, path)
        assert "<script>document" not in text, path
        assert "<img src=x" not in text, path
        assert "<svg/onload" not in text, path
        assert "49 {% raw" not in text, path
    shown = html.unescape(text_of(reader, f"/p/entities/interactions/{logged.id}"))
    assert attack in shown


def test_error_pages_escape_what_was_asked_for(reader: TestClient, project: Project) -> None:
    answer = reader.get("/p/<script>alert(1)</script>/runs", headers=PAGE)
    assert answer.status_code == 404
    assert "<script>alert" not in answer.text


# --- interactions -----------------------------------------------------------------------------------------


@pytest.fixture
def log(sessions: Sessions, project: Project) -> dict[str, Interaction]:
    with sessions.begin() as session:
        rows = {
            "plain": seed.interaction(session, project.id, output="a plain answer"),
            "percent": seed.interaction(session, project.id, output="100% under_score back\\slash"),
            "cut": seed.interaction(session, project.id, output="cut sho", finish_reason="length"),
            "adapted": seed.interaction(session, project.id, output="from an adapter", digest="d" * 64),
            "asked": seed.interaction(
                session, project.id, output="other", messages=[{"role": "user", "content": "the needle question"}]
            ),
        }
        disliked = Feedback(project_id=project.id, interaction_id=rows["cut"].id, idempotency_key="k", rating=-1)
        session.add(disliked)
    return rows


FILTERED: list[tuple[str, set[str]]] = [
    ("", {"plain", "percent", "cut", "adapted", "asked"}),
    ("?q=PLAIN", {"plain"}),
    ("?q=100%25", {"percent"}),
    ("?q=under_score", {"percent"}),
    ("?q=back%5Csla", {"percent"}),
    ("?q=needle", {"asked"}),
    ("?finish=length", {"cut"}),
    ("?digest=dddd", {"adapted"}),
    ("?digest=base", {"plain", "percent", "cut", "asked"}),
    ("?feedback=negative", {"cut"}),
    ("?feedback=positive", set()),
    ("?feedback=none&window=hour", {"plain", "percent", "adapted", "asked"}),
    ("?finish=bogus&window=bogus&feedback=bogus", {"plain", "percent", "cut", "adapted", "asked"}),
    ("?q=a%00b", set()),
]


def test_filters_in_the_address_narrow_the_list(reader: TestClient, log: dict[str, Interaction]) -> None:
    for query, expected in FILTERED:
        text = text_of(reader, f"/p/entities/interactions{query}")
        assert {name for name, row in log.items() if str(row.id) in text} == expected, query


def test_paging_by_the_last_id_shows_every_interaction_once(
    reader: TestClient, sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        ids = [
            str(seed.interaction(session, project.id, output=f"n{n}", ago=timedelta(milliseconds=n)).id)
            for n in range(120)
        ]
    seen: list[str] = []
    path = "/p/entities/interactions"
    for _ in range(5):
        text = text_of(reader, path)
        seen += [one for one in ids if f"/interactions/{one}" in text]
        if 'rel="next"' not in text:
            break
        link = text.split('rel="next"')[0].rsplit('href="', 1)[1].split('"')[0]
        path = html.unescape(link)
    assert sorted(seen) == sorted(ids)


@pytest.mark.usefixtures("lived_in")
def test_an_interaction_shows_what_was_done_with_it(sessions: Sessions, reader: TestClient) -> None:
    with sessions() as session:
        taught = session.scalars(select(Run).where(Run.phase == "live")).one()
        row = session.execute(
            select(Interaction.id).where(Interaction.id.in_(select(seed.ReviewItem.interaction_id)))
        ).first()
        assert row is not None
        example = session.scalars(select(Example).limit(1)).one()
    text = text_of(reader, f"/p/entities/interactions/{example.interaction_id}")
    for expected in ("Chosen for review", "Copied into golden", str(taught.id), "of attention"):
        assert expected in text


def test_somebody_about_to_judge_is_not_told_what_chose_the_item(
    sign_in: SignIn, sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        [item] = seed.queue(session, project.id, ["one"])
    client = sign_in("ada@example.org", "reviewer")
    path = f"/p/entities/interactions/{item.interaction_id}"
    assert "uniform audit" in text_of(client, path)
    client.post("/p/entities/review/lease", json={})
    assert "uniform audit" not in text_of(client, path)


# --- buttons ----------------------------------------------------------------------------------------------


def test_train_now_starts_one_run_and_a_second_press_is_told_why_not(
    sessions: Sessions, reader: TestClient, project: Project
) -> None:
    pressed = reader.post("/p/entities/runs", headers=PAGE)
    assert pressed.status_code == 303
    assert "Queued" in text_of(reader, pressed.headers["location"])
    again = reader.post("/p/entities/runs", headers=PAGE)
    assert again.status_code == 409
    assert "unfinished" in again.text
    with sessions() as session:
        [run] = session.scalars(select(Run)).all()
        assert session.scalars(select(Job.kind)).all() == ["dataset.build"]
    cancelled = reader.post(f"/p/entities/runs/{run.id}/cancel", headers=PAGE)
    assert cancelled.status_code == 303
    assert "cancelled" in text_of(reader, f"/p/entities/runs/{run.id}")
    assert reader.post(f"/p/entities/runs/{run.id}/cancel").status_code == 409


@pytest.mark.usefixtures("lived_in")
def test_a_run_page_shows_curves_decision_and_rows(sessions: Sessions, reader: TestClient) -> None:
    with sessions() as session:
        promoted = session.scalars(select(Run.id).where(Run.phase == "live")).one()
        refused = session.scalars(select(Run.id).where(Run.phase == "refused")).one()
    text = text_of(reader, f"/p/entities/runs/{promoted}")
    for expected in (
        "Loss",
        "Learning rate",
        "Passed the gate: ",
        "+87.0",
        "better on what was corrected",
        "the answer would be",
    ):
        assert expected in text
    assert text.count('class="line"') == 3
    assert "Refused: what served stays" in text_of(reader, f"/p/entities/runs/{refused}")
    losses = text_of(reader, f"/p/entities/runs/{promoted}/live?show=loss")
    assert "No row with this outcome" in losses
    assert "data-live-stop" in losses


@pytest.mark.usefixtures("lived_in")
def test_a_run_on_trial_leads_to_its_trial_and_goes_on_moving(sessions: Sessions, reader: TestClient) -> None:
    with sessions.begin() as session:
        run = session.scalars(select(Run).where(Run.phase == "live")).one()
        run.phase = "canary"
    page = reader.get(f"/p/entities/runs/{run.id}/live", headers=PAGE).text
    assert "On trial with a share of the users" in page
    assert 'href="/p/entities/deployment"' in page
    assert "data-live-stop" not in page


def test_building_a_dataset_twice_queues_one_job(sessions: Sessions, reader: TestClient, project: Project) -> None:
    for _ in range(2):
        assert reader.post("/p/entities/datasets/golden/build").status_code == 303
    with sessions() as session:
        assert session.scalars(select(Job.kind)).all() == ["dataset.build"]
    assert reader.post("/p/entities/datasets/..%2fetc/build").status_code in (404, 422)
    assert reader.post("/p/entities/datasets/-x/build").status_code == 422


@pytest.mark.usefixtures("lived_in")
def test_a_revision_page_shows_its_rows_and_an_unknown_one_is_404(sessions: Sessions, reader: TestClient) -> None:
    with sessions() as session:
        digest = session.scalars(select(Revision.digest).order_by(Revision.id.desc()).limit(1)).one()
    text = text_of(reader, f"/p/entities/datasets/golden/{digest}?split=held_out")
    assert digest in text
    assert "corrected answer" in text
    assert reader.get(f"/p/entities/datasets/golden/{'0' * 64}", headers=PAGE).status_code == 404
    assert reader.get(f"/p/entities/datasets/golden/{digest}?split=all", headers=PAGE).status_code == 422


def test_roll_back_goes_back_once_and_a_stale_page_cannot_do_it_again(
    sessions: Sessions, lived_in: Project, reader: TestClient
) -> None:
    form = {"generation": "2", "reason": "answers got worse"}
    done = reader.post("/p/entities/deployment/rollback", data=form, headers={"accept": "application/json"})
    assert (done.status_code, done.json()) == (200, {"generation": 3, "active_digest": None})
    assert reader.post("/p/entities/deployment/rollback", data=form).status_code == 409
    text = text_of(reader, "/p/entities/deployment")
    assert "Rolled back" in text
    assert "answers got worse" in text
    with sessions() as session:
        assert deployments.get(session, lived_in.id).active_digest is None
        actors = session.scalars(select(AuditEvent.actor).where(AuditEvent.action == "deployment.roll_back")).all()
    assert actors == [f"user:{people.find_user(session, 'boss@example.org').id}"]


# --- trouble ----------------------------------------------------------------------------------------------


def test_without_a_database_the_console_says_so_and_stays_up(tmp_path: Path, console_settings: Settings) -> None:
    nowhere = make_sessions(f"postgresql+psycopg://whet@/none?host={tmp_path}")
    client = TestClient(create_app(console_settings, nowhere), cookies={"whet_session": "x"})
    page = client.get("/", headers=PAGE)
    assert page.status_code == 503
    assert "database" in page.text
    assert client.get("/api/projects", headers={"authorization": f"Bearer wh_abcdefgh_{'x' * 43}"}).status_code == 503
    assert client.get("/health").status_code == 200
    nowhere.kw["bind"].dispose()


def test_an_unknown_address_is_a_page_for_people_and_json_for_scripts(reader: TestClient) -> None:
    assert "Nothing here" in reader.get("/no/such/place", headers=PAGE).text
    assert reader.get("/no/such/place").json()["error"]["code"] == "not_found"
    assert reader.get("/static/../../services/settings.py").status_code == 404
    assert reader.get("/static/..%2f..%2fservices/settings.py").status_code == 404


# --- tokens -----------------------------------------------------------------------------------------------


def test_the_tint_shows_every_token_with_its_probability(
    console_settings: Settings, sessions: Sessions, project: Project, reader: TestClient
) -> None:
    tokenizer = Tokenizer.load(console_settings.model_path)
    output = "The naïve <b>café</b> – 4 €."
    ids = tokenizer.encode_plain(output)
    with sessions.begin() as session:
        logged = seed.interaction(session, project.id, output=output)
        body = session.get_one(InteractionBody, logged.id)
        body.token_ids, body.token_logprobs = ids, [-0.1 * place for place in range(len(ids))]
        body.tokenizer_hash = tokenizer.digest
        foreign = seed.interaction(session, project.id, output=output)
    pieces = TokenReader(console_settings).pieces(body)
    assert pieces is not None
    assert "".join(text for text, _ in pieces) == output
    text = text_of(reader, f"/p/entities/interactions/{logged.id}")
    assert "Show probabilities" in text
    assert "tok-3" in text
    assert "<b>café" not in text
    assert "Show probabilities" not in text_of(reader, f"/p/entities/interactions/{foreign.id}")
