"""People, keys, invitations and the audit log in every state a page shows."""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from playwright.sync_api import Page
from sqlalchemy.orm import Session

from services.store import audit, departure, invitations, keys, logins, people, roles
from services.store.models import Project, UserAccount
from services.store.roles import Authority
from tests.browser.scene import BOSS, HERE, NOBODY, Scene
from tests.console import seed

PEPPER = b"a pepper for tests only, long enough"
LONG = "nightly import of the newsroom's archive, every region, both languages"
VERA, NORA = "vera@example.org", "nora@example.org"


def build(session: Session, project: Project) -> list[Scene]:
    """Fill a project that is lived in, and say what there is to see."""
    boss = seed.person(session, BOSS, "admin").user
    by = Authority.of_user(session, boss.id)
    ada = people.find_user(session, "ada@example.org")
    lea = _member(session, by, project, "lea@example.org", "lead")
    _member(session, by, project, VERA, "viewer")
    seed.person(session, NORA, None)
    shut = _member(session, by, project, "sam.the-reviewer-with-the-long-address@newsroom.example.org", "reviewer")
    gone = _member(session, by, project, "gone@example.org", "reviewer")
    departure.disable(session, by, shut.id)
    departure.delete_user(session, by, gone.id)
    for device, ago in (("Firefox on Linux", 3), ("Safari on iPhone", 190), ("Chrome on Windows", 4000)):
        people.start_session(session, PEPPER, ada.id, method="link", device=device)
        logins.of_user(session, ada.id)[0].last_seen_at = datetime.now(UTC) - timedelta(minutes=ago)
    _keys(session, project, boss, lea)
    token = _invitations(session, by, Authority.of_user(session, lea.id), project)
    return _scenes(ada, lea, shut, gone, token)


def _member(session: Session, by: Authority, project: Project, email: str, role: str) -> UserAccount:
    user = seed.person(session, email, None).user
    roles.give(session, by, user.id, role, project.id)
    return user


def _keys(session: Session, project: Project, boss: UserAccount, lea: UserAccount) -> None:
    """Live, used, acting as somebody, rotated and on its way out, revoked, expired, of every project."""
    now = datetime.now(UTC)

    def made(name: str, scopes: list[str], by: UserAccount, **values: object) -> keys.ApiKey:
        key, _ = keys.create(session, pepper=PEPPER, name=name, scopes=scopes, created_by=by.id, **values)  # type: ignore[arg-type]
        audit.record(session, f"user:{by.id}", "key.create", f"key:{key.prefix}", {"scopes": key.scopes})
        return key

    app = made("newsroom app", ["infer", "feedback"], lea, project_id=project.id)
    app.last_used_at = now - timedelta(minutes=2)
    made("judge", ["review"], lea, project_id=project.id, user_id=lea.id)
    old = made(LONG, ["infer", "train"], boss, project_id=project.id)
    keys.rotate(session, old.id, pepper=PEPPER, created_by=boss.id)
    keys.revoke(session, made("a laptop that was lost", ["infer"], lea, project_id=project.id).id)
    made("trial", ["infer"], lea, project_id=project.id, expires_at=now - timedelta(days=1))
    made("operations", ["train", "admin"], boss)


def _invitations(session: Session, boss: Authority, lead: Authority, project: Project) -> str:
    """One in every state; the token of an open one."""
    invitations.invite(session, boss, email="chief@example.org", role="operator", project_id=None)
    used = invitations.invite(session, lead, email="used@example.org", role="reviewer", project_id=project.id)
    invitations.accept(session, used.token, None)
    over = invitations.invite(session, lead, email="slow@example.org", role="viewer", project_id=project.id)
    over.invitation.expires_at = datetime.now(UTC) - timedelta(days=1)
    back = invitations.invite(session, lead, email="wrong@example.org", role="lead", project_id=project.id)
    invitations.revoke(session, lead, back.invitation.id)
    return invitations.invite(
        session, lead, email="new@example.org", name="New Person", role="reviewer", project_id=project.id
    ).token


# --- what there is to see ---------------------------------------------------------------------------------


def _press(*names: str) -> Callable[[Page], object]:
    def press(page: Page) -> None:
        for name in names:
            page.get_by_role("button", name=name).first.click()

    return press


def _invited(page: Page) -> None:
    page.get_by_label("E-mail", exact=True).fill("fresh@example.org")
    page.get_by_role("button", name="Invite", exact=True).click()
    page.locator("#secret").wait_for()


def _key_made(page: Page) -> None:
    page.get_by_label("What it is for").fill("weekly report")
    page.get_by_role("checkbox", name="infer").check()
    page.get_by_role("button", name="Make the key").last.click()
    page.locator("#secret").wait_for()


def _verified(page: Page) -> None:
    page.get_by_text("chain verified").wait_for()


def _scenes(ada: UserAccount, lea: UserAccount, shut: UserAccount, gone: UserAccount, token: str) -> list[Scene]:
    return [
        Scene("people-project", f"{HERE}/people"),
        Scene("people-project-remove", f"{HERE}/people", _press("Remove")),
        Scene("people-project-invited", f"{HERE}/people", _invited),
        Scene("people-everybody", "/people"),
        Scene("person", f"/people/{ada.id}"),
        Scene("person-keys", f"/people/{lea.id}"),
        Scene("person-link", f"/people/{ada.id}", _press("New sign-in link")),
        Scene("person-delete", f"/people/{ada.id}", _press("Delete for good")),
        Scene("person-shut", f"/people/{shut.id}"),
        Scene("person-deleted", f"/people/{gone.id}"),
        Scene("keys-project", f"{HERE}/keys"),
        Scene("keys-project-made", f"{HERE}/keys", _key_made),
        Scene("keys-project-rotate", f"{HERE}/keys", _press("Rotate")),
        Scene("keys-everywhere", "/keys"),
        Scene("keys-none", "/p/young/keys"),
        Scene("audit", "/audit", _verified),
        Scene("audit-none", "/audit?who=nobody-like-that", _verified),
        Scene("audit-project", f"{HERE}/audit"),
        Scene("audit-young", "/p/young/audit"),
        Scene("account", "/account"),
        Scene("viewer-home", "/", email=VERA),
        Scene("viewer-overview", HERE, email=VERA),
        Scene("viewer-interactions", f"{HERE}/interactions", email=VERA),
        Scene("viewer-rollout-settings", f"{HERE}/deployment/settings", email=VERA),
        Scene("viewer-gate-settings", f"{HERE}/evaluations/settings", email=VERA),
        Scene("viewer-account", "/account", email=VERA),
        Scene("viewer-refused", f"{HERE}/people", email=VERA),
        Scene("nobody-home", "/", email=NORA),
        Scene("error-unknown", f"{HERE}/interactions/{uuid.UUID(int=0)}"),
        Scene("invitation-signed-in", f"/invitation/{token}"),
        Scene("invitation", f"/invitation/{token}", email=NOBODY),
        Scene("invitation-dead", "/invitation/unknown", email=NOBODY),
        Scene("sign-in", "/sign-in", email=NOBODY),
        Scene("sign-in-link", "/sign-in/unknown", email=NOBODY),
        Scene("sign-in-refused", "/sign-in/unknown", _press("Sign in"), email=NOBODY),
    ]
