"""COPY into the log: documents that are absent are SQL's NULL, and partitions take the columns of every release."""

from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import select, text

from services.store import interactions
from services.store.base import Sessions, uuid7
from services.store.models import Interaction

NULLS = text("SELECT id, speculated FROM interaction WHERE speculation IS NULL")


def record(**values: object) -> dict[str, Any]:
    """One interaction as the shipper joins it."""
    documents: dict[str, Any] = {"tags": {}, "messages": [], "parameters": {}, "prompt_token_ids": [], "token_ids": [],
                 "token_logprobs": [], "retrieved": [], "worked_examples": []}  # fmt: skip
    texts = ("base_digest", "namespace", "finish_reason", "group_key", "config_hash", "output", "prompt_hash",
             "template_hash", "tokenizer_hash")  # fmt: skip
    numbers = ("generation", "prompt_tokens", "completion_tokens", "cached_tokens", "drafted_tokens",
               "accepted_tokens", "spool_version")  # fmt: skip
    row: dict[str, Any] = dict.fromkeys((*interactions.NARROW, *interactions.WIDE))
    row |= dict.fromkeys(texts, "") | dict.fromkeys(numbers, 0) | documents
    row |= {
        "id": uuid7(), "project_id": UUID(int=1), "origin": "live", "arm": "active", "stream": False,
        "speculated": True, "endpoint": "/v1/completions", "started_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    return {**row, **values}


def test_what_was_not_drafted_lands_as_null_and_what_was_as_its_document(sessions: Sessions) -> None:
    told = {"steps": 3, "suffix": {"drafts": 1}}
    plain, drafted = record(speculated=False), record(speculation=told)
    with sessions.begin() as session:
        connection: psycopg.Connection[Any] = session.connection().connection.driver_connection  # type: ignore[assignment]
        assert interactions.land(connection, [plain, drafted]) == 2
    with sessions() as session:
        assert session.execute(NULLS).all() == [(plain["id"], False)]
        assert session.scalar(select(Interaction.speculation).where(Interaction.id == drafted["id"])) == told
