"""Which weights serve: the deployment's, loaded when the engine lacks them, or what is left when one is broken."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.platform.postgres import PostgresServer
from tests.gateway.parts import World, eventually, make_world

GOOD, OLD, BROKEN = ("a" * 64), ("b" * 64), ("c" * 64)
CHAT = {"model": "entities", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def adapters(postgres: PostgresServer) -> Iterator[World]:
    """A world with a good adapter, an older good one, and a broken one."""
    with make_world(postgres) as world:
        world.add_adapter("entities", GOOD)
        world.add_adapter("entities", OLD)
        world.add_adapter("entities", BROKEN, works=False)
        world.start_engine()
        world.start_shipper()
        world.start_gateway()
        yield world


def served(world: World, **fields: object) -> tuple[str, str | None]:
    """What the answer's header says, and what the log says really served."""
    response = world.post("/v1/chat/completions", CHAT | fields)
    assert response.status_code == 200, response.text
    return response.headers["x-whet-adapter"], world.interaction(response.json()["id"]).interaction.adapter_digest


def test_an_adapter_the_engine_does_not_hold_is_loaded_and_serves(adapters: World) -> None:
    adapters.deploy("entities", GOOD)
    assert served(adapters) == (GOOD, GOOD)
    assert served(adapters, stream=False, n=2) == (GOOD, GOOD)


def test_many_requests_at_once_load_an_adapter_once(adapters: World) -> None:
    fresh = adapters.add_adapter("entities", "d" * 64)
    adapters.deploy("entities", fresh)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: adapters.post("/v1/chat/completions", CHAT), range(8)))
    assert {answer.headers["x-whet-adapter"] for answer in answers} == {fresh}
    log = (adapters.settings.home / "logs" / "main.log").read_text()
    assert log.count(f'"digest": "{fresh}", "event": "adapter_loaded"') == 1


def test_a_broken_adapter_falls_back_to_what_was_good_last_and_raises_an_alarm(adapters: World) -> None:
    adapters.deploy("entities", BROKEN, last_good=OLD)
    assert served(adapters) == (OLD, OLD)
    log = (adapters.settings.home / "logs" / "main.log").read_text()
    assert '"alarm": true' in log
    assert "adapter_falls_back" in log


def test_with_nothing_good_left_the_base_model_serves(adapters: World) -> None:
    adapters.deploy("entities", BROKEN, last_good=None)
    assert served(adapters) == ("base", None)


def test_a_pinned_adapter_serves_whatever_is_deployed(adapters: World) -> None:
    adapters.deploy("entities", GOOD)
    assert served(adapters, model=f"entities@{OLD}") == (OLD, OLD)


def test_a_pinned_model_shows_the_digest_it_pins(adapters: World) -> None:
    adapters.deploy("entities", GOOD)
    shown = {name: adapters.get(f"/v1/models/{name}").json()["whet"] for name in ("entities", f"entities@{OLD}")}
    assert [one["adapter"] for one in shown.values()] == [GOOD, OLD]


def test_a_pinned_adapter_that_is_broken_is_an_error_and_never_another_one(adapters: World) -> None:
    response = adapters.post("/v1/chat/completions", CHAT | {"model": f"entities@{BROKEN}"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "adapter_unavailable"
    assert "adapter.ok is missing" in response.text or "a moment ago" in response.text


def test_a_flip_is_served_within_a_second_and_its_generation_is_logged(adapters: World) -> None:
    adapters.deploy("entities", GOOD)
    before = adapters.post("/v1/chat/completions", CHAT)
    adapters.deploy("entities", OLD)
    after = adapters.post("/v1/chat/completions", CHAT)
    assert (before.headers["x-whet-adapter"], after.headers["x-whet-adapter"]) == (GOOD, OLD)
    first, second = (adapters.interaction(answer.json()["id"]).interaction for answer in (before, after))
    assert second.generation == first.generation + 1


def test_an_engine_that_forgot_its_adapters_serves_them_again(adapters: World) -> None:
    adapters.deploy("entities", GOOD)
    engine = next(process for process in adapters.processes if process.log.name == "fake_engine.log")
    engine.kill()
    adapters.start_engine()
    eventually(lambda: adapters.post("/v1/chat/completions", CHAT).status_code == 200)
    assert served(adapters) == (GOOD, GOOD)


def test_too_few_slots_answer_503_and_never_with_older_weights(adapters: World) -> None:
    crowded_out = adapters.add_adapter("entities", "e" * 64)
    (adapters.settings.artifacts / crowded_out / "slot.lost").touch()
    adapters.deploy("entities", crowded_out, last_good=OLD)
    response = adapters.post("/v1/chat/completions", CHAT)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"
    (adapters.settings.artifacts / crowded_out / "slot.lost").unlink()
    assert served(adapters) == (crowded_out, crowded_out)


def test_a_load_that_failed_for_the_moment_is_tried_again_and_older_weights_do_not_answer(adapters: World) -> None:
    digest = adapters.add_adapter("entities", "78" * 32, works=False)
    directory = adapters.settings.artifacts / digest
    (directory / "disk.away").touch()
    adapters.deploy("entities", digest, last_good=OLD)
    response = adapters.post("/v1/chat/completions", CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "adapter_unavailable")
    (directory / "disk.away").unlink()
    (directory / "adapter.ok").touch()
    assert served(adapters) == (digest, digest)
