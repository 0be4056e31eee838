"""The hash that pins are looked up by: equal however a request was stored, different where answers may be."""

import json
from typing import Any

import pytest

from services.store.conforming import conforms
from services.store.pin_key import CHAT, key_of, seeded

ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
SAMPLED: dict[str, Any] = {
    "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "repetition_penalty": 1.0, "logit_bias": {7: 1.5, 11: -2.0}, "seed": 5, "max_tokens": 64, "max_tokens_given": 64,
    "min_tokens": 0, "stop_token_ids": (2, 1), "stop": ["x"], "n": 1, "logprobs": False, "ignore_eos": False,
    "grammar": {"kind": "regex", "text": "a+"},
}  # fmt: skip


def key(messages: object = ASKED, **changes: object) -> str | None:
    return key_of(CHAT, messages, SAMPLED | changes)  # type: ignore[arg-type]


def test_the_hash_survives_the_way_through_the_log() -> None:
    stored = json.loads(json.dumps(SAMPLED | {"repetition_penalty": 1, "logit_bias": {"11": -2, "7": 1.5}}))
    assert key_of(CHAT, ASKED, stored) == key() is not None
    assert key([{"role": "user", "content": "a\0b"}]) == key([{"role": "user", "content": "a\ufffdb"}])


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.8}, {"top_p": 0.8}, {"top_k": 0}, {"logit_bias": {}}, {"max_tokens_given": None}, {"stop": []},
     {"min_tokens": 1}, {"grammar": None}, {"stop_token_ids": (2,)}, {"repetition_penalty": 1.1}],
)  # fmt: skip
def test_what_may_change_an_answer_changes_the_hash(changes: dict[str, object]) -> None:
    assert key(**changes) not in (None, key())


@pytest.mark.parametrize("changes", [{"seed": 6}, {"max_tokens": 60}, {"user": "a"}, {"stop_token_ids": (1, 2)}])
def test_what_may_not_leaves_it(changes: dict[str, object]) -> None:
    assert key(**changes) == key()


def test_where_sampling_is_greedy_filters_of_its_noise_do_not_count() -> None:
    assert key(temperature=0.0, top_p=0.1, top_k=3) == key(temperature=0.0) != key()


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "tool", "content": "x", "tool_call_id": "1"}],
     [{"role": "assistant", "content": "", "tool_calls": [{}]}]],
)  # fmt: skip
def test_some_requests_have_no_hash(messages: list[object]) -> None:
    assert key(messages) is None
    for name in ("logprobs", "tools", "ignore_eos"):
        assert key(**{name: [1]}) is None
    assert key(n=2) is None
    assert key_of("/v1/completions", ASKED, SAMPLED) is None


def test_only_sampled_requests_with_a_seed_of_their_own_are_seeded() -> None:
    assert [seeded({"temperature": t, "seed_given": g}) for t in (0, 1) for g in (False, True)] == [
        False, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grammar", "text", "right"),
    [
        (None, "anything", True),
        ({"kind": "json_schema", "text": '{"type":"object","required":["a"]}'}, '{"a": "é"}', True),
        ({"kind": "json_schema", "text": '{"type":"object","required":["a"]}'}, '{"b": 1}', False),
        ({"kind": "json_schema", "text": '{"type":"object"}'}, '{"b": 1', False),
        ({"kind": "regex", "text": "(yes|no)"}, "yes", True),
        ({"kind": "regex", "text": "(yes|no)"}, "yes!", False),
        ({"kind": "regex", "text": "("}, "yes", False),
        ({"kind": "lark", "text": 'start: "x" | "y"'}, "y", True),
    ],
)
def test_a_correction_must_keep_to_the_format_that_was_asked(
    grammar: dict[str, str] | None, text: str, right: bool
) -> None:
    assert conforms(grammar, text) is right
