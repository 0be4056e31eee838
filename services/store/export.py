"""The log as files: JSON lines, or CSV that a spreadsheet opens without running anything. Read page by page."""

import csv
import io
import json
import re
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.store.base import Sessions
from services.store.models import Feedback, Interaction, InteractionBody
from services.store.search import Search, newest

Format = Literal["jsonl", "csv"]
PAGE = 200
# A page is read within this, or the export ends with an error: a file that stops short must not look whole.
PAGE_SECONDS = 60.0
COLUMNS = (
    "id", "started_at", "origin", "endpoint", "adapter_digest", "base_digest", "finish_reason", "prompt_tokens",
    "completion_tokens", "latency_ms", "mean_logprob", "drafted_tokens", "session_key", "end_user", "tags", "messages",
    "output", "feedback",
)  # fmt: skip
# What spreadsheets take for a formula, behind any blanks and the marks that some of them strip.
FORMULA = re.compile(r"^[\s\ufeff\u200b-\u200f\u202a-\u202e\u2066-\u2069]*[=+\-@|%\uff1d\uff0b\uff0d\uff20]|^[\t\r\n]")
Row = dict[str, Any]


def pages(
    sessions: Sessions, project_id: UUID, search: Search, format_: Format, *, ids: Sequence[UUID] | None = None,
    before: UUID | None = None,
) -> Generator[bytes]:  # fmt: skip
    """The file in pieces of a page, each read in a transaction of its own: memory stays bounded, vacuum goes on.

    Newest first, or `ids` in their order. `before` leaves out what has landed since.
    """
    write = _csv if format_ == "csv" else _jsonl
    yield _header() if format_ == "csv" else b""
    for rows in _named(sessions, project_id, ids) if ids is not None else _found(sessions, project_id, search, before):
        yield b"".join(write(row) for row in rows)


def _named(sessions: Sessions, project_id: UUID, ids: Sequence[UUID]) -> Iterator[list[Row]]:
    for first in range(0, len(ids), PAGE):
        with sessions() as session:
            yield _rows(session, project_id, ids[first : first + PAGE])


def _found(sessions: Sessions, project_id: UUID, search: Search, before: UUID | None) -> Iterator[list[Row]]:
    start = search.start
    while True:
        with sessions() as session:
            found = newest(
                session, project_id, search, before=before, since=start, limit=PAGE, seconds=PAGE_SECONDS
            )  # fmt: skip
            if found.back_to is not None:
                raise TimeoutError(f"the export came back to {found.back_to:%Y-%m-%d} and no further")
            rows = _rows(session, project_id, found.ids)
        if not found.ids:
            return
        before = found.ids[-1]
        yield rows


def _rows(session: Session, project_id: UUID, ids: Sequence[UUID]) -> list[Row]:
    logged = session.execute(
        select(Interaction, InteractionBody.messages, InteractionBody.output)
        .outerjoin(InteractionBody, InteractionBody.id == Interaction.id)
        .where(Interaction.id.in_(ids), Interaction.project_id == project_id)
    )
    said: dict[UUID, list[Row]] = {}
    for opinion in session.scalars(
        select(Feedback)
        .where(Feedback.interaction_id.in_(ids), Feedback.project_id == project_id)
        .order_by(Feedback.created_at, Feedback.id)
    ):
        named = ("rating", "score", "comment", "correction", "author")
        said.setdefault(opinion.interaction_id, []).append({name: getattr(opinion, name) for name in named})
    made = {
        row.id: {name: getattr(row, name) for name in COLUMNS[:15]}
        | {"messages": messages, "output": output, "feedback": said.get(row.id, [])}
        for row, messages, output in logged
    }
    return [made[one] for one in ids if one in made]


def _jsonl(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"


def _header() -> bytes:
    return _line(COLUMNS)


def _csv(row: Row) -> bytes:
    return _line([_cell(row[name]) for name in COLUMNS])


def _line(cells: Sequence[object]) -> bytes:
    written = io.StringIO()
    csv.writer(written).writerow(cells)
    return written.getvalue().encode("utf-8", "replace")


def _cell(value: object) -> object:
    """Numbers as they are; text that a spreadsheet would run gets an apostrophe, which makes it text."""
    if value is None or isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else _document(value)
    return f"'{text}" if FORMULA.match(text) else text


def _document(value: object) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str) if value else ""
    return str(value)
