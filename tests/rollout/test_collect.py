"""Directories of artefacts that no row names."""

import os
import time
from pathlib import Path

from tests.rollout.conftest import World
from worker.rollout.collect import collect_orphans

KNOWN, ORPHAN, YOUNG = "a" * 64, "b" * 64, "c" * 64


def make(root: Path, name: str, *, hours: float) -> Path:
    directory = root / name
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    then = time.time() - hours * 3600
    os.utime(directory, (then, then))
    return directory


def collect(world: World, root: Path) -> list[str]:
    with world.sessions() as session:
        return collect_orphans(session, root)


def test_only_old_directories_without_a_row_are_removed(world: World, tmp_path: Path) -> None:
    world.artifact(KNOWN, "rejected")
    make(tmp_path, KNOWN, hours=100)
    make(tmp_path, ORPHAN, hours=25)
    make(tmp_path, YOUNG, hours=23)

    assert collect(world, tmp_path) == [ORPHAN]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [KNOWN, YOUNG]


def test_a_symbolic_link_is_removed_but_never_followed(world: World, tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "artifacts", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    treasure = make(elsewhere, "treasure", hours=100)
    link = root / ORPHAN
    link.symlink_to(treasure)
    then = time.time() - 100 * 3600
    os.utime(link, (then, then), follow_symlinks=False)

    assert collect(world, root) == [ORPHAN]
    assert (treasure / "adapter_model.safetensors").exists()


def test_a_home_without_artefacts_has_no_orphans(world: World, tmp_path: Path) -> None:
    assert collect(world, tmp_path / "none") == []
