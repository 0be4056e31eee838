"""What edits logits, ends answers or is told beside them: the same with drafts as without, harmful ones included."""

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import tokenizers
from msgspec.structs import replace

from engine.core import Engine
from engine.messages import Generate, Sampling
from tests.engine.constraining import EOS, PERSON, TOKENIZER, VOCABULARY, regex, schema
from tests.engine.drafters import Oracle, pair
from tests.engine.lossless import (
    DRAWN,
    GREEDY,
    STOPS,
    Answer,
    accepted,
    asks,
    check_equal,
    force,
    plain,
    run,
    started,
)

EDITS = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.9},
    "repetition": {"repetition_penalty": 1.4},
    "all penalties": {"presence_penalty": -0.7, "frequency_penalty": 0.4, "repetition_penalty": 0.8},
    "bias": {"logit_bias": dict.fromkeys(range(20, 60), 3.5) | {61: -100.0, 62: 100.0}},
    "stops": {"stop_token_ids": tuple(range(0, VOCABULARY, 25))},
    "early stops": {"stop_token_ids": tuple(range(0, VOCABULARY, 5)), "min_tokens": 17},
    "penalised stops": {"stop_token_ids": tuple(range(0, VOCABULARY, 9)), "min_tokens": 9, "frequency_penalty": 1.1},
}
GRAMMARS = {
    "schema": schema(PERSON),
    "regex": regex("([a-z]{2,5} ){1,9}[0-9]{4}"),
    "choice": regex("(yes|no|perhaps|never){1,12}"),
    "one end": regex("[a-f]{20}"),
}


@pytest.fixture(scope="module")
def core(talking_model: Path) -> Iterator[Engine]:
    with started(talking_model, step_tokens=128, kv_tokens=16384) as core:
        yield core


def check_all(core: Engine, requests: list[Generate], *, stops: tuple[int, ...] = STOPS) -> dict[str, Answer]:
    """Equal with right, half right, plausible, harmful and two drafts; the answers with right ones."""
    slow = plain(core, requests)
    oracle = Oracle(slow, VOCABULARY)
    for drafters in ((oracle.partly,), (oracle.meddling(stops),), (oracle.stopping(stops),), pair(oracle)):
        force(core, *drafters)
        check_equal(run(core, requests), slow)
    force(core, oracle.right)
    fast = run(core, requests)
    check_equal(fast, slow)
    assert accepted(fast) > 0.5 * sum(len(answer.tokens) for answer in fast.values())
    return fast


@pytest.mark.parametrize("name", EDITS)
def test_edits_of_the_logits_follow_the_draft(core: Engine, name: str) -> None:
    """Hot and greedy; the penalties of a place count the tokens drafted before it."""
    kinds = [kind | EDITS[name] for kind in (GREEDY, DRAWN[0], DRAWN[2])]
    stops = kinds[0].get("stop_token_ids", STOPS)
    fast = check_all(core, asks(kinds, copies=2, seed=21), stops=tuple(stops)[:9])
    ends = {answer.ending[0] for answer in fast.values()}
    assert "stop" in ends if "stop" in name else ends == {"length"}
    if "min_tokens" in EDITS[name]:
        assert all(len(answer.tokens) > EDITS[name]["min_tokens"] for answer in fast.values())


@pytest.mark.parametrize("name", GRAMMARS)
def test_grammars_look_ahead_of_the_draft(core: Engine, name: str) -> None:
    """Also with penalties and early stops; every answer is one that the grammar admits, to its end."""
    kinds = [
        kind | {"max_tokens": 150, "stop_token_ids": (EOS,)} | more
        for kind in (GREEDY, DRAWN[0], DRAWN[1])
        for more in ({}, {"frequency_penalty": 0.8, "min_tokens": 12})
    ]
    requests = asks(kinds, seed=23, grammar=GRAMMARS[name])
    fast = check_all(core, requests, stops=(EOS,))
    backend = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    assert any(answer.ending[0] == "stop" for answer in fast.values())
    for answer in fast.values():
        assert answer.ending[0] in ("stop", "length")
        if name == "schema" and answer.ending[0] == "stop":
            jsonschema.validate(json.loads(backend.decode(answer.tokens)), PERSON)


def test_a_grammar_that_cannot_go_on_ends_the_answer_by_the_same_rule(core: Engine) -> None:
    """It becomes too complex on its way. Drafts may find out earlier, but say nothing that it does not admit."""
    requests = asks([GREEDY, DRAWN[0]], copies=2, seed=25, tokens=60, grammar=regex("(?:a?){5000}a{5000}"))
    slow = plain(core, requests)
    oracle = Oracle(slow, VOCABULARY)
    for drafters in ((oracle.right,), (oracle.partly,), pair(oracle)):
        force(core, *drafters)
        fast = run(core, requests)
        for name, answer in slow.items():
            assert fast[name].ending[0] == answer.ending[0] == "error"
            assert fast[name].tokens == answer.tokens[: len(fast[name].tokens)]


def test_logprobs_tops_and_prompt_logprobs_are_the_same(core: Engine) -> None:
    kinds = [kind | {"top_logprobs": count} for kind, count in zip([GREEDY, *DRAWN], (5, 0, 20, 1, 3, 2), strict=True)]
    kinds += [DRAWN[0] | {"top_logprobs": 4, "presence_penalty": 1.0, "logit_bias": {9: 4.0}}]
    requests = asks(kinds, copies=2, seed=27)
    requests = [replace(one, prompt_logprobs=number % 3 == 0) for number, one in enumerate(requests)]
    fast = check_all(core, requests)
    for request in requests:
        answer = fast[request.id]
        assert len(answer.prompt) == (len(request.prompt) - 1 if request.prompt_logprobs else 0)
        assert all(len(top) == request.sampling.top_logprobs for top in answer.top)
        assert len(answer.top) == (len(answer.tokens) if request.sampling.top_logprobs else 0)


def test_choices_differ_and_are_the_same(core: Engine) -> None:
    """`n` choices of one prompt and seed: each has its own noise, drafted or not."""
    sampling = Sampling(temperature=1.0, seed=5, max_tokens=40)
    requests = [Generate(id=str(choice), prompt=[5, 6, 7], choice=choice, sampling=sampling) for choice in range(6)]
    fast = check_all(core, requests)
    assert len({tuple(answer.tokens) for answer in fast.values()}) == 6


@pytest.mark.parametrize("most", [1, 2, 3, 8, 17, 18])
def test_an_answer_ends_at_its_most_tokens_whatever_is_drafted(core: Engine, most: int) -> None:
    requests = asks([GREEDY, *DRAWN], seed=29, tokens=most)
    slow = plain(core, requests)
    oracle = Oracle(slow, VOCABULARY)
    for drafter in (oracle.right, oracle.meddling(STOPS)):
        force(core, drafter)
        fast = run(core, requests)
        check_equal(fast, slow)
        assert all((len(answer.tokens), answer.ending[0]) == (most, "length") for answer in fast.values())


def test_an_answer_ends_at_the_context_limit_whatever_is_drafted(talking_model: Path) -> None:
    """Up to the last place of the last block."""
    with started(talking_model, max_context=64, kv_tokens=1024) as core:
        requests = [
            replace(request, prompt=(request.prompt * 64)[:length])
            for request, length in zip(asks([GREEDY, *DRAWN], tokens=100), (5, 31, 47, 62, 63, 40), strict=True)
        ]
        slow = plain(core, requests)
        oracle = Oracle(slow, VOCABULARY)
        for drafters in ((oracle.right,), (oracle.meddling(STOPS),), pair(oracle)):
            force(core, *drafters)
            fast = run(core, requests)
            check_equal(fast, slow)
        assert all(len(fast[one.id].tokens) == 64 - len(one.prompt) for one in requests)
