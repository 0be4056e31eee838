"""`python -m services.console.main`: serve pages and admin API on the console port until told to stop."""

import structlog
import uvicorn

from services.app import configure_logs
from services.settings import Settings

# Less than the supervisor waits before it kills.
GRACE_SECONDS = 5


def main() -> None:
    """Run until SIGTERM or SIGINT, finishing the requests in hand."""
    settings = Settings()
    configure_logs(settings.log_level)
    structlog.get_logger().info("console_starting", host=settings.host, port=settings.console_port)
    uvicorn.run(
        # By name: the console may not import the admin API, only the module above both may.
        "services.web:create_app",
        factory=True,
        host=settings.host,
        port=settings.console_port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.public_console_url),
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


if __name__ == "__main__":
    main()
