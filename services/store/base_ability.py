"""The base-ability set: general prompts with good answers of the base, to see what an adapter has forgotten.

It is the project's dataset of that name, filled by imports and by nothing else. Where a model ships a set of its own
and the project has none, that one is imported, once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.store import datasets, imports
from services.store.evaluation_config import BASE_ABILITY
from services.store.forms import is_supervised
from services.store.models import Dataset, DatasetImport, DatasetImportExample, Example

NAME = BASE_ABILITY
SHIPPED = "base_ability.jsonl"
IMPORTER = "whet"


def examples(session: Session, project_id: UUID, shipped: Path, own: Sequence[Example]) -> list[Example]:
    """The project's set, without what is asked under a system prompt of its `own` examples: that is its own task, and
    there the project decides what is right. Empty where there is no set. `shipped` is the model's own, if it is there.
    """
    dataset = session.scalar(select(Dataset).where(Dataset.project_id == project_id, Dataset.name == NAME))
    if dataset is None and shipped.is_file():
        dataset = datasets.get_or_create(session, project_id, NAME)
    if dataset is None:
        return []
    if shipped.is_file() and not _ever_imported(session, dataset.id):
        record = imports.begin(session, dataset, SHIPPED, shipped.read_bytes(), IMPORTER)
        imports.finish(session, record, None, IMPORTER)
    tasks = {system for example in own if (system := _system(example.messages))}
    return [one for one in _imported(session, dataset.id) if is_supervised(one) and _system(one.messages) not in tasks]


def _ever_imported(session: Session, dataset_id: UUID) -> bool:
    done = select(func.count()).where(DatasetImport.dataset_id == dataset_id, DatasetImport.state == "done")
    return bool(session.scalar(done))


def _imported(session: Session, dataset_id: UUID) -> list[Example]:
    ids = (
        select(DatasetImportExample.example_id)
        .join(DatasetImport, DatasetImport.id == DatasetImportExample.import_id)
        .where(DatasetImport.dataset_id == dataset_id, DatasetImport.state == "done")
    )
    return list(session.scalars(select(Example).where(Example.id.in_(ids)).order_by(Example.id)))


def _system(messages: Sequence[dict[str, Any]]) -> str | None:
    """What a chat is told before anything is asked."""
    first = messages[0] if messages else {}
    content = first.get("content")
    return content if first.get("role") == "system" and isinstance(content, str) else None
