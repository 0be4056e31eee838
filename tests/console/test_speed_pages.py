"""The pages that show what drafting earned, and the buttons beside a project's heads."""

import random
import re
from datetime import UTC, datetime

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from services.store import deployments, people, projects, runs
from services.store.base import Sessions
from services.store.models import Artifact, AuditEvent, DeploymentEvent, Interaction, Project, Run
from tests.console import seed_speed
from tests.console.conftest import SignIn
from tests.console.test_pages import PAGE, text_of


@pytest.fixture
def fast(sessions: Sessions, project: Project) -> Project:
    with sessions.begin() as session:
        seed_speed.sped_up(session, session.merge(project))
    return project


@pytest.fixture
def operator(sign_in: SignIn) -> TestClient:
    return sign_in("olga@example.org", "operator")


def heads(sessions: Sessions, project: Project) -> dict[str, str]:
    with sessions() as session:
        row = deployments.get(session, project.id)
        return {"live": row.speculator_digest or "", "canary": row.speculator_canary_digest or ""}


@pytest.mark.parametrize(
    "path", ["/p/entities", "/p/entities/live", "/p/entities/deployment", "/p/entities/deployment/live"]
)
def test_the_plot_its_words_and_the_drafters_are_on_both_pages(fast: Project, operator: TestClient, path: str) -> None:
    text = text_of(operator, path)
    assert re.search(r"Answers are decoded 2\.\d\d times as fast as without drafts \(95 % interval", text)
    assert 'class="series-drafted"' in text
    assert 'class="series-plain"' in text
    assert "with drafts: " in text  # each point says its figure and how many answers it is from
    assert text.count('class="fill-heads"') > 8
    assert "tokens a step" in text
    assert re.search(r"Suffix</span>.*?a draft", text, re.S)
    assert "Exact for one stream at a time" in text_of(operator, path)


def test_home_says_how_much_faster_a_project_is_once_it_is_known(
    fast: Project, sessions: Sessions, operator: TestClient
) -> None:
    with sessions.begin() as session:
        projects.create(session, "quiet", "Quiet")
    text = text_of(operator, "/")
    assert re.findall(r"2\.\d times as fast", text) == [re.findall(r"\d\.\d times as fast", text)[0]]


def test_empty_pages_say_what_will_appear_and_when(project: Project, operator: TestClient) -> None:
    overview = text_of(operator, "/p/entities")
    assert "Not measured yet" in overview
    assert "The plot begins with the first answer of 8 tokens or more." in overview
    deployment = text_of(operator, "/p/entities/deployment")
    assert "Heads train themselves after 50,000 response tokens; 0 so far." in deployment
    assert "Retire to suffix" not in deployment


def test_without_a_baseline_the_live_rate_is_drawn_and_the_ratio_is_not_known(
    sessions: Sessions, project: Project, operator: TestClient
) -> None:
    dice = random.Random(1)
    with sessions.begin() as session:
        session.add_all(
            seed_speed.answer(project, datetime.now(UTC), dice, speculation=None, rate=90) for _ in range(9)
        )
    text = text_of(operator, "/p/entities")
    assert "0 of the 5 that it takes are there" in text
    assert 'class="series-drafted"' in text
    assert "Nothing was drafted in this time" in text


def test_speculation_that_is_switched_off_says_so(sessions: Sessions, project: Project, operator: TestClient) -> None:
    with sessions.begin() as session:
        projects.configure(session, session.merge(project), {"speculation": {"enabled": False}})
    assert "Speculation is switched off for this project" in text_of(operator, "/p/entities")
    text = text_of(operator, "/p/entities/deployment")
    assert "nothing: switched off" in text
    assert "Train heads now" not in text


def test_the_deployment_page_names_the_heads_and_their_history(
    fast: Project, sessions: Sessions, operator: TestClient
) -> None:
    text = text_of(operator, "/p/entities/deployment")
    for digest in heads(sessions, fast).values():
        assert digest[:10] in text
    assert "25 %" in text
    for title in ("Trying heads", "Heads live"):
        assert title in text


# --- buttons ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "kinds", "left", "states"),
    [
        ("withdraw", ["speculator_retired"], ("live", None), {"live": "live", "canary": "retired"}),
        ("rollback", ["speculator_rolled_back"], (None, "canary"), {"live": "rolled_back", "canary": "canary"}),
        ("retire", ["speculator_retired"] * 2, (None, None), {"live": "retired", "canary": "retired"}),
    ],
)
def test_buttons_change_the_heads_once_and_a_stale_page_cannot_do_it_again(
    fast: Project, sessions: Sessions, operator: TestClient,
    action: str, kinds: list[str], left: tuple[str | None, str | None], states: dict[str, str],
) -> None:  # fmt: skip
    seen = heads(sessions, fast)
    form = {**seen, "reason": "drafts got worse"}
    path = f"/p/entities/speculator/{action}"
    done = operator.post(path, data=form, headers={"accept": "application/json"})
    wanted = {"live": left[0] and seen["live"], "canary": left[1] and seen["canary"]}
    assert (done.status_code, {name: done.json()[name] for name in wanted}) == (200, wanted)
    again = operator.post(path, data=form)
    assert again.status_code == 409
    assert "look again" in again.json()["error"]["message"]
    with sessions() as session:
        newest = select(DeploymentEvent).order_by(DeploymentEvent.id.desc()).limit(len(kinds))
        changes = session.scalars(newest).all()
        assert [(one.kind, one.reason, one.actor) for one in changes] == [
            (kind, "drafts got worse", "olga@example.org") for kind in kinds
        ]
        found = {name: session.get_one(Artifact, digest).state for name, digest in seen.items()}
        assert found == states
        actors = session.scalars(select(AuditEvent.actor).where(AuditEvent.action == f"deployment.{kinds[0]}")).all()
        assert actors[-1] == f"user:{people.find_user(session, 'olga@example.org').id}"
    assert operator.post(path, data=heads(sessions, fast), headers=PAGE).status_code in (303, 409)


def test_a_reviewer_sees_no_buttons_and_cannot_press_them(fast: Project, sessions: Sessions, sign_in: SignIn) -> None:
    reviewer = sign_in("ada@example.org", "reviewer")
    text = text_of(reviewer, "/p/entities/deployment")
    for label in ("Retire to suffix", "Roll back heads", "Withdraw canary", "Train heads now"):
        assert label not in text
    for action in ("retire", "rollback", "withdraw", "train"):
        answer = reviewer.post(f"/p/entities/speculator/{action}", data=heads(sessions, fast))
        assert answer.status_code == 403, action
    foreign = reviewer.post("/p/entities/speculator/retire", headers={"origin": "https://evil.example"})
    assert foreign.status_code == 403


# --- one interaction --------------------------------------------------------------------------------------


def test_an_interaction_shows_its_drafts_its_rate_or_why_there_are_none(
    fast: Project, sessions: Sessions, operator: TestClient
) -> None:
    with sessions() as session:
        both = session.scalars(select(Interaction).where(Interaction.speculation["heads"].is_not(None)).limit(1)).one()
        plain = session.scalars(select(Interaction).where(~Interaction.speculated).limit(1)).one()
    text = text_of(operator, f"/p/entities/interactions/{both.id}")
    assert f"{both.accepted_tokens} of {both.drafted_tokens} tokens" in text
    assert "tokens a second" in text
    assert 'class="draft-bars heads"' in text
    assert 'class="draft-bars suffix"' in text
    assert "one of the baseline" in text_of(operator, f"/p/entities/interactions/{plain.id}")


# --- a run that trains heads ------------------------------------------------------------------------------


def test_a_run_of_heads_shows_its_own_steps_curves_and_the_gates_words(
    project: Project, sessions: Sessions, operator: TestClient
) -> None:
    with sessions.begin() as session:
        run = Run(project_id=project.id, kind="speculator", params={"heads": 4}, created_by="dispatcher")
        session.add(run)
        session.flush()
        runs.enter_phase(session, run, "training")
        for step in range(1, 5):
            # Before it was measured there is no tau.
            told = {"steps": 80, "loss": 2.0 / step, "tau": None if step < 3 else 1.2 + step / 10,
                    "tokens_per_second": 9000.0, "eta": 42.0}  # fmt: skip
            runs.add_event(session, run.id, "progress", told, step=step)
    text = text_of(operator, f"/p/entities/runs/{run.id}")
    for expected in (
        "Training heads",
        "Read the log",
        "Expected tokens per step (τ)",
        "step 4 of 80, about 42.0 s left",
    ):
        assert expected in text
    assert text.count('class="line"') == 3
    assert "Preflight" not in text
    with sessions.begin() as session:
        made = session.get_one(Run, run.id)
        reasons = ["not shown to accept more: +0.4 % [-1.1, +1.9]", "<script>alert(1)</script>"]
        gate = {"decision": "refuse", "reasons": reasons, "requests": 61, "tau": 1.61, "rows": [{"id": 1}]}
        runs.add_event(session, made.id, "gate", gate)
        runs.finish(session, made, "succeeded", "refused")
    text = text_of(operator, f"/p/entities/runs/{run.id}")
    assert "Refused: what drafts now stays" in text
    assert "not shown to accept more" in text
    assert "<script>alert" not in text
    assert "refused" in text_of(operator, "/p/entities/runs")
    assert "The last training ended refused" not in text_of(
        operator, "/p/entities/deployment"
    )  # 0 of 50,000 tokens yet


def test_training_heads_does_not_hold_up_training_an_adapter(
    project: Project, sessions: Sessions, operator: TestClient
) -> None:
    with sessions.begin() as session:
        session.add(Run(project_id=project.id, kind="speculator", params={}, created_by="dispatcher"))
    assert "A run is under way" not in text_of(operator, "/p/entities/runs")
    deployment = text_of(operator, "/p/entities/deployment")
    assert "Heads are being trained" in deployment
    assert operator.post("/p/entities/runs").status_code == 201
