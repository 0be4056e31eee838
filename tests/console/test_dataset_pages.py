"""Dataset pages over HTTP: what a revision shows, exports, and imports that leave nothing behind when a row is bad."""

import asyncio
import contextlib
import json
from collections.abc import Generator
from typing import Any

import pytest
from sqlalchemy import func, select
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient
from starlette.types import Message

from services.app import Streamed
from services.store import datasets, imports, revisions
from services.store.base import Sessions
from services.store.models import AuditEvent, DatasetImport, Example, Project, Revision
from tests.console.conftest import SignIn

GOOD = '{"question": "two plus two", "answer": "four"}\n{"question": "three plus three", "answer": "six"}\n'


def newest(sessions: Sessions, project: Project) -> Revision:
    with sessions() as session:
        found = revisions.latest(session, datasets.get(session, project.id, "golden").id)
        assert found is not None
        return found


@pytest.fixture
def lead(sign_in: SignIn, lived_in: Project) -> TestClient:
    return sign_in("lead@example.org", "lead", lived_in.id)


def test_a_revision_shows_its_lineage_its_mask_and_what_changed(
    lead: TestClient, lived_in: Project, sessions: Sessions
) -> None:
    revision = newest(sessions, lived_in)
    here = f"/p/entities/datasets/golden/{revision.digest}"

    plain, masked, changed, again = (
        lead.get(here), lead.get(f"{here}?view=mask"), lead.get(f"{here}/diff"), lead.post(f"{here}/rebuild")
    )  # fmt: skip

    assert plain.status_code == masked.status_code == changed.status_code == 200
    assert "Lineage" in plain.text
    assert "serves now" in plain.text
    assert revision.held_out_digest is not None
    assert revision.held_out_digest in plain.text
    assert '<span class="mask-token learned">' in masked.text
    assert "newly judged" in changed.text
    assert "Still the same" in again.text


def test_an_edited_example_is_noticed(lead: TestClient, lived_in: Project, sessions: Sessions) -> None:
    revision = newest(sessions, lived_in)
    with sessions.begin() as session:
        member = revisions.members(session, revision.id, limit=1)[0].example
        member.completion = "something else"
    again = lead.post(f"/p/entities/datasets/golden/{revision.digest}/rebuild")
    assert "Do not train on this revision" in again.text
    assert str(member.id) in again.text


@pytest.mark.parametrize("form", ["prompt-completion", "preference", "unpaired"])
def test_an_export_streams_lines_of_its_form_and_is_on_record(
    lead: TestClient, lived_in: Project, sessions: Sessions, form: str
) -> None:
    revision = newest(sessions, lived_in)
    answer = lead.get(f"/p/entities/datasets/golden/{revision.digest}/export?form={form}&split=train")
    rows = [json.loads(line) for line in answer.text.split("\n") if line]
    assert rows
    assert {row["split"] for row in rows} == {"train"}
    assert f"{form}-train.jsonl" in answer.headers["content-disposition"]
    with sessions() as session:
        assert session.scalar(select(func.count()).where(AuditEvent.action == "dataset.export")) == 1


def test_only_a_lead_exports_and_imports(sign_in: SignIn, lived_in: Project, sessions: Sessions) -> None:
    viewer = sign_in("viewer@example.org", "reviewer", lived_in.id)
    digest = newest(sessions, lived_in).digest
    assert viewer.get(f"/p/entities/datasets/golden/{digest}/export").status_code == 403
    assert viewer.get("/p/entities/datasets/golden/import").status_code == 403
    assert viewer.get(f"/p/entities/datasets/golden/{digest}").status_code == 200


def upload(lead: TestClient, content: str, name: str = "rows.jsonl") -> str:
    sent = lead.post("/p/entities/datasets/golden/import", files={"file": (name, content.encode())})
    assert sent.status_code == 303, sent.text
    return str(sent.headers["location"])


def counts(sessions: Sessions) -> dict[str, Any]:
    with sessions() as session:
        imported = select(func.count()).select_from(Example).where(Example.source == "imported")
        return {
            "examples": session.scalar(imported),
            "audit": session.scalar(select(func.count()).where(AuditEvent.action == "dataset.import")),
            "states": sorted(session.scalars(select(DatasetImport.state))),
        }


def test_a_file_is_previewed_then_imported_whole(lead: TestClient, sessions: Sessions) -> None:
    place = upload(lead, GOOD)
    shown = lead.get(place)
    assert "Every row can be imported" in shown.text
    assert "three plus three" in shown.text
    assert counts(sessions) == {"examples": 0, "audit": 0, "states": ["preview"]}

    done = lead.post(place, data={"prompt": "question", "completion": "answer"})

    assert done.headers["location"].endswith("imported=2")
    assert counts(sessions) == {"examples": 2, "audit": 1, "states": ["done"]}
    assert lead.post(place, data={"prompt": "question", "completion": "answer"}).status_code == 409
    with sessions() as session:
        assert session.scalars(select(DatasetImport.content)).all() == [None]


def test_an_import_that_fails_at_its_last_row_leaves_nothing(lead: TestClient, sessions: Sessions) -> None:
    place = upload(lead, GOOD + '{"question": "four plus four", "answer": ""}\n')
    shown = lead.get(place)
    assert "Row 3 has an empty completion; nothing was imported" in shown.text
    assert lead.post(place, data={"prompt": "question", "completion": "answer"}).status_code == 422
    assert counts(sessions) == {"examples": 0, "audit": 0, "states": ["preview"]}


def test_the_mapping_can_be_changed_and_a_file_discarded(lead: TestClient, sessions: Sessions) -> None:
    place = upload(lead, "wanted,said\nask,reply\n", "rows.csv")
    assert "which column holds the prompt" in lead.get(place).text
    assert "Every row can be imported" in lead.get(f"{place}?prompt=wanted&completion=said").text
    assert lead.post(f"{place}/discard").status_code == 303
    assert counts(sessions)["states"] == []


def test_hostile_files_are_refused_in_a_sentence(lead: TestClient) -> None:
    for name, content in [("a.exe", "x"), ("a.parquet", "PAR1 not really"), ("a.csv", "a,a\n1,2\n"), ("a.jsonl", " ")]:
        sent = lead.post("/p/entities/datasets/golden/import", files={"file": (name, content.encode())})
        assert sent.status_code == 400, (name, sent.text)


def test_every_field_of_the_form_is_a_field_of_imports() -> None:
    from services.console.dataset_imports import MappingForm

    assert list(MappingForm.model_fields) == list(imports.FIELDS)


def test_an_export_that_its_client_leaves_lets_go_of_its_transaction() -> None:
    """Erasures wait for it, so it must not stay open until somebody collects it."""
    closed: list[bool] = []

    def rows() -> Generator[bytes]:
        try:
            while True:
                yield b"{}\n"
        finally:
            closed.append(True)

    async def leave(version: str) -> None:
        going = asyncio.Event()

        async def send(message: Message) -> None:
            if message.get("body"):
                going.set()
                if version == "2.4":
                    raise OSError("gone")

        async def receive() -> Message:
            await going.wait()
            return {"type": "http.disconnect"}

        held = Streamed(rows(), "application/x-ndjson")
        with contextlib.suppress(ClientDisconnect):
            await held({"type": "http", "asgi": {"spec_version": version}}, receive, send)

    for version in ("2.0", "2.4"):  # a server of before says by a message that nobody listens, one of today by an error
        asyncio.run(leave(version))
    assert closed == [True, True]
