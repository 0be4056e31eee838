"""A tiny model, an adapter really trained to say "yes", and a real engine that serves both."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest

from engine.digest import base_digest
from engine.sync_client import SyncEngineClient
from engine.text.tokenizer import Tokenizer
from services.platform.paths import temporary_home
from services.settings import Settings
from services.store.base import Sessions
from services.store.models import Example
from tests.curation.world import World, make_world
from tests.training.tiny import make_model
from worker.training import artifact, child
from worker.training.rows import make_rows
from worker.training.spec import ReferenceRow, Spec

ROOT = Path(__file__).parents[2]


@dataclass
class Trained:
    """Where the engine lives and what it can load."""

    home: Path
    model: Path
    adapter: artifact.Built


def train_yes(home: Path, model: Path) -> artifact.Built:
    """An adapter that answers "yes" to everything, made by the real trainer process."""
    tokenizer = Tokenizer.load(model)
    examples = [
        Example(messages=[{"role": "user", "content": f"say number {index}"}], completion="yes") for index in range(32)
    ]
    rows = make_rows(tokenizer, examples)
    work = home / "work"
    work.mkdir()
    lines = [f'{{"input_ids": {row.input_ids}, "labels": {row.labels}}}\n' for row in rows]
    (work / "rows.jsonl").write_text("".join(lines))
    base = base_digest(model)
    spec = Spec(
        model=str(model), base=base, rows_file=str(work / "rows.jsonl"), out=str(work / "adapter"), parent=os.getpid(),
        device="cpu", rank=8, alpha=16, lr=0.02, epochs=20, max_steps=0, batch_size=8, warmup=0.1, seed=0,
        targets=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        reference=[ReferenceRow(example.messages, row.prompt) for example, row in zip(examples, rows, strict=True)],
    )  # fmt: skip
    assert child.run(spec, work, on_report=lambda _report: None, stop=lambda: False)
    built = artifact.describe(work / "adapter", base=base, project=UUID(int=1), run=UUID(int=2), revision="", params={})
    artifact.publish(work / "adapter", built, home / "artifacts")
    return built


@pytest.fixture(scope="session")
def trained() -> Iterator[Trained]:
    """A home with model, adapter and a running engine."""
    with temporary_home("whet-test-") as home:
        (home / "run").mkdir()
        model = make_model(home / "model")
        adapter = train_yes(home, model)
        command = [
            sys.executable, "-m", "engine.process", "--model", str(model), "--socket",
            f"ipc://{home / 'run' / 'engine.sock'}", "--artifacts", str(home / "artifacts"), "--precision", "fp32",
            "--threads", "1", "--adapter-slots", "4", "--kv-tokens", "8192", "--adapter-rank", "8",
        ]  # fmt: skip
        with (home / "engine.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            with SyncEngineClient(f"ipc://{home / 'run' / 'engine.sock'}", connect_seconds=60) as client:
                client.status()
            yield Trained(home, model, adapter)
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def engine_settings(trained: Trained, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings on the session's engine and the test's own database."""
    monkeypatch.setenv("WHET_HOME", str(trained.home))
    monkeypatch.setenv("WHET_MODEL", str(trained.model))
    monkeypatch.setenv("DATABASE_URL", database_url)
    return Settings()


@pytest.fixture
def world(sessions: Sessions) -> World:
    """A project with two reviewers and nothing logged."""
    return make_world(sessions)
