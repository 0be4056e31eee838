"""The engine's heads follow the deployment rows, and its suffix corpora the log, also after it died."""

import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from msgspec import structs
from structlog.testing import capture_logs

from engine.client import EngineGone, EngineRefused
from engine.messages import Corpus, Generate, Sampling
from engine.sync_client import SyncEngineClient
from services.store import projects, speculation_log, speculators
from services.store.models import ErasureRequest, InteractionBody
from services.store.speculation import Heads
from tests.engine.speculators import random_speculator
from tests.rollout.conftest import EngineUnderTest, World
from tests.rollout.drafters import BECAUSE, drafting, go_live, heads, history, interaction, land
from worker.rollout import drafters
from worker.rollout.reconcile import Reconciler

NOW = datetime.now(UTC)


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Setting:
    """A reconciler between the test's database and the module's engine."""

    def __init__(self, world: World, engine: EngineUnderTest, client: SyncEngineClient) -> None:
        self.world, self.engine, self.client = world, engine, client
        self.clock = Clock()
        self.reconciler = Reconciler(world.sessions, client, engine.artifacts, clock=self.clock)

    def built(self, seed: int, *, base: str | None = None) -> str:
        digest = random_speculator(self.engine.artifacts, self.engine.model, seed=seed)
        return heads(self.world, digest, base=base or self.engine.base)

    def settle(self) -> None:
        """Two looks with the grace between them."""
        self.reconciler.step()
        self.clock.now += 3.1
        self.reconciler.step()

    def loaded(self) -> set[str]:
        return {slot.digest for slot in self.client.status().speculators}

    def corpora(self) -> dict[str, int]:
        return {corpus.namespace: corpus.tokens for corpus in self.client.status().corpora}

    def restart(self) -> None:
        self.engine.stop(signal.SIGKILL)
        self.engine.start()
        with pytest.raises(EngineGone):
            self.reconciler.step()


@pytest.fixture
def setting(world: World, engine: EngineUnderTest) -> Iterator[Setting]:
    with SyncEngineClient(engine.socket) as client:
        made = Setting(world, engine, client)
        made.settle()
        assert made.loaded() == set()
        yield made


def stage(world: World, digest: str) -> None:
    with world.sessions.begin() as session:
        speculators.stage_canary(session, world.project_id, digest, 0.5, BECAUSE)


def test_live_heads_and_the_canary_are_loaded_and_the_retired_freed_after_the_grace(setting: Setting) -> None:
    first, second = setting.built(51), setting.built(52)
    go_live(setting.world, first)
    stage(setting.world, second)
    setting.reconciler.step()
    assert setting.loaded() == {first, second}

    go_live(setting.world, second)
    setting.reconciler.step()
    setting.clock.now += 2.0
    setting.reconciler.step()
    assert setting.loaded() == {first, second}, "gateways may still name the old digest"
    setting.clock.now += 1.5
    setting.reconciler.step()

    assert setting.loaded() == {second}


def test_after_the_engine_died_the_live_heads_are_back(setting: Setting) -> None:
    digest = setting.built(53)
    go_live(setting.world, digest)
    setting.reconciler.step()

    setting.restart()
    setting.reconciler.step()

    assert setting.loaded() == {digest}
    assert len(history(setting.world)) == 1


def test_heads_that_cannot_be_loaded_give_way_to_the_last_good_ones_and_a_canary_to_the_live_ones(
    setting: Setting,
) -> None:
    good, bad, tried = setting.built(54), setting.built(55), setting.built(56)
    go_live(setting.world, good)
    go_live(setting.world, bad)
    stage(setting.world, tried)
    for digest in (bad, tried):
        damage(setting.engine, digest)

    with capture_logs() as lines:
        setting.reconciler.step()

    assert drafting(setting.world) == Heads(good)
    assert {setting.world.state(bad), setting.world.state(tried)} == {"quarantined"}
    assert {line["digest"] for line in lines if line.get("alarm")} == {bad, tried}
    assert history(setting.world)[-1].actor == "dispatcher"
    setting.reconciler.step()
    assert setting.loaded() == {good}


def damage(engine: EngineUnderTest, digest: str) -> None:
    file = engine.artifacts / digest / "speculator.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def test_heads_too_large_for_the_slots_raise_one_alarm_and_are_asked_for_again_of_another_engine(
    setting: Setting,
) -> None:
    digest = random_speculator(setting.engine.artifacts, setting.engine.model, heads=9, seed=58)
    heads(setting.world, digest, base=setting.engine.base)
    go_live(setting.world, digest)

    with capture_logs() as lines:
        setting.settle()
        first = [line["digest"] for line in lines if line.get("alarm")]
        setting.restart()
        setting.settle()

    assert first == [digest], "one alarm"
    assert [line["digest"] for line in lines if line.get("alarm")] == [digest, digest]
    assert (drafting(setting.world), setting.world.state(digest)) == (Heads(digest), "live")


def test_heads_of_another_base_model_are_retired_and_not_condemned(setting: Setting) -> None:
    foreign, tried = setting.built(57, base="another model"), setting.built(59, base="another model")
    go_live(setting.world, foreign)
    stage(setting.world, tried)
    setting.settle()
    assert setting.loaded() == set()
    assert drafting(setting.world) == Heads()
    assert {setting.world.state(foreign), setting.world.state(tried)} == {"retired"}
    assert "another base model" in history(setting.world)[-1].reason


def test_more_heads_than_slots_push_nobody_out(setting: Setting) -> None:
    digests = set()
    for number in range(5):
        with setting.world.sessions.begin() as session:
            project_id = projects.create(session, f"project-{number}").id
        elsewhere = World(setting.world.sessions, project_id, setting.world.revision_id, [])
        digest = random_speculator(setting.engine.artifacts, setting.engine.model, seed=60 + number)
        go_live(elsewhere, heads(elsewhere, digest, base=setting.engine.base))
        digests.add(digest)

    with capture_logs() as lines:
        setting.reconciler.step()
        loaded = setting.loaded()
        setting.reconciler.step()

    assert len(loaded) == 4
    assert loaded < digests
    assert setting.loaded() == loaded
    assert [line["left_out"] for line in lines if line.get("alarm")] == [sorted(digests - loaded)], "one alarm"


# --- suffix corpora ---------------------------------------------------------------------------------------


def answer(
    setting: Setting, project_id: UUID, at: datetime, token_ids: list[int], *, model: str = "support", **columns: str
) -> None:
    """A logged answer with its body."""
    row = interaction(project_id, at, tokens=len(token_ids))
    for name, value in ({"base_digest": setting.engine.base} | columns).items():
        setattr(row, name, value)
    body = InteractionBody(
        id=row.id, messages=[], parameters={"model": model}, output="", prompt_token_ids=[], token_ids=token_ids,
        token_logprobs=[], prompt_hash="", template_hash="", tokenizer_hash="", spool_version=1,
    )  # fmt: skip
    land(setting.world.sessions, [row, body])


def test_a_restarted_engine_learns_the_past_answers_of_each_project_and_no_others(setting: Setting) -> None:
    sessions, mine = setting.world.sessions, setting.world.project_id
    with sessions.begin() as session:
        other = projects.create(session, "other").id
    for minute in range(3):
        answer(setting, mine, NOW - timedelta(minutes=minute + 1), [10 + minute] * 20)
    answer(setting, mine, NOW, [99] * 500, model="support@" + "a" * 64)
    answer(setting, mine, NOW, [98] * 500, origin="evaluation")
    answer(setting, mine, NOW, [97] * 500, finish_reason="cancelled")
    answer(setting, mine, NOW, [96] * 500, base_digest="another")
    answer(setting, mine, NOW, [95] * 500, end_user="gone")
    with sessions.begin() as session:
        session.add(ErasureRequest(project_id=mine, subject="gone"))
    answer(setting, other, NOW - timedelta(minutes=1), [50] * 7)

    setting.restart()
    for _ in range(3):
        setting.reconciler.step()

    separators = 3
    assert setting.corpora() == {mine.hex: 60 + separators, other.hex: 7 + 1}


def test_a_second_dispatcher_does_not_teach_the_same_twice(setting: Setting) -> None:
    answer(setting, setting.world.project_id, NOW - timedelta(minutes=1), [10] * 20)
    setting.restart()
    setting.reconciler.step()
    held = setting.corpora()
    assert held == {setting.world.project_id.hex: 21}

    again = Reconciler(setting.world.sessions, setting.client, setting.engine.artifacts)
    again.step()
    setting.reconciler.step()

    assert setting.corpora() == held


def test_an_answer_given_after_the_start_is_not_told_again(setting: Setting) -> None:
    """The engine has learnt it by itself."""
    project = setting.world.project_id
    answer(setting, project, NOW - timedelta(minutes=1), [10] * 40)
    setting.restart()
    sampling = Sampling(temperature=0.0, seed=0, max_tokens=9)
    setting.client.generate(Generate(id="r", prompt=[5, 6], sampling=sampling, namespace=project.hex))
    own = setting.corpora()[project.hex]
    answer(setting, project, datetime.now(UTC) + timedelta(seconds=1), [11] * 9)

    setting.reconciler.step()

    assert setting.corpora()[project.hex] == own + 41


class Recorder:
    """An engine that only remembers what it was taught."""

    def __init__(self, **status: object) -> None:
        self.taught: list[tuple[str, list[list[int]]]] = []
        self.refuses = False
        self._status = status

    def learn(self, namespace: str, responses: list[list[int]]) -> None:
        if self.refuses:
            raise EngineRefused("nothing is learnt here")
        self.taught.append((namespace, responses))


def refilled(setting: Setting, engine: Recorder, corpora: list[Corpus] | None = None, **told: int) -> Recorder:
    """What an engine that started an hour from now is taught in three steps."""
    status = structs.replace(setting.client.status(), uptime_seconds=-3600.0, speculators=[], corpora=corpora or [])
    status = structs.replace(status, **told)
    made = drafters.Drafters(
        setting.world.sessions, engine, setting.engine.artifacts, grace_seconds=0, clock=setting.clock,  # type: ignore[arg-type]
    )  # fmt: skip
    made.restarted(status)
    for _ in range(3):
        made.step(status, set())
    return engine


def test_a_corpus_is_told_its_newest_answers_oldest_first_in_pieces(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafters, "CORPUS_TOKENS", 100)
    monkeypatch.setattr(drafters, "CHUNK_TOKENS", 40)
    monkeypatch.setattr(speculation_log, "PAGE", 2)
    project = setting.world.project_id
    for minute in range(10):
        answer(setting, project, NOW - timedelta(minutes=minute), [100 + minute] * 20)

    engine = refilled(setting, Recorder())

    told = [response[0] for _, chunk in engine.taught for response in chunk]
    assert told == [104, 103, 102, 101, 100]
    assert [sum(map(len, chunk)) for _, chunk in engine.taught] == [40, 40, 20]
    assert {namespace for namespace, _ in engine.taught} == {project.hex}


def test_a_corpus_smaller_than_the_log_is_filled_once(setting: Setting) -> None:
    project = setting.world.project_id
    for minute in range(10):
        answer(setting, project, NOW - timedelta(minutes=minute), [100 + minute] * 20)
    assert setting.client.status().corpus_capacity > 0

    engine = refilled(setting, Recorder(), corpus_capacity=50)
    assert [response[0] for _, chunk in engine.taught for response in chunk] == [101, 100]

    full = [Corpus(namespace=project.hex, tokens=50, bytes=0)]
    assert refilled(setting, Recorder(), full, corpus_capacity=50).taught == []


def test_the_most_recent_namespaces_are_told_last(setting: Setting) -> None:
    """The engine gives up the one that was longest without an answer."""
    ids = []
    for number in range(3):
        with setting.world.sessions.begin() as session:
            ids.append(projects.create(session, f"p{number}").id)
        answer(setting, ids[-1], NOW - timedelta(hours=5 - number), [1, 2, 3])
    engine = refilled(setting, Recorder())
    assert [namespace for namespace, _ in engine.taught] == [one.hex for one in ids]


def test_an_engine_that_learns_nothing_is_left_in_peace(setting: Setting) -> None:
    answer(setting, setting.world.project_id, NOW, [1, 2, 3])
    deaf = Recorder()
    deaf.refuses = True
    with capture_logs() as lines:
        refilled(setting, deaf)
    assert [line["event"] for line in lines] == ["the engine does not learn past answers"]
