"""Who may change whose roles: nobody gives, takes or changes more than they hold, and somebody always administers.

Every change here is recorded in the audit log. Changes queue behind one lock, so that two administrators who demote
each other at once do not leave the platform to nobody.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from services.errors import Conflict, Forbidden, NotFound
from services.store import audit, people
from services.store.models import ROLES, ApiKey, Membership, Project, ReviewItem, UserAccount

MANAGING = "lead"  # the lowest role that has a say about other people
PEOPLE_LOCK = 0x77686574_70656F70  # Any fixed number; this one spells "whetpeop".


@dataclass(frozen=True)
class Authority:
    """Who changes something about people, and the highest role they hold: everywhere, and on single projects."""

    actor: str
    everywhere: str | None
    on_projects: Mapping[UUID, str] = field(default_factory=dict)
    user_id: UUID | None = None
    key_id: UUID | None = None

    @classmethod
    def of_user(cls, session: Session, user_id: UUID) -> "Authority":
        """What a person holds now."""
        held = {row.project_id: row.role for row in memberships(session, user_id)}
        everywhere = held.pop(None, None)
        return cls(f"user:{user_id}", everywhere, {key: role for key, role in held.items() if key}, user_id)

    @classmethod
    def of_key(cls, key: ApiKey) -> "Authority":
        """A key with the scope admin administers the project it belongs to, or all of them."""
        if key.project_id is None:
            return cls(f"key:{key.prefix}", "admin", key_id=key.id)
        return cls(f"key:{key.prefix}", None, {key.project_id: "admin"}, key_id=key.id)

    def on(self, project_id: UUID | None) -> str | None:
        """The highest role on a project; with None, the one held everywhere."""
        local = self.on_projects.get(project_id) if project_id else None
        return max(local, self.everywhere, key=people.rank)

    def manages(self, project_id: UUID | None) -> bool:
        """Whether they have a say about who is there."""
        return people.rank(self.on(project_id)) >= people.rank(MANAGING)

    def grantable(self, project_id: UUID | None) -> list[str]:
        """The roles they may give there, lowest first."""
        return list(ROLES[: people.rank(self.on(project_id)) + 1]) if self.manages(project_id) else []

    def outranks(self, role: str | None, project_id: UUID | None) -> bool:
        """Whether they may give or take this role there."""
        return self.manages(project_id) and people.rank(role) <= people.rank(self.on(project_id))

    def oversees(self, held: Sequence[Membership]) -> bool:
        """Whether they administer everything somebody reaches: a sign-in link for a person is the whole person."""
        return all(self.on(row.project_id) == "admin" for row in held) and (bool(held) or self.everywhere == "admin")


def memberships(session: Session, user_id: UUID) -> list[Membership]:
    """The roles somebody holds, the one on every project first."""
    query = select(Membership).where(Membership.user_id == user_id)
    return list(session.scalars(query.order_by(Membership.project_id.is_not(None), Membership.id)))


class Member(NamedTuple):
    """A person and the role they hold somewhere."""

    user: UserAccount
    membership: Membership


def members(session: Session, project_id: UUID | None) -> list[Member]:
    """Who holds a role on exactly this project, or with None on every project; by name."""
    here = Membership.project_id.is_(None) if project_id is None else Membership.project_id == project_id
    rows = session.execute(
        select(UserAccount, Membership)
        .join(Membership, Membership.user_id == UserAccount.id)
        .where(here)
        .order_by(func.lower(UserAccount.name), UserAccount.id)
    )
    return [Member(*row) for row in rows]


# --- changes ----------------------------------------------------------------------------------------------


def lock(session: Session) -> None:
    """Take turns until commit with everybody else who changes roles or accounts."""
    session.execute(select(func.pg_advisory_xact_lock(PEOPLE_LOCK)))


def give(session: Session, by: Authority, user_id: UUID, role: str, project_id: UUID | None) -> None:
    """Give a role, or change the one held there.

    Raises Forbidden for more than `by` holds and for a change of somebody who holds more, Conflict for the last
    administrator, NotFound for an account that is gone.
    """
    people.check_role(role)
    lock(session)
    user = session.get(UserAccount, user_id, populate_existing=True)
    if user is None or user.deleted_at is not None:
        raise NotFound("there is no such person")
    before = _held(session, user_id, project_id)
    check(by, role, project_id)
    check(by, before, project_id)
    if before == role:
        return
    if before == "admin":
        keep_an_administrator(session, user_id, project_id)
    people.grant(session, user_id, role, project_id)
    _release_leases(session, user_id)
    detail = {"role": role, "before": before, "project": slug_of(session, project_id)}
    audit.record(session, by.actor, "role.give", f"user:{user_id}", detail)


def take(session: Session, by: Authority, user_id: UUID, project_id: UUID | None) -> None:
    """Take the role held there away; it ends at once. As `give` raises; NotFound when there is none to take."""
    lock(session)
    before = _held(session, user_id, project_id)
    if before is None:
        raise NotFound("this person holds no role there")
    check(by, before, project_id)
    if before == "admin":
        keep_an_administrator(session, user_id, project_id)
    here = Membership.project_id.is_(None) if project_id is None else Membership.project_id == project_id
    session.execute(delete(Membership).where(Membership.user_id == user_id, here))
    _release_leases(session, user_id)
    detail = {"before": before, "project": slug_of(session, project_id)}
    audit.record(session, by.actor, "role.take", f"user:{user_id}", detail)


def check(by: Authority, role: str | None, project_id: UUID | None) -> None:
    """Raises Forbidden unless `by` may give or take this role there."""
    if not by.manages(project_id):
        raise Forbidden(f"only a {MANAGING} or above changes who is here", code="insufficient_role")
    if not by.outranks(role, project_id):
        raise Forbidden(f"the role {role} is above yours ({by.on(project_id)})", code="insufficient_role")


def keep_an_administrator(session: Session, user_id: UUID, project_id: UUID | None = None) -> None:
    """Raises Conflict when nobody but this person administers every project. Take `lock` first."""
    if project_id is not None:
        return
    others = (
        select(func.count())
        .select_from(Membership)
        .join(UserAccount, UserAccount.id == Membership.user_id)
        .where(
            Membership.role == "admin", Membership.project_id.is_(None), Membership.user_id != user_id,
            UserAccount.disabled_at.is_(None),
        )
    )  # fmt: skip
    if not session.scalar(others):
        raise Conflict("this is the last administrator; make somebody else one first", code="last_admin")


def _held(session: Session, user_id: UUID, project_id: UUID | None) -> str | None:
    here = Membership.project_id.is_(None) if project_id is None else Membership.project_id == project_id
    return session.scalar(select(Membership.role).where(Membership.user_id == user_id, here))


def slug_of(session: Session, project_id: UUID | None) -> str | None:
    """What the audit log calls a project."""
    return session.get_one(Project, project_id).slug if project_id else None


def _release_leases(session: Session, user_id: UUID) -> None:
    """Items held by somebody who may no longer judge them go back to the queue at once."""
    held = select(ReviewItem.project_id).where(ReviewItem.lease_user_id == user_id).distinct()
    for project_id in session.scalars(held).all():
        if people.rank(people.role_on(session, user_id, project_id)) < people.rank("reviewer"):
            release_leases(session, user_id, project_id)


def release_leases(session: Session, user_id: UUID, project_id: UUID | None = None) -> None:
    """Give back what somebody holds for review, on one project or everywhere."""
    statement = update(ReviewItem).where(ReviewItem.lease_user_id == user_id)
    if project_id is not None:
        statement = statement.where(ReviewItem.project_id == project_id)
    session.execute(statement.values(lease_user_id=None, lease_token=None, lease_expires_at=None))
