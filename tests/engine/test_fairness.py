"""Who is served when: shares, priorities, deadlines, bounds, grammars that compile, adapters that arrive together."""

import errno
from pathlib import Path

import pytest

from engine.adapters.files import AdapterUnreadable
from engine.grammar.workshop import GrammarWorkshop
from engine.messages import Done, Finished, Generate, Grammar, LoadAdapter, Pool, Priority, Sampling
from tests.engine.fake_world import FakeReader, FakeThread, World, check


def request(
    name: str, tokens: int = 8, share: str = "", priority: Priority = "interactive", **more: object
) -> Generate:
    sampling = Sampling(seed=0, max_tokens=tokens)
    return Generate(id=name, prompt=[5] * 10, sampling=sampling, share=share, priority=priority, **more)  # type: ignore[arg-type]


def endings(world: World) -> list[Finished]:
    return [message for _, message in world.core.outbox if isinstance(message, Finished)]


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
    (done,) = [message for _, message in world.core.outbox if isinstance(message, Done)]
    assert done.transient
    assert done.error


STARTER = Path("engine/starter")


def constrained(name: str, text: str) -> Generate:
    return request(name, grammar=Grammar(kind="regex", text=text))


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


def test_a_model_without_a_tokenizer_refuses_grammars_with_a_sentence(tmp_path: Path) -> None:
    world = World()
    shop = world.core._grammars = GrammarWorkshop(tmp_path, 4096, lambda: None)
    shop._thread = thread = FakeThread()  # type: ignore[assignment]
    submit(world, constrained("good", "[a-z]+"))
    thread.finish()
    world.step()
    (ending,) = endings(world)
    assert (ending.code, "tokenizer.json" in (ending.error or "")) == ("invalid_request", True)
