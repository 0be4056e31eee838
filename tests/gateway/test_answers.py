"""What answers hold, over an engine that says what it is told: every script, log-probabilities, echo, errors."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.gateway.parts import World, eventually
from tests.gateway.test_log import world_is_quiet

TEXTS = [
    "plain words",
    "naïve café",
    "中文字符 и кириллица",
    "🙂",
    "👩‍👩‍👧‍👦 family 🇳🇴",
    "a\n\n\tb ",
    "é" * 40,
    ' "quoted" \\ ',
]


def say(text: str) -> str:
    """A prompt whose answer is `text`."""
    return f"\x01{text}\x02"


def chat(text: str, **fields: object) -> dict[str, Any]:
    return {"model": "entities", "messages": [{"role": "user", "content": say(text)}], **fields}


def events(world: World, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with httpx.stream("POST", world.url + path, json=body | {"stream": True}, headers=world.headers()) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("text", TEXTS)
def test_a_streamed_text_equals_the_whole_one_in_every_script(world: World, text: str) -> None:
    whole = world.post("/v1/chat/completions", chat(text)).json()["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == (text, "stop")
    deltas = [
        event["choices"][0]["delta"].get("content", "") for event in events(world, "/v1/chat/completions", chat(text))
    ]
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)
    plain = {"model": "entities", "prompt": say(text)}
    pieces = [event["choices"][0]["text"] for event in events(world, "/v1/completions", plain)]
    assert "".join(pieces) == world.post("/v1/completions", plain).json()["choices"][0]["text"] == text


def test_a_broken_character_streams_as_it_is_answered_whole(world: World) -> None:
    body = chat("a🙂", max_tokens=3)
    whole = world.post("/v1/chat/completions", body).json()["choices"][0]
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events(world, "/v1/chat/completions", body)]
    assert "".join(deltas) == whole["message"]["content"] == "a\ufffd"
    assert whole["finish_reason"] == "length"


def test_chat_logprobs_have_openais_shape_down_to_the_bytes(world: World) -> None:
    body = chat("é!", logprobs=True, top_logprobs=2)
    content = world.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], [0x21]]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "é!"
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert entry["logprob"] == -0.25
        assert [set(other) for other in entry["top_logprobs"]] == [{"token", "logprob", "bytes"}] * 2
        assert entry["top_logprobs"][0] == {name: entry[name] for name in ("token", "logprob", "bytes")}
    streamed = [
        entry
        for event in events(world, "/v1/chat/completions", body)
        if event["choices"][0]["logprobs"]
        for entry in event["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == content


def test_text_logprobs_carry_offsets_and_likeliest_tokens(world: World) -> None:
    body = {"model": "entities", "prompt": say("aé b"), "logprobs": 3}
    scored = world.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert scored["token_logprobs"] == [-0.25] * 5
    assert scored["text_offset"] == [0, 1, 1, 2, 3]
    assert scored["tokens"][0] == "a"
    assert scored["top_logprobs"][0] == {"a": -0.25, "b": -1.5, "c": -2.5}
    pieces = [event["choices"][0]["logprobs"] for event in events(world, "/v1/completions", body)]
    joined = {name: [one for piece in pieces if piece for one in piece[name]] for name in scored}
    assert joined == scored


def test_echo_gives_the_prompt_back_and_logs_only_the_answer(world: World) -> None:
    prompt = f"é {say('yes')}"
    body = {"model": "entities", "prompt": prompt, "echo": True}
    answer = world.post("/v1/completions", body).json()
    assert answer["choices"][0]["text"] == f"{prompt}yes"
    assert "".join(event["choices"][0]["text"] for event in events(world, "/v1/completions", body)) == f"{prompt}yes"
    logged = world.interaction(answer["id"]).body
    assert logged is not None
    assert logged.output == "yes"


def test_echoed_logprobs_cover_the_prompt_and_need_no_answer(world: World) -> None:
    body = {"model": "entities", "prompt": "abc", "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = world.post("/v1/completions", body).json()
    choice, scored = answer["choices"][0], answer["choices"][0]["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert answer["usage"]["completion_tokens"] == 0
    assert scored["tokens"] == ["a", "b", "c"]
    assert scored["token_logprobs"] == [None, -0.5, -0.5]
    assert scored["top_logprobs"] == [None, {"b": -0.5}, {"c": -0.5}]
    assert scored["text_offset"] == [0, 1, 2]
    more = world.post("/v1/completions", body | {"max_tokens": 2, "seed": 0}).json()["choices"][0]
    assert (more["text"], len(more["logprobs"]["tokens"])) == ("abcab", 5)


def test_several_prompts_are_answered_in_order_each_n_times(world: World) -> None:
    client = world.openai()
    answer = client.completions.create(model="entities", prompt=[say("one"), say("two")], n=2)
    assert [choice.text for choice in answer.choices] == ["one", "one", "two", "two"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2 * len(say("one"))
    texts = ["", ""]
    for chunk in client.completions.create(
        model="entities", prompt=[[1, 5], [1, 6]], max_tokens=4, seed=1, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["bcde", "bcde"]


def test_stop_tokens_and_stop_strings_end_an_answer_unshown(world: World) -> None:
    client = world.openai()
    by_token = client.chat.completions.create(**chat("abcdef"), extra_body={"stop_token_ids": [8]})
    assert (by_token.choices[0].message.content, by_token.choices[0].finish_reason) == ("abc", "stop")
    by_string = client.chat.completions.create(**chat("abcdef"), stop="cd")
    assert (by_string.choices[0].message.content, by_string.choices[0].finish_reason) == ("ab", "stop")
    late = client.chat.completions.create(**chat("abcabc"), stop="b", extra_body={"min_tokens": 3})
    assert late.choices[0].message.content == "abca"


@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_are_told_of_an_answer_the_gateway_ends_itself(world: World, stream: bool) -> None:
    body = chat("abcdef", stop="cd")
    if stream:
        *_, last = events(world, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    else:
        last = world.post("/v1/chat/completions", body).json()
    prompt = last["usage"]["prompt_tokens"]
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == prompt - 1
    assert world.interaction(last["id"]).interaction.cached_tokens == prompt - 1


def test_an_overloaded_engine_answers_429_with_a_time_to_come_back(world: World) -> None:
    body = {"model": "entities", "prompt": "\x03"}
    response = world.post("/v1/completions", body)
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert response.json()["error"]["code"] == "overloaded"
    with pytest.raises(openai.RateLimitError):
        world.openai().completions.create(**body)


def test_a_deadline_answers_504_and_leaves_nothing_running(world: World) -> None:
    body = {"model": "entities", "prompt": "\x05", "timeout": 0.2}
    response = world.post("/v1/completions", body)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline")
    assert world.post("/v1/completions", body | {"stream": True}).status_code == 504
    eventually(lambda: world_is_quiet(world))


def test_a_deadline_in_mid_stream_ends_it_with_an_error(world: World) -> None:
    body = {"model": "entities", "prompt": "a", "timeout": 0.3, "max_tokens": 490}
    last = list(events(world, "/v1/completions", body))[-1]
    assert last["error"]["code"] == "deadline"


def test_what_the_engine_refuses_is_the_callers_fault_and_what_it_breaks_is_not(world: World) -> None:
    client = world.openai()
    with pytest.raises(openai.BadRequestError, match="unclosed group"):
        client.completions.create(
            model="entities", prompt="a", extra_body={"structured_outputs": {"regex": "("}}, stream=True
        )
    with pytest.raises(openai.InternalServerError) as broken:
        client.completions.create(model="entities", prompt="\x04")
    assert broken.value.code == "engine_error"
