"""Searches kept under a name: a person's own, and those they share with the project."""

from typing import NamedTuple
from uuid import UUID

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from services.errors import Forbidden, InvalidRequest, NotFound, Unprocessable
from services.store.models import SavedView, UserAccount

MOST = 50
LONGEST_NAME = 80


class Kept(NamedTuple):
    """A view as one person sees it."""

    view: SavedView
    author: str
    mine: bool


def visible(session: Session, project_id: UUID, user_id: UUID) -> list[Kept]:
    """One's own and the shared ones, by name."""
    rows = session.execute(
        select(SavedView, UserAccount.name)
        .join(UserAccount, UserAccount.id == SavedView.user_id)
        .where(SavedView.project_id == project_id, or_(SavedView.user_id == user_id, SavedView.shared))
        .order_by(func.lower(SavedView.name), SavedView.id)
    )
    return [Kept(view, author, view.user_id == user_id) for view, author in rows]


def save(session: Session, project_id: UUID, user_id: UUID, name: str, query: str, *, shared: bool) -> SavedView:
    """Keep a search; one's own view of that name is replaced. Raises InvalidRequest, Unprocessable beyond MOST."""
    name = " ".join(name.replace("\x00", "").split())
    if not 1 <= len(name) <= LONGEST_NAME:
        raise InvalidRequest(f"a view needs a name of up to {LONGEST_NAME} characters", param="name")
    own = and_(SavedView.project_id == project_id, SavedView.user_id == user_id)
    view = session.scalar(select(SavedView).where(own, SavedView.name == name))
    if view is None:
        if (session.scalar(select(func.count()).where(own)) or 0) >= MOST:
            raise Unprocessable(f"you have {MOST} views in this project; delete one first")
        view = SavedView(project_id=project_id, user_id=user_id, name=name, query=query, shared=shared)
        session.add(view)
    view.query, view.shared = query, shared
    session.flush()
    return view


def remove(session: Session, project_id: UUID, user_id: UUID, view_id: UUID, *, lead: bool) -> SavedView:
    """Delete one's own view, or a shared one as a lead. Raises NotFound, Forbidden."""
    view = session.scalar(select(SavedView).where(SavedView.id == view_id, SavedView.project_id == project_id))
    if view is None or (view.user_id != user_id and not view.shared):
        raise NotFound("there is no such view in this project")
    if view.user_id != user_id and not lead:
        raise Forbidden("this view is somebody else's; its author or a lead can delete it")
    session.delete(view)
    session.flush()
    return view
