"""The console process: pages and admin API in one application. It only puts parts together, as `services.cli` does."""

from fastapi import FastAPI
from starlette.types import ASGIApp

from services.admin import api
from services.app import Shell
from services.console import setup
from services.console.security import Shield
from services.settings import Settings
from services.store.base import Sessions, make_sessions
from services.store.keys import load_pepper


def create_app(settings: Settings | None = None, sessions: Sessions | None = None) -> ASGIApp:
    """The application as uvicorn serves it; settings and sessions are given by tests."""
    chosen = settings or Settings()
    app = FastAPI(title="Whet console", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.settings = chosen
    app.state.sessions = sessions or make_sessions(chosen.database_dsn, pool_size=10)
    app.state.pepper = load_pepper(chosen)
    setup.add_console(app)
    api.add_admin(app)
    return Shell(Shield(app, public_url=chosen.public_console_url), chosen.max_body_bytes)
