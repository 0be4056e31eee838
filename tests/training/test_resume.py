"""A trainer that is killed goes on from its newest whole checkpoint and ends where it would have ended anyway."""

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil
import pytest

from engine.digest import file_digest
from tests.training.kinds import make_spec
from worker.training import checkpoints, child
from worker.training.spec import Progress, Report, Spec, Stage

SAVED = "adapter_model.safetensors"


def train(spec: Spec, work: Path, kill_at: int = 0) -> list[Report]:
    """The reports of a trainer process, which is killed once it has reported this step."""
    reports: list[Report] = []

    def hear(report: Report) -> None:
        reports.append(report)
        if kill_at and isinstance(report, Progress) and report.step >= kill_at:
            [trainer] = [one for one in psutil.Process().children() if "worker.training.lora" in one.cmdline()]
            os.kill(trainer.pid, signal.SIGKILL)

    with contextlib.suppress(child.TrainerDied):
        child.run(spec, work, on_report=hear, stop=lambda: False)
    return reports


def attempt(kind: str, model: Path, run: Path, fence: int, kill_at: int = 0) -> list[Report]:
    """An attempt as the job makes it: rows written again, checkpoints adopted, the trainer run."""
    work = run / str(fence)
    spec = make_spec(kind, model, work, checkpoint_steps=5)
    spec = msgspec.structs.replace(spec, fingerprint=checkpoints.fingerprint(spec))
    found = checkpoints.adopt(run, work, spec.fingerprint)
    return train(msgspec.structs.replace(spec, resume=str(found.path) if found else ""), work, kill_at)


def steps(reports: Sequence[Report]) -> list[int]:
    return [report.step for report in reports if isinstance(report, Progress)]


@pytest.mark.timeout(1200)  # trainers step back for everything else that the machine does
@pytest.mark.parametrize(("kind", "kills"), [("sft", (3, 8, 14)), ("dpo", (12,)), ("kto", (17,))])
def test_a_trainer_killed_at_any_step_ends_with_the_same_adapter(
    kind: str, kills: tuple[int, ...], tiny_model: Path, tmp_path: Path
) -> None:
    attempt(kind, tiny_model, tmp_path / "undisturbed", 1)
    wanted = file_digest(tmp_path / "undisturbed" / "1" / "adapter" / SAVED)
    run = tmp_path / "killed"
    run.mkdir()

    for fence, kill_at in enumerate(kills, start=1):
        seen = steps(attempt(kind, tiny_model, run, fence, kill_at))
        assert not (run / str(fence) / "adapter").exists()
    last = attempt(kind, tiny_model, run, len(kills) + 1)

    assert file_digest(run / str(len(kills) + 1) / "adapter" / SAVED) == wanted
    resumed = [report for report in last if isinstance(report, Stage) and report.name == "resumed"]
    assert len(resumed) == 1
    assert 1 < steps(last)[0] <= seen[-1] + 1
    assert [path.name for path in run.iterdir()] == [str(len(kills) + 1)]


# --- what counts as whole ---------------------------------------------------------------------------------


def written(work: Path, step: int, fingerprint: str = "f") -> Path:
    """A checkpoint with its mark."""
    path = work / checkpoints.TRAINER / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / SAVED).write_bytes(b"weights" * step)
    (path / "optimizer.pt").write_bytes(b"state")
    checkpoints.mark(path, step, fingerprint)
    return path


def test_torn_checkpoints_are_passed_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    whole = written(run / "1", 5)
    for step, tear in enumerate(("cut", "unmarked", "half a mark", "gone"), start=6):
        torn = written(run / "1", step)
        if tear == "cut":
            (torn / SAVED).write_bytes(b"wei")
        elif tear == "gone":
            (torn / "optimizer.pt").unlink()
        elif tear == "unmarked":
            (torn / checkpoints.MARK).unlink()
        else:
            (torn / checkpoints.MARK).write_text('{"step": 8, "fing')
    work = run / "2"
    work.mkdir()

    found = checkpoints.adopt(run, work, "f")

    assert found is not None
    assert (found.step, found.path.name) == (5, whole.name)
    assert found.path.is_relative_to(work)
    assert [path.name for path in run.iterdir()] == ["2"]
    assert (found.path / SAVED).read_bytes() == b"weights" * 5


def test_a_checkpoint_of_other_rows_is_not_gone_on_from(tmp_path: Path) -> None:
    run = tmp_path / "run"
    written(run / "1", 5, "other rows")
    (run / "2").mkdir()
    assert checkpoints.adopt(run, run / "2", "f") is None


def test_an_attempt_that_died_while_adopting_is_found_by_the_next(tmp_path: Path) -> None:
    run = tmp_path / "run"
    written(run / "1", 5)
    written(run / "2", 10)
    (run / "3").mkdir()
    found = checkpoints.adopt(run, run / "3", "f")
    assert found is not None
    (run / "4").mkdir()
    again = checkpoints.adopt(run, run / "4", "f")
    assert again is not None
    assert (found.step, again.step) == (10, 10)


def test_the_fingerprint_changes_with_rows_and_parameters_and_not_with_the_attempt(
    tiny_model: Path, tmp_path: Path
) -> None:
    one = make_spec("sft", tiny_model, tmp_path / "1")
    two = make_spec("sft", tiny_model, tmp_path / "2")
    assert checkpoints.fingerprint(one) == checkpoints.fingerprint(two)

    assert checkpoints.fingerprint(msgspec.structs.replace(two, lr=0.02)) != checkpoints.fingerprint(one)
    with Path(two.rows_file).open("a") as file:
        file.write('{"input_ids": [1], "labels": [1]}\n')
    assert checkpoints.fingerprint(two) != checkpoints.fingerprint(one)
