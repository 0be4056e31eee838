"""Somebody's words in every table and file that can hold them, and next to them somebody else's."""

import json
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.cli_datasets import to_parquet
from services.gateway.spool_format import Admitted
from services.store import audit, dataset_export, datasets, deployments, erasure, jobs, projects, replay, revisions
from services.store import export as log_export
from services.store.erasure_cover import Subject
from services.store.models import (
    Artifact,
    BulkAction,
    BulkChange,
    DatasetImport,
    ErasureRequest,
    Evaluation,
    EvaluationAnswer,
    EvaluationRow,
    Example,
    Interaction,
    InteractionBody,
    Job,
    Revision,
    Run,
    SavedView,
    SplitGroup,
)
from services.store.search import Search
from tests.gateway.judging import judge, person, queued
from tests.gateway.parts import World
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


def seed(world: World) -> None:
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
    export(world, revision)
    rows = world.settings.home / "runs" / str(run_of(world)) / "1" / "rows.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text(MARK)
    quarantine = world.settings.spool / "quarantine"
    quarantine.mkdir(exist_ok=True)
    rows = [{"reason": "bad", "row": {"end_user": f"{mark}-user", "output": mark}} for mark in (MARK, OTHER)]
    (quarantine / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def export(world: World, revision: Revision) -> None:
    """What people export below the home: a revision as JSON lines and Parquet, the log in both its kinds."""
    folder = world.settings.home / "exports" / "golden"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "held_out"):
        rows = list(dataset_export.lines(world.sessions, revision.id, "prompt-completion", split))
        (folder / f"{split}.jsonl").write_bytes(b"".join(rows))
        to_parquet(folder / f"{split}.jsonl")
    (folder / "manifest.json").write_text(json.dumps({"digest": revision.digest, "rows": {"train": 4, "held_out": 2}}))
    kinds: tuple[log_export.Format, ...] = ("jsonl", "csv")
    for kind in kinds:
        pages = log_export.pages(world.sessions, world.projects["entities"], Search(), kind)
        (folder.parent / f"log.{kind}").write_bytes(b"".join(pages))
    (folder.parent / "packed.zip").write_bytes(b"PK")
    with world.sessions.begin() as session:
        audit.record(session, "lead", "dataset.export", f"revision:{revision.digest}", {})
        audit.record(session, "lead", "dataset.export", f"revision:{'0' * 64}", {})
        audit.record(session, "lead", "interactions.export", f"project:{world.projects['entities']}", {})
        audit.record(session, "lead", "interactions.export", f"project:{world.projects['other']}", {})


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
    for mark in (MARK, OTHER):
        content = f"{mark}-user said {mark}".encode()
        session.add(DatasetImport(dataset_id=dataset.id, file_name="rows.csv", file_digest="f", content=content,
                                  state="preview", created_by="me"))  # fmt: skip
    revision = revisions.latest(session, dataset.id)
    assert revision is not None
    revision.report = {**revision.report, "phrases": [{"phrase": MARK, "author": "a", "rows": 2}]}


def replaying(session: Session, project_id: UUID, revision: Revision) -> None:
    """A run on something else that replayed the revision's training rows, and its adapter."""
    run = Run(project_id=project_id, kind="dpo", state="succeeded", params={}, created_by="me")
    session.add(run)
    session.flush()
    replay.keep(session, run.id, [member.example for member in revisions.members(session, revision.id, "train")])
    session.add(Artifact(digest="c" * 64, kind="adapter", project_id=project_id, run_id=run.id, base_digest="b",
                         manifest={}, state="staged"))  # fmt: skip


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
    replaying(session, project_id, revision)
    generation = deployments.get(session, project_id).generation
    for place, digest in enumerate(("b" * 64, "a" * 64)):
        deployments.flip(
            session, project_id, expected_generation=generation + place, digest=digest, actor="me", reason="test"
        )
    evaluation = Evaluation(project_id=project_id, run_id=run.id, revision_id=revision.id, candidate_digest="a" * 64)
    session.add(evaluation)
    session.flush()
    for member in revisions.members(session, revision.id):
        said = member.example.completion or ""
        session.add(EvaluationRow(
            evaluation_id=evaluation.id, example_id=member.example.id, slice="target",
            group_key=member.example.group_key, baseline_output=said, candidate_output=said, baseline_scores={},
            candidate_scores={},
        ))  # fmt: skip
        session.add(EvaluationAnswer(
            example_id=member.example.id, weights="base", request_hash="hash", project_id=evaluation.project_id,
            output=said, finish_reason="stop", tokens=3,
        ))  # fmt: skip


def show(session: Session) -> None:
    """A correction of the marked user in somebody else's prompt, as tokens."""
    example = session.scalars(select(Example).where(Example.completion.contains(f"{MARK} corrected train"))).first()
    other = session.scalars(select(Interaction).where(Interaction.end_user == f"{OTHER}-user")).first()
    assert example is not None
    assert other is not None
    example.created_at -= timedelta(hours=1)  # it was there when the other prompt was made
    body = session.get_one(InteractionBody, other.id)
    body.worked_examples, body.prompt_token_ids = [str(example.id)], [1, 2, 3]


def spoil(session: Session, project_id: UUID) -> None:
    """What database errors do: quote the row."""
    job = jobs.enqueue(session, "dataset.build", {}, project_id=project_id)
    job.state, job.error, job.log_tail = "dead", f"parameters: {MARK}", MARK


def run_of(world: World) -> UUID:
    with world.sessions() as session:
        return session.scalars(select(Run.id).where(Run.kind == "sft")).one()


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


def admitted(world: World, identity: UUID, at: datetime) -> Admitted:
    return Admitted(
        id=identity, project_id=world.projects["entities"], api_key_id=None, endpoint="/v1/chat/completions",
        stream=False, adapter_digest=None, base_digest="b", generation=1, namespace="n", session_key=None,
        end_user=f"{MARK}-user", group_key="g", tags={}, config_hash="c", started_at=at.timestamp(),
        messages=[{"role": "user", "content": MARK}], parameters={}, prompt_token_ids=[1], prompt_hash="p",
        template_hash="t", tokenizer_hash="k", retrieved=[],
    )  # fmt: skip
