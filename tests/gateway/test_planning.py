"""From a body to what the engine is asked and the log will hold, without a process in between."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import pytest

from engine.messages import Generate, Grammar, Status
from engine.text.tokenizer import Tokenizer
from services.errors import InvalidRequest
from services.gateway.access import Target
from services.gateway.bodies import parse_chat, parse_text
from services.gateway.planning import Plan, make_plan
from services.gateway.snapshot import KnownProject
from services.store.base import uuid7
from services.store.speculation import Heads, SpeculationConfig, arm_of
from tests.gateway.tiny_model import write_tokenizer

KEY = UUID(int=7)
ENGINE = Status(
    epoch=1, id="", base="b" * 64, model="m", dtype="fp32", device="cpu", threads=1, max_context=512, running=0,
    waiting=0, blocks_total=1, blocks_free=1, slots=[], slots_total=1, steps=0, generated_tokens=0, uptime_seconds=0,
    pid=1,
)  # fmt: skip
PROJECT = KnownProject(
    UUID(int=1), "entities", datetime.now(UTC), {}, "", 1, None, None, frozenset(), Heads(), SpeculationConfig()
)
MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    return Tokenizer.load(directory)


def test_the_vocabulary_is_read_before_the_first_request(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert {"special_ids", "byte_level", "_control_tokens"} <= vars(Tokenizer.load(tmp_path)).keys()


def plan(tokenizer: Tokenizer, *, text: bool = False, **fields: object) -> Plan:
    return plan_for(Target(PROJECT, (None,)), tokenizer, text=text, **fields)


def plan_for(target: Target, tokenizer: Tokenizer, *, text: bool = False, **fields: object) -> Plan:
    body = {"model": "entities", **({"prompt": "abc"} if text else {"messages": MESSAGES}), **fields}
    ask = (parse_text if text else parse_chat)(json.dumps(body).encode())
    return asyncio.run(make_plan(ask, target, KEY, tokenizer, ENGINE, 0.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.5), ("top_p", 0.9), ("top_k", 7), ("min_p", 0.1), ("presence_penalty", -1.5),
        ("frequency_penalty", 2.0), ("repetition_penalty", 1.3), ("min_tokens", 3), ("seed", 11), ("max_tokens", 40),
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", [True, False])
def test_every_sampling_parameter_reaches_the_engine_and_the_log(
    tokenizer: Tokenizer, name: str, value: float, text: bool
) -> None:
    made = plan(tokenizer, text=text, **{name: value})
    assert getattr(made.message(0).sampling, name) == value
    assert made.choices[0].admitted.parameters[name] == value


def test_the_log_holds_what_else_shaped_the_answer(tokenizer: Tokenizer) -> None:
    text = plan(tokenizer, text=True, echo=True, logprobs=2, timeout=2.5).choices[0].admitted.parameters
    assert (text["echo"], text["logprobs"], text["timeout"]) == (True, True, 2.5)
    asked: dict[str, Any] = {
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
    }
    called = plan(tokenizer, tools=[TOOL], **asked).choices[0].admitted.parameters
    assert {name: called[name] for name in asked} == asked
    assert plan(tokenizer, tools=[TOOL], tool_choice="none").choices[0].admitted.parameters["tool_choice"] == "none"
    assert not asked.keys() & plan(tokenizer).choices[0].admitted.parameters.keys()


@pytest.mark.parametrize(("text", "param"), [(True, "prompt"), (False, "messages")])
def test_a_prompt_without_room_names_its_field(tokenizer: Tokenizer, text: bool, param: str) -> None:
    for fields in (
        {"max_tokens": 10**4},
        {"prompt": "a" * 600} if text else {"messages": [MESSAGES[0] | {"content": "a" * 600}]},
    ):
        with pytest.raises(InvalidRequest, match="the context holds 512") as refused:
            plan(tokenizer, text=text, **fields)
        assert refused.value.param == param


def test_what_is_not_asked_for_changes_nothing(tokenizer: Tokenizer) -> None:
    sampling = plan(tokenizer).message(0).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (sampling.logit_bias, sampling.top_logprobs, sampling.min_tokens) == ({}, 0, 0)
    message = plan(tokenizer).message(0)
    assert (message.grammar, message.deadline_seconds, message.prompt_logprobs) == (None, 0.0, False)


def test_tokens_by_id_reach_the_engine(tokenizer: Tokenizer) -> None:
    message = plan(tokenizer, logit_bias={"5": -100, "6": 2.5}, stop_token_ids=[9]).message(0)
    assert message.sampling.logit_bias == {5: -100, 6: 2.5}
    assert message.sampling.stop_token_ids == (*tokenizer.eos_ids, 9)
    assert plan(tokenizer, ignore_eos=True, stop_token_ids=[9]).message(0).sampling.stop_token_ids == (9,)


def test_priority_deadline_and_share_reach_the_engine(tokenizer: Tokenizer) -> None:
    message = plan(tokenizer, priority="batch", timeout=2.5).message(0)
    assert (message.priority, message.deadline_seconds, message.share) == ("batch", 2.5, KEY.hex)


def test_choices_share_a_seed_and_differ_by_number(tokenizer: Tokenizer) -> None:
    made = plan(tokenizer, text=True, prompt=["a", "b"], n=2)
    messages = [made.message(index) for index in range(4)]
    assert [message.choice for message in messages] == [0, 1, 0, 1]
    assert messages[0].prompt == messages[1].prompt != messages[2].prompt
    assert len({message.sampling.seed for message in messages}) == 1
    assert len({message.id for message in messages}) == 4
    assert [choice.admitted.prompt_token_ids for choice in made.choices] == [message.prompt for message in messages]


@pytest.mark.parametrize(("asked", "wanted"), [(None, 0), (0, 0), (20, 20)])
def test_likeliest_tokens_are_asked_for_only_with_logprobs(
    tokenizer: Tokenizer, asked: int | None, wanted: int
) -> None:
    assert plan(tokenizer, logprobs=True, top_logprobs=asked).message(0).sampling.top_logprobs == wanted
    made = plan(tokenizer, text=True, logprobs=asked, echo=True).message(0)
    assert made.sampling.top_logprobs == wanted
    assert made.prompt_logprobs == (asked is not None)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}},
         "json_schema", json.dumps(SCHEMA, separators=(",", ":"))),
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema",
         json.dumps(SCHEMA, separators=(",", ":"))),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"grammar": "start: /x/"}}, "lark", "start: /x/"),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, "lark", 'start: "yes" | "n\\"o"'),
    ],
)  # fmt: skip
def test_formats_become_grammars(
    tokenizer: Tokenizer, fields: dict[str, Any], kind: Literal["json_schema", "regex", "lark"], text: str
) -> None:
    for endpoint in (True, False):
        made = plan(tokenizer, text=endpoint, **fields)
        assert made.message(0).grammar == Grammar(kind=kind, text=text)
        assert made.choices[0].admitted.parameters["grammar"] == {"kind": kind, "text": text}


def test_free_text_is_no_grammar(tokenizer: Tokenizer) -> None:
    assert plan(tokenizer, response_format={"type": "text"}).grammar is None


def test_a_forced_call_continues_the_prompt(tokenizer: Tokenizer) -> None:
    free, forced = (plan(tokenizer, tools=[TOOL], tool_choice=choice) for choice in ("auto", "required"))
    assert forced.message(0).prompt == free.message(0).prompt + tokenizer.encode("<tool_call>\n")
    assert free.grammar is None
    assert forced.grammar is not None


def test_a_template_that_knows_no_tools_refuses_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer.directory / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    plain = Tokenizer.load(tmp_path)
    said = [{"role": "tool", "content": "noon", "tool_call_id": "1"}]
    for fields in ({"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "required"}, {"messages": said}):
        with pytest.raises(InvalidRequest, match="knows no tools"):
            plan(plain, **fields)
    assert plan(plain, tools=[TOOL], tool_choice="none").message(0).prompt == plain.encode("hi")


def drafting(tokenizer: Tokenizer, heads: Heads, *, pinned: bool = False, **config: object) -> list[Generate]:
    """What the engine is asked for 600 answers under one deployment."""
    settings = SpeculationConfig.model_validate(config)
    target = Target(replace(PROJECT, heads=heads, speculation=settings), (None,), pinned=pinned)
    made = [plan_for(target, tokenizer, n=8) for _ in range(75)]
    for one in made:
        for index, choice in enumerate(one.choices):
            arm = arm_of(choice.id, settings, heads)
            assert (one.message(index).speculate, choice.speculate) == (arm != "baseline", arm != "baseline")
            assert one.message(index).speculator == (None if pinned else heads.of(arm))
    return [one.message(index) for one in made for index in range(8)]


def share(messages: list[Generate], condition: Callable[[Generate], bool]) -> float:
    return sum(map(condition, messages)) / len(messages)


def test_requests_are_shared_out_between_live_heads_the_canary_and_neither(tokenizer: Tokenizer) -> None:
    heads = Heads(live="1" * 64, canary="2" * 64, share=0.4)
    messages = drafting(tokenizer, heads, baseline_share=0.2, control_share=0.25)
    assert share(messages, lambda message: not message.speculate) == pytest.approx(0.2, abs=0.07)
    assert share(messages, lambda message: message.speculator == heads.canary) == pytest.approx(0.32, abs=0.08)
    assert share(messages, lambda message: message.speculator == heads.live) == pytest.approx(0.36, abs=0.08)
    assert all(message.learn for message in messages)


def test_without_heads_the_suffix_drafter_works_alone_and_switched_off_nothing_does(tokenizer: Tokenizer) -> None:
    alone = drafting(tokenizer, Heads(), baseline_share=0)
    assert {(message.speculator, message.speculate) for message in alone} == {(None, True)}
    off = drafting(tokenizer, Heads(live="1" * 64), enabled=False)
    assert {(message.speculator, message.speculate) for message in off} == {(None, False)}


def test_a_pinned_adapter_neither_drafts_with_the_projects_heads_nor_teaches_its_corpus(tokenizer: Tokenizer) -> None:
    messages = drafting(tokenizer, Heads(live="1" * 64), pinned=True)
    assert {(message.speculator, message.learn) for message in messages} == {(None, False)}


def test_an_interactions_arm_never_changes_and_each_draw_is_its_own() -> None:
    ids = [uuid7() for _ in range(4000)]
    config = SpeculationConfig(baseline_share=0.5, control_share=0.5)
    heads = Heads(live="1" * 64, canary="2" * 64, share=0.5)
    counts = Counter(arm_of(one, config, heads) for one in ids)
    assert counts == Counter(arm_of(one, config, heads) for one in ids)
    expected = {"baseline": 2000, "canary": 1000, "suffix": 500, "live": 500}
    assert dict(counts) == pytest.approx(expected, rel=0.15)
