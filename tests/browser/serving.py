"""The console in a thread of this process, on a port the system chose, and the browser that looks at it."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

from services.settings import Settings
from services.store.base import Sessions
from services.web import create_app


@contextmanager
def console(settings: Settings, sessions: Sessions) -> Iterator[str]:
    """Its address while it serves."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        config = uvicorn.Config(create_app(settings, sessions), log_level="warning", access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while not server.started and time.monotonic() < deadline:
                time.sleep(0.02)
            assert server.started
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium. Raises LookupError when there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        raise LookupError("this drives a real browser and found none: `make test` installs Chromium on Debian")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def sign_in(page: Page, token: str) -> None:
    """By a person's one-time link, as they do."""
    page.goto(f"/sign-in/{token}")
    page.get_by_role("button", name="Sign in").press("Enter")
    page.wait_for_url(lambda url: url.endswith("/") and "/sign-in" not in url)
