"""The deployment page while a candidate is on trial: what it says, and what people may do there, by API too."""

import pytest
from sqlalchemy import func, select, update
from starlette.testclient import TestClient

from benchmarks.learning_canary import World
from services.console.rollout_chart import Gate, draw
from services.console.rollout_view import moved
from services.console.wording import evidence
from services.settings import Settings
from services.store import deployments, rollouts, trials
from services.store.base import Sessions, uuid7
from services.store.models import Artifact, Dataset, Evaluation, Job, Project, Revision
from services.store.rollout_config import RolloutConfig
from services.web import create_app
from tests.console import seed, seed_rollout
from tests.console.conftest import SignIn

PAGE = {"accept": "text/html"}
JSON = {"accept": "application/json"}
PATH = "/p/canary/deployment"


@pytest.fixture
def trying(sessions: Sessions) -> Project:
    with sessions.begin() as session:
        return seed_rollout.on_trial(session)


@pytest.fixture
def operator(sign_in: SignIn) -> TestClient:
    return sign_in("olga@example.org", "operator")


def shown(client: TestClient, slug: str) -> str:
    answer = client.get(f"/p/{slug}/deployment", headers=PAGE)
    assert answer.status_code == 200
    return " ".join(answer.text.split())


def act(client: TestClient, action: str, sessions: Sessions, slug: str = "canary", **form: object) -> int:
    with sessions() as session:
        project = session.scalars(select(Project).where(Project.slug == slug)).one()
        generation = deployments.get(session, project.id).generation
    data = {"generation": generation, "reason": "because", **form}
    return client.post(f"/p/{slug}/deployment/{action}", data=data, headers=JSON).status_code


def stage(sessions: Sessions, project: Project) -> str:
    with sessions() as session:
        found = trials.latest(session, project.id)
    assert found is not None
    return found.stage


def test_the_page_says_where_a_canary_stands_and_why(trying: Project, operator: TestClient) -> None:
    text = shown(operator, "canary")
    for words in (
        "Canary under way", "not decided:", "more requests decide it", "rolled back when all of it is below",
        "promoted when all of it is above", "requests that end in an error", "as it should be",
        "in step", "loading", "Promote now", "Change share",
    ):  # fmt: skip
        assert words.lower() in text.lower(), words


def test_the_page_says_what_the_shadow_compares(sessions: Sessions, operator: TestClient) -> None:
    with sessions.begin() as session:
        seed_rollout.in_the_shadow(session)
    text = shown(operator, "shadow")
    assert "Nobody is served by it yet: 200 prompts" in text
    assert "In the shadow, 120 prompts" in text
    assert "Begin the canary" in text


def test_a_freeze_is_told_and_opened_only_with_a_reason(sessions: Sessions, operator: TestClient) -> None:
    with sessions.begin() as session:
        project = seed_rollout.frozen(session)
    assert "Promotion is frozen" in shown(operator, "frozen")
    assert act(operator, "looked", sessions, "frozen", reason=" ") == 400
    assert act(operator, "looked", sessions, "frozen", generation=1, reason="another page") == 409
    assert act(operator, "looked", sessions, "frozen", reason="the form was broken") == 200
    with sessions() as session:
        assert not deployments.get(session, project.id).frozen
    text = shown(operator, "frozen")
    assert "Promotion is frozen" not in text
    assert "the form was broken" in text


def test_promoting_by_hand_takes_a_reason(trying: Project, sessions: Sessions, operator: TestClient) -> None:
    assert act(operator, "promote", sessions, reason="") == 400
    assert stage(sessions, trying) == "canary"
    assert act(operator, "promote", sessions, reason="the desk is waiting for it") == 200
    assert stage(sessions, trying) == "promoted"
    assert "the desk is waiting for it" in shown(operator, "canary")


@pytest.mark.parametrize(
    ("action", "form", "ending"),
    [
        ("canary/stop", {}, "stopped"), ("rollback", {}, "rolled_back"), ("rollback", {"what": "live"}, "superseded"),
        ("canary/share", {"percent": 25}, "canary"),
    ],
)  # fmt: skip
def test_each_button_does_what_it_says_once(
    trying: Project, sessions: Sessions, operator: TestClient, action: str, form: dict[str, object], ending: str
) -> None:
    stale = {"generation": 1, "reason": "because", **form}
    assert operator.post(f"{PATH}/{action}", data=stale, headers=JSON).status_code == 409
    assert act(operator, action, sessions, **form) == 200
    assert stage(sessions, trying) == ending


@pytest.mark.parametrize("percent", [0, 51, "many"])
def test_no_share_beyond_half(trying: Project, sessions: Sessions, operator: TestClient, percent: object) -> None:
    assert act(operator, "canary/share", sessions, percent=percent) == 422


def test_the_canary_begins_by_hand_out_of_the_shadow(sessions: Sessions, operator: TestClient) -> None:
    with sessions.begin() as session:
        project = seed_rollout.in_the_shadow(session)
    assert act(operator, "canary/begin", sessions, "shadow") == 200
    assert stage(sessions, project) == "canary"


def test_an_artefact_that_passed_can_be_put_on_trial_from_the_page(sessions: Sessions, operator: TestClient) -> None:
    with sessions.begin() as session:
        project = seed.project(session, "canary", "Canary")
        digest = seed_rollout.adapter(session, project, "ready")
    assert digest[:12] in shown(operator, "canary")
    assert act(operator, "start", sessions, digest=digest) == 200
    assert act(operator, "start", sessions, digest=digest) == 409
    with sessions() as session:
        [job] = session.scalars(select(Job).where(Job.kind == "deploy"))
    assert job.payload["digest"] == digest
    assert "is being loaded and verified" in shown(operator, "canary")
    with sessions.begin() as session:
        session.execute(update(Job).values(state="failed", error="the record is gone"))
    assert "was not deployed: the record is gone" in shown(operator, "canary")


def test_the_button_says_where_it_swaps_everybody_at_once(sessions: Sessions, operator: TestClient) -> None:
    with sessions.begin() as session:
        for slug, rollout in (("canary", {}), ("direct", {"mode": "direct"})):
            seed_rollout.adapter(session, seed.project(session, slug, slug.title(), rollout=rollout), f"ready {slug}")
    for slug, there, absent in (
        ("canary", "Put on trial", "Swap everybody"), ("direct", "Swap everybody to it now", "Put on trial"),
    ):  # fmt: skip
        text = shown(operator, slug)
        assert f">{there}</button>" in text
        assert absent not in text


def test_what_an_artefact_was_compared_with_is_named_where_something_else_serves(
    sessions: Sessions, operator: TestClient
) -> None:
    with sessions.begin() as session:
        project = seed.project(session, "canary", "Canary")
        digest = seed_rollout.adapter(session, project, "ready")
        dataset = Dataset(project_id=project.id, name="golden")
        session.add(dataset)
        session.flush()
        revision = Revision(dataset_id=dataset.id, digest="r", train_count=0, held_out_count=0, report={})
        session.add(revision)
        session.flush()
        session.add(Evaluation(project_id=project.id, revision_id=revision.id, candidate_digest=digest))
    assert "not what serves now" not in shown(operator, "canary")
    with sessions.begin() as session:
        seed_rollout.live(session, session.get_one(Project, project.id), "newer")
    assert "compared with the base, not what serves now" in shown(operator, "canary")


@pytest.mark.parametrize("role", ["viewer", "reviewer", "lead"])
def test_who_is_no_operator_sees_all_of_it_and_may_do_nothing(
    trying: Project, sessions: Sessions, sign_in: SignIn, role: str
) -> None:
    somebody = sign_in("eve@example.org", role)
    text = shown(somebody, "canary")
    assert "Not decided:" in text
    assert "Promote now" not in text
    for action in ("rollback", "promote", "canary/stop", "canary/begin", "start", "looked"):
        assert act(somebody, action, sessions, digest="x") == 403, action


def test_a_project_that_never_tried_anything_says_what_will_happen(sessions: Sessions, operator: TestClient) -> None:
    with sessions.begin() as session:
        seed.project(session, "canary", "Canary")
        seed.project(session, "direct", "Direct", rollout={"mode": "direct"})
    assert "first serves 10 % of the users" in shown(operator, "canary")
    assert "swaps directly" in shown(operator, "direct")


def test_the_page_offers_the_way_back_that_there_is(sessions: Sessions, operator: TestClient) -> None:
    with sessions.begin() as session:
        project = seed.project(session, "canary", "Canary")
        first, _ = seed_rollout.live(session, project, "first"), seed_rollout.live(session, project, "second")
    assert f"Roll back to {first[:8]}" in shown(operator, "canary")
    with sessions.begin() as session:
        session.execute(update(Artifact).where(Artifact.digest == first).values(tainted_at=func.now()))
    assert "Roll back to the base model?" in shown(operator, "canary")


def test_a_promotion_and_its_history_stand_on_the_page_in_words(sessions: Sessions, operator: TestClient) -> None:
    with sessions.begin() as session:
        project = seed.project(session, "canary", "Canary")
        seed_rollout.live(session, project)
        seed_rollout.canary(session, project, World(0.9, 0.9, 0.5), 4000, RolloutConfig(share=0.5, harm=0.1))
        found = trials.open_of(session, project.id)
        assert found is not None
        assert found.verdict["action"] == "promote"
        rollouts.promote(session, project.id, rollouts.Decision("rollout", found.verdict["reason"], {}))
    text = shown(operator, "canary")
    for words in ("Last candidate", "promoted", "No worse by 10 points or more", "Passed the gate", "Trained"):
        assert words in text, words


def test_how_fast_traffic_followed_is_read_from_the_log(sessions: Sessions) -> None:
    with sessions.begin() as session:
        project = seed.project(session, "canary", "Canary")
        seed_rollout.live(session, project)
        deployments.roll_back(session, project.id, actor="ada", reason="worse")
        event = deployments.events(session, project.id)[0]
        assert moved(session, event) == ""
        seed.interaction(session, project.id, output="x", generation=event.generation)
        told = moved(session, event)
    assert told.startswith("The first request on what it went back to began ")
    assert told.endswith("none began on the old weights any more.")


def test_what_an_event_was_decided_on_is_told_in_figures() -> None:
    told = evidence({"states": [["a", "b", "c"]], "run_id": "1", "share": 0.1, "difference": -0.01234, "users": 1200})
    assert told == [("share", "10 %"), ("difference", "−0.01234"), ("users", "1,200")]
    gate = evidence({"evaluation": "1", "reasons": ["worse on accepted"], "target": [0.04, -0.011, 0.07]})
    assert gate == [("points on the target slice", "+4.0 (−1.1 to +7.0)")]


def test_a_rejection_says_why_and_leads_to_its_comparison_and_its_run(
    trying: Project, operator: TestClient, sessions: Sessions
) -> None:
    comparison, run, digest = uuid7(), uuid7(), "9" * 64
    with sessions.begin() as session:
        values = {"digest": digest, "kind": "adapter", "project_id": trying.id, "base_digest": "b", "manifest": {}}
        session.add(Artifact(**values, state="built"))
        session.flush()
        found = {"evaluation": str(comparison), "run_id": str(run), "target": [0.01, -0.02, 0.04], "reasons": ["no"]}
        deployments.advance(session, digest, "rejected", reason="worse on <b>accepted</b>", evidence=found)
    text = shown(operator, "canary")
    assert "worse on &lt;b&gt;accepted&lt;/b&gt;" in text
    assert "+1.0 (−2.0 to +4.0)" in text
    assert f'href="/p/canary/evaluations/{comparison}"' in text
    assert f'href="/p/canary/runs/{run}"' in text


def test_the_drawing_holds_every_gate_and_cuts_off_what_nobody_knew_yet() -> None:
    track = [
        {"requests": n, "estimate": -0.01, "low": -0.01 - 4 / n, "high": -0.01 + 4 / n} for n in range(10, 400, 10)
    ]
    drawn = draw(track, [Gate("harm", "", 0.0), Gate("pass", "", -0.05)], share=True)
    assert drawn is not None
    assert [gate.at for gate in drawn.gates] == sorted(gate.at for gate in drawn.gates)
    assert all(0 <= gate.at <= drawn.height for gate in drawn.gates)
    assert drawn.y_ticks[0].label.startswith("−")
    assert draw([], [], share=True) is None


# --- the admin API -----------------------------------------------------------------------------------------


@pytest.fixture
def api(console_settings: Settings, sessions: Sessions, admin_key: str) -> TestClient:
    headers = {"authorization": f"Bearer {admin_key}"}
    return TestClient(create_app(console_settings, sessions), base_url="http://console", headers=headers)


def test_the_api_tells_the_trial_and_carries_out_a_persons_word(
    trying: Project, sessions: Sessions, api: TestClient
) -> None:
    path = "/api/p/canary/deployment"
    told = api.get(f"{path}/rollout").json()
    assert (told["rollout"]["stage"], told["canary_share"], len(told["engines"])) == ("canary", 0.1, 2)
    assert told["rollout"]["verdict"]["guards"]
    assert told["config"]["signal"] == "feedback"
    assert api.post(f"{path}/canary/share", json={"share": 0.2}).json()["canary_share"] == 0.2
    assert api.post(f"{path}/canary/share", json={"share": 0.9}).status_code == 422
    assert api.post(f"{path}/canary/begin", json={}).status_code == 409
    assert api.post(f"{path}/looked", json={}).status_code == 400
    assert api.post(f"{path}/looked", json={"reason": "seen"}).status_code == 409
    stopped = api.post(f"{path}/canary/stop", json={"reason": "enough"}).json()
    assert stopped["canary_digest"] is None
    assert api.post(f"{path}/promote", json={}).status_code == 400
    assert api.post(f"{path}/promote", json={"reason": "sure"}).status_code == 409
    with sessions() as session:
        digest = session.scalars(select(Artifact.digest).where(Artifact.state == "retired")).one()
    assert api.post(f"{path}/start", json={"digest": digest}).json()["state"] == "queued"
    assert api.post(f"{path}/start", json={"digest": "nothing"}).status_code == 409
    back = api.post(f"{path}/rollback", json={"what": "live"}).json()
    assert back["active_digest"] is None
