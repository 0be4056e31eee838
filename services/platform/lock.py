"""One platform per home: a lock that the kernel drops when its last holder is gone, so it cannot go stale."""

import fcntl
import os
import time
from pathlib import Path

from services.errors import Conflict

LOCK = "lock"
# After a killed supervisor its parts shut themselves down; the lock is held until the last one is gone.
PATIENCE_SECONDS = 20.0


def take(home: Path, *, patience: float = PATIENCE_SECONDS) -> int:
    """Lock the home and return the descriptor that holds it. Raises Conflict when another platform runs there."""
    descriptor = os.open(home / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience
    while not _try(descriptor):
        owner = holder(home)
        if (owner is not None and _alive(owner)) or time.monotonic() > deadline:
            os.close(descriptor)
            who = f"process {owner}" if owner is not None and _alive(owner) else "parts that are still stopping"
            raise Conflict(f"Whet already runs in {home} ({who}): stop it first, or choose another --home")
        time.sleep(0.1)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def holder(home: Path) -> int | None:
    """The process that locked the home last; whether it still runs is another question."""
    path = home / LOCK
    text = path.read_text() if path.exists() else ""
    return int(text) if text.isdigit() else None


def held(home: Path) -> bool:
    """Whether a platform runs in the home now."""
    if not (home / LOCK).exists():
        return False
    descriptor = os.open(home / LOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        return not _try(descriptor)
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
