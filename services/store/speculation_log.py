"""What the log tells of speculation: requests to compare, response tokens to train on, answers to learn again."""

from array import array
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, exists, func, select
from sqlalchemy.orm import Session

from services.store.erasure_cover import is_erased
from services.store.models import Interaction, InteractionBody
from services.store.pages import first_id

UNANSWERED = ("error", "cancelled", "interrupted")
# Fewer tokens than these say more of the clock than of the decode rate.
LEAST_TIMED_TOKENS = 8
PAGE = 1000


class Counts(NamedTuple):
    """One drafter in one request: drafts verified, tokens of them that came out, and first tokens of them that did."""

    drafts: int = 0
    accepted: int = 0
    first: int = 0


class Request(NamedTuple):
    """One answer of live traffic. `rate` is decode tokens/s, None where it was too short to time."""

    id: UUID
    at: datetime
    speculator: str | None
    tokens: int
    steps: int
    rate: float | None
    suffix: Counts
    heads: Counts


def requests(
    session: Session, project_id: UUID, adapter: str | None, *, since: datetime, limit: int, newest: bool = True
) -> list[Request]:
    """Answers that `adapter` gave to live traffic since then, oldest first: the newest `limit`, or the first ones.

    Not those asked of a pinned artefact, which draft as no arm does.
    """
    columns = (
        Interaction.id, Interaction.started_at, Interaction.speculator_digest, Interaction.completion_tokens,
        Interaction.speculation, Interaction.latency_ms, Interaction.ttft_ms,
    )  # fmt: skip
    query = (
        select(*columns)
        .where(
            Interaction.project_id == project_id,
            Interaction.id >= first_id(since),
            Interaction.origin == "live",
            Interaction.adapter_digest.is_not_distinct_from(adapter),
            Interaction.finish_reason.not_in(UNANSWERED),
            Interaction.completion_tokens > 0,
            ~_pinned(since),
        )
        .order_by(Interaction.id.desc() if newest else Interaction.id)
        .limit(limit)
    )
    found = [_request(row) for row in session.execute(query)]
    return found[::-1] if newest else found


def last_id(session: Session, project_id: UUID) -> UUID | None:
    """The project's newest interaction, to see whether anything has happened."""
    query = select(Interaction.id).where(Interaction.project_id == project_id)
    return session.scalar(query.order_by(Interaction.id.desc()).limit(1))


def response_tokens(
    session: Session,
    project_id: UUID,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    base: str | None = None,
) -> int:
    """Tokens of the answers to live traffic that began in [since, until), of one base or of all."""
    query = select(func.coalesce(func.sum(Interaction.completion_tokens), 0)).where(
        Interaction.project_id == project_id, Interaction.origin == "live"
    )
    if since is not None:
        query = query.where(Interaction.id >= first_id(since))
    if until is not None:
        query = query.where(Interaction.id < first_id(until))
    if base is not None:
        query = query.where(Interaction.base_digest == base)
    return int(session.scalar(query) or 0)


def newest_base(session: Session, project_id: UUID) -> str | None:
    """The base that gave the newest answer to live traffic."""
    query = select(Interaction.base_digest).where(Interaction.project_id == project_id, Interaction.origin == "live")
    return session.scalar(query.order_by(Interaction.id.desc()).limit(1))


def recent_namespaces(session: Session, limit: int) -> list[tuple[UUID, str]]:
    """(project, namespace) of live traffic still in the log, at most `limit`, the most recently used first."""
    query = (
        select(Interaction.project_id, Interaction.namespace)
        .where(Interaction.origin == "live")
        .group_by(Interaction.project_id, Interaction.namespace)
        .order_by(func.max(Interaction.started_at).desc())
        .limit(limit)
    )
    return [(row.project_id, row.namespace) for row in session.execute(query)]


def responses(
    session: Session, project_id: UUID, namespace: str, *, base: str, until: datetime, most: int
) -> list["array[int]"]:
    """Token ids of a namespace's newest live answers that began before `until`, at most `most` tokens, oldest first.

    Left out are answers of another base, whose ids mean other words; those of who asked to be erased; and those that a
    caller asked of a pinned artefact, as the engine left them out when it gave them.
    """
    found: list[array[int]] = []
    left = most
    for token_ids in _newest_first(session, project_id, namespace, base, until):
        left -= len(token_ids)
        if left < 0:
            break
        found.append(token_ids)
    return found[::-1]


def _newest_first(
    session: Session, project_id: UUID, namespace: str, base: str, until: datetime
) -> Iterator["array[int]"]:
    before = first_id(until)
    while True:
        page = session.execute(
            select(Interaction.id, InteractionBody.token_ids)
            .join(InteractionBody, InteractionBody.id == Interaction.id)
            .where(
                Interaction.project_id == project_id,
                Interaction.namespace == namespace,
                Interaction.id < before,
                Interaction.origin == "live",
                Interaction.base_digest == base,
                Interaction.finish_reason.not_in(UNANSWERED),
                ~is_erased(project_id),
                InteractionBody.parameters["model"].as_string().not_like("%@%"),
            )
            .order_by(Interaction.id.desc())
            .limit(PAGE)
        ).all()
        yield from (array("I", row.token_ids) for row in page if row.token_ids)
        if len(page) < PAGE:
            return
        before = page[-1].id


def _pinned(since: datetime) -> ColumnElement[bool]:
    """Whether the caller named an exact digest. `since` keeps the look-up to the partitions that can hold the body."""
    return exists().where(
        InteractionBody.id == Interaction.id,
        InteractionBody.id >= first_id(since),
        InteractionBody.parameters["model"].as_string().like("%@%"),
    )


def _request(row: Any) -> Request:  # noqa: ANN401 - a row of the query above
    told: Mapping[str, Any] = row.speculation or {}
    timed = row.completion_tokens >= LEAST_TIMED_TOKENS and row.latency_ms is not None and row.ttft_ms is not None
    seconds = (row.latency_ms - row.ttft_ms) / 1000 if timed else 0.0
    return Request(
        id=row.id,
        at=row.started_at,
        speculator=row.speculator_digest,
        tokens=row.completion_tokens,
        # Nothing was drafted: a token a step.
        steps=max(1, int(told.get("steps", row.completion_tokens))),
        rate=(row.completion_tokens - 1) / seconds if seconds > 0 else None,
        suffix=_counts(told.get("suffix")),
        heads=_counts(told.get("heads")),
    )


def _counts(told: Mapping[str, Any] | None) -> Counts:
    if not told:
        return Counts()
    accepted = [int(count) for count in told.get("accepted", ())]
    return Counts(int(told.get("drafts", 0)), sum(accepted), accepted[0] if accepted else 0)
