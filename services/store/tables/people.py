"""Who may do what: projects, users, memberships, keys, sign-in."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKey, Index, LargeBinary, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from services.store.base import Base, Key, Now, one_of

ROLES = ("viewer", "reviewer", "lead", "operator", "admin")
SCOPES = ("infer", "feedback", "review", "train", "admin")
SIGN_IN_METHODS = ("link", "invitation", "oidc")


class Project(Base):
    """One application or tenant. `slug` is the `model` name apps send; `config` holds tags, guidelines, margins."""

    __tablename__ = "project"
    id: Mapped[Key]
    slug: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    config: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'"))
    created_at: Mapped[Now]


class ApiKey(Base):
    """`prefix` is the public 8-character id in `wh_<id>_<secret>`; only HMAC-SHA256(pepper, key) is kept.

    `project_id` NULL means every project. `user_id` is whom the scope review acts as. A rotated key has one successor,
    whose `rotated_from` names it, and lives on until it expires.
    """

    __tablename__ = "api_key"
    __table_args__ = (Index(None, "project_id"), UniqueConstraint("rotated_from"))
    id: Mapped[Key]
    prefix: Mapped[str] = mapped_column(unique=True)
    hash: Mapped[bytes] = mapped_column(LargeBinary)
    name: Mapped[str]
    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    scopes: Mapped[list[str]]
    created_at: Mapped[Now]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    user_id: Mapped[UUID | None] = mapped_column(ForeignKey("user_account.id"))
    created_by: Mapped[UUID | None] = mapped_column(ForeignKey("user_account.id"))
    rotated_from: Mapped[UUID | None] = mapped_column(ForeignKey("api_key.id"))


class UserAccount(Base):
    """A person. The row is never deleted, so that judgements stay attributed; a deleted person's row keeps no name and
    no address (`services.store.departure`)."""

    __tablename__ = "user_account"
    id: Mapped[Key]
    email: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    disabled_at: Mapped[datetime | None]
    created_at: Mapped[Now]
    deleted_at: Mapped[datetime | None]


class Membership(Base):
    """A person's role. `project_id` NULL means on every project."""

    __tablename__ = "membership"
    __table_args__ = (
        one_of("role", *ROLES),
        UniqueConstraint("user_id", "project_id", postgresql_nulls_not_distinct=True),
    )
    id: Mapped[Key]
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id", ondelete="CASCADE"))
    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    role: Mapped[str]


class SignInLink(Base):
    """A one-time sign-in link; only the hash of its token is kept."""

    __tablename__ = "sign_in_link"
    token_hash: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id", ondelete="CASCADE"))
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]


class Invitation(Base):
    """A one-time link that makes an account with a role. `project_id` NULL means on every project.

    `invited_by_key` made it where no person did. The address lives here and in the account only, so that it can be
    erased.
    """

    __tablename__ = "invitation"
    __table_args__ = (one_of("role", *ROLES), Index(None, "email"))
    id: Mapped[Key]
    token_hash: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    email: Mapped[str]
    name: Mapped[str]
    role: Mapped[str]
    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("project.id", ondelete="CASCADE"))
    invited_by: Mapped[UUID | None] = mapped_column(ForeignKey("user_account.id"))
    invited_by_key: Mapped[UUID | None] = mapped_column(ForeignKey("api_key.id", ondelete="CASCADE"))
    created_at: Mapped[Now]
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    accepted_at: Mapped[datetime | None]
    user_id: Mapped[UUID | None] = mapped_column(ForeignKey("user_account.id"))


class UserIdentity(Base):
    """Who an OIDC provider says a person is: `subject` is the provider's own name for them and never reused."""

    __tablename__ = "user_identity"
    __table_args__ = (UniqueConstraint("user_id", "issuer"),)
    issuer: Mapped[str] = mapped_column(primary_key=True)
    subject: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id", ondelete="CASCADE"))
    created_at: Mapped[Now]


class LoginSession(Base):
    """A browser session; opaque cookie, hashed here. `id` is what pages and the API call it, `method` how it began."""

    __tablename__ = "session"
    __table_args__ = (one_of("method", *SIGN_IN_METHODS),)
    token_hash: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("user_account.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[Now]
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    id: Mapped[UUID] = mapped_column(unique=True, server_default=text("gen_random_uuid()"))
    method: Mapped[str] = mapped_column(default="link", server_default="link")
    device: Mapped[str] = mapped_column(default="", server_default="")
    last_seen_at: Mapped[datetime | None]
