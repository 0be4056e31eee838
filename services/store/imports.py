"""Imported examples: a preview that stores nothing but the file, then every row in one transaction, or none.

Imports go to training only: the held-out part takes two people's judgement. Whatever of them nearly repeats a held-out
prompt is left out by the build.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from services.errors import Conflict, NotFound, Unprocessable
from services.store import audit, examples, pii
from services.store.copying import among, copy_rows
from services.store.examples import Draft
from services.store.import_files import RowError, plain, read
from services.store.models import Dataset, DatasetImport, DatasetImportExample, Example, Project
from services.store.reviews_judgement import TEXT_LIMIT

FIELDS = {
    "prompt": "what was asked: text, or a list of messages",
    "system": "a system message before it",
    "messages": "the whole chat, its last message the answer",
    "completion": "a right answer, or one that label judges",
    "chosen": "the better of two answers",
    "rejected": "the worse of two answers",
    "label": "whether the completion is good: true or false",
    "tools": "the functions that the prompt offered, as a list or its JSON",
    "group": "what must stay on one side of the split: a session, user or template",
}
# Other names under which files bring these fields.
ALIASES = {
    "prompt": ("prompt", "question", "instruction", "input", "query"),
    "system": ("system", "system_prompt"),
    "messages": ("messages", "conversation", "conversations"),
    "completion": ("completion", "answer", "response", "output"),
    "chosen": ("chosen", "preferred"),
    "rejected": ("rejected",),
    "label": ("label",),
    "tools": ("tools",),
    "group": ("group", "group_key", "session", "user"),
}
MESSAGES_MOST = 200
ERRORS_LISTED = 100
SAMPLES = 10
PREVIEW_LIVES = timedelta(days=1)
ROLES = ("system", "developer", "user", "assistant", "tool")
TRUTH = {"true": True, "1": True, "good": True, "false": False, "0": False, "bad": False}


class _BadRow(ValueError):
    """One sentence about a row, without its number."""


@dataclass
class Parsed:
    """A file under a mapping. Nothing may be imported while there are errors; `errors` lists the first of them."""

    format: str
    columns: list[str]
    mapping: dict[str, str]
    rows: int = 0
    drafts: list[Draft] = field(default_factory=list)
    errors: list[RowError] = field(default_factory=list)
    error_count: int = 0
    repeats: list[int] = field(default_factory=list)

    def fail(self, error: RowError) -> None:
        self.error_count += 1
        if len(self.errors) < ERRORS_LISTED:
            self.errors.append(error)

    @property
    def refusal(self) -> str | None:
        """Why nothing may be imported, in one sentence."""
        if self.error_count:
            first = self.errors[0]
            others = self.error_count - 1
            more = f", and {others:,} more {'row is' if others == 1 else 'rows are'} wrong" if others else ""
            return f"row {first.row} {first.message}{more}; nothing was imported"
        return None if self.drafts else "the file has no rows; nothing was imported"


def suggest(columns: list[str]) -> dict[str, str]:
    """Which column is probably which field, by its name."""
    by_name = {column.lower(): column for column in columns}
    found = {name: next((by_name[a] for a in aliases if a in by_name), None) for name, aliases in ALIASES.items()}
    return {name: column for name, column in found.items() if column is not None}


def parse(file_name: str, content: bytes, mapping: Mapping[str, str] | None, author: str) -> Parsed:
    """Every row as a draft or as an error. Raises InvalidRequest, TooLarge, Unprocessable for the whole file."""
    table = read(file_name, content)
    chosen = {name: column for name, column in (mapping or suggest(table.columns)).items() if column}
    _check_mapping(chosen, table.columns)
    parsed = Parsed(table.format, table.columns, chosen, rows=len(table.rows))
    seen: set[str] = set()
    for number, row in enumerate(table.rows, 1):
        if isinstance(row, RowError):
            parsed.fail(row)
            continue
        try:
            draft = _draft({name: plain(row.get(column)) for name, column in chosen.items()}, author)
        except _BadRow as error:
            parsed.fail(RowError(number, str(error)))
            continue
        if draft.content_hash in seen:
            parsed.repeats.append(number)
        else:
            seen.add(draft.content_hash)
            parsed.drafts.append(draft)
    return parsed


def _check_mapping(mapping: Mapping[str, str], columns: list[str]) -> None:
    for name, column in mapping.items():
        if name not in FIELDS:
            raise Unprocessable(f"there is no field {name!r} to map to: {', '.join(FIELDS)}", param="mapping")
        if column not in columns:
            raise Unprocessable(f"the file has no column {column!r}: {', '.join(columns)[:300]}", param="mapping")
    asked = "messages" in mapping or "prompt" in mapping
    answered = "messages" in mapping or "completion" in mapping or {"chosen", "rejected"} <= mapping.keys()
    if not asked or not answered:
        raise Unprocessable(
            "say which column holds the prompt and which the answer: prompt and completion, prompt, chosen and "
            f"rejected, or messages (columns: {', '.join(columns)[:300]})",
            param="mapping",
        )


def _draft(cells: Mapping[str, Any], author: str) -> Draft:
    messages, completion = _asked(cells)
    if cells.get("completion") is not None:
        completion = _answer(cells["completion"], "completion")
    kind, rejected = "completion", None
    if cells.get("chosen") is not None or cells.get("rejected") is not None:
        kind = "preference"
        completion, rejected = (_answer(cells.get(name), name) for name in ("chosen", "rejected"))
        if completion == rejected:
            raise _BadRow("has the same answer as chosen and as rejected")
    elif "label" in cells:
        kind = "unpaired"
        if not _truth(cells["label"]):
            completion, rejected = None, completion
    if completion is None and rejected is None:
        raise _BadRow("has no answer")
    group = cells.get("group")
    return Draft(
        kind=kind,
        source="imported",
        split="train",
        slice="target",
        group_key=_checked(str(group), "group") if group else f"prompt:{examples.digest_of(messages)[:32]}",
        messages=messages,
        completion=completion,
        rejected=rejected,
        interaction_id=None,
        annotation_ids=(),
        reviewers=(author,),
        asked={"tools": tools} if (tools := _offered(cells.get("tools"))) else None,
    )


def _asked(cells: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The chat up to the answer, and the answer when the chat brings it."""
    if cells.get("messages") is not None:
        chat = _chat(cells["messages"], "messages")
        if chat[-1]["role"] != "assistant":
            raise _BadRow("has messages whose last one is not the assistant's")
        messages, completion = chat[:-1], _answer(chat[-1].get("content"), "messages")
    else:
        prompt, completion = cells.get("prompt"), None
        said = _maybe_json(prompt)
        messages = _chat(said, "prompt") if isinstance(said, list) else [_user(prompt)]
    if cells.get("system"):
        messages = [{"role": "system", "content": _answer(cells["system"], "system")}, *messages]
    if not messages:
        raise _BadRow("asks nothing")
    return messages, completion


def _offered(value: object) -> list[Any]:
    """A list, or JSON of one as exports have it; null and nothing are none."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise _BadRow("has tools that are no list of functions") from None
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _BadRow("has tools that are no list of functions")
    return _plain_json(value, "tools")


def _user(prompt: object) -> dict[str, Any]:
    return {"role": "user", "content": _answer(prompt, "prompt")}


def _maybe_json(value: object) -> object:
    """A CSV cell can hold a list of messages only as JSON."""
    if isinstance(value, str) and value.lstrip().startswith('[{"'):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _chat(value: object, name: str) -> list[dict[str, Any]]:
    value = _maybe_json(value)
    if not isinstance(value, list) or not 1 <= len(value) <= MESSAGES_MOST:
        raise _BadRow(f"has a {name} that is no list of 1 to {MESSAGES_MOST} messages")
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise _BadRow(f"has a message in {name} without a role ({', '.join(ROLES)})")
        if not isinstance(message.get("content", ""), str | list):
            raise _BadRow(f"has a message in {name} whose content is neither text nor parts")
    return _plain_json(value, name)


def _plain_json(value: list[Any], name: str) -> list[Any]:
    try:
        _checked(json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\\u0000", "\x00"), name)
    except (TypeError, ValueError, RecursionError) as error:
        raise error if isinstance(error, _BadRow) else _BadRow(f"has a {name} that is no plain JSON") from error
    return value


def _answer(value: object, name: str) -> str:
    """Text, or the content of one assistant's message."""
    value = _maybe_json(value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise _BadRow(f"has no {name}" if value is None else f"has a {name} that is no text")
    if not value.strip():
        raise _BadRow(f"has an empty {name}")
    return _checked(value, name)


def _checked(text: str, name: str) -> str:
    if len(text) > TEXT_LIMIT:
        raise _BadRow(f"has a {name} of {len(text):,} characters; they end at {TEXT_LIMIT:,}")
    if "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise _BadRow(f"has a {name} with a character that cannot be stored (NUL or half of a surrogate pair)")
    return text


def _truth(value: object) -> bool:
    found = value if isinstance(value, bool) else TRUTH.get(str(value).strip().lower())
    if found is None:
        raise _BadRow(f"has the label {str(value)[:40]!r}; say true or false")
    return found


# --- the two steps ----------------------------------------------------------------------------------------


def begin(session: Session, dataset: Dataset, file_name: str, content: bytes, created_by: str) -> DatasetImport:
    """Keep the file for a preview, for a day at most. Raises as `read` does."""
    read(file_name, content)
    old = DatasetImport.created_at < func.now() - PREVIEW_LIVES
    session.execute(delete(DatasetImport).where(DatasetImport.state == "preview", old))
    made = DatasetImport(
        dataset_id=dataset.id, file_name=file_name[-200:], file_digest=hashlib.sha256(content).hexdigest(),
        content=content, state="preview", mapping={}, created_by=created_by,
    )  # fmt: skip
    session.add(made)
    session.flush()
    return made


def get(session: Session, dataset: Dataset, import_id: UUID) -> DatasetImport:
    """Raises NotFound."""
    found = session.get(DatasetImport, import_id)
    if found is None or found.dataset_id != dataset.id:
        raise NotFound("there is no such import; previews are kept for a day")
    return found


def columns_of(record: DatasetImport) -> list[str]:
    """The file's columns."""
    return read(record.file_name, record.content or b"").columns


def finish(session: Session, record: DatasetImport, mapping: Mapping[str, str] | None, author: str) -> DatasetImport:
    """Import every row, or raise Unprocessable naming the first bad one and import nothing."""
    session.refresh(record, with_for_update=True)
    if record.state != "preview" or record.content is None:
        raise Conflict("this file has been imported already")
    parsed = parse(record.file_name, record.content, mapping, author)
    if parsed.refusal:
        raise Unprocessable(parsed.refusal)
    dataset = session.get_one(Dataset, record.dataset_id)
    mode = pii.mode_of(session.get_one(Project, dataset.project_id).config)
    written = [examples.treated(draft, mode) for draft in parsed.drafts]
    known = _known(session, dataset.project_id, written)
    placed = examples.add_examples(session, dataset.project_id, written)
    table = DatasetImportExample.metadata.tables["dataset_import_example"]
    rows = ((record.id, entry.example_id) for entry in placed)
    copy_rows(session, table, ("import_id", "example_id"), rows)
    record.state, record.content, record.mapping = "done", None, parsed.mapping
    record.rows, record.duplicates = len(placed), known + len(parsed.repeats)
    session.flush()
    return record


def _known(session: Session, project_id: UUID, found: list[Draft]) -> int:
    hashes = [draft.content_hash for draft in found]
    there = select(func.count()).where(Example.project_id == project_id, among(Example.content_hash, hashes))
    return session.scalar(there) or 0


def record(session: Session, done: DatasetImport, dataset: Dataset, actor: str) -> None:
    """What the audit log says of a finished import."""
    detail = {"dataset": dataset.name, "file": done.file_name, "sha256": done.file_digest, "rows": done.rows}
    audit.record(session, actor, "dataset.import", f"project:{dataset.project_id}", detail)


def discard(session: Session, record: DatasetImport) -> None:
    """Forget a preview and its file."""
    if record.state != "preview":
        raise Conflict("this file has been imported already")
    session.delete(record)
    session.flush()


def list_(session: Session, dataset_id: UUID, *, limit: int = 20) -> list[DatasetImport]:
    """Finished imports, newest first."""
    done = select(DatasetImport).where(DatasetImport.dataset_id == dataset_id, DatasetImport.state == "done")
    return list(session.scalars(done.order_by(DatasetImport.id.desc()).limit(limit)))


def drafts(session: Session, dataset_id: UUID) -> list[Draft]:
    """What a dataset's imports brought, each example once."""
    wanted = (
        select(Example)
        .join(DatasetImportExample, DatasetImportExample.example_id == Example.id)
        .join(DatasetImport, DatasetImport.id == DatasetImportExample.import_id)
        .where(DatasetImport.dataset_id == dataset_id, ~Example.content_hash.startswith(examples.ERASED))
        .order_by(Example.id)
        .distinct()
    )
    return [examples.draft_of(example) for example in session.scalars(wanted)]
