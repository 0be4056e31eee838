"""A part of the platform as a process that cannot outlive us: started through `guard.py`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from services.errors import Unavailable
from services.platform.accounts import Account

GUARD = Path(__file__).with_name("guard.py")
LOG_BYTES = 20_000_000


def _always() -> bool:
    return True


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Part:
    """How to run one process: the command, how to ask it to stop, and how to tell that it serves.

    `prepare` runs before every start and clears away what a killed predecessor left. A part that cannot be asked
    whether it serves counts as ready when it has lived for `settle_seconds`.
    """

    name: str
    command: tuple[str, ...]
    stage: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    account: Account | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    grace_seconds: float = 10.0
    nice: int = 0
    prepare: Callable[[], None] = _nothing
    ready: Callable[[], bool] = _always
    ready_seconds: float = 120.0
    settle_seconds: float = 0.0


class Guarded:
    """A running part. Dropping the pipe, by `stop` or by dying, ends the part and everything it started.

    `keep_open` descriptors are held by the guard until the part is gone; a lock among them stays held that long.
    """

    def __init__(self, part: Part, log: Path, *, keep_open: tuple[int, ...] = ()) -> None:
        part.prepare()
        self.part = part
        self.log = log
        self.started_at = time.monotonic()
        reading, self._pipe = os.pipe()
        try:
            with _open_log(log) as output:
                self._guard = subprocess.Popen(
                    _guard_command(part, reading),
                    cwd="/", stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                    env={**os.environ, **part.environment}, pass_fds=(reading, *keep_open),
                )  # fmt: skip
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(reading)

    @property
    def pid(self) -> int:
        """The guard's process id; the part is its child."""
        return self._guard.pid

    def exit_code(self) -> int | None:
        """None while it runs; 128 + signal for a part that was killed."""
        return self._guard.poll()

    def check(self) -> bool:
        """Whether it serves. Raises Unavailable with its last log lines when it ended or takes too long."""
        if self.exit_code() is not None:
            raise Unavailable(f"{self.part.name} ended at its start\n{tail(self.log)}")
        age = time.monotonic() - self.started_at
        if age >= self.part.settle_seconds and self.part.ready():
            return True
        if age > self.part.ready_seconds:
            raise Unavailable(f"{self.part.name} was not ready after {self.part.ready_seconds:.0f} s\n{tail(self.log)}")
        return False

    def wait_ready(self) -> None:
        """Return when the part serves. Raises as `check` does."""
        while not self.check():
            time.sleep(0.02)

    def ask_to_stop(self) -> None:
        """Close the pipe: the guard sends the stop signal and kills after the grace."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def stop(self) -> int:
        """Stop the part with all its children and return its exit code."""
        self.ask_to_stop()
        return self._guard.wait(self.part.grace_seconds + 10)


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log, for error messages."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _open_log(log: Path) -> BinaryIO:
    """Append; a log past its size is set aside once, replacing the one set aside before."""
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    return log.open("ab")


def _guard_command(part: Part, pipe: int) -> list[str]:
    options = [f"--pipe={pipe}", f"--signal={int(part.stop_signal)}", f"--grace={part.grace_seconds}"]
    options.append(f"--nice={part.nice}")
    if part.account is not None and not part.account.is_us:
        options += [f"--uid={part.account.uid}", f"--gid={part.account.gid}"]
    return [sys.executable, "-I", "-S", str(GUARD), *options, "--", *part.command]
