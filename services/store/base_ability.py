"""The base-ability set: general prompts with good answers of the base, to see what an adapter has forgotten.

It is the project's dataset of that name, filled by imports and by nothing else. Where a model ships a set of its own
and the project has none, that one is imported, once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session, aliased

from services.store import datasets, imports
from services.store.evaluation_config import BASE_ABILITY
from services.store.forms import is_supervised
from services.store.models import (
    Dataset,
    DatasetImport,
    DatasetImportExample,
    Example,
    RevisionExample,
    Run,
    RunExample,
)

NAME = BASE_ABILITY
SHIPPED = "base_ability.jsonl"
IMPORTER = "whet"


class General(NamedTuple):
    """The set's `rows` to ask, and how many others with an answer are left out: of the project's `own_task`, which is
    decided by the project, and those whose prompts the run `trained` on, which would measure memory."""

    rows: list[Example]
    own_task: int = 0
    trained: int = 0


def examples(session: Session, run: Run, shipped: Path, own: Sequence[Example]) -> General:
    """The set of the run's project, without what is asked under a system prompt of its `own` examples and without what
    the run trained on or replayed. `shipped` is the model's own, if it is there."""
    dataset = session.scalar(select(Dataset).where(Dataset.project_id == run.project_id, Dataset.name == NAME))
    if dataset is None and shipped.is_file():
        dataset = datasets.get_or_create(session, run.project_id, NAME)
    if dataset is None:
        return General([])
    if shipped.is_file() and not _ever_imported(session, dataset.id):
        record = imports.begin(session, dataset, SHIPPED, shipped.read_bytes(), IMPORTER)
        imports.finish(session, record, None, IMPORTER)
    tasks = {system for example in own if (system := _system(example.messages))}
    found = [one for one in _imported(session, dataset.id) if is_supervised(one)]
    others = [one for one in found if _system(one.messages) not in tasks]
    learned = _learned(session, run, others)
    rows = [one for one in others if one.id not in learned]
    return General(rows, own_task=len(found) - len(others), trained=len(others) - len(rows))


def _learned(session: Session, run: Run, among: Sequence[Example]) -> set[UUID]:
    """Those whose prompt the run was taught an answer to. Not by content hash: that names author and group as well."""
    in_revision = select(RevisionExample.example_id).where(
        RevisionExample.revision_id == run.revision_id, RevisionExample.split == "train"
    )
    replayed = select(RunExample.example_id).where(RunExample.run_id == run.id)
    taught = aliased(Example)
    prompts = select(taught.messages).where(or_(taught.id.in_(in_revision), taught.id.in_(replayed)))
    mine = select(Example.id).where(Example.id.in_([one.id for one in among]), Example.messages.in_(prompts))
    return set(session.scalars(mine))


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
