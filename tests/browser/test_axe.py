"""Every page can be used by everybody: axe-core finds nothing serious in either theme."""

import hashlib

import pytest

from services.store.base import Sessions
from tests.browser import axe, world
from tests.browser.conftest import OpenAs


def test_the_checker_is_the_published_one() -> None:
    listed = dict(line.split("  ")[::-1] for line in (axe.VENDOR / "MANIFEST.sha256").read_text().splitlines())
    assert set(listed) == {path.name for path in axe.VENDOR.iterdir()} - {"MANIFEST.sha256"}
    for name, digest in listed.items():
        assert hashlib.sha256((axe.VENDOR / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_page_shuts_anybody_out(sessions: Sessions, open_as: OpenAs, theme: str) -> None:
    with sessions.begin() as session:
        scenes = world.build(session)
    page = open_as("boss@example.org", "/", "admin")
    page.evaluate(f"localStorage.setItem('whet:theme', '{theme}')")
    found = []
    for scene in scenes:
        world.visit(page, scene)
        assert page.locator("html").get_attribute("data-theme") == theme
        found += [f"{scene.name}: {fault}" for fault in axe.grave(page)]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_the_checker_sees_a_fault(open_as: OpenAs) -> None:
    page = open_as("boss@example.org", "/", "admin")
    page.evaluate("document.body.append(document.createElement('button'))")
    assert any("button-name" in fault for fault in axe.grave(page))
