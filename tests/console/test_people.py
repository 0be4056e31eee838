"""People: who may give what to whom, links that are used once, sessions that end, and people who leave no trace."""

import json
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select, text
from starlette.testclient import TestClient
from typer.testing import CliRunner, Result

from services.cli import app as cli_app
from services.errors import Conflict, Forbidden, NotFound, Unauthenticated
from services.store import audit, departure, deployments, invitations, keys, people, reviews, roles, runs
from services.store.base import Base, Sessions
from services.store.models import Annotation, ApiKey, AuditEvent, Invitation, Project, ReviewItem, UserAccount
from services.store.roles import Authority
from tests.console import seed
from tests.console.conftest import PEPPER, SignIn

PAGE = {"accept": "text/html"}
ROOT = Authority("key:tests", "admin")


def id_of(sessions: Sessions, email: str) -> UUID:
    with sessions() as session:
        return people.find_user(session, email).id


# --- roles ------------------------------------------------------------------------------------------------


def test_nobody_gives_takes_or_changes_more_than_they_hold(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        lead = seed.person(session, "lea@example.org", "lead", project.id).user
        boss = seed.person(session, "boss@example.org", "admin", project.id).user
        ada = seed.person(session, "ada@example.org", "viewer", project.id).user
        other = seed.project(session, "other", "Another")
        by = Authority.of_user(session, lead.id)
        roles.give(session, by, ada.id, "lead", project.id)
        refused: list[tuple[UUID, str, UUID | None]] = [
            (ada.id, "operator", project.id), (ada.id, "viewer", None), (ada.id, "viewer", other.id),
            (boss.id, "viewer", project.id), (lead.id, "admin", project.id),
        ]  # fmt: skip
        for user_id, role, place in refused:
            with pytest.raises(Forbidden):
                roles.give(session, by, user_id, role, place)
        with pytest.raises(Forbidden):
            roles.take(session, by, boss.id, project.id)
        with pytest.raises(Forbidden):
            roles.give(session, Authority.of_user(session, other.id), ada.id, "viewer", project.id)
        assert people.role_on(session, ada.id, project.id) == "lead"
        assert people.role_on(session, boss.id, project.id) == "admin"


def test_the_last_administrator_can_be_neither_demoted_removed_shut_nor_deleted(sessions: Sessions) -> None:
    with sessions.begin() as session:
        boss = seed.person(session, "boss@example.org", "admin").user
        by = Authority.of_user(session, boss.id)
        gone = seed.person(session, "gone@example.org", "admin").user
        departure.disable(session, by, gone.id)  # a shut account administers nothing
        for attempt in (
            lambda: roles.give(session, by, boss.id, "operator", None),
            lambda: roles.take(session, by, boss.id, None),
            lambda: departure.disable(session, by, boss.id),
            lambda: departure.delete_user(session, by, boss.id),
        ):
            with pytest.raises(Conflict, match="last administrator"):
                attempt()
        seed.person(session, "second@example.org", "admin")
        roles.take(session, by, boss.id, None)


def test_two_administrators_who_demote_each_other_at_once_leave_one(sessions: Sessions) -> None:
    with sessions.begin() as session:
        both = [seed.person(session, f"{name}@example.org", "admin").user.id for name in ("a", "b")]
    together = threading.Barrier(2)
    outcomes: list[str] = []

    def demote(me: UUID, other: UUID) -> None:
        together.wait()
        try:
            with sessions.begin() as session:
                roles.give(session, Authority.of_user(session, me), other, "viewer", None)
            outcomes.append("done")
        except (Conflict, Forbidden) as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=demote, args=pair) for pair in (both, both[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sessions() as session:
        held = [people.role_on(session, one, None) for one in both]
    assert "admin" in held, outcomes


def test_a_role_taken_away_ends_access_and_leases_at_once(
    sign_in: SignIn, sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one"])
    client = sign_in("ada@example.org", "reviewer", project.id)
    assert len(client.post("/p/entities/review/lease", json={}).json()["items"]) == 1
    lead = sign_in("lea@example.org", "lead", project.id)
    path = f"/p/entities/people/{id_of(sessions, 'ada@example.org')}"
    assert lead.post(f"{path}/role", data={"role": "viewer"}).status_code == 303
    assert client.post("/p/entities/review/lease", json={}).status_code == 403
    with sessions() as session:
        assert session.scalars(select(ReviewItem.lease_user_id)).one() is None
    assert lead.post(f"{path}/remove").status_code == 303
    assert client.get("/p/entities").status_code == 404


# --- invitations ------------------------------------------------------------------------------------------


def test_an_invitation_makes_an_account_once(
    sign_in: SignIn, client: TestClient, sessions: Sessions, project: Project
) -> None:
    lead = sign_in("lea@example.org", "lead", project.id)
    form = {"email": "New@Example.org", "name": "New Person", "role": "reviewer"}
    shown = lead.post("/p/entities/people/invite", data=form)
    path = shown.text.split("http://console")[1].split("<")[0]
    assert path.startswith("/invitation/")
    assert path not in lead.get("/p/entities/people").text
    for _ in range(2):  # looking does not use it up
        offered = client.get(path, headers=PAGE)
        assert "Lea invites you to Named entities" in offered.text
    assert client.post(path, follow_redirects=False).status_code == 303
    assert client.post("/p/entities/review/lease", json={}).status_code == 200
    assert client.get("/p/entities/people").status_code == 403
    assert client.post(path).status_code == 401
    with sessions() as session:
        assert path.rpartition("/")[2].encode() not in session.scalars(select(Invitation.token_hash)).one()


def test_dead_invitations_make_nothing(
    sign_in: SignIn, client: TestClient, sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        lead = seed.person(session, "lea@example.org", "lead", project.id).user
        by = Authority.of_user(session, lead.id)

        def invite(email: str, **values: Any) -> invitations.Made:  # noqa: ANN401 - keyword arguments
            return invitations.invite(session, by, email=email, role="reviewer", project_id=project.id, **values)

        revoked, expired = invite("a@example.org"), invite("b@example.org", lifetime=timedelta(seconds=-1))
        orphaned, replaced = invite("c@example.org"), invite("d@example.org")
        invite("d@example.org")
        invitations.revoke(session, by, revoked.invitation.id)
        with pytest.raises(Forbidden):
            invitations.invite(session, by, email="e@example.org", role="operator", project_id=project.id)
    dead = {made.token: 401 for made in (revoked, expired, replaced)}
    with sessions.begin() as session:
        roles.take(session, ROOT, lead.id, project.id)
    dead |= {orphaned.token: 403, "unknown": 401}
    for token, status in dead.items():
        assert client.post(f"/invitation/{token}").status_code == status
    with sessions() as session:
        assert session.scalars(select(UserAccount.email)).all() == ["lea@example.org"]


def test_inviting_somebody_does_not_make_one_somebody(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    """A lead who invites an address that gets an account meanwhile must not become that account."""
    lead = sign_in("lea@example.org", "lead", project.id)
    with sessions.begin() as session:
        by = Authority.of_user(session, people.find_user(session, "lea@example.org").id)
        made = invitations.invite(session, by, email="boss@example.org", role="reviewer", project_id=project.id)
    boss = sign_in("boss@example.org", "admin")
    assert lead.post(f"/invitation/{made.token}").status_code == 401
    assert boss.post(f"/invitation/{made.token}").status_code == 303
    shown = lead.post("/p/entities/people/invite", data={"email": "boss@example.org", "role": "viewer"})
    assert "/invitation/" not in shown.text  # it has an account: there is no link to be made


# --- sessions ---------------------------------------------------------------------------------------------


def test_people_see_and_end_their_own_sessions_and_administrators_anybodys(
    sign_in: SignIn, sessions: Sessions, project: Project
) -> None:
    laptop, phone = (sign_in("ada@example.org", "viewer", project.id) for _ in range(2))
    other = sign_in("eve@example.org", "viewer", project.id)
    boss = sign_in("boss@example.org", "admin")
    ada = id_of(sessions, "ada@example.org")
    page = laptop.get("/account").text
    assert page.count("testclient") == 2
    assert page.count("this one") == 1
    theirs = page.split("/account/sessions/")[2].split("/end")[0]
    assert other.post(f"/account/sessions/{theirs}/end").status_code == 404
    assert laptop.post(f"/account/sessions/{theirs}/end").status_code == 303
    assert (phone.get("/live").status_code, laptop.get("/live").status_code) == (401, 200)
    mine = boss.get(f"/people/{ada}").text.split("/sessions/")[1].split("/end")[0]
    assert boss.post(f"/people/{ada}/sessions/{mine}/end").status_code == 303
    assert laptop.get("/live").status_code == 401


# --- keys -------------------------------------------------------------------------------------------------


def test_a_rotated_key_has_one_successor_and_both_live_for_the_overlap(sessions: Sessions) -> None:
    pepper = PEPPER.encode()
    with sessions.begin() as session:
        old, first = keys.create(session, pepper=pepper, name="app", scopes=["infer"])
        new, second = keys.rotate(session, old.id, pepper=pepper)
        assert all(keys.find(session, pepper, one) for one in (first, second))
        assert (new.scopes, new.rotated_from, new.expires_at) == (old.scopes, old.id, None)
        with pytest.raises(Conflict, match="successor"):
            keys.rotate(session, old.id, pepper=pepper)
        with pytest.raises(Conflict, match="predecessor"):
            keys.rotate(session, new.id, pepper=pepper)
        third = keys.rotate(session, new.id, pepper=pepper, overlap=timedelta())[1]
        assert keys.find(session, pepper, second) is None
        assert keys.find(session, pepper, third) is not None


def test_a_key_does_no_more_than_its_maker(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    allowed = {
        "reviewer": {"review"},
        "lead": {"infer", "feedback", "review"},
        "operator": set(keys.SCOPE_ROLES) - {"admin"},
    }
    for role, scopes in allowed.items():
        client = sign_in(f"{role}@example.org", role, project.id)
        for scope in keys.SCOPE_ROLES:
            answer = client.post("/p/entities/keys", data={"name": f"{role} {scope}", "scope": scope})
            assert answer.status_code == (200 if scope in scopes else 403), (role, scope)
    with sessions.begin() as session:
        strong = keys.create(session, pepper=PEPPER.encode(), name="s", scopes=["admin"], project_id=project.id)[0]
        judging = session.scalars(select(ApiKey).where(ApiKey.name == "reviewer review")).one()
    lead = sign_in("lead@example.org", "lead", project.id)
    assert lead.post(f"/p/entities/keys/{strong.id}/rotate").status_code == 403
    assert lead.post(f"/p/entities/keys/{strong.id}/revoke").status_code == 403
    assert lead.post(f"/p/entities/keys/{judging.id}/rotate").status_code == 403  # its secret is that person
    assert lead.post(f"/p/entities/keys/{judging.id}/revoke").status_code == 303
    assert sign_in("eve@example.org", "reviewer", project.id).get("/p/entities/keys").text.count("wh_") == 0


# --- leaving ----------------------------------------------------------------------------------------------


def test_a_deleted_person_is_nowhere_and_their_judgements_stay(
    sign_in: SignIn, sessions: Sessions, project: Project
) -> None:
    email, name = "augusta.king@example.org", "Augusta King"
    client = sign_in(email, "lead", project.id)
    boss = sign_in("boss@example.org", "admin")
    client.post("/account/name", data={"name": name})
    client.post("/p/entities/keys", data={"name": f"script of {name}", "scope": "review"})
    user_id = id_of(sessions, email)
    with sessions.begin() as session:
        seed.queue(session, project.id, ["one", "two"])
        held = reviews.lease(session, project.id, user_id, 2)
        judged = reviews.Judgement("accept", "k")
        reviews.submit(session, project.id, held[0].id, user_id, held[0].lease_token, judged)  # type: ignore[arg-type]
        runs.start(session, project, params={}, created_by=email)
        deployments.record_change(
            session, deployments.get(session, project.id), "roll_back", old=None, to=None, actor=email,
            reason=f"{name} asked ({email.upper()})", evidence={"by": email},
        )  # fmt: skip
        old_release = {"asked": f"for {name} <{email}>", "nested": [{email: True}]}
        audit.record(session, "key:old", "test.act", f"user:{email}", old_release)
        rows = audit.verify(session).rows
    page = boss.get(f"/people/{user_id}").text
    assert name in page
    assert boss.post(f"/people/{user_id}/delete").status_code == 303
    former = f"former reviewer {user_id.hex[-8:]}"
    assert traces(sessions, email, name) == []
    with sessions() as session:
        verdict = audit.verify(session)
        assert verdict.intact
        assert verdict.rows > rows
        assert verdict.redacted >= 1
        annotation = session.scalars(select(Annotation)).one()
        assert session.get_one(UserAccount, annotation.author_id).name == former
        assert session.scalars(select(ReviewItem.lease_user_id)).all() == [None, None]
        logged = annotation.interaction_id
    assert client.get("/live").status_code == 401
    assert former in boss.get(f"/p/entities/interactions/{logged}").text
    log = boss.get("/audit").text
    assert former in log
    assert name not in log
    assert email not in log
    assert email not in boss.get("/audit/export").text
    with sessions.begin() as session:  # the address is free for a new account, which is somebody else
        assert people.create_user(session, email=email).id != user_id


def traces(sessions: Sessions, *words: str) -> list[tuple[str, str]]:
    """Every row of every table that holds one of the words, as text."""
    found = []
    with sessions() as session:
        for table in sorted(Base.metadata.tables):
            for word in words:
                query = text(f"SELECT count(*) FROM {table} AS t WHERE CAST(t AS text) ILIKE :words")
                if session.scalar(query, {"words": f"%{word}%"}):
                    found.append((table, word))
    return found


def test_only_who_oversees_somebody_shuts_or_deletes_them(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        local = Authority.of_user(session, seed.person(session, "l@example.org", "admin", project.id).user.id)
        ada = seed.person(session, "ada@example.org", "reviewer", project.id).user
        everywhere = seed.person(session, "eve@example.org", "viewer").user
        for act in (departure.disable, departure.delete_user):
            with pytest.raises(Forbidden):
                act(session, local, everywhere.id)
        departure.disable(session, local, ada.id)
        departure.enable(session, local, ada.id)
        departure.delete_user(session, local, ada.id)
        with pytest.raises(NotFound):
            departure.enable(session, ROOT, ada.id)


# --- the audit log ----------------------------------------------------------------------------------------


def test_every_change_is_told_with_filters_and_a_verdict(sign_in: SignIn, sessions: Sessions, project: Project) -> None:
    boss = sign_in("boss@example.org", "admin")
    boss.post("/people/invite", data={"email": "new@example.org", "role": "viewer"})
    boss.post("/keys", data={"name": "ci", "scope": "train"})
    with sessions() as session:
        told = set(session.scalars(select(AuditEvent.action)))
    assert told == {"session.start", "invitation.create", "key.create"}
    page = boss.get("/audit?who=boss&action=key.create").text
    assert page.count('<span class="chip">key.create</span>') == 1
    assert "Boss" in page
    assert "Nothing matches" in boss.get("/audit?who=nobody-like-that").text
    assert "chain verified, 3 events" in boss.get("/audit/verdict").text
    exported = [json.loads(line) for line in boss.get("/audit/export").text.splitlines()]
    assert [row["previous_hash"] for row in exported[1:]] == [row["hash"] for row in exported[:-1]]


def test_a_redaction_excuses_only_the_row_it_names(sessions: Sessions) -> None:
    with sessions.begin() as session:
        events = [audit.record(session, "ada", "test.act", f"thing:{n}", {"who": "Zoe"}) for n in range(3)]
        audit.redact(session, "boss", events[:1], lambda said: said | {"detail": {}})
        assert audit.verify(session) == (
            4,
            None,
            session.scalars(select(AuditEvent.hash).order_by(AuditEvent.id.desc())).first(),
            1,
        )
    with pytest.raises(Exception, match="append-only"), sessions.begin() as session:
        session.execute(text("UPDATE audit_event SET detail = '{}' WHERE id = :id"), {"id": events[1].id})
    with sessions.begin() as session:  # what the trigger lets pass still breaks the chain
        change = "UPDATE audit_event SET detail = '{}', redacted_at = now() WHERE id = :id"
        session.execute(text(change), {"id": events[1].id})
        assert audit.verify(session).broken_id == events[1].id


# --- the API and the command line -------------------------------------------------------------------------


@pytest.fixture
def whet(client: TestClient, admin_key: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The command line, talking to the application under test."""
    client.headers["authorization"] = f"Bearer {admin_key}"
    monkeypatch.setenv("WHET_API_KEY", admin_key)
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setattr("services.cli_client.httpx.Client", lambda **_: client)

    def run(*arguments: str, code: int = 0) -> str:
        result: Result = CliRunner().invoke(cli_app, list(arguments))
        assert result.exit_code == code, (arguments, result.output, result.stderr, result.exception)
        return result.stdout if code == 0 else result.stderr

    return run


def test_the_command_line_does_what_the_pages_do(
    whet: Callable[..., str], sessions: Sessions, project: Project
) -> None:
    link = whet("invitation", "create", "ada@example.org", "--project", "entities").strip()
    assert "/invitation/" in link
    assert "ada@example.org" in whet("invitation", "list")
    with sessions.begin() as session:
        waiting = str(session.scalars(select(Invitation.id)).one())
    assert "revoked" in whet("invitation", "revoke", waiting)
    whet("user", "add", "ada@example.org", "--role", "viewer", "--project", "entities")
    assert "reviewer" in whet("user", "role", "ada@example.org", "reviewer", "--project", "entities")
    assert "reviewer on entities" in " ".join(whet("user", "list").split())
    key = whet("key", "create", "judge", "--scope", "review", "--acts-as", "ada@example.org", "--project", "entities")
    prefix = key.strip()[3:11]
    successor = whet("key", "rotate", prefix, "--overlap", "1").strip()
    assert successor.startswith("wh_")
    assert "rotated already" in whet("key", "rotate", prefix, code=1)
    assert "no role" in whet("user", "remove", "ada@example.org", "--project", "entities")
    assert "is shut" in whet("user", "disable", "ada@example.org")
    assert "is open" in whet("user", "enable", "ada@example.org")
    assert "former reviewer" in whet("user", "delete", "ada@example.org", "--yes")
    assert "there is no account" in whet("user", "sessions", "ada@example.org", code=1)
    assert "events hold" in whet("audit", "verify")
    assert "user.delete" in whet("audit", "show", "--limit", "50")
    assert all(json.loads(line)["hash"] for line in whet("audit", "export").splitlines())


def test_the_api_cannot_take_the_last_administrator_away(
    client: TestClient, admin_key: str, sessions: Sessions
) -> None:
    client.headers["authorization"] = f"Bearer {admin_key}"
    with sessions.begin() as session:
        boss = seed.person(session, "boss@example.org", "admin").user
    assert client.put(f"/api/users/{boss.id}/roles", json={"role": "viewer"}).status_code == 409
    assert client.put(f"/api/users/{boss.id}/roles", json={"role": None}).status_code == 409
    assert client.post("/api/users", json={"email": "boss@example.org", "role": "viewer"}).status_code == 409
    assert client.delete(f"/api/users/{boss.id}").status_code == 409


def test_an_unknown_invitation_is_told_from_nothing(sessions: Sessions) -> None:
    with sessions() as session, pytest.raises(Unauthenticated):
        invitations.find(session, "\udcff")
