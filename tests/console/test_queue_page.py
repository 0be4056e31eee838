"""The queue's page: its figures, what it lets a lead change, and what it says before anyone labels."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, func, select, text
from starlette.testclient import TestClient

from services.console import queue as queue_page
from services.store import people, quality, queues
from services.store.base import Sessions
from services.store.models import Annotation, AuditEvent, Evaluation, Project, ReviewItem, Revision
from services.store.power import ALPHA, labels_for, pairs_needed, spread_of
from services.store.quality import Estimate
from services.store.sampling import PRECEDENCE
from tests.console import seed, seed_queue
from tests.console.conftest import SignIn
from tests.console.test_pages import PAGE, text_of

SHARES = {"negative_feedback": "30", "schema_failure": "10", "disagreement": "10", "low_confidence": "15",
          "novelty": "10", "uniform": "25", "second": "2.5", "budget": "120"}  # fmt: skip


@pytest.fixture
def lead(sign_in: SignIn) -> TestClient:
    return sign_in("lea@example.org", "lead")


@pytest.fixture
def busy(sessions: Sessions, project: Project) -> Project:
    with sessions.begin() as session:
        seed_queue.queued(session, session.merge(project))
    return project


def config(sessions: Sessions) -> dict[str, Any]:
    with sessions() as session:
        return session.scalars(select(Project)).one().config


def test_a_project_without_a_queue_says_what_it_waits_for(project: Project, lead: TestClient) -> None:
    page = text_of(lead, "/p/entities/queue")

    assert "nothing waits" in page
    assert "Nobody has judged anything" in page
    assert "not known yet: it takes answers that two people judged" in page
    assert "Not measured yet" in text_of(lead, "/p/entities")


def test_the_page_counts_what_waits_who_worked_and_how_the_labels_are_shared(
    busy: Project, sessions: Sessions, lead: TestClient
) -> None:
    with sessions.begin() as session:
        one = session.scalars(select(ReviewItem).where(ReviewItem.state == "open").limit(1)).one()
        one.state = "escalated"
        oldest = session.scalar(select(func.min(ReviewItem.created_at)).where(ReviewItem.state != "done"))
        waiting = session.scalar(select(func.count()).where(ReviewItem.state != "done"))
        labels = session.scalar(select(func.count()).select_from(Annotation))
        found = queues.waiting(session, busy.id)
        assert (found.size, found.escalated, found.disputed, found.oldest) == (waiting, 1, 0, oldest)
    page = text_of(lead, "/p/entities/queue")

    assert f"<dd>{waiting}</dd>" in page
    assert 'href="/p/entities/review?queue=escalated"' in page
    counts = [
        int(one.replace(",", "")) for one in re.findall(r'<td class="num">([\d,]+)</td><td class="num">\d+ %', page)
    ]
    assert sum(counts) == labels
    assert re.search(r"Ada.*Joan.*Mary|Joan|Mary", page)
    assert page.count('class="series-came"') == 1
    assert "of 10,9" in text_of(lead, "/p/entities")  # the population the estimate speaks for, not the labels


def test_judgements_taken_back_and_verdicts_that_judge_nothing_are_no_work_done(
    busy: Project, sessions: Sessions
) -> None:
    now = datetime.now(UTC)
    with sessions.begin() as session:
        before = {one.user_id: one for one in queues.reviewers(session, busy.id, now)}
        mine = session.scalars(select(Annotation).where(Annotation.created_at > now - timedelta(days=6)).limit(1)).one()
        for verdict, supersedes in (("undo", mine.id), ("skip", None)):
            session.add(
                Annotation(
                    project_id=busy.id, review_item_id=mine.review_item_id, interaction_id=mine.interaction_id,
                    author_id=mine.author_id, idempotency_key=verdict, verdict=verdict, tags=[], spans=[],
                    supersedes=supersedes, assisted=False,
                )
            )  # fmt: skip
        session.flush()
        after = {one.user_id: one for one in queues.reviewers(session, busy.id, now)}
    assert after[mine.author_id].judged == before[mine.author_id].judged - 1
    assert sum(one.judged for one in after.values()) == sum(one.judged for one in before.values()) - 1
    best = before[mine.author_id]
    assert best.an_hour == pytest.approx(3600 / 16.5, rel=0.2)
    assert best.median_seconds == pytest.approx(16.5, rel=0.3)


def test_inflow_and_drain_add_up_to_the_days_items(busy: Project, sessions: Sessions) -> None:
    now = datetime.now(UTC)
    with sessions() as session:
        days = queues.flow(session, busy.id, now)
        items = list(session.scalars(select(ReviewItem)))
    assert len(days) == queues.FLOW_DAYS
    for day in days:
        begin, end = now - timedelta(days=day.ago + 1), now - timedelta(days=day.ago)
        assert day.came == sum(begin < one.created_at <= end for one in items)
        assert day.left == sum(one.done_at is not None and begin < one.done_at <= end for one in items)


# --- the mix ----------------------------------------------------------------------------------------------


def test_a_lead_changes_the_mix_and_the_audit_log_keeps_it(
    project: Project, sessions: Sessions, lead: TestClient
) -> None:
    answer = lead.post("/p/entities/queue/mix", data=SHARES, headers=PAGE)

    assert answer.status_code == 303
    stored = config(sessions)
    assert stored["strategy_mix"] == {name: float(SHARES[name]) / 100 for name in PRECEDENCE}
    assert (stored["second_share"], stored["review_budget"]) == (0.025, 120)
    assert "tags" in stored
    with sessions() as session:
        event = session.scalars(select(AuditEvent).where(AuditEvent.action == "project.configure")).one()
        assert event.subject == f"project:{project.id}"
        assert event.actor == f"user:{people.find_user(session, 'lea@example.org').id}"
    page = text_of(lead, "/p/entities/queue")
    assert 'name="budget" type="number" min="1" max="100000" required value="120"' in page
    assert 'value="2.5"' in page


@pytest.mark.parametrize(
    ("changes", "status", "sentence"),
    [
        ({"uniform": "19", "novelty": "16"}, 400, "the uniform audit takes at least 20%"),
        ({"uniform": "26"}, 400, "must add up to 100 %, not 101 %"),
        ({"uniform": "-25"}, 422, "greater than or equal to 0"),
        ({"budget": "0"}, 422, "greater than or equal to 1"),
        ({"second": "101"}, 422, "less than or equal to 100"),
        ({"uniform": "nan"}, 422, ""),
    ],
)
def test_a_mix_that_would_blind_the_audit_changes_nothing_and_says_why(
    project: Project, sessions: Sessions, lead: TestClient, changes: dict[str, str], status: int, sentence: str
) -> None:
    before = config(sessions)
    for headers in (PAGE, {"accept": "application/json"}):
        answer = lead.post("/p/entities/queue/mix", data=SHARES | changes, headers=headers)
        assert answer.status_code == status
        assert sentence in answer.text
    assert config(sessions) == before


def test_a_refused_mix_stays_in_the_form(project: Project, lead: TestClient) -> None:
    answer = lead.post("/p/entities/queue/mix", data=SHARES | {"novelty": "11"}, headers=PAGE)

    assert 'role="alert"' in answer.text
    assert (
        'id="mix-novelty" name="novelty" type="number" min="0" max="100" step="0.1" required value="11"' in answer.text
    )


def test_a_configuration_nobody_can_sample_by_is_named_where_a_lead_can_mend_it(
    project: Project, sessions: Sessions, lead: TestClient
) -> None:
    with sessions.begin() as session:
        stored = session.get_one(Project, project.id)
        stored.config = stored.config | {"review_budget": 0}

    assert "review_budget must be at least 1" in text_of(lead, "/p/entities/queue")
    assert lead.post("/p/entities/queue/mix", data=SHARES, headers=PAGE).status_code == 303
    assert "Nothing is sampled" not in text_of(lead, "/p/entities/queue")


@pytest.mark.parametrize(("role", "status"), [("viewer", 403), ("reviewer", 403), ("lead", 303)])
def test_only_a_lead_may_change_the_mix_and_sees_its_form(
    project: Project, sign_in: SignIn, role: str, status: int
) -> None:
    client = sign_in("somebody@example.org", role)

    assert ("Change the mix" in text_of(client, "/p/entities/queue")) == (status == 303)
    assert client.post("/p/entities/queue/mix", data=SHARES, headers=PAGE).status_code == status


# --- labels still needed ----------------------------------------------------------------------------------


def test_pairs_needed_are_those_with_which_the_gates_bound_sees_the_drop() -> None:
    """By simulation of the gate's own bound: with that many pairs it falls below zero four times in five."""
    import numpy as np

    drop, discordant = 0.05, 0.1
    pairs = pairs_needed(drop, spread_of(discordant, drop))
    random = np.random.default_rng(3)
    lose, win = (discordant + drop) / 2, (discordant - drop) / 2
    outcomes = random.multinomial(pairs, [lose, win, 1 - lose - win], size=4000)
    mean = (outcomes[:, 1] - outcomes[:, 0]) / pairs
    error = np.sqrt((outcomes[:, 0] + outcomes[:, 1]) / pairs - mean**2) / np.sqrt(pairs)
    seen = (mean + 1.96 * error < 0).mean()  # the first look spends ALPHA / 2 on one side
    assert ALPHA / 2 == 0.025
    assert 0.76 < seen < 0.86


def test_more_is_needed_for_smaller_drops_later_looks_and_pairs_that_differ_more() -> None:
    spread = spread_of(0.1)
    assert pairs_needed(0.01, spread) > 3.9 * pairs_needed(0.02, spread)
    assert pairs_needed(0.02, spread, look=2) > pairs_needed(0.02, spread)
    assert pairs_needed(0.02, 2 * spread) > 3.9 * pairs_needed(0.02, spread)
    for bad in ((0.0, 0.3, 1), (0.02, -1.0, 1), (0.02, 0.3, 0)):
        with pytest.raises(ValueError, match="a drop is in"):
            pairs_needed(bad[0], bad[1], look=bad[2])


def test_labels_for_a_narrower_estimate_grow_with_the_square_of_the_width() -> None:
    known = Estimate(0.9, 0.86, 0.94, 100, 1000)
    assert labels_for(known, 0.04) == 0
    assert labels_for(known, 0.02) == 300


def test_the_next_decision_counts_held_out_answers_and_takes_the_last_comparisons_spread(
    sessions: Sessions, lead: TestClient
) -> None:
    with sessions.begin() as session:
        made = seed.lived_in(session, size=40)
    with sessions() as session:
        project = session.get_one(Project, made.id)
        decision = queues.next_decision(session, project)
        revision = session.scalars(select(Revision).order_by(Revision.id.desc()).limit(1)).one()
        evaluations = session.scalars(select(Evaluation).order_by(Evaluation.created_at)).all()
        later = session.scalar(
            select(func.count()).where(
                ReviewItem.split == "held_out", ReviewItem.done_at > revision.created_at, ReviewItem.state == "done"
            )
        )
    assert decision.have == revision.held_out_count + (later or 0)
    assert decision.look == revision.looks + 1
    assert decision.margin.points == 3.0
    assert decision.measured == any("slices" in one.summary for one in evaluations)
    assert [one.points for one in decision.drops] == [1.0, 2.0, 3.0, 5.0]
    assert all(one.more == max(0, one.pairs - decision.have) for one in decision.drops)
    assert f"{decision.margin.more:,} more pairs</b> to see a 3-point drop" in text_of(lead, "/p/entities/queue")


def test_figures_of_other_parts_are_shown_when_they_are_there(
    busy: Project, sessions: Sessions, lead: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sessions() as session:
        author = session.scalars(select(Annotation.author_id).order_by(Annotation.created_at.desc())).first()
    assert author is not None
    monkeypatch.setattr(queue_page, "agreement_of", lambda *_: queue_page.Agreement(0.713, 0.61, 0.8, 44))
    monkeypatch.setattr(queue_page, "accuracy_of", lambda *_: {author: queue_page.Accuracy(0.9, 0.6, 0.98, 10)})
    page = text_of(lead, "/p/entities/queue")

    assert "α 0.71 <small>95 % 0.61 to 0.80, 44 answers" in page
    assert '90 % <span class="muted small">60 % to 98 %, 10' in page


# --- speed ------------------------------------------------------------------------------------------------


def test_every_figure_of_the_page_can_be_read_by_an_index(busy: Project, sessions: Sessions) -> None:
    """With sequential scans as the last resort, none is left: each query's conditions are an index's columns."""
    now = datetime.now(UTC)
    with sessions.begin() as session:
        session.execute(text("SET LOCAL enable_seqscan = off"))
        plans: list[str] = []

        def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:  # noqa: ANN401
            if statement.startswith("SELECT"):
                plan = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)
                plans.append("\n".join(row[0] for row in plan))

        engine = session.get_bind()
        event.listen(engine, "before_cursor_execute", explain)
        try:
            queues.waiting(session, busy.id)
            queues.flow(session, busy.id, now)
            queues.overlap(session, busy.id, 0.2)
            queues.reviewers(session, busy.id, now)
            queues.next_decision(session, session.merge(busy, load=False))
            quality.strata(session, busy.id, since=now - quality.LONGEST)
        finally:
            event.remove(engine, "before_cursor_execute", explain)
    assert len(plans) >= 8
    for plan in plans:
        scanned = re.findall(r"Seq Scan on (review_item|evaluation|revision)\b", plan)
        assert scanned == [], plan
    assert sum("ix_review_item_project_id_created_at" in plan for plan in plans) >= 1
    assert sum("ix_review_item_project_id_done_at" in plan for plan in plans) >= 1
