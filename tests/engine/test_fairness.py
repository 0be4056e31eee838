"""Who is served when: shares, priorities, deadlines, bounds, grammars that compile, adapters that arrive together."""

import errno
from pathlib import Path

import pytest

from engine.adapters.files import AdapterUnreadable
from engine.grammar.workshop import GrammarWorkshop
from engine.messages import (
    Done,
    Finished,
    Generate,
    Grammar,
    LoadAdapter,
    Pool,
    Priority,
    Sampling,
    UnloadAdapter,
)
from tests.engine.fake_world import MADE_TO_FAIL, FakeForward, FakeReader, FakeThread, World, check


def request(
    name: str, tokens: int = 8, share: str = "", priority: Priority = "interactive", **more: object
) -> Generate:
    sampling = Sampling(seed=0, max_tokens=tokens)
    return Generate(id=name, prompt=[5] * 10, sampling=sampling, share=share, priority=priority, **more)  # type: ignore[arg-type]


def endings(world: World) -> list[Finished]:
    return [message for _, message in world.core.outbox if isinstance(message, Finished)]


def dones(world: World) -> list[Done]:
    return [message for _, message in world.core.outbox if isinstance(message, Done)]


def load(world: World, *digests: str) -> None:
    for digest in digests:
        world.core.load_adapter(b"c", LoadAdapter(id=digest, digest=digest, path=digest))


def finish(world: World) -> list[str]:
    """Step until nothing is left; ids in the order they ended."""
    while world.step():
        check(world.core)
    return [ending.id for ending in endings(world)]


def submit(world: World, *requests: Generate) -> None:
    for each in requests:
        world.core.submit(b"c", each)


def test_a_newcomer_does_not_wait_behind_everything_a_busy_share_has_queued() -> None:
    world = World(max_running=2)
    submit(world, *(request(f"busy {index}", share="busy") for index in range(20)))
    for _ in range(12):
        world.step()
    submit(world, *(request(f"new {index}", share="new") for index in range(3)))
    order = finish(world)
    assert max(order.index(f"new {index}") for index in range(3)) < 12


def test_shares_are_served_alike_in_tokens_not_in_requests() -> None:
    world = World(max_running=1, kv_tokens=1024)
    submit(world, *(request(f"long {index}", tokens=70, share="long") for index in range(6)))
    submit(world, *(request(f"short {index}", tokens=10, share="short") for index in range(24)))
    order = finish(world)[:15]
    # 80 tokens a long one, 20 a short one: about four short ones for each long one.
    assert 2 <= sum(name.startswith("long") for name in order) <= 4


def test_a_share_that_pauses_comes_back_level_not_ahead() -> None:
    world = World(max_running=1)
    submit(world, *(request(f"busy {index}", share="busy") for index in range(20)))
    for _ in range(60):
        world.step()
    submit(world, *(request(f"back {index}", share="back") for index in range(8)))
    order = finish(world)
    between = order[order.index("back 0") : order.index("back 7")]
    assert sum(name.startswith("busy") for name in between) >= 5


def test_shares_at_rest_are_forgotten() -> None:
    world = World()
    for index in range(300):
        submit(world, request(str(index), tokens=1, share=str(index)))
        world.step()
    assert not any(world.core.scheduler.waiting._lines)
    assert not world.core.admission._shares


def test_an_interrupted_request_goes_on_before_newcomers_of_its_priority() -> None:
    world = World(max_running=1)
    submit(world, request("first", 30, priority="batch"))
    world.step()
    submit(world, request("urgent", 3), *(request(f"later {index}", 3, priority="batch") for index in range(5)))
    assert finish(world)[:2] == ["urgent", "first"]


def test_one_key_cannot_fill_the_queue_and_is_told_when_to_return() -> None:
    world = World(max_waiting=40)
    submit(world, *(request(f"greedy {index}", share="greedy") for index in range(40)))
    submit(world, *(request(f"other {index}", share="other") for index in range(10)))
    assert [ending.id for ending in endings(world)] == [f"greedy {index}" for index in range(30, 40)]
    assert {ending.code for ending in endings(world)} == {"overloaded"}
    for _ in range(30):
        world.step()
    world.core.outbox.clear()
    submit(world, *(request(f"more {index}", share="more") for index in range(41)))
    refused = [ending for ending in endings(world) if ending.code == "overloaded"]
    assert refused
    assert all(1 <= ending.retry_after_seconds <= 60 for ending in refused)


def test_deadlines_end_running_waiting_and_parked_requests() -> None:
    world = World(max_running=1)
    world.core.load_adapter(b"c", LoadAdapter(id="l", digest="a", path="a"))
    submit(world, request("running", 90, deadline_seconds=5), request("waiting", deadline_seconds=5))
    submit(world, request("parked", adapter="a", deadline_seconds=5), request("patient", deadline_seconds=500))
    world.step()
    assert 4 < (world.core.patience_seconds or 0) <= 5
    world.clock.offset += 6
    world.step()
    late = endings(world)
    assert [ending.id for ending in late] == ["running", "waiting", "parked"]
    assert {(ending.reason, ending.code) for ending in late} == {("error", "deadline")}
    assert finish(world)[3:] == ["patient"]


def test_an_idle_engine_knows_when_to_wake_for_a_parked_request() -> None:
    world = World()
    world.core.load_adapter(b"c", LoadAdapter(id="l", digest="a", path="a"))
    submit(world, request("parked", adapter="a", deadline_seconds=3))
    assert not world.step()
    assert not world.core.busy
    assert 2 < (world.core.patience_seconds or 0) <= 3


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_deadlines_that_are_no_times_are_refused(seconds: float) -> None:
    world = World()
    submit(world, request("odd", deadline_seconds=seconds))
    assert endings(world)[0].code == "invalid_request"


def test_a_cancelled_request_is_gone_before_the_next_step() -> None:
    world = World(max_running=1)
    submit(world, request("running", 50), request("waiting", 50))
    world.step()
    for name in ("running", "waiting"):
        world.core.cancel(b"c", name)
    assert world.core.scheduler.pool.free == world.core.scheduler.pool.total
    assert not world.step()


def test_a_row_that_is_not_finite_fails_alone() -> None:
    world = World()
    world.runner.poison.add("bad")
    submit(world, request("bad"), *(request(f"good {index}") for index in range(4)))
    finish(world)
    reasons = {ending.id: ending.reason for ending in endings(world)}
    assert reasons.pop("bad") == "error"
    assert set(reasons.values()) == {"length"}


def test_models_that_classify_do_not_generate_and_others_do_not_classify() -> None:
    world = World()
    world.core.submit_pool(b"c", Pool(id="classes", prompt=[5], how="classify"))
    world.core.admission._spec.labels = ("yes", "no")  # type: ignore[misc]
    submit(world, request("tokens"))
    world.core.admission._spec.labels = ()  # type: ignore[misc]
    assert [(ending.id, ending.code) for ending in endings(world)] == [
        ("classes", "unsupported"),
        ("tokens", "unsupported"),
    ]


def test_adapters_that_arrive_together_do_not_push_each_other_out() -> None:
    world = World(adapter_slots=2)
    for digest in ("a", "b"):
        world.core.load_adapter(b"c", LoadAdapter(id=digest, digest=digest, path=digest))
        submit(world, request(f"for {digest}", adapter=digest))
    world.reading.finish()
    finish(world)
    assert [(ending.id, ending.reason) for ending in endings(world)] == [("for a", "length"), ("for b", "length")]


def test_a_newcomer_gets_a_slot_although_those_that_hold_them_are_loaded_again_and_again() -> None:
    world = World(adapter_slots=2, max_running=8)
    core = world.core
    served: set[str] = set()
    for turn in range(120):
        for digest in ("a", "b", "c", "d"):
            core.load_adapter(b"c", LoadAdapter(id=f"{digest} {turn}", digest=digest, path=digest))
            submit(world, request(f"{digest} {turn}", adapter=digest))
        world.reading.finish()
        world.step()
        served |= {ending.id[0] for ending in endings(world) if ending.reason == "length"}
        core.outbox.clear()
    assert served == set("abcd")


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "the disk is away"), AdapterUnreadable("cannot be read"), MemoryError()]
)
def test_failures_of_the_machine_are_told_from_refusals(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    world = World()
    monkeypatch.setattr(FakeReader, "read", fail)
    world.core.load_adapter(b"c", LoadAdapter(id="l", digest="a", path="a"))
    world.reading.finish()
    world.step()
    (done,) = dones(world)
    assert done.transient
    assert done.error


@pytest.mark.parametrize("error", [OSError(errno.ENAMETOOLONG, "name too long"), TypeError("odd"), RecursionError()])
def test_what_fails_the_same_way_every_time_is_not_called_momentary(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    world = World()
    monkeypatch.setattr(FakeReader, "read", fail)
    load(world, "a")
    world.reading.finish()
    world.step()
    (done,) = dones(world)
    assert type(error).__name__ in done.error
    assert not done.transient


def test_a_slot_survives_a_copy_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    world = World(adapter_slots=2)
    with monkeypatch.context() as broken:
        broken.setattr(FakeForward, "fill", fail)
        load(world, "a", "b", "c")
        for _ in range(3):
            world.reading.finish()
            world.step()
    assert [(done.id, bool(done.error), done.transient) for done in dones(world)] == [
        (digest, True, True) for digest in "abc"
    ]
    world.core.outbox.clear()
    load(world, "a", "b")
    submit(world, *(request(digest, adapter=digest) for digest in "ab"))
    world.reading.finish()
    finish(world)
    assert [(done.id, done.error) for done in dones(world)] == [("a", ""), ("b", "")]


def test_a_failure_before_the_batch_is_known_ends_requests_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MemoryError(MADE_TO_FAIL)

    world = World()
    submit(world, request("running"), request("waiting"))
    for part, name in ((world.core, "_settle"), (world.core.scheduler, "schedule")):
        submit(world, request(name))
        with monkeypatch.context() as broken:
            broken.setattr(part, name, fail)
            world.step()
        assert {ending.code for ending in endings(world)} == {"internal"}
        assert not world.core.in_flight
    submit(world, request("next"))
    assert finish(world) == ["running", "waiting", "_settle", "schedule", "next"]


def test_no_more_adapters_are_read_ahead_than_there_are_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    read = FakeReader.read
    monkeypatch.setattr(FakeReader, "read", lambda self, digest, path: seen.append(digest) or read(self, digest, path))
    world = World(adapter_slots=2, max_running=8)
    load(world, *"abcdef")
    submit(world, *(request(digest, 40, adapter=digest) for digest in "abcdef"))
    for _ in range(10):
        world.reading.finish()
        world.step()
    # Two serve, two have been read and wait for their slots.
    assert seen == list("abcd")
    while world.core.in_flight:
        world.reading.finish()
        world.step()
    assert {ending.reason for ending in endings(world)} == {"length"}
    assert [done.error for done in dones(world)] == [""] * 6


def test_an_engine_that_goes_idle_first_settles_what_waited_for_its_last_request() -> None:
    world = World(adapter_slots=2)
    load(world, "a", "b")
    submit(world, request("on a", adapter="a"), request("on b", adapter="b"))
    world.reading.finish()
    world.step()
    load(world, "c")
    submit(world, request("on c", adapter="c"))
    world.core.unload_adapter(b"c", UnloadAdapter(id="gone", digest="b"))
    world.reading.finish()
    for _ in range(100):
        if not world.core.busy:
            break
        world.step()
    assert not world.core.busy
    assert [ending.id for ending in endings(world)] == ["on a", "on b", "on c"]
    assert {done.id: done.error for done in dones(world)} == dict.fromkeys(["a", "b", "c", "gone"], "")


def test_a_client_that_vanishes_lets_an_idle_engine_answer_an_unload() -> None:
    world = World()
    load(world, "a")
    world.core.submit(b"gone", request("long", 90, adapter="a"))
    world.reading.finish()
    world.step()
    world.core.unload_adapter(b"c", UnloadAdapter(id="unload", digest="a"))
    world.core.cancel_client(b"gone")
    assert world.core.busy
    world.step()
    assert [done.id for done in dones(world)] == ["a", "unload"]
    assert not world.core.busy


STARTER = Path("engine/starter")


def constrained(name: str, text: str, **more: object) -> Generate:
    return request(name, grammar=Grammar(kind="regex", text=text), **more)  # type: ignore[arg-type]


def test_requests_wait_for_their_grammar_while_others_go_on() -> None:
    world = World()
    shop = world.core._grammars = GrammarWorkshop(STARTER, 4096, lambda: None)
    shop._thread = thread = FakeThread()  # type: ignore[assignment]
    submit(world, constrained("good", "[a-z]+"), constrained("bad", "[a-"), constrained("left", "x"), request("free"))
    assert finish(world) == ["free"]
    world.core.cancel(b"c", "left")
    thread.finish()
    world.step()
    codes = {ending.id: ending.code for ending in endings(world)}
    assert codes == {"free": "", "left": "", "bad": "invalid_request"}
    assert [each.request.id for each in world.core.scheduler.running] == ["good"]
    assert world.core.scheduler.running[0].grammar is not None


def test_shares_take_turns_at_having_their_grammars_compiled() -> None:
    world = World()
    shop = world.core._grammars = GrammarWorkshop(STARTER, 4096, lambda: None)
    shop._thread = thread = FakeThread()  # type: ignore[assignment]
    submit(world, *(constrained(f"busy {place}", f"[a-z]{{{place}}}x", share="busy") for place in range(4)))
    submit(world, constrained("new", "[0-9]+", share="new"))
    for _, work in thread.waiting[:2]:
        work()
    world.step()
    assert [each.request.id for each in shop._waiting] == ["busy 1", "busy 2", "busy 3"]


def test_a_grammar_compiled_before_waits_for_no_other() -> None:
    world = World()
    shop = world.core._grammars = GrammarWorkshop(STARTER, 4096, lambda: None)
    shop._thread = thread = FakeThread()  # type: ignore[assignment]
    submit(world, constrained("first", "[a-z]+"))
    thread.finish()
    submit(world, constrained("other", "x+"), constrained("again", "[a-z]+"))
    world.step()
    assert [each.request.id for each in shop._waiting] == ["other"]


def test_a_model_without_a_tokenizer_refuses_grammars_with_a_sentence(tmp_path: Path) -> None:
    world = World()
    shop = world.core._grammars = GrammarWorkshop(tmp_path, 4096, lambda: None)
    shop._thread = thread = FakeThread()  # type: ignore[assignment]
    submit(world, constrained("good", "[a-z]+"))
    thread.finish()
    world.step()
    (ending,) = endings(world)
    assert (ending.code, "tokenizer.json" in (ending.error or "")) == ("invalid_request", True)
