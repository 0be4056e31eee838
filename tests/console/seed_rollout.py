"""Candidates on trial for pages to show: a canary with its figures, one in the shadow, and promotion frozen by two."""

import hashlib
import itertools
import random
from datetime import UTC, datetime, timedelta

from sqlalchemy.orm import Session

from benchmarks.learning_canary import Sums, World, traffic
from services.store import deployments, engine_reports, rollouts, trials
from services.store.base import uuid7
from services.store.engine_reports import Report
from services.store.lifecycle import born
from services.store.models import Artifact, Project, Rollout, ShadowAnswer
from services.store.rollout_config import RolloutConfig, Shadowing
from services.store.rollout_counts import Arms
from services.store.rollouts import Decision
from tests.console import seed
from worker.rollout.judge import RAILS, Evidence, judge
from worker.rollout.trial import remember

WHY = Decision("rollout", "run 0193 passed the gate", {"golden_prompts": 8, "differing": 0})


def adapter(session: Session, project: Project, name: str) -> str:
    """An artefact that was trained, passed the gate and is staged."""
    digest = hashlib.sha256(f"{project.id}/{name}".encode()).hexdigest()
    made = Artifact(digest=digest, kind="adapter", project_id=project.id, base_digest=seed.BASE, manifest={})
    session.add(made)
    session.flush()
    born(session, made)
    for state in ("verified", "staged"):
        deployments.advance(session, digest, state)
    return digest


def live(session: Session, project: Project, name: str = "live") -> str:
    """An adapter that serves."""
    digest = adapter(session, project, name)
    generation = deployments.create(session, project.id).generation
    deployments.flip(
        session, project.id, expected_generation=generation, digest=digest, actor="rollout", reason=WHY.reason
    )
    return digest


def canary(
    session: Session, project: Project, world: World, requests: int, config: RolloutConfig | None = None
) -> Rollout:
    """A canary that has been looked at while `requests` came, users and outcomes as in the simulation."""
    config = config or RolloutConfig()
    rollout = rollouts.begin(session, project.id, adapter(session, project, "candidate"), config, WHY, None)
    rollout.reference = {"latency": 480.0, "ttft": 60.0}
    dice, began = random.Random(11), datetime.now(UTC) - timedelta(hours=3)
    sums = {name: (Sums(), Sums()) for name in ("signal", *RAILS)}
    counts, seen = [0, 0], (set[int](), set[int]())
    for place, user in enumerate(itertools.islice(traffic(world, dice), requests), start=1):
        counts[user.arm] += 1
        seen[user.arm].add(user.number)
        for name, value in user.outcomes(dice).items():
            sums[name][user.arm].add(user.number, value)
        if place % max(1, requests // 80) == 0 or place == requests:
            found = Evidence(
                {name: Arms(arms[0].moments, arms[1].moments) for name, arms in sums.items()},
                (counts[0], counts[1]), (len(seen[0]), len(seen[1])), world.share,
            )  # fmt: skip
            remember(rollout, judge(found, config), found, began + timedelta(seconds=place))
    rollout.canary_at = began
    session.flush()
    return rollout


def on_trial(session: Session, slug: str = "canary") -> Project:
    """A canary in the middle of it, on two engines, one of which is behind."""
    project = seed.project(session, slug, "Canary under way")
    digest = live(session, project)
    rollout = canary(session, project, World(0.9, 0.89), 2600)
    generation = deployments.get(session, project.id).generation
    engine_reports.put(session, "host-1/3f9a01", 1, [Report(project.id, generation, (digest, rollout.digest))])
    engine_reports.put(session, "host-1/77b2c4", 2, [Report(project.id, generation - 1, (digest,))])
    return project


def in_the_shadow(session: Session, slug: str = "shadow") -> Project:
    """A candidate that answers prompts again."""
    project = seed.project(session, slug, "In the shadow")
    live(session, project)
    config = RolloutConfig(shadow=Shadowing(requests=200))
    rollout = rollouts.begin(session, project.id, adapter(session, project, "candidate"), config, WHY, None)
    dice = random.Random(3)
    for _ in range(120):
        sides = [
            {"error": False, "valid": dice.random() < share, "refuses": dice.random() < 0.02,
             "tokens": dice.randint(20, 60), "logprob": -dice.random(), "latency": 100 + 300 * dice.random()}
            for share in (0.93, 0.96)
        ]  # fmt: skip
        session.add(
            ShadowAnswer(
                rollout_id=rollout.id, interaction_id=uuid7(), shadow_id=uuid7(), differs=dice.random() < 0.3,
                live=sides[0], candidate=sides[1],
            )
        )  # fmt: skip
    session.flush()
    return project


def frozen(session: Session, slug: str = "frozen") -> Project:
    """Two canaries that were taken back: nothing goes on until somebody looks."""
    project = seed.project(session, slug, "Frozen")
    live(session, project)
    for name in ("worse", "wrong"):
        rollouts.begin(session, project.id, adapter(session, project, name), RolloutConfig(), WHY, None)
        rollout = trials.open_of(session, project.id)
        assert rollout is not None
        reason = "worse than what serves: −11.2 points [−20.4, −2.0] on 240 outcomes of 61 users against 2,180"
        rollouts.end(session, project.id, "rolled_back", Decision("rollout", reason, {}), automatic=True)
    return project
