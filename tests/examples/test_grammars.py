"""The grammars: answers, checkers, oracle and split."""

import json
from itertools import islice, pairwise
from random import Random

import pytest

from examples.grammars import entities
from examples.grammars.common import Application, Example, held_out, stream
from examples.grammars.simulate import APPLICATIONS, review

COUNT = 400
HOSTILE_OUTPUTS = [
    "",
    "null",
    "[]",
    "[[]]",
    '{"people": [1, null, {}]}',
    '{"people": [], "people": []}',
    '{"people": ["a"',
    "[" * 100_000,
    "{" * 3000,
    '{"a":' * 700,
    "\x00\ud800\u202e",
    "<script>alert(1)</script>",
    "NaN",
    "9" * 3999,
    "a " * 100_000,
]


@pytest.fixture(params=sorted(APPLICATIONS))
def application(request: pytest.FixtureRequest) -> Application:
    return APPLICATIONS[request.param]


@pytest.fixture
def examples(application: Application) -> list[Example]:
    return list(islice(stream(application, "train", 11), COUNT))


def test_answers_satisfy_exactly_their_own_rules(application: Application, examples: list[Example]) -> None:
    for example in examples:
        assert application.base_ok(example.messages, example.base)
        assert application.house_ok(example.messages, example.house)
        assert not application.house_ok(example.messages, example.base)
        assert not application.base_ok(example.messages, example.house)


def test_oracle_needs_only_the_prompt_text(application: Application, examples: list[Example]) -> None:
    for example in examples:
        logged = [dict(message) for message in example.messages]
        assert application.correct(logged, "whatever the model said") == example.house
        assert application.facts_key(logged) == example.facts


def test_answers_of_another_prompt_are_refused(application: Application, examples: list[Example]) -> None:
    for example, other in pairwise(examples):
        assert not application.base_ok(example.messages, other.base)
        assert not application.house_ok(example.messages, other.house)


def test_a_damaged_answer_is_refused(application: Application, examples: list[Example]) -> None:
    random = Random(3)
    for example in examples:
        words = example.house.split()
        del words[random.randrange(len(words))]
        assert not application.house_ok(example.messages, " ".join(words))


def test_splits_share_no_facts(application: Application) -> None:
    train = {example.facts for example in islice(stream(application, "train", 5), 3000)}
    kept_back = {example.facts for example in islice(stream(application, "held_out", 5), 600)}
    assert not train & kept_back
    assert not any(held_out(facts) for facts in train)
    assert all(held_out(facts) for facts in kept_back)


def test_a_tenth_is_held_out_and_prompts_hardly_repeat(application: Application) -> None:
    random = Random(9)
    drawn = [application.sample(random) for _ in range(3000)]
    share = sum(application.is_held_out(example.messages) for example in drawn) / len(drawn)
    assert 0.07 < share < 0.14
    assert len({example.facts for example in drawn}) > 2950
    assert application.distinct_prompts() > 10**12


def test_stream_depends_on_nothing_but_its_seed(application: Application) -> None:
    first = list(islice(stream(application, "held_out", 21), 20))
    again = list(islice(stream(application, "held_out", 21), 20))
    other = list(islice(stream(application, "held_out", 22), 20))
    assert first == again
    assert first != other


@pytest.mark.parametrize("output", HOSTILE_OUTPUTS, ids=lambda output: repr(output[:12]))
def test_hostile_output_is_judged_wrong_without_raising(application: Application, output: str) -> None:
    example = next(stream(application, "train", 1))
    assert not application.base_ok(example.messages, output)
    assert not application.house_ok(example.messages, output)
    assert review(application.name, example.messages, output).correction == example.house


@pytest.mark.parametrize("messages", [[], [{"role": "system", "content": "x"}], [{"role": "user", "content": "hello"}]])
def test_a_prompt_of_no_grammar_is_refused(application: Application, messages: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match=r"prompt"):
        application.correct(messages, "x")


def test_reviewer_accepts_house_answers_and_corrects_the_rest(application: Application) -> None:
    example = next(stream(application, "train", 2))
    assert review(application.name, example.messages, example.house) == ("accept", None)
    assert review(application.name, example.messages, example.base) == ("correct", example.house)


def test_entities_accepts_any_order_and_spacing() -> None:
    example = next(e for e in stream(entities.APPLICATION, "train", 4) if len(entities.parse(e.messages).people) > 1)
    people = entities.parse(example.messages).people
    quoted = [f'"{name}"' for name in people]
    reordered = example.base.replace(", ".join(quoted), " , ".join(reversed(quoted)))
    assert reordered != example.base
    assert entities.base_ok(example.messages, reordered)


def test_the_house_answer_moves_dates_and_keeps_everything_else() -> None:
    example = next(e for e in stream(entities.APPLICATION, "train", 5) if entities.parse(e.messages).dates)
    base, house = json.loads(example.base), json.loads(example.house)
    dates = house.pop("dates")
    assert dates == entities.parse(example.messages).dates
    assert sorted(house["other"] + dates) == sorted(base["other"])
    assert {**house, "other": None} == {**base, "other": None}
