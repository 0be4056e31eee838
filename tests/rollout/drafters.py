"""Heads and logged traffic for the tests of their rollout: rows only, no weights."""

import random
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import update

from services.store import deployments, partitions, projects, speculators
from services.store.base import Sessions, uuid7, uuid7_time
from services.store.models import Artifact, Deployment, DeploymentEvent, Interaction, InteractionBody, Project
from services.store.speculation import Arm, Heads, arm_of, read_config
from services.store.speculators import Decision
from tests.rollout.conftest import World

BECAUSE = Decision("test", "because", {"n": 1})


def heads(world: World, digest: str, *, adapter: str | None = None, state: str = "built", base: str = "base") -> str:
    """The row of heads trained on an adapter's states."""
    with world.sessions.begin() as session:
        session.add(
            Artifact(
                digest=digest, kind="speculator", project_id=world.project_id, base_digest=base, state=state,
                manifest={"kind": "speculator", "adapter": adapter},
            )
        )  # fmt: skip
    return digest


def deployed(world: World) -> Deployment:
    with world.sessions() as session:
        return deployments.get(session, world.project_id)


def drafting(world: World) -> Heads:
    return speculators.heads_of(deployed(world))


def history(world: World) -> list[DeploymentEvent]:
    """Oldest first."""
    with world.sessions() as session:
        return deployments.events(session, world.project_id)[::-1]


def serve(world: World, adapter: str | None) -> Deployment:
    """Flip to an adapter, whose row is made when there is none."""
    with world.sessions.begin() as session:
        deployment = deployments.get(session, world.project_id)
        if adapter is not None and session.get(Artifact, adapter) is None:
            session.add(
                Artifact(
                    digest=adapter, kind="adapter", project_id=world.project_id, base_digest="base", manifest={},
                    state="staged",
                )
            )  # fmt: skip
            session.flush()
        return deployments.flip(
            session, world.project_id, expected_generation=deployment.generation, digest=adapter, actor="test",
            reason="t",
        )  # fmt: skip


def go_live(world: World, digest: str) -> None:
    with world.sessions.begin() as session:
        speculators.go_live(session, world.project_id, digest, BECAUSE)


def counts(drafts: int, accepted: int, length: int = 4) -> dict[str, Any]:
    """A drafter's part of `interaction.speculation`: every draft `length` tokens long, `accepted` in all."""
    whole, rest = divmod(accepted, drafts) if drafts else (0, 0)
    # `rest` drafts went one position further than the others.
    tokens = [drafts * (place < whole) + rest * (place == whole) for place in range(length)]
    tried = [drafts, *tokens[:-1]]
    return {"tried": tried, "accepted": tokens, "drafts": drafts, "lengths": [0] * length + [drafts]}


def interaction(
    project_id: UUID, at: datetime, *, request: UUID | None = None, tokens: int = 50, **columns: object
) -> Interaction:
    """A logged answer of the base; 10 ms a token unless told otherwise."""
    values: dict[str, Any] = {
        "id": request or uuid7(at.timestamp()), "project_id": project_id, "api_key_id": None, "origin": "live",
        "adapter_digest": None, "base_digest": "base", "generation": 1, "namespace": project_id.hex,
        "endpoint": "/v1/chat/completions", "stream": False, "finish_reason": "stop", "prompt_tokens": 10,
        "completion_tokens": tokens, "cached_tokens": 0, "drafted_tokens": 0, "accepted_tokens": 0, "ttft_ms": 20.0,
        "latency_ms": 20.0 + 10.0 * (tokens - 1), "group_key": "g", "config_hash": "c", "started_at": at,
        "finished_at": at,
    }  # fmt: skip
    return Interaction(**{**values, **columns})


def land(sessions: Sessions, rows: Iterable[Interaction | InteractionBody]) -> None:
    """Also what happened last month, or will in the test's time to come."""
    made = list(rows)
    with sessions.begin() as session:
        partitions.ensure(session, since=uuid7_time(min(row.id for row in made)))
        session.add_all(made)


def set_back(world: World, kind: str, to: datetime) -> None:
    """Move the events of a kind in time."""
    with world.sessions.begin() as session:
        session.execute(
            update(DeploymentEvent)
            .where(DeploymentEvent.project_id == world.project_id, DeploymentEvent.kind == kind)
            .values(at=to)
        )


def configure(world: World, **speculation: object) -> None:
    with world.sessions.begin() as session:
        projects.configure(session, session.get_one(Project, world.project_id), {"speculation": speculation})


# Tokens a step and decode tokens/s of an arm.
Speeds = dict[Arm, tuple[float, float]]
EVEN: Speeds = {"baseline": (1.0, 60.0), "suffix": (2.0, 100.0), "live": (2.0, 100.0), "canary": (2.0, 100.0)}


class Traffic:
    """Logged answers of a project, shared out between the arms as a gateway does it."""

    def __init__(self, world: World, begin: datetime, *, seed: int = 0) -> None:
        self.world = world
        self.at = begin
        self._choose = random.Random(seed)

    def land(self, count: int, speeds: Speeds, *, every: float = 1.0, accepted: float = 0.6, **columns: object) -> None:
        """`count` answers, one each `every` seconds. `accepted` of the heads' drafted tokens come out."""
        with self.world.sessions() as session:
            config = read_config(session.get_one(Project, self.world.project_id).config)
        deployed = drafting(self.world)
        rows = []
        for _ in range(count):
            self.at += timedelta(seconds=every)
            request = uuid7(self.at.timestamp())
            arm = arm_of(request, config, deployed)
            values = self._values(arm, deployed.of(arm), speeds[arm], accepted)
            rows.append(interaction(self.world.project_id, self.at, request=request, **(values | columns)))
        land(self.world.sessions, rows)

    def _values(self, arm: Arm, digest: str | None, speed: tuple[float, float], accepted: float) -> dict[str, Any]:
        choose, tokens = self._choose, self._choose.randint(30, 70)
        length, rate = max(1.0, choose.gauss(speed[0], 0.3)), speed[1] * choose.lognormvariate(0, 0.2)
        steps = max(1, round(tokens / length))
        told: dict[str, Any] = {"steps": steps, "suffix": counts(steps // 2, (tokens - steps) // 2)}
        if digest is not None:
            told["heads"] = counts(12, sum(choose.random() < accepted for _ in range(12)))
        return {
            "tokens": tokens, "speculated": arm != "baseline", "speculator_digest": digest,
            "speculation": None if arm == "baseline" else told, "latency_ms": 20.0 + 1000 * (tokens - 1) / rate,
        }  # fmt: skip
