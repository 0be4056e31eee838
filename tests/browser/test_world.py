"""The walk through the console's pages passes by every one of them."""

from fastapi.routing import APIRoute
from starlette.routing import Match

from services.console import setup
from services.store.base import Sessions
from tests.browser import world
from tests.console.conftest import NO_PAGES


def pages() -> list[APIRoute]:
    """The routes that answer with a whole page."""
    routes = [route for router in setup.ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    return [route for route in routes if "GET" in route.methods and route.path not in NO_PAGES]


def leads_to(path: str) -> APIRoute | None:
    """The page that an address shows, as the application itself would choose."""
    scope = {"type": "http", "method": "GET", "path": path.partition("?")[0]}
    return next((route for route in pages() if route.matches(scope)[0] is Match.FULL), None)


def test_every_page_of_the_console_has_a_scene(sessions: Sessions) -> None:
    with sessions.begin() as session:
        scenes = world.build(session)
    names = [scene.name for scene in scenes]
    assert len(set(names)) == len(names)
    shown = {route.path for scene in scenes if (route := leads_to(scene.path))}
    assert {route.path for route in pages()} - shown == set()


def test_what_is_called_no_page_still_exists() -> None:
    known = {route.path for router in setup.ROUTERS for route in router.routes if isinstance(route, APIRoute)}
    assert known >= NO_PAGES
