"""Runs the trainer process from the worker: reads its reports and its stderr, stops it when asked, keeps the end."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from worker.training.spec import REFUSED, HeadsSpec, Report, Spec, decode_report, encode
from worker.training.stderr import Follower, plain

POLL_SECONDS = 0.5
TERMINATE_SECONDS = 5.0
TAIL_BYTES = 8000
ROOT = Path(__file__).parents[2]
LORA, HEADS = "worker.training.lora", "worker.training.heads"
# The trainer gets what it needs and no secret: it reads text that strangers wrote. Templates print the local day.
PASSED_ON = ("PATH", "HOME", "LANG", "TZ", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


class TrainerRefused(RuntimeError):
    """The trainer says that a retry would end the same; the message is its reason."""


class TrainerDied(RuntimeError):
    """The trainer ended without a result. `killed` when by a signal (out of memory, a stopping machine), or perhaps by
    one: of several ranks nothing more is known than that the launcher ended."""

    def __init__(self, status: int, tail: str, *, launched: bool = False) -> None:
        last = tail.strip().splitlines()[-1:] or ["no message"]
        how = f"signal {-status}" if status < 0 else f"status {status}"
        super().__init__(f"the trainer ended with {how}: {last[0]}")
        self.tail = tail
        self.killed = status < 0 or launched


def run(
    spec: Spec | HeadsSpec,
    work: Path,
    on_report: Callable[[Report], None],
    stop: Callable[[], bool],
    on_line: Callable[[str], None] = lambda _: None,
) -> bool:
    """Train in a child of this process, by the trainer whose spec it is. False when `stop()` said so and it was ended.
    `on_line` hears the first lines of its stderr, as plain text.

    Raises TrainerRefused or TrainerDied. The child never outlives this call.
    """
    spec_file, errors_file = work / "spec.json", work / "stderr.log"
    spec_file.write_bytes(encode(spec))
    module = LORA if isinstance(spec, Spec) else HEADS
    with errors_file.open("wb") as errors, _started(module, spec_file, errors) as process:
        lines, said = _lines(process), Follower(errors_file)
        while True:
            with contextlib.suppress(queue.Empty):
                line = lines.get(timeout=POLL_SECONDS)
                if line is None:
                    break
                on_report(decode_report.decode(line))
            _pass_on(said, on_line)
            if stop():
                return False
        status = process.wait()
        _pass_on(said, on_line)
    if status == 0:
        return True
    tail = _tail(errors_file)
    # accelerate's launcher ends with a status of its own, behind what its trainers wrote.
    launched = getattr(spec, "devices", 1) > 1
    if status == REFUSED or (launched and "\nrefused: " in f"\n{tail}"):
        raise TrainerRefused(tail.rpartition("refused: ")[2].partition("\n")[0].strip())
    raise TrainerDied(status, tail, launched=launched)


@contextlib.contextmanager
def _started(module: str, spec_file: Path, errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--spec", str(spec_file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=_environment() | {"TMPDIR": str(spec_file.parent)},  # what a killed trainer leaves is swept with its work
        cwd=spec_file.parent,
        process_group=0,  # not a new session: that would leave the worker's autogroup, and with it its niceness
    )
    try:
        yield process
    finally:
        _end(process)
        if process.stdout is not None:
            process.stdout.close()


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # What the trainer says is on the run's page: no bars, and none of what libraries tell those who call them.
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }


def _lines(process: subprocess.Popen[bytes]) -> "queue.Queue[bytes | None]":
    """The child's reports as they come, then None."""
    lines: queue.Queue[bytes | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # closed under us after the child was ended
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="trainer-reports", daemon=True).start()
    return lines


def _pass_on(said: Follower, on_line: Callable[[str], None]) -> None:
    for line in said.lines():
        on_line(line)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the child's whole group, gently first."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        deadline = time.monotonic() + TERMINATE_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    process.wait()


def _tail(file: Path) -> str:
    return plain(file.read_bytes()[-TAIL_BYTES:].decode(errors="replace"))
