"""The embedded Redis: a doorbell for Celery, so nothing in it is kept on disk. No TCP, one private Unix socket."""

import os
import socket
from pathlib import Path

from services.platform.accounts import Account
from services.platform.binaries import redis_program
from services.platform.paths import private_directory
from services.platform.process import Part

SOCKET = "redis.sock"


class RedisServer:
    """One Redis with its own configuration file in `directory`."""

    def __init__(self, directory: Path, sockets: Path, account: Account) -> None:
        self.directory = directory
        self.socket = sockets / SOCKET
        self.account = account
        self.program = redis_program(account)

    def prepare(self) -> None:
        """Write the configuration and remove a dead server's socket."""
        private_directory(self.directory, self.account)
        path = self.directory / "redis.conf"
        path.write_text(self.configuration())
        os.chown(path, self.account.uid, self.account.gid)
        if self.socket.exists() and not self.accepts():
            self.socket.unlink()

    def configuration(self) -> str:
        """`port 0` switches TCP off."""
        lines = {
            "port": "0",
            "unixsocket": f'"{self.socket}"',
            "unixsocketperm": "700",
            "dir": f'"{self.directory}"',
            "save": '""',
            "appendonly": "no",
            "daemonize": "no",
            "databases": "16",
            "maxmemory": "256mb",
            "maxmemory-policy": "noeviction",
        }
        return "".join(f"{name} {value}\n" for name, value in lines.items())

    def part(self) -> Part:
        """How the supervisor runs it."""
        return Part(
            name="redis",
            command=(str(self.program), str(self.directory / "redis.conf")),
            account=self.account,
            grace_seconds=5.0,
            prepare=self.prepare,
            ready=self.accepts,
        )

    def accepts(self) -> bool:
        """Whether it answers."""
        try:
            return self.command("PING") == "+PONG"
        except OSError:
            return False

    def command(self, word: str) -> str:
        """Send a one-word command and return the reply's line. Spoken by hand: it is shorter than loading a client."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(2)
            client.connect(str(self.socket))
            client.sendall(f"{word}\r\n".encode())
            return client.recv(1024).decode().strip()

    def url(self, database: int = 0) -> str:
        """As Celery wants it."""
        return f"redis+socket://{self.socket}?virtual_host={database}"
