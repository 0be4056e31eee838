"""What a gate will have to judge by, known before anything is computed: held-out corrections that two people agree on.

One person alone makes none, however many answers they correct, and nothing that is imported is held out. A run trained
on such answers ends refused; so the pages and the preflight say it first, with what there is to do.
"""

from collections.abc import Iterable
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from services.store import reviews
from services.store.evaluation_config import TARGET, least_groups
from services.store.forms import is_supervised
from services.store.models import Annotation, Example, Project, ReviewItem
from services.store.reviews_deciding import FOR_LEADS

# Two distinct people, whatever an item's own target says.
REVIEWERS = 2
NOTHING_WAITS = "review more answers: a share of them is held out, for two people each, and nothing imported is"


class Waits(NamedTuple):
    """Held-out answers that are no example yet: judged by one person of two, and those left to a lead, as reviewers
    disagree or one of them asked for it."""

    second: int = 0
    lead: int = 0


class HeldOut(NamedTuple):
    """Groups (sessions, users, templates) with a held-out correction, how many the gate needs, and what waits."""

    groups: int
    needs: int
    waits: Waits

    @property
    def short(self) -> bool:
        """Whether a gate would refuse for want of them, whatever the candidate is worth."""
        return self.groups < self.needs


def read_waits(session: Session, project_id: UUID) -> Waits:
    """By the index on (project, state)."""
    open_ = ReviewItem.state == "open"
    found = session.execute(
        select(func.count().filter(open_), func.count().filter(~open_)).where(
            ReviewItem.project_id == project_id,
            ReviewItem.state.in_(("open", *FOR_LEADS)),
            ReviewItem.split == "held_out",
            or_(~open_, ReviewItem.judged > 0),
        )
    ).one()
    return Waits(*found)


def of_queue(session: Session, project: Project) -> HeldOut:
    """As judged so far: what a revision built now would hold, before screens leave anything out of it.

    Reads what is reviewed: 0.1 s over 100,000 items, so it is for a page, not for what a page asks every few seconds.
    """
    corrects, decides = Annotation.verdict == "correct", Annotation.adjudicates
    corrected = (
        select(ReviewItem.group_key)
        .join(Annotation, Annotation.review_item_id == ReviewItem.id)
        .where(
            ReviewItem.project_id == project.id, ReviewItem.state == "done", ReviewItem.split == "held_out",
            Annotation.verdict.in_(reviews.COUNTED), reviews.standing(),
        )
        .group_by(ReviewItem.id)
        .having(func.count(Annotation.author_id.distinct()) >= REVIEWERS)
        .having(func.bool_or(corrects & decides) | (~func.bool_or(decides) & func.bool_or(corrects)))
        .subquery()
    )  # fmt: skip
    groups = session.scalar(select(func.count(corrected.c.group_key.distinct()))) or 0
    return HeldOut(groups, least_groups(project.config), read_waits(session, project.id))


def of_examples(session: Session, project: Project, held_out: Iterable[Example]) -> HeldOut:
    """As a revision's held-out part has it, which is what its gate counts."""
    groups = {one.group_key for one in held_out if one.slice == TARGET and is_supervised(one)}
    return HeldOut(len(groups), least_groups(project.config), read_waits(session, project.id))


def cause(waits: Waits) -> str | None:
    """What holds corrections up, in words; None where nothing does."""
    second = f"{_answers(waits.second)} for a second reviewer, as two people have to agree on each"
    lead = f"{_answers(waits.lead)} for a lead to decide"
    told = [words for words, count in ((second, waits.second), (lead, waits.lead)) if count]
    return "; ".join(told) or None


def _answers(count: int) -> str:
    return f"{count:,} held-out {'answer waits' if count == 1 else 'answers wait'}"


def warning(found: HeldOut) -> str:
    """What to know before a run that would be refused for want of them, and what to do about it."""
    return (
        f"the gate needs held-out corrections of {found.needs:,} groups and has {found.groups:,}, so it would refuse "
        f"whatever is trained; {cause(found.waits) or NOTHING_WAITS}"
    )
