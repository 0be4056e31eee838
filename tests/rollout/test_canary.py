"""The verdicts on heads, from requests that were made up: chance, gains, losses, drift and silence."""

import random
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from services.store.base import uuid7
from services.store.speculation import SpeculationConfig
from services.store.speculation_log import Counts, Request
from worker.rollout.canary import Arms, has_drifted, is_dead, judge_canary, judge_live
from worker.rollout.comparison import Ratio, compare

START = datetime(2026, 1, 1, tzinfo=UTC)
SOON = timedelta(minutes=5)
CONFIG = SpeculationConfig()


def request(
    choose: random.Random,
    at: float,
    *,
    length: float,
    rate: float,
    drafts: int = 0,
    accepted: float = 0.0,
    ahead: int = 1,
) -> Request:
    """An answer of about 50 tokens, `length` a step on average, as uneven as real ones are."""
    tokens = choose.randint(20, 80)
    own = max(1.0, choose.gauss(length, 0.3 * length))
    got = [_accepted(choose, ahead, accepted) for _ in range(drafts)]
    return Request(
        id=uuid7(), at=START + timedelta(seconds=at), speculator="h", tokens=tokens,
        steps=max(1, round(tokens / own)), rate=rate * choose.lognormvariate(0, 0.3),
        suffix=Counts(), heads=Counts(drafts, sum(got), sum(map(bool, got))),
    )  # fmt: skip


def _accepted(choose: random.Random, ahead: int, chance: float) -> int:
    """Tokens accepted of a draft so long, each with this chance where those before it were."""
    return next((place for place in range(ahead) if choose.random() >= chance), ahead)


def arm(choose: random.Random, count: int, *, length: float, rate: float, every: float = 1.0) -> list[Request]:
    return [request(choose, every * number, length=length, rate=rate) for number in range(count)]


def trial(seed: int, *, length: float, rate: float, count: int = 480) -> Arms:
    """A canary with a quarter of the traffic against an incumbent of 2 tokens a step and 100 a second."""
    choose = random.Random(seed)
    return Arms(
        arm(choose, count, length=2 * length, rate=100 * rate, every=3.0),
        arm(choose, 3 * count, length=2, rate=100),
    )


def outcome(seed: int, *, length: float, rate: float) -> tuple[str, int]:
    """What a canary came to, and after how many of its requests: decided when its data comes in, request by request."""
    arms = trial(seed, length=length, rate=rate)
    for count in range(0, len(arms.candidate) + 1, 20):
        candidates = arms.candidate[:count]
        until = candidates[-1].at if candidates else START
        seen = Arms(candidates, [one for one in arms.incumbent if one.at <= until])
        verdict = judge_canary(seen, SOON, CONFIG)
        if verdict.action != "wait":
            return verdict.action, count
    raise AssertionError("a canary must not wait for ever")


def outcomes(*, length: float, rate: float, trials: int = 40) -> Counter[str]:
    return Counter(outcome(seed, length=length, rate=rate)[0] for seed in range(trials))


def test_better_heads_are_promoted_at_the_first_look_mostly() -> None:
    assert outcomes(length=1.4, rate=1.3)["promote"] == 40
    assert [outcome(seed, length=1.4, rate=1.3)[1] for seed in range(20)].count(60) >= 18


def test_a_small_gain_takes_more_requests_and_is_found() -> None:
    found = outcomes(length=1.1, rate=1.06)
    assert found["promote"] >= 34
    assert found["roll_back"] == 0


def test_worse_heads_are_rolled_back_never_promoted() -> None:
    assert outcomes(length=0.8, rate=0.8) == {"roll_back": 40}
    longer_but_slower = outcomes(length=1.2, rate=0.8)
    assert longer_but_slower["promote"] == 0
    assert longer_but_slower["roll_back"] >= 38


def test_heads_that_change_nothing_are_withdrawn_and_seldom_misjudged() -> None:
    """Looking at every 20 requests must not add to the error: 100 trials without any difference."""
    found = outcomes(length=1.0, rate=1.0, trials=100)
    assert found["withdraw"] >= 88
    assert found["promote"] <= 5


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = Counter[str]()
    for seed in range(300):
        arms = trial(seed, length=1.2, rate=0.9, count=60)
        found = compare(*arms, z=1.96)
        # Both arms are drawn alike, so the ratio of the true means is that of the settings.
        covered["rate"] += found.rate.low <= 0.9 <= found.rate.high
        covered["length"] += found.length.low <= 1.2 <= found.length.high
    assert 270 <= covered["rate"] <= 297
    assert 270 <= covered["length"] <= 298


def test_one_stalled_request_does_not_decide() -> None:
    choose = random.Random(3)
    calm = arm(choose, 100, length=2, rate=100)
    stalled = [*calm[:-3], *(one._replace(rate=0.5) for one in calm[-3:])]
    assert compare(stalled, calm, z=2.5).rate.high > 1
    assert compare(stalled, calm, z=2.5).rate.estimate > 0.95


def test_too_few_requests_say_nothing() -> None:
    choose = random.Random(3)
    few = arm(choose, 4, length=9, rate=900)
    assert compare(few, arm(choose, 100, length=1, rate=100), z=2.5)[2:4] == (Ratio(), Ratio())
    assert judge_canary(Arms(arm(choose, 59, length=9, rate=900), few), SOON, CONFIG).action == "wait"


def test_an_undecided_canary_ends_with_its_time() -> None:
    arms = trial(1, length=1.0, rate=1.0, count=30)
    assert judge_canary(arms, timedelta(hours=23), CONFIG).action == "wait"
    verdict = judge_canary(arms, timedelta(hours=25), CONFIG)
    assert (verdict.action, verdict.evidence["requests"]) == ("withdraw", [30, 90])
    assert judge_canary(Arms([], []), timedelta(hours=25), CONFIG).action == "withdraw"


# --- live heads -------------------------------------------------------------------------------------------


def test_live_heads_that_fall_below_the_control_arm_are_rolled_back() -> None:
    choose = random.Random(5)
    control = arm(choose, 60, length=2, rate=100)
    for length, rate in ((1.4, 100.0), (2.4, 70.0)):
        verdict = judge_live(Arms(arm(choose, 600, length=length, rate=rate), control), [], CONFIG)
        assert verdict.action == "roll_back"
    assert judge_live(Arms(arm(choose, 600, length=2.4, rate=120), control), [], CONFIG).action == "wait"


def test_a_loaded_hour_alone_takes_no_heads_back() -> None:
    """Both arms are half as fast; the incumbent of a quiet hour was faster than either."""
    choose = random.Random(6)
    busy = Arms(arm(choose, 600, length=2.4, rate=60), arm(choose, 60, length=2, rate=50))
    before = arm(choose, 300, length=2, rate=100)
    assert judge_live(busy, before, CONFIG).action == "wait"
    assert judge_live(Arms(busy.candidate, []), before, CONFIG).action == "wait"


def test_without_a_control_arm_the_incumbent_of_before_is_the_measure() -> None:
    choose = random.Random(7)
    before = arm(choose, 300, length=2, rate=100)
    worse = Arms(arm(choose, 600, length=1.5, rate=100), [])
    assert judge_live(worse, before, CONFIG).action == "roll_back"
    assert judge_live(worse, [], CONFIG).action == "wait"
    assert judge_live(Arms(worse.candidate[:59], []), before, CONFIG).action == "wait"


def test_good_live_heads_survive_a_thousand_looks() -> None:
    choose = random.Random(8)
    live, control = arm(choose, 3000, length=2, rate=100), arm(choose, 300, length=2, rate=100)
    for start in range(1000):
        arms = Arms(live[start : start + 600], control[start // 10 : start // 10 + 60])
        assert judge_live(arms, [], CONFIG).action == "wait", start


# --- death and drift --------------------------------------------------------------------------------------


def drafted(accepted: Sequence[float], seed: int = 0, drafts: int = 12, ahead: int = 1) -> list[Request]:
    choose = random.Random(seed)
    return [
        request(choose, number, length=2, rate=100, drafts=drafts, accepted=chance, ahead=ahead)
        for number, chance in enumerate(accepted)
    ]  # fmt: skip


def test_acceptance_that_sticks_at_zero_is_dead_and_one_token_is_a_sign_of_life() -> None:
    dead = drafted([0.0] * 17)
    assert is_dead(dead, "heads")
    assert not is_dead(dead[:16], "heads"), "192 drafts are too few to tell"
    alive = dead[-1]._replace(heads=Counts(12, 1))
    assert not is_dead([*dead, alive], "heads")
    assert is_dead([alive, *dead], "heads"), "what was accepted before does not help"
    assert not is_dead(drafted([0.0] * 17, drafts=0), "heads")
    assert not is_dead([one._replace(suffix=one.heads) for one in dead], "suffix"), "nothing repeats in some traffic"


def test_drift_is_found_soon_and_never_without_it() -> None:
    """600 requests at 0.6 accepted a draft, then less; against 10 000 that stay as they are."""
    for seed in range(5):
        steady = drafted([0.6] * 10_000, seed)
        assert not has_drifted(steady), seed
        sunk = [*steady[:600], *drafted([0.45] * 300, seed + 100)]
        assert not has_drifted(sunk[:600])
        assert has_drifted(sunk), seed
    assert has_drifted([*drafted([0.6] * 600), *drafted([0.3] * 100, 1)])


def test_shorter_drafts_are_no_drift_and_less_acceptance_is() -> None:
    """On a busy engine drafts are one token long instead of four; what each token is worth stays the same."""
    for seed in range(5):
        long = drafted([0.6] * 600, seed, ahead=4)
        assert not has_drifted([*long, *drafted([0.6] * 2000, seed + 100)]), seed
        assert has_drifted([*long, *drafted([0.4] * 300, seed + 100, ahead=4)]), seed
        assert has_drifted([*long, *drafted([0.4] * 300, seed + 100)]), seed


def test_heads_that_get_better_or_have_hardly_begun_do_not_drift() -> None:
    assert not has_drifted([*drafted([0.4] * 300), *drafted([0.7] * 2000, 1)])
    assert not has_drifted([*drafted([0.9] * 200), *drafted([0.1] * 90, 1)])
    assert not has_drifted([])


def test_heads_that_were_always_right_drift_as_soon_as_they_are_not() -> None:
    assert has_drifted([*drafted([1.0] * 300), *drafted([0.9] * 50, 1)])


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_requests_without_drafts_do_not_count(share: float) -> None:
    choose = random.Random(2)
    requests = drafted([0.6] * 900)
    mixed = [one if choose.random() < share else one._replace(heads=Counts()) for one in requests]
    assert not has_drifted(mixed)
