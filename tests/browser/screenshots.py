"""`make screenshots`: every page of the console in both themes, of a small world made for it, as PNG files.

    python -m tests.browser.screenshots DIRECTORY [PART OF A NAME …]

With parts of names only the scenes that hold one are taken. Wide pictures are 1280 × 720 and as long as the page;
`-tablet` ones are 834 wide.
"""

import os
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page

from migrations.run import upgrade
from services.platform.accounts import server_account
from services.platform.paths import prepare_home, temporary_home
from services.platform.postgres import PostgresServer
from services.platform.process import Guarded
from services.settings import Settings
from services.store import partitions
from services.store.base import Sessions, make_sessions
from tests.browser import serving, world, world_data
from tests.browser.scene import Scene, visit
from tests.console import seed

SIZES = {"": (1280, 720), "-tablet": (834, 1112)}
THEMES = ("light", "dark")


def looking(browser: Browser, url: str, sessions: Sessions, email: str) -> Page:
    """A page of a fresh browser profile, where the person is signed in; "" is nobody."""
    page = browser.new_context(base_url=url).new_page()
    if email:
        with sessions.begin() as session:
            token = seed.person(session, email, None).token
        serving.sign_in(page, token)
    else:
        page.goto("/sign-in")
    return page


def take(page: Page, scene: Scene, directory: Path) -> None:
    """The scene's pictures. Steps are taken once; theme and size change under them."""
    page.set_viewport_size({"width": 1280, "height": 720})
    visit(page, scene)
    for suffix, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        for theme in THEMES:
            page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
            page.wait_for_timeout(60)
            page.screenshot(path=directory / f"{scene.name}{suffix}-{theme}.png", full_page=True, animations="disabled")


def main(directory: Path, wanted: list[str]) -> None:
    """Serve a new world from a throw-away home and walk through it."""
    directory.mkdir(parents=True, exist_ok=True)
    with temporary_home("whet-shots-") as home:
        prepare_home(home, home / "run", server_account())
        os.environ["WHET_HOME"] = str(home)
        server = PostgresServer(home / "postgres", home / "run", server_account(), durable=False)
        running = Guarded(server.part(), home / "logs" / "postgres.log")
        try:
            running.wait_ready()
            walk(server.create_database(), directory, wanted)
        finally:
            running.stop()


def walk(database_url: str, directory: Path, wanted: list[str]) -> None:
    """Every scene of a database that this fills."""
    upgrade(database_url)
    sessions = make_sessions(database_url)
    with sessions.begin() as session:
        partitions.ensure(session)
        scenes = world.build(session)
    pages: dict[str, Page] = {}
    with serving.console(Settings(), sessions) as url, serving.chromium() as browser, world_data.meaning():
        for scene in scenes:
            if not wanted or any(part in scene.name for part in wanted):
                if scene.email not in pages:
                    pages[scene.email] = looking(browser, url, sessions, scene.email)
                take(pages[scene.email], scene, directory)
                print(scene.name, flush=True)
    sessions.kw["bind"].dispose()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("say where: python -m tests.browser.screenshots DIRECTORY [PART OF A NAME …]")
    main(Path(sys.argv[1]), sys.argv[2:])
