"""The queue and live quality in a real Chromium: a lead changes the mix, and both themes can be read."""

import os
from pathlib import Path

import pytest
from playwright.sync_api import expect
from sqlalchemy import select

from services.store.base import Sessions
from services.store.models import Project
from tests.browser.conftest import OpenAs
from tests.console import seed, seed_queue

# Where the pictures go; nowhere unless somebody wants to look at them.
PICTURES = os.environ.get("QUEUE_PICTURES", "")


@pytest.fixture
def busy(sessions: Sessions) -> None:
    with sessions.begin() as session:
        seed_queue.queued(session, seed.project(session))
        seed.project(session, "young", "Young")


def test_a_lead_changes_the_mix_by_keyboard_and_is_told_when_the_shares_do_not_add_up(
    busy: None, sessions: Sessions, open_as: OpenAs
) -> None:
    page = open_as("lea@example.org", "/p/entities/queue", "lead")
    save = page.get_by_role("button", name="Save the mix")
    novelty = page.get_by_label("Novelty")

    novelty.fill("15")
    expect(page.locator("[data-mix-sum]")).to_contain_text("add up to 105 %")
    expect(save).to_be_disabled()
    page.get_by_label("Uniform audit").fill("20")
    expect(save).to_be_enabled()
    page.get_by_label("Prompts asked again").fill("1.5")
    page.get_by_label("Prompts asked again").press("Enter")
    expect(page.locator(".mix-table")).to_contain_text("20 %")

    with sessions() as session:
        config = session.scalars(select(Project).where(Project.slug == "entities")).one().config
    assert config["strategy_mix"]["novelty"] == 0.15
    assert config["strategy_mix"]["uniform"] == 0.2
    assert config["second_share"] == 0.015


def test_the_browser_itself_refuses_an_audit_below_its_lock(busy: None, sessions: Sessions, open_as: OpenAs) -> None:
    page = open_as("lea@example.org", "/p/entities/queue", "lead")
    page.get_by_label("Uniform audit").fill("15")
    page.get_by_label("Novelty").fill("20")
    page.get_by_role("button", name="Save the mix").click()

    assert page.get_by_label("Uniform audit").evaluate("(one) => !one.validity.valid")
    with sessions() as session:
        assert "strategy_mix" not in session.scalars(select(Project).where(Project.slug == "entities")).one().config


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_queue_and_quality_fit_their_frame_in_both_themes(busy: None, open_as: OpenAs, theme: str) -> None:
    page = open_as("boss@example.org", "/", "admin")
    page.evaluate(f"localStorage.setItem('whet:theme', '{theme}')")
    for name, path in (("queue", "/p/entities/queue"), ("overview", "/p/entities"), ("young", "/p/young/queue")):
        for width, height in ((1280, 720), (834, 1112)):
            page.set_viewport_size({"width": width, "height": height})
            page.goto(path)
            wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wider <= 0, (path, width)
            if PICTURES:
                page.screenshot(path=Path(PICTURES) / f"{name}-{theme}-{width}.png", full_page=True)
        expect(page.locator("h1")).to_be_visible()
    page.goto("/p/entities")
    expect(page.get_by_role("region", name="Live quality")).to_contain_text("were right as they stood")
