"""Projects: the applications that keys, data and deployments belong to."""

import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import Conflict, InvalidRequest, NotFound
from services.store.base import uuid7
from services.store.models import Deployment, Project
from services.store.project_config import checked
from services.store.train_when import TrainWhen, read_config

SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def create(session: Session, slug: str, name: str = "", *, config: dict[str, Any] | None = None) -> Project:
    """A project and its deployment, which serves the base model.

    Raises Conflict when the slug is taken, InvalidRequest for a slug or configuration that cannot be.
    """
    if not SLUG.fullmatch(slug):
        raise InvalidRequest(
            f"{slug!r} cannot be a project's name: use 1 to 63 lower-case letters, digits and inner hyphens",
            param="slug",
        )
    # ON CONFLICT, because of two creations at once the second must meet a sentence and not a unique violation.
    statement = insert(Project).values(id=uuid7(), slug=slug, name=name.strip() or slug, config=checked(config or {}))
    project: Project | None = session.scalar(statement.on_conflict_do_nothing().returning(Project))
    if project is None:
        raise Conflict(f"there is a project {slug!r} already")
    session.add(Deployment(project_id=project.id))
    session.flush()
    return project


def configure(session: Session, project: Project, changes: dict[str, Any]) -> Project:
    """Change the keys given and leave the others; None removes one. `train` is checked by the runs that use it.

    Raises InvalidRequest naming the bad key; then nothing has changed.
    """
    session.refresh(project, with_for_update=True)
    merged = {key: value for key, value in {**project.config, **changes}.items() if value is not None}
    project.config = checked(merged)
    session.flush()
    return project


def set_triggers(session: Session, project: Project, changes: dict[str, Any]) -> TrainWhen:
    """Change when runs begin by themselves; None sets a key back. Raises InvalidRequest naming the bad key."""
    merged = {**(project.config.get("train_when") or {}), **changes}
    stored = {key: value for key, value in merged.items() if value is not None}
    configure(session, project, {"train_when": stored or None})
    return read_config(project.config)


def get(session: Session, slug: str) -> Project:
    """The project of that slug. Raises NotFound naming those that exist."""
    project = session.scalar(select(Project).where(Project.slug == slug))
    if project is None:
        raise NotFound(f"there is no project {slug!r}; {describe_known(slugs(session))}")
    return project


def list_all(session: Session) -> list[Project]:
    """Every project, by slug."""
    return list(session.scalars(select(Project).order_by(Project.slug)))


def slugs(session: Session) -> list[str]:
    """Every project's slug, sorted."""
    return list(session.scalars(select(Project.slug).order_by(Project.slug)))


def describe_known(known: Sequence[str]) -> str:
    """The end of a not-found sentence."""
    return f"known: {', '.join(known)}" if known else "there are none yet"
