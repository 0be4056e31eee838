"""How much is drafted: exactly the best there is by expected tokens a second, and what acceptance is believed."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import Generate, Sampling
from engine.scheduling.scheduler import Row
from engine.sequence import Sequence
from engine.speculation import acceptance
from engine.speculation.acceptance import (
    DECAY,
    HEADS_CELLS,
    STRENGTH,
    SUFFIX_CELLS,
    Acceptance,
    Counts,
    heads_cells,
    suffix_cells,
)
from engine.speculation.costs import StepCosts
from engine.speculation.drafting import LONGEST_PAUSE, Pause, second_gain
from engine.speculation.policy import HYSTERESIS, Adaptive, Batch, branch_pays, lengths
from engine.speculation.tries import LONGEST_REST, MOST_DRAFTED, PATIENCE, Speculation, Try, may_draft, most_drafted

chances = st.lists(st.floats(0.05, 1.0), max_size=4)
rises = st.lists(st.floats(0.0, 1.0), min_size=20, max_size=20)


def survival_of(each: list[float]) -> list[float]:
    alive, survival = 1.0, []
    for chance in each:
        alive *= chance
        survival.append(alive)
    return survival


def batch_of(rows: int, rise: list[float], room: int) -> Batch:
    """Costs that rise by these shares of the first token's."""
    costs = [1.0]
    for one in rise:
        costs.append(costs[-1] + one)
    return Batch(rows, costs, min(room, len(costs) - 1 - rows))


def rate(survivals: list[list[float]], taken: tuple[int, ...] | list[int], batch: Batch) -> float:
    """Expected tokens a second with so many of each row's drafted tokens."""
    gain = sum(sum(survival[:length]) for survival, length in zip(survivals, taken, strict=True))
    return (batch.tokens + gain) / batch.costs[batch.tokens + sum(taken)]


@given(each=st.lists(chances, min_size=1, max_size=4), others=st.integers(0, 3), rise=rises, room=st.integers(0, 12))
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
def test_lengths_are_the_best_of_all_there_are(
    each: list[list[float]], others: int, rise: list[float], room: int
) -> None:
    """Beside rows that cannot draft, too; every choice of lengths is tried."""
    survivals = [survival_of(one) for one in each]
    batch = batch_of(len(each) + others, rise, room)
    options = product(*[range(len(one) + 1) for one in survivals])
    best = max(rate(survivals, option, batch) for option in options if sum(option) <= batch.room)
    chosen = lengths(survivals, batch, drafting=True)
    assert sum(chosen) <= batch.room
    assert rate(survivals, chosen, batch) == pytest.approx(best, rel=1e-9)
    nothing = rate(survivals, [0] * len(each), batch)
    if best <= nothing * (1 + 1e-12):
        assert sum(chosen) == 0
    begun = lengths(survivals, batch, drafting=False)
    if best > nothing * HYSTERESIS * (1 + 1e-9):
        assert begun == chosen
    elif best < nothing * HYSTERESIS * (1 - 1e-9):
        assert sum(begun) == 0


def test_a_batch_that_does_not_draft_begins_only_for_more_than_five_percent() -> None:
    batch = Batch(1, [1.0, 1.0, 1.9, 3.0], 2)
    for chance, drafting, expected in ((0.98, False, 0), (0.98, True, 1), (0.88, True, 0), (1.0, False, 1)):
        assert lengths([[chance, 0.1]], batch, drafting=drafting) == [expected], (chance, drafting)


def test_the_surest_tokens_of_all_rows_go_first() -> None:
    """Room for three: where they do most good."""
    batch = Batch(3, [1.0] * 20, 3)
    assert lengths([[0.5, 0.4], [0.9, 0.8, 0.1], []], batch, drafting=True) == [1, 2, 0]
    assert lengths([[0.9], [0.8], [0.7, 0.6]], batch._replace(room=2), drafting=True) == [1, 1, 0]
    assert lengths([[0.9], [0.8], [0.7, 0.6]], batch._replace(room=0), drafting=True) == [0, 0, 0]


def test_the_floor_is_what_one_more_token_costs_in_tokens() -> None:
    assert Batch(2, [1.0, 1.0, 2.0, 2.5, 3.0, 3.5, 4.0], 4).floor == pytest.approx(0.5)
    assert Batch(2, [1.0, 1.0, 2.0, 2.0, 2.0], 2).floor == 0.0
    assert Batch(2, [1.0, 1.0, 2.0], 0).floor > 1
    # A flight of steps: the next token is free, but not those behind it.
    assert Batch(1, [1.0, 1.0, 1.0, 1.0, 1.0, 5.0], 4).floor == pytest.approx(1.0)


def test_a_batch_counts_the_rows_that_generate_and_leaves_room_for_prompts_beside() -> None:
    costs, rows = StepCosts(64), []
    for number, (prompt, computed, length) in enumerate(((9, 8, 1), (40, 39, 1), (50, 10, 20))):
        sequence = Sequence(
            b"", Generate(id=str(number), prompt=[5] * prompt, sampling=Sampling(seed=0, max_tokens=9)), 0, 99
        )
        sequence.computed = computed
        rows.append(Row(sequence, length))
    batch = Batch.of(rows, costs, 64)
    assert (batch.tokens, batch.room) == (2, 64 - 22)
    assert len(batch.costs) > batch.tokens + batch.room
    assert batch.seconds_per_token == batch.costs[2] / 2


def test_adaptive_takes_each_rows_better_proposal() -> None:
    short = Try("suffix", [1], [0], [0.9], Counts(1))
    long = Try("heads", [2, 3], [0, 0], [0.7, 0.6], Counts(1))
    batch = Batch(3, [1.0] * 20, 10)
    assert Adaptive().select([[short, long], [short], []], batch, drafting=True) == [(long, 2), (short, 1), (None, 0)]


def draft(tokens: list[int], survival: list[float]) -> Try:
    return Try("suffix", tokens, [0] * len(tokens), survival, Counts(1))


def test_a_second_draft_is_worth_what_the_first_one_leaves() -> None:
    first = draft([1, 2, 3], [0.8, 0.6, 0.5])
    # From the third token on it says something else: that the first two come is the same event.
    gain, length = second_gain(first, draft([1, 2, 9, 8], [0.7, 0.5, 0.4, 0.2]), 3)
    assert length == 4
    assert gain == pytest.approx((0.6 - 0.5) * (0.4 / 0.5 + 0.2 / 0.5))
    gain, length = second_gain(first, draft([9, 8], [0.5, 0.01]), 3)
    assert (gain, length) == (pytest.approx(0.2 * 0.5), 1), "a faint tail is left out"


@pytest.mark.parametrize(("tokens", "length"), [([1, 2], 3), ([1, 2, 3, 4], 3), ([1, 2, 9], 2), ([], 3)])
def test_a_second_draft_that_agrees_as_far_as_the_first_goes_is_worth_nothing(tokens: list[int], length: int) -> None:
    second = draft(tokens, [0.9**place for place in range(1, len(tokens) + 1)])
    assert second_gain(draft([1, 2, 3], [0.8, 0.6, 0.5]), second, length) == (0.0, 0)


def test_a_branch_pays_when_it_raises_the_rate_by_more_than_the_hysteresis() -> None:
    batch = Batch(1, [1.0, 1.0, 1.0, 1.1, 1.2, 2.0], 4)
    assert branch_pays(0.5, 2, 2, 1.5, batch)
    assert not branch_pays(0.3, 2, 2, 1.5, batch), "it costs as much as it brings"
    assert not branch_pays(9.0, 4, 2, 1.5, batch), "there is no room"
    assert branch_pays(0.08, 1, 1, 1.5, batch)
    assert not branch_pays(0.07, 1, 1, 1.5, batch)


# --- acceptance -----------------------------------------------------------------------------------------------------


def test_a_drafter_is_believed_until_it_was_seen() -> None:
    believed = Acceptance(4)
    assert believed.survival(believed.project("n"), [0, 1, 2], [0.5, 0.5, 1.0]) == pytest.approx([0.5, 0.25, 0.25])


def test_counts_decay_and_lean_on_everybodys_and_these_on_the_claim() -> None:
    believed = Acceptance(2)
    ours, theirs = believed.project("ours"), believed.project("theirs")
    for came in (True, True, False):
        believed.learn(theirs, 1, came)
    tried, accepted = DECAY**2 + DECAY + 1, DECAY**2 + DECAY
    assert (theirs.tried[1], theirs.accepted[1]) == pytest.approx((tried, accepted))
    everybody = (accepted + STRENGTH * 0.5) / (tried + STRENGTH)
    assert believed.survival(ours, [1], [0.5]) == pytest.approx([everybody])
    own = (accepted + STRENGTH * everybody) / (tried + STRENGTH)
    assert believed.survival(theirs, [1], [0.5]) == pytest.approx([own])
    assert believed.survival(theirs, [0], [0.5]) == pytest.approx([0.5]), "another cell knows nothing of it"


@pytest.mark.parametrize("truth", [0.0, 0.3, 0.9])
def test_what_is_believed_becomes_true_and_follows_when_it_changes(truth: float) -> None:
    believed = Acceptance(1)
    own = believed.project("n")
    for now in (truth, 1 - truth):
        for number in range(400):
            believed.learn(own, 0, int((number + 1) * now) > int(number * now))
        assert believed.survival(own, [0], [0.5])[0] == pytest.approx(now, abs=0.08)


@given(
    history=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.booleans()), max_size=60),
    claims=st.lists(st.tuples(st.integers(0, 3), st.floats(0.0, 1.0)), max_size=8),
)
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
def test_survival_is_a_probability_that_never_rises(
    history: list[tuple[str, int, bool]], claims: list[tuple[int, float]]
) -> None:
    believed = Acceptance(4)
    for name, cell, came in history:
        believed.learn(believed.project(name), cell, came)
    survival = believed.survival(believed.project("a"), [cell for cell, _ in claims], [claim for _, claim in claims])
    assert survival == sorted(survival, reverse=True)
    assert all(0.0 <= chance <= 1.0 for chance in survival)


def test_projects_are_bounded_and_forgotten_with_all_their_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "MOST_PROJECTS", 3)
    believed = Acceptance(1)
    kept = believed.project("kept", "heads")
    for number in range(5):
        believed.project(str(number))
        assert believed.project("kept", "heads") is kept
    assert len(believed._projects) == 3
    believed.forget("kept")
    assert believed.project("kept", "heads") is not kept


@given(match=st.integers(0, 100), claims=st.lists(st.floats(0.0, 1.0), max_size=MOST_DRAFTED))
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
def test_cells_are_in_range_and_the_surer_is_never_in_a_lower_one(match: int, claims: list[float]) -> None:
    for cells, most in ((suffix_cells(match, claims), SUFFIX_CELLS), (heads_cells(claims), HEADS_CELLS)):
        assert all(0 <= cell < most for cell in cells)
    surer = sorted(claims)
    assert [heads_cells([claim])[0] for claim in surer] == sorted(heads_cells([claim])[0] for claim in surer)
    assert suffix_cells(match + 1, [1.0])[0] >= suffix_cells(match, [1.0])[0]


# --- when a row is asked about ----------------------------------------------------------------------------------------


def test_a_row_that_is_never_foreseen_is_asked_about_less_and_less_and_at_once_again_when_it_is() -> None:
    state, asked = Speculation(), []
    for step in range(200):
        if not state.rests():
            asked.append(step)
            state.count(drafted=False)
    gaps = [after - before for before, after in pairwise(asked)]
    assert gaps[: PATIENCE - 1] == [1] * (PATIENCE - 1)
    assert gaps == sorted(gaps)
    assert max(gaps) == LONGEST_REST + 1
    while state.rests():
        continue
    state.count(drafted=True)
    assert not state.rests()


@pytest.mark.parametrize(("limit", "most"), [(12, 0), (13, 1), (14, 2), (100, MOST_DRAFTED)])
def test_no_more_is_drafted_than_the_answer_may_have(limit: int, most: int) -> None:
    request = Generate(id="a", prompt=[5] * 10, sampling=Sampling(seed=0, max_tokens=99))
    sequence = Sequence(b"", request, 0, limit)
    sequence.tokens += [6]
    sequence.computed = 10
    assert most_drafted(sequence) == most
    assert may_draft(Row(sequence, 1)) == (most > 0)
    assert not may_draft(Row(sequence, 0))


def test_a_batch_whose_drafts_do_not_earn_their_making_is_asked_ever_less() -> None:
    batch, pause, asked = Batch(16, [1.0 + 0.01 * tokens for tokens in range(64)], 40), Pause(), []
    for step in range(300):
        if not pause.holds(16):
            asked.append(step)
            pause.weigh(16, 0.5, 16.5, 4, batch)
    gaps = [after - before for before, after in pairwise(asked)]
    assert gaps[:4] == [2, 3, 5, 9]
    assert max(gaps) == LONGEST_PAUSE + 1
    assert len(asked) < 15


def test_a_batch_whose_drafts_earn_more_is_asked_in_every_step_again() -> None:
    batch, pause = Batch(4, [1.0] * 64, 40), Pause()
    for _ in range(6):
        pause.weigh(4, 5.0, 4.1, 4, batch)
    held = sum(pause.holds(4) for _ in range(100))
    assert held >= 31
    pause.weigh(4, 0.0, 40.0, 36, batch)
    assert not any(pause.holds(4) for _ in range(10))


def test_a_pause_ends_with_the_crowd_it_was_for() -> None:
    batch, pause = Batch(64, [1.0] * 200, 40), Pause()
    for _ in range(8):
        pause.weigh(64, 5.0, 64.1, 4, batch)
    assert pause.holds(60)
    assert not pause.holds(4)
