"""/tokenize and /detokenize, and what /v1/models says of the engine."""

from typing import Any

import pytest

from tests.gateway.parts import World


def test_a_text_becomes_tokens_and_the_tokens_the_text(world: World) -> None:
    answer = world.post("/tokenize", {"model": "entities", "prompt": "aé", "return_token_strs": True}).json()
    assert (answer["count"], answer["max_model_len"]) == (3, 512)
    assert answer["token_strs"] == ["a", "\ufffd", "\ufffd"]
    assert world.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "aé"}


def test_a_chat_has_the_tokens_it_is_served_with(world: World) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
    answer = world.post("/tokenize", body).json()
    assert answer["token_strs"] is None
    usage = world.post("/v1/chat/completions", body | {"model": "entities", "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == answer["count"] == len(answer["tokens"])
    assert world.post("/tokenize", body | {"add_generation_prompt": False}).json()["count"] == answer["count"] - 1
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert world.post("/tokenize", body | {"tools": tools}).json()["count"] > answer["count"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": []}), ("/tokenize", {"messages": []}),
        ("/tokenize", {"prompt": 1}), ("/tokenize", {"prompt": "a", "tools": [{"type": "x"}]}),
        ("/detokenize", {}), ("/detokenize", {"tokens": [-1]}), ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": "abc"}),
    ],
)  # fmt: skip
def test_what_cannot_be_tokenized_is_refused(world: World, path: str, body: dict[str, Any]) -> None:
    response = world.post(path, body)
    assert response.status_code == 400, response.text


def test_another_projects_model_cannot_be_named(world: World) -> None:
    assert world.post("/tokenize", {"model": "other", "prompt": "a"}).status_code == 404


def test_a_model_names_its_base_and_its_context(world: World) -> None:
    model = world.get("/v1/models/entities").json()
    assert model["max_model_len"] == 512
    assert model["whet"]["base"] == "ba5e" * 16
    assert world.get("/v1/models").json()["data"] == [model]
