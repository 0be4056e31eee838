"""The `whet` command says what is wrong in one sentence, and what to do."""

import http.server
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from services.cli import app
from services.platform import lock, parts
from services.settings import Settings
from worker.main import main as worker_main

COMMANDS = [
    "up", "migrate", "engine", "gateway", "shipper", "console", "worker", "dispatcher", "doctor", "train", "runs",
    "triggers", "rollout", "gate",
    "override", "deployments", "rollback", "promote", "canary", "speculator", "sample", "dataset", "artifact", "user",
    "key", "project",
]  # fmt: skip


def whet(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_help_names_every_command() -> None:
    result = whet("--help")
    assert result.exit_code == 0
    assert [command for command in COMMANDS if f" {command} " not in result.output] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = whet(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("WHET_GATEWAY_PROT", "8000", "unknown setting WHET_GATEWAY_PROT: see the settings table in README.md"),
        ("WHET_SECRET", "changeme", "WHET_SECRET is a placeholder or shorter than 32 characters"),
        ("WHET_GATEWAY_PORT", "70000", "WHET_GATEWAY_PORT: Input should be less than or equal to 65535"),
        ("DATABASE_URL", "mysql://x", "DATABASE_URL must start with postgresql://"),
    ],
)
def test_a_bad_setting_stops_the_start(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv("WHET_HOME", str(home))
    monkeypatch.setenv(name, value)
    result = whet("doctor")
    assert result.exit_code == 1
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_up_says_which_port_is_taken(home: Path, model_directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = whet("up", "--home", str(home), "--model", str(model_directory), "--gateway-port", str(port))
    assert result.exit_code == 1
    assert f"port {port} on 127.0.0.1 is used by another program" in result.stderr
    assert "--gateway-port" in result.stderr


def test_up_refuses_a_home_that_is_in_use(home: Path, model_directory: Path) -> None:
    held = lock.take(home)
    try:
        result = whet("up", "--home", str(home), "--model", str(model_directory))
    finally:
        os.close(held)
    assert result.exit_code == 1
    assert f"Whet already runs in {home}" in result.stderr


def test_up_refuses_a_directory_without_a_model(home: Path, tmp_path: Path) -> None:
    result = whet("up", "--home", str(home), "--model", str(tmp_path))
    assert result.exit_code == 1
    assert "config.json is missing" in result.stderr


def test_up_refuses_weights_that_are_not_safetensors(home: Path, model_directory: Path) -> None:
    (model_directory / "model.safetensors").rename(model_directory / "pytorch_model.bin")
    result = whet("up", "--home", str(home), "--model", str(model_directory))
    assert result.exit_code == 1
    assert "no weights as safetensors" in result.stderr


def test_up_says_when_a_model_is_nowhere(home: Path) -> None:
    result = whet("up", "--home", str(home), "--model", "nobody/no-such-model")
    assert result.exit_code == 1
    assert "'nobody/no-such-model' is neither `starter`, nor a directory, nor could it be downloaded" in result.stderr


def test_commands_without_credentials_say_where_they_come_from(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHET_HOME", str(home))
    result = whet("runs")
    assert result.exit_code == 1
    assert "Start the platform with `whet up`, or set WHET_API_KEY" in result.stderr


def test_commands_say_that_nothing_answers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_later:
        port = closed_later.getsockname()[1]
    monkeypatch.setenv("WHET_HOME", str(home))
    monkeypatch.setenv("WHET_API_KEY", "wh_x")
    monkeypatch.setenv("WHET_URL", f"http://127.0.0.1:{port}")
    result = whet("deployments", "entities")
    assert result.exit_code == 1
    assert f"nothing answers at http://127.0.0.1:{port}: start the platform with `whet up`" in result.stderr


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every request with the status in its path's project name."""

    def do_GET(self) -> None:
        status = int(self.path.split("/")[3])
        body = json.dumps({"error": {"message": f"said {status}", "type": "x", "param": None, "code": None}}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, "refused the key: said 401. Set WHET_API_KEY"),
        (403, "the key may not do this: said 403"),
        (404, "said 404"),
    ],
)
def test_the_platforms_refusals_are_passed_on(
    refusing: str, home: Path, monkeypatch: pytest.MonkeyPatch, status: int, sentence: str
) -> None:
    (home / "credentials.json").write_text(json.dumps({"console_url": refusing, "admin_key": "wh_x"}))
    monkeypatch.setenv("WHET_HOME", str(home))
    result = whet("deployments", str(status))
    assert result.exit_code == 1
    assert sentence in result.stderr.replace("\n", " ")


def test_train_wants_parameters_with_values(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHET_HOME", str(home))
    monkeypatch.setenv("WHET_API_KEY", "wh_x")
    result = whet("train", "entities", "--param", "epochs")
    assert result.exit_code == 1
    assert "--param wants name=value, not 'epochs'" in result.stderr


def test_train_sends_its_kind_parameters_and_sweep(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, dict[str, Any]]] = []

    def post(_client: object, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        sent.append((path, body or {}))
        return {"id": "a-run"}

    monkeypatch.setenv("WHET_HOME", str(home))
    monkeypatch.setenv("WHET_API_KEY", "wh_x")
    monkeypatch.setattr("services.cli_client.AdminClient.post", post)

    result = whet("train", "entities", "--kind", "dpo", "--set", "lr=1e-3", "--sweep", "4", "--no-follow")

    assert result.exit_code == 0, result.stderr
    assert sent == [("/api/p/entities/runs", {"params": {"lr": 1e-3, "sweep": 4}, "dataset": "golden", "kind": "dpo"})]


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").touch()
    return made


def test_trainings_have_a_worker_of_their_own_unless_another_machine_takes_them(home: Path) -> None:
    names = {
        here: [part.name for part in parts.application(Settings(home=home, trainer=here))] for here in (True, False)
    }
    assert names[True] == [*names[False], "trainer"]
    assert parts.commands(Settings(home=home))["trainer"][-1] == "--queue=train"
    with pytest.raises(SystemExit):
        worker_main(["--queue", "gpu"])
