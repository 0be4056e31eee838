"""Runs one command and makes sure it never outlives whoever asked for it.

    python guard.py --pipe 5 --signal 15 --grace 10 -- command …

The starter keeps the writing end of the pipe. When that closes, because the starter wants the command to stop or
because it was killed, the guard sends the stop signal, waits out the grace and kills. Whatever the command left
behind is killed too: as a "child subreaper" the guard inherits its orphans. Should the guard itself be killed, the
kernel sends the stop signal to the command (PR_SET_PDEATHSIG).

Run as a file with `python -I -S`, so it imports nothing of ours and starts in some 20 ms.
"""

import argparse
import ctypes
import os
import select
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    options = parse_options()
    wakeup = watch_signals()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = start(options)
    status = wait_for_either(child, options.pipe, wakeup)
    if status is None:
        status = stop(child, options.signal, options.grace, wakeup)
    kill_orphans()
    return os.waitstatus_to_exitcode(status)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pipe", type=int, required=True)
    parser.add_argument("--signal", type=int, default=signal.SIGTERM)
    parser.add_argument("--grace", type=float, default=10.0)
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--uid", type=int)
    parser.add_argument("--gid", type=int)
    parser.add_argument("command", nargs="+")
    return parser.parse_args()


def watch_signals() -> int:
    """A descriptor that becomes readable on a child's end or SIGTERM. Ctrl-C is the starter's business."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.set_blocking(reading, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return reading


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def start(options: argparse.Namespace) -> int:
    guard = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        become_command(options, guard)
    except OSError as error:
        print(f"cannot start {options.command[0]}: {error}", file=sys.stderr, flush=True)
    os._exit(127)


def become_command(options: argparse.Namespace, guard: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    be_nice(options.nice)
    if options.gid is not None:
        os.setgroups([])
        os.setgid(options.gid)
    if options.uid is not None:
        os.setuid(options.uid)
    # After the change of user, which would clear it.
    prctl(PR_SET_PDEATHSIG, options.signal)
    if os.getppid() != guard:
        os._exit(1)
    os.closerange(3, 65536)
    os.execvp(options.command[0], options.command)


def be_nice(nice: int) -> None:
    """Niceness towards other parts too: with autogroup scheduling, nice alone counts only inside one session."""
    if nice == 0:
        return
    os.nice(nice)
    if not os.path.exists("/proc/self/autogroup"):
        return
    try:
        set_autogroup(nice)
    except OSError as error:
        print(f"cannot be nice to other sessions: {error}", file=sys.stderr, flush=True)


def set_autogroup(nice: int) -> None:
    for attempt in (1, 2, 3):
        try:
            with open("/proc/self/autogroup", "w") as group:
                group.write(str(nice))
            return
        except BlockingIOError:
            # The kernel lets unprivileged processes do this ten times a second, all of them together.
            if attempt == 3:
                raise
            time.sleep(0.15)


def wait_for_either(child: int, pipe: int, wakeup: int) -> int | None:
    """The child's wait status, or None when the pipe closed or SIGTERM came first."""
    while True:
        ready, _, _ = select.select([pipe, wakeup], [], [])
        if pipe in ready and os.read(pipe, 1) == b"":
            return None
        if wakeup in ready and signal.SIGTERM in os.read(wakeup, 64):
            return None
        status = reap(child)
        if status is not None:
            return status


def reap(child: int) -> int | None:
    """Collect ended children, orphans included; the status of `child` if it was among them."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == child:
            return status
        if pid == 0:
            return None


def stop(child: int, number: int, grace: float, wakeup: int) -> int:
    """Ask, wait, kill."""
    os.kill(child, number)
    deadline = time.monotonic() + grace
    while (left := deadline - time.monotonic()) > 0:
        status = reap(child)
        if status is not None:
            return status
        if select.select([wakeup], [], [], left)[0]:
            os.read(wakeup, 64)
    os.killpg(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def kill_orphans() -> None:
    """Kill what the command left running, generation after generation."""
    while orphans := children():
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
        for pid in orphans:
            os.waitpid(pid, 0)


def children() -> list[int]:
    """Direct children of this process, ended ones included, by /proc; none on systems without it."""
    if not os.path.isdir("/proc/self"):
        return []
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid():
            found.append(int(name))
    return found


if __name__ == "__main__":
    code = main()
    # A shell's convention: 128 plus the signal that ended it.
    sys.exit(code if code >= 0 else 128 - code)
