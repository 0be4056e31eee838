"""Checkpoints that outlive a killed trainer: marked whole after they were written, adopted by the next attempt.

They lie below `runs/<run>/<fence>/trainer` in a directory that only the worker's user can read. What torch wrote into
them is read with `weights_only`, and only from there: nobody else's checkpoint is ever opened.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine.digest import file_digest
from worker.training.spec import Spec

MARK = "whole.json"
TRAINER = "trainer"
TRIALS, DECIDED = "trials.jsonl", "decided.json"
# What may differ between two attempts at the same training.
PER_ATTEMPT = ("rows_file", "out", "parent", "validation_file", "resume", "fingerprint", "reference", "devices")


class Whole(NamedTuple):
    """A checkpoint that was written completely."""

    step: int
    path: Path


def fingerprint(spec: Spec) -> str:
    """SHA-256 of everything that decides what a step does. A checkpoint of another training must not be gone on from:
    an erased example would come back with it."""
    told = msgspec.to_builtins(spec)
    for name in PER_ATTEMPT:
        told.pop(name)
    for file in (spec.rows_file, spec.validation_file):
        told[f"{Path(file).name}.digest"] = file_digest(Path(file)) if file else ""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def mark(checkpoint: Path, step: int, fingerprinted: str) -> None:
    """Call when everything is written: syncs the files, then names their digests. The mark appears in one rename."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARK)
    for path in files:
        _sync(path)
    told = {
        "step": step,
        "fingerprint": fingerprinted,
        "files": {str(path.relative_to(checkpoint)): file_digest(path) for path in files},
    }
    unfinished = checkpoint / f"{MARK}.tmp"
    unfinished.write_text(json.dumps(told), encoding="utf-8")
    _sync(unfinished)
    unfinished.rename(checkpoint / MARK)
    _sync(checkpoint)


def whole(checkpoint: Path, fingerprinted: str) -> Whole | None:
    """The checkpoint when it is complete, unchanged and of this training."""
    try:
        told = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
        if told["fingerprint"] != fingerprinted or not told["files"]:
            return None
        good = all(file_digest(checkpoint / name) == digest for name, digest in told["files"].items())
        return Whole(int(told["step"]), checkpoint) if good else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest(trainer: Path, fingerprinted: str) -> Whole | None:
    """The last whole checkpoint below a trainer's directory; torn ones are passed over."""
    found = [made for path in trainer.glob("checkpoint-*") if (made := whole(path, fingerprinted)) is not None]
    return max(found, default=None)


def adopt(run: Path, work: Path, fingerprinted: str) -> Whole | None:
    """Take over what earlier attempts of the run left that is worth going on from; the rest of theirs is removed.

    A rename moves the checkpoint: an attempt that dies in here leaves it in one place, to be found by the next.
    """
    earlier = [path for path in run.iterdir() if path != work and path.is_dir()]
    found = [made for path in [*earlier, work] if (made := newest(path / TRAINER, fingerprinted)) is not None]
    best = max(found, default=None)
    if best is not None and not best.path.is_relative_to(work):
        (work / TRAINER).mkdir(mode=0o700, exist_ok=True)
        best = Whole(best.step, best.path.rename(work / TRAINER / best.path.name))
    for name in (TRIALS, DECIDED):
        left = [path / name for path in earlier if (path / name).exists()]
        if left and not (work / name).exists():
            max(left, key=lambda path: path.stat().st_size).rename(work / name)
    for path in earlier:
        shutil.rmtree(path, ignore_errors=True)
    return best


def decided(work: Path) -> dict[str, float] | None:
    """What the sweep of a training in `work` has decided on; None where there was none, or it is not over."""
    told = work / DECIDED
    return dict(json.loads(told.read_text(encoding="utf-8"))) if told.exists() else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
