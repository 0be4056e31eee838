"""The trainer of speculator heads, in this process and on tiny random models: states, loss, noise, resuming, files."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.digest import base_digest, file_digest
from engine.layers.sampler import Draw, sample
from engine.messages import Sampling
from engine.offline import LocalEngine
from engine.states import Answered, answer_states
from worker.training import artifact, head_files, head_loop
from worker.training.choosing import choose, split
from worker.training.head_data import effective_head, frequent, make_batch, places_of
from worker.training.head_loop import Loop, Material, Pace, fit_confidence, per_request
from worker.training.head_model import Heads, _Distance, drafts
from worker.training.heads import train, write_requests
from worker.training.process import Refused
from worker.training.spec import HeadsProgress, HeadsSpec, Report, Request

VOCABULARY = 358  # of the tiny model


def prompt(number: int) -> list[int]:
    """A common beginning, longer than a cache block, and an end of its own."""
    return [1, *range(20, 55), 3 + number, 7]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[LocalEngine]:
    with LocalEngine(tiny_model, precision="fp32", threads=1, speculation=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def requests(engine: LocalEngine) -> list[Request]:
    """What the tiny model says, half of it sampled."""
    made = []
    for number in range(40):
        temperature = 0.7 * (number % 2)
        sampling = Sampling(temperature=temperature, seed=number, max_tokens=20)
        [done] = engine.generate([prompt(number)], sampling)
        made.append(Request(prompt(number), done.token_ids, temperature, number))
    return made


@pytest.fixture(scope="module")
def material(engine: LocalEngine, requests: list[Request]) -> Material:
    states = {
        row.number: row.hidden_NE
        for row in answer_states(engine.core, (Answered(request.prompt, request.answer) for request in requests))
    }
    tokens_V = frequent([request.answer for request in requests], 128, VOCABULARY)
    return Material(requests, [states[i] for i in range(len(requests))], tokens_V, places_of(tokens_V, VOCABULARY))


@pytest.fixture(scope="module")
def head(engine: LocalEngine) -> torch.Tensor:
    """The LM head [vocabulary, E]."""
    forward = engine.core.forward
    return effective_head(lambda states: forward.logits(states, [0] * len(states)), forward.spec.hidden_size)


def spec_for(tiny_model: Path, root: Path, requests: list[Request], **changes: object) -> HeadsSpec:
    write_requests(root / "rows.jsonl", requests)
    values: dict[str, object] = {
        "model": str(tiny_model), "rows_file": str(root / "rows.jsonl"), "out": str(root / "out"), "heads": 2,
        "vocabulary": 128, "epochs": 6.0, "batch_tokens": 128,
    }  # fmt: skip
    return HeadsSpec(**(values | changes))  # type: ignore[arg-type]


def test_states_are_those_that_produced_the_answer_however_much_of_it_was_cached(
    engine: LocalEngine, requests: list[Request]
) -> None:
    # The same row twice: the second finds prompt and answer in the cache and must not lose states to it.
    rows = [Answered(r.prompt, r.answer) for r in requests[:4]] + [Answered(requests[0].prompt, requests[0].answer)]

    found = {row.number: row.hidden_NE for row in answer_states(engine.core, rows)}

    for number, row in enumerate(rows):
        expected = engine.hidden_states([*row.prompt, *row.answer[:-1]])[len(row.prompt) - 1 :]
        assert torch.allclose(found[number], expected, atol=1e-4)
        assert len(found[number]) == len(row.answer)


def test_a_row_that_no_model_could_have_read_is_refused_and_leaves_the_engine_free(engine: LocalEngine) -> None:
    with pytest.raises(ValueError, match="token ids"):
        list(answer_states(engine.core, [Answered([1, 2], [3, 4]), Answered([1], [VOCABULARY, 1])]))

    assert not engine.core.scheduler.running
    assert len(list(answer_states(engine.core, [Answered([1, 2], [3, 4])]))) == 1


def test_the_losss_own_gradient_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 11, requires_grad=True)
    target, weight = torch.randn(7, 11).softmax(-1), torch.rand(7)

    value, alpha = _Distance.apply(logits, target, weight)  # type: ignore[no-untyped-call]
    torch.autograd.backward(value)

    again = logits.detach().clone().requires_grad_(True)
    drafted = again.softmax(-1)
    variation = (drafted - target).abs().sum(-1) / 2
    overlap = 1 - (weight * variation).sum() / weight.sum()
    mix = torch.exp(-3 * overlap).detach()
    cross = -(target * drafted.log()).sum(-1)
    torch.autograd.backward((weight * (mix * cross + (1 - mix) * variation)).sum())
    assert alpha.item() == pytest.approx(overlap.item(), abs=1e-6)
    assert logits.grad is not None
    assert again.grad is not None
    assert torch.allclose(logits.grad, again.grad, atol=1e-6)


def test_drafts_share_the_noise_of_the_sampler(material: Material, head: torch.Tensor) -> None:
    everything = torch.arange(VOCABULARY)
    heads = Heads(head, 1, conditioning="none", recurrent=False)  # untrained, it repeats the base model's own logits
    request, states = material.requests[1], material.states[1]
    batch = make_batch([request], [states], places_of(everything, VOCABULARY), keys=True)

    [drafted] = drafts(heads, batch, everything)

    sampling = Sampling(temperature=request.temperature, seed=request.seed, max_tokens=1)
    start = len(request.prompt) + 1
    draws = [Draw(sampling, 0, start + place) for place in range(len(request.answer) - 1)]
    expected = sample(states[:-1] @ head.T, draws).token_ids
    hits = [token == said for token, said in zip(expected, request.answer[1:], strict=True)]
    assert request.temperature > 0
    assert drafted.hit_N.tolist() == hits


def test_heads_learn_what_is_said_next_and_the_engine_reads_them(
    tiny_model: Path, tmp_path: Path, requests: list[Request]
) -> None:
    reports: list[Report] = []

    found = train(spec_for(tiny_model, tmp_path, requests), reports.append)

    built = artifact.describe_speculator(
        tmp_path / "out", base=base_digest(tiny_model), vocabulary=file_digest(tiny_model / "tokenizer.json"),
        adapter=None, report=found, params={},
    )  # fmt: skip
    target = artifact.publish(tmp_path / "out", built, tmp_path / "artifacts")
    speculator = head_files.read(target, tiny_model, 64, VOCABULARY)
    assert (speculator.heads, speculator.vocabulary, speculator.adapter) == (2, 128, None)
    assert found["shape"] == built.manifest["shape"]
    losses = [report.loss for report in reports if isinstance(report, HeadsProgress)]
    assert losses[-1] < losses[0]
    assert found["tau"]["greedy"] > 1.2
    assert found["incumbent_tau"] is None
    assert set(found["drafting_ms"]["candidate"]) == {"1", "16"}
    assert json.loads((target / "report.json").read_text())["tau"] == found["tau"]


def test_a_champion_is_the_start_and_the_measure(tiny_model: Path, tmp_path: Path, requests: list[Request]) -> None:
    first = tmp_path / "first"
    first.mkdir()
    found = train(spec_for(tiny_model, first, requests))
    built = artifact.describe_speculator(
        first / "out", base=base_digest(tiny_model), vocabulary=file_digest(tiny_model / "tokenizer.json"),
        adapter=None, report=found, params={},
    )  # fmt: skip
    champion = artifact.publish(first / "out", built, tmp_path / "artifacts")

    again = train(spec_for(tiny_model, tmp_path, requests, champion=str(champion), epochs=0.01, lr=1e-9))

    assert again["warm_start"]
    assert again["incumbent_tau"] == pytest.approx(found["tau"])
    # Hardly trained at all, the candidate is the champion it began as.
    assert again["tau"] == pytest.approx(again["incumbent_tau"], abs=0.02)


def test_heads_of_another_base_are_no_champion(tiny_model: Path, tmp_path: Path, requests: list[Request]) -> None:
    strange = tmp_path / ("0" * 64)
    strange.mkdir()
    (strange / "manifest.json").write_text("{}")
    reports: list[Report] = []

    found = train(spec_for(tiny_model, tmp_path, requests, champion=str(strange), epochs=0.5), reports.append)

    assert found["incumbent_tau"] is None
    assert any(getattr(report, "name", "") == "no champion" for report in reports)


def test_warm_started_words_are_found_by_their_ids(head: torch.Tensor) -> None:
    old_V, new_V = torch.tensor([3, 5, 9]), torch.tensor([5, 9, 11])
    champion = Heads(head[old_V], 2, conditioning="hydra", recurrent=False)
    assert champion.condition is not None
    torch.nn.init.normal_(champion.condition)
    torch.nn.init.normal_(champion.weight)
    published = head_files.as_speculator(champion, old_V)
    heads = Heads(head[new_V], 2, conditioning="hydra", recurrent=False)

    assert head_files.warm_start(heads, new_V, published, VOCABULARY)

    assert heads.condition is not None
    assert torch.equal(heads.weight, champion.weight)
    assert torch.equal(heads.condition[:, :2], champion.condition[:, 1:3])  # 5 and 9
    assert not heads.condition[:, 2].any()  # 11 is new
    assert torch.equal(heads.condition[:, 3], champion.condition[:, 3])  # every other word


class Killed(BaseException):
    """The process is gone."""


def test_a_killed_loop_goes_on_from_its_checkpoint_to_the_same_weights(
    material: Material, head: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(head_loop, "PATIENCE", 100)
    parts = split(len(material.requests))

    def fresh(checkpoint: Path | None) -> Loop:
        heads = Heads(head[material.tokens_V], 2, conditioning="hydra", recurrent=False)
        return Loop(heads, material, parts.train, parts.stop, Pace(1e-2, 4, 64, 0), checkpoint)

    whole = fresh(None)
    whole.run(lambda *_: None)
    killed, learn = fresh(tmp_path), Loop._learn

    def die(loop: Loop, indices: list[int]) -> float:
        if loop.step == whole.steps // 2:
            raise Killed
        return learn(loop, indices)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_learn", die)
        with pytest.raises(Killed):
            killed.run(lambda *_: None)
    resumed = fresh(tmp_path)
    steps: list[int] = []
    with monkeypatch.context() as patch:

        def watch(loop: Loop, indices: list[int]) -> float:
            steps.append(loop.step)
            return learn(loop, indices)

        patch.setattr(Loop, "_learn", watch)
        resumed.run(lambda *_: None)

    assert steps[0] == whole.steps // 2
    for ours, theirs in zip(resumed.heads.drafting(), whole.heads.drafting(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_resumed_loop_holds_what_it_kept_for_as_good_as_it_was(
    material: Material, head: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a checkpoint may be better than those kept at the last look: they must still be able to win."""
    monkeypatch.setattr(head_loop, "CHECKPOINT_SECONDS", 0.0)
    parts = split(len(material.requests))

    def fresh() -> Loop:
        heads = Heads(head[material.tokens_V], 2, conditioning="hydra", recurrent=False)
        return Loop(heads, material, parts.train, parts.stop, Pace(1e-2, 4, 64, 0), tmp_path)

    killed = fresh()
    killed.best = killed._tau()
    while killed._tau() <= killed.best:
        killed._learn(killed._indices())
    killed._save()
    resumed = fresh()
    resumed.steps = killed.step  # it comes back, and ends

    resumed.run(lambda *_: None)

    assert resumed.best == pytest.approx(killed.best)
    assert resumed._tau() == pytest.approx(resumed.best)


def test_a_checkpoint_of_another_training_is_not_continued(
    material: Material, head: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loop, "CHECKPOINT_SECONDS", 0.0)
    parts = split(len(material.requests))
    heads = Heads(head[material.tokens_V], 2, conditioning="none", recurrent=False)
    Loop(heads, material, parts.train, parts.stop, Pace(1e-2, 1, 64, 0), tmp_path).run(lambda *_: None)

    other = Loop(heads, material, parts.train, parts.stop, Pace(1e-2, 1, 64, 1), tmp_path)
    other._resume()

    assert other.step == 0


@pytest.mark.parametrize("other", ["words", "base", "adapter", "champion"])
def test_a_checkpoint_of_the_same_shape_from_elsewhere_is_not_continued(
    material: Material, head: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.setattr(head_loop, "CHECKPOINT_SECONDS", 0.0)
    parts = split(len(material.requests))

    def loop(words: torch.Tensor, **changes: str) -> Loop:
        origin = {"base": "b", "adapter": "", "champion": ""} | changes
        heads = Heads(head[words], 2, conditioning="none", recurrent=False)
        pace = Pace(1e-2, 1, 64, 0)
        drafting = material.drafting(words)
        return Loop(heads, drafting, parts.train, parts.stop, pace, tmp_path, tuple(origin.values()))

    words = material.tokens_V[:-1]
    loop(words).run(lambda *_: None)
    assert loop(words)._resume()

    changed = loop(material.tokens_V[1:]) if other == "words" else loop(words, **{other: "another"})

    assert not changed._resume()


def test_confidence_says_how_often_drafts_are_right(material: Material, head: torch.Tensor) -> None:
    parts = split(len(material.requests))
    heads = Heads(head[material.tokens_V], 2, conditioning="hydra", recurrent=False)
    Loop(heads, material, parts.train, parts.stop, Pace(1e-2, 4, 64, 0), None).run(lambda *_: None)

    fit_confidence(heads, material, parts.train, 0)

    [first, _] = drafts(heads, material.batch(parts.train, keys=True), material.tokens_V)
    chance_N = torch.sigmoid(first.features_NF @ heads.confidence[0] + heads.confidence_bias[0]).detach()
    assert float(chance_N.mean()) == pytest.approx(float(first.hit_N.float().mean()), abs=0.05)
    assert float(chance_N[first.hit_N].mean()) > float(chance_N[~first.hit_N].mean()) + 0.1


def test_yield_is_counted_in_right_drafts_before_the_first_wrong_one(material: Material, head: torch.Tensor) -> None:
    heads = Heads(head[material.tokens_V], 3, conditioning="none", recurrent=False)

    shares = per_request(heads, material, range(6))

    assert all(a >= b >= c >= 0 for a, b, c in shares)


def test_what_does_not_fit_memory_or_the_context_is_left_out_the_oldest_first(
    tiny_model: Path, tmp_path: Path, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Report] = []
    answers = [len(request.answer) for request in requests]
    monkeypatch.setattr("worker.training.heads.STATES_BYTES", 4 * 64 * sum(answers[-30:]))
    endless = Request([1] * 100_000, [2, 3], 0.0, 0)

    found = train(spec_for(tiny_model, tmp_path, [*requests, endless], epochs=0.1), reports.append)

    assert (found["requests"], found["tokens"]) == (30, sum(answers[-30:]))
    [told] = [report.detail for report in reports if getattr(report, "name", "") == "left out"]
    assert told == {"longer_than_the_context": 1, "beyond_memory": len(requests) - 30}


def test_too_few_requests_are_refused(tiny_model: Path, tmp_path: Path, requests: list[Request]) -> None:
    with pytest.raises(Refused, match="heads need 16"):
        train(spec_for(tiny_model, tmp_path, requests[:6]))


def test_what_is_chosen_is_half_newest_half_drawn_and_within_the_budget() -> None:
    sizes = [10] * 100

    chosen = choose(sizes, 400, seed=1)

    assert len(chosen) == 40
    assert chosen == sorted(set(chosen))
    assert set(range(80, 100)) <= set(chosen)
    assert min(chosen) < 40  # and not only what came just before the newest
    assert choose(sizes, 1000, seed=1) == list(range(100))
    assert choose(sizes, 400, seed=2) != chosen


def test_the_newest_tenth_is_held_out_and_the_gates_part_stops_nothing() -> None:
    parts = split(300)

    assert parts.train == list(range(270))
    assert sorted(parts.stop + parts.judge) == list(range(270, 300))
    assert len(parts.judge) == 20


def test_enough_is_held_out_to_judge_by_as_soon_as_there_are_enough_requests() -> None:
    for count in (60, 61, 150, 299):
        parts = split(count)
        assert (len(parts.stop), len(parts.judge)) == (10, 20)
        assert len(parts.train) == count - 30
    assert len(split(40).train) == 20
