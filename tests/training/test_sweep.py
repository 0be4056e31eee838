"""A sweep: the better half goes on, the run as asked for is among the candidates, a killed sweep does nothing twice."""

import json
import math
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import select

from services.settings import Settings
from services.store import runs
from services.store.models import Artifact, Run
from tests.curation.world import World
from tests.training.kinds import make_spec
from tests.training.test_run import attempt, events
from worker.curation.build import build_revision
from worker.training import checkpoints, lora, sweep, trainers, validation
from worker.training.spec import Spec, Trial
from worker.training.validation import Measured


@pytest.fixture
def spec(tiny_model: Path, tmp_path: Path) -> Spec:
    made = make_spec("dpo", tiny_model, tmp_path, sweep=5)
    return msgspec.structs.replace(made, fingerprint="f")


def planned(tried: Spec) -> int:
    return trainers.planned_steps(100, tried)


def best_at_half(tried: Spec, _steps: int) -> Measured:
    """The nearer the learning rate is to 0.005, the better."""
    return Measured(abs(math.log(tried.lr / 0.005)) + tried.beta / 100, None)


def test_candidates_are_the_run_itself_and_others_around_it(spec: Spec) -> None:
    made = sweep.candidates(spec, 5, planned)

    assert made[0] == {}
    assert len({json.dumps(one, sort_keys=True) for one in made}) == 5
    assert made == sweep.candidates(spec, 5, planned)
    assert made != sweep.candidates(msgspec.structs.replace(spec, seed=99), 5, planned)
    named = {name for one in made for name in one}
    assert named <= {"lr", "epochs", "beta"}
    assert "beta" not in {
        name for one in sweep.candidates(msgspec.structs.replace(spec, kind="sft"), 15, planned) for name in one
    }


def test_candidates_that_would_train_alike_are_one(spec: Spec) -> None:
    bound = msgspec.structs.replace(spec, kind="sft", max_steps=3)
    assert len(sweep.candidates(bound, 16, planned)) == 5, "the learning rate alone still differs"
    highest = msgspec.structs.replace(bound, lr=0.1)
    assert sorted(one.get("lr", 0.1) for one in sweep.candidates(highest, 16, planned)) == [0.025, 0.05, 0.1]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 16])
def test_rungs_leave_one(count: int) -> None:
    left = count
    for number, share in sweep.rungs(count):
        assert number == left
        assert 0.25 <= share <= 1
        left = math.ceil(left / 2)
    assert left == 1


def test_the_best_candidate_is_chosen_and_every_rung_told(spec: Spec, tmp_path: Path) -> None:
    told: list[Trial] = []
    tried: list[tuple[float, int]] = []

    def trial(one: Spec, steps: int) -> Measured:
        tried.append((one.lr, steps))
        return best_at_half(one, steps)

    changes = sweep.halve(spec, lambda one: int(100 * one.epochs / spec.epochs), trial, told.append, tmp_path / "t")

    everything = sweep.candidates(spec, 5, planned)
    wanted = min(everything, key=lambda one: best_at_half(msgspec.structs.replace(spec, **one), 1).loss)
    assert changes == wanted
    assert [sum(one.rung == rung for one in told) for rung in (0, 1, 2)] == [5, 3, 2]
    assert [sum(one.rung == rung and one.kept for one in told) for rung in (0, 1, 2)] == [3, 2, 1]
    assert len(tried) == 10


def test_a_sweep_that_was_killed_repeats_no_trial_and_decides_the_same(spec: Spec, tmp_path: Path) -> None:
    log = tmp_path / "trials.jsonl"
    calls = []

    def trial(one: Spec, steps: int) -> Measured:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(one)
        return best_at_half(one, steps)

    with pytest.raises(KeyboardInterrupt):
        sweep.halve(spec, lambda _: 100, trial, lambda _: None, log)
    with log.open("a") as file:
        file.write('{"fingerprint": "f", "cand')  # a kill in the middle of a line
    again: list[Spec] = []

    def count(one: Spec, steps: int) -> Measured:
        again.append(one)
        return best_at_half(one, steps)

    changes = sweep.halve(spec, lambda _: 100, count, lambda _: None, log)

    assert len(again) == 6
    assert changes == sweep.halve(spec, lambda _: 100, best_at_half, lambda _: None, tmp_path / "other")


def test_trials_of_another_training_are_not_believed(spec: Spec, tmp_path: Path) -> None:
    log = tmp_path / "trials.jsonl"
    sweep.halve(spec, lambda _: 100, lambda _one, _steps: Measured(0.0, None), lambda _: None, log)

    other = msgspec.structs.replace(spec, fingerprint="g")
    changes = sweep.halve(other, lambda _: 100, best_at_half, lambda _: None, log)

    assert changes == sweep.halve(spec, lambda _: 100, best_at_half, lambda _: None, tmp_path / "other")


def test_a_candidate_that_blows_up_comes_last(spec: Spec, tmp_path: Path) -> None:
    told: list[Trial] = []

    def trial(one: Spec, steps: int) -> Measured:
        return Measured(math.nan, None) if one.lr == spec.lr else best_at_half(one, steps)

    sweep.halve(spec, lambda _: 100, trial, told.append, tmp_path / "t")

    blown = [one for one in told if one.loss == sweep.WORST]
    assert blown
    assert msgspec.json.decode(msgspec.json.encode(blown[0]))["loss"] == sweep.WORST
    assert not any(one.kept for one in blown if one.rung == 2)


def test_a_run_with_a_sweep_tries_its_candidates_on_training_groups_and_trains_the_winner(
    world: World, tiny_settings: Settings
) -> None:
    for index in range(64):
        world.corrected(f"say number {index}", "no", f"the answer is {index}")
    params = {"rank": 4, "alpha": 8, "lr": 0.01, "epochs": 1, "batch_size": 16, "max_length": 64, "sweep": 2}
    with world.sessions.begin() as session:
        revision = build_revision(session, world.project_id, "golden")
        run = runs.start(session, world.project(session), params=params, created_by="ada", revision=revision)

    attempt(world, run, tiny_settings)

    told = [event.payload for event in events(world, run.id, "trial")]
    assert [(one["candidate"], one["rung"]) for one in told] == [(0, 0), (1, 0)]
    assert sum(one["kept"] for one in told) == 1
    swept = next(event.payload for event in events(world, run.id, "log") if event.payload.get("name") == "swept")
    assert swept["detail"]["chosen"] == next(one["changes"] for one in told if one["kept"])
    assert [event.step for event in events(world, run.id, "validation")][-1] is not None
    with world.sessions() as session:
        [built] = session.scalars(select(Artifact)).all()
        assert built.manifest["swept"] == swept["detail"]["chosen"]
        assert session.get_one(Run, run.id).phase == "evaluating"


def test_a_training_that_goes_on_keeps_what_its_sweep_decided(tiny_model: Path, tmp_path: Path) -> None:
    """Otherwise it would go on, from its checkpoint, with the values that lost."""
    first, second = tmp_path / "1", tmp_path / "2"
    for made in (first, second):
        made.mkdir()
    (first / checkpoints.DECIDED).write_text('{"lr": 0.5}')
    checkpoints.adopt(tmp_path, second, "f")
    spec = make_spec("sft", tiny_model, second, sweep=2, resume="checkpoint-5")

    assert lora.swept(spec, None, [], [], lambda _: None, on_gpu=False).lr == 0.5
    assert checkpoints.decided(second) == {"lr": 0.5}
    assert checkpoints.decided(first) is None


def test_rows_without_a_right_answer_are_no_measure(tmp_path: Path) -> None:
    file = tmp_path / "validation.jsonl"
    file.write_text('{"prompt_ids": [1], "bad_ids": [2]}\n{"prompt_ids": [1], "good_ids": [3]}\n')
    assert validation.read(str(file)) == [{"prompt_ids": [1], "good_ids": [3]}]
    assert validation.read("") == []
