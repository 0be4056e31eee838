"""A project with a canary, and the log that it is judged by."""

import random
from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import update

from services.store import deployments, rollouts, trials
from services.store.base import uuid7
from services.store.models import DeploymentEvent, Feedback, Interaction, InteractionBody, Rollout
from services.store.rollout_config import RolloutConfig
from services.store.rollouts import Decision
from tests.rollout.conftest import World
from worker.rollout.trial import Trials

LIVE, NEW, NEWER = "1" * 64, "2" * 64, "3" * 64
BY_ADA = Decision("ada", "because", {})
# Everything that is written in a test has landed.
AT_ONCE = timedelta()


def serve(world: World, digest: str = LIVE) -> None:
    """Make a digest live."""
    world.artifact(digest, "staged")
    with world.sessions.begin() as session:
        generation = deployments.get(session, world.project_id).generation
        deployments.flip(
            session, world.project_id, expected_generation=generation, digest=digest, actor="test", reason="start"
        )


def begin(world: World, digest: str = NEW, **config: object) -> Rollout:
    """Put a fresh artefact on trial; its canary began half an hour ago."""
    world.artifact(digest, "staged")
    chosen = RolloutConfig.model_validate(config)
    with world.sessions.begin() as session:
        rollouts.begin(session, world.project_id, digest, chosen, BY_ADA, None)
        session.execute(update(Rollout).values(canary_at=datetime.now(UTC) - timedelta(minutes=30)))
    return current(world)


def current(world: World) -> Rollout:
    """The trial under way, or the last one."""
    with world.sessions() as session:
        found = trials.latest(session, world.project_id)
    assert found is not None
    return found


def deployment(world: World):  # type: ignore[no-untyped-def]  # noqa: ANN201
    with world.sessions() as session:
        return deployments.get(session, world.project_id)


def kinds(world: World) -> list[str]:
    """Events, oldest first."""
    with world.sessions() as session:
        return [event.kind for event in deployments.events(session, world.project_id)][::-1]


def newest(world: World) -> DeploymentEvent:
    with world.sessions() as session:
        return deployments.events(session, world.project_id)[0]


def answer(world: World, rollout: Rollout, arm: str, user: str | None, *, ago: float = 60.0, **values: object) -> UUID:
    """One live answer that finished `ago` seconds ago."""
    finished = datetime.now(UTC) - timedelta(seconds=ago)
    began = finished - timedelta(seconds=0.2)
    output = str(values.pop("output", "fine"))
    row: dict[str, object] = {
        "id": uuid7(began.timestamp()), "project_id": world.project_id, "origin": "live", "arm": arm,
        "adapter_digest": rollout.digest if arm == "canary" else rollout.baseline_digest, "base_digest": "base",
        "generation": rollout.generation, "namespace": "n", "endpoint": "/v1/chat/completions", "stream": False,
        "finish_reason": "stop", "prompt_tokens": 5, "completion_tokens": 20, "cached_tokens": 0, "drafted_tokens": 0,
        "accepted_tokens": 0, "ttft_ms": 20.0, "latency_ms": 200.0, "mean_logprob": -0.2, "min_logprob": -1.0,
        "end_user": user, "group_key": user or "g", "config_hash": "c", "started_at": began, "finished_at": finished,
    }  # fmt: skip
    with world.sessions.begin() as session:
        made = Interaction(**(row | values))
        session.add(made)
        session.add(
            InteractionBody(
                id=made.id, messages=[{"role": "user", "content": "w1"}], parameters={"model": "support"},
                output=output, prompt_token_ids=[3], token_ids=[4], token_logprobs=[-0.2], prompt_hash="p",
                template_hash="t", tokenizer_hash="k", spool_version=2,
            )
        )  # fmt: skip
        return made.id


def say(world: World, interaction_id: UUID, rating: int | None = None, *, ago: float = 30.0, **values: object) -> None:
    """Feedback that came `ago` seconds ago."""
    with world.sessions.begin() as session:
        session.add(
            Feedback(
                project_id=world.project_id, interaction_id=interaction_id, idempotency_key=str(uuid7()),
                rating=rating, created_at=datetime.now(UTC) - timedelta(seconds=ago), **values,
            )
        )  # fmt: skip


def traffic(world: World, rollout: Rollout, users: int, satisfied: tuple[float, float], *, seed: int = 0) -> None:
    """`users` of each arm with three rated answers each, so many of them satisfied (candidate, control)."""
    dice = random.Random(seed)
    with world.sessions.begin() as session:
        for arm, share in zip(("canary", "control"), satisfied, strict=True):
            for user in range(users):
                for place in range(3):
                    _rated(session, world, rollout, arm, f"{arm}-{user}", dice.random() < share, place)


def _rated(session, world, rollout, arm, user, good, place):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    finished = datetime.now(UTC) - timedelta(seconds=60 + place)
    identity = uuid7(finished.timestamp() - 0.2)
    digest = rollout.digest if arm == "canary" else rollout.baseline_digest
    session.add(
        Interaction(
            id=identity, project_id=world.project_id, origin="live", arm=arm, adapter_digest=digest,
            base_digest="base", generation=rollout.generation, namespace="n", endpoint="/v1/chat/completions",
            stream=False, finish_reason="stop", prompt_tokens=5, completion_tokens=20, cached_tokens=0,
            drafted_tokens=0, accepted_tokens=0, ttft_ms=20.0, latency_ms=200.0, mean_logprob=-0.2, min_logprob=-1.0,
            end_user=user, group_key=user, config_hash="c", started_at=finished, finished_at=finished,
        )
    )  # fmt: skip
    session.add(
        Feedback(
            project_id=world.project_id, interaction_id=identity, idempotency_key=str(identity),
            rating=1 if good else -1, created_at=datetime.now(UTC) - timedelta(seconds=30),
        )
    )  # fmt: skip


def look(world: World) -> None:
    """One step of the dispatcher's watch."""
    Trials(lands_within=AT_ONCE, quiet=AT_ONCE).step(world.sessions, datetime.now(UTC))
