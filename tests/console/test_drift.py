"""Drift: called when quality or input has moved since the last deployment, and not for a day's ordinary difference."""

import random
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy.orm import Session

from benchmarks import drift_simulation
from benchmarks.drift_simulation import World, input_looks, quality_looks
from services.store import deployments, drift, partitions
from services.store.base import Sessions
from services.store.drift_rules import LEAST_PROMPTS, Prompt, apart, dropped, features, moved, stability
from services.store.models import Artifact, Project
from services.store.quality import Estimate
from tests.console import seed
from tests.console.conftest import SignIn
from tests.console.seed_learning import dated, judged

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
LIVE = NOW - 4 * DAY


# --- rules ------------------------------------------------------------------------------------------------


def test_the_index_is_nothing_for_the_same_mix_and_the_published_one_for_another() -> None:
    half = Counter(a=50_000, b=50_000)
    assert stability(half, Counter(a=49_900, b=50_100)) < 1e-4
    # (0.6 - 0.4) ln(0.6 / 0.4) twice, by hand.
    assert stability(Counter(a=60_000, b=40_000), Counter(a=40_000, b=60_000)) == pytest.approx(0.1622, abs=1e-3)
    assert stability(half, half) == 0.0
    assert stability(Counter(a=9), Counter(a=3)) == 0.0


def test_sampling_alone_gives_no_index() -> None:
    dice = random.Random(1)
    found = []
    for _ in range(200):
        one, other = (Counter(dice.choices("abcdefghij", k=300)) for _ in range(2))
        found.append(stability(one, other))
    assert sum(found) / len(found) < 0.03
    assert max(found) < 0.2


def test_a_project_whose_days_differ_takes_more_to_be_called() -> None:
    calm = [Counter(a=500, b=500)] * 5
    wild = [Counter(a=900, b=100), Counter(a=100, b=900)] * 3
    assert apart(calm) == 0.0
    assert apart(wild) > 0.5
    assert apart(wild[:2]) == 0.0, "two days tell nothing of the usual"


def prompts(size: int, length: int = 100, opening: str = "note:", **tags: str) -> list[Prompt]:
    dice = random.Random(size)
    return [Prompt(int(dice.lognormvariate(0, 0.3) * length), opening, tags) for _ in range(size)]


def test_each_feature_is_seen_and_named() -> None:
    before = [prompts(200, app="desk") for _ in range(4)]
    assert moved(before, prompts(400, app="desk")) is None
    for now, feature in (
        (prompts(400, length=220, app="desk"), "length"),
        (prompts(280, app="desk") + prompts(120, opening="summarise", app="desk"), "opening"),
        (prompts(200, app="desk") + prompts(200, app="web"), "tag app"),
        (prompts(200, app="desk") + prompts(200), "tag app"),
    ):
        found = moved(before, now)
        assert found is not None
        assert found.feature == feature
        assert found.moved_by > found.limit >= 0.2


def test_too_little_says_nothing() -> None:
    few = LEAST_PROMPTS - 1
    assert moved([prompts(few)], prompts(900, opening="other")) is None
    assert moved([prompts(900)], prompts(few, opening="other")) is None
    assert moved([], []) is None


def test_a_tag_that_is_an_id_is_no_feature() -> None:
    rows = [Prompt(10, "x", {"request": str(place), "app": "desk"}) for place in range(500)]
    assert set(features(rows)) == {"length", "opening", "tag app"}


def test_a_drop_needs_labels_on_both_sides_and_an_interval_below_nothing() -> None:
    good, bad = Estimate(0.9, 0.87, 0.92, 400, 9000), Estimate(0.7, 0.65, 0.74, 400, 9000)
    found = dropped(good, bad)
    assert found is not None
    assert found.low < -0.2 < found.high < 0
    assert dropped(bad, good) is None
    assert dropped(good, good._replace(rate=0.88, low=0.85, high=0.9)) is None
    assert dropped(None, bad) is None
    assert dropped(good, bad._replace(labelled=59)) is None


# --- simulation -------------------------------------------------------------------------------------------


def test_four_weeks_of_ordinary_traffic_raise_no_alarm_and_a_new_kind_does_within_days() -> None:
    """docs/drift.md has the published size of both."""
    calm = [input_looks(random.Random(seed), World(), 150) for seed in range(12)]
    assert sum(one is not None for one in calm) <= 1
    for world in (World(new_share=0.25), World(stretch=2.0), World(tenants=(0.2, 0.2, 0.1, 0.5))):
        found = [input_looks(random.Random(seed), world, 150) for seed in range(4)]
        assert all(one is not None and one <= 7 for one in found), world


def test_a_drop_of_twenty_points_is_called_within_a_fortnight_and_none_hardly_ever() -> None:
    calm = [quality_looks(random.Random(seed), 0.85, 0.85, 24) for seed in range(60)]
    assert sum(one is not None for one in calm) <= 3
    found = [quality_looks(random.Random(seed), 0.85, 0.65, 24) for seed in range(60)]
    assert sum(one is not None and 28 < one <= 42 for one in found) >= 48


def test_the_table_can_be_made() -> None:
    [row] = [drift_simulation.many("x", 3, lambda _: 30, after=28)]
    assert (row.called, row.median_day) == (1.0, 2)


# --- from the log -----------------------------------------------------------------------------------------


def deployed(session: Session, project: Project, at: datetime = LIVE) -> None:
    digest = "d" * 64
    session.add(
        Artifact(digest=digest, kind="adapter", project_id=project.id, base_digest="b", manifest={}, state="staged")
    )
    session.flush()
    generation = deployments.create(session, project.id).generation
    deployments.flip(
        session, project.id, expected_generation=generation, digest=digest, actor="a", reason="r"
    )  # fmt: skip
    dated(session, project, at)


def traffic(
    session: Session, project: Project, since: datetime, until: datetime, count: int, *, says: str, tokens: int,
    **values: object,
) -> None:  # fmt: skip
    """Spread evenly."""
    partitions.ensure(session, since=since)
    for place in range(count):
        at = since + (until - since) * (place / count)
        made = seed.interaction(
            session, project.id, output="x", ago=datetime.now(UTC) - at,
            messages=[{"role": "user", "content": f"{says} something {place}"}], prompt_tokens=tokens + place % 40,
            tags={"app": "desk"}, **values,
        )  # fmt: skip
        made.started_at = at


def test_the_base_and_a_young_deployment_have_nothing_to_drift_from(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        assert drift.drifted(session, project.id, now=NOW) is None
        deployed(session, project)
        assert drift.drifted(session, project.id, now=NOW) is None


def test_another_kind_of_question_since_the_deployment_is_called(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        deployed(session, project)
        traffic(session, project, LIVE - 2 * DAY, LIVE, 400, says="Note:", tokens=80)
        traffic(session, project, NOW - 3 * DAY, NOW, 400, says="Note:", tokens=80)
        assert drift.drifted(session, project.id, now=NOW) is None
        traffic(session, project, NOW - 3 * DAY, NOW, 400, says="Summarise", tokens=80)
        found = drift.drifted(session, project.id, now=NOW)
        assert found is not None
        assert (found.kind, found.shift and found.shift.feature) == ("input", "opening")
        assert "how prompts begin has moved" in found.reason
        assert "ummarise" not in found.reason, "nobody's words are quoted"
        # The same after another deployment is what the weights learned from.
        assert drift.drifted(session, project.id, now=LIVE + DAY) is None


def test_only_live_answers_count_and_a_session_counts_once(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        deployed(session, project)
        traffic(session, project, LIVE - 2 * DAY, LIVE, 400, says="Note:", tokens=80)
        traffic(session, project, NOW - 3 * DAY, NOW, 400, says="Note:", tokens=80)
        traffic(session, project, NOW - 3 * DAY, NOW, 400, says="Summarise", tokens=80, origin="evaluation")
        traffic(session, project, NOW - 3 * DAY, NOW, 200, says="Loop", tokens=900, group_key="one session")
        assert drift.drifted(session, project.id, now=NOW) is None


def test_answers_that_are_right_less_often_are_called_with_both_figures(
    sessions: Sessions, project: Project, sign_in: SignIn
) -> None:
    now = datetime.now(UTC)
    with sessions.begin() as session:
        deployed(session, project, now - 20 * DAY)
        judged(session, project, now - 18 * DAY, 90, 10)
        judged(session, project, now - 2 * DAY, 85, 15)
        assert drift.drifted(session, project.id) is None
        judged(session, project, now - 1 * DAY, 40, 60)
        found = drift.drifted(session, project.id)
    assert found is not None
    assert found.kind == "quality"
    assert "62.5 % of late, 90.0 % before" in found.reason
    page = sign_in("v@example.org", "viewer", project.id).get("/p/entities").text
    assert "62.5 % of late" in page
    assert "Review some answers and train again" in page


def test_a_quiet_overview_says_nothing_of_drift(project: Project, sign_in: SignIn) -> None:
    assert "Drift:" not in sign_in("v@example.org", "viewer", project.id).get("/p/entities").text
