"""Feedback is stored once, at the right project, even before its interaction has landed."""

import time
from uuid import uuid4

import pytest

from services.store import feedback
from services.store.base import uuid7
from tests.gateway.parts import World

CHAT = {"model": "entities", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PATH = "/v1/feedback"


def test_feedback_on_an_answer_is_stored_with_all_it_says(world: World) -> None:
    answer = world.post("/v1/chat/completions", CHAT).json()
    said = {"rating": -1, "score": 0.25, "comment": "dates are wrong\0", "correction": "[]", "user": "mia"}
    response = world.post(PATH, {"interaction_id": answer["id"], **said})
    assert response.status_code == 201, response.text
    logged = world.interaction(answer["id"]).interaction
    with world.sessions.begin() as session:
        (row,) = feedback.of_interaction(session, logged.id)
    assert (row.project_id, row.rating, row.score, row.correction, row.author) == (
        world.projects["entities"], -1, 0.25, "[]", "mia",
    )  # fmt: skip
    assert row.comment == "dates are wrong\ufffd"


def test_the_same_feedback_twice_is_stored_once(world: World) -> None:
    interaction = str(uuid7())
    for body, headers in (
        ({"rating": 1}, {}),
        ({"rating": 0, "idempotency_key": f"k-{interaction}"}, {}),
        ({"rating": -1}, {"idempotency-key": f"h-{interaction}"}),
    ):
        told = {"interaction_id": interaction, **body}
        first, second = (world.post(PATH, told, headers=headers) for _ in range(2))
        assert (first.status_code, second.status_code) == (201, 200)
        assert first.json()["id"] == second.json()["id"]


def test_a_key_used_for_other_feedback_is_a_conflict(world: World) -> None:
    told = {"interaction_id": str(uuid7()), "idempotency_key": str(uuid7())}
    assert world.post(PATH, told | {"rating": 1}).status_code == 201
    response = world.post(PATH, told | {"rating": -1})
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "idempotency_key_reused"


def test_feedback_is_accepted_before_its_interaction_lands(world: World) -> None:
    response = world.post(PATH, {"interaction_id": f"chatcmpl-{uuid7()}", "rating": 1})
    assert response.status_code == 201
    assert response.json()["landed"] is False


def test_feedback_on_another_projects_interaction_is_404(world: World) -> None:
    answer = world.post("/v1/chat/completions", CHAT).json()
    world.interaction(answer["id"])
    assert world.post(PATH, {"interaction_id": answer["id"], "rating": 1}, key="other").status_code == 404


def test_a_key_of_every_project_finds_the_interactions_own(world: World) -> None:
    answer = world.post("/v1/chat/completions", CHAT).json()
    logged = world.interaction(answer["id"]).interaction
    assert world.post(PATH, {"interaction_id": answer["id"], "rating": 1}, key="everywhere").status_code == 201
    with world.sessions.begin() as session:
        assert [row.project_id for row in feedback.of_interaction(session, logged.id)] == [logged.project_id]
    unknown = {"interaction_id": str(uuid7()), "rating": 1}
    assert world.post(PATH, unknown, key="everywhere").status_code == 422
    assert world.post(PATH, unknown | {"model": "other"}, key="everywhere").status_code == 201


def test_an_idempotency_key_too_long_to_store_is_refused(world: World) -> None:
    told = {"interaction_id": str(uuid7()), "rating": 1}
    assert world.post(PATH, told, headers={"idempotency-key": "k" * 512}).status_code == 201
    response = world.post(PATH, told, headers={"idempotency-key": "k" * 513})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "idempotency_key")


@pytest.mark.parametrize(
    ("told", "status"),
    [
        ({"interaction_id": str(uuid7())}, 422),
        ({"interaction_id": str(uuid7()), "rating": 5}, 422),
        ({"interaction_id": str(uuid4()), "rating": 1}, 422),
        ({"interaction_id": str(uuid7(time.time() + 3600)), "rating": 1}, 422),
        ({"interaction_id": "chatcmpl-nothing", "rating": 1}, 422),
        ({"rating": 1}, 400),
        ({"interaction_id": str(uuid7()), "rating": "good"}, 400),
        ({"interaction_id": str(uuid7()), "comment": "x" * 100_001}, 400),
        ({"interaction_id": str(uuid7()), "stars": 1}, 400),
        ({"interaction_id": str(uuid7()), "score": 1e400}, 400),
    ],
)
def test_feedback_that_says_nothing_sensible_is_refused(world: World, told: dict[str, object], status: int) -> None:
    response = world.post(PATH, told)
    assert response.status_code == status, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
