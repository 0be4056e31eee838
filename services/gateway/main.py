"""The gateway process: `python -m services.gateway.main`."""

import gc
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from services.app import ERROR_HANDLERS, Shell, configure_logs, refuse_undeclared
from services.gateway.routes import ROUTES
from services.gateway.service import Gateway
from services.settings import Settings

# Less than the supervisor waits before it kills: streams that have not ended by then are cancelled, and logged so.
GRACE_SECONDS = 5


def build_app(gateway: Gateway) -> ASGIApp:
    """The ASGI application around a gateway."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    refuse_undeclared(ROUTES)
    app = Starlette(routes=ROUTES, exception_handlers=ERROR_HANDLERS, lifespan=lifespan)
    app.state.gateway = gateway
    return Shell(app, gateway.settings.max_body_bytes)


def main() -> None:
    """Serve until told to stop."""
    settings = Settings()
    configure_logs(settings.log_level)
    try:
        gateway = Gateway.build(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"the gateway cannot start: {error}")
    # What stands now stands for good: the collector need not walk it on the token path.
    gc.freeze()
    uvicorn.run(
        build_app(gateway),
        host=settings.host,
        port=settings.gateway_port,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


if __name__ == "__main__":
    main()
