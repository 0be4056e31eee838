"""The official client's whole surface against the real engine: what is asked for holds in what comes back."""

import json
import math
import re
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from pydantic import BaseModel

from engine.text.tokenizer import Tokenizer
from tests.gateway.parts import World

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
# JSON may hold blanks between its parts, and random weights like them.
ROOM = 400
ASK: dict[str, Any] = {"model": "entities", "messages": HELLO, "max_tokens": 20, "seed": 3}


class Person(BaseModel):
    mood: Literal["glad", "sad"]
    adult: bool


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"$ref": "#/$defs/Unit"}, "days": {"enum": [1, 2, 3]}},
            "required": ["unit", "days"],
            "additionalProperties": False,
            "$defs": {"Unit": {"enum": ["celsius", "kelvin"]}},
        },
    },
}


@pytest.fixture(scope="module")
def client(real_world: World) -> openai.OpenAI:
    return real_world.openai()


@pytest.fixture(scope="module")
def tokenizer(real_world: World) -> Tokenizer:
    return Tokenizer.load(real_world.settings.model_path)


def content(answer: Any) -> str:  # noqa: ANN401 - one of the client's many answer types
    return str(answer.choices[0].message.content)


def test_emoji_stream_as_they_are_answered_whole(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    bias = {str(token): 100 for token in tokenizer.encode("🙂é")}
    for seed in range(4):
        ask = {**ASK, "logit_bias": bias, "seed": seed, "temperature": 2.0, "max_tokens": 40}
        whole = content(client.chat.completions.create(**ask))
        pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)]
        assert "".join(pieces) == whole
        assert set(tokenizer.encode(whole.replace("\ufffd", ""))) <= set(tokenizer.encode("🙂é"))


def test_a_bias_of_100_forces_a_token_and_one_of_minus_100_bans_it(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    (q,) = tokenizer.encode("q")
    assert content(client.chat.completions.create(**ASK, logit_bias={str(q): 100})) == "q" * 20
    free = content(client.chat.completions.create(**ASK))
    banned = {str(token): -100 for token in tokenizer.encode("".join(set(free)))}
    assert not set(content(client.chat.completions.create(**ASK, logit_bias=banned))) & set(free)


def test_penalties_and_min_p_change_what_is_drawn(client: openai.OpenAI) -> None:
    greedy = {**ASK, "temperature": 0, "max_tokens": 26}
    plain = content(client.chat.completions.create(**greedy))
    varied = content(client.chat.completions.create(**greedy, extra_body={"repetition_penalty": 100.0}))
    assert len(set(varied)) > len(set(plain))
    sure = content(client.chat.completions.create(**ASK, extra_body={"min_p": 1.0}))
    assert sure == content(client.chat.completions.create(**ASK | {"temperature": 0}))
    penalised = content(client.chat.completions.create(**greedy, presence_penalty=2.0, frequency_penalty=2.0))
    assert penalised != plain


def test_no_stop_token_is_drawn_before_min_tokens(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.eos_ids
    ask = {**ASK, "logit_bias": {str(end): 100}}
    assert content(client.chat.completions.create(**ask)) == ""
    held = client.chat.completions.create(**ask, extra_body={"min_tokens": 7})
    assert (len(content(held)), held.choices[0].finish_reason) == (7, "stop")


def test_likeliest_tokens_are_sorted_and_hold_the_greedy_choice(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASK | {"temperature": 0}, logprobs=True, top_logprobs=20)
    assert answer.choices[0].logprobs is not None
    for entry in answer.choices[0].logprobs.content or []:
        values = [other.logprob for other in entry.top_logprobs]
        assert len(values) == 20
        assert values == sorted(values, reverse=True)
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-4)
        assert sum(map(math.exp, values)) <= 1.0001


def test_echoed_logprobs_are_what_generating_the_same_text_gave(client: openai.OpenAI) -> None:
    made = client.completions.create(model="entities", prompt="abc", max_tokens=8, temperature=0, logprobs=2)
    text = made.choices[0].text
    echoed = client.completions.create(model="entities", prompt=f"abc{text}", max_tokens=0, echo=True, logprobs=2)
    assert echoed.choices[0].text == f"abc{text}"
    drawn, read = made.choices[0].logprobs, echoed.choices[0].logprobs
    assert drawn is not None
    assert read is not None
    assert read.tokens == list(f"abc{text}")
    assert read.token_logprobs is not None
    assert read.token_logprobs[0] is None
    assert read.token_logprobs[3:] == pytest.approx(drawn.token_logprobs, abs=1e-3)
    assert read.text_offset == list(range(11))


def test_an_answer_parses_into_the_class_asked_for(client: openai.OpenAI) -> None:
    for seed in range(3):
        parsed = client.chat.completions.parse(**ASK | {"seed": seed, "max_tokens": ROOM}, response_format=Person)
        assert isinstance(parsed.choices[0].message.parsed, Person)
        assert parsed.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "[0-9]{3}-[A-F]+x"}, "[0-9]{3}-[A-F]+x"),
        ({"choice": ["maybe", 'a "quoted" one', "naïve 🙂"]}, 'maybe|a "quoted" one|naïve 🙂'),
        ({"grammar": 'start: "<" /[ab]{2}/ ">"'}, "<[ab]{2}>"),
        ({"json": {"enum": [17, "x"]}}, '17|"x"'),
    ],
)
def test_structured_outputs_hold_from_the_first_token(
    client: openai.OpenAI, wanted: dict[str, Any], pattern: str
) -> None:
    body = {"structured_outputs": wanted}
    for seed in range(4):
        ask = {**ASK, "seed": seed, "max_tokens": ROOM, "temperature": 2.0, "extra_body": body}
        answer = client.chat.completions.create(**ask)
        assert re.fullmatch(pattern, content(answer)), content(answer)
        assert answer.choices[0].finish_reason == "stop"
        pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)]
        assert "".join(pieces) == content(answer)


@pytest.mark.parametrize("wanted", [{"regex": "("}, {"grammar": "start: nothing"}, {"json": {"type": "colour"}}])
def test_a_format_that_makes_no_sense_is_a_bad_request(client: openai.OpenAI, wanted: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**ASK, extra_body={"structured_outputs": wanted})


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_valid_whatever_the_model_would_say(client: openai.OpenAI, choice: Any) -> None:  # noqa: ANN401
    ask = {**ASK, "max_tokens": ROOM, "tools": [TOOL], "tool_choice": choice, "temperature": 2.0}
    for seed in range(3):
        answer = client.chat.completions.create(**ask | {"seed": seed})
        (call,) = answer.choices[0].message.tool_calls or []
        assert isinstance(call, ChatCompletionMessageFunctionToolCall)
        assert call.function.name == "weather"
        arguments = json.loads(call.function.arguments)
        assert arguments["unit"] in ("celsius", "kelvin")
        assert arguments["days"] in (1, 2, 3)
        assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("tool_calls", None)


def test_a_streamed_forced_call_adds_up(client: openai.OpenAI) -> None:
    name, arguments = "", ""
    for chunk in client.chat.completions.create(
        **ASK | {"max_tokens": ROOM}, tools=[TOOL], tool_choice="required", stream=True
    ):
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert delta.function is not None
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
    assert name == "weather"
    assert set(json.loads(arguments)) == {"unit", "days"}


def test_a_deadline_is_kept(real_world: World) -> None:
    late = real_world.post("/v1/chat/completions", ASK | {"max_tokens": 400, "timeout": 0.05})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline")
    assert real_world.post("/v1/chat/completions", ASK | {"timeout": 60, "priority": "batch"}).status_code == 200


def test_a_prompt_seen_before_is_counted_as_cached(client: openai.OpenAI) -> None:
    ask = {**ASK, "messages": [{"role": "user", "content": "a long preface " * 20}], "max_tokens": 2}
    usages = [client.chat.completions.create(**ask).usage for _ in range(2)]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages if usage and usage.prompt_tokens_details]
    assert cached[0] == 0
    assert (cached[1] or 0) > 100


def test_cached_tokens_are_counted_of_an_answer_that_a_stop_string_ends(client: openai.OpenAI) -> None:
    ask = {**ASK, "messages": [{"role": "user", "content": "another preface " * 20}], "temperature": 0}
    letters = [letter for letter in content(client.chat.completions.create(**ask)) if letter != "\ufffd"]
    answer = client.chat.completions.create(**ask, stop=letters[0])
    assert answer.usage is not None
    assert answer.usage.completion_tokens < ask["max_tokens"]
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) > 100
