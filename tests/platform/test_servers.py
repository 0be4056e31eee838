"""The embedded servers: private, without TCP, and back after a crash with what was committed."""

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import psycopg
import pytest

from services.errors import Unavailable
from services.platform import binaries
from services.platform.accounts import Account, server_account
from services.platform.paths import check_socket_paths, prepare_home, private_directory
from services.platform.postgres import PostgresServer
from services.platform.redis import RedisServer
from services.platform.supervisor import Supervisor
from tests.platform.conftest import wait_until


def connect(
    server: PostgresServer, database: str = "postgres", role: str = "whet"
) -> "psycopg.Connection[tuple[object]]":
    return psycopg.connect(host=str(server.sockets), user=role, dbname=database, autocommit=True)


def test_postgres_listens_on_one_private_socket_only(postgres: PostgresServer) -> None:
    with connect(postgres) as connection:
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
    assert postgres.sockets.stat().st_mode & 0o777 == 0o700
    assert (postgres.sockets / ".s.PGSQL.5432").stat().st_mode & 0o077 == 0


def test_only_the_mapped_role_may_connect(postgres: PostgresServer) -> None:
    with connect(postgres) as connection:
        connection.execute("CREATE ROLE stranger LOGIN SUPERUSER")
    with pytest.raises(psycopg.OperationalError, match="Peer authentication failed"):
        connect(postgres, role="stranger")


def test_redis_has_no_port(redis_server: RedisServer) -> None:
    assert redis_server.command("PING") == "+PONG"
    assert "port 0\n" in redis_server.configuration()


@pytest.fixture
def durable(home: Path) -> PostgresServer:
    return PostgresServer(home / "postgres", home / "run", server_account())


def test_a_killed_postgres_comes_back_with_what_was_committed(home: Path, durable: PostgresServer) -> None:
    stop = threading.Event()
    supervisor = Supervisor(home / "logs", home / "state.json", print)
    watcher = threading.Thread(target=supervisor.watch, args=(stop,))
    try:
        supervisor.start(durable.part())
        supervisor.wait_ready(["postgres"], lambda _: None, stop)
        watcher.start()
        durable.create_database()
        with connect(durable, "whet") as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS value")
        postmaster = int((durable.data / "postmaster.pid").read_text().split()[0])
        os.kill(postmaster, signal.SIGKILL)
        wait_until(lambda: not durable.accepts())
        wait_until(durable.accepts, 30)
        with connect(durable, "whet") as connection:
            assert connection.execute("SELECT value FROM kept").fetchone() == (42,)
    finally:
        stop.set()
        watcher.join()
        supervisor.shut_down()
    assert not durable.accepts()


def test_a_pid_file_that_names_a_stranger_does_not_stop_the_start(home: Path, durable: PostgresServer) -> None:
    durable.prepare()
    (durable.data / "postmaster.pid").write_text(f"{os.getpid()}\n{durable.data}\n")
    durable.prepare()
    assert not (durable.data / "postmaster.pid").exists()


def test_a_directory_with_something_else_in_it_is_not_taken_over(home: Path, durable: PostgresServer) -> None:
    durable.data.mkdir()
    (durable.data / "letter.txt").write_text("mine")
    with pytest.raises(Unavailable, match="holds no database but is not empty"):
        durable.prepare()
    assert (durable.data / "letter.txt").read_text() == "mine"


def test_a_socket_path_the_kernel_would_cut_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="choose a shorter --home or set WHET_RUN_DIR"):
        check_socket_paths(tmp_path / ("x" * 80))


def test_a_link_in_place_of_the_socket_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match="must be a directory, not a link"):
        private_directory(tmp_path / "run", server_account())


@pytest.mark.usefixtures("as_root")
def test_root_is_told_when_the_servers_account_cannot_reach_the_home(home: Path) -> None:
    closed = home / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(Unavailable, match="cannot enter"):
        prepare_home(closed / "h", Path(closed / "h" / "run"), server_account())


def test_programs_the_account_cannot_reach_are_copied_once_to_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Account("stranger", uid=os.geteuid() + 1, gid=os.getegid())
    monkeypatch.setattr(binaries, "SERVICE_HOME", tmp_path)
    monkeypatch.setattr(binaries, "_can_run", lambda _program, _account: False)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    program = binaries.redis_program(stranger)
    made = program.stat().st_mtime_ns, program.stat().st_ino
    assert tmp_path in program.parents
    assert "Redis server" in subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    again = binaries.redis_program(stranger)
    assert (again.stat().st_mtime_ns, again.stat().st_ino) == made
    assert [entry.name for entry in (tmp_path / "servers").iterdir()] == [program.parents[2].name]
