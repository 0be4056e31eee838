"""The console served on a free port, and a real Chromium that reports every violation of its content policy."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from services.settings import Settings
from services.store.base import Sessions
from tests.browser import serving
from tests.console import seed

# A shared machine may take seconds for what is instant elsewhere; what never comes still fails.
expect.set_options(timeout=20_000)

WATCH_POLICY = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""
OpenAs = Callable[..., Page]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Not for the whole session: while Playwright runs, so does its event loop, and asyncio.run() is refused."""
    try:
        with serving.chromium() as browser:
            yield browser
    except LookupError as error:
        pytest.fail(str(error))


@pytest.fixture
def console_url(sessions: Sessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The console in a thread of this process."""
    monkeypatch.setenv("WHET_HOME", str(tmp_path))
    with serving.console(Settings(), sessions) as url:
        yield url


@pytest.fixture
def open_as(chromium: Browser, console_url: str, sessions: Sessions) -> Iterator[OpenAs]:
    """`open_as("a@b.c", "/p/x/review")` signs a person in by their link and shows the page; "" is nobody.

    Afterwards: no script of a model's ran, no policy was violated, no page broke.
    """
    contexts: list[BrowserContext] = []
    pages: list[Page] = []
    trouble: list[str] = []

    def opened(email: str, path: str, role: str | None = "reviewer") -> Page:
        context = chromium.new_context(base_url=console_url, viewport={"width": 1280, "height": 720})
        contexts.append(context)
        context.add_init_script(WATCH_POLICY)
        page = context.new_page()
        pages.append(page)
        page.on("pageerror", lambda error: trouble.append(f"script error: {error}"))
        page.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        if email:
            with sessions.begin() as session:
                token = seed.person(session, email, role).token
            serving.sign_in(page, token)
        page.goto(path)
        return page

    yield opened
    for page in pages:
        trouble.extend(page.evaluate("window.violations"))
    for context in contexts:
        context.close()
    assert trouble == []
