"""The queue against a model of it in plain Python: whatever people do, in whatever order, both say the same.

Leases, overlap, skips, escalations, disputes, adjudication, hidden checks, undo, leases that run out, and writers who
go round all of it. Every example starts from the same rows and is rolled back. `WHET_MACHINE_EXAMPLES` chooses another
number of them.
"""

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from services.errors import Conflict, WhetError
from services.store import gold, reviews, reviews_deciding
from services.store.base import Sessions, uuid7
from services.store.models import Annotation, Project, ReviewItem
from services.store.reviews import Judgement, LostLease
from tests.console import seed

EXAMPLES = int(os.environ.get("WHET_MACHINE_EXAMPLES", "2000"))
PARTS = 4  # so that two test processes share the work
STEPS = 6  # one of them may be a lease and a judgement together
COUNTED = ("accept", "reject", "correct")
TARGETS = (1, 2, 2, 3)
REVIEWERS, LEADS, ROLES = (0, 1, 2), (3, 4), ("reviewer", "lead")
PEOPLE = (*REVIEWERS, *LEADS)
people = st.sampled_from(PEOPLE)
places = st.integers(0, len(TARGETS) - 1)
whichever = st.integers(0, 11)  # of those there are: `pick`
verdicts = st.sampled_from((*COUNTED, *COUNTED, "skip", "escalate"))
T = TypeVar("T")


def pick(choices: Sequence[T], which: int) -> T:
    return choices[which % len(choices)]


@dataclass
class Said:
    """A judgement of the model. `kind` is counted, passed (skip, escalate), adjudicates or checked; `again` is said by
    somebody who had spoken of the item before."""

    id: uuid.UUID
    who: int
    verdict: str
    kind: str
    again: bool = False
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

    def may_decide(self, who: int) -> bool:
        """A lead who said nothing of it, or, where every lead has spoken, one who did and did not leave it since."""
        if not self.touched(who):
            return True
        if any(not self.touched(lead) for lead in LEADS if lead != who):
            return False
        mine = [(place, one) for place, one in enumerate(self.said) if one.who == who and not one.undone]
        said = [
            place for place, one in enumerate(self.said) if one.who != who and one.verdict in (*COUNTED, "escalate")
        ]
        left = [place for place, one in mine if one.verdict == "skip" and one.kind != "checked"]
        skipped = any(all(later < place for later in said) for place in left)
        return not skipped and not any(one.again for _, one in mine)

    def open_to(self, who: int, queue: str) -> bool:
        return self.may_decide(who) if queue != "open" else not self.touched(who)

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
        self.driver = cast("psycopg.Connection[Any]", connection.connection.driver_connection)
        self.project = self.session.get_one(Project, project_id)  # held, or each look at it would be a query
        rows = self.session.scalars(select(ReviewItem).order_by(ReviewItem.priority)).all()
        self.ids = [row.id for row in rows]
        self.items = [Item(target) for target in TARGETS]

    def teardown(self) -> None:
        self.session.rollback()
        self.session.close()

    # --- what people do ---------------------------------------------------------------------------------------

    @rule(who=people, verdict=verdicts)
    def judge(self, who: int, verdict: str) -> None:
        """What most people do most of the time: the next item, and a verdict."""
        self.lease(who, "open", 1, checks=False)
        mine = [place for place, item in enumerate(self.items) if item.holder == who and not item.ran_out]
        if mine:
            self._submit(mine[0], verdict)

    @precondition(lambda self: any(item.state in reviews_deciding.FOR_LEADS for item in self.items))
    @rule(who=st.sampled_from(LEADS), verdict=verdicts)
    def decide(self, who: int, verdict: str) -> None:
        """What a lead does about what waits for one."""
        for queue in ("disputed", "escalated"):
            self.lease(who, queue, 1, checks=False)
        mine = [place for place, item in enumerate(self.items) if item.holder == who and item.state != "open"]
        if mine:
            self._submit(mine[0], verdict)

    @rule(who=people, count=st.integers(1, 3), checks=st.booleans())
    def lease_some(self, who: int, count: int, checks: bool) -> None:
        self.lease(who, "open", count, checks)

    def lease(self, who: int, queue: str, count: int, checks: bool) -> None:
        mine = [item for item in self.items if item.holder == who and not item.ran_out
                and (item.state == queue or (queue == "open" and item.is_check))][:count]  # fmt: skip
        free = [item for item in self.items if item.state == queue and item.free and item.open_to(who, queue)]
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

    @precondition(lambda self: self._held())
    @rule(which=whichever, verdict=verdicts)
    def submit(self, which: int, verdict: str) -> None:
        self._submit(pick(self._held(), which), verdict)

    def _submit(self, place: int, verdict: str) -> None:
        item = self.items[place]
        assert item.holder is not None
        who, before = item.holder, item.state
        correction = "better" if verdict == "correct" else None
        sent = Judgement(verdict, str(uuid.uuid4()), correction=correction, comment="because")
        if before == "done" and not item.gold:
            return self._refused(place, who, sent, LostLease)
        again = item.touched(who)
        if again and not (item.state in ("disputed", "escalated") and item.may_decide(who)):
            return self._refused(place, who, sent, Conflict)
        if (again or item.state == "disputed") and verdict == "escalate":
            return self._refused(place, who, sent, WhetError)
        stored = self._send(place, who, sent)
        kind = "checked" if item.is_check else "passed" if verdict not in COUNTED else "counted"
        if (again or before == "disputed") and kind == "counted":
            kind = "adjudicates"
        assert (stored.checked, stored.adjudicates, stored.again) == (kind == "checked", kind == "adjudicates", again)
        item.said.append(Said(stored.id, who, verdict, kind, again))
        item.hold(None, None)
        if kind != "checked":
            item.settle()
        return None

    @rule(place=places, who=people, which=whichever)
    def try_what_nobody_may(self, place: int, who: int, which: int) -> None:
        if which % 2 and self._forbidden():
            self._write_past_every_check(which // 2)
        elif self.items[place].holder != who:
            self._refused(place, who, Judgement("accept", str(uuid.uuid4()), comment="mine"), Conflict)

    @precondition(lambda self: any(item.said for item in self.items))
    @rule(which=whichever, back=st.integers(0, 3))
    def undo(self, which: int, back: int) -> None:
        item = pick([item for item in self.items if item.said], which)
        undone = item.said[-1 - back % len(item.said)]
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

    @precondition(lambda self: self._held())
    @rule(which=whichever)
    def release(self, which: int) -> None:
        place = pick(self._held(), which)
        item = self.items[place]
        if item.state != "done" or item.is_check:
            assert item.token is not None
            assert item.holder is not None
            reviews.release(self.session, self.project_id, self.ids[place], self.users[item.holder], item.token)
            item.hold(None, None)

    @precondition(lambda self: self._held())
    @rule(which=whichever)
    def the_lease_runs_out(self, which: int) -> None:
        place = pick(self._held(), which)
        self.session.execute(
            update(ReviewItem)
            .where(ReviewItem.id == self.ids[place])
            .values(lease_expires_at=func.now() - func.make_interval(0, 0, 0, 0, 0, 0, 1))
            .execution_options(synchronize_session=False)
        )
        self.session.expire_all()
        self.items[place].ran_out = True

    @precondition(lambda self: any(len(item.said) > 1 for item in self.items))
    @rule(which=whichever)
    def make_gold(self, which: int) -> None:
        place = pick([place for place, item in enumerate(self.items) if len(item.said) > 1], which)
        item = self.items[place]
        decided = [one for one in item.live if one.kind == "adjudicates" and not one.again]
        agreed = [] if len({one.verdict for one in item.counted}) > 1 or len(item.counted) < 2 else item.counted
        certain = item.state == "done" and (decided or agreed)
        row = reviews.lock_item(self.session, self.project_id, self.ids[place])
        if certain:
            gold.mark(self.session, row, self.users[3])
            assert row.gold is not None
            assert row.gold["verdict"] == (decided or agreed)[-1].verdict
            item.gold = True
        else:
            with pytest.raises(Conflict):
                gold.mark(self.session, row, self.users[3])

    def _write_past_every_check(self, which: int) -> None:
        """What no row lock of ours guards, the database itself refuses."""
        place, who = pick(self._forbidden(), which)
        row = {
            "id": uuid7(), "project_id": self.project_id, "review_item_id": self.ids[place],
            "interaction_id": uuid.uuid4(), "author_id": self.users[who], "idempotency_key": str(uuid.uuid4()),
            "verdict": "accept", "tags": [], "spans": [], "assisted": False,
        }  # fmt: skip
        with pytest.raises(IntegrityError), self.session.begin_nested():
            self.session.execute(insert(Annotation).values(row))

    def _held(self) -> list[int]:
        return [place for place, item in enumerate(self.items) if item.holder is not None]

    def _forbidden(self) -> list[tuple[int, int]]:
        """Places and people: the item has all its judgements, or this person has spoken of it."""
        return [
            (place, who) for place, item in enumerate(self.items) for who in PEOPLE
            if len(item.counted) == item.target or any(one.who == who and not one.again for one in item.live)
        ]  # fmt: skip

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
        # Past the ORM, which would answer from what it remembers, and would take most of this test's time.
        found = self.driver.execute(
            "SELECT state, judged, lease_user_id, gold IS NOT NULL FROM review_item ORDER BY priority"
        ).fetchall()
        holders = [None if item.holder is None else self.users[item.holder] for item in self.items]
        assert found == [
            (item.state, len(item.counted), holder, item.gold) for item, holder in zip(self.items, holders, strict=True)
        ]

    @invariant()
    def nobody_judges_twice_and_overlap_is_exact(self) -> None:
        for item in self.items:
            assert len(item.counted) <= item.target
            assert len({(one.who, one.again) for one in item.live}) == len(item.live)
            assert all(one.who in LEADS for one in item.live if one.again)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(PARTS))
def test_the_queue_and_its_model_agree(sessions: Sessions, part: int) -> None:
    with sessions.begin() as session:
        project: Project = seed.project(session, gold_share=0.5)
        users = [seed.person(session, f"{n}@example.org", ROLES[n in LEADS]).user.id for n in PEOPLE]
        for place, target in enumerate(TARGETS):
            logged = seed.interaction(session, project.id, output=f"answer {place}")
            seed.item(session, logged, overlap=target, priority=place)
    with sessions.kw["bind"].connect() as connection, connection.begin():
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            lambda: Queue(connection, project.id, users),
            settings=settings(
                max_examples=EXAMPLES // PARTS, stateful_step_count=STEPS, deadline=None, database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
        connection.rollback()
