"""The queue against a model of it in plain Python: whatever people do, in whatever order, both say the same.

Leases, overlap, skips, escalations, disputes, adjudication, hidden checks, undo, leases that run out, and writers who
go round all of it. Every example starts from the same rows and is rolled back. The suite runs EXAMPLES of them;
`WHET_MACHINE_EXAMPLES=2000 .venv/bin/python -m pytest tests/console/test_reviews_machine.py` runs more.
"""

import os
import uuid
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from services.errors import Conflict, WhetError
from services.store import gold, reviews
from services.store.base import Sessions, uuid7
from services.store.models import Annotation, Project, ReviewItem
from services.store.reviews import Judgement, LostLease
from tests.console import seed

EXAMPLES = int(os.environ.get("WHET_MACHINE_EXAMPLES", "300"))
STEPS = 12
COUNTED = ("accept", "reject", "correct")
TARGETS = (1, 2, 2, 3)
REVIEWERS, LEADS = (0, 1, 2), (3, 4)
PEOPLE = (*REVIEWERS, *LEADS)
people = st.sampled_from(PEOPLE)
places = st.integers(0, len(TARGETS) - 1)


@dataclass
class Said:
    """A judgement of the model. `kind` is counted, passed (skip, escalate), adjudicates or checked."""

    id: uuid.UUID
    who: int
    verdict: str
    kind: str
    undone: bool = False


@dataclass
class Item:
    """What the model knows of an item. `holder` keeps it until it runs out and somebody else takes it."""

    target: int
    said: list[Said] = field(default_factory=list)
    state: str = "open"
    gold: bool = False
    holder: int | None = None
    token: uuid.UUID | None = None
    ran_out: bool = False

    @property
    def live(self) -> list[Said]:
        return [one for one in self.said if not one.undone]

    @property
    def counted(self) -> list[Said]:
        return [one for one in self.live if one.kind == "counted"]

    @property
    def is_check(self) -> bool:
        return self.state == "done" and self.gold

    @property
    def free(self) -> bool:
        return self.holder is None or self.ran_out

    def touched(self, who: int) -> bool:
        return any(one.who == who for one in self.live)

    def settle(self) -> None:
        spoken = [one for one in self.live if one.kind != "checked" and one.verdict != "skip"]
        if any(one.kind == "adjudicates" for one in self.live):
            self.state = "done"
        elif len(self.counted) == self.target:
            self.state = "done" if len({one.verdict for one in self.counted}) == 1 else "disputed"
        else:
            self.state = "escalated" if spoken and spoken[-1].verdict == "escalate" else "open"
        self.gold = self.gold and self.state == "done"

    def hold(self, who: int | None, token: uuid.UUID | None) -> None:
        self.holder, self.token, self.ran_out = who, token, False


class Queue(RuleBasedStateMachine):
    """One queue of four items and five people; two of them lead."""

    def __init__(self, connection: Connection, project_id: uuid.UUID, users: list[uuid.UUID]) -> None:
        super().__init__()
        self.session = Session(connection, join_transaction_mode="create_savepoint", expire_on_commit=False)
        self.project_id, self.users = project_id, users
        rows = self.session.scalars(select(ReviewItem).order_by(ReviewItem.priority)).all()
        self.ids = [row.id for row in rows]
        self.items = [Item(target) for target in TARGETS]

    def teardown(self) -> None:
        self.session.rollback()
        self.session.close()

    # --- what people do ---------------------------------------------------------------------------------------

    @rule(who=people, queue=st.sampled_from(("open", "open", "open", "disputed", "escalated")), count=st.integers(1, 3),
          checks=st.booleans())  # fmt: skip
    def lease(self, who: int, queue: str, count: int, checks: bool) -> None:
        if queue != "open" and who not in LEADS:
            return
        mine = [item for item in self.items if item.holder == who and not item.ran_out
                and (item.state == queue or (queue == "open" and item.is_check))][:count]  # fmt: skip
        free = [item for item in self.items if item.state == queue and item.free and not item.touched(who)]
        new = free[: count - len(mine)]
        hidden = [item for item in self.items if item.is_check and item.free and not item.touched(who)]
        got = reviews.lease(
            self.session, self.project_id, self.users[who], count, queue=queue, chance=lambda: 0.0 if checks else 1.0
        )
        held = [self.items[self.ids.index(row.id)] for row in got]
        wanted = min(len(new), len(hidden)) if checks and queue == "open" else 0
        assert held[: len(mine)] == mine
        assert [item for item in held[len(mine) :] if not item.is_check] == new[: len(new) - wanted]
        assert sum(item.is_check for item in held[len(mine) :]) == wanted
        assert all(item in hidden or item in new for item in held[len(mine) :])
        for item, row in zip(held, got, strict=True):
            item.hold(who, row.lease_token)

    @rule(place=places, verdict=st.sampled_from((*COUNTED, *COUNTED, "skip", "escalate")))
    def submit(self, place: int, verdict: str) -> None:
        item = self.items[place]
        if item.holder is None:
            return None
        who, before = item.holder, item.state
        correction = "better" if verdict == "correct" else None
        sent = Judgement(verdict, str(uuid.uuid4()), correction=correction, comment="because")
        if before == "done" and not item.gold:
            return self._refused(place, who, sent, LostLease)
        if item.state == "disputed" and verdict == "escalate":
            return self._refused(place, who, sent, WhetError)
        stored = self._send(place, who, sent)
        kind = "checked" if item.is_check else "passed" if verdict not in COUNTED else "counted"
        if before == "disputed" and kind == "counted":
            kind = "adjudicates"
        assert (stored.checked, stored.adjudicates) == (kind == "checked", kind == "adjudicates")
        item.said.append(Said(stored.id, who, verdict, kind))
        item.hold(None, None)
        if kind != "checked":
            item.settle()
        return None

    @rule(place=places, who=people)
    def submit_without_the_lease(self, place: int, who: int) -> None:
        if self.items[place].holder != who:
            self._refused(place, who, Judgement("accept", str(uuid.uuid4()), comment="mine"), Conflict)

    @rule(place=places, back=st.integers(0, 3))
    def undo(self, place: int, back: int) -> None:
        item = self.items[place]
        if len(item.said) <= back:
            return
        undone = item.said[-1 - back]
        first = not undone.undone
        row = reviews.undo(self.session, self.project_id, self.users[undone.who], undone.id)
        undone.undone = True
        if first:
            if undone.kind != "checked":
                item.settle()
            if self._waits_for(item, undone) and (item.free or item.holder == undone.who):
                assert row.lease_user_id == self.users[undone.who]
                item.hold(undone.who, row.lease_token)

    def _waits_for(self, item: Item, undone: Said) -> bool:
        if undone.kind == "checked":
            return item.is_check
        if item.state == "escalated":
            asked = [place for place, one in enumerate(item.said) if one.verdict == "escalate" and not one.undone]
            return undone.verdict in COUNTED and item.said.index(undone) > max(asked)
        return item.state == "open" or (item.state == "disputed" and undone.kind == "adjudicates")

    @rule(place=places)
    def release(self, place: int) -> None:
        item = self.items[place]
        if item.holder is not None and (item.state != "done" or item.is_check):
            assert item.token is not None
            reviews.release(self.session, self.project_id, self.ids[place], self.users[item.holder], item.token)
            item.hold(None, None)

    @rule(place=places)
    def the_lease_runs_out(self, place: int) -> None:
        if self.items[place].holder is not None:
            self.session.execute(
                update(ReviewItem)
                .where(ReviewItem.id == self.ids[place])
                .values(lease_expires_at=func.now() - func.make_interval(0, 0, 0, 0, 0, 0, 1))
                .execution_options(synchronize_session=False)
            )
            self.session.expire_all()
            self.items[place].ran_out = True

    @rule(place=places)
    def make_gold(self, place: int) -> None:
        item = self.items[place]
        decided = [one for one in item.live if one.kind == "adjudicates"]
        certain = item.state == "done" and (decided or len(item.counted) > 1)
        row = reviews.lock_item(self.session, self.project_id, self.ids[place])
        if certain:
            gold.mark(self.session, row, self.users[3])
            assert row.gold is not None
            assert row.gold["verdict"] == (decided or item.counted)[-1].verdict
            item.gold = True
        else:
            with pytest.raises(Conflict):
                gold.mark(self.session, row, self.users[3])

    @rule(place=places, who=people)
    def write_past_every_check(self, place: int, who: int) -> None:
        """What no row lock of ours guards, the database itself refuses."""
        item = self.items[place]
        if len(item.counted) < item.target and not item.touched(who):
            return
        row = {
            "id": uuid7(), "project_id": self.project_id, "review_item_id": self.ids[place],
            "interaction_id": uuid.uuid4(), "author_id": self.users[who], "idempotency_key": str(uuid.uuid4()),
            "verdict": "accept", "tags": [], "spans": [], "assisted": False,
        }  # fmt: skip
        with pytest.raises(IntegrityError), self.session.begin_nested():
            self.session.execute(insert(Annotation).values(row))

    def _send(self, place: int, who: int, sent: Judgement) -> Annotation:
        token = self.items[place].token or uuid.uuid4()
        user = self.users[who]
        return reviews.submit(self.session, self.project_id, self.ids[place], user, token, sent).annotation

    def _refused(self, place: int, who: int, sent: Judgement, error: type[WhetError]) -> None:
        with pytest.raises(error), self.session.begin_nested():
            self._send(place, who, sent)

    # --- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def both_say_the_same(self) -> None:
        rows = self.session.execute(
            select(ReviewItem.state, ReviewItem.judged, ReviewItem.lease_user_id, ReviewItem.gold.is_not(None))
            .order_by(ReviewItem.priority)
        )  # fmt: skip
        found = [tuple(row) for row in rows]
        holders = [None if item.holder is None else self.users[item.holder] for item in self.items]
        assert found == [
            (item.state, len(item.counted), holder, item.gold) for item, holder in zip(self.items, holders, strict=True)
        ]

    @invariant()
    def nobody_judges_twice_and_overlap_is_exact(self) -> None:
        for item in self.items:
            assert len(item.counted) <= item.target
            assert len({one.who for one in item.live}) == len(item.live)


def test_the_queue_and_its_model_agree(sessions: Sessions) -> None:
    with sessions.begin() as session:
        project: Project = seed.project(session, gold_share=0.5)
        users = [seed.person(session, f"{n}@example.org", "lead").user.id for n in PEOPLE]
        for place, target in enumerate(TARGETS):
            logged = seed.interaction(session, project.id, output=f"answer {place}")
            seed.item(session, logged, overlap=target, priority=place)
    with sessions.kw["bind"].connect() as connection, connection.begin():
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            lambda: Queue(connection, project.id, users),
            settings=settings(
                max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
        connection.rollback()
