"""A project whose traffic got faster: a baseline, suffix drafts that learn, heads that went live, and a canary."""

import random
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from services.store import partitions, speculators
from services.store.base import uuid7
from services.store.models import Artifact, Interaction, Project
from services.store.speculators import Decision
from tests.console.seed import BASE

PLAIN_RATE = 104.0


def drafter(dice: random.Random, drafts: int, sure: float, longest: int) -> dict[str, Any]:
    """What `drafts` drafts leave in the log when each token comes out with probability `sure`."""
    lengths, tried, accepted = [0] * (longest + 1), [0] * longest, [0] * longest
    for _ in range(drafts):
        length = dice.randint(1, longest)
        lengths[length] += 1
        for position in range(length):
            tried[position] += 1
            if dice.random() > sure:
                break
            accepted[position] += 1
    return {"drafts": drafts, "won": drafts, "tried": tried, "accepted": accepted, "lengths": lengths}


def answer(
    project: Project, at: datetime, dice: random.Random, *, speculation: dict[str, Any] | None, rate: float,
    digest: str | None = None, tokens: int = 0, adapter: str | None = None, **values: object,
) -> Interaction:  # fmt: skip
    """One logged answer that decoded at `rate` tokens a second."""
    tokens = tokens or dice.randint(30, 90)
    first = dice.uniform(9, 22)
    parts = [counts for name, counts in (speculation or {}).items() if name != "steps"]
    row: dict[str, Any] = {
        "id": uuid7(at.timestamp()), "project_id": project.id, "origin": "live", "base_digest": BASE, "generation": 1,
        "namespace": project.id.hex, "endpoint": "/v1/chat/completions", "stream": True, "finish_reason": "stop",
        "prompt_tokens": 84, "completion_tokens": tokens, "cached_tokens": 0, "adapter_digest": adapter,
        "drafted_tokens": sum(length * count for part in parts for length, count in enumerate(part["lengths"])),
        "accepted_tokens": sum(sum(part["accepted"]) for part in parts), "speculation": speculation,
        "speculator_digest": digest, "ttft_ms": first, "latency_ms": first + (tokens - 1) / rate * 1000,
        "group_key": "g", "config_hash": "c", "started_at": at, "finished_at": at,
    }  # fmt: skip
    return Interaction(**(row | values))


def sped_up(session: Session, project: Project, *, hours: float = 6, size: int = 700) -> None:
    """Traffic of the last hours: the suffix drafter gets better, heads go live after two thirds of it."""
    partitions.ensure(session, since=datetime.now(UTC) - timedelta(days=1))
    dice = random.Random(3)
    digest = heads(session, project, "live")
    now = datetime.now(UTC)
    session.add_all(_traffic(project, dice, now, hours, size, digest))
    session.flush()
    decided = Decision("rollout", "accepted 2.31 tokens a step, the suffix drafter alone 1.74", {"requests": 61})
    speculators.stage_canary(session, project.id, digest, 0.25, decided)
    speculators.go_live(session, project.id, digest, decided)
    speculators.stage_canary(session, project.id, heads(session, project, "canary"), 0.25, decided)


def heads(session: Session, project: Project, name: str) -> str:
    """An artefact of heads that the gate has passed, trained on the adapter that serves."""
    digest = uuid.uuid5(project.id, name).hex * 2
    serving = speculators.locked(session, project.id).active_digest
    session.add(
        Artifact(digest=digest, kind="speculator", project_id=project.id, base_digest=BASE,
                 manifest={"adapter": serving}, state="staged")
    )  # fmt: skip
    session.flush()
    return digest


def _traffic(
    project: Project, dice: random.Random, now: datetime, hours: float, size: int, digest: str
) -> Iterator[Interaction]:
    for place in range(size):
        done = place / size
        at = now - timedelta(hours=hours * (1 - done), seconds=-dice.uniform(0, 10))
        if dice.random() < 0.04:
            rate = PLAIN_RATE * dice.gauss(1, 0.06)
            yield answer(project, at, dice, speculation=None, rate=rate, speculated=False)
            continue
        sure = 0.45 + 0.3 * min(1.0, done * 2.5)
        told = {"steps": 24, "suffix": drafter(dice, round(14 * sure), sure, 8)}
        gain, drafted_by = 1 + 1.6 * sure, None
        if done > 0.66:
            told["heads"] = drafter(dice, 7, 0.72, 4)
            gain, drafted_by = gain + 0.6, digest
        rate = PLAIN_RATE * gain * dice.gauss(1, 0.14)
        yield answer(project, at, dice, speculation=told, rate=rate, digest=drafted_by)
