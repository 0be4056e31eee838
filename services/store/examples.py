"""Examples: training and golden rows, content-hashed, each stored once a project however many revisions hold it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from services.store import pii
from services.store.base import uuid7, uuid7_time
from services.store.copying import land_rows
from services.store.models import Example

# Before the hash of an example whose text was erased; behind it stands the row's id. Manifests go on naming the hash.
ERASED = "erased:"
EXAMPLE_COLUMNS = (
    "id", "project_id", "content_hash", "kind", "source", "split", "group_key", "slice", "messages", "completion",
    "rejected", "interaction_id", "annotation_ids", "reviewers", "pii", "asked",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Draft:
    """An example before it has a row. `content_hash` covers everything that training or the gate could see."""

    kind: str
    source: str
    split: str
    slice: str
    group_key: str
    messages: list[dict[str, Any]]
    completion: str | None
    rejected: str | None
    interaction_id: UUID | None
    annotation_ids: tuple[str, ...]
    reviewers: tuple[str, ...]
    weight: float = 1.0
    pii: tuple[str, ...] = ()
    asked: dict[str, Any] | None = None

    @cached_property
    def content_hash(self) -> str:
        seen = {
            "kind": self.kind, "source": self.source, "split": self.split, "slice": self.slice,
            "group_key": self.group_key, "messages": self.messages, "completion": self.completion,
            "rejected": self.rejected, "reviewers": sorted(self.reviewers),
        }  # fmt: skip
        return digest_of(seen if self.asked is None else {**seen, "asked": self.asked})


class Entry(NamedTuple):
    """An example's line in a manifest, and the row it stands for."""

    example_id: UUID
    content_hash: str
    split: str
    source: str
    slice: str
    reviewers: tuple[str, ...]
    weight: float

    def manifest(self) -> dict[str, Any]:
        return {
            "content_hash": self.content_hash, "split": self.split, "source": self.source, "slice": self.slice,
            "reviewers": list(self.reviewers), "weight": self.weight,
        }  # fmt: skip


def beside(parameters: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What an example keeps of its request beside the messages: its tools and, where one had to be called, the grammar
    of the call. The log's retention takes the rest; without these the prompt would not be the one that was served."""
    given = parameters or {}
    tools, choice = given.get("tools"), given.get("tool_choice")
    if not tools:
        return None
    forced = choice == "required" or isinstance(choice, dict)
    return {"tools": tools, "forced": True, "grammar": given.get("grammar")} if forced else {"tools": tools}


def served_at(interaction_id: UUID | None) -> datetime | None:
    """When the request came: templates that print the day render what they did then. None for imports."""
    return uuid7_time(interaction_id) if interaction_id else None


def is_erased(content_hash: str) -> bool:
    """Whether only the hash of an example's text is left."""
    return content_hash.startswith(ERASED)


def plain_hash(content_hash: str) -> str:
    """The hash that manifests and exports name the example by, whether it was erased or not."""
    return content_hash.removeprefix(ERASED).partition(":")[0]


def canonical(value: object) -> bytes:
    """One spelling per value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(value: object) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def treated(draft: Draft, mode: pii.Mode, finder: pii.Finder = pii.find) -> Draft:
    """Personal data marked or masked before anything is hashed or written. Tools are the app's own, and stay."""
    if mode == "off":
        return draft
    messages = pii.treat_document(draft.messages, mode, finder)
    completion, rejected = (pii.treat(text or "", mode, finder) for text in (draft.completion, draft.rejected))
    kinds = tuple(sorted({*draft.pii, *messages.kinds, *completion.kinds, *rejected.kinds}))
    if not kinds:
        return draft
    return replace(
        draft,
        messages=messages.value,
        completion=None if draft.completion is None else completion.value,
        rejected=None if draft.rejected is None else rejected.value,
        pii=kinds,
    )


def add_examples(session: Session, project_id: UUID, drafts: Sequence[Draft]) -> list[Entry]:
    """Rows for the drafts, in their order; a draft whose content is already there gets the existing row."""
    by_hash = {draft.content_hash: draft for draft in drafts}
    rows = (_row(project_id, content_hash, draft) for content_hash, draft in by_hash.items())
    landed = land_rows(session, Example.metadata.tables["example"], EXAMPLE_COLUMNS, rows)
    listed = ", ".join(EXAMPLE_COLUMNS)
    session.execute(text(f"INSERT INTO example ({listed}) SELECT {listed} FROM {landed} ON CONFLICT DO NOTHING"))
    ids = session.execute(
        text(f"SELECT content_hash, e.id FROM example e JOIN {landed} USING (project_id, content_hash)")
    )
    stored: dict[str, UUID] = {row.content_hash: row.id for row in ids}
    return [
        Entry(
            stored[content_hash], content_hash, draft.split, draft.source, draft.slice,
            tuple(sorted(draft.reviewers)), draft.weight,
        )
        for content_hash, draft in by_hash.items()
    ]  # fmt: skip


def _row(project_id: UUID, content_hash: str, draft: Draft) -> tuple[object, ...]:
    return (
        uuid7(), project_id, content_hash, draft.kind, draft.source, draft.split, draft.group_key, draft.slice,
        draft.messages, draft.completion, draft.rejected, draft.interaction_id, list(draft.annotation_ids),
        list(draft.reviewers), list(draft.pii), draft.asked,
    )  # fmt: skip


def draft_of(example: Example) -> Draft:
    """The draft that an example's row was made from."""
    return Draft(
        kind=example.kind,
        source=example.source,
        split=example.split,
        slice=example.slice,
        group_key=example.group_key,
        messages=example.messages,
        completion=example.completion,
        rejected=example.rejected,
        interaction_id=example.interaction_id,
        annotation_ids=tuple(example.annotation_ids),
        reviewers=tuple(example.reviewers),
        pii=tuple(example.pii),
        asked=example.asked,
    )
