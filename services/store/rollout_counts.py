"""What a canary is judged by: every user's requests added up, by metric and arm, each request exactly once.

Answers are counted in the order in which they finished, up to a moment that everything has landed before; what is still
on its way is counted by a later look. A look costs what is new since the last one, however long the canary goes on.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from services.errors import NO_SLOT, Conflict
from services.store import engine_reports
from services.store.models import Interaction, Rollout, RolloutCount
from services.store.pages import first_id
from services.store.refusals import READ, REFUSAL

SIGNAL = "signal"
# Every request, whatever became of it: what the split of the users is read from.
ROUTED = "routed"
ARMS = ("canary", "control")
# One user's word counts as that of so many requests at most, however many they send.
MOST_WEIGHT = 20
# Landing takes the shipper less, as long as anything lands at all; after the second span nothing more is waited for.
LANDS_WITHIN = timedelta(seconds=10)
QUIET = timedelta(seconds=60)
# No answer takes longer.
LONGEST = timedelta(minutes=15)
REFERENCE_ANSWERS = 2000
LEAST_REFERENCE = 100
P95 = 0.95
UNIT = """
    md5(:salt || CASE WHEN i.end_user IS NOT NULL THEN 'u:' || i.end_user
                      WHEN i.session_key IS NOT NULL THEN 's:' || i.session_key
                      ELSE 'k:' || coalesce(i.api_key_id::text, '') || ':' || i.group_key END)
"""
# Whether an answer is that of its arm's weights, on the base model that they were trained on.
OURS = """
    i.adapter_digest IS NOT DISTINCT FROM CASE i.arm WHEN 'canary' THEN :digest ELSE cast(:baseline AS text) END
"""
# An engine started with another base model serves neither arm, and one with too few slots refuses what it has no room
# for: no weights are at fault.
FIT = """
    (i.base_digest = (SELECT a.base_digest FROM artifact a WHERE a.digest = :digest)
     AND i.error IS DISTINCT FROM :no_slot)
"""
# Speed and drafts are compared where no heads drafted: heads belong to one adapter, and the candidate has none yet.
ANSWERS = f"""
    SELECT i.arm, {UNIT} AS unit, m.metric, count(*) AS n, sum(m.value) AS total
    FROM interaction i LEFT JOIN interaction_body b ON b.id = i.id AND b.id >= :floor,
    LATERAL (SELECT i.finish_reason IN ('stop', 'length') AND served.ours AND served.fit AS answered,
                    served.ours AND served.fit AS ours, served.fit, i.speculator_digest IS NULL AS plain,
                    i.speculator_digest IS NULL AND i.started_at >= cast(:loaded AS timestamptz) AS timed
             FROM (SELECT {OURS} AS ours, {FIT} AS fit) served) s,
    LATERAL (VALUES
        ('{ROUTED}', 0.0),
        ('errors', CASE WHEN s.fit THEN (i.finish_reason = 'error' OR NOT s.ours)::int::float END),
        ('latency', CASE WHEN s.answered AND s.timed THEN (i.latency_ms > cast(:latency AS float))::int::float END),
        ('ttft', CASE WHEN s.answered AND s.timed THEN (i.ttft_ms > cast(:ttft AS float))::int::float END),
        ('length', CASE WHEN s.answered THEN ln(1 + i.completion_tokens) END),
        ('refusals', CASE WHEN s.answered AND b.output IS NOT NULL
                          THEN (left(b.output, {READ}) ~* :refusal)::int::float END),
        ('acceptance', CASE WHEN s.answered AND s.plain AND i.drafted_tokens > 0
                            THEN i.accepted_tokens::float / i.drafted_tokens END),
        ('signal', CASE cast(:signal AS text)
             WHEN 'logprob' THEN CASE WHEN s.answered THEN i.mean_logprob END
             WHEN 'implicit' THEN CASE WHEN s.ours AND i.finish_reason IN ('stop', 'length', 'cancelled') THEN
                 (i.finish_reason <> 'cancelled' AND NOT EXISTS (
                     SELECT FROM feedback f WHERE f.interaction_id = i.id
                     AND (f.rating < 0 OR f.correction IS NOT NULL)))::int::float END END)
    ) m(metric, value)
    WHERE i.project_id = :project AND i.id >= :floor AND i.origin = 'live' AND i.generation = :generation
      AND i.arm IN ('canary', 'control') AND i.finished_at >= :since AND i.finished_at < :until
      AND i.finish_reason <> 'interrupted' AND m.value IS NOT NULL
    GROUP BY 1, 2, 3
"""
# Some speak before the answer is whole: what they say counts with it.
FEEDBACK = f"""
    SELECT i.arm, {UNIT} AS unit, 'signal' AS metric, count(*) AS n, sum(m.value) AS total
    FROM feedback f JOIN interaction i ON i.id = f.interaction_id,
    LATERAL (SELECT CASE WHEN f.correction IS NOT NULL THEN 0.0
                         WHEN f.rating IS NOT NULL THEN (f.rating + 1) / 2.0
                         ELSE least(1, greatest(0, (f.score - :worst) / (:best - :worst))) END AS value) m
    WHERE f.project_id = :project
      AND greatest(f.created_at, i.finished_at) >= :since AND greatest(f.created_at, i.finished_at) < :until
      AND i.id >= :began AND i.project_id = :project AND i.origin = 'live' AND i.generation = :generation
      AND i.arm IN ('canary', 'control') AND m.value IS NOT NULL
      AND {OURS} AND {FIT}
    GROUP BY 1, 2
"""
OUTPUTS = f"""
    SELECT i.arm, {UNIT} AS unit, b.output, b.parameters
    FROM interaction i JOIN interaction_body b ON b.id = i.id AND b.id >= :floor
    WHERE i.project_id = :project AND i.id >= :floor AND i.origin = 'live' AND i.generation = :generation
      AND i.arm IN ('canary', 'control') AND i.finished_at >= :since AND i.finished_at < :until
      AND i.finish_reason IN ('stop', 'length')
      AND {OURS} AND {FIT}
"""


class Moments(NamedTuple):
    """One arm's outcomes of a metric over its users. A user of n outcomes has weight w = min(n, MOST_WEIGHT) and y = w
    times their mean outcome; the sums are over users."""

    users: int
    n: int
    w: float
    y: float
    yy: float
    yw: float
    ww: float


class Arms(NamedTuple):
    """The same metric in both arms."""

    canary: Moments
    control: Moments


class Output(NamedTuple):
    """An answer that has to be read before it counts."""

    arm: str
    unit: str
    output: str
    parameters: dict[str, Any]


class Span(NamedTuple):
    """What one look counts: answers that finished in [since, until).

    Those that began before `loaded` (None: all) may have waited for their weights, and tell nothing of speed.
    """

    since: datetime
    until: datetime
    loaded: datetime | None


NONE = Moments(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0)


def next_span(
    session: Session,
    rollout: Rollout,
    now: datetime,
    *,
    lands_within: timedelta = LANDS_WITHIN,
    quiet: timedelta = QUIET,
) -> Span:
    """From where the last look ended to what has surely landed: a while before the newest answer that has."""
    since = rollout.folded_until or rollout.canary_at or now
    newest = session.scalar(
        select(func.max(Interaction.finished_at)).where(
            Interaction.project_id == rollout.project_id, Interaction.id >= first_id(since - LONGEST)
        )
    )
    landed = max((newest or since) - lands_within, now - quiet)
    weights = {digest for digest in (rollout.digest, rollout.baseline_digest) if digest is not None}
    loaded = engine_reports.loaded_since(session, rollout.project_id, weights, now)
    return Span(since, max(since, min(landed, now - lands_within)), loaded)


def fold(session: Session, rollout: Rollout, span: Span, read: Iterable[tuple[Output, float]] = ()) -> None:
    """Add a span's answers and feedback; `read` are outcomes of answers that somebody else had to judge.

    Raises Conflict when another dispatcher was faster: then nothing of this transaction may stay.
    """
    # First, as whoever ends the trial holds its row before its counts go.
    moved = session.scalar(
        update(Rollout)
        .where(Rollout.id == rollout.id, Rollout.folded_until.is_not_distinct_from(rollout.folded_until))
        .where(Rollout.stage == "canary", Rollout.generation == rollout.generation)
        .values(folded_until=span.until)
        .returning(Rollout.id)
        .execution_options(synchronize_session=False)
    )
    if moved is None:
        raise Conflict("another look at this canary was faster")
    signal = str(rollout.config.get("signal", "feedback"))
    _add(session, rollout, ANSWERS, _given(rollout, span) | {"signal": signal, "refusal": REFUSAL})
    if signal == "feedback":
        worst, best = rollout.config.get("score_range") or (0.0, 1.0)
        _add(session, rollout, FEEDBACK, _given(rollout, span) | {"worst": worst, "best": best})
    _add_read(session, rollout, read)


def outputs(session: Session, rollout: Rollout, span: Span) -> list[Output]:
    """A span's answers with their text."""
    rows = session.execute(text(OUTPUTS), _used(OUTPUTS, _given(rollout, span)))
    return [Output(row.arm, row.unit, row.output, row.parameters) for row in rows]


def moments(session: Session, rollout_id: UUID) -> Mapping[str, Arms]:
    """The sums a judgement is made from, by metric."""
    rows = session.execute(
        text("""
            SELECT metric, arm, count(*) AS users, sum(n)::bigint AS n, sum(w) AS w, sum(y) AS y, sum(y * y) AS yy,
                   sum(y * w) AS yw, sum(w * w) AS ww
            FROM (SELECT metric, arm, n, least(n, :most)::float AS w, total / n * least(n, :most) AS y
                  FROM rollout_count WHERE rollout_id = :rollout) u
            GROUP BY metric, arm
        """),
        {"rollout": rollout_id, "most": MOST_WEIGHT},
    )
    found: dict[str, dict[str, Moments]] = {}
    for metric, arm, *sums in rows:
        found.setdefault(metric, {})[arm] = Moments(*sums)
    return {metric: Arms(*(arms.get(arm, NONE) for arm in ARMS)) for metric, arms in found.items()}


def reference(session: Session, project_id: UUID, adapter: str | None) -> dict[str, float]:
    """Latency and time to first token that one answer in twenty of what serves exceeds; empty while there are few.

    Only answers without heads, as in the comparison.
    """
    recent = (
        select(Interaction.latency_ms, Interaction.ttft_ms)
        .where(
            Interaction.project_id == project_id, Interaction.origin == "live",
            Interaction.adapter_digest.is_not_distinct_from(adapter), Interaction.speculator_digest.is_(None),
            Interaction.finish_reason.in_(("stop", "length")), Interaction.latency_ms.is_not(None),
            Interaction.id >= first_id(datetime.now(UTC) - timedelta(days=7)),
        )
        .order_by(Interaction.id.desc())
        .limit(REFERENCE_ANSWERS)
        .subquery()
    )  # fmt: skip
    quantile = func.percentile_cont(P95)
    count, latency, ttft = session.execute(
        select(func.count(), quantile.within_group(recent.c.latency_ms), quantile.within_group(recent.c.ttft_ms))
    ).one()
    if count < LEAST_REFERENCE:
        return {}
    found = {"latency": latency, "ttft": ttft}
    return {name: round(value, 3) for name, value in found.items() if value is not None}


def _given(rollout: Rollout, span: Span) -> dict[str, Any]:
    began = (rollout.canary_at or span.since) - timedelta(seconds=1)
    return {
        "project": rollout.project_id, "generation": rollout.generation, "digest": rollout.digest,
        "baseline": rollout.baseline_digest, "no_slot": NO_SLOT,
        "salt": rollout.salt, "since": span.since, "until": span.until, "loaded": span.loaded,
        # What is said of an answer may come long after it; answers themselves are no older than the longest one.
        "began": first_id(began), "floor": first_id(max(began, span.since - LONGEST)),
        "latency": rollout.reference.get("latency"), "ttft": rollout.reference.get("ttft"),
    }  # fmt: skip


def _add(session: Session, rollout: Rollout, query: str, given: Mapping[str, Any]) -> None:
    known = _used(query, given)
    statement = f"""
        INSERT INTO rollout_count (rollout_id, metric, arm, unit, n, total)
        SELECT :rollout, s.metric, s.arm, s.unit, s.n, s.total FROM ({query}) s
        ON CONFLICT (rollout_id, metric, arm, unit)
        DO UPDATE SET n = rollout_count.n + excluded.n, total = rollout_count.total + excluded.total
    """
    session.execute(text(statement), {**known, "rollout": rollout.id})


def _used(query: str, given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if f":{name}" in query}


def _add_read(session: Session, rollout: Rollout, read: Iterable[tuple[Output, float]]) -> None:
    sums: dict[tuple[str, str], tuple[int, float]] = {}
    for output, value in read:
        n, total = sums.get((output.arm, output.unit), (0, 0.0))
        sums[output.arm, output.unit] = (n + 1, total + value)
    if not sums:
        return
    rows = [
        {"rollout_id": rollout.id, "metric": SIGNAL, "arm": arm, "unit": unit, "n": n, "total": total}
        for (arm, unit), (n, total) in sums.items()
    ]
    statement = insert(RolloutCount)
    added = {name: getattr(RolloutCount, name) + getattr(statement.excluded, name) for name in ("n", "total")}
    key = ["rollout_id", "metric", "arm", "unit"]
    session.execute(statement.on_conflict_do_update(index_elements=key, set_=added), rows)
