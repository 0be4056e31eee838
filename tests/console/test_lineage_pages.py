"""Lineage both ways: from an answer to the weights it taught, and from weights to the answers that taught them."""

import re
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from services.console import descent_drawing
from services.console.graph import Column, Node, Place, lay_out
from services.store import artifact_view, datasets, deployments, descent, examples, replay, reviews, revisions, served
from services.store.base import Sessions
from services.store.models import (
    Artifact,
    Deployment,
    DeploymentEvent,
    Evaluation,
    Example,
    Interaction,
    Project,
    RevisionExample,
    Run,
    UserAccount,
)
from services.store.served import Span
from tests.console import seed
from tests.console.conftest import SignIn

HOSTILE = "<script>alert(1)</script>"


def learned(session: Session, split: str) -> uuid.UUID:
    """An interaction whose copy is on this side of the newest revision."""
    found = session.scalar(
        select(Example.interaction_id)
        .join(RevisionExample, RevisionExample.example_id == Example.id)
        .where(RevisionExample.split == split)
        .order_by(RevisionExample.revision_id, Example.id)
        .limit(1)
    )
    assert found is not None
    return found


def boxes(text: str) -> list[str]:
    return re.findall(r"<g class=\"lineage-box[^\"]*\"><title>([^<]*)</title>", text)


# --- from an answer ---------------------------------------------------------------------------------------


def test_an_answer_that_taught_weights_leads_to_where_they_serve(sessions: Sessions, lived_in: Project) -> None:
    with sessions() as session:
        found = descent.trace(session, lived_in.id, learned(session, "train"))
        live = session.get_one(Deployment, lived_in.id).active_digest
        runs = session.scalars(select(Run.id)).all()
    assert {run.id for run in found.runs} == set(runs)
    assert all(descent.taught(found, run) for run in found.runs)
    assert live in {one.digest for one in found.artifacts}
    assert [(span.digest, span.how, span.until) for span in found.spans] == [(live, "live", None)]
    assert found.tested == frozenset()
    assert {one.decision for one in found.evaluations} == {"promote", "refuse"}
    assert found.copies_in_all == len(found.copies) == 2


def test_a_held_out_answer_tested_and_did_not_teach(sessions: Sessions, lived_in: Project) -> None:
    with sessions() as session:
        found = descent.trace(session, lived_in.id, learned(session, "held_out"))
        every = set(session.scalars(select(Evaluation.id)))
    assert found.tested == every
    assert not any(descent.taught(found, run) for run in found.runs)


def test_the_drawing_joins_each_step_to_the_next(sessions: Sessions, lived_in: Project) -> None:
    with sessions() as session:
        found = descent.trace(session, lived_in.id, learned(session, "train"))
    drawn = descent_drawing.draw("entities", found, blind=False)
    assert [head for _, head in drawn.heads] == [
        "Answer", "Review", "Examples", "Revisions", "Runs", "Weights", "Judged, served",
    ]  # fmt: skip
    # 1 chosen, 1 judged by one person, 1 example, 2 revisions, 2 runs of the newest, 2 artefacts, 2 evaluations, 1 span
    assert len(drawn.boxes) == 1 + 2 + 1 + 2 + 2 + 2 + 3
    assert len(drawn.paths) == 1 + 1 + 1 + 2 + 2 + 2 + 3
    assert all(box.href is None or box.href.startswith("/p/entities/") for box in drawn.boxes)


def test_the_page_says_the_same_in_tables_and_links_on(lived_in: Project, sessions: Sessions, sign_in: SignIn) -> None:
    with sessions() as session:
        answer = learned(session, "train")
        live = session.get_one(Deployment, lived_in.id).active_digest
    client = sign_in("v@example.org", "viewer", lived_in.id)
    page = client.get(f"/p/entities/interactions/{answer}/lineage")
    assert page.status_code == 200
    assert f'href="/p/entities/artifacts/{live}"' in page.text
    assert "taught it" in page.text
    assert "had taught it" in page.text
    assert f"/p/entities/interactions/{answer}/lineage" in client.get(f"/p/entities/interactions/{answer}").text


def test_an_answer_nobody_chose_says_so(lived_in: Project, sessions: Sessions, sign_in: SignIn) -> None:
    with sessions.begin() as session:
        logged = seed.interaction(session, lived_in.id, output=HOSTILE)
    page = sign_in("v@example.org", "viewer", lived_in.id).get(f"/p/entities/interactions/{logged.id}/lineage")
    assert "taught nothing" in page.text
    assert boxes(page.text) == ["by the base, generation 1"]


def test_who_is_about_to_judge_is_told_nothing(sessions: Sessions, project: Project, sign_in: SignIn) -> None:
    with sessions.begin() as session:
        [item] = seed.queue(session, project.id, ["an answer"], overlap=2)
        other = seed.person(session, "first@example.org", "reviewer", project.id).user
        [held] = reviews.lease(session, project.id, other.id, 1)
        assert held.lease_token is not None
        judgement = reviews.Judgement("reject", "one", comment="wrong")
        reviews.submit(session, project.id, held.id, other.id, held.lease_token, judgement)
    client = sign_in("second@example.org", "reviewer", project.id)
    where = f"/p/entities/interactions/{item.interaction_id}/lineage"
    assert "rejected" in client.get(where).text.lower()
    with sessions.begin() as session:
        user = session.scalars(select(UserAccount).where(UserAccount.email == "second@example.org")).one()
        reviews.lease(session, project.id, user.id, 1)
    told = client.get(where).text.lower()
    assert "rejected" not in told
    assert "held-out" not in told
    assert "about to judge" in told


def test_lineage_of_another_project_is_not_there(sessions: Sessions, lived_in: Project, sign_in: SignIn) -> None:
    with sessions.begin() as session:
        other = seed.project(session, "other", "Other")
        logged = seed.interaction(session, other.id, output="x")
        session.add(Artifact(digest="e" * 64, kind="adapter", project_id=other.id, base_digest="b", manifest={}))
    client = sign_in("v@example.org", "viewer", lived_in.id)
    assert client.get(f"/p/entities/interactions/{logged.id}/lineage").status_code == 404
    assert client.get(f"/p/entities/artifacts/{'e' * 64}").status_code == 404
    assert client.get("/p/entities/artifacts/not-a-digest").status_code == 422


# --- from weights -----------------------------------------------------------------------------------------


def live_digest(sessions: Sessions, project: Project) -> str:
    with sessions() as session:
        return str(session.get_one(Deployment, project.id).active_digest)


def test_an_artefact_says_what_taught_it_and_how_much_it_answered(
    sessions: Sessions, lived_in: Project, sign_in: SignIn
) -> None:
    digest = live_digest(sessions, lived_in)
    with sessions.begin() as session:
        for origin in ("shadow", "evaluation"):
            seed.interaction(session, lived_in.id, output="x", digest=digest, origin=origin)
        seed.interaction(session, lived_in.id, output="x", digest=digest, finish_reason="error")
        answer = learned(session, "train")
    client = sign_in("v@example.org", "viewer", lived_in.id)
    text = client.get(f"/p/entities/artifacts/{digest}").text
    assert re.search(r"Answered</dt><dd>4 <small>requests", text)
    assert re.search(r"Live traffic</dt><dd>2<", text)
    assert re.search(r"Failed</dt><dd>1<", text)
    assert f"/p/entities/interactions/{answer}/lineage" in text
    assert ">Passed</a>" in text
    for page in ("deployment", "", f"interactions/{answer}"):
        assert f"/p/entities/artifacts/{digest}" in client.get(f"/p/entities/{page}".rstrip("/")).text, page


def test_what_taught_it_is_paged_to_the_end(
    sessions: Sessions, lived_in: Project, sign_in: SignIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.console.artifacts.PAGE", 3)
    client, seen, path = sign_in("v@example.org", "viewer", lived_in.id), [], ""
    own = f"/p/entities/artifacts/{live_digest(sessions, lived_in)}"
    while path is not None:
        text = client.get(own + path).text
        seen += re.findall(r"interactions/([\w-]+)/lineage", text)
        more = re.search(rf'href="{own}(\?start=\d+)" rel="next"', text)
        path = more.group(1) if more else None  # type: ignore[assignment]
    with sessions() as session:
        newest = session.scalars(select(Run.revision_id)).first()
        wanted = session.scalars(
            select(Example.interaction_id)
            .join(RevisionExample, RevisionExample.example_id == Example.id)
            .where(RevisionExample.revision_id == newest, RevisionExample.split == "train")
            .order_by(RevisionExample.position)
        ).all()
    assert seen == [str(one) for one in wanted]
    assert len(seen) > 6


def test_taint_retention_and_heads_are_said_plainly(sessions: Sessions, lived_in: Project, sign_in: SignIn) -> None:
    digest = live_digest(sessions, lived_in)
    with sessions.begin() as session:
        session.get_one(Artifact, digest).tainted_at = datetime.now(UTC)
        session.delete(session.get_one(Interaction, learned(session, "train")))
        heads = Artifact(
            digest="a" * 64, kind="speculator", project_id=lived_in.id, base_digest=seed.BASE,
            manifest={"adapter": digest, "name": HOSTILE}, state="retired",
        )  # fmt: skip
        session.add(heads)
    client = sign_in("v@example.org", "viewer", lived_in.id)
    text = client.get(f"/p/entities/artifacts/{digest}").text
    assert "Tainted" in text
    assert "past retention" in text
    told = client.get(f"/p/entities/artifacts/{'a' * 64}").text
    assert "Heads learn from logged answers" in told
    assert HOSTILE not in told


def test_an_export_is_noted_and_shown(
    client: TestClient, admin_key: str, sessions: Sessions, lived_in: Project, sign_in: SignIn
) -> None:
    digest = live_digest(sessions, lived_in)
    key = {"authorization": f"Bearer {admin_key}"}
    noted = client.post(f"/api/artifacts/{digest}/exports", json={"to": "lorax"}, headers=key)
    assert noted.status_code == 201
    assert client.post(f"/api/artifacts/{'e' * 64}/exports", json={"to": "lorax"}, headers=key).status_code == 404
    shown = client.get(f"/api/artifacts/{digest}", headers=key).json()
    assert shown["replayed"] == 0
    assert (shown["state"], shown["served"][0]["as"], shown["answered"]) == ("live", "live", {"live": 1})
    page = sign_in("v@example.org", "viewer", lived_in.id).get(f"/p/entities/artifacts/{digest}").text
    assert "artifact.export" in page
    assert "lorax" in page


# --- what was replayed ------------------------------------------------------------------------------------


@pytest.fixture
def replayed(sessions: Sessions, lived_in: Project) -> Example:
    """An example of an older data set that the live adapter's run, and no other, was given again."""
    with sessions.begin() as session:
        logged = seed.interaction(session, lived_in.id, output="an older answer")
        older = examples.Draft(
            kind="completion", source="accepted", split="train", slice="target", group_key="older",
            messages=[{"role": "user", "content": "an older question"}], completion="an older answer", rejected=None,
            interaction_id=logged.id, annotation_ids=(), reviewers=(),
        )  # fmt: skip
        [kept] = examples.add_examples(session, lived_in.id, [older])
        example = session.get_one(Example, kept.example_id)
        revisions.create(session, datasets.get_or_create(session, lived_in.id, "older"), [kept], {})
        live = session.get_one(Artifact, session.get_one(Deployment, lived_in.id).active_digest)
        assert live.run_id is not None
        replay.keep(session, live.run_id, [example])
        return example


def test_an_answer_that_was_replayed_leads_to_the_weights_it_taught(
    sessions: Sessions, lived_in: Project, replayed: Example, sign_in: SignIn
) -> None:
    digest = live_digest(sessions, lived_in)
    assert replayed.interaction_id is not None
    with sessions() as session:
        found = descent.trace(session, lived_in.id, replayed.interaction_id)
    [run] = found.runs
    assert run.artifact_digest == digest
    assert (descent.part(found, run), descent.taught(found, run)) == ("replayed", True)
    assert [one.digest for one in found.artifacts] == [digest]
    assert [span.digest for span in found.spans] == [digest]
    assert "1 runs that learned from it (1 replayed it)" in descent_drawing.in_words(found)
    client = sign_in("v@example.org", "viewer", lived_in.id)
    told = client.get(f"/p/entities/interactions/{replayed.interaction_id}/lineage").text
    assert "taught it, replayed" in told
    assert "No run has used" not in told
    page = client.get(f"/p/entities/interactions/{replayed.interaction_id}").text
    assert "Replayed by <a" in page
    assert re.search(rf"Adapters it taught.*{digest}", page, re.DOTALL)


def test_the_line_of_what_was_replayed_runs_from_its_example_to_the_run(
    sessions: Sessions, lived_in: Project, replayed: Example
) -> None:
    assert replayed.interaction_id is not None
    with sessions() as session:
        found = descent.trace(session, lived_in.id, replayed.interaction_id)
    drawn = descent_drawing.draw("entities", found, blind=False)
    heads = {head: x for x, head in drawn.heads}
    start, end = heads["Examples"] + drawn.box_width, heads["Runs"]
    assert len([path for path in drawn.paths if path.startswith(f"M{start:g},") and f" {end:g}," in path]) == 1


def test_an_adapter_lists_what_was_replayed_after_its_revision(
    sessions: Sessions, lived_in: Project, replayed: Example, sign_in: SignIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = live_digest(sessions, lived_in)
    with sessions() as session:
        about = artifact_view.about(session, lived_in.id, digest)
        assert about.revision is not None
        own = about.revision.train_count
        pages = [artifact_view.lessons(session, about, limit=3, offset=start) for start in range(0, own + 4, 3)]
        other = artifact_view.about(session, lived_in.id, uuid.uuid5(lived_in.id, "bad").hex * 2)
    lessons = [lesson for page in pages for lesson in page]
    assert [lesson.replayed for lesson in lessons] == [False] * own + [True]
    assert lessons[-1].example.id == replayed.id
    assert (about.replayed, other.replayed) == (1, 0)
    monkeypatch.setattr("services.console.artifacts.PAGE", own)
    client = sign_in("v@example.org", "viewer", lived_in.id)
    first = client.get(f"/p/entities/artifacts/{digest}").text
    assert f"?start={own}" in first
    assert "then 1 older, replayed" in first
    assert "older examples, 1 replayed" in boxes(first)
    last = client.get(f"/p/entities/artifacts/{digest}?start={own}").text
    assert f"/p/entities/interactions/{replayed.interaction_id}/lineage" in last
    assert "That is all" in last


# --- spans and geometry -----------------------------------------------------------------------------------


def history(*steps: tuple[str, str | None]) -> list[DeploymentEvent]:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return [
        DeploymentEvent(kind=kind, to_digest=to, at=start + timedelta(hours=place), generation=place, reason="")
        for place, (kind, to) in enumerate(steps)
    ]


def test_spans_begin_and_end_as_the_history_says() -> None:
    told = served.read(
        history(("flip", "a"), ("canary", "b"), ("canary", "b"), ("canary_held", "b"), ("canary_rolled_back", "a"),
                ("canary", "c"), ("flip", "c"), ("roll_back", "a"), ("canary", "d"))
    )  # fmt: skip
    assert [(one.digest, one.how, one.ended_by) for one in told] == [
        ("a", "live", "flip"), ("b", "canary", "canary"), ("b", "canary", "canary_rolled_back"),
        ("c", "canary", "flip"),
        ("c", "live", "roll_back"), ("a", "live", None), ("d", "canary", None),
    ]  # fmt: skip
    assert served.read([]) == []


def test_a_roll_back_ends_a_span_in_the_database_too(sessions: Sessions, lived_in: Project) -> None:
    with sessions.begin() as session:
        deployments.roll_back(session, lived_in.id, actor="a", reason="worse")
        found: list[Span] = served.spans(session, lived_in.id)
        since = served.live_since(session, lived_in.id)
    assert [(one.digest is None, one.ended_by) for one in found] == [(False, "roll_back"), (True, None)]
    assert since == found[1].since


def test_long_names_are_cut_and_told_whole() -> None:
    drawn = lay_out([Column("A", [Node("x" * 99, "y")]), Column("B", [])], [], "told", width=400, box_width=130)
    [box] = drawn.boxes
    assert len(box.title) <= 15
    assert box.told == "x" * 99 + ", y"
    assert [head for _, head in drawn.heads] == ["A"]


def test_a_line_within_a_column_is_straight_and_between_two_it_bends() -> None:
    nodes = [Node("a"), Node("b")]
    drawn = lay_out(
        [Column("A", nodes), Column("B", [Node("c")])], [(Place(0, 0), Place(0, 1)), (Place(0, 1), Place(1, 0))],
        "told", width=400, box_width=100,
    )  # fmt: skip
    assert "C" not in drawn.paths[0]
    assert drawn.paths[1].startswith("M100,")
    assert "C200," in drawn.paths[1]
