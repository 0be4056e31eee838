"""`whet up`: the whole platform on this machine, from an empty directory to a sign-in link."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType

from services.errors import Unavailable
from services.platform import lock
from services.platform.accounts import Account, current_account, server_account
from services.platform.parts import application, embedded_postgres, embedded_redis, shared_environment
from services.platform.paths import prepare_home
from services.platform.ports import reserve
from services.platform.process import Part, tail
from services.platform.screen import Screen
from services.platform.supervisor import Supervisor
from services.settings import Settings

STATE = "platform.json"
NOTES = {
    "postgres": "the truth",
    "redis": "the doorbell",
    "migrations": "tables, brought up to date",
    "bootstrap": "projects, keys, people",
    "engine": "runs the model",
    "gateway": "the OpenAI API",
    "shipper": "log to Postgres",
    "console": "review and training pages",
    "dispatcher": "schedules",
    "worker": "learns",
    "trainer": "trains, one run at a time",
}


def run(settings: Settings, screen: Screen) -> None:
    """Start everything, keep it running, and stop it on SIGINT or SIGTERM. Raises WhetError when it cannot start."""
    account = current_account() if settings.database_url and settings.redis_url else server_account()
    prepare_home(settings.home, settings.sockets, account)
    held = lock.take(settings.home)
    ports = [
        reserve(settings.host, settings.gateway_port, "--gateway-port"),
        reserve(settings.host, settings.console_port, "--console-port"),
    ]
    gateway_port, console_port = (port.getsockname()[1] for port in ports)
    settings = settings.model_copy(update={"gateway_port": gateway_port, "console_port": console_port})
    try:
        Platform(settings, account, screen, held).run(_stop_on_signals())
    finally:
        for port in ports:
            port.close()
        os.close(held)


class Platform:
    """One run of the platform in its home."""

    def __init__(self, settings: Settings, account: Account, screen: Screen, held: int) -> None:
        self._settings = settings
        self._account = account
        self._screen = screen
        self._logs = settings.home / "logs"
        self._supervisor = Supervisor(
            self._logs, settings.sockets / STATE, screen.note, keep_open=(held,),
            model=settings.model, gateway_url=settings.gateway_url, console_url=settings.console_url,
        )  # fmt: skip

    def run(self, stop: threading.Event) -> None:
        """Start, watch, stop; whatever happens, nothing is left running."""
        try:
            facts = self._start(stop)
            if facts is not None:
                self._screen.ready(facts, self._logs)
                self._supervisor.watch(stop)
        finally:
            # The terminal may be gone by now; what runs must stop all the same.
            try:
                self._screen.note("stopping")
            finally:
                self._supervisor.shut_down()
            self._screen.note("stopped")

    def _start(self, stop: threading.Event) -> dict[str, object] | None:
        """What to show on the first screen, or None when it was told to stop before everything ran."""
        with self._screen.starting(f"{self._settings.home} · model {self._settings.model}"):
            self._start_servers(stop)
            if stop.is_set():
                return None
            self._step("migrations", "migrations.run")
            facts: dict[str, object] = json.loads(self._step("bootstrap", "services.bootstrap"))
            self._start_parts(application(self._settings), stop)
        return None if stop.is_set() else facts

    def _start_servers(self, stop: threading.Event) -> None:
        postgres = embedded_postgres(self._settings, self._account)
        redis = embedded_redis(self._settings, self._account)
        self._start_parts([server.part() for server in (postgres, redis) if server], stop)
        if postgres and not stop.is_set():
            postgres.create_database()

    def _start_parts(self, parts: list[Part], stop: threading.Event) -> None:
        for part in parts:
            self._screen.begin(part.name, NOTES.get(part.name, ""))
            self._supervisor.start(part)
        self._supervisor.wait_ready([part.name for part in parts], self._screen.done, stop)

    def _step(self, name: str, module: str) -> str:
        """Run a module to its end and return what it printed. Raises Unavailable with its last words."""
        self._screen.begin(name, NOTES[name])
        log = self._logs / f"{name}.log"
        with log.open("wb") as errors:
            result = subprocess.run(
                [sys.executable, "-m", module], env={**os.environ, **shared_environment(self._settings)}, cwd="/",
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, check=False,
            )  # fmt: skip
        if result.returncode != 0:
            raise Unavailable(f"{name} failed with exit code {result.returncode}\n{tail(log)}")
        self._screen.done(name)
        return result.stdout


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()

    def set_stop(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # `nohup whet up` means to outlive its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, set_stop)
    return stop


def state_file(settings: Settings) -> Path:
    """Where a running platform says what it runs."""
    return settings.sockets / STATE
