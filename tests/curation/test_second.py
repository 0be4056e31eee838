"""Second answers from a real, small engine: who is asked, what becomes a pair, and what happens without an engine."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import jobs
from services.store.models import Artifact, Deployment, ReviewItem
from tests.curation.world import World
from tests.engine.serving import Served, served
from tests.training.tiny import make_model
from worker.curation import second
from worker.curation.sample import sample_job, to_ask

GREEDY = {"temperature": 0.0, "max_tokens": 12, "seed": 5, "n": 1}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("second")
    (home / "artifacts").mkdir()
    with served(make_model(home / "model"), home / "artifacts", "--kv-tokens", "4096") as running:
        (running.directory / "engine.sock").symlink_to(running.directory / "e.sock")
        yield running


@pytest.fixture
def asking(engine: Served, tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in {"HOME": tmp_path, "RUN_DIR": engine.directory, "MODEL": engine.model}.items():
        monkeypatch.setenv(f"WHET_{name}", str(value))
    monkeypatch.setenv("DATABASE_URL", database_url)
    return Settings()


def log(world: World, settings: Settings, prompt: str, output: str, **fields: Any) -> UUID:  # noqa: ANN401
    """An answer three seconds ago, as the gateway logs it."""
    tokenizer = Tokenizer.load(settings.model_path)
    ids = fields.pop("ids", tokenizer.encode_chat([{"role": "user", "content": prompt}]))
    values = {"parameters": GREEDY, "tokenizer_hash": tokenizer.digest, "prompt_token_ids": ids} | fields
    return world.log(prompt, output, at=datetime.now(UTC) - timedelta(seconds=3), **values)


def ask(world: World, settings: Settings, ids: list[UUID], *, candidate: bool = True) -> dict[UUID, second.Second]:
    with world.sessions() as session:
        asked = second.read(session, ids)
    return dict(second.ask(settings, asked, None, candidate=candidate, alive=lambda: None))


def test_a_candidate_is_asked_as_the_app_asked_and_only_an_answer_that_differs_is_another(
    world: World, asking: Settings
) -> None:
    unlike = log(world, asking, "say number 3", "never said by this model")
    said = ask(world, asking, [unlike])[unlike]
    like = log(world, asking, "say number 3", said.output)

    found = ask(world, asking, [unlike, like])

    assert said.differs
    assert said.alternative == {"output": said.output, "digest": None}
    assert found[unlike] == said
    assert not found[like].differs


def test_what_serves_is_asked_with_other_noise_and_never_greedily(world: World, asking: Settings) -> None:
    ids = [log(world, asking, f"say number {index}", "-") for index in range(12)]
    greedy = ask(world, asking, ids)
    sampled = ask(world, asking, ids, candidate=False)
    noisy = {**GREEDY, "temperature": 1.0}
    hot = [log(world, asking, f"say number {index}", "-", parameters=noisy) for index in range(12)]
    same, other = ask(world, asking, hot), ask(world, asking, hot, candidate=False)

    assert sum(greedy[one].output != sampled[one].output for one in ids) > 6
    assert sum(same[one].output != other[one].output for one in hot) > 6


def test_grammar_length_and_stop_strings_of_the_request_hold_for_the_second_answer(
    world: World, asking: Settings
) -> None:
    grammar = {"kind": "regex", "text": "[ab]{4}z[ab]{4}"}
    held = log(world, asking, "say", "-", parameters={**GREEDY, "max_tokens": 40, "grammar": grammar})
    stopped = log(
        world, asking, "say", "-", parameters={**GREEDY, "max_tokens": 40, "grammar": grammar, "stop": ["z"]}
    )  # fmt: skip
    short = log(world, asking, "say", "-", parameters={**GREEDY, "max_tokens": 1})

    found = ask(world, asking, [held, stopped, short])

    assert set(found[held].output) == {*found[stopped].output, "z"}
    assert len(found[held].output) == 9
    assert len(found[stopped].output) == 4
    assert len(Tokenizer.load(asking.model_path).encode(found[short].output)) <= 2


def test_what_cannot_be_asked_again_is_left_alone(world: World, asking: Settings) -> None:
    skipped = [
        log(world, asking, "several", "-", parameters={**GREEDY, "n": 2}),
        log(world, asking, "calls", "-", parameters={**GREEDY, "tools": [{}]}),
        log(world, asking, "another model's", "-", tokenizer_hash="another"),
        log(world, asking, "nothing", "-", ids=[]),
        log(world, asking, "of an old release", "-", parameters={"temperature": 0.5}),
        log(world, asking, "too long", "-", ids=[5] * 500),
    ]

    assert ask(world, asking, skipped) == {}


def run_job(world: World, settings: Settings) -> list[ReviewItem]:
    with world.sessions.begin() as session:
        job = jobs.enqueue(session, "review.sample", {"project_id": str(world.project_id)})
    lease = jobs.claim(world.sessions, job.id, "test")
    assert lease is not None
    with lease:
        sample_job(lease, settings)
    with world.sessions() as session:
        return list(session.scalars(select(ReviewItem).order_by(ReviewItem.priority)))


def test_the_job_makes_pairs_of_what_differs_and_a_complaint_stays_a_single_answer(
    world: World, asking: Settings
) -> None:
    world.configure(window_seconds=1, window_grace_seconds=0, second_share=1.0)
    pair = log(world, asking, "say number 3", "never said by this model")
    disliked = log(world, asking, "say number 4", "never said by this model either")
    world.dislike(disliked)

    found = {item.interaction_id: item for item in run_job(world, asking)}

    assert found[pair].strategy == "disagreement"
    assert found[disliked].strategy == "negative_feedback"
    if hasattr(ReviewItem, "alternative"):
        assert found[pair].alternative["digest"] is None
        assert found[pair].alternative["output"] not in ("", "never said by this model")
        assert found[disliked].alternative is None


def test_without_an_engine_the_windows_are_sampled_all_the_same(
    world: World, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second, "CONNECT_SECONDS", 0.2)
    world.configure(window_seconds=1, window_grace_seconds=0, second_share=1.0)
    log(world, settings, "hello", "an answer")

    assert [item.strategy for item in run_job(world, settings)] == ["uniform"]


def test_the_share_is_drawn_by_hash_bounded_and_small_while_a_candidate_is_on_trial(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)
    for index in range(120):
        world.log(f"prompt {index}", at=start + timedelta(seconds=index), prompt_token_ids=[1, 2], parameters=GREEDY)
    now = start + timedelta(hours=2)

    def asked() -> Any:  # noqa: ANN401
        with world.sessions() as session:
            return to_ask(session, world.project_id, now)

    assert asked() == ([], None, False)
    world.configure(second_share=0.3)
    some = asked()
    assert 18 <= len(some.asked) <= 54
    assert asked() == some
    monkeypatch.setattr(second, "MOST_ASKED", 10)
    assert len(asked().asked) == 10
    world.configure()
    with world.sessions.begin() as session:
        session.add(
            Artifact(digest="c" * 64, kind="adapter", project_id=world.project_id, base_digest="b", manifest={})
        )
        session.flush()
        session.get_one(Deployment, world.project_id).canary_digest = "c" * 64
    trial = asked()
    assert 1 <= len(trial.asked) <= 10
    assert (trial.adapter, trial.candidate) == ("c" * 64, True)
    world.configure(second_share=0.0)
    assert asked().asked == []


def test_logged_parameters_of_any_age_make_a_request() -> None:
    """Rows of older releases lack some fields and hold others that sampling does not know."""
    old = {"temperature": 0.3, "max_tokens": 5, "model": "x", "stop": [], "logit_bias": {"7": -1.5}}
    one = second.Asked(UUID(int=1), [1], json.loads(json.dumps(old)), "", "", "space")

    request = second._request(one, None, candidate=False)

    assert request.sampling.logit_bias == {7: -1.5}
    assert request.sampling.temperature == second.LEAST_TEMPERATURE
    assert request.sampling.max_tokens == 5
    assert (request.priority, request.learn, request.namespace) == ("batch", False, "space")
