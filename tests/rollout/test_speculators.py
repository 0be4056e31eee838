"""The heads of a deployment: on trial, live, back again; and what a change of the adapter does to them."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.errors import Conflict
from services.store import audit, deployments, projects, speculators
from services.store.base import make_sessions
from services.store.models import Artifact, Run
from services.store.speculation import Heads
from tests.rollout.conftest import World
from tests.rollout.drafters import BECAUSE, deployed, drafting, go_live, heads, history, serve

A, B = "a" * 64, "b" * 64
H1, H2, H3 = "1" * 64, "2" * 64, "3" * 64


def stage(world: World, digest: str, share: float = 0.25) -> None:
    with world.sessions.begin() as session:
        speculators.stage_canary(session, world.project_id, digest, share, BECAUSE)


def told(world: World) -> list[tuple[str, str | None, str | None]]:
    return [(event.kind, event.from_digest, event.to_digest) for event in history(world)]


def test_heads_are_tried_go_live_and_remember_the_way_back(world: World) -> None:
    go_live(world, heads(world, H1))
    stage(world, heads(world, H2))
    assert drafting(world) == Heads(H1, H2, 0.25)
    assert (world.state(H1), world.state(H2)) == ("live", "canary")

    go_live(world, H2)

    after = deployed(world)
    assert (drafting(world), after.speculator_last_good_digest) == (Heads(H2), H1)
    assert (world.state(H1), world.state(H2)) == ("retired", "live")
    assert after.generation == 1, "the weights that answer are the same"
    expected = [("speculator_live", None, H1), ("speculator_canary", H1, H2), ("speculator_live", H1, H2)]
    assert told(world) == expected
    assert history(world)[-1].evidence == {"n": 1}
    with world.sessions() as session:
        assert audit.verify(session).rows == 3


def test_a_roll_back_returns_to_the_last_good_heads_and_then_to_the_suffix_drafter(world: World) -> None:
    go_live(world, heads(world, H1))
    go_live(world, heads(world, H2))

    with world.sessions.begin() as session:
        speculators.roll_back(session, world.project_id, BECAUSE)
    assert (drafting(world), world.state(H1), world.state(H2)) == (Heads(H1), "live", "rolled_back")
    with world.sessions.begin() as session:
        speculators.roll_back(session, world.project_id, BECAUSE)
    assert (drafting(world), world.state(H1)) == (Heads(), "rolled_back")
    with world.sessions.begin() as session, pytest.raises(Conflict, match="works alone"):
        speculators.roll_back(session, world.project_id, BECAUSE)
    with world.sessions.begin() as session, pytest.raises(Conflict, match="is rolled_back and cannot become"):
        speculators.stage_canary(session, world.project_id, H2, 0.5, BECAUSE)


@pytest.mark.parametrize(
    ("state", "kind"), [("retired", "speculator_retired"), ("rolled_back", "speculator_rolled_back")]
)
def test_a_withdrawn_canary_leaves_the_live_heads_alone(world: World, state: str, kind: str) -> None:
    go_live(world, heads(world, H1))
    stage(world, heads(world, H2))

    with world.sessions.begin() as session:
        speculators.withdraw_canary(session, world.project_id, BECAUSE, state=state)

    assert (drafting(world), world.state(H2)) == (Heads(H1), state)
    assert told(world)[-1] == (f"speculator_{state}", H2, H1)
    with world.sessions.begin() as session, pytest.raises(Conflict, match="no heads are being tried"):
        speculators.withdraw_canary(session, world.project_id, BECAUSE)


def test_newer_heads_take_the_place_of_an_undecided_canary(world: World) -> None:
    stage(world, heads(world, H1))
    stage(world, heads(world, H2), 0.5)

    assert drafting(world) == Heads(None, H2, 0.5)
    assert world.state(H1) == "retired"
    assert told(world)[1:] == [("speculator_retired", H1, None), ("speculator_canary", None, H2)]


def test_a_person_retires_everything_to_the_suffix_drafter(world: World) -> None:
    go_live(world, heads(world, H1))
    stage(world, heads(world, H2))
    with world.sessions.begin() as session:
        speculators.retire(session, world.project_id, BECAUSE)
    assert (drafting(world), world.state(H1), world.state(H2)) == (Heads(), "retired", "retired")
    with world.sessions.begin() as session, pytest.raises(Conflict, match="works alone"):
        speculators.retire(session, world.project_id, BECAUSE)


def test_what_cannot_draft_here_is_refused_and_nothing_changes(world: World) -> None:
    heads(world, H1, adapter=A)
    world.artifact(A, "staged")
    with world.sessions.begin() as session:
        other = projects.create(session, "other").id
    for digest, sentence in ((H1, "trained on aaaaaaaaaaaa, and the base serves now"), (A, "kind adapter")):
        with world.sessions.begin() as session, pytest.raises(Conflict, match=sentence):
            speculators.stage_canary(session, world.project_id, digest, 0.5, BECAUSE)
    with world.sessions.begin() as session, pytest.raises(Conflict, match="does not belong"):
        speculators.go_live(session, other, H1, BECAUSE)
    go_live(world, heads(world, H2))
    with world.sessions.begin() as session, pytest.raises(Conflict, match="live already"):
        speculators.go_live(session, world.project_id, H2, BECAUSE)
    with world.sessions.begin() as session, pytest.raises(Conflict, match="draft already"):
        speculators.stage_canary(session, world.project_id, H2, 0.1, BECAUSE)
    assert drafting(world) == Heads(H2)


def test_heads_cannot_be_flipped_to_as_if_they_were_an_adapter(world: World) -> None:
    heads(world, H1, state="staged")
    with pytest.raises(Conflict, match="kind speculator, not adapter"):
        serve(world, H1)


def test_a_decision_from_an_older_look_changes_nothing(world: World) -> None:
    stage(world, heads(world, H1))
    seen = speculators.see(deployed(world))
    stale = BECAUSE._replace(seen=seen)
    stage(world, heads(world, H2))

    with world.sessions.begin() as session, pytest.raises(Conflict, match="changed since"):
        speculators.go_live(session, world.project_id, H1, stale)
    serve(world, A)
    with world.sessions.begin() as session, pytest.raises(Conflict, match="changed since"):
        speculators.raise_alarm(session, world.project_id, H1, BECAUSE._replace(seen=seen))
    assert drafting(world) == Heads()


def test_of_eight_decisions_from_one_look_exactly_one_is_carried_out(world: World, database_url: str) -> None:
    digests = [heads(world, f"{number}" * 64) for number in range(8)]
    decision = BECAUSE._replace(seen=speculators.see(deployed(world)))
    world.sessions = make_sessions(database_url, pool_size=10)

    def attempt(digest: str) -> bool:
        try:
            with world.sessions.begin() as session:
                speculators.stage_canary(session, world.project_id, digest, 0.5, decision)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, digests))
    world.sessions.kw["bind"].dispose()
    assert sum(won) == 1
    assert drafting(world).canary == digests[won.index(True)]


def test_a_new_adapter_retires_the_heads_of_the_old_one_by_itself(world: World) -> None:
    go_live(world, heads(world, H1))
    stage(world, heads(world, H2))

    after = serve(world, A)

    assert drafting(world) == Heads()
    assert (after.speculator_last_good_digest, world.state(H1), world.state(H2)) == (None, "retired", "retired")
    assert told(world)[-3:] == [("flip", None, A), ("speculator_retired", H1, None), ("speculator_retired", H2, None)]
    assert "trained on the base, and aaaaaaaaaaaa serves now" in history(world)[-1].reason
    assert history(world)[-1].evidence["serves"] == A


def test_a_roll_back_to_an_adapter_brings_its_heads_back(world: World) -> None:
    serve(world, A)
    go_live(world, heads(world, H1, adapter=A))
    serve(world, B)
    go_live(world, heads(world, H2, adapter=B))

    with world.sessions.begin() as session:
        deployments.roll_back(session, world.project_id, actor="ada", reason="worse")

    assert (drafting(world), world.state(H1), world.state(H2)) == (Heads(H1), "live", "retired")
    assert told(world)[-2:] == [("speculator_retired", H2, H1), ("speculator_live", H2, H1)]


def test_the_runs_of_heads_that_go_and_come_with_their_adapter_say_so(world: World) -> None:
    serve(world, A)
    go_live(world, heads(world, H1, adapter=A))
    with world.sessions.begin() as session:
        run = Run(project_id=world.project_id, kind="speculator", state="succeeded", phase="live", params={},
                  artifact_digest=H1, created_by="test")  # fmt: skip
        session.add(run)
        session.flush()
        session.get_one(Artifact, H1).run_id = run_id = run.id

    serve(world, B)
    assert world.read_run(run_id).phase == "retired"
    with world.sessions.begin() as session:
        deployments.roll_back(session, world.project_id, actor="ada", reason="worse")
    assert world.read_run(run_id).phase == "live"


def test_heads_that_a_roll_back_made_live_come_back_with_their_adapter_too(world: World) -> None:
    serve(world, A)
    for digest in (H1, H2):
        go_live(world, heads(world, digest, adapter=A))
    with world.sessions.begin() as session:
        speculators.roll_back(session, world.project_id, BECAUSE)
    assert drafting(world) == Heads(H1)
    serve(world, B)
    assert drafting(world) == Heads()

    serve(world, A)

    assert (drafting(world), world.state(H1), world.state(H2)) == (Heads(H1), "live", "rolled_back")


@pytest.mark.parametrize("leave", ["retired by a person", "rolled back", "never live"])
def test_heads_that_went_for_a_reason_of_their_own_do_not_come_back_with_their_adapter(
    world: World, leave: str
) -> None:
    serve(world, A)
    if leave == "never live":
        stage(world, heads(world, H1, adapter=A))
    else:
        go_live(world, heads(world, H1, adapter=A))
        with world.sessions.begin() as session:
            end = speculators.retire if leave == "retired by a person" else speculators.roll_back
            end(session, world.project_id, BECAUSE)
    serve(world, B)

    serve(world, A)

    assert drafting(world) == Heads()


def test_an_alarm_is_history_and_changes_nothing(world: World) -> None:
    go_live(world, heads(world, H1))
    with world.sessions.begin() as session:
        speculators.raise_alarm(session, world.project_id, H1, BECAUSE)
    assert told(world)[-1] == ("speculator_alarm", H1, H1)
    assert drafting(world) == Heads(H1)


def test_after_any_history_states_and_row_agree(world: World) -> None:
    choose = random.Random(7)
    made = 0
    done: set[str] = set()
    for _ in range(120):
        active = deployed(world).active_digest
        action = choose.choice(["canary", "canary", "live", "promote", "withdraw", "back", "retire", "flip", "undo"])
        try:
            with world.sessions.begin() as session:
                if action in ("canary", "live"):
                    made += 1
                    digest = f"{made:064x}"
                    session.add(
                        Artifact(digest=digest, kind="speculator", project_id=world.project_id, base_digest="base",
                                 state="built", manifest={"adapter": active})
                    )  # fmt: skip
                    session.flush()
                    act(session, world, action, digest)
                else:
                    act(session, world, action, choose.choice([A, B, None]))
        except Conflict:
            continue
        done.add(action)
        check(world)
    assert done == {"canary", "live", "promote", "withdraw", "back", "retire", "flip", "undo"}


def act(session: Session, world: World, action: str, digest: str | None) -> None:
    project = world.project_id
    deployment = deployments.get(session, project)
    match action:
        case "canary":
            speculators.stage_canary(session, project, str(digest), 0.5, BECAUSE)
        case "live":
            speculators.go_live(session, project, str(digest), BECAUSE)
        case "promote":
            if deployment.speculator_canary_digest is None:
                raise Conflict("none")
            speculators.go_live(session, project, deployment.speculator_canary_digest, BECAUSE)
        case "withdraw":
            speculators.withdraw_canary(session, project, BECAUSE, state="rolled_back")
        case "back":
            speculators.roll_back(session, project, BECAUSE)
        case "retire":
            speculators.retire(session, project, BECAUSE)
        case "flip":
            if digest and session.get(Artifact, digest) is None:
                session.add(Artifact(digest=digest, kind="adapter", project_id=project, base_digest="base",
                                     manifest={}, state="staged"))  # fmt: skip
                session.flush()
            deployments.flip(
                session, project, expected_generation=deployment.generation, digest=digest, actor="t", reason="t"
            )
        case "undo":
            deployments.roll_back(session, project, actor="t", reason="t", condemned_state="retired")


def check(world: World) -> None:
    with world.sessions() as session:
        row = deployments.get(session, world.project_id)
        in_use = {"live": row.speculator_digest, "canary": row.speculator_canary_digest}
        for state, digest in in_use.items():
            found = session.scalars(
                select(Artifact.digest).where(Artifact.kind == "speculator", Artifact.state == state)
            )
            assert list(found) == ([digest] if digest else [])
            if digest:
                assert session.get_one(Artifact, digest).manifest["adapter"] == row.active_digest
        assert (row.speculator_share > 0) == (row.speculator_canary_digest is not None)
        if row.speculator_last_good_digest:
            assert session.get_one(Artifact, row.speculator_last_good_digest).state == "retired"
