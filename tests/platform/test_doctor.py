"""The doctor tells sound from broken."""

import io
import socket
from pathlib import Path

import pytest
from rich.console import Console

from services.platform import doctor
from services.settings import Settings


def text_of(findings: list[doctor.Finding]) -> str:
    return "\n".join(f"{finding.good} {finding.subject} {finding.text}" for finding in findings)


def test_servers_that_answer_are_reported_with_their_versions(settings: Settings) -> None:
    said = text_of(doctor.database(settings) + doctor.doorbell(settings))
    assert "True postgres 18" in said
    assert "pgvector 0." in said
    assert "True redis" in said


def test_servers_that_are_away_are_wrong(settings: Settings) -> None:
    away = settings.model_copy(update={"database_url": "", "redis_url": ""})
    findings = doctor.database(away) + doctor.doorbell(away)
    assert [finding.good for finding in findings] == [False, False]


def test_a_platform_that_is_not_running_makes_the_whole_unhealthy(settings: Settings) -> None:
    output = io.StringIO()
    healthy = doctor.examine(settings, Console(file=output, width=200))
    assert not healthy
    assert "not running: start it with `whet up`" in output.getvalue()
    assert "Wrong: " in output.getvalue()
    assert "cores" in output.getvalue()


def test_an_open_socket_directory_is_reported(settings: Settings) -> None:
    settings.sockets.chmod(0o755)
    assert "False sockets" in text_of(doctor.sockets(settings))
    assert "OPEN TO OTHERS" in text_of(doctor.sockets(settings))


def test_a_listening_engine_is_seen(settings: Settings) -> None:
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(settings.engine_socket.removeprefix("ipc://"))
        assert "is silent" in text_of(doctor.sockets(settings))
        engine.listen()
        assert "True engine socket" in text_of(doctor.sockets(settings))


def test_a_full_disk_is_wrong(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOW_DISK_BYTES", 1 << 60)
    assert "False disk" in text_of(doctor.home(settings))


def test_the_engines_cpu_path_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "True CPU path ready (" in text_of(doctor.cpu_path(settings))
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "None CPU path not available: /bin/false could not build" in text_of(doctor.cpu_path(settings))
