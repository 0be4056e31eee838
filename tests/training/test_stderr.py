"""What a trainer writes to stderr reaches the run's page while it works: few lines, and none that anything obeys."""

from pathlib import Path
from uuid import UUID

import pytest

from services.store import jobs, runs
from tests.curation.world import World
from worker.training import attempt, child
from worker.training.spec import HeadsSpec
from worker.training.stderr import LONGEST_LINE, MORE, MOST_LINES, Follower, plain

SHOWN = [
    "trainer: UserWarning: slow",
    "trainer: 100 %",
    "trainer: <script>alert(1)</script> ��]0;title���",
    "trainer: last words",
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "stderr.log"
    made.touch()
    return made


def append(file: Path, text: str) -> None:
    with file.open("a") as out:
        out.write(text)


def test_a_line_is_told_once_it_is_whole(file: Path) -> None:
    follower = Follower(file)
    append(file, "one\ntwo, in two")
    assert follower.lines() == ["one"]
    append(file, " parts\n")
    assert follower.lines() == ["two, in two parts"]
    assert follower.lines() == []


def test_only_the_first_lines_are_told_and_that_there_were_more(file: Path) -> None:
    follower = Follower(file)
    append(file, "a\n" * (MOST_LINES - 1))
    assert len(follower.lines()) == MOST_LINES - 1
    append(file, "b\n")
    assert follower.lines() == ["b"], "so far nothing is left out"
    append(file, "c\nd\n")
    assert follower.lines() == [MORE]
    append(file, "e\n")
    assert follower.lines() == []


def test_an_endless_line_is_cut_and_does_not_stop_the_others(file: Path) -> None:
    follower = Follower(file)
    append(file, "x" * 100_000)
    assert follower.lines() == ["x" * LONGEST_LINE]
    append(file, "\nafter\n")
    assert follower.lines() == ["x" * LONGEST_LINE, "after"]


def test_nothing_is_left_that_a_terminal_or_a_page_obeys() -> None:
    assert plain("\x1b[1;31mred\x1b[0m \x1b]8;;http://x\x07 \x00 \u202e a\tb\nc") == "red �]8;;http://x� � � a\tb\nc"


@pytest.mark.parametrize("status", [0, 4])
def test_a_trainers_words_are_events_of_its_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(child, "HEADS", "tests.training.noisy")
    spec = HeadsSpec(model="", rows_file="", out="", heads=status)
    with world.sessions.begin() as session:
        run = runs.start(session, world.project(session), params={}, created_by="ada", kind="speculator")
    assert run.job_id is not None

    with jobs.claim(world.sessions, run.job_id, "test") as lease:  # type: ignore[union-attr]
        if status == 0:
            attempt.run_trainer(lease, run.id, spec, tmp_path)
        else:
            with pytest.raises(jobs.JobFailed, match="status 4: last words"):
                attempt.run_trainer(lease, run.id, spec, tmp_path)

    told = lines(world, run.id)
    assert told[: len(SHOWN)] == SHOWN
    assert told[len(SHOWN) :] == (["the trainer ended with status 4: last words"] if status else [])


def lines(world: World, run_id: UUID) -> list[str]:
    with world.sessions() as session:
        return [event.payload["line"] for event in runs.events(session, run_id) if event.kind == "log"]
