"""Named places where a test can kill the process, to show that nothing acknowledged is lost there."""

import os

EXIT_STATUS = 137  # What a shell reports for SIGKILL: supervisors must treat both alike.


def reach(name: str) -> None:
    """Die at once, without clean-up, when `WHET_FAILPOINT` names this place; otherwise do nothing."""
    if os.environ.get("WHET_FAILPOINT") == name:
        os.write(2, f'{{"event": "failpoint reached", "name": "{name}", "pid": {os.getpid()}}}\n'.encode())
        os._exit(EXIT_STATUS)
