"""Pinned answers: an approved answer serves the identical request, from the moment the judgement commits.

`follow` is called with every judgement and undo of an item, in its transaction: it makes, replaces or withdraws the
item's pin. The gateways' snapshots hear of it by the table's trigger. Changes of one project's pins happen one after
another, under a lock on the project's row.
"""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from services.errors import Conflict, NotFound
from services.store import audit, people
from services.store.conforming import conforms
from services.store.instant_config import read_pins
from services.store.models import Annotation, Interaction, InteractionBody, Pin, Project, ReviewItem, UserAccount
from services.store.pin_key import key_of

CURRENT = ("live", "learned")
VERDICTS = ("accept", "correct", "reject")
REVIEWERS = 2
# A longer answer is no answer to say word for word, and every gateway holds it in memory.
LONGEST_ANSWER = 32_768


class Approved(NamedTuple):
    """The answer that the judgements approve, and which of them do."""

    answer: str
    by: Sequence[Annotation]


class Used(NamedTuple):
    """A project's current pins against its bounds."""

    pins: int
    bytes: int


class Listed(NamedTuple):
    """A pin for the page, with the names of who approved it."""

    pin: Pin
    approvers: list[str]


# --- judgements -------------------------------------------------------------------------------------------


def follow(session: Session, item: ReviewItem, judgements: Sequence[Annotation]) -> None:
    """Make the item's pin what its standing judgements say. What cannot be pinned is reviewed all the same."""
    project = session.get_one(Project, item.project_id)
    config = read_pins(project.config)
    current = _current_of(session, item)
    if not config.enabled and current is None:
        return
    approved = _approved(session, item, judgements)
    answer = approved.answer if approved else None
    if current is not None and current.answer == answer:
        return
    _lock(session, project.id)
    if current is not None:
        _withdraw(session, current, None, "a judgement has changed the answer" if answer else "no longer approved")
    if approved is not None and config.enabled and not _refused_since(session, item, approved):
        _pin(session, project, item, approved)


def _current_of(session: Session, item: ReviewItem) -> Pin | None:
    return session.scalar(select(Pin).where(Pin.review_item_id == item.id, Pin.state.in_(CURRENT)))


def _approved(session: Session, item: ReviewItem, judgements: Sequence[Annotation]) -> Approved | None:
    """A lead's last word; else what two or more people agree on and nobody contradicts."""
    counted = [one for one in judgements if one.verdict in VERDICTS and not getattr(one, "checked", False)]
    leads = [one for one in counted if _is_lead(session, one)]
    deciding = leads[-1:] or counted
    said = {_said(one) for one in deciding}
    enough = bool(leads) or len({one.author_id for one in counted}) >= REVIEWERS
    if not enough or len(said) != 1 or deciding[0].verdict == "reject":
        return None
    if deciding[0].verdict == "correct":
        return Approved(_clean(deciding[0].correction or ""), deciding)
    body = session.get(InteractionBody, item.interaction_id)
    return None if body is None else Approved(body.output, deciding)


def _is_lead(session: Session, judgement: Annotation) -> bool:
    role = people.role_on(session, judgement.author_id, judgement.project_id)
    return people.rank(role) >= people.rank("lead")


def _said(judgement: Annotation) -> tuple[str, str]:
    return judgement.verdict, _clean(judgement.correction or "")


def _clean(text: str) -> str:
    """As golden data takes a correction, so that weights which learn it answer with the same text."""
    return unicodedata.normalize("NFC", text).rstrip()


def _refused_since(session: Session, item: ReviewItem, approved: Approved) -> bool:
    """Whether a person has withdrawn this item's pin after the last of these judgements."""
    last = session.scalar(
        select(func.max(Pin.withdrawn_at)).where(Pin.review_item_id == item.id, Pin.withdrawn_by.is_not(None))
    )
    return last is not None and last > max(one.created_at for one in approved.by)


def _pin(session: Session, project: Project, item: ReviewItem, approved: Approved) -> None:
    body = session.get(InteractionBody, item.interaction_id)
    logged = session.get(Interaction, item.interaction_id)
    if body is None or logged is None or not _servable(logged, body, approved):
        return
    key = key_of(logged.endpoint, body.messages, body.parameters)
    if key is None:
        return
    size = len(json.dumps(body.messages)) + len(approved.answer.encode())
    older = session.scalars(
        select(Pin).where(Pin.project_id == project.id, Pin.request_hash == key, Pin.state.in_(CURRENT))
    ).one_or_none()
    if older is not None:
        _withdraw(session, older, None, "another answer to the same request was approved later")
    config, taken = read_pins(project.config), used(session, project.id)
    if taken.pins >= config.most or taken.bytes + size > config.most_bytes:
        return
    session.add(
        Pin(
            project_id=project.id, request_hash=key, messages=body.messages, parameters=body.parameters,
            answer=approved.answer, size=size, interaction_id=item.interaction_id, review_item_id=item.id,
            annotation_ids=[str(one.id) for one in approved.by],
            approved_by=sorted({str(one.author_id) for one in approved.by}),
        )
    )  # fmt: skip
    session.flush()


def _servable(logged: Interaction, body: InteractionBody, approved: Approved) -> bool:
    """Whether the answer is one the request could have got: not cut off, in its format, without its stop strings."""
    answer = approved.answer
    accepted = approved.by[0].verdict == "accept"
    if not answer or len(answer.encode()) > LONGEST_ANSWER or (accepted and logged.finish_reason != "stop"):
        return False
    if any(stop in answer for stop in body.parameters.get("stop") or ()):
        return False
    return accepted or conforms(body.parameters.get("grammar"), answer)


# --- withdrawing ------------------------------------------------------------------------------------------


def withdraw(session: Session, project_id: UUID, pin_id: UUID, actor: str, reason: str) -> Pin:
    """A person's word: this answer is served no more. Raises NotFound, Conflict when it was withdrawn before."""
    _lock(session, project_id)
    pin = session.scalar(
        select(Pin).where(Pin.id == pin_id, Pin.project_id == project_id),
        execution_options={"populate_existing": True},
    )
    if pin is None:
        raise NotFound(f"there is no pin {pin_id} in this project")
    if pin.state == "withdrawn":
        raise Conflict("this pin was withdrawn before")
    _withdraw(session, pin, actor, reason)
    # The reason is somebody's free text, which an erasure must reach; the chain of the audit log it could not.
    audit.record(session, actor, "pin.withdraw", f"project:{project_id}", {"pin": str(pin_id)})
    return pin


def _withdraw(session: Session, pin: Pin, actor: str | None, reason: str) -> None:
    """`actor` None: not a person's decision about the pin, so a judgement may pin it again."""
    session.execute(
        update(Pin)
        .where(Pin.id == pin.id)
        .values(state="withdrawn", withdrawn_at=func.clock_timestamp(), withdrawn_by=actor, reason=reason)
    )
    session.refresh(pin)


def _lock(session: Session, project_id: UUID) -> None:
    """One change of a project's pins at a time, without keeping other rows from referring to the project."""
    session.execute(select(Project.id).where(Project.id == project_id).with_for_update(key_share=True))


# --- weights that know the answer -------------------------------------------------------------------------


def weights_changed(session: Session, project_id: UUID, active: str | None) -> None:
    """Other weights serve: what those before had learned is served again, until these are seen to know it."""
    session.execute(
        update(Pin)
        .where(Pin.project_id == project_id, Pin.state == "learned", Pin.learned_digest.is_distinct_from(active))
        .values(state="live", learned_digest=None)
    )


def to_check(session: Session, project_id: UUID, after: UUID | None, limit: int) -> list[Pin]:
    """The project's live pins, oldest first, a page at a time."""
    query = select(Pin).where(Pin.project_id == project_id, Pin.state == "live")
    if after is not None:
        query = query.where(Pin.id > after)
    return list(session.scalars(query.order_by(Pin.id).limit(limit)))


def any_live(session: Session, project_id: UUID) -> bool:
    """Whether there is anything to ask new weights about."""
    return bool(to_check(session, project_id, None, 1))


def learned(session: Session, pin_ids: Iterable[UUID], digest: str) -> None:
    """These weights give these answers themselves."""
    session.execute(
        update(Pin).where(Pin.id.in_(list(pin_ids)), Pin.state == "live").values(state="learned", learned_digest=digest)
    )


# --- reading ----------------------------------------------------------------------------------------------


def used(session: Session, project_id: UUID) -> Used:
    """How much of its bounds a project uses."""
    query = select(func.count(), func.coalesce(func.sum(Pin.size), 0))
    row = session.execute(query.where(Pin.project_id == project_id, Pin.state.in_(CURRENT))).one()
    return Used(int(row[0]), int(row[1]))


def page(session: Session, project_id: UUID, *, limit: int = 100, before: datetime | None = None) -> list[Listed]:
    """A project's pins, newest first, withdrawn ones too."""
    query = select(Pin).where(Pin.project_id == project_id)
    if before is not None:
        query = query.where(Pin.created_at < before)
    found = list(session.scalars(query.order_by(Pin.created_at.desc(), Pin.id.desc()).limit(limit)))
    wanted = {UUID(one) for pin in found for one in pin.approved_by}
    rows = session.execute(select(UserAccount.id, UserAccount.name).where(UserAccount.id.in_(wanted)))
    names: dict[str, str] = {str(row.id): row.name for row in rows}
    return [Listed(pin, [names.get(one, "somebody") for one in pin.approved_by]) for pin in found]


def count_hits(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Count pinned answers that are about to land, once each: those the log has already were counted then."""
    served = {row["id"]: row for row in rows if row["origin"] == "pinned" and row["parameters"].get("pin")}
    if not served:
        return
    known = set(session.scalars(select(Interaction.id).where(Interaction.id.in_(served))))
    fresh = [row for identity, row in served.items() if identity not in known]
    for pin_id in {str(row["parameters"]["pin"]) for row in fresh}:
        mine = [row["started_at"] for row in fresh if row["parameters"]["pin"] == pin_id]
        session.execute(
            update(Pin)
            .where(Pin.id == UUID(pin_id))
            .values(hits=Pin.hits + len(mine), last_hit_at=func.greatest(Pin.last_hit_at, max(mine)))
        )
