"""Erased means found nowhere: a marker is put everywhere somebody's words can go, and looked for in all of it."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from services.errors import Conflict, InvalidRequest
from services.gateway.log_spool import LogSpool
from services.gateway.spool_format import Admitted, Final
from services.store import audit, datasets, deployments, erasure, jobs, projects
from services.store.base import uuid7
from services.store.certificate import verified
from services.store.erasure import Subject
from services.store.erasure_places import PLACES, Emptied, Gone
from services.store.models import (
    Annotation,
    Artifact,
    BulkAction,
    BulkChange,
    DatasetImport,
    ErasureRequest,
    Evaluation,
    EvaluationRow,
    Example,
    ExampleEmbedding,
    Interaction,
    InteractionBody,
    Job,
    Pin,
    ReviewItem,
    Revision,
    Run,
    SavedView,
    SplitGroup,
)
from tests.erasure.searching import columns, files_with, tables_with
from tests.gateway.judging import judge, person, queued
from tests.gateway.parts import World, eventually
from worker.curation.build import build_revision
from worker.tasks import perform

MARK = f"zq{uuid4().hex}"
OTHER = f"kept{uuid4().hex}"


def noise() -> str:
    """So that no prompt is another's near-duplicate, of which a revision keeps one."""
    return "".join(uuid4().hex for _ in range(4))


def ask(world: World, mark: str, name: str, **fields: object) -> UUID:
    """A logged answer in which the mark is in the prompt and in what is said; asked as `name`-user."""
    body: dict[str, Any] = {
        "model": "entities", "max_tokens": 100, "temperature": 0, "user": f"{name}-user",
        "messages": [{"role": "user", "content": f"{noise()} \x01{mark}\x02"}],
        "whet": {"tags": {"note": mark}, "retrieved": [mark], "session": f"{name}-session"}, **fields,
    }  # fmt: skip
    response = world.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    interaction_id = response.headers["x-whet-interaction-id"]
    world.interaction(interaction_id)
    said = {"interaction_id": interaction_id, "comment": mark, "correction": mark, "rating": -1, "user": f"{mark}-a"}
    assert world.post("/v1/feedback", said).status_code == 201
    return UUID(interaction_id)


@pytest.fixture(scope="module")
def seeded(world: World) -> None:
    """The mark in every table and file that can hold it, through the product's own paths where there are some."""
    allowed = {"pinned_answers": {"enabled": True}, "worked_examples": {"enabled": True}}
    with world.sessions.begin() as session:
        projects.configure(session, projects.get(session, "entities"), allowed)
    leads = [person(world, f"{name}@example.org", "lead") for name in ("lead", "second")]
    for mark in (MARK, OTHER):
        # Held-out rows need two people who agree, and a group of their own.
        for split, people in (("train", 1), ("train", 1), ("held_out", 2)):
            item = queued(world, str(ask(world, mark, mark)), split=split, overlap=people, group=f"{mark} {split}")
            for lead in leads[:people]:
                judge(world, item, lead, "correct", f"{mark} corrected {split} {item}")
    run_job(world, "examples.embed")
    with world.sessions.begin() as session:
        project_id = world.projects["entities"]
        revision = build_revision(session, project_id, "golden")
        learned(session, project_id, revision)
        spoil(session, project_id)
        typed(session, project_id, leads[0])
        show(session)
    home = world.settings.home
    for path in (home / "exports" / "golden.jsonl", home / "runs" / str(run_of(world)) / "1" / "rows.jsonl"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MARK)
        os.utime(path, (time.time() - 60, time.time() - 60))
    quarantine = world.settings.spool / "quarantine"
    quarantine.mkdir(exist_ok=True)
    rows = [{"reason": "bad", "row": {"end_user": f"{mark}-user", "output": mark}} for mark in (MARK, OTHER)]
    (quarantine / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def typed(session: Session, project_id: UUID, lead: UUID) -> None:
    """What people typed and uploaded: a saved search, an ended bulk action, a preview, a phrase a screen quoted."""
    for mark in (MARK, OTHER):
        name = f"{mark}-user"
        session.add(SavedView(project_id=project_id, user_id=lead, name=f"all of {mark[:6]}", query=f"end_user={name}"))
        action = BulkAction(
            project_id=project_id, user_id=lead, kind="tag", params={"tag": "x"}, state="done", expected=1,
            selection={"end_user": name},
        )  # fmt: skip
        session.add(action)
        session.flush()
        tagged = session.scalars(select(Interaction.id).where(Interaction.end_user == name)).first()
        session.add(BulkChange(action_id=action.id, interaction_id=tagged, before={"tags": {"note": mark}}))
        session.add(SplitGroup(project_id=project_id, group_key=name, split="train"))
    dataset = datasets.get(session, project_id, "golden")
    session.add(DatasetImport(dataset_id=dataset.id, file_name="rows.csv", file_digest="f", content=MARK.encode(),
                              state="preview", created_by="me"))  # fmt: skip
    revision = datasets.latest_revision(session, dataset.id)
    assert revision is not None
    revision.report = {**revision.report, "phrases": [{"phrase": MARK, "author": "a", "rows": 2}]}


def learned(session: Session, project_id: UUID, revision: Revision) -> None:
    """A run on the revision, its live adapter, and an evaluation that quotes held-out answers."""
    run = Run(project_id=project_id, kind="sft", state="failed", params={}, revision_id=revision.id, created_by="me",
              error=f"bad row {MARK}")  # fmt: skip
    session.add(run)
    session.flush()
    for digest in ("a" * 64, "b" * 64):
        session.add(Artifact(digest=digest, kind="adapter", project_id=project_id, run_id=run.id, base_digest="b",
                             manifest={}, state="staged"))  # fmt: skip
    session.flush()
    generation = deployments.get(session, project_id).generation
    deployments.flip(session, project_id, expected_generation=generation, digest="a" * 64, actor="me", reason="test")
    evaluation = Evaluation(project_id=project_id, run_id=run.id, revision_id=revision.id, candidate_digest="a" * 64)
    session.add(evaluation)
    session.flush()
    for member in datasets.members(session, revision.id):
        said = member.example.completion or ""
        session.add(EvaluationRow(
            evaluation_id=evaluation.id, example_id=member.example.id, slice="target",
            group_key=member.example.group_key, baseline_output=said, candidate_output=said, baseline_scores={},
            candidate_scores={},
        ))  # fmt: skip


def show(session: Session) -> None:
    """A correction of the marked user in somebody else's prompt, as tokens."""
    example = session.scalars(select(Example).where(Example.completion.contains(f"{MARK} corrected train"))).first()
    other = session.scalars(select(Interaction).where(Interaction.end_user == f"{OTHER}-user")).first()
    assert example is not None
    assert other is not None
    body = session.get_one(InteractionBody, other.id)
    body.worked_examples, body.prompt_token_ids = [str(example.id)], [1, 2, 3]


def spoil(session: Session, project_id: UUID) -> None:
    """What database errors do: quote the row."""
    job = jobs.enqueue(session, "dataset.build", {}, project_id=project_id)
    job.state, job.error, job.log_tail = "dead", f"parameters: {MARK}", MARK


def run_of(world: World) -> UUID:
    with world.sessions() as session:
        return session.scalars(select(Run.id)).one()


def run_job(world: World, kind: str) -> None:
    with world.sessions() as session:
        waiting = session.scalars(select(Job.id).where(Job.kind == kind, Job.state == "queued")).all()
    assert waiting
    for job_id in waiting:
        perform(world.sessions, world.settings, job_id)
    with world.sessions() as session:
        ended = session.scalars(select(Job).where(Job.id.in_(waiting))).all()
    assert [(job.state, job.error) for job in ended] == [("succeeded", None)] * len(ended)


def erase(world: World, subject: Subject) -> ErasureRequest:
    with world.sessions.begin() as session:
        made = erasure.request(session, subject, "admin@example.org")
    run_job(world, "erase")
    with world.sessions() as session:
        return erasure.get(session, made.id)


@pytest.fixture(scope="module")
def erased(world: World, seeded: None) -> ErasureRequest:
    """The marked user, erased. Before that the mark was in all the places it is looked for in."""
    with world.sessions() as session:
        tables = {table for table, _ in tables_with(session, MARK)}
    wanted = {table for table, place in PLACES.items() if isinstance(place, Gone | Emptied)}
    wanted -= {"interaction_embedding", "shadow_answer"}  # numbers only
    assert tables >= wanted | {"job", "run"}
    kinds = {path.split("/")[0] for path in files_with(world.settings.home, MARK)}
    assert kinds >= {"spool", "exports", "runs"}
    return erase(world, erasure.checked(world.projects["entities"], "end_user", f"{MARK}-user"))


def test_the_erased_text_is_in_no_table_and_no_file(world: World, erased: ErasureRequest) -> None:
    with world.sessions() as session:
        assert tables_with(session, MARK) == []
    assert files_with(world.settings.home, MARK) == []


def test_what_somebody_else_said_is_untouched(world: World, erased: ErasureRequest) -> None:
    with world.sessions() as session:
        tables = {table for table, _ in tables_with(session, OTHER)}
        rows = session.scalars(select(Interaction).where(Interaction.end_user == f"{OTHER}-user")).all()
        examples = session.scalars(select(Example).where(~Example.content_hash.startswith("erased:"))).all()
        pins = session.scalars(select(Pin)).all()
    wanted = {table for table, place in PLACES.items() if isinstance(place, Gone | Emptied)}
    wanted -= {"interaction_embedding", "shadow_answer"}  # numbers only
    assert tables >= wanted
    assert len(rows) == len(examples) == len(pins) == 3
    assert files_with(world.settings.home, OTHER) != []


def test_a_correction_that_stood_in_anothers_prompt_is_no_longer_spelled_by_its_tokens(
    world: World, erased: ErasureRequest
) -> None:
    assert erased.certificate is not None
    assert erased.certificate["rows"]["prompts_that_showed_an_example"] == 1
    with world.sessions() as session:
        bodies = session.scalars(
            select(InteractionBody).join(Interaction, Interaction.id == InteractionBody.id)
            .where(Interaction.end_user == f"{OTHER}-user")
        ).all()  # fmt: skip
        assert [one.worked_examples for one in bodies] == [[], [], []]
        assert sorted(bool(one.prompt_token_ids) for one in bodies) == [False, True, True]


def test_the_certificate_says_what_was_done_and_proves_that_it_is_whole(world: World, erased: ErasureRequest) -> None:
    found = erased.certificate
    assert found is not None
    assert verified(found)
    assert not verified(found | {"rows": {}})
    assert (found["rows"]["interaction"], found["rows"]["annotation"], found["rows"]["example"]) == (3, 4, 3)
    assert (found["rows"]["pin"], found["rows"]["example_embedding"], found["rows"]["feedback"]) == (3, 2, 3)
    assert found["spool_records"] > 0
    assert {one["digest"][0]: one["state"] for one in found["tainted"]} == {"a": "live", "b": "staged"}
    assert found["subject"] == erased.subject == erasure.hashed(f"{MARK}-user")
    assert any("nothing here unlearns" in sentence for sentence in found["cannot_be_undone"])


def test_the_audit_log_tells_of_it_and_its_chain_is_whole(world: World, erased: ErasureRequest) -> None:
    with world.sessions() as session:
        told = text("SELECT action FROM audit_event WHERE action LIKE 'erasure.%' ORDER BY id")
        actions = session.scalars(told).all()
        assert actions[:2] == ["erasure.request", "erasure.done"]
        assert audit.verify(session).intact


def test_judgements_stay_without_their_text_and_still_cannot_be_changed(world: World, erased: ErasureRequest) -> None:
    with world.sessions.begin() as session:
        rows = session.execute(
            select(Annotation, ReviewItem.state).join(ReviewItem, ReviewItem.id == Annotation.review_item_id)
        ).all()
        emptied = [annotation for annotation, state in rows if state == "withdrawn"]
        assert [(one.verdict, one.correction, one.comment) for one in emptied] == [("correct", None, None)] * 4
        with pytest.raises(Exception, match="append-only"), session.begin_nested():
            session.execute(text("UPDATE annotation SET comment = 'x'"))


def test_a_revision_is_rebuilt_without_the_rows_and_the_old_one_keeps_its_digest(
    world: World, erased: ErasureRequest
) -> None:
    assert erased.certificate is not None
    (rebuilt,) = erased.certificate["revisions"]
    with world.sessions() as session:
        newest, old = session.scalars(select(Revision).order_by(Revision.id.desc())).all()
        assert (rebuilt["from"], rebuilt["to"], rebuilt["examples_erased"]) == (old.digest, newest.digest, 3)
        assert datasets.digest_of(datasets.manifest(session, old.id)) == old.digest
        assert datasets.digest_of(datasets.manifest(session, newest.id)) == newest.digest
        assert {member.example.completion for member in datasets.members(session, newest.id)} & {None} == set()


def test_tainted_weights_serve_on_but_go_live_nowhere_again(world: World, erased: ErasureRequest) -> None:
    project_id = world.projects["entities"]
    with world.sessions() as session:
        deployment = deployments.get(session, project_id)
        assert deployment.active_digest == "a" * 64
        with pytest.raises(Conflict, match="erased since: train again"):
            deployments.flip(
                session, project_id, expected_generation=deployment.generation, digest="b" * 64, actor="me", reason="r"
            )
        session.rollback()
        deployment = deployments.get(session, project_id)
        deployment.last_good_digest = "b" * 64
        session.flush()
        assert deployments.roll_back(session, project_id, actor="me", reason="r").active_digest is None
        session.rollback()


def test_what_lands_late_is_erased_and_what_is_asked_later_is_kept(world: World, erased: ErasureRequest) -> None:
    late, fresh = uuid7(), f"new{uuid4().hex}"
    spool = LogSpool(world.settings.spool, budget_bytes=1 << 30)
    spool.admit(admitted(world, late, erased.created_at - timedelta(minutes=1)))
    spool.finish(Final(id=late, adapter_digest=None, finish_reason="stop", output=MARK))
    spool.close()
    kept = ask(world, fresh, MARK)
    eventually(lambda: not spool.directory.exists())
    with world.sessions() as session:
        assert session.get(Interaction, late) is None
        assert session.get(Interaction, kept) is not None
        assert erasure.get(session, erased.id).late_rows == 1


def admitted(world: World, identity: UUID, at: datetime) -> Admitted:
    return Admitted(
        id=identity, project_id=world.projects["entities"], api_key_id=None, endpoint="/v1/chat/completions",
        stream=False, adapter_digest=None, base_digest="b", generation=1, namespace="n", session_key=None,
        end_user=f"{MARK}-user", group_key="g", tags={}, config_hash="c", started_at=at.timestamp(),
        messages=[{"role": "user", "content": MARK}], parameters={}, prompt_token_ids=[1], prompt_hash="p",
        template_hash="t", tokenizer_hash="k", retrieved=[],
    )  # fmt: skip


def test_an_answer_still_being_given_is_waited_for_and_erased_too(world: World, erased: ErasureRequest) -> None:
    mark = f"slow{uuid4().hex}"
    body = {"model": "entities", "messages": [{"role": "user", "content": f"\x05{mark}"}], "user": mark, "timeout": 3}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(world.post, "/v1/chat/completions", body)
        eventually(lambda: files_with(world.settings.home, mark))
        made = erase(world, erasure.checked(None, "end_user", mark))
        assert answer.result().status_code == 504
    assert files_with(world.settings.home, mark) == []
    with world.sessions() as session:
        assert tables_with(session, mark) == []
    assert made.spool_records > 0


def test_a_session_is_erased_and_not_the_user_of_the_same_name(world: World, erased: ErasureRequest) -> None:
    name = f"twin{uuid4().hex}"
    as_user = ask(world, "asuser", "x", user=name, whet={"session": "else"})
    as_session = ask(world, "assession", "x", user="else", whet={"session": name})
    erase(world, erasure.checked(None, "session", name))
    with world.sessions() as session:
        assert session.get(Interaction, as_user) is not None
        assert session.get(Interaction, as_session) is None


def test_the_same_erasure_is_not_begun_twice_and_a_failed_one_goes_on(world: World, erased: ErasureRequest) -> None:
    subject = erasure.checked(world.projects["other"], "end_user", "nobody")
    with world.sessions.begin() as session:
        made = erasure.request(session, subject, "me")
        with pytest.raises(Conflict, match="under way"):
            erasure.request(session, subject, "me")
        jobs.request_cancel(session, made.job_id or uuid4())
        assert erasure.settle(session) == [made.id]
        erasure.again(session, made)
    run_job(world, "erase")
    with world.sessions() as session:
        assert erasure.get(session, made.id).state == "done"


def test_nobody_is_no_subject() -> None:
    for kind, name in (("end_user", ""), ("session", "x" * 600), ("everybody", "x")):
        with pytest.raises(InvalidRequest):
            erasure.checked(None, kind, name)


def test_every_text_column_of_the_database_is_named_in_the_registry(world: World) -> None:
    """A new table or column fails here until somebody has decided what an erasure does about it."""
    with world.sessions() as session:
        missing = [place for place in columns(session) if not named(*place)]
        session.execute(text("CREATE TABLE diary (id uuid PRIMARY KEY, entry text)"))
        assert [place for place in columns(session) if not named(*place)] == [*missing, ("diary", "entry")]
        session.rollback()
    assert missing == []


def named(table: str, column: str) -> bool:
    place = PLACES.get(table)
    if isinstance(place, Emptied):
        return column in place.to or column in place.kept
    return place is not None


def test_a_vector_of_an_erased_correction_is_gone(world: World, erased: ErasureRequest) -> None:
    with world.sessions() as session:
        assert session.scalars(select(ExampleEmbedding.shown).where(ExampleEmbedding.shown.contains(MARK))).all() == []
        assert datetime.now(UTC) >= erased.created_at
