"""The `whet` client: light enough for any app, patient with a busy platform, and honest about what failed."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from services.settings import Settings
from services.store import keys, people, roles
from services.store.base import Sessions
from services.store.models import Annotation, Project
from services.web import create_app
from tests.console import seed
from whet_client import errors
from whet_client.client import Whet

ROOT = Path(__file__).parents[2]
PEPPER = "a pepper for tests only, long enough"
HEAVY = ("torch", "sqlalchemy", "fastapi", "pydantic", "starlette", "services", "engine", "numpy")


def test_importing_it_brings_httpx_and_nothing_of_the_platform() -> None:
    program = f"import sys, whet_client.client; print([n for n in {HEAVY!r} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- retries ----------------------------------------------------------------------------------------------


class Flaky(httpx.BaseTransport):
    """Answers with these, one after another; an exception is raised."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.sent: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.sent.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


STORED = {"id": "f", "object": "feedback", "interaction_id": "i", "landed": True}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet_client.transport._pause", lambda _attempt: 0.0)


def test_a_retried_call_carries_one_idempotency_key() -> None:
    busy = httpx.Response(503, json={"error": {"message": "later"}}, headers={"retry-after": "0"})
    flaky = Flaky(httpx.ReadTimeout("slow"), busy, httpx.Response(201, json=STORED))
    with Whet("wh_x", project="chat", transport=flaky) as whet:
        assert whet.feedback("chatcmpl-i", rating=-1).landed
    sent = {request.headers["idempotency-key"] for request in flaky.sent}
    assert len(flaky.sent) == 3
    assert len(sent) == 1
    assert len({request.content for request in flaky.sent}) == 1


def test_a_call_that_stays_unanswered_says_so_after_the_last_retry() -> None:
    flaky = Flaky(*(httpx.ConnectError("refused") for _ in range(3)))
    whet = Whet("wh_x", project="chat", retries=2, transport=flaky)
    with pytest.raises(errors.Unavailable, match="did not answer"):
        whet.feedback("i", rating=1)
    assert flaky.answers == []


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, None, errors.InvalidRequest), (401, None, errors.Unauthenticated), (403, None, errors.Forbidden),
        (404, None, errors.NotFound), (409, "conflict", errors.Conflict), (409, "lost_lease", errors.LostLease),
        (422, None, errors.InvalidRequest), (500, None, errors.Unavailable),
    ],
)  # fmt: skip
def test_refusals_are_not_repeated_and_have_a_kind(status: int, code: str | None, kind: type[Exception]) -> None:
    flaky = Flaky(httpx.Response(status, json={"error": {"message": "no", "code": code, "param": "p"}}))
    with pytest.raises(kind) as caught:
        Whet("wh_x", project="chat", transport=flaky).undo("a")
    assert isinstance(caught.value, errors.WhetError)
    assert (type(caught.value), caught.value.status, caught.value.param) == (kind, status, "p")


def test_what_cannot_be_sent_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("", "  ", "wh_…"):
        with pytest.raises(ValueError, match="API key"):
            Whet(key, project="chat")
    for broken in (httpx.UnsupportedProtocol("no http"), httpx.LocalProtocolError("illegal header")):
        flaky = Flaky(broken)
        with pytest.raises(errors.InvalidRequest, match="cannot be sent"):
            Whet("wh_k", project="chat", transport=flaky).lease()
        assert len(flaky.sent) == 1


@pytest.mark.parametrize("identity", ["../runs", "..", "a/../../x", "a?b=c", "%2e%2e"])
def test_an_id_from_elsewhere_leads_nowhere_else(identity: str) -> None:
    flaky = Flaky(httpx.Response(404, json={"error": {"message": "no"}}))
    with pytest.raises(errors.NotFound):
        Whet("wh_k", project="chat", transport=flaky).interaction(identity)
    path = flaky.sent[0].url.raw_path.decode()
    assert path.startswith("/api/p/chat/interactions/")
    assert path.count("/") == 5
    assert "?" not in path
    assert ".." not in path


def test_an_answer_that_is_no_json_is_an_error_and_no_crash() -> None:
    flaky = Flaky(httpx.Response(200, text="<html>a proxy says hello</html>"))
    with pytest.raises(errors.WhetError, match="no JSON"):
        Whet("wh_x", project="chat", transport=flaky).lease()


# --- with the real console --------------------------------------------------------------------------------


class ToConsole(httpx.BaseTransport):
    """The client's requests, answered by the console in this process."""

    def __init__(self, console: TestClient) -> None:
        self.console = console

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self.console.request(
            request.method, str(request.url), content=request.read(), headers=dict(request.headers)
        )
        return httpx.Response(answer.status_code, content=answer.content)


@pytest.fixture
def console(tmp_path: Path, sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("WHET_HOME", str(tmp_path))
    monkeypatch.setenv("WHET_SECRET", PEPPER)
    with TestClient(create_app(Settings(), sessions), base_url="http://console") as made:
        yield made


@pytest.fixture
def project(sessions: Sessions) -> Project:
    with sessions.begin() as session:
        return seed.project(session)


@pytest.fixture
def reviewer(console: TestClient, sessions: Sessions, project: Project) -> Whet:
    """Ada's own client."""
    with sessions.begin() as session:
        ada = seed.person(session, "ada@example.org", "reviewer", project.id).user
        _, key = keys.create(
            session, pepper=PEPPER.encode(), name="r", scopes=["review"], project_id=project.id, user_id=ada.id
        )
    return Whet(key, project="entities", console_url="http://console", transport=ToConsole(console))


def test_a_queue_is_judged_and_a_judgement_taken_back(reviewer: Whet, sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one", "two"])
    first, second = reviewer.lease()
    assert (first.output, second.output) == ("one", "two")
    assert reviewer.heartbeat(first) >= first.lease_expires_at
    stored = reviewer.annotate(first, "correct", correction="1", tags=["wrong kind"], idempotency_key="k")
    assert not stored.replayed
    assert reviewer.annotate(first, "correct", correction="1", idempotency_key="k").replayed
    reviewer.release(second)
    with pytest.raises(errors.LostLease):
        reviewer.annotate(second, "accept")
    assert reviewer.undo(stored).state == "open"
    assert reviewer.undo(stored.id).item_id == first.id
    with pytest.raises(errors.InvalidRequest, match="verdict"):
        reviewer.annotate(reviewer.lease(1)[0], "perfect")  # type: ignore[arg-type]


def test_pairs_are_compared_blind_and_stored_by_what_they_are(
    reviewer: Whet, sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        for place in range(8):
            logged = seed.interaction(session, project.id, output=f"served {place}")
            other = {"output": f"other {place}", "digest": None}
            seed.item(session, logged, priority=place, alternative=other)
    items = reviewer.lease(8)
    assert all(item.output == "" for item in items)
    lefts = [item.pair[0].split()[0] for item in items if item.pair]
    assert set(lefts) == {"served", "other"}  # drawn for each item
    assert [item.pair for item in reviewer.lease(8)] == [item.pair for item in items]
    for item, side in zip(items, ("left", "right", "left", "tie"), strict=False):
        reviewer.annotate(item, "prefer", preference=side)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidRequest, match="a pair"):
        reviewer.annotate(items[4], "accept")
    with pytest.raises(errors.InvalidRequest, match="preference"):
        reviewer.annotate(items[4], "prefer")
    assert reviewer.annotate(items[4], "reject").verdict == "reject"
    meaning = {"served": "response", "other": "alternative"}
    with sessions() as session:
        stored = {row.review_item_id: row.preference for row in session.scalars(select(Annotation))}
    wanted = [meaning[lefts[0]], meaning[{"served": "other", "other": "served"}[lefts[1]]], meaning[lefts[2]], "tie"]
    assert [stored[UUID(item.id)] for item in items[:5]] == [*wanted, None]


def test_an_older_platform_that_knows_no_pairs_is_understood() -> None:
    row = {"id": "i", "lease_token": "t", "lease_expires_at": "soon", "messages": [], "output": "one"}
    flaky = Flaky(httpx.Response(200, json={"items": [row], "tags": []}))
    assert Whet("wh_x", project="chat", transport=flaky).lease()[0].pair is None


def test_the_key_is_worth_what_its_person_is_worth(reviewer: Whet, sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        ada = people.find_user(session, "ada@example.org").id
        roles.give(session, roles.Authority("key:t", "admin"), ada, "viewer", project.id)
    with pytest.raises(errors.Forbidden, match="may not review here any more"):
        reviewer.lease()


def test_a_key_without_a_person_cannot_judge(console: TestClient, sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        _, key = keys.create(session, pepper=PEPPER.encode(), name="r", scopes=["review"], project_id=project.id)
    whet = Whet(key, project="entities", console_url="http://console", transport=ToConsole(console))
    with pytest.raises(errors.Forbidden, match="acts as nobody"):
        whet.lease()
    assert list(whet.interactions()) == []


def test_a_filter_that_is_misspelt_is_no_licence_to_get_everything(
    reviewer: Whet, sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        mine = seed.interaction(session, project.id, output="a", end_user="u1", tags={"app": "x"}).id
        seed.interaction(session, project.id, output="b", end_user="u2")
    assert [line.id for line in reviewer.interactions(user="u1", tag="app=x")] == [str(mine)]
    for wrong in ({"finish": "stopp"}, {"feedback": "bad"}, {"window": "year"}):
        with pytest.raises(errors.InvalidRequest) as caught:
            list(reviewer.interactions(**wrong))
        assert caught.value.param == next(iter(wrong))


def test_the_log_is_read_page_by_page(
    reviewer: Whet, sessions: Sessions, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whet_client.client.PAGE", 2)
    with sessions.begin() as session:
        made = [seed.interaction(session, project.id, output=f"answer {n}").id for n in range(5)]
    assert sorted(line.id for line in reviewer.interactions()) == sorted(str(one) for one in made)
    assert [line.output for line in reviewer.interactions(words="answer 3")] == ["answer 3"]
    assert reviewer.interaction(f"chatcmpl-{made[0]}").output == "answer 0"
    with pytest.raises(errors.NotFound):
        Whet("wh_k", project="x", transport=Flaky(httpx.Response(404, json={"error": {"message": "no"}}))).interaction(
            "i"
        )
