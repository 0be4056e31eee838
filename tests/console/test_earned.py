"""Quality earned: paired on the rows both have answered, broken where rows differ, silent where it must be."""

import random
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from services.console import earned_view
from services.store import deployments, earned
from services.store.base import Sessions
from services.store.earned import Cluster, Earned, difference, score
from services.store.models import EvaluationRow, Project
from tests.console.conftest import SignIn
from tests.console.seed_learning import dated, held_out, learned

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def read(sessions: Sessions, project: Project) -> Earned:
    with sessions() as session:
        return earned.earned(session, project.id)


def life(session: Session, project: Project) -> None:
    """Two on one held-out set, then one on a larger set that holds the first."""
    first = held_out(session, project, 200)
    learned(session, project, first, share=0.5, before=0.1, at=START)
    learned(session, project, first, share=0.7, before=0.5, at=START + DAY)
    more = held_out(session, project, 100, name="more")
    learned(session, project, [*first, *more], share=0.8, before=0.7, at=START + 2 * DAY)


def test_what_was_earned_is_paired_with_the_base_on_the_rows_both_answered(
    sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        life(session, project)
    known = read(sessions, project)
    assert known.gain is not None
    assert known.gain.rows == 200, "the hundred new rows were never asked of the base"
    assert 0.55 < known.gain.low < known.gain.delta < known.gain.high < 0.85
    assert "points earned since the base" in earned_view.in_words(known)


def test_the_line_breaks_where_the_held_out_set_changed_and_only_there(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        life(session, project)
    known = read(sessions, project)
    drawn = earned_view.plot(known.steps)
    assert drawn.slots[0].name == "base"
    assert len(drawn.dots) == 4
    assert len(drawn.joins) == 2, "base to the first, the first to the second"
    assert len(drawn.breaks) == 1
    assert "changed 1 time" in earned_view.changes(known.steps)
    assert [step.base is not None for step in known.steps] == [True, True, False]


def test_another_metric_breaks_the_line_too(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        rows = held_out(session, project, 60)
        learned(session, project, rows, share=0.5, before=0.1, at=START)
        learned(session, project, rows, share=0.9, before=0.5, at=START + DAY, metric="similarity")
    known = read(sessions, project)
    assert len(earned_view.plot(known.steps).breaks) == 1
    assert earned_view.metrics(known.steps) == "Exact match, Similarity"
    assert known.gain is None
    assert "nothing can be said" in known.why_not


def test_nothing_is_said_where_nothing_is_known(sessions: Sessions, project: Project) -> None:
    assert read(sessions, project) == Earned([], None, "The base serves: nothing has been earned yet.")
    with sessions.begin() as session:
        learned(session, project, held_out(session, project, 12), share=1.0, before=0.0, at=START)
    few = read(sessions, project)
    assert few.gain is None
    assert few.why_not.startswith("Only 12 groups")
    with sessions.begin() as session:
        deployments.roll_back(session, project.id, actor="a", reason="worse")
    back = read(sessions, project)
    assert back.gain is None
    assert back.why_not == "The base serves: nothing has been earned yet."
    assert back.steps[-1].came_back
    assert back.steps[-1].score is not None, "the base's own, from the evaluation that asked it"


def test_weights_nobody_evaluated_are_shown_without_a_score(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        rows = held_out(session, project, 40)
        evaluation = learned(session, project, rows, share=0.9, before=0.1, at=START)
        evaluation.created_at = START + DAY
    known = read(sessions, project)
    assert [step.score for step in known.steps] == [None]
    assert "never evaluated" in known.why_not
    assert earned_view.plot(known.steps).dots == []


def test_another_base_model_and_erased_rows_count_for_nothing(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        rows = held_out(session, project, 80)
        learned(session, project, rows, share=0.5, before=0.1, at=START, base_digest="a" * 64)
        learned(session, project, rows, share=0.9, before=0.5, at=START + DAY)
    assert read(sessions, project).gain is None
    with sessions.begin() as session:
        session.execute(update(EvaluationRow).values(group_key="erased"))
    assert [step.score for step in read(sessions, project).steps] == [None, None]


def test_general_ability_is_no_part_of_the_score(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        rows = held_out(session, project, 80)
        learned(session, project, rows, share=1.0, before=0.0, at=START)
        general = [row.example.id for row in rows[:40]]
        session.execute(
            update(EvaluationRow)
            .where(EvaluationRow.example_id.in_(general))
            .values(slice="base-ability", candidate_scores={"exact_match": 0.0})
        )
    known = read(sessions, project)
    assert known.steps[0].score is not None
    assert (known.steps[0].score.rate, known.steps[0].score.rows) == (1.0, 40)
    assert known.gain is not None
    assert known.gain.rows == 40


# --- statistics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.95])
def test_intervals_hold_the_truth_as_often_as_they_say(size: int, rate: float) -> None:
    """Of 600 draws of 60 groups; rows of a group share an answer. Nominal 95 %, at least 92 %."""
    dice = random.Random(int(100 * rate) + size)
    kept = 0
    for _ in range(600):
        clusters = [Cluster(size, size * float(dice.random() < rate)) for _ in range(60)]
        found = score(clusters)
        assert found is not None
        kept += found.low <= rate <= found.high
    assert kept / 600 >= 0.92


@pytest.mark.parametrize(("wins", "losses"), [(0.0, 0.0), (0.05, 0.02), (0.3, 0.1), (0.1, 0.1)])
def test_differences_hold_the_truth_as_often_as_they_say(wins: float, losses: float) -> None:
    dice = random.Random(int(1000 * wins))
    kept = 0
    for _ in range(600):
        clusters = []
        for _ in range(60):
            drawn = dice.random()
            clusters.append(Cluster(2, 2.0 if drawn < wins else -2.0 if drawn < wins + losses else 0.0))
        found = difference(clusters)
        kept += found.low <= wins - losses <= found.high
    assert kept / 600 >= 0.92


def test_one_win_among_ties_is_no_gain() -> None:
    found = difference([Cluster(1, 1.0), *[Cluster(1, 0.0)] * 99])
    assert found.low < 0 < found.delta < found.high


def test_no_rows_are_no_score_and_all_right_is_not_certain() -> None:
    assert score([]) is None
    sure = score([Cluster(1, 1.0)] * 50)
    assert sure is not None
    assert (sure.rate, sure.high) == pytest.approx((1.0, 1.0))
    assert 0.9 < sure.low < 0.96


# --- pages ------------------------------------------------------------------------------------------------


def test_both_pages_show_it_and_say_what_broke(sessions: Sessions, project: Project, sign_in: SignIn) -> None:
    with sessions.begin() as session:
        life(session, project)
    client = sign_in("v@example.org", "viewer", project.id)
    for path in ("/p/entities", "/p/entities/live", "/p/entities/deployment", "/p/entities/deployment/live"):
        text = client.get(path).text
        assert "Quality earned" in text, path
        assert "points earned since the base" in text, path
        assert "changed 1 time" in text, path
        assert text.count('class="broken"') == 1, path


def test_a_young_project_says_that_nothing_is_known(sessions: Sessions, project: Project, sign_in: SignIn) -> None:
    text = sign_in("v@example.org", "viewer", project.id).get("/p/entities").text
    assert "The base has served from the start" in text


def test_a_roll_back_is_a_step_of_its_own(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        rows = held_out(session, project, 60)
        for place, share in enumerate((0.6, 0.4)):
            learned(session, project, rows, share=share, before=0.1, at=START + place * DAY)
        deployments.roll_back(session, project.id, actor="a", reason="worse")
        dated(session, project, START + 2 * DAY)
    known = read(sessions, project)
    assert [step.came_back for step in known.steps] == [False, False, True]
    assert known.steps[2].digest == known.steps[0].digest
    assert known.steps[2].score == known.steps[0].score
    assert known.gain is not None
