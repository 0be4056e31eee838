"""Every page in a real Chromium, full of hostile text: nothing runs, nothing overflows, the buttons work."""

import random
from datetime import UTC, datetime

import pytest
from playwright.sync_api import Page, expect
from sqlalchemy import select

from services.store import deployments, project_settings, projects, webhook_deliveries
from services.store.base import Sessions
from services.store.models import Deployment, Interaction, Revision, Run
from tests.browser.conftest import OpenAs
from tests.browser.test_review_session import HOSTILE
from tests.console import seed, seed_instant, seed_learning, seed_rollout, seed_speed

LONG = "supercalifragilistic" * 40
NAMELESS = """
() => [...document.querySelectorAll("a, button, input, select, textarea")]
  .filter((one) => one.offsetParent && one.type !== "hidden")
  .filter((one) => !(one.ariaLabel || one.textContent.trim() || one.labels?.length || one.title || one.placeholder))
  .map((one) => one.outerHTML)
"""

# Closed and opened again within one frame: the field that was hidden still has the focus when the key comes.
AGAIN_AT_ONCE = """
() => {
  document.querySelector("dialog[open]").close();
  const hidden = document.activeElement;
  hidden.dispatchEvent(new KeyboardEvent("keydown", { key: "r", bubbles: true, cancelable: true }));
  return hidden.id;
}
"""


def paths(sessions: Sessions) -> list[str]:
    with sessions.begin() as session:
        project = seed.lived_in(session, size=16)
        seed_speed.sped_up(session, project, size=200)
        young = seed.project(session, "young", "Young")
        session.add(seed_speed.answer(young, datetime.now(UTC), random.Random(1), speculation=None, rate=90.0))
        baseline = session.scalars(select(Interaction.id).where(~Interaction.speculated).limit(1)).one()
        for output in [*HOSTILE, LONG]:
            logged = seed.interaction(
                session, project.id, output=output, messages=[{"role": "user", "content": output}], error=output,
                end_user=output, session_key=output, tags={output[:30]: output},
            )  # fmt: skip
            seed_instant.pinned(session, project, output)
            seed_instant.erased(session, project, output)
        project_settings.change(session, project, "gate", {"judge.rubric": LONG + "".join(HOSTILE)}, "user:nobody")
        run_ids = [str(one) for one in session.scalars(select(Run.id))]
        digest = session.scalars(select(Revision.digest).limit(1)).one()
        interaction = logged.id
        live = session.get_one(Deployment, project.id).active_digest
        learned = seed_learning.experienced(session)
        hook = seed_learning.told(session, project)[0]
        webhook_deliveries.send(session, hook, "run.finished", {"said": LONG + "".join(HOSTILE)})
    here = "/p/entities"
    return [
        "/", here, f"{here}/review", f"{here}/interactions", f"{here}/interactions?q=nothing-like-it",
        f"{here}/interactions/{interaction}", f"{here}/datasets", f"{here}/datasets/golden/{digest}", f"{here}/runs",
        *(f"{here}/runs/{one}" for one in run_ids), f"{here}/deployment", "/sign-in",
        f"{here}/interactions/{baseline}", "/p/young", "/p/young/deployment", f"{here}/pins", f"{here}/erasure",
        "/p/young/pins", f"{here}/interactions/{interaction}/lineage", f"{here}/artifacts/{live}", f"{here}/webhooks",
        f"{here}/webhooks/{hook.id}", f"/p/{learned.slug}", f"/p/{learned.slug}/deployment", "/p/young/webhooks",
        f"{here}/deployment/settings", f"{here}/evaluations/settings",
    ]  # fmt: skip


def test_no_page_breaks_its_frame_or_its_policy(sessions: Sessions, open_as: OpenAs) -> None:
    visited = paths(sessions)
    page = open_as("boss@example.org", "/", "admin")
    page.emulate_media(color_scheme="dark")
    for path in visited:
        page.goto(path)
        for width, height in ((1280, 720), (820, 1180)):
            page.set_viewport_size({"width": width, "height": height})
            wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wider <= 0, (path, width, wider)
        assert page.evaluate("window.violations") == [], path
        assert page.evaluate(NAMELESS) == [], path
        assert page.locator("html").get_attribute("data-theme") == "dark", path


def test_the_theme_chosen_stays_chosen(sessions: Sessions, open_as: OpenAs) -> None:
    page = open_as("boss@example.org", "/", "admin")
    before = page.locator("html").get_attribute("data-theme")
    page.locator("[data-theme-toggle]").click()
    page.reload()
    assert page.locator("html").get_attribute("data-theme") not in (None, before)


def test_roll_back_asks_first_then_shows_how_long_it_took(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        project = seed.lived_in(session, size=16)
    page = open_as("boss@example.org", "/p/entities/deployment", "operator")
    page.get_by_role("button", name="Roll back", exact=True).click()
    page.get_by_role("button", name="Keep serving").click()
    with sessions() as session:
        assert deployments.get(session, project.id).generation == 2
    page.get_by_role("button", name="Roll back", exact=True).click()
    page.get_by_label("Why").fill("worse answers")
    page.get_by_role("button", name="Roll back now").click()
    expect(page.locator(".toast")).to_contain_text("Rolled back in")
    expect(page.locator(".serving")).to_contain_text("The base model")
    expect(page.locator(".timeline")).to_contain_text("worse answers")
    with sessions() as session:
        assert deployments.get(session, project.id).generation == 3


def test_retiring_heads_asks_first_and_the_page_then_names_the_suffix_drafter(
    sessions: Sessions, open_as: OpenAs
) -> None:
    with sessions.begin() as session:
        project = seed.lived_in(session, size=16)
        seed_speed.sped_up(session, project, size=120)
    page = open_as("boss@example.org", "/p/entities/deployment", "operator")
    page.get_by_role("button", name="Retire to suffix", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Leave it").click()
    with sessions() as session:
        assert deployments.get(session, project.id).speculator_digest is not None
    page.get_by_role("button", name="Retire to suffix", exact=True).click()
    page.get_by_role("dialog").get_by_label("Why").fill("measured slower")
    page.get_by_role("dialog").get_by_role("button", name="Retire to suffix").click()
    expect(page.locator(".toast")).to_contain_text("Retired in")
    expect(page.locator(".timeline")).to_contain_text("measured slower")
    expect(page.get_by_role("button", name="Retire to suffix", exact=True)).to_have_count(0)
    with sessions() as session:
        assert deployments.get(session, project.id).speculator_digest is None


def test_a_wrong_setting_is_told_put_right_and_stored(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        seed.project(session)
    page = open_as("boss@example.org", "/p/entities/evaluations", "operator")
    page.get_by_role("link", name="How the gate scores").click()
    page.get_by_label("Margin in points").fill("2")
    page.get_by_label("Checks").fill('[{"name": "a policy"')
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#wrong-checks")).to_contain_text("This is no JSON")
    expect(page.get_by_label("Checks")).to_have_value('[{"name": "a policy"')
    page.get_by_label("Checks").fill('[{"name": "a policy", "must_match": "policy"}]')
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".note.ok")).to_contain_text("Stored.")
    expect(page.get_by_label("Margin in points")).to_have_value("2")
    with sessions() as session:
        config = projects.get(session, "entities").config
    assert config["checks"] == [{"name": "a policy", "must_match": "policy"}]


CONTRAST = """
() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const surface = light(parse(getComputedStyle(document.querySelector(".card")).backgroundColor));
  const of = (selector, property) => [...document.querySelectorAll(selector)]
    .map((one) => ratio(light(parse(getComputedStyle(one)[property])), surface));
  return {
    text: Math.min(...of(".speed-words p, .keys li, .keys span, .card > header span, .draft-bars span", "color"),
      ...of(".chart text", "fill")),
    drawn: Math.min(...of(".series-drafted .line, .series-plain .line", "stroke"),
      ...of(".fill-suffix, .fill-heads", "fill")),
  };
}
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_plots_can_be_read_in_both_themes(sessions: Sessions, open_as: OpenAs, theme: str) -> None:
    """WCAG AA: 4.5 to 1 for text, 3 to 1 for what is drawn."""
    with sessions.begin() as session:
        seed_speed.sped_up(session, seed.project(session), size=120)
    page = open_as("boss@example.org", "/", "viewer")
    page.evaluate(f"localStorage.setItem('whet:theme', '{theme}')")
    page.goto("/p/entities")
    assert page.locator("html").get_attribute("data-theme") == theme
    found = page.evaluate(CONTRAST)
    assert found["text"] >= 4.5
    assert found["drawn"] >= 3


def live_run(page: Page, sessions: Sessions) -> str:
    page.get_by_role("button", name="Train now").click()
    page.wait_for_url("**/runs/*-*")
    return page.url.rsplit("/", 1)[1]


def test_a_run_moves_on_its_page_without_a_reload(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        seed.project(session)
    page = open_as("lea@example.org", "/p/entities/runs", "lead")
    run_id = live_run(page, sessions)
    with sessions.begin() as session:
        run = session.scalars(select(Run)).one()
        assert str(run.id) == run_id
        seed.runs.enter_phase(session, run, "training")
        for step in range(1, 4):
            progress = {"steps": 9, "loss": 1.0 / step, "lr": 1e-3, "tokens_per_second": 100.0}
            seed.runs.add_event(session, run.id, "progress", progress, step=step)
    expect(page.locator(".step.now")).to_contain_text("Train", timeout=10_000)
    expect(page.locator(".chart").first).to_contain_text("0.3333")
    expect(page.locator("body")).to_contain_text("step 3 of 9")


def test_one_key_takes_a_canary_back_and_never_under_somebodys_hands(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        project = seed_rollout.on_trial(session)
    page = open_as("boss@example.org", f"/p/{project.slug}/deployment", "operator")
    page.keyboard.press("r")
    expect(page.get_by_role("dialog")).to_contain_text("off trial?")
    page.keyboard.type("rrr")
    assert page.get_by_label("Why").first.input_value() == "rrr"
    page.keyboard.press("Escape")
    with sessions() as session:
        assert deployments.get(session, project.id).canary_digest is not None
    page.keyboard.press("r")
    assert page.evaluate(AGAIN_AT_ONCE) == "reason"
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Enter")
    expect(page.locator(".toast")).to_contain_text("Rolled back in")
    expect(page.locator(".timeline")).to_contain_text("Canary rolled back")
    with sessions() as session:
        assert deployments.get(session, project.id).canary_digest is None
