"""The embedded Postgres: the wheel's binaries with Whet's own initdb, configuration and supervision.

No TCP. One Unix socket in the private run directory; `peer` authentication maps the two accounts that may connect
(ours, and the one the server runs as) to the database role `whet`.
"""

import os
import shutil
import signal
from pathlib import Path

import psutil
import psycopg
from psycopg import sql

from services.errors import Unavailable
from services.platform.accounts import Account, current_account
from services.platform.binaries import postgres_programs
from services.platform.paths import private_directory
from services.platform.process import Part

ROLE = "whet"
DATABASE = "whet"
HOST_ACCESS = "local all all peer map=whet\n"

CONFIGURATION = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "120",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
    "jit": "off",
    # Its log outlives erasures, so an error there quotes neither the row nor the statement.
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
    # A client that vanished must not hold its locks for two hours.
    "idle_in_transaction_session_timeout": "15min",
}
# For throw-away databases only: nothing reaches the disk when it should.
NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "autovacuum": "off"}


class PostgresServer:
    """One data directory and its socket. `durable=False` is for tests: it gives up crash safety for speed."""

    def __init__(self, data: Path, sockets: Path, account: Account, *, durable: bool = True) -> None:
        self.data = data
        self.sockets = sockets
        self.account = account
        self.durable = durable
        self.programs = postgres_programs(account)

    def prepare(self) -> None:
        """Create the cluster on first use, rewrite who may connect, and clear away what a killed server left."""
        private_directory(self.data, self.account)
        if not (self.data / "PG_VERSION").exists():
            self._initialise()
        self._write("pg_hba.conf", HOST_ACCESS)
        users = dict.fromkeys((current_account().name, self.account.name))
        self._write("pg_ident.conf", "".join(f"whet {name} {ROLE}\n" for name in users))
        self._end_leftover()

    def part(self) -> Part:
        """How the supervisor runs it. SIGINT is Postgres's fast shutdown: it drops clients and writes a checkpoint."""
        settings = CONFIGURATION | {"unix_socket_directories": str(self.sockets)}
        settings |= {} if self.durable else NOT_DURABLE
        flags = [flag for name, value in settings.items() for flag in ("-c", f"{name}={value}")]
        return Part(
            name="postgres",
            command=(str(self.programs / "postgres"), "-D", str(self.data), *flags),
            account=self.account,
            stop_signal=signal.SIGINT,
            grace_seconds=30.0 if self.durable else 5.0,
            prepare=self.prepare,
            ready=self.accepts,
        )

    def accepts(self) -> bool:
        """Whether the server takes connections."""
        try:
            psycopg.connect(self._conninfo("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def create_database(self, name: str = DATABASE, *, template: str = "template1") -> str:
        """Create a database unless it exists; its SQLAlchemy URL."""
        with psycopg.connect(self._conninfo("postgres"), autocommit=True) as connection:
            exists = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone()
            if not exists:
                # FILE_COPY suits short-lived clones; the default would write the whole template to the log.
                statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY")
                connection.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, its connections included."""
        with psycopg.connect(self._conninfo("postgres"), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def url(self, name: str = DATABASE) -> str:
        """SQLAlchemy URL of one of its databases."""
        return f"postgresql+psycopg://{ROLE}@/{name}?host={self.sockets}"

    def _conninfo(self, database: str) -> str:
        return psycopg.conninfo.make_conninfo(host=str(self.sockets), user=ROLE, dbname=database)

    def _initialise(self) -> None:
        if any(self.data.iterdir()):
            raise Unavailable(f"{self.data} holds no database but is not empty; move its contents away")
        command = [
            str(self.programs / "initdb"), "-D", str(self.data), "-U", ROLE, "--encoding=UTF8",
            "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C",
            "--auth-local=peer", "--auth-host=reject", "--no-instructions",
        ]  # fmt: skip
        if not self.durable:
            command.append("--no-sync")
        result = self.account.run(command)
        if result.returncode != 0:
            # A half-made cluster would be taken for a whole one next time.
            for entry in self.data.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            raise Unavailable(f"initdb failed:\n{result.stderr.strip()}")

    def _write(self, name: str, text: str) -> None:
        path = self.data / name
        path.write_text(text)
        os.chown(path, self.account.uid, self.account.gid)
        path.chmod(0o600)

    def _end_leftover(self) -> None:
        """A server of this directory that outlived its supervisor is shut down; a pid file without one is removed.

        Postgres refuses to start when the process id in the file belongs to any living process of its account, which
        after a reboot may be anything.
        """
        pid_file = self.data / "postmaster.pid"
        if not pid_file.exists():
            return
        try:
            process = psutil.Process(int(pid_file.read_text().splitlines()[0]))
            ours = str(self.data) in process.cmdline()
        except (psutil.NoSuchProcess, ValueError, IndexError):
            ours = False
        if ours:
            process.send_signal(signal.SIGINT)
            process.wait(30)
        else:
            pid_file.unlink()
