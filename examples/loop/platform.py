"""`whet up` in a home of its own, as a child process: what the demo and the loop test run against."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 180
STOP_SECONDS = 30


class PlatformError(RuntimeError):
    """The platform did not start or stop; carries the end of its output."""


@dataclass(frozen=True, slots=True)
class Platform:
    """A running platform. `admin` and `app` are API keys, `log` is the supervisor's own output."""

    home: Path
    gateway_url: str
    console_url: str
    admin_key: str
    app_key: str
    log: Path

    def admin(self) -> httpx.Client:
        """A client of the admin API; the caller closes it."""
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        return httpx.Client(base_url=self.console_url, headers=headers, timeout=30)


@contextmanager
def platform(model: str = "starter", **environment: str) -> Iterator[Platform]:
    """Start the platform in a temporary home on free ports; stop it and remove the home at the end."""
    home = Path(tempfile.mkdtemp(prefix="whet-"))
    log = home / "up.log"
    command = [str(Path(sys.executable).parent / "whet"), "up", "--home", str(home), "--model", model]
    command += ["--gateway-port", "0", "--console-port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=os.environ | {"WHET_HOME": str(home)} | environment, start_new_session=True,
        )  # fmt: skip
    try:
        yield _wait_ready(home, log, process)
    finally:
        _stop(process, log)
        shutil.rmtree(home, ignore_errors=True)


def _wait_ready(home: Path, log: Path, process: "subprocess.Popen[bytes]") -> Platform:
    credentials = home / "credentials.json"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PlatformError(f"`whet up` ended with {process.returncode}:\n{_tail(log)}")
        if credentials.exists():
            known = json.loads(credentials.read_text())
            if _answers(known["gateway_url"]) and _answers(known["console_url"]):
                return Platform(
                    home, known["gateway_url"], known["console_url"], known["admin_key"], known["app_key"], log
                )
        time.sleep(0.2)
    raise PlatformError(f"`whet up` was not ready after {START_SECONDS} s:\n{_tail(log)}")


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def _stop(process: "subprocess.Popen[bytes]", log: Path) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise PlatformError(f"`whet up` did not stop within {STOP_SECONDS} s:\n{_tail(log)}") from None


def _tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
