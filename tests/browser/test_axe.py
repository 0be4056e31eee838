"""Every page can be used by everybody: axe-core finds nothing serious in either theme."""

import hashlib

import pytest
from playwright.sync_api import Page

from services.store.base import Sessions
from tests.browser import axe, world, world_data
from tests.browser.conftest import OpenAs
from tests.browser.scene import visit

OF_COLOUR = ("color-contrast", "link-in-text-block")


def test_the_checker_is_the_published_one() -> None:
    listed = dict(line.split("  ")[::-1] for line in (axe.VENDOR / "MANIFEST.sha256").read_text().splitlines())
    assert set(listed) == {path.name for path in axe.VENDOR.iterdir()} - {"MANIFEST.sha256"}
    for name, digest in listed.items():
        assert hashlib.sha256((axe.VENDOR / name).read_bytes()).hexdigest() == digest


@pytest.mark.timeout(900)  # eighty pages
def test_no_page_shuts_anybody_out(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        scenes = world.build(session)
    looking: dict[str, Page] = {}
    found = []
    with world_data.meaning():
        for scene in scenes:
            if scene.email not in looking:
                looking[scene.email] = open_as(scene.email, "/", None)
                looking[scene.email].emulate_media(reduced_motion="reduce")
            page = looking[scene.email]
            visit(page, scene)
            found += [f"{scene.name}: {fault}" for fault in axe.grave(page)]
            seen = page.locator("html").get_attribute("data-theme")
            other = {"light": "dark", "dark": "light"}[str(seen)]
            page.evaluate("theme => document.documentElement.dataset.theme = theme", other)
            found += [f"{scene.name}, {other}: {fault}" for fault in axe.grave(page, *OF_COLOUR)]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_the_checker_sees_a_fault(open_as: OpenAs) -> None:
    page = open_as("boss@example.org", "/", "admin")
    page.evaluate("document.body.append(document.createElement('button'))")
    assert any("button-name" in fault for fault in axe.grave(page))
