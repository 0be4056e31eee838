"""People in a real browser: invited in one, at work in another, and shut out at once."""

from playwright.sync_api import Browser, expect
from sqlalchemy import select

from services.store import people
from services.store.base import Sessions
from services.store.models import UserAccount
from tests.browser.conftest import WATCH_POLICY, OpenAs
from tests.browser.test_pages import NAMELESS
from tests.console import seed


def test_somebody_is_invited_works_and_loses_access_at_once(
    sessions: Sessions, open_as: OpenAs, chromium: Browser, console_url: str
) -> None:
    with sessions.begin() as session:
        project = seed.project(session)
        seed.queue(session, project.id, ["one", "two"])
    lead = open_as("lea@example.org", "/p/entities/people", "lead")
    lead.get_by_label("E-mail", exact=True).fill("new@example.org")
    lead.get_by_label("Name", exact=True).fill("New Person")
    lead.get_by_role("button", name="Invite", exact=True).click()
    link = lead.locator("#secret").inner_text()
    lead.reload()
    expect(lead.locator("#secret")).to_have_count(0)  # shown once, and a reload invites nobody again
    expect(lead.locator("main")).to_contain_text("new@example.org")

    second = chromium.new_context(base_url=console_url, viewport={"width": 1280, "height": 720})
    try:
        second.add_init_script(WATCH_POLICY)
        page = second.new_page()
        page.goto(link)
        page.get_by_role("button", name="Accept and sign in").press("Enter")
        page.wait_for_url(f"{console_url}/")
        page.goto("/p/entities/review")
        expect(page.locator("body")).to_contain_text("one")

        lead.goto("/p/entities/people")
        lead.get_by_label("Role of New Person").select_option("viewer")
        lead.get_by_role("row", name="New Person").get_by_role("button", name="Change").click()
        assert page.goto("/p/entities/review").status == 403  # type: ignore[union-attr]
        assert page.goto("/p/entities").status == 200  # type: ignore[union-attr]

        lead.get_by_role("button", name="Remove").click()
        lead.get_by_role("dialog").get_by_role("button", name="Remove").click()
        expect(lead.get_by_label("Role of New Person")).to_have_count(0)
        assert page.goto("/p/entities").status == 404  # type: ignore[union-attr]
        assert page.evaluate("window.violations") == []
    finally:
        second.close()


def test_the_pages_about_people_fit_and_say_what_their_controls_are(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        project = seed.lived_in(session, size=12)
        seed.person(session, f"{'long' * 15}@{'example' * 8}.org", "reviewer", project.id)
    page = open_as("boss@example.org", "/", "admin")
    page.goto("/keys")
    page.get_by_label("What it is for").fill("a key with a rather long name " * 5)
    page.get_by_role("checkbox", name="infer").check()
    page.get_by_role("button", name="Make the key").click()
    expect(page.locator("#secret")).to_contain_text("wh_")
    with sessions() as session:
        boss = people.find_user(session, "boss@example.org").id
        longest = session.scalars(select(UserAccount.id).where(UserAccount.email.like("long%"))).one()
    for path in ("/people", f"/people/{boss}", f"/people/{longest}", "/keys", "/audit", "/account",
                 "/p/entities/people", "/p/entities/keys"):  # fmt: skip
        page.goto(path)
        for width, height in ((1280, 720), (834, 1112)):
            page.set_viewport_size({"width": width, "height": height})
            wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wider <= 0, (path, width, wider)
        assert page.evaluate(NAMELESS) == [], path
    page.goto("/audit")
    expect(page.locator("main")).to_contain_text("chain verified", timeout=10_000)
