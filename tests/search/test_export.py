"""Exports hold what the search finds, run nothing in a spreadsheet, stay small in memory and leave a trace; views
belong to people."""

import csv
import io
import json
import tracemalloc
import uuid
from datetime import timedelta
from urllib.parse import quote

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from services.store import export
from services.store.base import Sessions
from services.store.erasure_cover import hashed
from services.store.models import AuditEvent, Feedback, Project, SavedView
from services.store.search import Search
from tests.console import seed
from tests.console.conftest import SignIn

FORMULAS = [
    "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\u200b=1", "\ufeff=1", "\u202e=1", "\uff1d1",
    "|calc", "%0A=1", '=HYPERLINK("http://x")', "\xa0=cmd",
]  # fmt: skip


@pytest.fixture
def lead(sign_in: SignIn) -> TestClient:
    return sign_in("lea@example.org", "lead")


def taken(client: TestClient, format_: str, query: str = "") -> bytes:
    answer = client.post("/p/entities/interactions/export", data={"format": format_, "query": query})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-disposition"].startswith('attachment; filename="entities-')
    return answer.content


def test_lines_hold_what_the_search_finds_with_its_feedback(
    sessions: Sessions, project: Project, other: Project, lead: TestClient
) -> None:
    with sessions.begin() as session:
        first = seed.interaction(session, project.id, output="a needle \u2028 é", ago=timedelta(minutes=1))
        second = seed.interaction(session, project.id, output="needle two", finish_reason="length")
        seed.interaction(session, project.id, output="hay")
        seed.interaction(session, other.id, output="needle of others")
        session.add(
            Feedback(project_id=project.id, interaction_id=first.id, idempotency_key="k", rating=-1, comment="=no")
        )
    rows = [json.loads(line) for line in taken(lead, "jsonl", "q=needle&mode=words").decode().split("\n") if line]
    assert [row["id"] for row in rows] == [str(second.id), str(first.id)]
    assert rows[1]["output"] == "a needle \u2028 é"
    assert rows[1]["feedback"] == [{"rating": -1, "score": None, "comment": "=no", "correction": None, "author": None}]
    assert rows[1]["messages"][0]["role"] == "user"
    assert len(taken(lead, "jsonl", "finish=length").splitlines()) == 1
    with sessions() as session:
        events = session.scalars(select(AuditEvent).where(AuditEvent.action == "interactions.export")).all()
    assert [event.detail["query"] for event in events] == [f"q={quote(hashed('needle'))}&mode=words", "finish=length"]


def test_no_cell_of_a_spreadsheet_is_a_formula(sessions: Sessions, project: Project, lead: TestClient) -> None:
    with sessions.begin() as session:
        for formula in FORMULAS:
            seed.interaction(
                session, project.id, output=formula, end_user=formula, session_key=formula, tags={formula: formula}
            )
    text = taken(lead, "csv").decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == len(FORMULAS)
    assert {row["output"] for row in rows} == {f"'{formula}" for formula in FORMULAS}
    for row in rows:
        for name, cell in row.items():
            assert not cell.lstrip().startswith(("=", "+", "@", "|")), (name, cell)
        assert row["end_user"].startswith("'")
        assert float(row["mean_logprob"]) < 0


def test_a_large_export_is_read_page_by_page(
    sessions: Sessions, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PAGE", 10)
    with sessions.begin() as session:
        ids = [
            seed.interaction(session, project.id, output="x" * 100_000, ago=timedelta(seconds=n)).id for n in range(60)
        ]
    tracemalloc.start()
    seen = sum(len(piece.splitlines()) for piece in export.pages(sessions, project.id, Search(), "jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 60
    assert peak < 5_000_000
    named = b"".join(export.pages(sessions, project.id, Search(), "jsonl", ids=ids[::-1]))
    assert [json.loads(line)["id"] for line in named.splitlines()] == [str(one) for one in ids[::-1]]


def test_reviewers_take_no_copies(sign_in: SignIn, project: Project) -> None:
    client = sign_in("ada@example.org", "reviewer")
    assert client.post("/p/entities/interactions/export", data={"format": "csv"}).status_code == 403


# --- saved views ------------------------------------------------------------------------------------------


def test_views_are_ones_own_until_they_are_shared(
    sessions: Sessions, project: Project, other: Project, sign_in: SignIn
) -> None:
    ada, grace = sign_in("ada@example.org", "viewer"), sign_in("grace@example.org", "viewer")
    path = "/p/entities/interactions"
    saved = ada.post(f"{path}/views", data={"name": " Bad  ones ", "query": "feedback=negative&bogus=1&verdict=x"})
    assert saved.headers["location"] == f"{path}?feedback=negative"
    ada.post(f"{path}/views", data={"name": "Team <b>", "query": "q=a%26b", "shared": "true"})
    mine, theirs = (client.get(path, headers={"accept": "text/html"}).text for client in (ada, grace))
    assert "Bad ones" in mine
    assert "Bad ones" not in theirs
    assert "Team &lt;b&gt;" in theirs
    assert f"{path}?q=a%26b" in theirs
    assert "Team" not in grace.get("/p/other/interactions", headers={"accept": "text/html"}).text
    with sessions() as session:
        views = {view.name: view.id for view in session.scalars(select(SavedView))}
    assert grace.post(f"{path}/views/{views['Bad ones']}/delete").status_code == 404
    assert grace.post(f"{path}/views/{views['Team <b>']}/delete").status_code == 403
    assert sign_in("lea@example.org", "lead").post(f"{path}/views/{views['Team <b>']}/delete").status_code == 303
    assert ada.post(f"{path}/views/{views['Bad ones']}/delete").status_code == 303
    assert ada.post(f"/p/other/interactions/views/{uuid.uuid4()}/delete").status_code == 404


def test_saving_under_a_name_again_replaces_the_view(sessions: Sessions, project: Project, sign_in: SignIn) -> None:
    ada = sign_in("ada@example.org", "viewer")
    for query in ("q=one", "q=two"):
        ada.post("/p/entities/interactions/views", data={"name": "V", "query": query})
    with sessions() as session:
        assert [(view.name, view.query) for view in session.scalars(select(SavedView))] == [("V", "q=two")]
    assert ada.post("/p/entities/interactions/views", data={"name": "   "}).status_code == 400
