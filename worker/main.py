"""The worker process: `python -m worker.main --queue cpu --concurrency 2`.

Two pool processes for `cpu`, so that sampling goes on while a training run waits for its child.
"""

import argparse
import os
import signal
import sys
from types import FrameType

from celery.signals import worker_process_init

from services.settings import Settings
from worker import logs
from worker.tasks import WorkerStopping, make_app
from worker.watchdog import Watchdog


def main(arguments: list[str] | None = None) -> None:
    """Consume one queue until told to stop; running jobs go back to the ledger at once."""
    parser = argparse.ArgumentParser(prog="whet worker")
    parser.add_argument("--queue", default="cpu", help="which queue to serve")
    parser.add_argument("--concurrency", type=int, default=2, help="jobs at once")
    options = parser.parse_args(arguments)
    settings = Settings()
    logs.configure(settings.log_level)
    # Celery's own choice is to wait for running jobs, which may train for hours; ours can always be run again.
    os.environ["REMAP_SIGTERM"] = "SIGQUIT"
    worker_process_init.connect(_stop_on_terminate)
    app = make_app(settings)
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


def _stop_on_terminate(**_kwargs: object) -> None:
    """In a pool process: unwind the running handler, so that it stops its children and hands its lease back."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise WorkerStopping(0)

    signal.signal(signal.SIGTERM, stop)


if __name__ == "__main__":
    main()
