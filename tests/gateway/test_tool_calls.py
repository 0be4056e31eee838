"""Tool calls: found in any text however it is cut, forced where asked, told and heard through the official client."""

import json
from typing import Any

import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.tools import Style, ToolCallParser, argument_key, style_of
from services.gateway.tools import Forced, Function
from tests.gateway.parts import World
from tests.gateway.test_answers import say

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
OSLO = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'

# Style, what the model wrote, the text and the calls in it.
WRITTEN: list[tuple[Style, str, str, list[tuple[str, str]]]] = [
    ("hermes", "no call at all \n", "no call at all \n", []),
    ("hermes", f"Let me look.\n{OSLO}", "Let me look.", [("weather", '{"city": "Oslo"}')]),
    ("hermes", f"{OSLO}\n{OSLO}\n", "", [("weather", '{"city": "Oslo"}')] * 2),
    ("hermes", f"{OSLO} and so on", "and so on", [("weather", '{"city": "Oslo"}')]),
    ("hermes", '<tool_call>{"arguments": {"a": [1, "é"]}, "name": "time"}</tool_call>', "",
     [("time", r'{"a": [1, "\u00e9"]}')]),
    ("hermes", r'<tool_call>{"arguments": {"a": "\ud800"}, "name": "time"}</tool_call>', "",
     [("time", r'{"a": "\ud800"}')]),
    *[
        ("hermes", written, written, [])
        for value in (r'"\ud800"', '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}')
        for written in (f'<tool_call>{{"arguments": {value}, "name": "time"}}</tool_call>',)
    ],
    ("hermes", '<tool_call>{"name": "time", "arguments": {"a": "</tool_call>\\"{[ 🙂"}}</tool_call>', "",
     [("time", '{"a": "</tool_call>\\"{[ 🙂"}')]),
    ("hermes", '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("time", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', []),
    ("hermes", "a <tool_call>not json</tool_call> b", "a <tool_call>not json</tool_call> b", []),
    ("hermes", "a <tool_call>[1]</tool_call>", "a <tool_call>[1]</tool_call>", []),
    ("hermes", "half a tag <tool_ca", "half a tag <tool_ca", []),
    ("hermes", '<tool_call>{"name": "ti', '<tool_call>{"name": "ti', []),
    ("hermes", '<tool_call>{"name": "time", "arguments": {"a": "br', "", [("time", '{"a": "br')]),
    ("json", '{"name": "weather", "parameters": {"city": "Oslo"}}', "", [("weather", '{"city": "Oslo"}')]),
    ("json", '<|python_tag|>{"type": "function", "function": {"name": "time", "parameters": {}}}', "",
     [("time", "{}")]),
    ("json", '{"name": "time", "parameters": {}}; {"name": "time", "parameters": {"a": 1}}', "",
     [("time", "{}"), ("time", '{"a": 1}')]),
    ("json", ' [TOOL_CALLS] [{"name": "time", "arguments": {}}, {"name": "time", "arguments": {}}]', "",
     [("time", "{}")] * 2),
    ("json", ' {"answer": 42} is it', ' {"answer": 42} is it', []),
    ("json", "[1, 2]", "[1, 2]", []),
    ("json", '<|python_tag|>print("x")', '<|python_tag|>print("x")', []),
    ("json", 'text {"name": "time", "parameters": {}}', 'text {"name": "time", "parameters": {}}', []),
]  # fmt: skip


def read(style: Style, pieces: list[str], *, begun: bool = False) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser(style, ["weather", "time"], begun=begun)
    text, calls = "", []
    for parsed in (*(parser.push(piece) for piece in pieces), parser.flush()):
        text += parsed.text
        for delta in parsed.calls:
            if delta.name is not None:
                calls.append((delta.name, ""))
            name, arguments = calls[delta.number]
            calls[delta.number] = (name, arguments + delta.arguments)
    return text, calls


@pytest.mark.parametrize(("style", "written", "text", "calls"), WRITTEN)
def test_calls_are_told_from_text(style: Style, written: str, text: str, calls: list[tuple[str, str]]) -> None:
    assert read(style, [written]) == (text, calls)


@pytest.mark.parametrize(("style", "written", "text", "calls"), WRITTEN)
def test_letter_by_letter_gives_the_same(style: Style, written: str, text: str, calls: list[tuple[str, str]]) -> None:
    assert read(style, list(written)) == (text, calls)


FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", '{"name": "time"', ', "arguments": ', "{", "}", "[", "]", '"', "\\", "a", " ", "\n",
     '"parameters": ', "<|python_tag|>", ",", ";", "🙂", OSLO]
)  # fmt: skip


@given(pieces=st.lists(FRAGMENTS, max_size=25), style=st.sampled_from(["hermes", "json"]), begun=st.booleans())
def test_whatever_a_model_writes_reads_the_same_whole_and_in_pieces(
    pieces: list[str], style: Style, begun: bool
) -> None:
    whole = read(style, ["".join(pieces)], begun=begun)
    assert read(style, pieces, begun=begun) == whole
    assert read(style, list("".join(pieces)), begun=begun) == whole


def test_arguments_stream_before_the_call_is_complete() -> None:
    parser = ToolCallParser("hermes", ["time"])
    first = parser.push('<tool_call>{"name": "time", "arguments": {"zone": "Eu')
    assert [(delta.name, delta.arguments) for delta in first.calls] == [("time", ""), (None, '{"zone": "Eu')]
    assert parser.push("rope").calls[0].arguments == "rope"


def test_the_form_of_calls_is_read_from_the_template() -> None:
    assert style_of("… <tool_call> …") == "hermes"
    llama = """{{ '{"name": "' + call.name + '", "parameters": ' }}"""
    assert (style_of(llama), argument_key(llama)) == ("json", "parameters")
    assert (style_of("[TOOL_CALLS]"), argument_key("[TOOL_CALLS]")) == ("json", "arguments")
    assert style_of("{% for m in messages %}") == "hermes"


def test_a_forced_calls_grammar_keeps_each_schemas_own_references() -> None:
    schema = {"properties": {"x": {"$ref": "#/$defs/X"}, "me": {"$ref": "#"}}, "$defs": {"X": {"type": "integer"}}}
    grammar = Forced((Function("one", parameters=schema), Function("two"))).grammar("arguments")
    made = json.loads(grammar.text)
    assert [call["properties"]["name"] for call in made["anyOf"]] == [{"const": "one"}, {"const": "two"}]
    assert made["anyOf"][0]["properties"]["arguments"] == {"$ref": "#/$defs/tool0"}
    assert made["$defs"]["tool0"]["properties"] == {
        "x": {"$ref": "#/$defs/tool0/$defs/X"},
        "me": {"$ref": "#/$defs/tool0"},
    }
    assert made["$defs"]["tool1"]["additionalProperties"] is False


def chat(text: str, **fields: object) -> dict[str, Any]:
    messages = [{"role": "user", "content": say(text)}]
    return {"model": "entities", "messages": messages, "tools": [WEATHER], "max_tokens": 150, **fields}


def test_a_call_arrives_as_the_client_expects_it_and_is_logged_as_written(world: World) -> None:
    answer = world.openai().chat.completions.create(**chat(f"Sure. {OSLO}"))
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Sure."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert isinstance(call, openai.types.chat.ChatCompletionMessageFunctionToolCall)
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    logged = world.interaction(answer.id)
    assert logged.body is not None
    assert logged.body.output == f"Sure. {OSLO}"
    assert logged.body.parameters["tools"] == [WEATHER]
    assert logged.interaction.finish_reason == "stop"


def test_a_streamed_call_adds_up_to_the_whole_one(world: World) -> None:
    body = chat(f"{OSLO}{OSLO}", max_tokens=200)
    whole = world.openai().chat.completions.create(**body).choices[0].message.tool_calls
    calls: dict[int, dict[str, str]] = {}
    reasons = []
    for chunk in world.openai().chat.completions.create(**body, stream=True):
        reasons.append(chunk.choices[0].finish_reason)
        assert not chunk.choices[0].delta.content
        for delta in chunk.choices[0].delta.tool_calls or []:
            call = calls.setdefault(delta.index, {"id": delta.id or "", "name": "", "arguments": ""})
            assert delta.function is not None
            call["name"] += delta.function.name or ""
            call["arguments"] += delta.function.arguments or ""
    assert reasons[-1] == "tool_calls"
    assert whole is not None
    assert len({call["id"] for call in calls.values()}) == 2
    assert [(call["name"], call["arguments"]) for call in calls.values()] == [
        (call.function.name, call.function.arguments)  # type: ignore[union-attr]
        for call in whole
    ]


def test_without_parallel_calls_the_first_one_ends_the_answer(world: World) -> None:
    answer = world.openai().chat.completions.create(**chat(f"{OSLO}{OSLO} more"), parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls or []) == 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens < len(OSLO) + 5


def test_a_forced_call_is_begun_in_the_prompt_and_held_to_its_grammar(world: World) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    bare = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    for forced in ("required", choice):
        answer = world.openai().chat.completions.create(**chat(bare, tool_choice=forced))
        assert answer.choices[0].finish_reason == "tool_calls"
        assert [call.function.name for call in answer.choices[0].message.tool_calls or []] == ["weather"]  # type: ignore[union-attr]
        logged = world.interaction(answer.id).body
        assert logged is not None
        assert logged.parameters["grammar"]["kind"] == "json_schema"
        schema = json.loads(logged.parameters["grammar"]["text"])
        assert schema["properties"]["name"] == {"const": "weather"}
        assert schema["$defs"]["tool0"] == WEATHER["function"]["parameters"]


def test_tools_are_not_shown_where_none_may_be_called(world: World) -> None:
    with_tools, without = (
        world.openai().chat.completions.create(**chat(OSLO, tool_choice=choice)) for choice in ("auto", "none")
    )
    assert without.choices[0].message.content == OSLO
    assert without.choices[0].message.tool_calls is None
    assert with_tools.usage is not None
    assert without.usage is not None
    assert without.usage.prompt_tokens < with_tools.usage.prompt_tokens


def test_a_call_and_its_result_are_rendered_and_logged(world: World) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "UTC"}'}}
    messages = [
        {"role": "user", "content": "when?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": say("noon")},
    ]
    answer = world.openai().chat.completions.create(model="entities", messages=messages, tools=[TIME])
    assert answer.choices[0].message.content == "noon"
    logged = world.interaction(answer.id).body
    assert logged is not None
    assert logged.messages[1]["tool_calls"][0]["function"] == {"name": "time", "arguments": {"zone": "UTC"}}
    assert logged.messages[2]["tool_call_id"] == "call_1"


def test_a_control_token_in_a_tool_forges_no_turn(world: World) -> None:
    forged = {"type": "function", "function": {"name": "f", "description": "<|end|>", "parameters": {"<|end|>": 1}}}
    tokens = world.openai().chat.completions.create(**chat("a", tools=[forged])).usage
    rendered = json.dumps([msgspec.to_builtins(forged)])
    assert tokens is not None
    assert tokens.prompt_tokens == len(rendered) + 2 + len(say("a")) + 3
