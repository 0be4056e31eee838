"""Starting the gateway's neighbours as processes, the way the supervisor does, and talking to them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from openai import OpenAI
from sqlalchemy import update

from services.platform.accounts import server_account
from services.platform.paths import prepare_home, temporary_home
from services.platform.postgres import PostgresServer
from services.settings import Settings
from services.store import interactions, keys, projects
from services.store.base import Sessions, make_sessions, uuid7
from services.store.models import SCOPES, Artifact, Deployment
from tests.gateway.tiny_model import write_model, write_tokenizer

START_SECONDS = 90.0
TEMPLATE = "whet_template"


class Process:
    """A child process with its stderr in a file. Stopped by its own id only."""

    def __init__(self, module: str, *arguments: str, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("ab") as stream:
            self._child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                env=environment,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def kill(self) -> int:
        """kill -9, and wait until it is gone. Returns its exit status."""
        if self.alive:
            self._child.send_signal(signal.SIGKILL)
        return self._child.wait(timeout=10)

    def stop(self) -> None:
        """Ask it to end."""
        if self.alive:
            self._child.terminate()
            try:
                self._child.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.kill()

    def wait(self, seconds: float) -> int:
        """Its exit status, once it has ended by itself."""
        return self._child.wait(timeout=seconds)


def eventually(condition: Callable[[], object], seconds: float = 30.0, every: float = 0.02) -> None:
    """Return once `condition` holds; fail the test when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s: {condition}"
        time.sleep(every)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class World:
    """A home with a database, two projects and their keys; engine, gateway and shipper as processes on it."""

    settings: Settings
    sessions: Sessions
    environment: dict[str, str]
    real_engine: bool
    step_ms: float
    keys: dict[str, str] = field(default_factory=dict)
    projects: dict[str, UUID] = field(default_factory=dict)
    processes: list[Process] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.gateway_port}"

    def start(self, module: str, *arguments: str, **environment: str) -> Process:
        log = self.settings.home / "logs" / f"{module.rpartition('.')[2]}.log"
        process = Process(module, *arguments, log=log, environment=self.environment | environment)
        self.processes.append(process)
        return process

    def start_engine(self, *fake_options: str) -> Process:
        """The real one, or the fake."""
        settings = self.settings
        if not self.real_engine:
            return self.start(
                "tests.gateway.fake_engine", settings.engine_socket, f"--step-ms={self.step_ms}", *fake_options
            )
        options = {"model": settings.model_path, "socket": settings.engine_socket, "artifacts": settings.artifacts,
                   "precision": settings.precision, "threads": 1, "suffix-tokens": settings.suffix_tokens}  # fmt: skip
        return self.start("engine.process", *(f"--{name}={value}" for name, value in options.items()))

    def start_gateway(self, **environment: str) -> Process:
        """Up and serving when this returns."""
        gateway = self.start("services.gateway.main", **environment)
        eventually(lambda: self._serves(gateway), START_SECONDS)
        return gateway

    def start_shipper(self, **environment: str) -> Process:
        return self.start("services.gateway.log_shipper", **environment)

    def _serves(self, gateway: Process) -> bool:
        assert gateway.alive, gateway.log.read_text()[-3000:]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        return False

    def headers(self, key: str = "app") -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[key]}"}

    def post(
        self,
        path: str,
        body: object = None,
        *,
        key: str = "app",
        content: bytes | Iterator[bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """POST `body` as JSON, or `content` as it is."""
        content = json.dumps(body) if content is None else content
        return httpx.post(self.url + path, headers=self.headers(key) | (headers or {}), content=content, timeout=30)

    def get(self, path: str, *, key: str = "app") -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers(key), timeout=30)

    def openai(self, key: str = "app") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[key], max_retries=0, timeout=30)

    def add_adapter(self, project: str, digest: str, *, works: bool = True) -> str:
        """An artefact row with its directory, which the fake engine loads if it `works`."""
        directory = self.settings.artifacts / digest
        directory.mkdir(parents=True, exist_ok=True)
        if works:
            (directory / "adapter.ok").touch()
        with self.sessions.begin() as session:
            session.add(Artifact(digest=digest, kind="adapter", project_id=self.projects[project], base_digest="b",
                                 manifest={}))  # fmt: skip
        return digest

    def deploy(self, project: str, active: str | None, last_good: str | None = None) -> None:
        """Make a project serve something, and wait until the gateway knows."""
        with self.sessions.begin() as session:
            session.execute(
                update(Deployment).where(Deployment.project_id == self.projects[project])
                .values(active_digest=active, last_good_digest=last_good, generation=Deployment.generation + 1)
            )  # fmt: skip
        eventually(lambda: self.get(f"/v1/models/{project}").json()["whet"]["adapter"] == active)

    def interaction(self, interaction_id: str, seconds: float = 30.0) -> interactions.Logged:
        """What the log says of an answer, once it has landed."""
        bare = UUID(interaction_id.removeprefix("chatcmpl-").removeprefix("cmpl-"))
        found: dict[UUID, interactions.Logged] = {}

        def landed() -> bool:
            with self.sessions.begin() as session:
                found.update(interactions.get_many(session, [bare]))
            return bare in found

        eventually(landed, seconds)
        return found[bare]


@contextlib.contextmanager
def make_world(
    postgres: PostgresServer, *, real_engine: bool = False, step_ms: float = 1.0, **environment: str
) -> Iterator[World]:
    """A fresh world with nothing started yet; afterwards everything it started is gone, its database too."""
    name = f"test_{uuid7().hex}"
    url = postgres.create_database(name, template=TEMPLATE)
    sessions = make_sessions(url)
    with temporary_home("whet-test-") as home:
        prepare_home(home, home / "run", server_account())
        write_model(home / "model") if real_engine else write_tokenizer(home / "model")
        environment = _inherited() | {
            "WHET_HOME": str(home), "DATABASE_URL": url, "WHET_MODEL": str(home / "model"),
            "WHET_GATEWAY_PORT": str(free_port()), "WHET_PRECISION": "fp32", **environment,
        }  # fmt: skip
        world = World(_settings(environment), sessions, environment, real_engine, step_ms)
        try:
            _populate(world)
            yield world
        finally:
            for process in reversed(world.processes):
                process.stop()
            sessions.kw["bind"].dispose()
            postgres.drop_database(name)


def _inherited() -> dict[str, str]:
    """A developer's own settings must not reach the processes under test."""
    return {
        name: value for name, value in os.environ.items()
        if not name.startswith("WHET_") and name not in {"DATABASE_URL", "REDIS_URL"}
    }  # fmt: skip


def _settings(environment: dict[str, str]) -> Settings:
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(environment):
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        return Settings()


def _populate(world: World) -> None:
    pepper = keys.load_pepper(world.settings)
    with world.sessions.begin() as session:
        for slug in ("entities", "other"):
            world.projects[slug] = projects.create(session, slug).id
        wanted: dict[str, tuple[list[str], str | None]] = {
            "app": (["infer", "feedback"], "entities"),
            "other": (["infer", "feedback"], "other"),
            "everywhere": (["infer", "feedback"], None),
            **{scope: ([scope], None if scope == "admin" else "entities") for scope in SCOPES},
        }
        for name, (scopes, slug) in wanted.items():
            project_id = world.projects[slug] if slug else None
            world.keys[name] = keys.create(
                session, pepper=pepper, name=name, scopes=scopes, project_id=project_id
            )[1]  # fmt: skip
