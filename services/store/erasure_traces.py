"""Traces of erased rows that no id leads to: in prompts of others, in errors, in what people typed and uploaded."""

import json
from collections.abc import Collection
from datetime import datetime
from typing import Any
from urllib.parse import quote, quote_plus
from uuid import UUID

from sqlalchemy import ColumnElement, Text, cast, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session

from services.store.erasure_rows import noted
from services.store.models import (
    BulkAction,
    Dataset,
    DatasetImport,
    ErasureRequest,
    Example,
    InteractionBody,
    Job,
    Revision,
    RevisionExample,
    RevisionLeftOut,
    Run,
    RunEvent,
    SavedView,
    SplitGroup,
)
from services.store.pages import first_id

UNFINISHED = ("queued", "running")
NO_LONGER = "no longer kept: somebody's data was erased"


def forget_shown(session: Session, made: ErasureRequest) -> int:
    """Prompts of others in which an erased correction stood as a worked example: their tokens spell it."""
    placed = select(Example.id, Example.created_at).where(
        Example.id.in_(noted(made, "example")), Example.source == "corrected", Example.split == "train"
    )
    found = session.execute(placed).all()
    if not found:
        return 0
    # Nothing is placed before it is there: older partitions need no look.
    since = first_id(min(row.created_at for row in found))
    ids = [str(row.id) for row in found]
    emptied = update(InteractionBody).where(
        InteractionBody.id >= since, InteractionBody.worked_examples != [],
        InteractionBody.worked_examples.has_any(cast(ids, ARRAY(Text))),
    )  # fmt: skip
    changed = emptied.values(prompt_token_ids=[], worked_examples=[]).returning(InteractionBody.id)
    return len(session.scalars(changed).all())


def forget_quotes(session: Session, project_ids: Collection[UUID], until: datetime) -> int:
    """Errors and log tails of finished work may quote a row, as database errors do: none of them is kept."""
    over = [Job.project_id.in_(project_ids), Job.created_at <= until, Job.state.not_in(UNFINISHED)]
    quoted = or_(Job.error.is_not(None), Job.log_tail.is_not(None))
    emptied = _rows(session, update(Job).where(*over, quoted).values(error=None, log_tail=None))
    ended = [Run.project_id.in_(project_ids), Run.created_at <= until, Run.state.not_in(UNFINISHED)]
    _rows(session, update(Run).where(*ended, Run.error.is_not(None)).values(error=NO_LONGER))
    said = RunEvent.run_id.in_(select(Run.id).where(*ended))
    for key in ("tail", "error"):
        replaced = RunEvent.payload.op("||")(func.jsonb_build_object(key, NO_LONGER))
        told = RunEvent.payload[key].astext.is_not(None)
        emptied += _rows(session, update(RunEvent).where(said, told).values(payload=replaced))
    lines = RunEvent.payload.op("||")(func.jsonb_build_object("line", NO_LONGER))
    _rows(session, update(RunEvent).where(said, RunEvent.payload.has_key("tail")).values(payload=lines))
    return emptied


def forget_typed(session: Session, made: ErasureRequest, project_ids: Collection[UUID]) -> int:
    """What people typed or uploaded that names the subject or may quote them; how many rows were touched."""
    name = made.subject
    typed = (name, quote_plus(name), quote(name), json.dumps(name)[1:-1])

    def names_it(column: Any) -> ColumnElement[bool]:  # noqa: ANN401 - a column
        return or_(*(cast(column, Text).contains(one, autoescape=True) for one in typed))

    here = SavedView.project_id.in_(project_ids)
    orders = [
        delete(SavedView).where(here, or_(names_it(SavedView.query), names_it(SavedView.name))),
        update(BulkAction)
        .where(
            BulkAction.project_id.in_(project_ids), BulkAction.state.not_in(("queued", "running", "undoing")),
            or_(names_it(BulkAction.selection), names_it(BulkAction.params)),
        )
        .values(selection={}, params={}, error=None),
        delete(DatasetImport).where(
            DatasetImport.state == "preview", DatasetImport.created_at <= made.created_at,
            # Packed files cannot be searched.
            or_(
                *(
                    func.strpos(func.encode(DatasetImport.content, "hex"), one.encode().hex()) > 0
                    for one in {name, json.dumps(name)[1:-1]}
                ),
                DatasetImport.file_name.ilike("%.parquet"),
            ),
            DatasetImport.dataset_id.in_(select(Dataset.id).where(Dataset.project_id.in_(project_ids))),
        ),
        delete(SplitGroup).where(SplitGroup.project_id.in_(project_ids), SplitGroup.group_key == name),
        update(Revision)
        .where(Revision.report.has_key("phrases"), or_(*_quoting(made)))
        .values(report=Revision.report.op("-")("phrases")),
    ]  # fmt: skip
    return sum(_rows(session, order) for order in orders)


def _quoting(made: ErasureRequest) -> list[ColumnElement[bool]]:
    """Revisions whose report may quote erased words: they held such a row, or a screen left one out for its phrase."""
    held = select(RevisionExample.revision_id).where(RevisionExample.example_id.in_(noted(made, "example")))
    left = select(RevisionLeftOut.revision_id).where(RevisionLeftOut.interaction_id.in_(noted(made, "interaction")))
    return [Revision.id.in_(held), Revision.id.in_(left)]


def _rows(session: Session, order: Any) -> int:  # noqa: ANN401 - an update or a delete
    done = session.execute(order, execution_options={"synchronize_session": False})
    return int(done.rowcount)  # type: ignore[attr-defined]
