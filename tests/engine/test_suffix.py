"""The suffix drafter: what it drafts, whose text it drafts from, and how much it may keep."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.layers.sampler import Draw, sample
from engine.messages import Sampling
from engine.native import suffix as fast
from engine.native.sampling import available
from engine.speculation import corpora as limits
from engine.speculation import suffix as plain
from engine.speculation.corpora import LONGEST, Corpora, Memory, propose
from engine.speculation.suffix import NOTHING, SEPARATOR, WALK, Ask, Proposal, Rivals

needs_native = pytest.mark.skipif(not available(), reason="no C++ compiler")
BACKENDS = [False, pytest.param(True, marks=needs_native)]


def greedy(memory: Memory, most: int = 8) -> Proposal:
    (proposal,) = propose([memory], [None], [most])
    return proposal


def drawn(memory: Memory, seed: int, position: int = 0, most: int = 1) -> Proposal:
    draw = Draw(Sampling(seed=seed, temperature=0.7, max_tokens=1), 0, position)
    (proposal,) = propose([memory], [draw], [most])
    return proposal


def let_noise_vote(corpora: Corpora) -> None:
    kept = corpora.kept("a")
    assert kept is not None
    kept.noise = 1.0


@pytest.fixture(params=BACKENDS, ids=lambda native: "native" if native else "reference")
def native(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def corpora(native: bool) -> Corpora:
    return Corpora(native=native)


def test_a_request_drafts_from_its_own_prompt(corpora: Corpora) -> None:
    memory = corpora.open("a", [5, 6, 7, 8, 9, 1, 5, 6, 7])
    assert greedy(memory, most=2) == Proposal([8, 9], 3, [1.0, 1.0])


def test_a_request_drafts_from_what_it_was_given_later(corpora: Corpora) -> None:
    memory = corpora.open("a", [5, 6, 7, 8])
    assert greedy(memory) == NOTHING
    memory.extend([9, 5])
    memory.extend([6])
    assert greedy(memory, most=3).tokens == [7, 8, 9]


def test_a_request_drafts_from_the_answers_of_its_namespace_to_their_end(corpora: Corpora) -> None:
    corpora.learn("a", [5, 6, 7, 8, 9, 2])
    corpora.learn("a", [1, 1, 1])
    proposal = greedy(corpora.open("a", [0, 5, 6, 7]))
    assert (proposal.tokens, proposal.match) == ([8, 9, 2], 3)
    assert greedy(corpora.open("b", [0, 5, 6, 7])) == NOTHING


def test_one_place_is_less_sure_than_many_that_agree(corpora: Corpora) -> None:
    memory = corpora.open("a", [5, 6])
    shares = []
    for _ in range(4):
        corpora.learn("a", [5, 6, 7])
        shares.append(greedy(memory).shares[0])
    assert shares == sorted(set(shares))
    assert 0.5 < shares[0] < shares[-1] < 1


def test_votes_follow_the_longer_match(corpora: Corpora) -> None:
    corpora.learn("a", [3, 4, 5, 6, 7, 8])
    corpora.learn("a", [9, 9, 5, 6, 7, 1])
    assert greedy(corpora.open("a", [3, 4, 5, 6, 7]), most=1).tokens == [8]
    assert greedy(corpora.open("a", [9, 9, 5, 6, 7]), most=1).tokens == [1]


def test_places_that_contradict_the_draft_lose_their_vote(corpora: Corpora) -> None:
    for answer in ([5, 6, 7, 1, 1, 1], [5, 6, 7, 1, 1, 1], [5, 6, 8, 2, 2, 2]):
        corpora.learn("a", answer)
    assert greedy(corpora.open("a", [5, 6]), most=4).tokens == [7, 1, 1, 1]


def test_a_token_of_the_prompt_beats_a_more_frequent_one(corpora: Corpora) -> None:
    for name in (31, 32, 33, 33, 34):
        corpora.learn("a", [5, 6, 7, 8, name, 9])
    assert greedy(corpora.open("a", [1, 32, 1, 5, 6, 7, 8]), most=1).tokens == [32]


def test_the_newest_places_vote(corpora: Corpora) -> None:
    for token in [1] * WALK + [2] * WALK:
        corpora.learn("a", [5, 6, token])
    assert greedy(corpora.open("a", [5, 6]), most=1).tokens == [2]


def test_no_draft_crosses_from_one_answer_into_the_next(corpora: Corpora) -> None:
    for answer in ([4, 5], [6, 7, 8], [9, 9]):
        corpora.learn("a", answer)
    assert greedy(corpora.open("a", [4, 5])) == NOTHING
    assert greedy(corpora.open("a", [7, 8])) == NOTHING
    # Where one answer ends and the next begins nothing matches, save each alone.
    proposal = greedy(corpora.open("a", [5, 6]))
    assert (proposal.tokens, proposal.match) == ([7, 8], 1)


def test_the_draft_is_as_long_as_wished_and_never_longer_than_the_limit(corpora: Corpora) -> None:
    memory = corpora.open("a", [5] * 40)
    assert [len(greedy(memory, most).tokens) for most in (0, 1, 9, LONGEST, LONGEST + 9)] == [0, 1, 9, LONGEST, LONGEST]


def test_rows_are_answered_in_their_order(corpora: Corpora) -> None:
    corpora.learn("b", [1, 2, 3, 4])
    rows = [corpora.open("a", [7, 7]), corpora.open("b", [1, 2]), corpora.open("a", [0]), corpora.open("b", [2, 3])]
    together = propose(rows, [None] * 4, [3, 3, 3, 3])
    assert [each.tokens for each in together] == [[7, 7, 7], [3, 4], [], [4]]
    assert together == [greedy(memory, 3) for memory in rows]


def test_with_a_temperature_tokens_come_as_often_as_they_were_seen(corpora: Corpora) -> None:
    for token in [1] * 12 + [2] * 4:
        corpora.learn("a", [5, 6, token])
    memory = corpora.open("a", [5, 6])
    let_noise_vote(corpora)
    count = 2000
    ones = sum(drawn(memory, seed).tokens == [1] for seed in range(count))
    assert abs(ones / count - 0.75) < 4 * (0.75 * 0.25 / count) ** 0.5


def test_with_a_temperature_the_verifiers_noise_decides(corpora: Corpora) -> None:
    """Equal counts draft exactly the token that equal logits give at that position."""
    for token in (1, 2, 3, 4):
        corpora.learn("a", [8, 9, token])
    memory = corpora.open("a", [8, 9])
    let_noise_vote(corpora)
    logits = torch.full((1, 16), -1e9)
    logits[0, 1:5] = 0
    for seed in range(200):
        draw = Draw(Sampling(seed=seed, temperature=0.7, max_tokens=1), 0, seed % 7)
        assert drawn(memory, seed, seed % 7).tokens == sample(logits, [draw]).token_ids


TOKENS = st.integers(0, 3)
WORDS = st.lists(TOKENS, max_size=30)
DRAWS = st.none() | st.builds(
    lambda seed, temperature, choice, position: Draw(
        Sampling(seed=seed, temperature=temperature, max_tokens=1), choice, position
    ),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 3),
    st.integers(0, 99),
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("learn"), WORDS),
        st.tuples(st.just("extend"), WORDS),
        st.tuples(st.just("forget"), st.none()),
        st.tuples(st.just("open"), WORDS),
        st.tuples(st.just("propose"), st.tuples(DRAWS, st.integers(0, LONGEST + 2))),
    ),
    max_size=60,
)


@needs_native
@settings(max_examples=300, deadline=None)
@given(capacity=st.sampled_from([1, 2, 3, 4, 5, 9, 40, 300]), actions=ACTIONS)
def test_the_native_path_drafts_what_the_reference_drafts(capacity: int, actions: list[tuple[str, Any]]) -> None:
    both = [Corpora(native=native, capacity=capacity) for native in (True, False)]
    memories = [corpora.open("a", []) for corpora in both]
    for name, value in actions:
        if name == "learn":
            for corpora in both:
                corpora.learn("a", value)
        elif name == "extend":
            for memory in memories:
                memory.extend(value)
        elif name == "forget":
            for corpora in both:
                corpora.forget("a")
        elif name == "open":
            memories = [corpora.open("a", value) for corpora in both]
        else:
            draw, most = value
            found, expected = (propose([memory], [draw], [most])[0] for memory in memories)
            assert found._replace(shares=[]) == expected._replace(shares=[])
            assert found.shares == pytest.approx(expected.shares, rel=1e-12)
        assert len({tuple(each.tokens for each in corpora.status()) for corpora in both}) == 1


def test_noise_votes_where_it_has_drafted_better(corpora: Corpora) -> None:
    for token in [1] * 3 + [2] * 2:
        corpora.learn("a", [5, 6, token])
    memory, later, last = (corpora.open("a", [5, 6]) for _ in range(3))
    seed = next(seed for seed in range(99) if drawn(memory, seed).rivals is not None)
    assert drawn(memory, seed) == Proposal([1], 2, drawn(memory, seed).shares, Rivals(1, 2))
    memory.extend([2])
    assert drawn(later, seed).tokens == [2]
    later.extend([1])
    assert drawn(last, seed).tokens == [1]
    assert greedy(last).rivals is None


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 600),
    streams=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 400)), max_size=8),
    own=st.booleans(),
)
def test_the_native_index_survives_growth_and_many_laps(
    capacity: int, streams: list[tuple[int, int]], own: bool
) -> None:
    """Texts that repeat at long distances, so that tables fill, grow, and lose entries in the middle of clusters."""
    quick, slow = fast.Text(capacity, own=own), plain.Text(capacity, own=own)
    for first, count in streams:
        stream = [(first + i * i) % 257 for i in range(count)]
        asking = fast.Text(64, own=True), plain.Text(64, own=True)
        quick.extend([*stream, SEPARATOR])
        slow.extend([*stream, SEPARATOR])
        for text in asking:
            text.extend(stream[count // 2 : count // 2 + 5])
        assert len(quick) == len(slow)
        (found,) = fast.propose([Ask(asking[0], quick, None, 9, drawn=False)])
        (expected,) = plain.propose([Ask(asking[1], slow, None, 9, drawn=False)])
        assert (found.tokens, found.match) == (expected.tokens, expected.match)


def test_a_corpus_stays_within_its_bound(native: bool) -> None:
    """Answers of noise over a vocabulary of an eighth: nearly every n-gram is new, which is what fills tables most."""
    capacity = 1 << 14
    generator = random.Random(0)
    corpora = Corpora(native=native, capacity=capacity)
    sizes = []
    for _ in range(4):
        for _ in range(0, capacity, 64):
            corpora.learn("a", generator.choices(range(capacity // 8), k=63))
        (corpus,) = corpora.status()
        assert corpus.tokens == capacity
        sizes.append(corpus.bytes)
    assert max(sizes[1:]) <= 1.01 * min(sizes[1:])
    if native:
        assert len(set(sizes[1:])) == 1
        assert sizes[-1] <= 52 * capacity


def test_a_small_corpus_is_small() -> None:
    corpora = Corpora()
    corpora.learn("a", list(range(50)))
    assert corpora.status()[0].bytes < 100_000


def test_the_oldest_answers_leave_first(native: bool) -> None:
    corpora = Corpora(native=native, capacity=40)
    for word in range(10):
        corpora.learn("a", [word + 100, word + 200, word + 300, 2])
    found = [greedy(corpora.open("a", [word + 100, word + 200])).tokens != [] for word in range(10)]
    assert found == [False] * 2 + [True] * 8


def test_an_answer_longer_than_the_corpus_leaves_its_end(native: bool) -> None:
    corpora = Corpora(native=native, capacity=10)
    corpora.learn("a", list(range(100)))
    assert corpora.status()[0].tokens == 10
    assert greedy(corpora.open("a", [95, 96])).tokens == [97, 98, 99]
    assert greedy(corpora.open("a", [40, 41])) == NOTHING


def test_the_namespace_longest_unused_goes_first(native: bool) -> None:
    corpora = Corpora(native=native, most=2)
    corpora.learn("a", [1, 2, 3])
    corpora.learn("b", [1, 2, 4])
    corpora.open("a", [1])
    corpora.learn("c", [1, 2, 5])
    assert [each.namespace for each in corpora.status()] == ["a", "c"]
    assert greedy(corpora.open("b", [1, 2])) == NOTHING


def test_corpora_too_large_together_lose_the_longest_unused(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    corpora = Corpora(native=native)
    for name in "abc":
        corpora.learn(name, list(range(500)))
    one = max(corpus.bytes for corpus in corpora.status())
    monkeypatch.setattr(limits, "CORPORA_BYTES", 5 * one // 2)
    corpora.open("a", [1]).close()

    corpora.learn("c", [1])

    assert [corpus.namespace for corpus in corpora.status()] == ["a", "c"]
    monkeypatch.setattr(limits, "CORPORA_BYTES", 0)
    corpora.learn("a", [1])
    assert [corpus.namespace for corpus in corpora.status()] == ["a"], "what is used now stays"


def test_the_reference_is_kept_small_whatever_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REFERENCE_TOKENS", 100)
    monkeypatch.setattr(limits, "REFERENCE_OWN_TOKENS", 20)
    corpora = Corpora(native=False, capacity=1 << 20)
    corpora.learn("a", list(range(500)))
    memory = corpora.open("a", list(range(1000, 1500)))
    assert (corpora.capacity, corpora.status()[0].tokens, len(memory.own)) == (100, 100, 20)


def test_a_request_in_flight_loses_what_is_forgotten_and_keeps_its_own(corpora: Corpora) -> None:
    corpora.learn("a", [5, 6, 7, 8])
    memory = corpora.open("a", [5, 6])
    assert greedy(memory).tokens == [7, 8]
    corpora.forget("a")
    assert greedy(memory) == NOTHING
    memory.extend([9, 5, 6])
    assert greedy(memory, most=1).tokens == [9]
    assert corpora.status() == []


def test_forgetting_what_was_never_learnt_and_learning_nothing_are_harmless(corpora: Corpora) -> None:
    corpora.forget("a")
    corpora.learn("a", [])
    assert corpora.status() == []
    assert propose([], [], []) == []


def test_a_closed_memory_drafts_nothing(corpora: Corpora) -> None:
    corpora.learn("a", [5, 6, 7])
    memory, other = corpora.open("a", [5, 6]), corpora.open("a", [5, 6])
    memory.close()
    memory.close()
    assert [each.tokens for each in propose([memory, other], [None, None], [4, 4])] == [[], [7]]


TENANTS = {"a": st.integers(0, 2), "b": st.integers(10, 12), "c": st.integers(20, 22)}


@settings(max_examples=150, deadline=None)
@given(data=st.data(), fast_path=st.booleans())
def test_no_tenants_token_is_ever_drafted_for_another(data: st.DataObject, fast_path: bool) -> None:
    """Three tenants with alphabets of their own, two corpora at most, and rings that are soon full."""
    corpora = Corpora(native=fast_path, capacity=data.draw(st.sampled_from([7, 30])), most=2)
    alive: list[tuple[str, Memory]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        name = data.draw(st.sampled_from(sorted(TENANTS)))
        words = data.draw(st.lists(TENANTS[name], max_size=12))
        action = data.draw(st.sampled_from(["learn", "forget", "open", "extend", "close"]))
        mine = [each for each in alive if each[0] == name]
        if action == "learn":
            corpora.learn(name, words)
        elif action == "forget":
            corpora.forget(name)
        elif action == "open":
            alive.append((name, corpora.open(name, words)))
        elif mine and action == "extend":
            mine[0][1].extend(words)
        elif mine:
            alive.remove(mine[0])
            mine[0][1].close()
        for (owner, _), proposal in zip(
            alive, propose([memory for _, memory in alive], [None] * len(alive), [9] * len(alive)), strict=True
        ):
            assert {token // 10 for token in proposal.tokens} <= {ord(owner) - ord("a")}


def test_bounds_that_hold_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="one token or more"):
        Corpora(capacity=0)
    with pytest.raises(ValueError, match="one or more"):
        Corpora(most=0)
