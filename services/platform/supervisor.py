"""Keeps parts running: starts them, restarts what dies with a growing pause, stops them in order.

One thread, no callbacks from elsewhere. The state it publishes is for `whet doctor` and for tests.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.errors import WhetError
from services.platform.process import Guarded, Part

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
# A part that ran this long is sound: its next end counts as the first again.
SOUND_SECONDS = 60.0
LOOK_SECONDS = 0.1


@dataclass
class Running:
    """A part under supervision. `process` is None while it waits for its restart at `restart_at`."""

    part: Part
    process: Guarded | None
    restarts: int = 0
    failures: int = 0
    restart_at: float = 0.0
    ready: bool = False


class Supervisor:
    """`tell` gets one sentence for everything that happens after the start. `keep_open` is handed to every guard."""

    def __init__(
        self, logs: Path, state: Path, tell: Callable[[str], None], *, keep_open: Sequence[int] = (), **facts: object
    ) -> None:
        self._logs = logs
        self._state = state
        self._tell = tell
        self._keep_open = tuple(keep_open)
        self._facts = facts
        self._parts: dict[str, Running] = {}

    def start(self, part: Part) -> None:
        """Start a part without waiting for it."""
        self._parts[part.name] = Running(part, self._launch(part))
        self._publish()

    def wait_ready(self, names: Iterable[str], on_ready: Callable[[str], None], stop: threading.Event) -> None:
        """Return when all of them serve, or `stop` is set. Raises Unavailable for one that ends or takes too long."""
        waiting = list(names)
        while waiting and not stop.is_set():
            for name in [name for name in waiting if self._check(self._parts[name])]:
                waiting.remove(name)
                on_ready(name)
            stop.wait(0.05 if waiting else 0)

    def watch(self, stop: threading.Event) -> None:
        """Restart what dies until `stop` is set."""
        while not stop.wait(LOOK_SECONDS):
            for running in self._parts.values():
                self._look_after(running)

    def shut_down(self) -> None:
        """Stop all parts, those others depend on last. Returns when nothing is left."""
        for stage in sorted({running.part.stage for running in self._parts.values()}, reverse=True):
            processes = [r.process for r in self._parts.values() if r.part.stage == stage and r.process is not None]
            for process in processes:
                process.ask_to_stop()
            for process in processes:
                process.stop()
        self._state.unlink(missing_ok=True)

    def _launch(self, part: Part) -> Guarded:
        return Guarded(part, self._logs / f"{part.name}.log", keep_open=self._keep_open)

    def _check(self, running: Running) -> bool:
        running.ready = running.process is not None and running.process.check()
        return running.ready

    def _look_after(self, running: Running) -> None:
        if running.process is None:
            if time.monotonic() >= running.restart_at:
                self._restart(running)
            return
        code = running.process.exit_code()
        if code is not None:
            self._schedule_restart(running, running.process, code)

    def _schedule_restart(self, running: Running, process: Guarded, code: int) -> None:
        process.ask_to_stop()
        sound = time.monotonic() - process.started_at > SOUND_SECONDS
        running.failures = 1 if sound else running.failures + 1
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (running.failures - 1), LONGEST_PAUSE_SECONDS)
        running.process = None
        running.restart_at = time.monotonic() + pause
        self._tell(f"{running.part.name} {_ending(code)}; restarting in {pause:g} s (log: {process.log})")
        self._publish()

    def _restart(self, running: Running) -> None:
        try:
            running.process = self._launch(running.part)
        except (WhetError, OSError) as error:
            running.failures += 1
            running.restart_at = time.monotonic() + LONGEST_PAUSE_SECONDS
            self._tell(f"{running.part.name} cannot be restarted: {error}; trying again in {LONGEST_PAUSE_SECONDS:g} s")
            return
        running.restarts += 1
        self._publish()

    def _publish(self) -> None:
        """Replace the state file: who supervises, and which process guards each part."""
        parts = {
            name: {"guard": running.process.pid if running.process else None, "restarts": running.restarts}
            for name, running in self._parts.items()
        }
        draft = self._state.with_suffix(".draft")
        draft.write_text(json.dumps({"supervisor": os.getpid(), **self._facts, "parts": parts}))
        draft.replace(self._state)


def _ending(code: int) -> str:
    return f"was killed by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
