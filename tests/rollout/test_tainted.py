"""Weights whose data was erased while they are on trial: the trial ends, nothing is condemned, nothing frozen."""

from uuid import UUID

import pytest
from sqlalchemy import func, update

from services.errors import Conflict
from services.store import rollouts, speculators
from services.store.models import Artifact, ErasedRow, ErasureRequest, RevisionExample, Rollout, Run
from services.store.speculation import Heads
from tests.rollout.conftest import World
from tests.rollout.drafters import BECAUSE, drafting, go_live, heads
from tests.rollout.trials import BY_ADA, LIVE, NEW, begin, current, deployment, newest, serve
from worker.erasure import learned


def trained(world: World, digest: str) -> UUID:
    """The run that trained an artefact on the project's revision."""
    with world.sessions.begin() as session:
        run = Run(
            project_id=world.project_id, kind="sft", state="succeeded", phase="canary", params={},
            artifact_digest=digest, revision_id=world.revision_id, created_by="test",
        )  # fmt: skip
        session.add(run)
        session.flush()
        session.get_one(Artifact, digest).run_id = run.id
        return run.id


def erase(world: World) -> list[dict[str, object]]:
    """What an erasure of one of the revision's training rows does to the weights trained on it, or on the log."""
    with world.sessions.begin() as session:
        made = ErasureRequest(
            kind="end_user", subject="u",
            progress={"spans": {str(world.project_id): ["2000-01-01T00:00:00+00:00", "2100-01-01T00:00:00+00:00"]}},
        )  # fmt: skip
        row = world.example_ids[0]
        session.add(made)
        session.flush()
        session.add(ErasedRow(request_id=made.id, kind="example", row_id=row))
        session.add(
            RevisionExample(revision_id=world.revision_id, example_id=row, content_hash="h", split="train", position=0)
        )
        session.flush()
        return learned.taint(session, made, [world.project_id])


@pytest.mark.parametrize("stage", ["shadow", "canary"])
def test_a_candidate_whose_data_was_erased_is_off_trial(world: World, stage: str) -> None:
    serve(world)
    begin(world, shadow={"requests": 5 if stage == "shadow" else 0})
    run_id = trained(world, NEW)
    with world.sessions.begin() as session:
        session.execute(update(Rollout).values(run_id=run_id))

    assert erase(world) == [{"digest": NEW, "kind": "adapter", "state": "retired"}]

    row, trial, event = deployment(world), current(world), newest(world)
    assert (row.active_digest, row.canary_digest, row.canary_share) == (LIVE, None, 0.0)
    assert (trial.stage, trial.ending) == ("stopped", "trained on data that has been erased since")
    assert (event.kind, event.actor, event.reason) == ("canary_stopped", "erasure", trial.ending)
    assert (row.automatic_rollbacks, row.frozen) == (0, False)
    assert world.read_run(run_id).phase == "stopped"


def test_what_is_live_and_a_candidate_of_other_data_go_on(world: World) -> None:
    serve(world)
    trained(world, LIVE)
    begin(world)
    assert erase(world) == [{"digest": LIVE, "kind": "adapter", "state": "live"}]
    assert (deployment(world).active_digest, deployment(world).canary_digest) == (LIVE, NEW)


def test_tainted_weights_serve_nobody_more(world: World) -> None:
    """Neither out of the shadow nor with another share, should a trial of theirs still be open."""
    serve(world)
    begin(world, shadow={"requests": 5})
    taint(world, NEW)
    with world.sessions() as session, pytest.raises(Conflict, match="erased since"):
        rollouts.begin_canary(session, world.project_id, BY_ADA)
    with world.sessions.begin() as session:
        session.execute(update(Rollout).values(stage="canary"))
        session.execute(update(Artifact).where(Artifact.digest == NEW).values(state="canary"))
    with world.sessions() as session, pytest.raises(Conflict, match="erased since"):
        rollouts.change_share(session, world.project_id, 0.5, BY_ADA)


def test_heads_whose_log_was_erased_are_off_trial(world: World) -> None:
    go_live(world, heads(world, "4" * 64))
    with world.sessions.begin() as session:
        speculators.stage_canary(session, world.project_id, heads(world, "5" * 64), 0.25, BECAUSE)

    assert {one["digest"]: one["state"] for one in erase(world)} == {"4" * 64: "live", "5" * 64: "retired"}

    assert drafting(world) == Heads("4" * 64)
    assert (newest(world).kind, newest(world).actor) == ("speculator_retired", "erasure")


def test_a_roll_back_of_heads_passes_tainted_ones_over(world: World) -> None:
    go_live(world, heads(world, "4" * 64))
    go_live(world, heads(world, "5" * 64))
    taint(world, "4" * 64)
    with world.sessions.begin() as session:
        speculators.roll_back(session, world.project_id, BECAUSE)
    assert drafting(world) == Heads()


def taint(world: World, digest: str) -> None:
    with world.sessions.begin() as session:
        session.execute(update(Artifact).where(Artifact.digest == digest).values(tainted_at=func.now()))
