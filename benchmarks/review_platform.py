"""The database, the engine and the console of a home, as processes of their own, and people signed in to it."""

import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from migrations.run import upgrade
from services.platform import parts
from services.platform.accounts import server_account
from services.platform.paths import prepare_home
from services.platform.postgres import PostgresServer
from services.platform.process import Guarded
from services.settings import Settings
from services.store import people
from services.store.base import Sessions, make_sessions


@dataclass(frozen=True)
class Served:
    """A console over HTTP."""

    url: str
    sessions: Sessions

    def link(self, email: str) -> str:
        """The path of a fresh sign-in link."""
        with self.sessions.begin() as session:
            user = people.find_user(session, email)
            return f"/sign-in/{people.make_sign_in_link(session, user.id)}"

    @contextmanager
    def client(self, email: str) -> Iterator[httpx.Client]:
        """A browser's session without the browser."""
        with httpx.Client(base_url=self.url, timeout=60, headers={"accept": "text/html"}) as client:
            assert client.post(self.link(email)).status_code == 303
            yield client


@contextmanager
def served(home: Path, sessions: Sessions, names: Sequence[str] = ("engine", "console")) -> Iterator[Served]:
    """These parts, ready; the database runs already."""
    settings = Settings(home=home, run_dir=home / "run", console_port=_free_port(), gateway_port=_free_port())
    running: list[Guarded] = []
    try:
        for part in parts.application(settings):
            if part.name in names:
                running.append(Guarded(part, home / "logs" / f"{part.name}.log"))
        for one in running:
            one.wait_ready()
        yield Served(settings.console_url, sessions)
    finally:
        for one in reversed(running):
            one.stop()


@contextmanager
def home_database(home: Path) -> Iterator[Sessions]:
    """The Postgres of a home, running and migrated; it stops again when the block ends."""
    home.mkdir(parents=True, exist_ok=True)
    prepare_home(home, home / "run", server_account())
    server = PostgresServer(home / "postgres", home / "run", server_account())
    running = Guarded(server.part(), home / "logs" / "postgres.log")
    try:
        running.wait_ready()
        url = server.create_database()
        upgrade(url)
        sessions = make_sessions(url)
        yield sessions
        sessions.kw["bind"].dispose()
    finally:
        running.stop()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def ids_on(page: str) -> int:
    """How many answers a page of the list shows."""
    return len(set(re.findall(r"/interactions/([0-9a-f-]{36})", page)))
