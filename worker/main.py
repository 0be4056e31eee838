"""The worker process: `python -m worker.main --queue cpu`.

Two pool processes for `cpu`, so that a roll-back is told while an evaluation goes on; one for `train`, where two
trainings would only be in each other's way.
"""

import argparse
import os
import sys
from collections.abc import Mapping

from services.settings import Settings
from services.store import jobs
from worker import logs
from worker.tasks import HANDLERS, Handler, make_app
from worker.watchdog import Watchdog


def main(arguments: list[str] | None = None, *, handlers: Mapping[str, Handler] = HANDLERS) -> None:
    """Consume one queue until told to stop; running jobs go back to the ledger at once."""
    parser = argparse.ArgumentParser(prog="whet worker")
    parser.add_argument("--queue", choices=jobs.QUEUES, default=jobs.CPU, help="trainings, or everything else")
    parser.add_argument("--concurrency", type=int, help="jobs at once; of trainings 1, otherwise 2")
    options = parser.parse_args(arguments)
    concurrency = options.concurrency or (1 if options.queue == jobs.TRAIN else 2)
    settings = Settings()
    logs.configure(settings.log_level)
    # Celery's own choice is to wait for running jobs, which may train for hours; ours can always be run again.
    # It reads this when its worker is first imported, which `app.Worker` below does.
    os.environ["REMAP_SIGTERM"] = "SIGQUIT"
    app = make_app(settings, handlers=handlers)
    Watchdog(settings.database_dsn, options.queue, concurrency).start()
    worker = app.Worker(
        queues=[options.queue],
        concurrency=concurrency,
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
