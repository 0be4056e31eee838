"""What must not outlive the right to it: keys, links, sessions, invitations; and whose words are kept where."""

import threading
from collections.abc import Callable
from uuid import uuid4

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from services.errors import Conflict, Forbidden, InvalidRequest, Unauthenticated
from services.store import audit, datasets, departure, erasure, imports, invitations, keys, people, roles, saved_views
from services.store.base import Sessions
from services.store.models import AuditEvent, Invitation, LoginSession, Project, SavedView
from services.store.roles import Authority
from tests.console import seed, seed_instant
from tests.console.conftest import PEPPER, SignIn
from tests.console.test_people import traces

ROOT = Authority("key:tests", "admin")
Bearer = Callable[..., dict[str, str]]


@pytest.fixture
def bearer(sessions: Sessions) -> Bearer:
    """`bearer(["admin"], project_id=…)` is a header with a fresh key."""

    def made(scopes: list[str], **values: object) -> dict[str, str]:
        with sessions.begin() as session:
            _, key = keys.create(session, pepper=PEPPER.encode(), name="k", scopes=scopes, **values)  # type: ignore[arg-type]
        return {"authorization": f"Bearer {key}"}

    return made


# --- keys -------------------------------------------------------------------------------------------------


def test_who_may_not_review_any_more_does_not_go_on_reading_the_log(
    client: TestClient, sessions: Sessions, project: Project, bearer: Bearer
) -> None:
    with sessions.begin() as session:
        ada = seed.person(session, "ada@example.org", "reviewer", project.id).user.id
        logged = seed.interaction(session, project.id, output="secret").id
    key = bearer(["review"], project_id=project.id, user_id=ada)
    paths = ("/api/p/entities/interactions", f"/api/p/entities/interactions/{logged}")
    assert [client.get(path, headers=key).status_code for path in paths] == [200, 200]
    with sessions.begin() as session:
        roles.give(session, ROOT, ada, "viewer", project.id)
    assert [client.get(path, headers=key).status_code for path in paths] == [403, 403]
    with sessions.begin() as session:
        departure.disable(session, ROOT, ada)
    assert [client.get(path, headers=key).status_code for path in paths] == [401, 401]


def test_a_key_of_one_project_becomes_nobody_who_reaches_or_may_come_to_reach_more(
    client: TestClient, sessions: Sessions, project: Project, bearer: Bearer
) -> None:
    with sessions.begin() as session:
        other = seed.project(session, "other")
        both = seed.person(session, "both@example.org", "reviewer", project.id).user
        people.grant(session, both.id, "reviewer", other.id)
        idle = seed.person(session, "idle@example.org", None).user
        judge, _ = keys.create(
            session, pepper=PEPPER.encode(), name="j", scopes=["review"], project_id=project.id, user_id=both.id
        )
    admin = bearer(["admin"], project_id=project.id)
    refused = [
        client.post(f"/api/keys/{judge.id}/rotate", json={}, headers=admin),
        client.post("/api/users/link", json={"email": idle.email}, headers=admin),
        client.post("/api/users", json={"email": idle.email, "project": "entities"}, headers=admin),
        client.post("/api/users", json={"email": both.email, "project": "entities"}, headers=admin),
    ]
    assert [answer.status_code for answer in refused] == [403] * 4
    new = {"email": "new@example.org", "project": "entities", "role": "reviewer"}
    assert client.post("/api/users", json=new, headers=admin).status_code == 201
    assert client.post("/api/users/link", json={"email": new["email"]}, headers=admin).status_code == 201
    everywhere = bearer(["admin"])
    assert client.post(f"/api/keys/{judge.id}/rotate", json={}, headers=everywhere).status_code == 201


# --- links and sessions -----------------------------------------------------------------------------------


def test_opening_an_account_again_does_not_revive_its_old_links(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        somebody = seed.person(session, "ada@example.org", "viewer", project.id)
        departure.disable(session, ROOT, somebody.user.id)
        departure.enable(session, ROOT, somebody.user.id)
        with pytest.raises(Unauthenticated):
            people.redeem(session, b"p", somebody.token)


def test_signing_in_as_somebody_else_leaves_no_session_behind(sign_in: SignIn, sessions: Sessions) -> None:
    client = sign_in("ada@example.org", "viewer")
    first = client.cookies["whet_session"]
    with sessions.begin() as session:
        token = seed.person(session, "grace@example.org", "viewer").token
    assert client.post(f"/sign-in/{token}").status_code == 303
    assert client.cookies["whet_session"] != first
    with sessions() as session:
        ended = session.scalars(select(LoginSession.revoked_at).order_by(LoginSession.created_at)).all()
        assert people.current(session, PEPPER.encode(), first) is None
    assert [at is not None for at in ended] == [True, False]


def test_a_dead_link_signs_nobody_out(sign_in: SignIn) -> None:
    client = sign_in("ada@example.org", "viewer")
    assert client.post("/sign-in/unknown").status_code == 401
    assert client.get("/account").status_code == 200


# --- invitations ------------------------------------------------------------------------------------------


def test_an_invitation_by_a_key_ends_with_the_key_and_survives_its_rotation(sessions: Sessions) -> None:
    with sessions.begin() as session:
        key, _ = keys.create(session, pepper=PEPPER.encode(), name="k", scopes=["admin"])
        invite = [
            invitations.invite(session, Authority.of_key(key), email=f"{n}@x.org", role="admin", project_id=None)
            for n in "ab"
        ]
        new, _ = keys.rotate(session, key.id, pepper=PEPPER.encode())
        key.expires_at = key.created_at
        session.flush()
        assert invitations.accept(session, invite[0].token, None).created
        keys.revoke(session, new.id)
        with pytest.raises(Forbidden, match="API key"):
            invitations.accept(session, invite[1].token, None)
        assert invitations.waiting(session, "b@x.org") == []


def test_a_link_is_used_once_or_revoked_however_many_hurry(sessions: Sessions, project: Project) -> None:
    for round_ in range(5):
        with sessions.begin() as session:
            made = invitations.invite(session, ROOT, email=f"{round_}@x.org", role="lead", project_id=project.id)
        together, outcomes = threading.Barrier(4), []

        def attempt(act: Callable[..., object], *values: object) -> None:
            together.wait()  # noqa: B023 - joined below
            try:
                with sessions.begin() as session:
                    act(session, *values)
                outcomes.append(act.__name__)  # noqa: B023
            except (Conflict, Unauthenticated):
                pass

        work: list[tuple[object, ...]] = [(invitations.accept, made.token, None)] * 3
        work.append((invitations.revoke, ROOT, made.invitation.id))
        threads = [threading.Thread(target=attempt, args=one) for one in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 1
        with sessions() as session:
            row = session.get_one(Invitation, made.invitation.id)
            assert (row.accepted_at is None) != (row.revoked_at is None)


# --- names ------------------------------------------------------------------------------------------------


def test_a_name_does_not_turn_the_line_around() -> None:
    assert people.checked("a@x.org", " Ada\u202e nimda\u2066\ufeff ")[1] == "Ada nimda"
    assert people.checked("a@x.org", "می\u200cخواهم")[1] == "می\u200cخواهم"
    with pytest.raises(InvalidRequest):
        people.checked("a@x.org", "Ada\x00")


# --- deleted people ---------------------------------------------------------------------------------------


def test_a_deleted_person_is_named_by_no_pin_import_erasure_or_search(
    sign_in: SignIn, sessions: Sessions, project: Project
) -> None:
    email = "augusta.king@example.org"
    client = sign_in(email, "admin", project.id)
    client.post("/p/entities/erasure", data={"kind": "end_user", "subject": "x", "confirmed": "x"})
    with sessions.begin() as session:
        user = people.find_user(session, email)
        pin = seed_instant.pinned(session, project, "{}")
        pin.state, pin.withdrawn_by, pin.reason = "withdrawn", email, f"asked by {email}"
        golden = datasets.get_or_create(session, project.id, "golden")
        imports.begin(session, golden, f"of {email}.csv", b"prompt,completion\na,b\n", email)
        erasure.request(session, erasure.checked(project.id, "session", "y"), email)
        saved_views.save(session, project.id, user.id, "mine", "q=private", shared=False)
        saved_views.save(session, project.id, user.id, "ours", "finish=length", shared=True)
        departure.delete_user(session, ROOT, user.id)
        assert session.scalars(select(SavedView.name)).all() == ["ours"]
        assert audit.verify(session).intact
    assert traces(sessions, email) == []


def test_somebody_named_like_a_word_of_ours_takes_nothing_along(sessions: Sessions, project: Project) -> None:
    with sessions.begin() as session:
        user = people.create_user(session, email="sly@example.org", name="reviewer")
        roles.give(session, ROOT, user.id, "reviewer", project.id)
        audit.record(session, "key:x", "test.act", "reviewer", {"reviewer": 1, "why": "reviewer asked for it"})
        key, _ = keys.create(session, pepper=b"p", name="reviewer", scopes=["infer"], created_by=user.id)
        former = departure.delete_user(session, ROOT, user.id)
        given, typed = session.scalars(
            select(AuditEvent).where(AuditEvent.action.in_(("role.give", "test.act"))).order_by(AuditEvent.id)
        )
        assert (given.detail["role"], given.redacted_at) == ("reviewer", None)
        assert (typed.subject, typed.detail) == ("reviewer", {"reviewer": 1, "why": f"{former} asked for it"})
        assert key.name == former
        assert audit.verify(session).intact


# --- the audit log of a project ---------------------------------------------------------------------------


def test_a_lead_reads_what_happened_on_the_project_and_nothing_else(
    sign_in: SignIn, sessions: Sessions, project: Project
) -> None:
    with sessions.begin() as session:
        other = seed.project(session, "other")
    boss = sign_in("boss@example.org", "admin")
    for place, email in ((project, "here@example.org"), (other, "there@example.org")):
        leads = sign_in(f"lead-{email}", "lead", place.id)
        leads.post(f"/p/{place.slug}/people/invite", data={"email": email, "role": "viewer"})
        leads.post(f"/p/{place.slug}/keys", data={"name": f"of {place.slug}", "scope": "infer"})
        leads.post(f"/p/{place.slug}/interactions/export", data={"query": "q=typed&finish=stop"})
        with sessions.begin() as session:
            user = seed.person(session, f"member-{email}", None).user.id
        boss.post(f"/people/{user}/role", data={"role": "viewer", "project": place.slug})
    boss.post("/keys", data={"name": "of all", "scope": "infer"})
    boss.post("/people/invite", data={"email": "all@example.org", "role": "viewer"})

    lead = sign_in("lead-here@example.org", "lead", project.id)
    page = lead.get("/p/entities/audit").text
    for told in ("invitation of here@example.org", "key “of entities”", "Member-here", "interactions.export"):
        assert told in page
    for untold in ("there@example.org", "of other", "Member-there", "“of all”", "all@example.org", "session.start"):
        assert untold not in page
    assert page.count('<span class="chip">role.give</span>') == 1
    assert "Nothing matches" in lead.get("/p/entities/audit?who=lead-there").text
    rows = lead.get("/p/entities/audit/export").text.splitlines()
    assert len(rows) == 5  # an invitation, a key, an export, a role, and this export itself
    assert "typed" not in "".join(rows)
    assert lead.get("/p/other/audit").status_code == 404
    assert lead.get("/audit").status_code == 403
    assert sign_in("r@example.org", "reviewer", project.id).get("/p/entities/audit").status_code == 403


def test_the_log_of_a_project_is_for_its_own_key_too(
    client: TestClient, sessions: Sessions, project: Project, bearer: Bearer
) -> None:
    with sessions.begin() as session:
        audit.record(session, "key:x", "test.here", f"project:{project.id}")
        audit.record(session, "key:x", "test.there", f"project:{uuid4()}")
    local = bearer(["admin"], project_id=project.id)
    told = client.get("/api/audit?project=entities&who=%00", headers=local).json()["events"]
    assert [one["action"] for one in told] == ["test.here"]
    assert client.get("/api/audit", headers=local).status_code == 403
    assert client.get("/api/audit?project=other", headers=local).status_code == 404
    assert client.get(f"/api/audit?before={2**70}", headers=bearer(["admin"])).status_code == 422


def test_the_chain_holds_however_many_write_at_once(sessions: Sessions) -> None:
    def write(place: int) -> None:
        for number in range(10):
            with sessions.begin() as session:
                audit.record(session, f"key:{place}", "test.act", f"thing:{number}", {"π": 0.1 + place})

    threads = [threading.Thread(target=write, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sessions() as session:
        verdict = audit.verify(session)
        assert (verdict.intact, verdict.rows) == (True, 60)
        assert session.scalars(select(AuditEvent.at).order_by(AuditEvent.id)).all() == sorted(
            session.scalars(select(AuditEvent.at))
        )
