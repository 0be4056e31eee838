"""Work that had read a text before it was erased, and writes it after: nothing of it stays."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from services.errors import Conflict, NotFound
from services.store import (
    datasets,
    embeddings,
    erasure,
    erasure_spools,
    examples,
    imports,
    jobs,
    projects,
    reviews,
    revisions,
    runs,
)
from services.store.erasure_cover import Subject, drop_covered
from services.store.models import (
    Artifact,
    ErasureRequest,
    Evaluation,
    EvaluationRow,
    ExampleEmbedding,
    Interaction,
    InteractionEmbedding,
    Job,
    LogSpool,
    Pin,
    ReviewItem,
    Run,
    RunEvent,
    SplitGroup,
)
from tests.erasure.searching import tables_with
from tests.erasure.seeding import ask, erase, noise, run_job
from tests.gateway.judging import judge, person, queued, undo
from tests.gateway.parts import World, eventually
from worker.curation import embed, judged
from worker.curation.build import build_revision
from worker.curation.pairs import Retired
from worker.erasure import job
from worker.tasks import perform

BASE = "b"


@pytest.fixture(scope="module")
def lead(world: World) -> UUID:
    allowed = {"pinned_answers": {"enabled": True}, "worked_examples": {"enabled": True}}
    with world.sessions.begin() as session:
        projects.configure(session, projects.get(session, "entities"), allowed)
    return person(world, "lead@example.org", "lead")


def asked(world: World, lead: UUID, *, corrected: bool = True) -> tuple[str, UUID, UUID]:
    """A mark, an answer that holds it, its review item."""
    mark = f"race{uuid4().hex}"
    interaction_id = ask(world, mark, mark)
    item = queued(world, str(interaction_id), group=mark)
    if corrected:
        judge(world, item, lead, "correct", f"{mark} corrected")
    return mark, interaction_id, item


def subject_of(world: World, mark: str) -> Subject:
    return erasure.checked(world.projects["entities"], "end_user", f"{mark}-user")


def nowhere(world: World, mark: str) -> None:
    with world.sessions() as session:
        assert tables_with(session, mark) == []


def at_step(world: World, words: str) -> Callable[[], bool]:
    """Whether the erasure that is under way has come to a step."""

    def there() -> bool:
        with world.sessions() as session:
            made = session.scalars(select(ErasureRequest).order_by(ErasureRequest.id.desc()).limit(1)).first()
            return made is not None and str(made.progress.get("step", "")).startswith(words)

    return there


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that fails must not hang in the erasure that waits for it."""
    monkeypatch.setattr(job, "WAIT_SECONDS", 15.0)


@contextmanager
def erasing(world: World, mark: str) -> Iterator[Future[ErasureRequest]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(erase, world, subject_of(world, mark))


def test_a_build_that_had_read_an_answer_does_not_bring_it_back(world: World, lead: UUID) -> None:
    mark, _, _ = asked(world, lead)
    project_id = world.projects["entities"]
    with world.sessions.begin() as session:
        build_revision(session, project_id, "golden")
    with world.sessions() as building:
        jobs.enqueue(building, "dataset.build", {})  # as a job it has written before it reads
        drafted = judged.draft_all(building, project_id, judged.read(building, project_id), Retired())
        with erasing(world, mark) as erased:
            eventually(at_step(world, "waiting for work that had read it"))
            entries = examples.add_examples(building, project_id, drafted.drafts)
            revisions.create(building, datasets.get_or_create(building, project_id, "late"), entries, {})
            building.commit()
            made = erased.result(30)
    nowhere(world, mark)
    assert made.certificate is not None
    assert {one["dataset"] for one in made.certificate["revisions"]} == {"golden", "late"}
    assert made.certificate["rows"]["example"] == 2


def test_a_judgement_that_pins_an_answer_meanwhile_leaves_no_pin(world: World, lead: UUID) -> None:
    mark, interaction_id, item = asked(world, lead, corrected=False)
    with world.sessions() as judging:
        judging.execute(select(Job.id))
        held = judge_within(judging, item, lead, f"{mark} pinned")
        assert held
        with erasing(world, mark) as erased:
            time.sleep(1.5)  # the spool is clean by then, and the first page waits for the item
            judging.commit()
            erased.result(30)
    nowhere(world, mark)
    with world.sessions() as session:
        assert session.scalars(select(Pin).where(Pin.interaction_id == interaction_id)).all() == []


def judge_within(session: Session, item_id: UUID, user_id: UUID, correction: str) -> bool:
    """Submit in a transaction that stays open; whether it has pinned the answer."""
    item = session.get_one(ReviewItem, item_id)
    item.lease_user_id, item.lease_token = user_id, uuid4()
    session.flush()
    said = reviews.Judgement(verdict="correct", idempotency_key=uuid4().hex, correction=correction)
    reviews.submit(session, item.project_id, item_id, user_id, item.lease_token, said)
    return session.scalar(select(Pin.id).where(Pin.review_item_id == item_id)) is not None


def test_vectors_made_of_what_is_gone_are_not_kept(world: World, lead: UUID) -> None:
    mark, interaction_id, _ = asked(world, lead)
    project_id = world.projects["entities"]
    with world.sessions.begin() as session:
        [waiting] = [one for one in embed._draft(session, project_id) if mark in one.completion]
    erase(world, subject_of(world, mark))
    with world.sessions.begin() as session:
        embed._keep(session, project_id, BASE, [waiting], [[1.0, 0.0]])
        embeddings.add(session, project_id, "m", {interaction_id: [1.0, 0.0]})
    nowhere(world, mark)
    with world.sessions() as session:
        assert session.get(ExampleEmbedding, waiting.example_id) is None
        assert session.get(InteractionEmbedding, interaction_id) is None


def test_a_training_that_ends_while_it_is_stopped_leaves_tainted_weights(world: World, lead: UUID) -> None:
    mark, _, _ = asked(world, lead)
    project_id = world.projects["entities"]
    digest = uuid4().hex * 2
    with world.sessions.begin() as session:
        revision = build_revision(session, project_id, "golden")
        run = Run(
            project_id=project_id, kind="sft", state="running", params={}, revision_id=revision.id, created_by="me"
        )
        session.add(run)
        session.flush()
        trained = jobs.enqueue(session, "train", {"run_id": str(run.id)})
        trained.state, run.job_id = "running", trained.id
        held = [member.example.id for member in revisions.members(session, revision.id)]
        run_id, job_id = run.id, trained.id
    with erasing(world, mark) as erased:
        eventually(at_step(world, "waiting for work that had read it"))
        with world.sessions.begin() as session:
            assert session.get_one(Job, job_id).cancel_requested
            ended = session.get_one(Run, run_id)
            session.add(Artifact(digest=digest, kind="adapter", project_id=project_id, run_id=run_id, base_digest="b",
                                 manifest={}, state="built"))  # fmt: skip
            session.flush()
            evaluation = Evaluation(project_id=project_id, run_id=run_id, revision_id=ended.revision_id,
                                    candidate_digest=digest)  # fmt: skip
            session.add(evaluation)
            session.flush()
            session.add_all(
                EvaluationRow(evaluation_id=evaluation.id, example_id=one, slice="target", group_key=mark,
                              baseline_output=mark, candidate_output=mark, baseline_scores={}, candidate_scores={})
                for one in held
            )  # fmt: skip
            runs.add_event(session, run_id, "log", {"line": f"died of {mark}", "tail": mark})
            runs.add_event(session, run_id, "log", {"line": f"trainer: {mark}", "tail": ""})
            runs.finish(session, ended, "failed", "failed", f"died of {mark}")
        made = erased.result(30)
    nowhere(world, mark)
    assert made.certificate is not None
    assert made.certificate["runs_stopped"] == [str(run_id)]
    assert [one["digest"] for one in made.certificate["tainted"]] == [digest]
    with world.sessions() as session:
        said = session.scalars(select(RunEvent.payload).where(RunEvent.run_id == run_id, RunEvent.kind == "log")).all()
        assert any("no longer kept" in one["line"] for one in said)


def test_a_prompt_that_lands_after_its_example_was_erased_lands_without_its_tokens(world: World, lead: UUID) -> None:
    mark, _, _ = asked(world, lead)
    with world.sessions.begin() as session:
        [waiting] = [one for one in embed._draft(session, world.projects["entities"]) if mark in one.completion]
    erase(world, subject_of(world, mark))
    row = {"id": uuid4(), "end_user": None, "session_key": None, "worked_examples": [str(waiting.example_id)],
           "prompt_token_ids": [1, 2]}  # fmt: skip
    other = {**row, "worked_examples": [str(uuid4())]}
    with world.sessions() as session:
        landed = drop_covered(session, [row, other])
    assert landed == [{**row, "worked_examples": [], "prompt_token_ids": []}, other]


def test_what_was_imported_of_a_subject_is_erased_and_not_built_again(world: World, lead: UUID) -> None:
    mark, kept = f"file{uuid4().hex}", f"else{uuid4().hex}"
    rows = [{"prompt": f"{noise()} {one}", "completion": f"{one} said", "user": f"{one}-user"} for one in (mark, kept)]
    project_id = world.projects["other"]
    with world.sessions.begin() as session:
        dataset = datasets.get_or_create(session, project_id, "golden")
        begun = imports.begin(session, dataset, "rows.jsonl", "\n".join(map(json.dumps, rows)).encode(), "me")
        imports.finish(session, begun, None, str(lead))
        build_revision(session, project_id, "golden")
    made = erase(world, erasure.checked(project_id, "end_user", f"{mark}-user"))
    nowhere(world, mark)
    assert made.certificate is not None
    assert made.certificate["rows"]["example"] == 1
    with world.sessions.begin() as session:
        again = build_revision(session, project_id, "golden")
        members = revisions.members(session, again.id)
        assert [member.example.completion for member in members] == [f"{kept} said"]


def test_a_silent_spool_holds_an_erasure_up_until_it_is_given_up(
    world: World, lead: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, interaction_id, _ = asked(world, lead)
    monkeypatch.setattr(job, "WAIT_SECONDS", 2.0)
    with world.sessions.begin() as session:
        silent = LogSpool(id=uuid4(), host="elsewhere", path="/srv/spool")
        session.add(silent)
        session.flush()
        session.execute(update(LogSpool).where(LogSpool.id == silent.id).values(seen_at=func.now() - timedelta(days=3)))
        made = erasure.request(session, subject_of(world, mark), "me")
    assert made.job_id is not None
    perform(world.sessions, world.settings, made.job_id)
    with world.sessions.begin() as session:
        tried = session.get_one(Job, made.job_id)
        assert "the shipper of elsewhere:/srv/spool, last seen" in (tried.error or "")
        assert f"whet spool forget {silent.id}" in (tried.error or "")
        assert session.get(Interaction, interaction_id) is not None
        (alive,) = [one for one in erasure_spools.list_(session) if one.id != silent.id]
        with pytest.raises(Conflict, match="shipper is running"):
            erasure_spools.forget(session, alive.id, "me")
        with pytest.raises(NotFound):
            erasure_spools.forget(session, uuid4(), "me")
        erasure_spools.forget(session, silent.id, "me")
        tried.not_before = session.scalar(select(func.now()))
    run_job(world, "erase")
    nowhere(world, mark)
    with world.sessions() as session:
        assert erasure.get(session, made.id).state == "done"


def test_a_database_error_does_not_quote_what_was_sent(world: World) -> None:
    mark = f"quote{uuid4().hex}"
    with world.sessions() as session:
        session.add(SplitGroup(project_id=uuid4(), group_key=mark, split="train"))
        with pytest.raises(IntegrityError) as caught:
            session.flush()
    assert mark not in str(caught.value)
    server = (world.settings.home / "logs").glob("*.log")
    assert all(mark not in path.read_text() for path in server)


def test_switched_off_worked_examples_still_lose_what_was_taken_back(world: World, lead: UUID) -> None:
    mark = f"back{uuid4().hex}"
    item = queued(world, str(ask(world, mark, mark)), group=mark)
    said = judge(world, item, lead, "correct", f"{mark} corrected")
    project_id = world.projects["entities"]
    with world.sessions.begin() as session:
        [waiting] = [one for one in embed._draft(session, project_id) if mark in one.completion]
        embed._keep(session, project_id, BASE, [waiting], [[1.0, 0.0]])
        projects.configure(session, projects.get(session, "entities"), {"worked_examples": {"enabled": False}})
    undo(world, lead, said)
    with world.sessions.begin() as session:
        assert session.get(ExampleEmbedding, waiting.example_id) is None
        projects.configure(session, projects.get(session, "entities"), {"worked_examples": {"enabled": True}})
