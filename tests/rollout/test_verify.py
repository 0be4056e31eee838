"""Golden prompts: which rows of the record are asked again, and how."""

from sqlalchemy import update

from engine.text.supervision import asked_in
from services.store.models import EvaluationRow, Example
from tests.rollout.conftest import World
from worker.rollout.verify import golden_prompts


def test_what_the_engine_refused_when_it_was_judged_is_not_asked_again(world: World) -> None:
    world.artifact("ab" * 32, "verified")
    run_id = world.run("ab" * 32, outputs=["one", "", "three"])
    said = {"tools": [{"type": "function", "function": {"name": "weather"}}]}
    refused = {"candidate": {"finish": "error"}}
    with world.sessions.begin() as session:
        session.execute(update(EvaluationRow).where(EvaluationRow.candidate_output == "").values(details=refused))
        session.execute(update(Example).where(Example.id == world.example_ids[0]).values(asked=said))

        prompts = golden_prompts(session, "ab" * 32, run_id=run_id)

    assert {one.output for one in prompts} == {"one", "three"}
    assert [one.asked for one in prompts if one.output == "one"] == [asked_in(said)]
