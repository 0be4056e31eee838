"""What a candidate said in the shadow beside what was served: pairs, their figures, and the texts for the sampler."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.store.models import Interaction, InteractionBody, Rollout, ShadowAnswer

# Candidates whose answers are still worth a comparison: those that were refused teach nobody.
WORTHY = ("shadow", "canary", "promoted")
MOST_TEXTS = 10_000


class Pair(NamedTuple):
    """An answer that was served, and the candidate's to the same prompt, in figures; `unit` is whose prompt it was."""

    interaction_id: UUID
    differs: bool
    live: dict[str, Any]
    candidate: dict[str, Any]
    unit: str


class Text(NamedTuple):
    """What the candidate `digest` said."""

    output: str
    digest: str | None
    differs: bool


def pairs(session: Session, rollout_id: UUID) -> list[Pair]:
    """What has been compared so far."""
    rows = session.execute(
        select(ShadowAnswer, func.coalesce(Interaction.end_user, Interaction.session_key, Interaction.group_key))
        .join(Interaction, Interaction.id == ShadowAnswer.interaction_id, isouter=True)
        .where(ShadowAnswer.rollout_id == rollout_id)
    )
    return [
        Pair(one.interaction_id, one.differs, one.live, one.candidate, unit or str(one.interaction_id))
        for one, unit in rows
    ]


def texts(session: Session, project_id: UUID) -> dict[UUID, Text]:
    """The newest shadow answers of a project by the interaction that they repeat."""
    rows = session.execute(
        select(ShadowAnswer.interaction_id, InteractionBody.output, Interaction.adapter_digest, ShadowAnswer.differs)
        .join(Rollout, Rollout.id == ShadowAnswer.rollout_id)
        .join(Interaction, Interaction.id == ShadowAnswer.shadow_id)
        .join(InteractionBody, InteractionBody.id == ShadowAnswer.shadow_id)
        .where(Rollout.project_id == project_id, Rollout.stage.in_(WORTHY))
        .where(Interaction.finish_reason.in_(("stop", "length")))
        .order_by(ShadowAnswer.shadow_id.desc())
        .limit(MOST_TEXTS)
    )
    found: dict[UUID, Text] = {}
    for interaction_id, output, digest, differs in rows:
        found.setdefault(interaction_id, Text(output, digest, differs))
    return found


def figures(compared: Sequence[Pair]) -> dict[str, Any]:
    """Both sides in means, for events and the page."""
    found: dict[str, Any] = {"compared": len(compared)}
    if not compared:
        return found
    found["differ"] = fmean(pair.differs for pair in compared)
    for side in ("live", "candidate"):
        told = [getattr(pair, side) for pair in compared]
        found[f"{side}_failing"] = 1 - fmean(stands(one) for one in told)
        for name in ("refuses", "tokens", "logprob", "latency"):
            known = [one[name] for one in told if one.get(name) is not None]
            if known:
                found[f"{side}_{name}"] = fmean(known)
    return found


def stands(told: dict[str, Any]) -> bool:
    """No error, and no check that it fails."""
    return not told["error"] and told["valid"] is not False
