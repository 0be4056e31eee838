"""From judgements that stand to example drafts: who must agree, what becomes of each verdict."""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.store import reviews
from services.store.copying import among
from services.store.examples import Draft, beside, draft_of
from services.store.models import Annotation, Example, Interaction, InteractionBody, ReviewItem
from services.store.revisions import LeftOut
from worker.curation.pairs import Retired, pair_flaw

STATES = ("open", "done", "disputed")
HELD_OUT_REVIEWERS = 2  # whatever an item's own target says
TEXTS_AT_ONCE = 5000


class Judgement(NamedTuple):
    """A counted judgement that stands."""

    id: UUID
    author_id: UUID
    verdict: str
    correction: str | None = None
    preference: str | None = None
    adjudicates: bool = False


@dataclass(frozen=True)
class Judged:
    """A review item with the counted judgements that stand, oldest first."""

    interaction_id: UUID
    split: str
    group_key: str
    overlap_target: int
    state: str
    alternative: Mapping[str, Any] | None
    judgements: list[Judgement]

    @property
    def reviewers(self) -> tuple[str, ...]:
        return tuple(sorted({str(one.author_id) for one in self.judgements}))

    @property
    def deciding(self) -> Sequence[Judgement]:
        """The newest adjudication, which wins over all others, or everybody."""
        adjudicated = [one for one in self.judgements if one.adjudicates]
        return adjudicated[-1:] or self.judgements

    @property
    def annotation_ids(self) -> tuple[str, ...]:
        return tuple(str(one.id) for one in self.judgements)


class Text(NamedTuple):
    """What a logged interaction gives an example."""

    endpoint: str
    finish_reason: str
    adapter_digest: str | None
    messages: list[dict[str, Any]]
    output: str
    asked: dict[str, Any] | None = None


@dataclass
class Drafted:
    """Usable drafts, what was left out, and why corrections gave no pair."""

    drafts: list[Draft] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    pairs_left_out: Counter[str] = field(default_factory=Counter)


def read(session: Session, project_id: UUID, items: Sequence[UUID] | None = None) -> list[Judged]:
    """Every item of the project, or of `items`, that has a standing judgement; undone ones are as if never said."""
    chosen = [] if items is None else [among(ReviewItem.id, items)]
    rows = session.execute(
        select(
            ReviewItem.id, ReviewItem.interaction_id, ReviewItem.split, ReviewItem.group_key,
            ReviewItem.overlap_target, ReviewItem.state, ReviewItem.alternative,
            Annotation.id, Annotation.author_id, Annotation.verdict, Annotation.correction,
            Annotation.preference, Annotation.adjudicates,
        )
        .join(Annotation, Annotation.review_item_id == ReviewItem.id)
        .where(
            ReviewItem.project_id == project_id,
            ReviewItem.state.in_(STATES),
            Annotation.verdict.in_(reviews.COUNTED),
            reviews.standing(),
            *chosen,
        )
        .order_by(ReviewItem.interaction_id, Annotation.id)
    )  # fmt: skip
    found: dict[UUID, Judged] = {}
    for row in rows:
        item = Judged(row[1], row[2], row[3], row[4], row[5], row[6], [])
        found.setdefault(row[0], item).judgements.append(Judgement(*row[7:]))
    return list(found.values())


def draft_all(session: Session, project_id: UUID, judged: Sequence[Judged], retired: Retired) -> Drafted:
    """A draft for every item whose reviewers are enough and agree."""
    drafted = Drafted()
    for start in range(0, len(judged), TEXTS_AT_ONCE):
        batch = judged[start : start + TEXTS_AT_ONCE]
        texts = dict(_texts(session, [one.interaction_id for one in batch]))
        gone = [one.interaction_id for one in batch if one.interaction_id not in texts]
        kept = _earlier_examples(session, project_id, gone) if gone else {}
        for one in batch:
            outcome = _of_item(one, texts.get(one.interaction_id), kept.get(one.interaction_id), retired, drafted)
            if isinstance(outcome, Draft):
                drafted.drafts.append(outcome)
            else:
                drafted.left_out.append(LeftOut(one.interaction_id, outcome))
    return drafted


def _texts(session: Session, ids: Sequence[UUID]) -> Iterator[tuple[UUID, Text]]:
    """Those whose body is still in the log."""
    rows = session.execute(
        select(
            Interaction.id, Interaction.endpoint, Interaction.finish_reason, Interaction.adapter_digest,
            InteractionBody.messages, InteractionBody.output, InteractionBody.parameters,
        )
        .join(InteractionBody, InteractionBody.id == Interaction.id)
        .where(among(Interaction.id, ids))
    )  # fmt: skip
    return ((row[0], Text(row[1], row[2], row[3], row[4], row[5], beside(row[6]))) for row in rows)


def _of_item(
    one: Judged, logged: Text | None, earlier: Example | None, retired: Retired, drafted: Drafted
) -> Draft | str:
    """The draft, or why there is none."""
    doubt = unsettled(one)
    if doubt is not None:
        return doubt
    if logged is None:
        same = earlier is not None and tuple(earlier.annotation_ids) == one.annotation_ids
        return draft_of(earlier) if earlier is not None and same else "the log no longer holds it"
    if logged.endpoint != "/v1/chat/completions":
        return "not a chat"
    return draft(one, logged, retired, drafted.pairs_left_out)


def unsettled(one: Judged) -> str | None:
    """Why an item teaches nothing yet; None when its reviewers are enough and agree or a lead has decided."""
    needed = max(one.overlap_target, HELD_OUT_REVIEWERS if one.split == "held_out" else 1)
    if len(one.reviewers) < needed:
        return "needs another reviewer"
    decided = any(judgement.adjudicates for judgement in one.judgements)
    if not decided and (one.state == "disputed" or len({_said(each) for each in one.judgements}) > 1):
        return "reviewers disagree"
    return None


def draft(one: Judged, logged: Text, retired: Retired, pairs_left_out: Counter[str]) -> Draft | str:
    """What a settled item teaches, by its verdict, or why it teaches nothing."""
    last = one.deciding[0]
    if last.verdict == "prefer":
        return _preferred(one, logged, last, retired)
    if last.verdict == "accept":
        if logged.finish_reason == "length":
            return "accepted although cut off"
        return _draft(one, logged, "completion", "accepted", logged.output, None)
    if last.verdict == "reject":
        return _draft(one, logged, "unpaired", "rejected", None, logged.output)
    correction = _clean(last.correction or "")
    flaw = pair_flaw(correction, logged.output, logged.adapter_digest, retired)
    if flaw is not None:
        pairs_left_out[flaw] += 1
        return _draft(one, logged, "completion", "corrected", correction, None)
    return _draft(one, logged, "preference", "corrected", correction, logged.output)


def _preferred(one: Judged, logged: Text, last: Judgement, retired: Retired) -> Draft | str:
    other = str((one.alternative or {}).get("output") or "")
    if not other or last.preference not in ("response", "alternative"):
        return "a tie" if last.preference == "tie" else "a preference without its second answer"
    better, worse = (logged.output, other) if last.preference == "response" else (other, logged.output)
    flaw = pair_flaw(better, worse, logged.adapter_digest, retired)
    return flaw or _draft(one, logged, "preference", "preferred", better, worse)


def _draft(one: Judged, logged: Text, kind: str, source: str, completion: str | None, rejected: str | None) -> Draft:
    return Draft(
        kind=kind,
        source=source,
        split=one.split,
        # The guard asks: does what was right stay right? The target: does what was wrong become right?
        slice="accepted" if source == "accepted" else "target",
        group_key=one.group_key,
        messages=logged.messages,
        completion=completion,
        rejected=rejected,
        interaction_id=one.interaction_id,
        annotation_ids=one.annotation_ids,
        reviewers=one.reviewers,
        asked=logged.asked,
    )


def _said(judgement: Judgement) -> tuple[str, str]:
    return judgement.verdict, judgement.preference or _clean(judgement.correction or "")


def _clean(text: str) -> str:
    """What two reviewers typed alike must compare alike, and no model should learn a trailing blank."""
    return unicodedata.normalize("NFC", text).rstrip()


def _earlier_examples(session: Session, project_id: UUID, gone: Sequence[UUID]) -> dict[UUID, Example]:
    """Copies made by earlier builds, for interactions whose body has passed its retention."""
    wanted = select(Example).where(Example.project_id == project_id, among(Example.interaction_id, gone))
    newest = session.scalars(wanted.order_by(Example.id))
    return {example.interaction_id: example for example in newest if example.interaction_id is not None}
