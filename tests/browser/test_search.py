"""Searching in a real browser: found by keyboard, opened, back where one was, done in bulk and undone."""

import re

from playwright.sync_api import expect
from sqlalchemy import func, select

from services.store import bulk
from services.store.base import Sessions
from services.store.models import BulkAction, ReviewItem
from tests.browser.conftest import OpenAs
from tests.browser.test_review_session import HOSTILE
from tests.console import seed
from worker.curation.bulk import step


def work(sessions: Sessions) -> None:
    """What the worker does with the newest bulk action."""
    with sessions() as session:
        action_id = session.scalars(select(BulkAction.id)).one()
    more = True
    while more:
        with sessions.begin() as session:
            more = step(session, action_id)


def waiting(sessions: Sessions) -> int:
    with sessions() as session:
        return session.scalar(select(func.count()).select_from(ReviewItem)) or 0


def test_search_open_back_preview_act_and_undo(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        project = seed.project(session)
        for number in range(6):
            seed.interaction(session, project.id, output=f"needle number {number} {HOSTILE[number % len(HOSTILE)]}")
        seed.interaction(session, project.id, output="hay")
    page = open_as("lea@example.org", "/p/entities/interactions", "lead")
    keys = page.keyboard

    keys.press("/")
    keys.type("needle")
    keys.press("Enter")
    expect(page.locator("[data-list] tbody tr")).to_have_count(6)
    expect(page.locator("[data-list] mark").first).to_have_text("needle")
    page.get_by_label("Search by").select_option("words")
    address = re.compile(r"/interactions\?q=needle&mode=words$")
    page.wait_for_url(address)

    keys.press("j")
    keys.press("j")
    keys.press("k")
    keys.press("j")
    second = page.locator("[data-list] .row-link").nth(1)
    expect(second).to_be_focused()
    keys.press("Enter")
    expect(page.get_by_role("heading", name="One interaction")).to_be_visible()
    expect(page.locator("#raw-request")).to_contain_text('"model": "entities"')
    keys.press("u")
    page.wait_for_url(address)

    keys.press("j")
    keys.press("x")
    expect(page.locator("[data-picked]")).to_have_text("1")
    keys.press("j")
    keys.press("x")
    page.get_by_role("button", name="Preview").click()
    expect(page.locator("[data-changing]")).to_have_text("2")
    assert waiting(sessions) == 0
    page.get_by_role("button", name="Send to review").click()
    page.wait_for_url(re.compile(r"/interactions/bulk/[0-9a-f-]{36}$"))
    expect(page.locator(".pill")).to_have_text("queued")
    work(sessions)
    expect(page.locator(".pill")).to_have_text("done", timeout=5000)
    assert waiting(sessions) == 2
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".pill")).to_have_text("undoing")
    work(sessions)
    expect(page.locator(".pill")).to_have_text("undone", timeout=5000)
    assert waiting(sessions) == 0
    with sessions() as session:
        assert bulk.latest(session, project.id)[0].restored == 2


def test_a_view_is_saved_found_again_and_deleted(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        project = seed.project(session)
        seed.interaction(session, project.id, output="cut off", finish_reason="length")
        seed.interaction(session, project.id, output="whole")
    page = open_as("ada@example.org", "/p/entities/interactions", "viewer")
    page.get_by_label("Finish reason").select_option("length")
    page.wait_for_url("**finish=length**")
    page.get_by_role("button", name="Save this view").click()
    page.get_by_role("textbox", name="Name").fill("Cut off")
    page.get_by_role("button", name="Save view").click()
    page.get_by_role("link", name="Clear").click()
    expect(page.locator("[data-list] tbody tr")).to_have_count(2)
    page.get_by_role("link", name="Cut off", exact=True).click()
    expect(page.locator("[data-list] tbody tr")).to_have_count(1)
    expect(page.get_by_role("link", name="Cut off", exact=True)).to_have_attribute("aria-current", "true")


def test_an_export_is_downloaded_and_the_dialog_closes(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        project = seed.project(session)
        seed.interaction(session, project.id, output="=needle")
    page = open_as("lea@example.org", "/p/entities/interactions?q=needle&mode=words", "lead")
    page.get_by_role("button", name="Export").click()
    page.get_by_label("Format").select_option("csv")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert "'=needle" in download.value.path().read_text()
    expect(page.get_by_role("dialog")).to_have_count(0)
