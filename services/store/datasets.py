"""Datasets: named sets of examples of a project. What they hold at a time are their revisions."""

import re
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import InvalidRequest, NotFound
from services.store.base import uuid7
from services.store.models import Dataset

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"


def get_or_create(session: Session, project_id: UUID, name: str) -> Dataset:
    """The project's dataset of that name; safe when two ask at once. Raises InvalidRequest for what is no name."""
    if re.fullmatch(NAME, name) is None:
        said = "a data set's name is up to 100 letters, digits, dots, dashes and underscores, a letter or digit first"
        raise InvalidRequest(said, param="dataset")
    created = insert(Dataset).values(id=uuid7(), project_id=project_id, name=name).on_conflict_do_nothing()
    session.execute(created)
    return get(session, project_id, name)


def get(session: Session, project_id: UUID, name: str) -> Dataset:
    """Raises NotFound."""
    found = session.scalar(select(Dataset).where(Dataset.project_id == project_id, Dataset.name == name))
    if found is None:
        raise NotFound(f"no dataset {name!r} in this project")
    return found


def list_(session: Session, project_id: UUID) -> list[Dataset]:
    """By name."""
    return list(session.scalars(select(Dataset).where(Dataset.project_id == project_id).order_by(Dataset.name)))
