"""The table of an artefact's life, pair by pair, and that no step is taken without an event."""

import pytest
from sqlalchemy import select

from services.errors import Conflict, NotFound
from services.store import deployments
from services.store.lifecycle import TRANSITIONS, born
from services.store.models import ARTIFACT_STATES, Artifact, DeploymentEvent
from tests.rollout.conftest import World

A = "a" * 64
# The design's table: training → built → verified → staged → shadow → canary → live → retired, and the exits.
ALLOWED = {
    ("training", "built"),
    ("built", "verified"), ("built", "rejected"), ("built", "quarantined"),
    ("verified", "staged"), ("verified", "rejected"), ("verified", "quarantined"),
    ("staged", "shadow"), ("staged", "canary"), ("staged", "live"), ("staged", "rejected"), ("staged", "quarantined"),
    ("shadow", "canary"), ("shadow", "live"), ("shadow", "retired"), ("shadow", "quarantined"),
    ("canary", "live"), ("canary", "retired"), ("canary", "quarantined"), ("canary", "rolled_back"),
    ("live", "retired"), ("live", "quarantined"), ("live", "rolled_back"),
    ("retired", "staged"), ("retired", "live"), ("retired", "quarantined"),
}  # fmt: skip


def test_the_table_is_the_designs() -> None:
    assert {(old, new) for old, news in TRANSITIONS.items() for new in news} == ALLOWED
    assert set(TRANSITIONS) == {"training", *ARTIFACT_STATES}


@pytest.mark.parametrize("old", ARTIFACT_STATES)
def test_of_all_pairs_exactly_the_tables_are_taken_each_with_its_event(world: World, old: str) -> None:
    told = []
    for number, new in enumerate(ARTIFACT_STATES):
        digest = f"{number:x}" * 64
        world.artifact(digest, old)
        taken = (old, new) in ALLOWED
        with world.sessions() as session:
            if old != new and not taken:
                with pytest.raises(Conflict, match=f"is {old} and cannot become {new}"):
                    deployments.advance(session, digest, new)
                session.rollback()
            else:
                deployments.advance(session, digest, new, actor="ada", reason="because", evidence={"rows": 3})
                session.commit()
        assert world.state(digest) == (new if taken else old)
        if taken:
            told.append((new, digest, "ada", "because", {"rows": 3, "states": [[digest, old, new]]}))
        assert events(world) == told


def test_what_was_trained_begins_its_history(world: World) -> None:
    with world.sessions.begin() as session:
        made = Artifact(digest=A, kind="adapter", project_id=world.project_id, base_digest="b", manifest={})
        session.add(made)
        session.flush()
        born(session, made)
    [(kind, digest, _, _, evidence)] = events(world)
    assert (kind, digest, evidence) == ("built", A, {"states": [[A, "training", "built"]]})


def test_an_unknown_artefact_is_not_found(world: World) -> None:
    with world.sessions() as session, pytest.raises(NotFound):
        deployments.advance(session, A, "verified")


def events(world: World) -> list[tuple[str, str | None, str, str, dict[str, object]]]:
    with world.sessions() as session:
        rows = session.scalars(select(DeploymentEvent).order_by(DeploymentEvent.id)).all()
    return [(row.kind, row.to_digest, row.actor, row.reason, row.evidence) for row in rows]
