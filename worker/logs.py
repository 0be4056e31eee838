"""JSON log lines on stderr, and the last of them kept for the ledger when a job fails."""

import logging
import sys
from collections import deque

import structlog
from structlog.typing import EventDict, WrappedLogger

# One pool process runs one job at a time, so these lines belong to the job at hand.
recent: deque[str] = deque(maxlen=60)


def configure(level: str) -> None:
    """Route structlog and the standard library's loggers (Celery, SQLAlchemy) into the same lines."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, _remember, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processor=structlog.processors.JSONRenderer(),
            foreign_pre_chain=[*shared, structlog.processors.format_exc_info],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Celery announces every message it takes; the ledger already knows.
    logging.getLogger("celery").setLevel(logging.WARNING)


def _remember(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    recent.append(" ".join(f"{key}={value}" for key, value in event.items()))
    return event
