"""What every trainer process does first: die with its worker, step back, and keep the pipe for its reports."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

from worker.training.spec import REFUSED, Report, encode

PR_SET_PDEATHSIG = 1
NICENESS = 10


class Refused(RuntimeError):
    """The data is at fault: trying again would end the same."""


Trainer = Callable[[Callable[[Report], None]], None]


def serve(parent: int, train: Trainer) -> int:
    """Run `train` as the child of `parent`; the process's exit status."""
    die_with(parent)
    os.nice(NICENESS)
    report = _take_stdout()
    return refusing(lambda: train(report))


def refusing(work: Callable[[], object]) -> int:
    """The exit status of work that may refuse; the reason is the last thing on stderr."""
    try:
        work()
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        return REFUSED
    return 0


def die_with(parent: int) -> None:
    """A trainer whose worker was killed would burn a core for a result that nobody takes."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def _take_stdout() -> Callable[[Report], None]:
    """Keep the pipe for reports; from here on a library's print() goes to stderr."""
    reports = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def report(message: Report) -> None:
        reports.write(encode(message) + b"\n")

    return report
