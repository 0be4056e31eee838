"""Real servers for every test: one throw-away Postgres and Redis per test process, a fresh database per test."""

import ipaddress
import os
import shutil
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from migrations.run import upgrade
from services.platform.accounts import server_account
from services.platform.paths import prepare_home, temporary_home
from services.platform.postgres import PostgresServer
from services.platform.process import Guarded
from services.platform.redis import RedisServer
from services.settings import Settings
from services.store import partitions
from services.store.base import Sessions, make_sessions, uuid7

TEMPLATE = "whet_template"
LOGGED_BEFORE = timedelta(days=2)  # How far back a test may log without making partitions: past midnight, too.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "0",
}


@pytest.fixture(scope="session", autouse=True)
def _only_loopback() -> Iterator[None]:
    """Tests may talk to this machine and to no other."""
    patch = pytest.MonkeyPatch()
    connect = socket.socket.connect

    def checked(self: socket.socket, address: object) -> None:
        if self.family in {socket.AF_INET, socket.AF_INET6} and isinstance(address, tuple):
            host = str(address[0])
            if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
                raise AssertionError(f"a test tried to reach {address}: tests stay on this machine")
        connect(self, address)  # type: ignore[arg-type]

    patch.setattr(socket.socket, "connect", checked)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own WHET_ settings must not leak into tests."""
    for name in [key for key in os.environ if key.startswith("WHET_") or key in {"DATABASE_URL", "REDIS_URL"}]:
        monkeypatch.delenv(name)


def _memory() -> Path | None:
    """A directory in memory: a database is made there in a tenth of the time. None where there is too little."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 4 << 30
    return shared if roomy else None


@pytest.fixture(scope="session")
def server_home() -> Iterator[Path]:
    """Home of this test process's servers."""
    with temporary_home("whet-test-", _memory()) as home:
        prepare_home(home, home / "run", server_account())
        yield home


@pytest.fixture(scope="session")
def postgres(server_home: Path) -> Iterator[PostgresServer]:
    """A running Postgres that forgets durability, with a migrated template database."""
    server = PostgresServer(server_home / "postgres", server_home / "run", server_account(), durable=False)
    running = Guarded(server.part(), server_home / "logs" / "postgres.log")
    try:
        running.wait_ready()
        _make_template(server)
        yield server
    finally:
        running.stop()


def _make_template(server: PostgresServer) -> None:
    url = server.create_database(TEMPLATE)
    upgrade(url)
    sessions = make_sessions(url)
    with sessions.begin() as session:
        partitions.ensure(session, since=datetime.now(UTC) - LOGGED_BEFORE)
    sessions.kw["bind"].dispose()


@pytest.fixture
def database_url(postgres: PostgresServer) -> Iterator[str]:
    """SQLAlchemy URL of a fresh migrated database with partitions around today; dropped after the test."""
    name = f"test_{uuid7().hex}"
    yield postgres.create_database(name, template=TEMPLATE)
    postgres.drop_database(name)


@pytest.fixture
def sessions(database_url: str) -> Iterator[Sessions]:
    """Session factory on the fresh database."""
    made = make_sessions(database_url)
    yield made
    made.kw["bind"].dispose()


@pytest.fixture(scope="session")
def redis_server(server_home: Path) -> Iterator[RedisServer]:
    """A running Redis of this test process."""
    server = RedisServer(server_home / "redis", server_home / "run", server_account())
    running = Guarded(server.part(), server_home / "logs" / "redis.log")
    try:
        running.wait_ready()
        yield server
    finally:
        running.stop()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """URL of an emptied Redis, as Celery wants it."""
    redis_server.command("FLUSHALL")
    return redis_server.url()


@pytest.fixture
def home() -> Iterator[Path]:
    """An empty home with a short path (pytest's own are too long for sockets); removed after the test."""
    with temporary_home("whet-test-") as made:
        prepare_home(made, made / "run", server_account())
        yield made


@pytest.fixture
def settings(home: Path, database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a fresh home, database and Redis; in the environment too, for processes a test starts."""
    monkeypatch.setenv("WHET_HOME", str(home))
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("WHET_GATEWAY_PORT", "0")
    monkeypatch.setenv("WHET_CONSOLE_PORT", "0")
    return Settings()
