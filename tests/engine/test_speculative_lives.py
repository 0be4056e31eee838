"""Requests that draft, whatever happens to them: preempted, cancelled, short of blocks; and whose text is whose."""

import random
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from engine.core import Engine
from engine.memory.blocks import BlockPool
from engine.messages import Forget, Generate, Learn, Sampling
from engine.scheduling.scheduler import Row, Scheduler
from engine.sequence import Sequence
from engine.speculation.tries import Try
from services.gateway.speculating import DrafterCounts
from tests.engine.constraining import VOCABULARY
from tests.engine.drafters import Oracle, pair
from tests.engine.fake_world import check_blocks, check_prefix
from tests.engine.lossless import (
    CLIENT,
    DRAWN,
    GREEDY,
    accepted,
    asks,
    check_equal,
    command,
    force,
    plain,
    run,
    started,
)


@pytest.fixture(scope="module")
def core(talking_model: Path) -> Iterator[Engine]:
    with started(talking_model, step_tokens=128) as core:
        yield core


@pytest.mark.parametrize("prefix", [True, False])
def test_a_full_cache_makes_drafts_shorter_and_takes_nobodys_place(
    talking_model: Path, prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fourteen at once where there is room for a few: many are preempted, but never for a draft."""
    with started(talking_model, kv_tokens=256, step_tokens=128, prefix_cache=prefix) as core:
        requests = asks([GREEDY, *DRAWN, GREEDY], copies=2, seed=51, tokens=90)
        slow = plain(core, requests)
        oracle = Oracle(slow, VOCABULARY)
        preempted: list[int] = []
        real = Scheduler._preempt

        def preempt(self: Scheduler, sequence: Sequence) -> None:
            held = {each: len(each.blocks) - self.pool.needed(len(each.tokens)) for each in self.running}
            assert not any(extra > 0 for extra in held.values()), "blocks held for drafts, and somebody preempted"
            preempted.append(len(sequence.tokens))
            real(self, sequence)

        monkeypatch.setattr(Scheduler, "_preempt", preempt)
        for drafters in ((oracle.wrong,), (oracle.partly,), pair(oracle)):
            preempted.clear()
            force(core, *drafters)
            fast = run(core, requests, lambda _: check_state(core))
            check_equal(fast, slow)
            assert preempted
            drafted = [draft.drafted for answer in fast.values() for draft in answer.drafts]
            assert min(drafted) < 5
            assert len(drafted) > 50


def check_state(core: Engine) -> None:
    """Between two steps nobody holds what is not counted, branches least of all."""
    check_blocks(core)
    if core.scheduler.prefix is not None:
        check_prefix(core)


def test_cancels_at_any_moment_leave_nothing_behind(core: Engine) -> None:
    requests = asks([GREEDY, *DRAWN], copies=4, seed=53, tokens=60)
    slow = plain(core, requests)
    for seed in range(4):
        dice = random.Random(seed)
        force(core, *pair(Oracle(slow, VOCABULARY, seed=seed)))
        victims = {dice.randrange(1, 12): request.id for request in dice.sample(requests, 16)}

        def between(step: int, victims: dict[int, str] = victims) -> None:
            if step in victims:
                core.cancel(CLIENT, victims[step])
            check_state(core)

        fast = run(core, requests, between)
        ends = {name: answer.ending[0] for name, answer in fast.items()}
        assert 4 < sum(end == "cancelled" for end in ends.values()) < len(requests)
        for name, answer in fast.items():
            if ends[name] == "cancelled":
                assert answer.tokens == slow[name].tokens[: len(answer.tokens)]
            else:
                assert answer.tokens == slow[name].tokens


def test_a_step_that_fails_with_drafts_and_branches_in_it_leaks_nothing(
    core: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it fails before or after the branch's blocks were taken; the next requests are answered as ever.

    Where only guessing fails, nobody hears of it.
    """
    requests = asks([GREEDY, *DRAWN], copies=2, seed=55)
    slow = plain(core, requests)
    force(core, *pair(Oracle(slow, VOCABULARY)))
    places = ((core.runner, "step"), (core.drafting, "choose"), (core.drafting, "_branches"), (core, "_prepare"))
    for owner, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing(getattr(owner, name)))
            broken = run(core, requests, lambda _: check_state(core))
        failed = [answer for answer in broken.values() if "made to fail" in (answer.ending[2] or "")]
        assert bool(failed) == (name != "_branches")
        if not failed:
            check_equal(broken, slow)
        check_equal(run(core, requests), slow)


def failing(real: Callable[..., object]) -> Callable[..., object]:
    """The same, but the fourth call fails."""
    calls = count()

    def explode(*given: object) -> object:
        if next(calls) == 3:
            raise RuntimeError("made to fail")
        return real(*given)

    return explode


def test_who_says_so_never_drafts_and_who_says_so_is_never_learnt(core: Engine) -> None:
    requests = asks([GREEDY, *DRAWN], seed=57, namespace="quiet")
    force(core)
    for one in (replace(each, learn=False) for each in requests):
        run(core, [one])
    assert "quiet" not in held(core)
    told = run(core, [replace(each, speculate=False, learn=True) for each in requests])
    assert not any(answer.drafts for answer in told.values())
    assert held(core)["quiet"] > 6 * 30
    assert accepted(run(core, requests)) > 100


def test_places_behind_the_token_that_ended_the_answer_lower_no_rate(core: Engine) -> None:
    [request] = asks([DRAWN[0]], seed=58)
    slow = plain(core, [request])
    said = slow[request.id].tokens
    place = next(place for place in range(5, 30) if said[place] not in said[:place])
    force(core, Oracle(slow, VOCABULARY).right)
    stopped = replace(request, sampling=replace(request.sampling, stop_token_ids=(said[place],)))

    answer = run(core, [stopped])[request.id]

    last, counts = answer.drafts[-1], DrafterCounts()
    assert answer.tokens == said[: place + 1]
    assert last.ended
    assert last.accepted < last.drafted
    for draft in answer.drafts:
        counts.add(draft)
    assert counts.tried == counts.accepted, "every drafted token was right as far as it was judged"
    assert counts.drafted_tokens - sum(counts.accepted) == last.drafted - last.accepted, "and what is left was rejected"


def held(core: Engine) -> dict[str, int]:
    """Tokens of every corpus."""
    return {each.namespace: each.tokens for each in core.status("s").corpora}


def test_an_engine_without_speculation_neither_drafts_nor_learns(talking_model: Path) -> None:
    with started(talking_model, speculation=False) as core:
        requests = asks([GREEDY, *DRAWN], seed=59, namespace="n")
        first, second = run(core, requests), run(core, requests)
        check_equal(second, first)
        assert not any(answer.drafts for answer in second.values())
        assert not held(core)


def proposals(core: Engine) -> list[tuple[str, list[int]]]:
    """Namespace and tokens of every proposal from now on, verified or not."""
    seen: list[tuple[str, list[int]]] = []
    proposing: Any = core.drafting._proposing
    real = type(proposing).ask

    def ask(rows: list[Row], seconds: float, *, eager: bool = False) -> list[list[Try]]:
        tries: list[list[Try]] = real(proposing, rows, seconds, eager=eager)
        seen.extend(
            (row.sequence.request.namespace, one.tokens) for row, each in zip(rows, tries, strict=True) for one in each
        )
        return tries

    proposing.ask = ask
    return seen


def test_two_tenants_texts_are_never_in_one_corpus(core: Engine) -> None:
    """The same questions at the same time; what one's namespace knows is never proposed to the other."""
    told = asks([GREEDY], copies=8, seed=61, tokens=24)
    secret = list(range(1500, 1600))
    theirs = [replace(one, id=f"a {one.id}", namespace="a") for one in told]
    ours = [replace(one, id=f"b {one.id}", namespace="b") for one in told]
    learnt = [[*one.prompt, *secret] for one in told]
    force(core)
    assert not command(core, core.learn, Learn(id="l", namespace="a", responses=learnt)).error
    seen = proposals(core)
    slow = plain(core, theirs + ours)
    check_equal(run(core, theirs + ours), slow)
    known = {name: {token for who, tokens in seen if who == name for token in tokens} for name in "ab"}
    own = {token for one in ours for token in one.prompt + slow[one.id].tokens}
    assert len(set(secret) - own) > 20
    assert known["a"] & (set(secret) - own)
    assert known["b"] <= own
    assert {each.namespace for each in core.status("s").corpora} >= {"a", "b"}


def test_what_is_forgotten_is_not_proposed_again_nor_learnt_again_from_requests_in_flight(core: Engine) -> None:
    requests = [replace(one, namespace="gone") for one in asks([GREEDY, *DRAWN], copies=2, seed=63, tokens=50)]
    force(core)
    slow = run(core, requests)
    assert held(core)["gone"] > 0
    seen = proposals(core)
    lesson = Learn(id="lesson", namespace="gone", responses=[[8, 9] * 30] * 5_000)
    moment = 0

    def between(step: int) -> None:
        nonlocal moment
        if step == 3:
            core.learn(b"other", lesson)
            core.forget(b"other", Forget(id="forget", namespace="gone"))
            moment = len(seen)
            assert "gone" not in held(core)

    told = run(core, requests, between)
    check_equal(told, slow)
    assert moment > 0
    assert "gone" not in held(core)
    # From then on every request has its own text alone.
    own = {tuple(one.prompt): set(one.prompt) | set(slow[one.id].tokens) for one in requests}
    everything = set().union(*own.values())
    assert {token for _, tokens in seen[moment:] for token in tokens} <= everything
    later = run(core, requests)
    check_equal(later, slow)
    assert held(core)["gone"] > 0


def scheduler_of(blocks: int) -> Scheduler:
    return Scheduler(BlockPool(16 * blocks, 16), max_running=8, step_tokens=64, max_context=16 * blocks)


def running(scheduler: Scheduler, number: int, tokens: int) -> Sequence:
    """A sequence that generates, all of its prompt computed."""
    request = Generate(id=str(number), prompt=[5] * tokens, sampling=Sampling(seed=0, max_tokens=99))
    sequence = Sequence(b"", request, number, tokens + 99)
    scheduler.add(sequence)
    scheduler.schedule()
    sequence.computed = tokens - 1
    return sequence


def test_stretch_takes_free_blocks_only_beyond_one_for_everybody_running() -> None:
    scheduler = scheduler_of(8)
    first, second = running(scheduler, 0, 30), running(scheduler, 1, 20)
    assert scheduler.pool.free == 4
    assert scheduler.stretch(first, 2) == 2
    assert scheduler.pool.free == 4
    assert scheduler.stretch(first, 16) == 16
    assert scheduler.pool.free == 3
    assert scheduler.stretch(second, 40) == 12 + 16
    assert scheduler.stretch(second, 40) == 12 + 16, "two are kept, for the next token of each"
    assert scheduler.pool.free == 2


def test_an_adopted_branch_leaves_no_trace_of_the_blocks_it_replaced() -> None:
    """What they will hold for others must not be read through an old table: 0 times NaN is NaN."""
    scheduler = scheduler_of(16)
    sequence = running(scheduler, 0, 20)
    assert sequence.table is not None
    assert scheduler.stretch(sequence, 40) == 40
    branch = scheduler.fork(sequence, 3)
    assert branch is not None
    assert scheduler.copies == [(sequence.blocks[1], branch.blocks[0])]
    assert branch.first == 1
    own = list(sequence.blocks)
    scheduler.adopt(sequence, branch)
    assert sequence.blocks == [own[0], *branch.blocks]
    assert sequence.table.tolist() == sequence.blocks + [0] * (len(sequence.table) - len(sequence.blocks))
    assert scheduler.pool.free == 16 - 2
    scheduler.remove(sequence)
    assert scheduler.pool.free == 16


def test_a_branch_is_refused_where_it_would_take_the_last_blocks_or_pass_the_end() -> None:
    scheduler = scheduler_of(4)
    sequence = running(scheduler, 0, 20)
    assert scheduler.pool.free == 2
    assert scheduler.fork(sequence, 14) is None
    assert scheduler.fork(sequence, 14 + 16 * 3) is None
    branch = scheduler.fork(sequence, 13)
    assert branch is not None
    assert np.count_nonzero(branch.table != sequence.table) == 1
    scheduler.prune(branch)
    assert scheduler.pool.free == 2


def test_blocks_of_drafts_that_did_not_come_go_to_newcomers_first() -> None:
    scheduler = scheduler_of(8)
    first = running(scheduler, 0, 17)
    assert scheduler.stretch(first, 70) == 70
    assert (len(first.blocks), scheduler.pool.free) == (6, 2)
    second = running(scheduler, 1, 60)
    assert second.table is not None
    assert (len(first.blocks), len(second.blocks), scheduler.pool.free) == (2, 4, 2)
