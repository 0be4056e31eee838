"""What drafting earned: rates, intervals, drafters and choices out of the log, and the sentences about them."""

import math
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from services.console.speed_view import in_words, when_heads_come
from services.store import drafts, speed
from services.store.base import Sessions
from services.store.models import Interaction, Project, Run
from services.store.speculation import SpeculationConfig
from tests.console import seed_speed
from tests.console.seed_speed import answer

CONFIG = SpeculationConfig()
SUFFIX = {"drafts": 2, "won": 2, "tried": [2, 2, 1], "accepted": [2, 1, 0], "lengths": [0, 0, 1, 1]}
TWIN = {"drafts": 1, "won": 0, "tried": [1], "accepted": [1], "lengths": [0, 1]}
Land = Callable[..., None]


@pytest.fixture
def land(sessions: Sessions, project: Project) -> Land:
    """`land(rate=…, ago=seconds)` logs an answer."""
    dice = random.Random(0)

    def landed(
        *, rate: float = 100.0, ago: float = 60.0, speculation: dict[str, Any] | None = None, **values: object
    ) -> None:
        at = datetime.now(UTC) - timedelta(seconds=ago)
        made = answer(project, at, dice, speculation=speculation, rate=rate, **{"tokens": 51, **values})  # type: ignore[arg-type]
        with sessions.begin() as session:
            session.add(made)

    return landed


def measured(sessions: Sessions, project: Project) -> speed.Speed:
    with sessions() as session:
        return speed.measure(session, project.id)


def drafted(sessions: Sessions, project: Project) -> drafts.Drafting:
    with sessions() as session:
        return drafts.drafting(session, project.id, speed.window(session, project.id))


# --- rates ------------------------------------------------------------------------------------------------


def test_answers_with_drafts_are_compared_with_the_baseline_and_with_nothing_else(
    sessions: Sessions, project: Project, land: Land
) -> None:
    for place in range(6):
        land(rate=200 + 10 * place)
        land(rate=100 + 5 * place, speculated=False)
        land(rate=9999, origin="evaluation")
        land(rate=9999, finish_reason="error")
        land(rate=9999, tokens=7)
    found = measured(sessions, project)
    assert found.drafted is not None
    assert found.plain is not None
    assert (found.drafted.answers, found.plain.answers) == (6, 6)
    # Tokens over seconds, not the mean of rates.
    assert found.drafted.value == pytest.approx(6 / sum(1 / (200 + 10 * place) for place in range(6)), rel=1e-6)
    assert found.gain is not None
    assert found.gain.times == pytest.approx(2.0, rel=1e-6)
    assert 1.7 < found.gain.low < 2.0 < found.gain.high < 2.4


def test_intervals_hold_what_they_promise() -> None:
    """Of 400 samples of six answers whose true rate is 100, about 95 % must have it in their interval."""
    dice, held = random.Random(5), 0
    for _ in range(400):
        pairs = [(float(tokens), tokens / 100 * dice.gauss(1, 0.1)) for tokens in dice.choices(range(20, 90), k=6)]
        t, s = (sum(pair[side] for pair in pairs) for side in (0, 1))
        sums = speed.Sums(
            6, t, s, sum(a * a for a, _ in pairs), sum(a * b for a, b in pairs), sum(b * b for _, b in pairs)
        )
        found = speed._rate(sums)
        assert found is not None
        held += (found.low or 0) < 100 < (found.high or math.inf)
    assert 0.9 < held / 400 < 0.985


def test_one_answer_has_a_rate_and_no_interval(sessions: Sessions, project: Project, land: Land) -> None:
    land(rate=120)
    found = measured(sessions, project)
    assert found.drafted == speed.Rate(1, pytest.approx(120, rel=1e-6), None, None)
    assert (found.plain, found.gain, found.compared) == (None, None, 0)


def test_a_young_projects_window_is_its_own_age_and_an_old_ones_a_day(
    sessions: Sessions, project: Project, land: Land
) -> None:
    land(ago=900)
    found = measured(sessions, project)
    assert (found.window.until - found.window.since).total_seconds() == pytest.approx(900, abs=20)
    assert len(found.spans) == speed.SPANS
    assert [place for place, span in enumerate(found.spans) if span.drafted] == [0]
    land(ago=23 * 3600)
    assert measured(sessions, project).window.since < found.window.since
    assert measured(sessions, project).drafted is not None


def test_a_project_without_answers_has_an_empty_window(sessions: Sessions, project: Project) -> None:
    found = measured(sessions, project)
    assert (found.drafted, found.plain, found.gain) == (None, None, None)
    assert found.window.until - found.window.since == speed.SHORTEST
    assert drafted(sessions, project).drafters == []


def test_only_the_newest_rows_of_a_span_are_read(
    sessions: Sessions, project: Project, land: Land, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "MOST_ROWS", 3)
    for place in range(9):
        land(rate=50 if place < 6 else 150, ago=290 - place / 10)
    found = measured(sessions, project)
    assert found.drafted is not None
    assert (found.drafted.answers, found.drafted.value) == (3, pytest.approx(150, rel=1e-6))


def test_the_rows_are_found_by_the_index(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed_speed.sped_up(session, project, size=300)
        seen = speed.window(session, project.id)
        session.execute(text("SET LOCAL enable_seqscan = off"))
        for query in (speed._rates(project.id, seen), drafts._documents(project.id, seen)):
            made = query.compile(session.get_bind(), compile_kwargs={"render_postcompile": True})
            explained = session.connection().exec_driver_sql(f"EXPLAIN {made}", dict(made.params))
            plan = "\n".join(explained.scalars())
            assert "project_id_id" in plan, plan
            assert "Seq Scan" not in plan, plan


# --- drafts -----------------------------------------------------------------------------------------------


def test_drafters_add_up_and_heads_are_told_apart_by_digest(sessions: Sessions, project: Project, land: Land) -> None:
    told = {"steps": 8, "suffix": SUFFIX, "heads": TWIN}
    for digest in ("a" * 64, "a" * 64, "c" * 64):
        land(tokens=12, speculation=told, digest=digest)
    land(tokens=20)
    land(tokens=30, speculated=False)
    found = drafted(sessions, project)
    assert [(one.name, one.digest, one.drafts, one.drafted, one.accepted) for one in found.drafters] == [
        ("suffix", None, 6, 15, 9), ("heads", "a" * 64, 2, 2, 2), ("heads", "c" * 64, 1, 1, 1),
    ]  # fmt: skip
    assert found.drafters[0].reached == [1.0, 0.5, 0.0]
    assert found.drafters[0].per_draft == 1.5
    # An answer that nothing was drafted for took a step for each token; the baseline's are no choice of the policy.
    assert (found.answers, found.per_step) == (4, (3 * 12 + 20) / (3 * 8 + 20))


def test_a_step_counts_for_the_draft_it_went_on_with(sessions: Sessions, project: Project, land: Land) -> None:
    land(tokens=12, speculation={"steps": 8, "suffix": SUFFIX, "heads": TWIN}, ago=299)
    choice = drafted(sessions, project).choices[0]
    assert (choice.steps, choice.suffix, choice.heads, choice.none) == (8, 0.25, 0.0, 0.75)
    assert choice.length == 6 / 3


def test_response_tokens_stop_where_they_are_enough(sessions: Sessions, project: Project, land: Land) -> None:
    for _ in range(3):
        land(tokens=40)
    land(tokens=40, origin="evaluation")
    with sessions() as session:
        assert drafts.response_tokens(session, project.id, 1000) == 120
        assert drafts.response_tokens(session, project.id, 100) == 100


def test_one_answers_figures(project: Project) -> None:
    told = {"steps": 8, "suffix": SUFFIX, "heads": TWIN}
    made = answer(project, datetime.now(UTC), random.Random(0), speculation=told, rate=80, digest="d", tokens=31)
    assert speed.of_answer(made) == pytest.approx(80)
    assert [(one.name, one.digest, one.accepted) for one in drafts.of_answer(made)] == [
        ("suffix", None, 3), ("heads", "d", 1),
    ]  # fmt: skip
    short = Interaction(completion_tokens=3, ttft_ms=1.0, latency_ms=9.0)
    assert speed.of_answer(short) is None


# --- words ------------------------------------------------------------------------------------------------


def speed_of(gain: speed.Gain | None, plain: int = 30) -> speed.Speed:
    now = datetime.now(UTC)
    rates = [speed.Rate(count, value, None, None) if count else None for count, value in ((900, 241.0), (plain, 101.0))]
    return speed.Speed(speed.Window(now, now, []), [], *rates, gain)


@pytest.mark.parametrize(
    ("gain", "plain", "changes", "expected"),
    [
        (speed.Gain(2.386, 2.11, 2.7), 30, {}, "2.39 times as fast as without drafts (95 % interval 2.11 to 2.70)"),
        (speed.Gain(2.386, 2.11, 2.7), 30, {}, "241 against 101 tokens a second"),
        (speed.Gain(1.02, 0.95, 1.09), 30, {}, "No difference to decoding without drafts is shown yet: 1.02"),
        (speed.Gain(0.8, 0.7, 0.9), 30, {}, "slows this project down, to 0.80 of the speed"),
        (None, 3, {}, "one answer in 50 is served without drafts, to measure by, and 3 of the 5"),
        (None, 0, {"baseline_share": 0.0}, "serves no baseline"),
        (None, 30, {"enabled": False}, "switched off"),
    ],
)  # fmt: skip
def test_the_ratio_in_words(gain: speed.Gain | None, plain: int, changes: dict[str, Any], expected: str) -> None:
    assert expected in in_words(speed_of(gain, plain), CONFIG.model_copy(update=changes))


@pytest.mark.parametrize(
    ("tokens", "run", "automatic", "expected"),
    [
        (12_300, None, True, "Heads train themselves after 50,000 response tokens; 12,300 so far."),
        (12_300, None, False, "Heads are worth training after 50,000 response tokens"),
        (50_000, None, True, "the first ones are started within minutes"),
        (50_000, None, False, "only when somebody asks"),
        (50_000, Run(state="running", phase="training"), True, "being trained now"),
        (50_000, Run(state="succeeded", phase="refused"), True, "ended refused. Heads are trained again once"),
    ],
)
def test_when_heads_come(tokens: int, run: Run | None, automatic: bool, expected: str) -> None:
    assert expected in when_heads_come(CONFIG.model_copy(update={"automatic": automatic}), tokens, run)
