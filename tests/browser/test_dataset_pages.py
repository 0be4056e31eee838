"""Dataset pages in a real Chromium: a file becomes a preview, then examples; mask and drawing fit their frame."""

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from sqlalchemy import func, select

from services.store import datasets, revisions
from services.store.base import Sessions
from services.store.models import Example
from tests.browser.conftest import OpenAs
from tests.browser.test_review_session import HOSTILE
from tests.console import seed

SIZES = ((1280, 720), (834, 1112))


@pytest.fixture
def revision(sessions: Sessions) -> str:
    with sessions.begin() as session:
        project = seed.lived_in(session, size=24)
        dataset = datasets.get(session, project.id, "golden")
        found = revisions.latest(session, dataset.id)
        assert found is not None
        return f"/p/entities/datasets/golden/{found.digest}"


def fits(page: Page) -> None:
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wider <= 0, (page.url, width, wider)


def test_every_page_of_a_revision_fits_in_both_themes(revision: str, open_as: OpenAs) -> None:
    page = open_as("boss@example.org", "/", "admin")
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.evaluate("localStorage.removeItem('whet:theme')")
        for path in ("/p/entities/datasets", revision, f"{revision}?view=mask", f"{revision}/diff"):
            page.goto(path)
            assert page.locator("html").get_attribute("data-theme") == theme
            fits(page)
    page.goto(revision)
    page.get_by_role("button", name="Hash again").click()
    expect(page.get_by_role("heading", name="Still the same")).to_be_visible()
    page.goto(revision)
    page.get_by_role("button", name="Export").click()
    page.get_by_label("Form").select_option("unpaired")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename.endswith("-unpaired-train.jsonl")


def test_a_hostile_file_is_mapped_previewed_and_imported(
    revision: str, open_as: OpenAs, sessions: Sessions, tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    cells = [text.replace('"', '""').replace("\x00", "") for text in HOSTILE]
    file.write_text("wanted,said\n" + "".join(f'"{cell} ?","{cell} !"\n' for cell in cells), newline="")
    page = open_as("lead@example.org", "/p/entities/datasets", "lead")
    page.get_by_role("link", name="Import a file").click()
    page.get_by_label("File", exact=True).set_input_files(file)
    page.get_by_role("button", name="Preview").click()
    expect(page.get_by_role("alert")).to_contain_text("Say which column holds the prompt")
    expect(page.get_by_role("button", name="Import")).to_be_disabled()
    page.get_by_label("Prompt").select_option("wanted")
    page.get_by_label("Completion").select_option("said")
    page.get_by_role("button", name="Preview with these").click()
    expect(page.get_by_text("Every row can be imported.")).to_be_visible()
    fits(page)
    page.get_by_role("button", name="Import").click()
    expect(page.get_by_text("examples imported. The next build has them.")).to_be_visible()
    with sessions() as session:
        imported = select(func.count()).select_from(Example).where(Example.source == "imported")
        assert session.scalar(imported) == len(set(cells))
