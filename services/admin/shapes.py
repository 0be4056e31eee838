"""What the admin API takes and gives, as JSON."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.store import datasets
from services.store.models import (
    ApiKey,
    Deployment,
    DeploymentEvent,
    Evaluation,
    Job,
    Project,
    Revision,
    Rollout,
    Run,
    RunEvent,
)


class Body(BaseModel):
    """A request body; unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid")


class NewProject(Body):
    slug: str
    name: str = ""
    config: dict[str, Any] = Field(default_factory=dict)


class ProjectChanges(Body):
    config: dict[str, Any]


class NewUser(Body):
    """`project` None gives the role on every project."""

    email: str
    name: str = ""
    role: str = "viewer"
    project: str | None = None


class UserLink(Body):
    email: str


class NewKey(Body):
    """`project` None makes a key for every project. The scope review judges as `acts_as`, an e-mail address."""

    name: str
    scopes: list[str]
    project: str | None = None
    acts_as: str | None = None


class NewRun(Body):
    params: dict[str, Any] = Field(default_factory=dict)
    dataset: str = Field("golden", pattern=datasets.NAME)
    kind: str = "sft"


class RollBack(Body):
    """`generation`, when given, must still be the deployment's."""

    reason: str = Field("", max_length=500)
    generation: int | None = None


class Override(Body):
    """Why somebody knows better than the gate."""

    reason: str = Field(max_length=2000)


class Back(RollBack):
    """`what`: the newest change, the candidate on trial, or what is live."""

    what: Literal["newest", "canary", "live"] = "newest"


class Share(RollBack):
    """The share of users that the canary is to serve."""

    share: float = Field(ge=0.01, le=0.5)


class Start(RollBack):
    """The artefact to deploy."""

    digest: str = Field(max_length=64)


def moment(value: datetime | None) -> str | None:
    return value.isoformat() if value else None


def project(row: Project) -> dict[str, Any]:
    return {"id": str(row.id), "slug": row.slug, "name": row.name, "config": row.config}


def key(row: ApiKey) -> dict[str, Any]:
    return {
        "id": str(row.id), "prefix": row.prefix, "name": row.name, "scopes": row.scopes,
        "project_id": str(row.project_id) if row.project_id else None, "created_at": moment(row.created_at),
        "expires_at": moment(row.expires_at), "revoked_at": moment(row.revoked_at),
        "last_used_at": moment(row.last_used_at), "acts_as": str(row.user_id) if row.user_id else None,
        "rotated_from": str(row.rotated_from) if row.rotated_from else None,
    }  # fmt: skip


def run(row: Run) -> dict[str, Any]:
    return {
        "id": str(row.id), "kind": row.kind, "state": row.state, "phase": row.phase, "params": row.params,
        "revision_id": str(row.revision_id) if row.revision_id else None, "artifact_digest": row.artifact_digest,
        "preflight": row.preflight, "error": row.error, "created_by": row.created_by,
        "created_at": moment(row.created_at), "started_at": moment(row.started_at),
        "finished_at": moment(row.finished_at),
    }  # fmt: skip


def run_event(row: RunEvent) -> dict[str, Any]:
    return {"id": row.id, "at": moment(row.at), "kind": row.kind, "step": row.step, "payload": row.payload}


def evaluation(row: Evaluation | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return {
        "id": str(row.id), "decision": row.decision, "reasons": row.reasons, "summary": row.summary,
        "candidate_digest": row.candidate_digest, "baseline_digest": row.baseline_digest,
        "finished_at": moment(row.finished_at), "overridden_by": row.overridden_by,
        "override_reason": row.override_reason,
    }  # fmt: skip


def deployment(row: Deployment) -> dict[str, Any]:
    return {
        "generation": row.generation, "active_digest": row.active_digest, "last_good_digest": row.last_good_digest,
        "canary_digest": row.canary_digest, "canary_share": row.canary_share, "frozen": row.frozen,
        "updated_at": moment(row.updated_at),
    }  # fmt: skip


def rollout(row: Rollout) -> dict[str, Any]:
    return {
        "id": str(row.id), "digest": row.digest, "stage": row.stage, "share": row.share, "generation": row.generation,
        "config": row.config, "verdict": row.verdict, "created_at": moment(row.created_at),
        "canary_at": moment(row.canary_at), "looked_at": moment(row.looked_at), "ended_at": moment(row.ended_at),
        "ending": row.ending,
    }  # fmt: skip


def deployment_event(row: DeploymentEvent) -> dict[str, Any]:
    return {
        "at": moment(row.at), "kind": row.kind, "generation": row.generation, "from_digest": row.from_digest,
        "to_digest": row.to_digest, "actor": row.actor, "reason": row.reason, "evidence": row.evidence,
    }  # fmt: skip


def revision(row: Revision) -> dict[str, Any]:
    return {
        "digest": row.digest, "parent_digest": row.parent_digest, "train_count": row.train_count,
        "held_out_count": row.held_out_count, "looks": row.looks, "report": row.report,
        "created_at": moment(row.created_at),
    }  # fmt: skip


def job(row: Job) -> dict[str, Any]:
    return {
        "id": str(row.id), "kind": row.kind, "state": row.state, "attempts": row.attempts, "error": row.error,
        "created_at": moment(row.created_at), "finished_at": moment(row.finished_at),
    }  # fmt: skip
