"""Who is asking, and may they: every route declares what it needs by taking one of the guarded parameters below.

`undeclared` lists the routes that declare nothing; the console refuses to start while there are any.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.routing import BaseRoute

from services.errors import Forbidden, NotFound, Unauthenticated
from services.settings import Settings
from services.store import logins, people
from services.store.base import Sessions
from services.store.models import LoginSession, Project, UserAccount
from services.store.roles import Authority

ANYONE = "anyone"
SIGNED_IN = "signed in"
ADMINISTRATOR = "admin of every project"


@dataclass(frozen=True)
class Here:
    """A request's place: its transaction, committed before the answer leaves, and who asks about what."""

    session: Session
    user_or_none: UserAccount | None
    project_or_none: Project | None
    role: str | None
    login_or_none: LoginSession | None = None

    @property
    def user(self) -> UserAccount:
        """The person asking; guarded routes always have one."""
        assert self.user_or_none is not None
        return self.user_or_none

    @property
    def project(self) -> Project:
        """The project in the path; routes guarded by a role always have one."""
        assert self.project_or_none is not None
        return self.project_or_none

    @property
    def login(self) -> LoginSession:
        """The session the request came with."""
        assert self.login_or_none is not None
        return self.login_or_none

    @property
    def actor(self) -> str:
        """How the audit log names the person asking."""
        return f"user:{self.user.id}"

    @property
    def authority(self) -> Authority:
        """What the person asking may change about people."""
        return Authority.of_user(self.session, self.user.id)

    def may(self, role: str) -> bool:
        """Whether the person asking has at least this role here."""
        return people.rank(self.role) >= people.rank(role)


def open_session(request: Request) -> Iterator[Session]:
    """One transaction a request: committed when the route returns, rolled back when it raises."""
    sessions = cast(Sessions, request.app.state.sessions)
    with sessions.begin() as session:
        yield session


class Guard:
    """What a route asks of whoever calls it: ANYONE, SIGNED_IN, ADMINISTRATOR, or at least a role on the project in its
    path."""

    def __init__(self, needs: str) -> None:
        self.needs = needs

    def __call__(self, request: Request, session: Annotated[Session, Depends(open_session, scope="function")]) -> Here:
        if self.needs == ANYONE:  # not even looked up: these pages must answer while the database is away
            return Here(session, None, None, None)
        current = signed_in(request, session)
        if current is None:
            raise Unauthenticated("sign in first", code="not_signed_in")
        logins.seen(session, current.login)
        if self.needs not in (SIGNED_IN, ADMINISTRATOR):
            return self._on_project(session, current, request.path_params["slug"])
        role = people.role_on(session, current.user.id, None)
        if self.needs == ADMINISTRATOR and role != "admin":
            raise Forbidden("this takes the role admin on every project", code="insufficient_role")
        return Here(session, current.user, None, role, current.login)

    def _on_project(self, session: Session, current: logins.Current, slug: str) -> Here:
        user = current.user
        project = session.scalar(select(Project).where(Project.slug == slug))
        role = people.role_on(session, user.id, project.id) if project else None
        if project is None or role is None:  # the same answer, so that nobody learns which projects exist
            raise NotFound(f"there is no project {slug!r} that you may see")
        if people.rank(role) < people.rank(self.needs):
            raise Forbidden(f"this takes the role {self.needs}; yours is {role}", code="insufficient_role")
        return Here(session, user, project, role, current.login)


Anyone = Annotated[Here, Depends(Guard(ANYONE))]
SignedIn = Annotated[Here, Depends(Guard(SIGNED_IN))]
Viewer = Annotated[Here, Depends(Guard("viewer"))]
Reviewer = Annotated[Here, Depends(Guard("reviewer"))]
Lead = Annotated[Here, Depends(Guard("lead"))]
Operator = Annotated[Here, Depends(Guard("operator"))]
Admin = Annotated[Here, Depends(Guard("admin"))]
Administrator = Annotated[Here, Depends(Guard(ADMINISTRATOR))]


def needs_of(route: BaseRoute) -> str | None:
    """What a route declares, or None when it declares nothing or contradicts itself."""
    if not isinstance(route, APIRoute):
        return None
    guards = [part.call.needs for part in route.dependant.dependencies if isinstance(part.call, Guard)]
    return guards[0] if len(guards) == 1 else None


def undeclared(routes: Iterable[BaseRoute]) -> list[str]:
    """The paths of routes that do not say what they need, project routes without a project role included."""
    missing = []
    for route in routes:
        needs, path = needs_of(route), getattr(route, "path", str(route))
        if needs is None or ("{slug}" in path and people.rank(needs) < 0):
            missing.append(path)
    return missing


# --- the session cookie -----------------------------------------------------------------------------------


def over_https(request: Request) -> bool:
    """Whether browsers reach the console by https, directly or through the proxy the settings name."""
    settings = cast(Settings, request.app.state.settings)
    return settings.public_console_url.startswith("https://") or request.url.scheme == "https"


def cookie_name(request: Request) -> str:
    """`__Host-` binds a cookie to this host and to https; plain http on a laptop cannot have it."""
    return "__Host-whet" if over_https(request) else "whet_session"


def signed_in(request: Request, session: Session) -> logins.Current | None:
    """Whose session the request carries, and which."""
    cookie = request.cookies.get(cookie_name(request))
    return people.current(session, pepper(request), cookie) if cookie else None


def end_current(request: Request, session: Session) -> None:
    """End the session the request carries, if any: whoever signs in or out leaves none behind in this browser."""
    current = signed_in(request, session)
    if current is not None:
        logins.end(session, f"user:{current.user.id}", current.login)


def device(request: Request) -> str:
    """The browser, in words."""
    return logins.device_of(request.headers.get("user-agent", ""))


def own_url(request: Request) -> str:
    """How browsers reach the console, without a slash at the end."""
    settings = cast(Settings, request.app.state.settings)
    return settings.public_console_url.rstrip("/") or str(request.base_url).rstrip("/")


def pepper(request: Request) -> bytes:
    """The secret that stored session hashes depend on."""
    return cast(bytes, request.app.state.pepper)


def set_cookie(request: Request, response: Response, value: str) -> None:
    """Give the browser its session."""
    response.set_cookie(
        cookie_name(request),
        value,
        max_age=int(people.SESSION_LIFETIME.total_seconds()),
        path="/",
        secure=over_https(request),
        httponly=True,
        samesite="lax",
    )


def clear_cookie(request: Request, response: Response) -> None:
    """Take it back."""
    response.delete_cookie(cookie_name(request), path="/", secure=over_https(request), httponly=True, samesite="lax")
