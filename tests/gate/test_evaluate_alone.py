"""The evaluate job where one person reviews alone: the cause is named, and an override is no dead end."""

from dataclasses import replace

from sqlalchemy import select

from services.settings import Settings
from services.store import deployments, evaluations, jobs
from services.store.evaluation_config import RECORD
from services.store.models import Artifact, EvaluationRow, Revision, Run
from tests.curation.world import World
from tests.gate.conftest import Trained
from tests.gate.test_evaluate import corrected, evaluate, start
from worker.gate.order import RECORD_PROMPTS
from worker.rollout.swap import deploy_job


def test_an_override_with_nothing_held_out_goes_on_to_a_canary_verified_by_its_own_record(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    taught = [replace(one, split="train") for one in corrected(12)]
    run = start(world, trained, taught)
    evaluate(world, run, engine_settings)
    with world.sessions.begin() as session:
        evaluation = evaluations.of_run(session, run.id)
        assert evaluation is not None
        assert evaluation.reasons == ["too few held-out corrections to judge by: 0 groups, needs 30 more"]
        assert (evaluation.summary["rows"], evaluation.summary["slices"]) == (0, {})
        assert evaluations.rows(session, evaluation.id) == [], "a record is nothing that was compared"
        record = session.scalars(select(EvaluationRow)).all()
        assert {(row.slice, row.candidate_output) for row in record} == {(RECORD, "yes")}
        assert len(record) == RECORD_PROMPTS
        revision = session.get_one(Revision, run.revision_id)
        assert revision.looks == 0
        evaluations.override(session, evaluation, actor="user:1", reason="Nobody else is here to review.")

    with world.sessions() as session:
        job_id = session.get_one(Run, run.id).job_id
    assert job_id is not None
    lease = jobs.claim(world.sessions, job_id, "test")
    assert lease is not None
    with lease:
        deploy_job(lease, engine_settings)

    with world.sessions() as session:
        done = session.get_one(Run, run.id)
        newest = deployments.events(session, world.project_id)[0]
        assert session.get_one(Artifact, trained.adapter.digest).state == "canary"
    assert (done.state, done.phase, done.error) == ("succeeded", "canary", None)
    assert (newest.kind, newest.evidence["golden_prompts"], newest.evidence["differing"]) == ("canary", 8, 0)


def test_a_refusal_for_want_of_held_out_rows_names_who_is_waited_for(
    world: World, trained: Trained, engine_settings: Settings
) -> None:
    for index in range(3):
        world.judge(world.item(world.log(f"held out {index}", "no"), "held_out"), "correct", "yes")
    run = start(world, trained, corrected(4))

    evaluate(world, run, engine_settings)

    with world.sessions() as session:
        evaluation = evaluations.of_run(session, run.id)
    assert evaluation is not None
    assert evaluation.reasons == [
        "too few held-out corrections to judge by: 4 groups, needs 26 more",
        "3 held-out answers wait for a second reviewer, as two people have to agree on each",
    ]
