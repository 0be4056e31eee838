"""`python -m services.console.main`: serve pages and admin API on the console port until told to stop."""

import structlog
import uvicorn

from services.settings import Settings


def main() -> None:
    """Run until SIGTERM or SIGINT, finishing the requests in hand."""
    settings = Settings()
    structlog.get_logger().info("console_starting", host=settings.host, port=settings.console_port)
    uvicorn.run(
        # By name: the console may not import the admin API, only the module above both may.
        "services.web:create_app",
        factory=True,
        host=settings.host,
        port=settings.console_port,
        log_level=settings.log_level,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.public_console_url),
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    main()
