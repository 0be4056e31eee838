"""Who may use the admin API: bearers of an API key with the scope a route asks for, inside the key's project."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, cast
from uuid import UUID

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from sqlalchemy.orm import Session
from starlette.routing import BaseRoute

from services.errors import Forbidden, NotFound, Unauthenticated
from services.store import keys, projects, roles
from services.store.base import Sessions
from services.store.models import ApiKey, Project, UserAccount
from services.store.roles import Authority


@dataclass(frozen=True)
class Caller:
    """A request's transaction, committed before the answer leaves, and the key that asked."""

    session: Session
    key: ApiKey

    @property
    def actor(self) -> str:
        """How the audit log names the caller."""
        return f"key:{self.key.prefix}"

    def project(self, slug: str) -> Project:
        """A project this key reaches. Raises NotFound, with one sentence for what is unknown and what is another's:
        a key of one project learns of no other."""
        if self.key.project_id is None:
            return projects.get(self.session, slug)
        project = self.session.get_one(Project, self.key.project_id)
        if project.slug != slug:
            raise NotFound(f"there is no project {slug!r}; {projects.describe_known([project.slug])}")
        return project

    @property
    def authority(self) -> Authority:
        """What the key may change about people."""
        return Authority.of_key(self.key)

    def oversees(self, user_id: UUID) -> None:
        """Refuse what would make the caller somebody (a sign-in link, a key that acts as them) unless the key
        administers all that person reaches. Who reaches nothing yet may be given anything later."""
        if not self.authority.oversees(roles.memberships(self.session, user_id)):
            raise Forbidden("this takes a key that administers everything this person reaches", code="wrong_project")

    def everywhere(self) -> None:
        """Refuse keys of one project what concerns all of them."""
        if self.key.project_id is not None:
            raise Forbidden("this key reaches one project only; this takes a key for all of them", code="wrong_project")


def open_session(request: Request) -> Iterator[Session]:
    """One transaction a request."""
    sessions = cast(Sessions, request.app.state.sessions)
    with sessions.begin() as session:
        yield session


class KeyGuard:
    """What a route asks of its caller. A key with the scope admin may do whatever train may."""

    def __init__(self, scope: str) -> None:
        self.scope = scope

    def __call__(
        self, request: Request, session: Annotated[Session, Depends(open_session, scope="function")]
    ) -> Caller:
        scheme, _, presented = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not presented:
            raise Unauthenticated("send an API key: Authorization: Bearer wh_…")
        key = keys.find(session, request.app.state.pepper, presented.strip())
        acts_as = session.get(UserAccount, key.user_id) if key and key.user_id else None
        if key is None or (acts_as is not None and acts_as.disabled_at is not None):
            raise Unauthenticated("this API key is unknown, expired or revoked")
        if not {self.scope, "admin"} & set(key.scopes):
            raise Forbidden(f"this takes a key with the scope {self.scope}; this one has {', '.join(key.scopes)}")
        keys.seen(session, key)
        return Caller(session, key)


Trainer = Annotated[Caller, Depends(KeyGuard("train"))]
Reviewer = Annotated[Caller, Depends(KeyGuard("review"))]
Admin = Annotated[Caller, Depends(KeyGuard("admin"))]


def scope_of(route: BaseRoute) -> str | None:
    """The scope a route declares, or None when it declares none."""
    if not isinstance(route, APIRoute):
        return None
    scopes = [part.call.scope for part in route.dependant.dependencies if isinstance(part.call, KeyGuard)]
    return scopes[0] if len(scopes) == 1 else None


def undeclared(routes: Iterable[BaseRoute]) -> list[str]:
    """The paths of routes that declare no scope."""
    return [getattr(route, "path", str(route)) for route in routes if scope_of(route) is None]
