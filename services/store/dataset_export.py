"""A revision as lines of JSON in one of TRL's forms, streamed: what the page, the API and the command give alike."""

import json
from collections.abc import Generator
from typing import Any
from uuid import UUID

from services.store import examples, revisions
from services.store.base import Sessions
from services.store.forms import Form, rows_of
from services.store.models import Example
from services.store.revisions import Located

# What a prompt that forces a call ends with: engine.text.tools, which tables may not import.
CALL_OPEN, CALL_CLOSE = "<tool_call>\n", "</tool_call>"


def lines(sessions: Sessions, revision_id: UUID, form: Form, split: str | None = None) -> Generator[bytes]:
    """One JSON object a line, each with the content hash and the split it came from, in manifest order.

    Opens a session of its own: a response is streamed after its request's transaction has ended.
    """
    with sessions() as session:
        for example, _ in revisions.stream(session, revision_id, split):
            rows = [] if examples.is_erased(example.content_hash) else rows_of(example, form)
            for row in rows:
                said = _begun(row) if (example.asked or {}).get("forced") else row
                whole = {**said, "tools": _tools(example), "example": example.content_hash, "split": example.split}
                yield json.dumps(whole, ensure_ascii=False).encode() + b"\n"
            session.expunge(example)


def _begun(row: dict[str, Any]) -> dict[str, Any]:
    """An answer that had to be a call may begin in the prompt, as it was served; who reads a file prompts without."""

    def opened(text: str) -> str:
        cut = CALL_CLOSE in text and not text.lstrip().startswith(CALL_OPEN.strip())
        return f"{CALL_OPEN}{text}" if cut else text

    answers = [name for name in ("completion", "chosen", "rejected") if name in row]
    return row | {name: [{**one, "content": opened(one["content"])} for one in row[name]] for name in answers}


def _tools(example: Example) -> str | None:
    """What the request offered, as JSON text: TRL reads it so, and a Parquet column has one type."""
    offered = (example.asked or {}).get("tools")
    return json.dumps(offered, ensure_ascii=False) if offered else None


def file_name(found: Located, form: Form, split: str | None) -> str:
    """What a browser saves it as; project and dataset names hold nothing a file name may not."""
    part = f"-{split}" if split else ""
    return f"{found.project.slug}-{found.dataset.name}-{found.revision.digest[:12]}-{form}{part}.jsonl"


def described(found: Located) -> dict[str, Any]:
    """What goes beside the rows, so that a copy can be traced back."""
    return {
        "project": found.project.slug, "dataset": found.dataset.name, "digest": found.revision.digest,
        "held_out_digest": found.revision.held_out_digest, "parent_digest": found.revision.parent_digest,
        "train_count": found.revision.train_count, "held_out_count": found.revision.held_out_count,
    }  # fmt: skip
