"""Artefact directories: named by the SHA-256 of their manifest, written whole by a rename, never changed after it."""

import importlib.metadata
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from engine.digest import file_digest
from services.store import lifecycle
from services.store.examples import canonical, digest_of
from services.store.models import Artifact

FILES = ("adapter_config.json", "adapter_model.safetensors")
LIBRARIES = ("torch", "transformers", "trl", "peft")
HEADS_FILES = ("speculator.safetensors",)
HEADS_LIBRARIES = ("torch", "safetensors")


@dataclass(frozen=True)
class Built:
    """A finished artefact directory."""

    digest: str
    manifest: dict[str, Any]


def describe(
    directory: Path,
    *,
    base: str,
    project: UUID,
    run: UUID,
    revision: str,
    params: dict[str, Any],
    kind: str = "sft",
    swept: dict[str, Any] | None = None,
) -> Built:
    """The manifest of the adapter in `directory`. No times and no paths: the same training has the same digest.

    `swept`: those of `params` that a sweep chose otherwise.
    """
    manifest = {
        "kind": "adapter",
        "base": base,
        "project": str(project),
        "run": str(run),
        "revision": revision,
        "training": kind,
        "params": params,
    } | ({} if swept is None else {"swept": swept})
    return _built(directory, manifest, FILES, LIBRARIES)


def describe_speculator(
    directory: Path,
    *,
    base: str,
    vocabulary: str,
    adapter: str | None,
    report: dict[str, Any],
    params: dict[str, Any],
    project: UUID | None = None,
    run: UUID | None = None,
    window: dict[str, Any] | None = None,
) -> Built:
    """The manifest of the heads in `directory`. `vocabulary` is the digest of the base's tokenizer.json, `adapter` the
    digest whose states they were trained on; `report` is what the trainer returned."""
    manifest = {
        "kind": "speculator",
        "base": base,
        "adapter": adapter,
        "vocabulary": vocabulary,
        "project": str(project) if project else "",
        "run": str(run) if run else "",
        "window": (window or {}) | {"interactions": report["requests"], "tokens": report["tokens"]},
        "tau": {name: round(value, 4) for name, value in report["tau"].items()},
        "params": params,
        "shape": report["shape"],
    }
    return _built(directory, manifest, HEADS_FILES, HEADS_LIBRARIES)


def _built(directory: Path, manifest: dict[str, Any], files: Iterable[str], libraries: Iterable[str]) -> Built:
    whole = manifest | {
        "files": {name: file_digest(directory / name) for name in files},
        "code_version": {name: importlib.metadata.version(name) for name in libraries},
    }
    return Built(digest_of(whole), whole)


def publish(directory: Path, built: Built, artifacts: Path) -> Path:
    """Move the adapter to its final name; when that is there already, from an attempt that died, keep that one."""
    (directory / "manifest.json").write_bytes(canonical(built.manifest))
    for file in directory.iterdir():
        _sync(file)
    _sync(directory)
    artifacts.mkdir(parents=True, exist_ok=True)
    target = artifacts / built.digest
    if not target.exists():
        directory.rename(target)
        _sync(artifacts)
    return target


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record(session: Session, built: Built, *, project_id: UUID, run_id: UUID) -> None:
    """The artefact's row and the event it begins its history with, once."""
    values = {
        "digest": built.digest, "kind": built.manifest["kind"], "project_id": project_id, "run_id": run_id,
        "base_digest": built.manifest["base"], "manifest": built.manifest, "state": "built",
    }  # fmt: skip
    statement = insert(Artifact).values(values).on_conflict_do_nothing(index_elements=["digest"])
    made = session.scalar(statement.returning(Artifact))
    if made is not None:
        lifecycle.born(session, made)
