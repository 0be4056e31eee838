"""An approved answer serves the identical request at once, says so, and serves no other request."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import create_engine, select, text

from services.platform.postgres import PostgresServer
from services.store import pins, projects
from services.store.models import Pin
from tests.gateway.judging import judge, person, queued, seconds_until, undo
from tests.gateway.parts import World, eventually, make_world

RIGHT = "the right answer, as two people wrote it"


@pytest.fixture(scope="module")
def world(postgres: PostgresServer) -> Iterator[World]:
    with make_world(postgres) as made:
        made.start_engine()
        made.start_shipper()
        made.start_gateway()
        configure(made, {"enabled": True})
        yield made


@pytest.fixture(scope="module")
def lead(world: World) -> UUID:
    return person(world, "lead@example.org", "lead")


@pytest.fixture(scope="module")
def reviewers(world: World) -> tuple[UUID, UUID]:
    return person(world, "one@example.org", "reviewer"), person(world, "two@example.org", "reviewer")


def configure(world: World, pinned: dict[str, object]) -> None:
    with world.sessions.begin() as session:
        projects.configure(session, projects.get(session, "entities"), {"pinned_answers": pinned})


def request(**fields: object) -> dict[str, Any]:
    """A request nobody has sent before, to which the fake engine says "wrong" and stops."""
    system = {"role": "system", "content": f"case {uuid4().hex[:12]}"}
    ask = {"role": "user", "content": "\x01wrong\x02"}
    return {"model": "entities", "messages": [system, ask], "max_tokens": 64, "temperature": 0, **fields}


def send(world: World, body: dict[str, Any], **changes: object) -> httpx.Response:
    response = world.post("/v1/chat/completions", body | changes)
    assert response.status_code == 200, response.text
    return response


def origin(response: httpx.Response) -> str:
    return response.headers["x-whet-origin"]


def content(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


def item_of(world: World, response: httpx.Response, overlap: int = 1) -> UUID:
    return queued(world, response.headers["x-whet-interaction-id"], overlap=overlap)


def pinned(world: World, body: dict[str, Any], lead: UUID, answer: str = RIGHT) -> UUID:
    """The request's own answer corrected by a lead, and served by now."""
    item = item_of(world, send(world, body))
    annotation = judge(world, item, lead, "correct", answer)
    seconds_until(lambda: origin(send(world, body)) == "pinned")
    return annotation


def test_a_leads_correction_serves_the_identical_request_within_seconds(world: World, lead: UUID) -> None:
    body = request()
    first = send(world, body)
    assert (origin(first), content(first)) == ("live", "wrong")
    item = item_of(world, first)
    judge(world, item, lead, "correct", RIGHT)
    taken = seconds_until(lambda: origin(send(world, body)) == "pinned")
    print(f"correction to effect: {taken * 1000:.0f} ms")
    answer = send(world, body)
    assert content(answer) == RIGHT
    assert answer.headers["x-whet-adapter"] == "none"
    assert origin(send(world, body | {"messages": [body["messages"][0], {"role": "user", "content": "x"}]})) == "live"


def test_a_pinned_answer_is_logged_as_pinned_with_its_tokens_and_counted_once(world: World, lead: UUID) -> None:
    body = request()
    pinned(world, body, lead)
    answer = send(world, body)
    logged = world.interaction(answer.headers["x-whet-interaction-id"])
    assert logged.body is not None
    assert (logged.interaction.origin, logged.body.output) == ("pinned", RIGHT)
    assert logged.interaction.adapter_digest is None
    usage = answer.json()["usage"]
    assert usage["completion_tokens"] == len(RIGHT) + 1 == logged.interaction.completion_tokens
    assert usage["prompt_tokens"] == logged.interaction.prompt_tokens > 0
    with world.sessions() as session:
        served = text("SELECT count(*) FROM interaction_body WHERE parameters ->> 'pin' = :pin")
        landed = session.scalar(served, {"pin": answer.headers["x-whet-pin"]})
        assert session.get_one(Pin, UUID(answer.headers["x-whet-pin"])).hits == landed > 0


def test_a_pinned_answer_streams_in_pieces_with_its_usage(world: World, lead: UUID) -> None:
    body = request()
    pinned(world, body, lead)
    stream = send(world, body, stream=True, stream_options={"include_usage": True})
    assert origin(stream) == "pinned"
    lines = [line.removeprefix("data: ") for line in stream.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    said = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(said) == RIGHT
    assert sum(bool(piece) for piece in said) > 2
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == len(RIGHT) + 1


def test_two_agreeing_reviewers_pin_and_one_does_not(world: World, reviewers: tuple[UUID, UUID]) -> None:
    body = request()
    item = item_of(world, send(world, body), overlap=2)
    judge(world, item, reviewers[0], "correct", RIGHT)
    assert current(world, item) is None
    judge(world, item, reviewers[1], "correct", f"{RIGHT} \n")
    seconds_until(lambda: origin(send(world, body)) == "pinned")


def test_reviewers_who_disagree_pin_nothing_until_a_lead_decides(
    world: World, reviewers: tuple[UUID, UUID], lead: UUID
) -> None:
    body = request()
    item = item_of(world, send(world, body), overlap=3)
    judge(world, item, reviewers[0], "correct", RIGHT)
    judge(world, item, reviewers[1], "accept")
    assert current(world, item) is None
    judge(world, item, lead, "correct", "what the lead says")
    seconds_until(lambda: origin(send(world, body)) == "pinned")
    assert content(send(world, body)) == "what the lead says"


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 2},
        {"logprobs": True},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
        {"max_tokens": 63},
        {"temperature": 0.5},
        {"stop": ["x"]},
        {"presence_penalty": 1},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_a_request_that_differs_in_anything_that_matters_is_the_models(
    world: World, lead: UUID, shared: dict[str, Any], changes: dict[str, object]
) -> None:
    assert origin(send(world, shared, **changes)) == "live"


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 7}, {"user": "ada"}, {"top_p": 0.5}, {"priority": "batch"}, {"timeout": 5}, {"max_tokens": None,
        "max_completion_tokens": 64}, {"whet": {"session": "s", "tags": {"a": 1}}}, {"metadata": {"a": "b"}},
    ],
)  # fmt: skip
def test_a_greedy_request_that_differs_in_nothing_that_matters_is_the_same(
    world: World, shared: dict[str, Any], changes: dict[str, object]
) -> None:
    assert origin(send(world, shared, **changes)) == "pinned"


@pytest.fixture(scope="module")
def shared(world: World, lead: UUID) -> dict[str, Any]:
    """One pinned request for the tests that only look."""
    body = request()
    pinned(world, body, lead)
    return body


def test_a_sampled_request_with_its_own_seed_is_the_models_unless_the_project_says_so(world: World, lead: UUID) -> None:
    body = request(temperature=0.7)
    pinned(world, body, lead)
    assert origin(send(world, body, seed=5)) == "live"
    configure(world, {"enabled": True, "seeded": True})
    try:
        seconds_until(lambda: origin(send(world, body, seed=5)) == "pinned")
    finally:
        configure(world, {"enabled": True})


def test_another_project_is_served_nothing_of_it(world: World, shared: dict[str, Any]) -> None:
    response = world.post("/v1/chat/completions", shared | {"model": "other"}, key="other")
    assert origin(response) == "live"


def test_an_undone_judgement_takes_its_answer_back(world: World, lead: UUID) -> None:
    body = request()
    annotation = pinned(world, body, lead)
    undo(world, lead, annotation)
    seconds_until(lambda: origin(send(world, body)) == "live")


def test_what_a_person_withdraws_is_served_no_more(world: World, lead: UUID) -> None:
    body = request()
    pinned(world, body, lead)
    pin_id = UUID(send(world, body).headers["x-whet-pin"])
    with world.sessions.begin() as session:
        pins.withdraw(session, world.projects["entities"], pin_id, "lead@example.org", "it was wrong")
    seconds_until(lambda: origin(send(world, body)) == "live")


def test_a_later_approval_of_the_same_request_replaces_the_earlier(world: World, lead: UUID) -> None:
    body = request()
    first, second = item_of(world, send(world, body)), item_of(world, send(world, body))
    judge(world, first, lead, "correct", "earlier")
    seconds_until(lambda: origin(send(world, body)) == "pinned")
    judge(world, second, lead, "correct", "later")
    seconds_until(lambda: content(send(world, body)) == "later")
    assert current(world, first) is None


def test_a_project_that_does_not_allow_it_is_served_by_the_model(world: World, lead: UUID) -> None:
    body = request()
    pinned(world, body, lead)
    configure(world, {})
    try:
        seconds_until(lambda: origin(send(world, body)) == "live")
        unpinned = item_of(world, send(world, request()))
        judge(world, unpinned, lead, "accept")
        assert current(world, unpinned) is None
    finally:
        configure(world, {"enabled": True})


def test_what_would_not_fit_the_request_is_not_pinned_or_not_served(world: World, lead: UUID) -> None:
    short = request(max_tokens=8)
    item = item_of(world, send(world, short))
    judge(world, item, lead, "correct", RIGHT)
    stopped = item_of(world, send(world, request(stop=["right"])))
    judge(world, stopped, lead, "correct", RIGHT)
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    formatted = item_of(world, send(world, request(response_format=schema)))
    judge(world, formatted, lead, "correct", RIGHT)
    held = item_of(world, send(world, request(response_format=schema)))
    judge(world, held, lead, "correct", '{"a": 1}')
    assert [current(world, one) is None for one in (item, stopped, formatted, held)] == [False, True, True, False]
    assert origin(send(world, short)) == "live"


def test_a_full_project_pins_nothing_more(world: World, lead: UUID) -> None:
    with world.sessions() as session:
        used = pins.used(session, world.projects["entities"])
    configure(world, {"enabled": True, "most": used.pins + 1})
    try:
        bodies = [request(), request()]
        for body in bodies:
            judge(world, item_of(world, send(world, body)), lead, "correct", RIGHT)
        seconds_until(lambda: origin(send(world, bodies[0])) == "pinned")
        assert origin(send(world, bodies[1])) == "live"
    finally:
        configure(world, {"enabled": True})


def test_pins_serve_on_while_postgres_is_away(world: World, shared: dict[str, Any]) -> None:
    """Away for this database: connections are refused and those there are end."""
    url = world.sessions.kw["bind"].url
    admin = create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f'ALTER DATABASE "{url.database}" ALLOW_CONNECTIONS false'))
        try:
            ends = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
            connection.execute(ends, {"name": url.database})
            eventually(lambda: not world.get("/health").json()["database"]["connected"])
            assert origin(send(world, shared)) == "pinned"
        finally:
            connection.execute(text(f'ALTER DATABASE "{url.database}" ALLOW_CONNECTIONS true'))
    admin.dispose()
    eventually(lambda: world.get("/health").json()["database"]["connected"])


def current(world: World, item_id: UUID) -> Pin | None:
    with world.sessions() as session:
        return session.scalar(select(Pin).where(Pin.review_item_id == item_id, Pin.state.in_(pins.CURRENT)))
