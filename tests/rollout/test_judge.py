"""The judgement as a pure function: what it decides, what it waits for, and that it says why."""

import math
import random

import pytest
from scipy import stats

from services.store.rollout_config import Guardrails, RolloutConfig
from services.store.rollout_counts import MOST_WEIGHT, Arms, Moments
from worker.rollout import ratio
from worker.rollout.judge import Evidence, Verdict, judge
from worker.rollout.sequence import boundary, difference, heavier

CONFIG = RolloutConfig()


def arm(users: int, each: int, mean: float) -> Moments:
    """Users of `each` outcomes, of whom a share `mean` is all satisfied: the most that users can differ."""
    good = round(users * mean)
    w = float(min(each, MOST_WEIGHT))
    return Moments(users, users * each, users * w, good * w, good * w * w, good * w * w, users * w * w)


def evidence(canary: Moments, control: Moments, **metrics: tuple[Moments, Moments]) -> Evidence:
    found = {name: Arms(*arms) for name, arms in metrics.items()} | {"signal": Arms(canary, control)}
    return Evidence(found, (canary.n, control.n), (canary.users, control.users), 0.1)


def judged(canary: Moments, control: Moments, **metrics: tuple[Moments, Moments]) -> Verdict:
    return judge(evidence(canary, control, **metrics), CONFIG)


def test_too_few_users_decide_nothing_and_the_words_say_how_many_are_lacking() -> None:
    verdict = judged(arm(9, 50, 0.1), arm(81, 50, 0.9))
    assert (verdict.action, verdict.reason) == ("wait", "outcomes of 9 of the 10 users it takes of the candidate")


def test_no_outcome_at_all_is_told() -> None:
    verdict = judge(Evidence({}, (40, 360), (20, 180), 0.1), CONFIG)
    assert verdict.action == "wait"
    assert "no outcome of the candidate yet: apps have to send ratings" in verdict.reason


def test_a_harm_is_rolled_back_and_its_figures_are_told() -> None:
    verdict = judged(arm(150, 2, 0.6), arm(1350, 2, 0.9))
    assert verdict.action == "roll_back"
    assert verdict.reason.startswith("worse than what serves: −30.0 points [")
    assert "300 outcomes of 150 users against 2,700" in verdict.reason


def test_no_difference_is_promoted_once_harm_beyond_the_margin_is_excluded_and_not_before() -> None:
    assert judged(arm(100, 1, 0.9), arm(900, 1, 0.9)).action == "wait"
    verdict = judged(arm(1000, 1, 0.9), arm(9000, 1, 0.9))
    assert verdict.action == "promote"
    assert verdict.reason.startswith("no worse by 5 points or more: ")


def test_how_many_more_requests_it_takes_is_about_right() -> None:
    early = judged(arm(200, 1, 0.9), arm(1800, 1, 0.9))
    assert early.action == "wait"
    assert early.more is not None
    users = 200 + early.more // 10
    assert judged(arm(round(users * 1.15), 1, 0.9), arm(round(users * 9 * 1.15), 1, 0.9)).action == "promote"
    assert judged(arm(round(users * 0.8), 1, 0.9), arm(round(users * 9 * 0.8), 1, 0.9)).action == "wait"


def test_a_benefit_that_is_asked_for_has_to_be_shown() -> None:
    config = RolloutConfig(benefit=0.02)
    even = evidence(arm(3000, 1, 0.9), arm(27_000, 1, 0.9))
    assert judge(even, config).action == "wait"
    better = judge(evidence(arm(3000, 1, 0.96), arm(27_000, 1, 0.9)), config)
    assert (better.action, better.reason[:24]) == ("promote", "better by 2 points or mo")


def test_a_guardrail_that_trips_rolls_back_whatever_the_signal_says() -> None:
    fine = arm(1000, 1, 0.9), arm(9000, 1, 0.9)
    verdict = judged(*fine, errors=(arm(1000, 1, 0.08), arm(9000, 1, 0.01)))
    assert verdict.action == "roll_back"
    assert "requests that end in an error +7.0 points (tolerated: 1)" in verdict.reason
    [errors] = [guard for guard in verdict.guards if guard.name == "errors"]
    assert errors.state == "tripped"


def test_a_guardrail_that_looks_bad_holds_promotion_back() -> None:
    fine = arm(1000, 1, 0.9), arm(9000, 1, 0.9)
    verdict = judged(*fine, errors=(arm(100, 1, 0.03), arm(900, 1, 0.01)))
    assert verdict.action == "wait"
    assert "not certain yet" in verdict.reason


def test_a_guardrail_that_is_switched_off_says_nothing() -> None:
    config = RolloutConfig(guardrails=Guardrails(errors=None))
    found = evidence(arm(1000, 1, 0.9), arm(9000, 1, 0.9), errors=(arm(1000, 1, 0.5), arm(9000, 1, 0.0)))
    verdict = judge(found, config)
    assert verdict.action == "promote"
    assert "errors" not in {guard.name for guard in verdict.guards}


@pytest.mark.parametrize(("times", "state"), [(1.0, "fine"), (1.5, "fine"), (2.5, "tripped"), (0.3, "tripped")])
def test_length_may_drift_neither_way(times: float, state: str) -> None:
    def spread(mean: float, users: int) -> Moments:
        values = [mean + 0.3 * (-1) ** place for place in range(users)]
        total, squares = sum(values), sum(value * value for value in values)
        return Moments(users, users, users, total, squares, total, users)

    fine = arm(1000, 1, 0.9), arm(9000, 1, 0.9)
    verdict = judged(*fine, length=(spread(4 + math.log(times), 400), spread(4, 3600)))
    [length] = [guard for guard in verdict.guards if guard.name == "length"]
    assert length.state == state


def test_a_candidate_that_answers_nobody_is_seen_by_its_first_users() -> None:
    verdict = judge(
        Evidence({"errors": Arms(arm(8, 1, 1.0), arm(72, 1, 0.0))}, (8, 72), (8, 72), 0.1), CONFIG
    )  # fmt: skip
    assert verdict.action == "roll_back"


def test_an_outage_that_hits_both_arms_blames_nobody() -> None:
    verdict = judge(
        Evidence({"errors": Arms(arm(50, 1, 1.0), arm(450, 1, 1.0))}, (50, 450), (50, 450), 0.1), CONFIG
    )  # fmt: skip
    assert verdict.action == "wait"


def test_a_split_that_is_off_holds_everything_the_signal_would_decide() -> None:
    canary, control = arm(150, 2, 0.6), arm(1350, 2, 0.9)
    found = evidence(canary, control)._replace(users=(150, 600))
    verdict = judge(found, CONFIG)
    assert verdict.action == "hold"
    assert "20.0 % where 10 % were to" in verdict.reason


def test_the_split_test_stays_quiet_over_ten_thousand_looks_and_sees_a_loss() -> None:
    false = 0
    for seed in range(60):
        dice, canary, alarm = random.Random(seed), 0, False
        for users in range(1, 3001):
            canary += dice.random() < 0.1
            alarm |= ratio.check(canary, users - canary, 0.1).off
        false += alarm
    assert false == 0
    assert ratio.check(60, 940, 0.1).off
    assert not ratio.check(100, 900, 0.1).off


def test_alike_users_tell_less_than_as_many_requests() -> None:
    """A hundred requests of ten users who differ are not a hundred requests of a hundred."""
    few = difference(Arms(arm(10, 10, 0.5), arm(90, 10, 0.5)), 0.05, share=True)
    many = difference(Arms(arm(100, 1, 0.5), arm(900, 1, 0.5)), 0.05, share=True)
    assert few is not None
    assert many is not None
    assert few.high - few.low > 3 * (many.high - many.low)


def test_nobody_has_failed_yet_is_not_certainty() -> None:
    found = difference(Arms(arm(60, 1, 1.0), arm(540, 1, 1.0)), 0.05, share=True)
    assert found is not None
    assert found.low < -0.05


def test_one_user_of_an_arm_decides_nothing() -> None:
    assert difference(Arms(arm(1, 500, 0.0), arm(90, 10, 1.0)), 0.05, share=True) is None


def test_the_boundary_is_the_papers_and_the_tail_students() -> None:
    mixture = 250 * 7.9 / 250
    assert boundary(250, 0.05) == pytest.approx(math.sqrt((1 + 1 / mixture) * math.log((1 + mixture) / 0.0025)))
    for normal, freedom in ((3.0, 20.0), (3.4, 9.0), (2.6, 60.0)):
        exact = stats.t.isf(stats.norm.sf(normal), freedom)
        assert heavier(normal, freedom) == pytest.approx(exact, rel=0.03)


def test_a_brownian_motion_ever_leaves_the_boundary_as_rarely_as_it_says() -> None:
    """The bare boundary over a path that is looked at after every step; a fixed-sample bound fails this."""
    crossed = fixed = 0
    for seed in range(400):
        dice, total, out, naive = random.Random(seed), 0.0, False, False
        for count in range(1, 2001):
            total += dice.gauss(0, 1)
            z = abs(total) / math.sqrt(count)
            out |= z > boundary(count, 0.05)
            naive |= z > 1.96
        crossed += out
        fixed += naive
    assert crossed / 400 <= 0.05
    assert fixed / 400 > 0.3


def test_the_short_cut_judges_as_the_whole() -> None:
    dice = random.Random(4)
    for _ in range(300):
        size = dice.choice([8, 60, 400, 3000])
        metrics = {
            name: (arm(size, 1, dice.random() * most), arm(9 * size, 1, dice.random() * most))
            for name, most in (("errors", 0.05), ("latency", 0.2), ("refusals", 0.1), ("acceptance", 1.0))
        }
        found = evidence(arm(size, 1, 0.9 + dice.gauss(0, 0.02)), arm(9 * size, 1, 0.9), **metrics)
        whole, short = judge(found, CONFIG), judge(found, CONFIG, in_full=False)
        assert (whole.action, whole.reason) == (short.action, short.reason)
        assert [guard.state for guard in whole.guards] == [guard.state for guard in short.guards]
