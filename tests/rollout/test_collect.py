"""Directories of artefacts that no row names."""

import json
import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from services.store.models import Run
from tests.rollout.conftest import World
from tests.rollout.drafters import heads
from worker.rollout.collect import collect_orphans

KNOWN, ORPHAN, YOUNG, OTHER = "a" * 64, "b" * 64, "c" * 64, "d" * 64


def make(
    root: Path, name: str, *, hours: float, run: UUID | None = None, manifest: str | None = None, kind: str = "adapter"
) -> Path:
    directory = root / name
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    if run is not None:
        manifest = json.dumps({"kind": kind, "run": str(run)})
    if manifest is not None:
        (directory / "manifest.json").write_text(manifest)
    then = time.time() - hours * 3600
    os.utime(directory, (then, then))
    return directory


def make_run(world: World, state: str, *, hours: float | None = None) -> UUID:
    finished = None if hours is None else datetime.now(UTC) - timedelta(hours=hours)
    with world.sessions.begin() as session:
        run = Run(
            project_id=world.project_id, kind="sft", state=state, params={}, created_by="test", finished_at=finished
        )
        session.add(run)
        session.flush()
        return run.id


def collect(world: World, root: Path) -> list[str]:
    with world.sessions() as session:
        return collect_orphans(session, root)


def test_only_old_artefacts_without_a_row_are_removed(world: World, tmp_path: Path) -> None:
    over = make_run(world, "failed", hours=25)
    world.artifact(KNOWN, "rejected")
    make(tmp_path, KNOWN, hours=100, run=over)
    make(tmp_path, ORPHAN, hours=25, run=over)
    make(tmp_path, YOUNG, hours=23, run=over)

    assert collect(world, tmp_path) == [ORPHAN]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [KNOWN, YOUNG]


def test_heads_are_collected_and_kept_like_adapters(world: World, tmp_path: Path) -> None:
    over = make_run(world, "failed", hours=25)
    heads(world, KNOWN, state="retired")
    for name in (KNOWN, ORPHAN):
        make(tmp_path, name, hours=25, run=over, kind="speculator")

    assert collect(world, tmp_path) == [ORPHAN]


def test_artefacts_of_another_database_or_of_an_unfinished_run_stay(world: World, tmp_path: Path) -> None:
    make(tmp_path, KNOWN, hours=100, run=uuid4())
    make(tmp_path, ORPHAN, hours=100, run=make_run(world, "running"))
    make(tmp_path, OTHER, hours=100, run=make_run(world, "failed", hours=1))

    assert collect(world, tmp_path) == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [KNOWN, ORPHAN, OTHER]


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"run": 3}', '{"run": "x"}', "[" * 100_000])
def test_a_directory_whose_manifest_names_no_run_stays(world: World, tmp_path: Path, manifest: str | None) -> None:
    kept = make(tmp_path, ORPHAN, hours=100, manifest=manifest)

    assert collect(world, tmp_path) == []
    assert kept.is_dir()


def test_a_directory_that_cannot_be_removed_does_not_keep_the_others(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = make_run(world, "failed", hours=25)
    stuck = make(tmp_path, ORPHAN, hours=25, run=over)
    make(tmp_path, OTHER, hours=25, run=over)
    rmtree = shutil.rmtree

    def fail_on_stuck(path: Path) -> None:
        if path == stuck:
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path)

    monkeypatch.setattr("worker.rollout.collect.shutil.rmtree", fail_on_stuck)

    assert collect(world, tmp_path) == [OTHER]
    assert stuck.is_dir()


def test_a_symbolic_link_is_left_and_never_followed(world: World, tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "artifacts", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    treasure = make(elsewhere, "treasure", hours=100, run=make_run(world, "failed", hours=100))
    link = root / ORPHAN
    link.symlink_to(treasure)
    then = time.time() - 100 * 3600
    os.utime(link, (then, then), follow_symlinks=False)

    assert collect(world, root) == []
    assert (treasure / "adapter_model.safetensors").exists()


def test_a_home_without_artefacts_has_no_orphans(world: World, tmp_path: Path) -> None:
    assert collect(world, tmp_path / "none") == []
