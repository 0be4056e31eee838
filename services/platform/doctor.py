"""`whet doctor`: what runs and what does not, in one screen."""

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
from rich.console import Console
from rich.table import Table

from services.platform import lock, parts, up
from services.platform.paths import LONGEST_SOCKET_PATH, SOCKET_NAMES
from services.settings import Settings

LOW_DISK_BYTES = 2 * 1024**3
BUILD_SECONDS = 300
DISTRIBUTIONS = ("torch", "transformers", "peft", "trl", "sqlalchemy", "celery", "fastapi", "pyzmq")


@dataclass(frozen=True)
class Finding:
    """One line. `good` None is for facts that are neither right nor wrong."""

    subject: str
    text: str
    good: bool | None = None


def examine(settings: Settings, console: Console) -> bool:
    """Print everything found; whether all is well."""
    findings = [finding for look in LOOKS for finding in look(settings)]
    table = Table(box=None, show_header=False, padding=(0, 1))
    for finding in findings:
        sign = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: "[dim]·[/dim]"}[finding.good]
        table.add_row(sign, finding.subject, finding.text)
    console.print(table)
    bad = [finding.subject for finding in findings if finding.good is False]
    console.print(f"\n[red]Wrong: {', '.join(bad)}[/red]" if bad else "\n[green]All is well.[/green]")
    return not bad


def home(settings: Settings) -> list[Finding]:
    """The data directory and its disk."""
    path = settings.home
    if not path.is_dir():
        return [Finding("home", f"{path} does not exist: `whet up` makes it", False)]
    free = shutil.disk_usage(path).free
    return [
        Finding("home", str(path), os.access(path, os.W_OK)),
        Finding("disk", f"{free / 1024**3:.1f} GiB free", free > LOW_DISK_BYTES),
    ]


def running(settings: Settings) -> list[Finding]:
    """The supervisor and its parts."""
    if not lock.held(settings.home):
        return [Finding("platform", "not running: start it with `whet up`", False)]
    state = read_state(settings)
    if state is None:
        return [Finding("platform", f"process {lock.holder(settings.home)} is starting or stopping")]
    findings = [Finding("platform", f"process {state['supervisor']}", psutil.pid_exists(state["supervisor"]))]
    for name, part in state["parts"].items():
        alive = part["guard"] is not None and psutil.pid_exists(part["guard"])
        text = f"process {part['guard']}" if alive else f"down; see {settings.home / 'logs' / name}.log"
        findings.append(Finding(f"  {name}", f"{text}{_restarted(part['restarts'])}", alive))
    findings.append(Finding("  gateway at", state["gateway_url"]))
    findings.append(Finding("  console at", state["console_url"]))
    return findings


def read_state(settings: Settings) -> dict[str, Any] | None:
    """What a running platform published; None before and after."""
    try:
        found: dict[str, Any] = json.loads(up.state_file(settings).read_text())
    except FileNotFoundError:
        return None
    return found


def _restarted(times: int) -> str:
    return "" if times == 0 else f", restarted {'once' if times == 1 else f'{times} times'}"


def database(settings: Settings) -> list[Finding]:
    """Whether Postgres answers, which version, and whether the tables are there."""
    conninfo = settings.database_dsn.replace("postgresql+psycopg://", "postgresql://")
    try:
        with psycopg.connect(conninfo, connect_timeout=3) as connection:
            version = connection.execute("SHOW server_version").fetchone()
            tables = connection.execute("SELECT to_regclass('alembic_version') IS NOT NULL").fetchone()
            vector = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
    except psycopg.OperationalError as error:
        return [Finding("postgres", str(error).splitlines()[0], False)]
    migrated = bool(tables and tables[0])
    text = f"{version[0] if version else '?'}, pgvector {vector[0] if vector else 'missing'}"
    return [Finding("postgres", text if migrated else f"{text}, no tables: run `whet migrate`", migrated)]


def doorbell(settings: Settings) -> list[Finding]:
    """Whether Redis answers."""
    from redis import Redis, RedisError

    url = settings.redis_url
    if url.startswith("redis+socket://") or not url:
        path = url.removeprefix("redis+socket://").partition("?")[0] or settings.sockets / "redis.sock"
        url = f"unix://{path}"
    try:
        with Redis.from_url(url, socket_connect_timeout=3, socket_timeout=3) as client:
            version = client.info("server")["redis_version"]
    except (RedisError, OSError) as error:
        return [Finding("redis", str(error), False)]
    return [Finding("redis", version, True)]


def sockets(settings: Settings) -> list[Finding]:
    """The private directory, the length of its paths, and what listens there."""
    directory = settings.sockets
    if not directory.is_dir():
        return [Finding("sockets", f"{directory} does not exist", False)]
    longest = max(len(os.fsencode(directory / name)) for name in SOCKET_NAMES)
    private = directory.stat().st_mode & 0o077 == 0
    said = f"{directory}, {'private' if private else 'OPEN TO OTHERS'}, longest path {longest} bytes"
    findings = [Finding("sockets", said, private and longest <= LONGEST_SOCKET_PATH)]
    engine = Path(settings.engine_socket.removeprefix("ipc://"))
    listening = _listens(engine)
    return [*findings, Finding("engine socket", f"{engine} {'listens' if listening else 'is silent'}", listening)]


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def threads(settings: Settings) -> list[Finding]:
    """Cores, and how the torch processes share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    engine = settings.engine_threads or "chosen by model size"
    text = f"{cores} cores; engine {engine}; trainer 1 at nice {parts.WORKER_NICE}; OMP_WAIT_POLICY=PASSIVE for all"
    return [Finding("threads", text)]


def cpu_path(_settings: Settings) -> list[Finding]:
    """Whether the engine's C++ can be had; built now when it was not."""
    command = [sys.executable, "-m", "engine.native.build"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS)
    said = (result.stdout.strip() or result.stderr.strip() or "no answer").splitlines()[-1]
    text = said.removeprefix("native CPU path: ")
    # Without it torch's kernels serve: slower, not wrong.
    return [Finding("CPU path", text, True if result.returncode == 0 else None)]


def gpu(_settings: Settings) -> list[Finding]:
    """What the driver's own tool says; loading torch to ask would take seconds."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [Finding("GPU", "none")]
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False, timeout=10)
    lines = result.stdout.strip().splitlines()
    return [Finding("GPU", line) for line in lines] if result.returncode == 0 and lines else [Finding("GPU", "none")]


def versions(_settings: Settings) -> list[Finding]:
    """Python and the libraries whose versions matter most."""
    listed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in DISTRIBUTIONS)
    whet = importlib.metadata.version("whet")
    return [Finding("versions", f"whet {whet}, Python {platform.python_version()}, {listed}")]


def model(settings: Settings) -> list[Finding]:
    """Where the files of the model are that the platform runs, or would run."""
    state = read_state(settings) if lock.held(settings.home) else None
    chosen = settings.model_copy(update={"model": state["model"]}) if state else settings
    try:
        path = chosen.model_path
    except ValueError as error:
        return [Finding("model", str(error), False)]
    return [Finding("model", f"{chosen.model} in {path}", (path / "config.json").is_file())]


LOOKS: tuple[Callable[[Settings], list[Finding]], ...] = (
    home, running, database, doorbell, sockets, model, threads, cpu_path, gpu, versions,
)  # fmt: skip
