"""Golden data through the admin API and the `whet dataset` commands: prove, compare, export, import."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import DatasetDict
from starlette.testclient import TestClient
from typer.testing import CliRunner, Result

from services import cli, cli_client
from services.settings import Settings
from services.store import datasets, keys, revisions
from services.store.base import Sessions
from services.store.models import Project, Revision
from services.web import create_app
from tests.console import seed
from tests.console.conftest import PEPPER

Typed = Callable[..., Result]


@pytest.fixture
def built(sessions: Sessions, lived_in: Project) -> list[Revision]:
    with sessions() as session:
        return revisions.list_(session, datasets.get(session, lived_in.id, "golden").id)


@pytest.fixture
def run(console_settings: Settings, sessions: Sessions, admin_key: str, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """The command as typed, against the application in this process."""
    monkeypatch.setenv("WHET_API_KEY", admin_key)
    app = create_app(console_settings, sessions)
    headers = {"authorization": f"Bearer {admin_key}"}
    monkeypatch.setattr(cli_client.httpx, "Client", lambda **_: TestClient(app, headers=headers))

    def typed(*words: str) -> Result:
        return CliRunner().invoke(cli.app, ["dataset", *words])

    return typed


def test_rebuild_proves_a_revision_and_tells_when_it_was_edited(
    run: Typed, built: list[Revision], sessions: Sessions
) -> None:
    proved = run("rebuild", built[0].digest[:10])
    assert proved.exit_code == 0, proved.output
    assert f"rebuilt  {built[0].digest}" in proved.output
    with sessions.begin() as session:
        revisions.members(session, built[0].id, limit=1)[0].example.completion = "edited"
    edited = run("rebuild", built[0].digest)
    assert edited.exit_code == 1
    assert "is not what was built" in edited.output


def test_diff_says_what_changed_and_why(run: Typed, built: list[Revision]) -> None:
    told = run("diff", built[1].digest, built[0].digest)
    assert told.exit_code == 0, told.output
    assert "newly judged" in told.output
    assert run("diff", "0" * 64, built[0].digest).exit_code == 1


def test_export_writes_jsonl_parquet_and_a_manifest(run: Typed, built: list[Revision], tmp_path: Path) -> None:
    done = run("export", built[0].digest, "--kind", "unpaired", "--to", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "held_out.jsonl", "held_out.parquet", "manifest.json", "train.jsonl", "train.parquet",
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["digest"], manifest["kind"]) == (built[0].digest, "unpaired")
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().split("\n") if line]
    assert manifest["rows"]["train"] == len(lines)


def test_export_pushes_to_the_hub_with_a_token_and_refuses_without(
    run: Typed, built: list[Revision], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[dict[str, Any]] = []

    def push(self: DatasetDict, repo_id: str, **named: Any) -> None:  # noqa: ANN401 - as datasets has it
        pushed.append({"repository": repo_id, "rows": {split: len(rows) for split, rows in self.items()}, **named})

    monkeypatch.setattr(DatasetDict, "push_to_hub", push)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    words = ("export", built[0].digest, "--push-to-hub", "acme/golden", "--to")
    refused = run(*words, str(tmp_path / "out"))
    assert refused.exit_code == 1
    assert "set HF_TOKEN" in refused.output + str(refused.exception)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = run(*words, str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["rows"]
    [sent] = pushed
    assert sent == {
        "repository": "acme/golden", "rows": {split: count for split, count in counts.items() if count},
        "private": True, "token": "hf_secret", "commit_message": f"Revision {built[0].digest}",
    }  # fmt: skip
    wrong = run("export", built[0].digest, "--push-to-hub", "not a name", "--to", str(tmp_path / "other"))
    assert "OWNER/NAME" in wrong.output + str(wrong.exception)

    def refuse(self: DatasetDict, repo_id: str, **named: Any) -> None:  # noqa: ANN401
        raise OSError("no way there")

    monkeypatch.setattr(DatasetDict, "push_to_hub", refuse)
    lost = run(*words, str(tmp_path / "third"))
    assert "the hub did not take it: no way there" in lost.output + str(lost.exception)
    assert (tmp_path / "third" / "train.jsonl").exists()


def test_import_maps_columns_tries_first_and_keeps_nothing_of_a_bad_file(
    run: Typed, lived_in: Project, tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("wanted,said\ntwo plus two,four\nthree plus three,\n")
    words = ("import", lived_in.slug, str(file), "--map", "prompt=wanted", "--map", "completion=said")
    tried, refused = run(*words, "--dry-run"), run(*words)
    file.write_text("wanted,said\ntwo plus two,four\nthree plus three,six\n")
    done, again = run(*words), run(*words)
    assert (tried.exit_code, refused.exit_code) == (1, 1)
    assert "row 2 has an empty completion" in tried.output
    assert "nothing was imported" in refused.output
    assert "2 examples imported" in done.output
    assert "2 of them there already" in again.output


def test_a_key_of_another_project_finds_no_revision(
    console_settings: Settings, sessions: Sessions, built: list[Revision]
) -> None:
    with sessions.begin() as session:
        other = seed.project(session, "other", "Other")
        key = keys.create(session, pepper=PEPPER.encode(), name="o", scopes=["train"], project_id=other.id)[1]
    client = TestClient(create_app(console_settings, sessions), headers={"authorization": f"Bearer {key}"})
    digest = built[0].digest
    for path in (f"/api/revisions/{digest}", f"/api/revisions/{digest}/rows", f"/api/revisions/{digest}/diff/{digest}"):
        assert client.get(path).status_code == 404
    assert client.post(f"/api/revisions/{digest}/rebuild").status_code == 404
