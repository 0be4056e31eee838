"""Whatever a client sends gets a clear answer in OpenAI's shape with the right status, and never a 500."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from services.settings import Settings
from tests.gateway.parts import World

CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: object) -> dict[str, Any]:
    return {"model": "entities", "messages": MESSAGES, "max_tokens": 3, **fields}


def refused(response: httpx.Response, status: int, code: str | None, *words: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), response.text
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize("limit", [0, -1, -(10**9)])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_below_one_is_refused(world: World, name: str, limit: int) -> None:
    body = chat()
    del body["max_tokens"]
    refused(world.post(CHAT, body | {name: limit}), 400, None, "max_tokens", "at least 1")


def test_an_unknown_model_is_404_and_names_only_what_the_key_may_use(world: World) -> None:
    response = world.post(CHAT, chat(model="nonsense"))
    refused(response, 404, "model_not_found", "nonsense", "entities")
    assert "other" not in response.text


def test_another_projects_model_looks_like_an_unknown_one(world: World) -> None:
    refused(world.post(CHAT, chat(model="other")), 404, "model_not_found", "entities")


def test_pinning_an_artefact_of_another_project_is_404(world: World) -> None:
    digest = world.add_adapter("other", "0" * 64)
    refused(world.post(CHAT, chat(model=f"entities@{digest}")), 404, "model_not_found")


def test_a_prompt_longer_than_the_context_is_refused(world: World) -> None:
    long = [{"role": "user", "content": "a" * 600}]
    refused(world.post(CHAT, chat(messages=long)), 400, "context_length_exceeded", "512")


def test_a_prompt_far_beyond_the_context_is_refused_without_tokenizing_it(world: World) -> None:
    enormous = [{"role": "user", "content": "a" * 1_000_000}]
    refused(world.post(CHAT, chat(messages=enormous)), 400, "context_length_exceeded")


def test_a_completion_longer_than_the_rest_of_the_context_is_refused(world: World) -> None:
    refused(world.post(CHAT, chat(max_tokens=511)), 400, "context_length_exceeded", "511")


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"model": "entities", "messages": [}', "invalid_json"),
        (b'{"model": "\xff\xfe"}', "invalid_encoding"),
        (b'{"model": "entities", "messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json"),
        (b'{"whet": {"retrieved": ' + b"[" * 1_000_000, "invalid_json"),
        (b'{"metadata": ' + b'{"a":' * 100_000, "invalid_json"),
        (b"[]", None),
        (b"null", None),
        (b'"entities"', None),
    ],
)
def test_a_body_that_is_no_request_is_refused(world: World, raw: bytes, code: str | None) -> None:
    refused(world.post(CHAT, content=raw), 400, code)


def test_a_body_over_the_limit_is_refused_when_its_length_is_announced(world: World) -> None:
    refused(world.post(CHAT, content=b"x" * 10_000_000), 413, "request_too_large")


def test_a_body_over_the_limit_is_refused_when_it_comes_in_chunks(world: World) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 100_000

    refused(world.post(CHAT, content=chunks()), 413, "request_too_large")


def test_the_limit_of_bodies_is_itself_limited() -> None:
    assert Settings(max_body_bytes=32 * 2**20).max_body_bytes == 32 * 2**20
    with pytest.raises(ValidationError, match="max_body_bytes"):
        Settings(max_body_bytes=32 * 2**20 + 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"modalities": ["text", "audio"]},
        {"prediction": {"type": "content", "content": "x"}},
        {"web_search_options": {}},
        {"reasoning_effort": "high"},
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_and_not_ignored(world: World, fields: dict[str, Any]) -> None:
    refused(world.post(CHAT, chat(**fields)), 400, "unsupported_parameter", "not supported")


def test_a_mistyped_field_is_refused(world: World) -> None:
    refused(world.post(CHAT, chat(temprature=0)), 400, None, "temprature")


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1}, {"temperature": 2.1}, {"top_p": 0}, {"top_p": 1.5}, {"n": 0}, {"n": 9}, {"seed": 2**64},
        {"stop": [""]}, {"stop": ["x"] * 17}, {"stop": "x" * 1001}, {"temperature": "hot"}, {"messages": []},
        {"messages": [{"role": "robot", "content": "hi"}]}, {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]},
        {"messages": [{"role": "user", "content": "hi", "tool_call_id": "1"}]},
        {"stream_options": {"include_usage": True}}, {"max_tokens": 3, "max_completion_tokens": 4},
        {"whet": {"tags": {"a": {"nested": 1}}}}, {"whet": {"surprise": 1}}, {"whet": {"tags": {"a": "x" * 513}}},
        {"whet": {"retrieved": ["x" * 65_536]}}, {"max_tokens": 10**400}, {"n": 10**400}, {"seed": -(10**400)},
        {"top_k": 10**400}, {"min_tokens": 10**400}, {"logprobs": True, "top_logprobs": 10**400},
        {"min_p": 1.1}, {"presence_penalty": 2.5}, {"frequency_penalty": -3}, {"repetition_penalty": 0},
        {"logit_bias": {"x": 1}}, {"logit_bias": {"5": 101}}, {"logit_bias": {"99999": 1}}, {"logit_bias": {"-1": 1}},
        {"logit_bias": {str(token): 1 for token in range(301)}}, {"logit_bias": {"9" * 40: 1}},
        {"min_tokens": -1}, {"min_tokens": 4}, {"stop_token_ids": [-1]}, {"stop_token_ids": [10**30]},
        {"stop_token_ids": [5] * 65}, {"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21},
        {"timeout": 0}, {"timeout": 1e9}, {"priority": "urgent"}, {"logprobs": 3},
        {"response_format": {"type": "json_schema"}}, {"response_format": {"type": "yaml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"a": "x" * 70_000}}}},
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}}, {"structured_outputs": {"choice": [""]}},
        {"structured_outputs": {"json": "{"}}, {"structured_outputs": {"regex": "a" * 70_000}},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]}, {"tool_choice": "required"},
        {"tools": [TOOL, TOOL]}, {"tools": [TOOL] * 129}, {"tools": [{"type": "web_search"}]},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        {"tools": [TOOL], "response_format": {"type": "json_object"}},
        {"messages": [{"role": "user", "content": "hi", "tool_calls": [CALL]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
        {"messages": [{"role": "tool", "content": "no id"}]},
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(world: World, fields: dict[str, Any]) -> None:
    response = world.post(CHAT, chat(**fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "prompt", [[-1], [10**6], [], [[]], ["a", [-1]], ["a", 5], [[[1]]], [1.5], [True], {"a": 1}, "", ["a"] * 65]
)
def test_a_prompt_that_is_no_prompt_is_refused(world: World, prompt: object) -> None:
    response = world.post("/v1/completions", {"model": "entities", "prompt": prompt})
    assert response.status_code == 400, response.text


def test_a_schema_nested_too_deeply_is_refused(world: World) -> None:
    schema: dict[str, Any] = {}
    for _ in range(40):
        schema = {"items": schema}
    for fields in (
        {"structured_outputs": {"json": schema}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
    ):
        refused(world.post(CHAT, chat(**fields)), 400, None, "nested deeper")


@pytest.mark.parametrize("levels", [40, 400, 5000])
def test_arguments_of_a_call_nested_too_deeply_are_refused(world: World, levels: int) -> None:
    arguments = '{"a":' * levels + "1" + "}" * levels
    deep = {"function": {"name": "f", "arguments": arguments}, "id": "1"}
    body = {"model": "entities", "messages": [*MESSAGES, {"role": "assistant", "tool_calls": [deep]}]}
    for path in (CHAT, "/tokenize"):
        response = world.post(path, body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == "messages[1]"


def test_one_request_cannot_ask_for_hundreds_of_answers(world: World) -> None:
    body = {"model": "entities", "prompt": ["a"] * 64, "max_tokens": 1}
    assert len(world.post("/v1/completions", body | {"n": 2}).json()["choices"]) == 128
    refused(world.post("/v1/completions", body | {"n": 3}), 400, None, "128")


def test_nothing_can_be_generated_only_where_the_prompt_is_echoed(world: World) -> None:
    body = {"model": "entities", "prompt": "abc", "max_tokens": 0}
    refused(world.post("/v1/completions", body), 400, None, "at least 1")
    assert world.post("/v1/completions", body | {"echo": True}).status_code == 200


def test_harmless_fields_openai_documents_are_ignored(world: World) -> None:
    harmless = chat(metadata={"a": "b"}, store=False, service_tier="auto", tools=[], logit_bias={}, presence_penalty=0)
    assert world.post(CHAT, harmless).status_code == 200


def test_a_nul_character_is_answered_and_logged(world: World) -> None:
    response = world.post(CHAT, chat(messages=[{"role": "user", "content": "a\0b"}], user="u\0"))
    assert response.status_code == 200
    logged = world.interaction(response.json()["id"])
    assert logged.interaction.end_user == "u\ufffd"
    assert logged.body is not None
    assert logged.body.messages == [{"role": "user", "content": "a\ufffdb"}]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", CHAT, 405)])
def test_an_unknown_place_or_method_answers_in_openais_shape(world: World, method: str, path: str, status: int) -> None:
    response = httpx.request(method, world.url + path)
    assert response.status_code == status
    assert json.loads(response.text)["error"]["type"] == "invalid_request_error"
