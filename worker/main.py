"""The worker process: `python -m worker.main --queue cpu --concurrency 2`.

Two pool processes for `cpu`, so that sampling goes on while a training run waits for its child.
"""

import argparse
import os
import sys
from collections.abc import Mapping

from services.settings import Settings
from worker import logs
from worker.tasks import HANDLERS, Handler, make_app
from worker.watchdog import Watchdog


def main(arguments: list[str] | None = None, *, handlers: Mapping[str, Handler] = HANDLERS) -> None:
    """Consume one queue until told to stop; running jobs go back to the ledger at once."""
    parser = argparse.ArgumentParser(prog="whet worker")
    parser.add_argument("--queue", default="cpu", help="which queue to serve")
    parser.add_argument("--concurrency", type=int, default=2, help="jobs at once")
    options = parser.parse_args(arguments)
    settings = Settings()
    logs.configure(settings.log_level)
    # Celery's own choice is to wait for running jobs, which may train for hours; ours can always be run again.
    # It reads this when its worker is first imported, which `app.Worker` below does.
    os.environ["REMAP_SIGTERM"] = "SIGQUIT"
    app = make_app(settings, handlers=handlers)
    Watchdog(settings.database_dsn, options.queue, options.concurrency).start()
    worker = app.Worker(
        queues=[options.queue],
        concurrency=options.concurrency,
        pool="prefork",
        loglevel=settings.log_level,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    worker.start()
    sys.exit(worker.exitcode)


if __name__ == "__main__":
    main()
