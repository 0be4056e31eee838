"""A supervisor to be killed: `python -m tests.platform.nursery HOME` runs two sleepers until told to stop."""

import signal
import sys
import threading
from pathlib import Path

from services.platform import lock
from services.platform.process import Part
from services.platform.supervisor import Supervisor
from tests.platform.conftest import SLEEPER


def main(home: Path) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    held = lock.take(home)
    supervisor = Supervisor(home, home / "state.json", print, keep_open=(held,))
    for name, kind in (("first", "plain"), ("second", "parent")):
        file = home / name
        supervisor.start(
            Part(name, (sys.executable, "-S", "-c", SLEEPER, kind, str(file)), ready=file.exists, grace_seconds=2)
        )
    supervisor.wait_ready(["first", "second"], lambda _: None, stop)
    (home / "ready").touch()
    supervisor.watch(stop)
    supervisor.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
