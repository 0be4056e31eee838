"""Named places where a test can kill or hold the process, to show that nothing acknowledged is lost there.

`WHET_FAILPOINT=name` kills at that place. `WHET_FAILPOINT=@FILE` takes orders while the process runs: the file holds
`name exit` or `name hold`; whoever gets there first takes the order by renaming it to FILE.reached. A held process goes
on when that file is gone.
"""

import os
import time
from pathlib import Path

EXIT_STATUS = 137  # What a shell reports for SIGKILL: supervisors must treat both alike.
HELD_POLL_SECONDS = 0.01


def reach(name: str) -> None:
    """Die at once, without clean-up, or wait, when `WHET_FAILPOINT` names this place; otherwise do nothing."""
    armed = os.environ.get("WHET_FAILPOINT")
    if armed is None:
        return
    if armed.startswith("@"):
        _obey(Path(armed[1:]), name)
    elif armed == name:
        _die(name)


def _obey(order: Path, name: str) -> None:
    try:
        wanted, _, what = order.read_text(encoding="utf-8").partition(" ")
        if wanted != name:
            return
        reached = order.with_name(f"{order.name}.reached")
        order.rename(reached)
    except FileNotFoundError:
        return  # nothing is ordered, or somebody else took it
    if what.strip() != "hold":
        _die(name)
    while reached.exists():
        time.sleep(HELD_POLL_SECONDS)


def _die(name: str) -> None:
    os.write(2, f'{{"event": "failpoint reached", "name": "{name}", "pid": {os.getpid()}}}\n'.encode())
    os._exit(EXIT_STATUS)
