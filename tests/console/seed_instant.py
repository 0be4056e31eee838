"""Pins and erasures for pages to show."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.store.base import uuid7
from services.store.models import ErasureRequest, Pin, Project, UserAccount


def pinned(session: Session, project: Project, answer: str, **values: object) -> Pin:
    """A live pin with hits, approved by whoever is there."""
    people = [str(one) for one in session.scalars(select(UserAccount.id).limit(2))]
    row = {
        "request_hash": uuid7().hex, "messages": [{"role": "user", "content": f"Text: {answer}"}],
        "parameters": {"temperature": 0.0}, "answer": answer, "size": 2 * len(answer), "interaction_id": uuid7(),
        "review_item_id": uuid7(), "annotation_ids": [], "approved_by": people, "hits": len(answer),
        "last_hit_at": datetime.now(UTC) - timedelta(minutes=3),
    }  # fmt: skip
    made = Pin(project_id=project.id, **(row | values))
    session.add(made)
    session.flush()
    return made


def erased(session: Session, project: Project, subject: str, **values: object) -> ErasureRequest:
    """An erasure under way."""
    progress = {"step": "erased 400 interactions", "counts": {"interaction": 400, "interaction_body": 400}}
    row = {"kind": "end_user", "subject": subject[:500], "state": "running", "asked_by": "boss@example.org",
           "progress": progress}  # fmt: skip
    made = ErasureRequest(project_id=project.id, **(row | values))
    session.add(made)
    session.flush()
    return made
