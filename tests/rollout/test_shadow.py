"""The shadow through a real engine: prompts answered again, nobody served, then the canary or a refusal."""

import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from msgspec import structs
from sqlalchemy import func, select, update

from engine.client import Completion
from engine.sync_client import SyncEngineClient
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import erasure, erasure_rows, failpoints, jobs, rollouts, shadow_answers
from services.store.erasure_cover import Subject
from services.store.models import Interaction, InteractionBody, Job, Project, ReviewItem, ShadowAnswer
from services.store.rollout_config import RolloutConfig, Shadowing
from services.store.shadow_answers import Pair
from tests.rollout.conftest import PROMPTS, ROOT, EngineUnderTest, World
from tests.rollout.trials import BY_ADA, answer, current, deployment, kinds, look, newest, serve
from worker.curation.sample import sample
from worker.curation.second import shadowed
from worker.rollout import shadow
from worker.rollout.shadow import ShadowInterrupted, shadow_job

WANTED = 6


@pytest.fixture(scope="module")
def pair(engine: EngineUnderTest) -> tuple[str, str]:
    """What serves and a candidate, both loaded."""
    first, second = engine.adapter(61), engine.adapter(62)
    engine.load(first)
    engine.load(second)
    return first, second


@pytest.fixture
def prompts(world: World, engine: EngineUnderTest, pair: tuple[str, str]) -> list[UUID]:
    """Live answers of what serves, as the gateway would have logged them, and the candidate in the shadow."""
    live, candidate = pair
    serve(world, live)
    world.artifact(candidate, "staged")
    config = RolloutConfig(shadow=Shadowing(requests=WANTED))
    with world.sessions.begin() as session:
        session.get_one(Project, world.project_id).config = {"window_seconds": 60, "window_grace_seconds": 0}
        rollouts.begin(session, world.project_id, candidate, config, BY_ADA, None)
    return [logged(world, engine, live, place) for place in range(WANTED)]


def logged(world: World, engine: EngineUnderTest, live: str, place: int) -> UUID:
    tokenizer = Tokenizer.load(engine.model)
    identity = answer(
        world, current(world), "active", f"user-{place}", ago=200.0, adapter_digest=live,
        output=engine.answer(PROMPTS[place], live),
    )  # fmt: skip
    with world.sessions.begin() as session:
        session.execute(
            update(InteractionBody).where(InteractionBody.id == identity).values(
                messages=PROMPTS[place], prompt_token_ids=tokenizer.encode_chat(PROMPTS[place]),
                parameters={"model": "support", "n": 1, "temperature": 0.0, "seed": 0, "max_tokens": 12,
                            "stop_token_ids": list(tokenizer.eos_ids), "max_tokens_given": 12},
                tokenizer_hash=tokenizer.digest,
            )
        )  # fmt: skip
    return identity


def run_job(world: World, settings: Settings) -> None:
    with world.sessions() as session:
        [job_id] = session.scalars(select(Job.id).where(Job.kind == "shadow", Job.state == "queued"))
    lease = jobs.claim(world.sessions, job_id, "w")
    assert lease is not None
    with lease:
        shadow_job(lease, settings)


def test_prompts_are_answered_again_and_land_where_nothing_reads_them_as_traffic(
    world: World, settings: Settings, engine: EngineUnderTest, pair: tuple[str, str], prompts: list[UUID]
) -> None:
    look(world)
    run_job(world, settings)
    with world.sessions() as session:
        rows = session.scalars(select(Interaction).where(Interaction.origin == "shadow")).all()
        said = dict(session.execute(select(ShadowAnswer.interaction_id, InteractionBody.output).join(
            InteractionBody, InteractionBody.id == ShadowAnswer.shadow_id)).all())  # fmt: skip
    assert {row.adapter_digest for row in rows} == {pair[1]}
    assert {row.end_user for row in rows} == {f"user-{place}" for place in range(WANTED)}
    assert said == {identity: engine.answer(PROMPTS[place], pair[1]) for place, identity in enumerate(prompts)}
    assert deployment(world).canary_share == 0.0


def test_once_all_are_compared_the_canary_begins_with_their_figures(
    world: World, settings: Settings, pair: tuple[str, str], prompts: list[UUID]
) -> None:
    look(world)
    run_job(world, settings)
    look(world)
    assert (current(world).stage, deployment(world).canary_share, world.state(pair[1])) == ("canary", 0.1, "canary")
    event = newest(world)
    assert event.reason.startswith("the shadow comparison is fine")
    assert event.evidence["compared"] == WANTED
    assert event.evidence["differ"] > 0


def test_answers_that_break_their_form_are_refused_before_anybody_is_served(
    world: World, settings: Settings, pair: tuple[str, str], prompts: list[UUID]
) -> None:
    look(world)
    run_job(world, settings)
    with world.sessions.begin() as session:
        good, bad = ({"error": False, "valid": valid, "tokens": 9} for valid in (True, False))
        session.execute(update(ShadowAnswer).values(live=good, candidate=bad))
    look(world)
    assert (world.state(pair[1]), current(world).stage, deployment(world).canary_digest) == (
        "retired", "rejected", None,
    ), "nobody was served by it, so a person may try it again"  # fmt: skip
    assert kinds(world)[-1] == "canary_rejected"
    assert deployment(world).automatic_rollbacks == 0, "nobody was served by it"


@pytest.mark.parametrize("failpoint", ["shadow.answered", "shadow.deciding", "shadow.decided"])
def test_killed_in_the_shadow_every_prompt_is_compared_once_and_the_canary_begins_once(
    world: World, settings: Settings, prompts: list[UUID], failpoint: str
) -> None:
    look(world)
    if failpoint == "shadow.answered":
        with world.sessions() as session:
            [job_id] = session.scalars(select(Job.id).where(Job.kind == "shadow"))
        killed(failpoint, "tests.rollout.deploy", str(job_id))
        with world.sessions.begin() as session:
            session.execute(update(Job).values(lease_expires_at=func.now() - timedelta(seconds=1)))
        with world.sessions.begin() as session:
            jobs.expire(session)
            session.execute(update(Job).values(not_before=func.now()))
        run_job(world, settings)
    else:
        run_job(world, settings)
        killed(failpoint, "tests.rollout.watching")
    look(world)
    look(world)
    with world.sessions() as session:
        compared = len(shadow_answers.pairs(session, current(world).id))
        rows = session.scalar(select(func.count()).where(Interaction.origin == "shadow"))
    assert (compared, rows, kinds(world).count("canary")) == (WANTED, WANTED, 1)


def killed(failpoint: str, module: str, *arguments: str) -> None:
    died = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, env={**os.environ, "WHET_FAILPOINT": failpoint}, capture_output=True, timeout=90,
    )  # fmt: skip
    assert died.returncode == 137, died.stderr.decode()


def test_the_sampler_takes_what_the_shadow_said_for_its_pairs(
    world: World, settings: Settings, pair: tuple[str, str], prompts: list[UUID]
) -> None:
    look(world)
    run_job(world, settings)
    with world.sessions.begin() as session:
        seconds = shadowed(session, world.project_id)
        assert set(seconds) == set(prompts)
        assert {one.digest for one in seconds.values()} == {pair[1]}
        sample(session, world.project_id, now=datetime.now(UTC), seconds=seconds)
        items = session.scalars(select(ReviewItem).where(ReviewItem.strategy == "disagreement")).all()
    assert items
    assert all(item.alternative and item.alternative["digest"] == pair[1] for item in items)
    assert {item.interaction_id for item in items} <= set(prompts), "a shadow answer is nobody's traffic"


def test_an_erasure_takes_shadow_answers_with_the_user(
    world: World, settings: Settings, pair: tuple[str, str], prompts: list[UUID]
) -> None:
    look(world)
    run_job(world, settings)
    with world.sessions.begin() as session:
        mine = session.scalars(select(Interaction.id).where(Interaction.end_user == "user-0")).all()
        assert len(mine) == 2, "what was served, and what the candidate said"
        asked = erasure.request(session, Subject(world.project_id, "end_user", "user-0"), "test")
        erasure_rows.erase(session, asked, mine)
        left = session.scalars(select(ShadowAnswer.interaction_id)).all()
    assert set(left) == set(prompts[1:])


@pytest.mark.parametrize("when", ["before it is asked", "while it is answered"])
def test_who_asked_to_be_erased_is_not_asked_for_again(
    world: World, settings: Settings, prompts: list[UUID], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def ask_to_be_erased(*_: object) -> None:
        with world.sessions.begin() as session:
            made = erasure.request(session, Subject(world.project_id, "end_user", "user-0"), "test")
            # One was erased by then, the other is only meant.
            erasure_rows.erase(session, made, prompts[1:2])

    look(world)
    if when == "before it is asked":
        ask_to_be_erased()
    else:
        monkeypatch.setattr(failpoints, "reach", lambda name: ask_to_be_erased() if name == "shadow.answered" else None)
    run_job(world, settings)
    with world.sessions() as session:
        assert set(session.scalars(select(ShadowAnswer.interaction_id))) == set(prompts[2:])
        shadows = session.scalars(select(Interaction).where(Interaction.origin == "shadow")).all()
        asked = dict(session.execute(select(Interaction.id, Interaction.started_at)).all())
    assert {row.end_user for row in shadows} == {f"user-{place}" for place in range(2, WANTED)}
    for row in shadows:
        assert row.started_at == asked[UUID(row.tags["shadow_of"])], "an erasure asked for later covers both"


@pytest.mark.parametrize(
    "ending",
    [{"reason": "error", "code": "overloaded"}, {"reason": "error", "code": "deadline"}, {"adapter": None}],
    ids=str,
)
def test_what_a_busy_engine_leaves_unanswered_is_asked_again_and_counts_against_nobody(
    world: World, settings: Settings, prompts: list[UUID], monkeypatch: pytest.MonkeyPatch, ending: dict[str, str]
) -> None:
    real = SyncEngineClient.generate_many

    def busy(client: SyncEngineClient, *given: object, **named: object) -> list[Completion]:
        first, *others = real(client, *given, **named)  # type: ignore[arg-type]
        return [replace(first, finished=structs.replace(first.finished, **ending)), *others]

    look(world)
    with monkeypatch.context() as patch:
        patch.setattr(SyncEngineClient, "generate_many", busy)
        with pytest.raises(ShadowInterrupted, match="1 of 6"):
            run_job(world, settings)
    with world.sessions() as session:
        kept = shadow_answers.pairs(session, current(world).id)
    assert {pair.interaction_id for pair in kept} == set(prompts[:-1]), "the newest was asked first"
    assert not any(pair.candidate["error"] for pair in kept)
    with world.sessions() as session:
        assert [one.interaction.id for one in shadow.to_ask(session, current(world), limit=9)] == prompts[-1:]


def test_a_few_more_failures_than_before_are_no_reason_to_refuse() -> None:
    def pairs(live: int, candidate: int, of: int, users: int = 100) -> list[Pair]:
        sides = [[{"error": False, "valid": place >= bad} for place in range(of)] for bad in (live, candidate)]
        both = enumerate(zip(*sides, strict=True))
        return [Pair(UUID(int=place), False, *one, f"user-{place % users}") for place, one in both]

    config = RolloutConfig()
    assert shadow.judge(pairs(2, 4, 100), config).passed
    assert shadow.judge(pairs(0, 1, 10), config).passed
    refused = shadow.judge(pairs(2, 20, 100), config)
    assert not refused.passed
    assert "+18.0 points more of its 100 answers fail" in refused.reason
    fine, broken = {"error": False, "valid": None}, {"error": True, "valid": None}
    assert not shadow.judge([Pair(UUID(int=n), True, fine, broken, str(n)) for n in range(10)], config).passed
    assert shadow.judge(pairs(0, 1, 1), config).passed, "one failure is no evidence"
    assert shadow.judge(pairs(0, 90, 90, users=2), config).passed, "nor is what two users say, however often"
