"""What an evaluation compares on what, and how: read once, before anything is asked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.errors import NotFound
from services.store import base_ability, deployments, revisions
from services.store.evaluation_config import (
    BASE_ABILITY,
    MEASURED_BY,
    CheckConfig,
    JudgeConfig,
    least_groups,
    read_checks,
    read_judge,
    read_margins,
    undecided,
)
from services.store.examples import is_erased
from services.store.forms import is_supervised
from services.store.held_out import Waits, read_waits
from services.store.models import Artifact, Example, Project, Run
from worker.gate.decide import Policy
from worker.gate.metrics import Metric, choose

DEFAULT_METRICS = ("exact_match",)
LEAST_DIGEST = 8
RECORD_PROMPTS = 8


@dataclass(frozen=True)
class Judging:
    """Who judges: the adapter (None: the base) and the project's words."""

    adapter: str | None
    config: JudgeConfig


@dataclass(frozen=True)
class Order:
    """Candidate and baseline, the rows they are compared on, what scores them and what the gate asks for.

    `own_task` and `trained` count the general prompts that are left out, see `base_ability.General`. `record` has a few
    prompts of training where nothing is held out: a person may let the candidate through all the same, and a deployment
    goes by what it said when it was judged. `waits` is what no example was made of yet.
    """

    run_id: UUID
    project_id: UUID
    revision_id: UUID
    candidate: str
    baseline: str | None
    held_out: Sequence[Example]
    general: Sequence[Example]
    metrics: dict[str, Metric]
    policy: Policy
    own_task: int = 0
    trained: int = 0
    schema: str | None = None
    checks: Sequence[CheckConfig] = field(default_factory=list)
    judging: Judging | None = None
    record: Sequence[Example] = ()
    waits: Waits = field(default_factory=Waits)

    @property
    def deciding(self) -> str:
        return next(iter(self.metrics))

    @property
    def examples(self) -> Sequence[Example]:
        """All rows, the project's own first."""
        return [*self.held_out, *self.general]

    def slice_of(self, example: Example) -> str:
        """General prompts are a slice of their own, whatever they were imported as."""
        return BASE_ABILITY if example.id in self.general_ids else example.slice

    @cached_property
    def general_ids(self) -> frozenset[UUID]:
        return frozenset(one.id for one in self.general)


def read(session: Session, run: Run, model: Path) -> Order:
    """Raises ValueError for a configuration that cannot be used."""
    assert run.artifact_digest is not None, "checked before"
    assert run.revision_id is not None, "checked before"
    config = session.get_one(Project, run.project_id).config
    held_out = _held_out(session, run.revision_id)
    general = base_ability.examples(session, run, model / base_ability.SHIPPED, held_out)
    schema = config.get("response_schema")
    return Order(
        run_id=run.id,
        project_id=run.project_id,
        revision_id=run.revision_id,
        candidate=run.artifact_digest,
        baseline=deployments.get(session, run.project_id).active_digest,
        held_out=held_out,
        general=general.rows,
        own_task=general.own_task,
        trained=general.trained,
        metrics=_metrics(config),
        policy=make_policy(config),
        schema=json.dumps(schema, sort_keys=True) if schema else None,
        checks=read_checks(config),
        judging=_judging(session, config),
        record=() if held_out else _record(session, run.revision_id),
        waits=read_waits(session, run.project_id),
    )


def make_policy(config: dict[str, Any]) -> Policy:
    """The project's gate. Raises ValueError."""
    margin = float(config.get("margin_points", 3)) / 100
    groups = least_groups(config)
    if not 0 <= margin <= 1 or groups < 2:
        raise ValueError("margin_points must be between 0 and 100, min_held_out at least 2")
    return Policy(margin=margin, margins=read_margins(config), min_groups=groups)


def _metrics(config: dict[str, Any]) -> dict[str, Metric]:
    """What the project chose, the deciding one first; what it has configured besides is measured too, and told."""
    names = [str(name) for name in config.get("metrics") or DEFAULT_METRICS]
    names += [name for name, key in MEASURED_BY.items() if config.get(key) and name not in names]
    if problem := undecided(names[0], config):  # an older release stored that
        raise ValueError(problem)
    return choose(names)


def _held_out(session: Session, revision_id: UUID) -> list[Example]:
    """Rows with a golden answer; there is nothing to score the others by."""
    members = revisions.members(session, revision_id, "held_out")
    return [member.example for member in members if is_supervised(member.example)]


def _record(session: Session, revision_id: UUID) -> list[Example]:
    """Prompts that the candidate was trained on, as there are no others."""
    members = revisions.members(session, revision_id, "train", limit=RECORD_PROMPTS)
    return [member.example for member in members if not is_erased(member.example.content_hash)]


def _judging(session: Session, config: dict[str, Any]) -> Judging | None:
    judge = read_judge(config)
    return None if judge is None else Judging(_served(session, judge.model), judge)


def _served(session: Session, name: str) -> str | None:
    """The adapter behind a name: `base`, a project's slug, or a digest or its beginning. Raises ValueError."""
    if name == "base":
        return None
    project = session.scalar(select(Project).where(Project.slug == name))
    if project is not None:
        return _active(session, project)
    found: list[str] = []
    if len(name) >= LEAST_DIGEST:
        own = select(Artifact.digest).where(
            Artifact.kind == "adapter", Artifact.digest.startswith(name, autoescape=True)
        )
        found = list(session.scalars(own.limit(2)))
    if len(found) != 1:
        raise ValueError(f"the judge {name!r} is neither `base`, nor a project, nor one adapter's digest")
    return found[0]


def _active(session: Session, project: Project) -> str | None:
    try:
        return deployments.get(session, project.id).active_digest
    except NotFound:
        return None
