"""Telling others."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from services.store.base import Base, Key, Now, one_of

DELIVERY_STATES = ("pending", "delivered", "given_up", "cancelled")


class Webhook(Base):
    """An address that is told of a project's events. Its secret is derived from the pepper, `id` and `rotation`, so
    nothing here lets anybody sign; since `rotated_at` the one before is on its way out.

    `given_up` counts deliveries given up in a row. `disabled_reason` says why nothing is sent any more.
    """

    __tablename__ = "webhook"
    __table_args__ = (Index(None, "project_id"),)
    id: Mapped[Key]
    project_id: Mapped[UUID] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    url: Mapped[str]
    events: Mapped[list[str]]
    rotation: Mapped[int] = mapped_column(default=1, server_default="1")
    rotated_at: Mapped[datetime | None]
    given_up: Mapped[int] = mapped_column(default=0, server_default="0")
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]
    created_by: Mapped[str]
    created_at: Mapped[Now]


class WebhookDelivery(Base):
    """One event on its way to one webhook, written in the transaction of what happened. `id` is what receivers tell
    repeats by; `payload` is what was true then, ids and decisions only."""

    __tablename__ = "webhook_delivery"
    __table_args__ = (
        one_of("state", *DELIVERY_STATES),
        Index(None, "webhook_id", "created_at"),
        Index("ix_webhook_delivery_pending", "created_at", postgresql_where=text("state = 'pending'")),
    )
    id: Mapped[Key]
    webhook_id: Mapped[UUID] = mapped_column(ForeignKey("webhook.id", ondelete="CASCADE"))
    event: Mapped[str]
    payload: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(default="pending", server_default="pending")
    attempts: Mapped[int] = mapped_column(default=0, server_default="0")
    status: Mapped[int | None]
    error: Mapped[str | None]
    took_ms: Mapped[float | None]
    job_id: Mapped[UUID | None]
    next_at: Mapped[datetime | None]
    created_at: Mapped[Now]
    delivered_at: Mapped[datetime | None]
