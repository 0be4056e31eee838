"""Looks at every project's requests and carries out what they say of its heads; raises the alarm on dead drafters."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.errors import Conflict
from services.store import speculation_log, speculators
from services.store.base import Sessions
from services.store.models import Deployment, Project, Run
from services.store.speculation import Arm, Heads, SpeculationConfig, arm_of, read_config
from services.store.speculation_log import Request
from services.store.speculators import Decision, Seen
from worker.rollout.canary import (
    BLOCK,
    LOOKS,
    REFERENCE_BLOCKS,
    Arms,
    Verdict,
    has_drifted,
    is_dead,
    judge_canary,
    judge_live,
)

ACTOR = "rollout"
# Gateways poll their snapshot every second: a request that began sooner may not have known yet.
SETTLE = timedelta(seconds=5)
WATCHED = 2000
MOST_CANARY_ROWS = 50_000
ALARM_AGAIN = timedelta(days=1)
DEAD = "of many drafts not one token was accepted"

log = structlog.get_logger()


class Look(NamedTuple):
    """A project as it stood at the beginning of a look."""

    project_id: UUID
    slug: str
    adapter: str | None
    config: SpeculationConfig
    seen: Seen
    changed: datetime

    def arm(self, requests: Sequence[Request], arm: Arm, heads: Heads | None = None) -> list[Request]:
        """Those of an arm, under these heads or another deployment's. Who drafted with others says nothing of it."""
        named = heads or self.seen.heads
        fitting = (None, named.of(arm))
        return [one for one in requests if arm_of(one.id, self.config, named) == arm and one.speculator in fitting]

    def began(self, session: Session, kind: str, digest: str) -> datetime:
        """When heads were put there, and every gateway knew."""
        event = speculators.last_event(session, self.project_id, kind, digest)
        return (event.at if event else self.changed) + SETTLE

    def requests(
        self, session: Session, since: datetime, limit: int = WATCHED, *, newest: bool = True
    ) -> list[Request]:
        """What the adapter that serves answered since then."""
        return speculation_log.requests(session, self.project_id, self.adapter, since=since, limit=limit, newest=newest)


def incumbent(heads: Heads) -> Arm:
    """The arm that drafts as the project did before the canary."""
    return "live" if heads.live else "suffix"


class Watch:
    """Every project in turn. What it remembers only saves work: after a restart it looks at everything again."""

    def __init__(self) -> None:
        self.drifted: set[UUID] = set()
        self._last: dict[UUID, tuple[Look, UUID | None, datetime | None]] = {}

    def step(self, sessions: Sessions, now: datetime) -> None:
        """One look at each project; a decision that somebody else's change overtook is made again at the next."""
        with sessions() as session:
            looks = _projects(session)
        for look in looks:
            try:
                with sessions.begin() as session:
                    self._look(session, look, now)
            except Conflict as conflict:
                log.info("the heads changed meanwhile", project=look.slug, error=conflict.message)

    def _look(self, session: Session, look: Look, now: datetime) -> None:
        # A training that begins is news as well: drift is what it was started for.
        mark = (look, speculation_log.last_id(session, look.project_id), _last_training(session, look.project_id))
        known, self._last[look.project_id] = self._last.get(look.project_id), mark
        heads = look.seen.heads
        if heads.canary is not None and _look_at_canary(session, look, heads.canary, now, fresh=known != mark):
            return
        if known == mark:
            return
        self.drifted.discard(look.project_id)
        if heads.live is None:
            _look_at_suffix(session, look, now)
        elif not _look_at_live(session, look, heads.live) and _drifts(session, look, heads.live):
            self.drifted.add(look.project_id)


def _projects(session: Session) -> list[Look]:
    rows = session.execute(select(Project, Deployment).join(Deployment, Deployment.project_id == Project.id))
    looks = [
        Look(
            project.id,
            project.slug,
            row.active_digest,
            read_config(project.config),
            speculators.see(row),
            row.updated_at,
        )
        for project, row in rows
    ]
    return [look for look in looks if look.config.enabled]


def _look_at_canary(session: Session, look: Look, canary: str, now: datetime, *, fresh: bool) -> bool:
    """Whether the canary's trial ended; it can run out of time without a single request."""
    began = look.began(session, "speculator_canary", canary)
    if not fresh and now - began <= timedelta(hours=look.config.canary_hours):
        return False
    heads = look.seen.heads
    most = int(2 * LOOKS[-1] * look.config.canary_requests / max(heads.share, 0.01))
    requests = look.requests(session, began, min(most, MOST_CANARY_ROWS), newest=False)
    arms = Arms(look.arm(requests, "canary"), look.arm(requests, incumbent(heads)))
    verdict = _if_dead(session, look, canary, arms) or judge_canary(arms, now - began, look.config)
    if verdict.action == "wait" or not look.config.automatic:
        return False
    decision = Decision(ACTOR, verdict.reason, verdict.evidence, look.seen)
    if verdict.action == "promote":
        speculators.go_live(session, look.project_id, canary, decision)
    else:
        state = "rolled_back" if verdict.action == "roll_back" else "retired"
        speculators.withdraw_canary(session, look.project_id, decision, state=state)
    log.info("heads decided on", project=look.slug, digest=canary, action=verdict.action, reason=verdict.reason)
    return True


def _look_at_live(session: Session, look: Look, live: str) -> bool:
    """Whether the live heads were taken back."""
    requests = look.requests(session, look.began(session, "speculator_live", live))
    arms = Arms(look.arm(requests, "live"), look.arm(requests, "suffix"))
    verdict = _if_dead(session, look, live, arms) or judge_live(arms, _before(session, look, live), look.config)
    if verdict.action != "roll_back" or not look.config.automatic:
        return False
    decision = Decision(ACTOR, verdict.reason, verdict.evidence, look.seen)
    after = speculators.roll_back(session, look.project_id, decision)
    log.error(
        "live heads rolled back", alarm=True, project=look.slug, digest=live, reason=verdict.reason,
        now_drafts=after.speculator_digest or "the suffix drafter",
    )  # fmt: skip
    return True


def _before(session: Session, look: Look, live: str) -> list[Request]:
    """The incumbent's requests while these heads were tried; none when they went live without a trial."""
    trial = speculators.last_event(session, look.project_id, "speculator_canary", live)
    if trial is None:
        return []
    heads = Heads(trial.from_digest, live, float(trial.evidence.get("share", 0.0)))
    promoted = look.began(session, "speculator_live", live)
    requests = look.requests(session, trial.at + SETTLE, newest=False)
    return look.arm([one for one in requests if one.at < promoted], incumbent(heads), heads)


def _look_at_suffix(session: Session, look: Look, now: datetime) -> None:
    if is_dead(look.requests(session, now - ALARM_AGAIN), "suffix"):
        known = speculators.last_event(session, look.project_id, "speculator_alarm", None)
        if known is None or now - known.at > ALARM_AGAIN:
            _raise_alarm(session, look, None, "the suffix drafter")


def _if_dead(session: Session, look: Look, digest: str, arms: Arms) -> Verdict | None:
    """Heads of whose drafts nothing comes out are broken: the alarm, once, even where nobody may take them back."""
    if not is_dead([one for one in arms.candidate if one.speculator == digest], "heads"):
        return None
    if speculators.last_event(session, look.project_id, "speculator_alarm", digest) is None:
        _raise_alarm(session, look, digest, f"heads {digest[:12]}")
    return Verdict("roll_back", DEAD, {})


def _raise_alarm(session: Session, look: Look, digest: str | None, who: str) -> None:
    speculators.raise_alarm(session, look.project_id, digest, Decision(ACTOR, f"{who}: {DEAD}", {}, look.seen))
    log.error("acceptance is dead", alarm=True, project=look.slug, drafter=who)


def _drifts(session: Session, look: Look, live: str) -> bool:
    """Against these heads' first requests, or those after the last training: what that did not mend, another won't."""
    began = look.began(session, "speculator_live", live)
    began = max(began, _last_training(session, look.project_id) or began)
    first = look.requests(session, began, 2 * REFERENCE_BLOCKS * BLOCK, newest=False)
    requests = {one.id: one for one in [*first, *look.requests(session, began)] if one.speculator == live}
    return has_drifted([requests[key] for key in sorted(requests)])


def _last_training(session: Session, project_id: UUID) -> datetime | None:
    return session.scalar(
        select(func.max(Run.created_at)).where(Run.project_id == project_id, Run.kind == "speculator")
    )
