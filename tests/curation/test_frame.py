"""Which strategies claim an answer: against the project's own past, the schema asked for, and what was reviewed."""

import json
import time
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import numpy as np
import pytest

from services.store import embeddings, schemas
from services.store.models import ReviewItem
from tests.curation.world import World
from worker.curation import frame as frames
from worker.curation import novelty
from worker.curation.frame import Window, frame, usual_confidence
from worker.curation.sample import sample

SCHEMA = {
    "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name"],
    "additionalProperties": False,
}  # fmt: skip
HOUR = timedelta(hours=1)


def window() -> Window:
    """The hour before this one."""
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return Window(end - HOUR, end)


def claims(world: World, **options: Any) -> dict[str, frozenset[str]]:  # noqa: ANN401
    """Claims by group, of the window's candidates."""
    with world.sessions() as session:
        return {
            one.group_key: one.claims for one in frame(session, world.project_id, window(), "salt", **options)
        }  # fmt: skip


# --- low confidence ---------------------------------------------------------------------------------------


@pytest.fixture
def past(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """40 answers before the window, their mean log-probability from -0.40 to -0.01, their minimum from -4.0."""
    monkeypatch.setattr(frames, "LEAST_RECENT", 40)
    before = window().start - timedelta(minutes=2)
    for index in range(40):
        world.log(
            f"before {index}", at=before, mean_logprob=-0.01 * (40 - index), min_logprob=-0.1 * (40 - index)
        )  # fmt: skip
    return world


def test_an_answer_is_unsure_by_its_projects_own_past_in_the_mean_or_in_one_token(past: World) -> None:
    at = window().start + timedelta(minutes=5)
    past.log("usual", at=at, mean_logprob=-0.2, min_logprob=-2.0)
    past.log("low mean", at=at, mean_logprob=-0.39, min_logprob=-2.0)
    past.log("one low token", at=at, mean_logprob=-0.2, min_logprob=-3.99)
    past.log("unknown", at=at)

    found = claims(past)

    assert {name for name, claimed in found.items() if "low_confidence" in claimed} == {"low mean", "one low token"}


def test_what_is_usual_waits_for_enough_answers_and_looks_at_no_later_ones(past: World) -> None:
    for index in range(60):
        past.log(f"later {index}", at=window().start + timedelta(minutes=9), mean_logprob=-9.0, min_logprob=-9.0)
    with past.sessions() as session:
        usual = usual_confidence(session, past.project_id, before=window().start)
        assert usual is not None
        assert usual.mean == pytest.approx(np.quantile([-0.01 * one for one in range(1, 41)], 0.05))
        assert usual_confidence(session, past.project_id, before=window().start - timedelta(days=1)) is None


# --- schema failures --------------------------------------------------------------------------------------


def grammar(schema: object) -> dict[str, Any]:
    return {"grammar": {"kind": "json_schema", "text": json.dumps(schema)}}


def test_an_output_is_held_to_the_requests_schema_and_without_one_to_the_projects(world: World) -> None:
    at = window().start + timedelta(minutes=5)
    world.log("keeps the request's", '{"name": "Ada"}', at=at, parameters=grammar(SCHEMA))
    world.log("cut off", '{"name": "Ad', at=at, parameters=grammar(SCHEMA), finish_reason="length")
    world.log("wrong type", '{"name": 3}', at=at, parameters=grammar(SCHEMA))
    world.log("the project's", '{"name": 3}', at=at)
    world.log("keeps the project's", '{"years": 3}', at=at)
    world.log("request before project", '{"name": "Ada"}', at=at, parameters=grammar(SCHEMA))
    world.log("words", "Ada", at=at, parameters={"grammar": {"kind": "regex", "text": "A.a"}})
    world.log("a call", "", at=at, parameters={"tools": [{}]})
    ours = {"type": "object", "required": ["years"]}

    found = claims(world, response_schema=ours)

    failed = {name for name, claimed in found.items() if "schema_failure" in claimed}
    assert failed == {"cut off", "wrong type", "the project's"}
    assert {n for n, c in claims(world).items() if "schema_failure" in c} == {"cut off", "wrong type"}


BOMB: dict[str, Any] = {
    "$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]} for n in range(40)}
    | {"d40": {}},
    "$ref": "#/$defs/d0",
}
LOOP = {"$ref": "#"}


@pytest.mark.parametrize(
    ("schema", "output", "expected"),
    [
        (BOMB, "1", None),
        (LOOP, "1", None),
        ({"$ref": "https://example.org/schema.json"}, "1", None),
        ({"$ref": "#/$defs/gone"}, "1", None),
        ({"type": 7}, "1", None),
        ({"properties": 7}, '{"a": 1}', None),
        ([1, 2], "1", None),
        ({"type": "string", "pattern": "^(a+)+$"}, f'"{"a" * 60}!"', False),
        ({"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False}, f'{{"{"a" * 60}!": 1}}', False),
        ({"type": "array", "uniqueItems": True}, "[[1],[1]]", False),
        ({"type": "array", "items": {"type": "integer"}}, "[1, 2, 3.5]", True),
        ({"enum": ["a", "b"]}, '"c"', True),
        ({"anyOf": [{"type": "string"}, {"minimum": 3}]}, "2", True),
        (False, "1", True),
        (True, "nothing like JSON", True),
        (True, "NaN", True),
        ({"type": "integer"}, "9" * 5000, True),
        ({"type": "array"}, "[" * 100_000, True),
    ],
)
def test_a_strangers_schema_neither_hangs_nor_breaks_the_check(
    schema: object, output: str, expected: bool | None
) -> None:
    began = time.monotonic()
    assert schemas.fails(output, json.dumps(schema)) is expected
    assert time.monotonic() - began < 2


def test_a_text_too_long_to_check_is_no_failure() -> None:
    assert schemas.fails("[" + "1," * 150_000 + "1]", '{"type": "string"}') is None


# --- novelty ----------------------------------------------------------------------------------------------


def prompt(dice: Random, words: list[str]) -> list[dict[str, str]]:
    said = " ".join(dice.choice(words) for _ in range(40))
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Please sum up: {said}"}]


def test_slots_in_common_are_the_share_of_word_triples_in_common() -> None:
    words = [f"w{index}" for index in range(1000)]
    one, other = " ".join(words[:700]), " ".join(words[300:])
    sketches = [novelty.sketch([{"role": "user", "content": said}]) for said in (one, other, one)]

    truth = 398 / 998
    assert (sketches[0] == sketches[1]).mean() == pytest.approx(truth, abs=0.2)
    assert (sketches[0] == sketches[2]).all()
    assert novelty.sketch([]).shape == (novelty.SLOTS,)
    assert novelty.sketch([{"role": "user", "content": [{"type": "text", "text": one}]}]).tolist() == list(sketches[0])


def test_prompts_unlike_all_reviewed_ones_are_novel_and_their_likes_are_not() -> None:
    dice = Random(4)
    topics = [" ".join(dice.choice("abcdefgh") * 3 for _ in range(40)) for _ in range(6)]

    def varied(topic: str) -> list[dict[str, str]]:
        words = topic.split()
        words[dice.randrange(40)] = f"x{dice.randrange(9)}"
        return [{"role": "user", "content": " ".join(words)}]

    reviewed = np.stack([novelty.sketch(varied(dice.choice(topics))) for _ in range(120)])
    same = np.stack([novelty.sketch(varied(dice.choice(topics))) for _ in range(40)])
    other = np.stack([novelty.sketch(prompt(dice, [f"n{index}" for index in range(500)])) for _ in range(40)])

    assert novelty.novel(other, reviewed).all()
    assert novelty.novel(same, reviewed).mean() < 0.2
    assert not novelty.novel(other, reviewed[: novelty.LEAST_REVIEWED - 1]).any()


def test_where_all_prompts_are_unlike_none_is_more_novel_than_the_rest() -> None:
    dice = Random(5)
    words = [f"n{index}" for index in range(5000)]
    sketches = np.stack([novelty.sketch(prompt(dice, words)) for _ in range(100)])

    assert novelty.novel(sketches[:40], sketches[40:]).mean() < 0.25


def test_a_window_of_five_thousand_prompts_is_compared_with_a_thousand_in_seconds() -> None:
    random = np.random.default_rng(0)
    prompts, reviewed = (random.integers(1 << 32, size=(n, novelty.SLOTS), dtype=np.uint32) for n in (5000, 1000))

    began = time.monotonic()
    novelty.novel(prompts, reviewed)
    assert time.monotonic() - began < 10


def test_the_sampler_calls_novel_what_is_unlike_the_reviewed_prompts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(novelty, "LEAST_REVIEWED", 4)
    start = window().start
    for index in range(6):
        text = f"sum up the minutes of meeting {index} of the board in one short line of plain words please"
        world.accepted(text, "fine", at=start - timedelta(minutes=30 + index))
    at = start + timedelta(minutes=5)
    world.log("sum up the minutes of meeting 9 of the board in one short line of plain words please", at=at)
    world.log("translate this sonnet into seven languages and then count all of the vowels in each", at=at)

    found = claims(world)

    assert [name.split()[0] for name, claimed in found.items() if "novelty" in claimed] == ["translate"]


def test_vectors_decide_where_there_are_some_and_words_where_there_are_none(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(novelty, "LEAST_REVIEWED", 4)
    start, vectors = window().start, {}
    for index in range(6):
        text = f"sum up the minutes of meeting {index} of the board in one short line of plain words please"
        world.accepted(text, "fine", at=start - timedelta(minutes=30 + index))
        vectors[world.interactions[-1]] = [1.0, 0.01 * index, 0.0]
    at = start + timedelta(minutes=5)
    like = "sum up the minutes of meeting {} of the board in one short line of plain words please"
    unlike = "translate this sonnet into {} languages and then count all of the vowels in each"
    near = {world.log(unlike.format(name), at=at, group=name) for name in ("near by vector",)}
    far = {world.log(like.format(name), at=at, group=name) for name in ("far by vector",)}
    old = {world.log(unlike.format(name), at=at, group=name) for name in ("of an older model",)}
    world.log(like.format("x"), at=at, group="like by words")
    world.log(unlike.format("y"), at=at, group="unlike by words")
    with world.sessions.begin() as session:
        embeddings.add(session, world.project_id, "new", vectors | {key: [1.0, 0.02, 0.0] for key in near})
        embeddings.add(session, world.project_id, "new", {key: [0.0, 0.0, 1.0] for key in far})
        embeddings.add(session, world.project_id, "old", {key: [1.0, 0.0, 0.0] for key in old})

    found = claims(world)

    novel = {name for name, claimed in found.items() if "novelty" in claimed}
    assert novel == {"far by vector", "of an older model", "unlike by words"}


def test_too_few_vectors_of_reviewed_answers_leave_it_to_words(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(novelty, "LEAST_REVIEWED", 4)
    for index in range(6):
        world.accepted(f"the same words every time {index}", "fine", at=window().start - timedelta(minutes=30 + index))
    with world.sessions.begin() as session:
        embeddings.add(session, world.project_id, "m", {key: [1.0, 0.0] for key in world.interactions[:3]})
    far = world.log("the same words every time 3", at=window().start + timedelta(minutes=1), group="far")
    with world.sessions.begin() as session:
        embeddings.add(session, world.project_id, "m", {far: [0.0, 1.0]})

    assert "novelty" not in claims(world)["far"]


# --- together ---------------------------------------------------------------------------------------------


def test_each_strategy_fills_its_stratum_and_a_complaint_comes_before_all(
    past: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = window().start + timedelta(minutes=5)
    past.configure(response_schema=SCHEMA, held_out_share=0)
    past.log("disliked and unsure", "no JSON", at=at, mean_logprob=-1.0, min_logprob=-9.0)
    past.dislike(past.interactions[-1])
    past.log("fails and unsure", "no JSON", at=at, mean_logprob=-1.0, min_logprob=-9.0)
    past.log("unsure", '{"name": "Ada"}', at=at, mean_logprob=-1.0, min_logprob=-9.0)
    past.log("ordinary", '{"name": "Ada"}', at=at, mean_logprob=-0.2, min_logprob=-2.0)

    with past.sessions.begin() as session:
        sample(session, past.project_id, now=window().end + 2 * HOUR)
    with past.sessions() as session:
        items = {item.group_key: item for item in session.query(ReviewItem) if not item.group_key.startswith("before")}

    assert {name: item.strategy for name, item in items.items()} == {
        "disliked and unsure": "negative_feedback", "fails and unsure": "schema_failure", "unsure": "low_confidence",
        "ordinary": "uniform",
    }  # fmt: skip
    assert all(item.stratum_size == 1 for item in items.values())


def test_work_on_a_window_is_bounded_and_what_is_not_looked_at_is_the_audits(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "MOST_EXAMINED", 5)
    at = window().start + timedelta(minutes=5)
    for index in range(12):
        world.log(f"prompt {index}", "no JSON", at=at)

    found = claims(world, response_schema=SCHEMA)
    again = claims(world, response_schema=SCHEMA)

    assert sum("schema_failure" in claimed for claimed in found.values()) == 5
    assert len(found) == 12
    assert found == again
