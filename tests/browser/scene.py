"""What a walk through the console's pages stops at."""

from collections.abc import Callable
from typing import NamedTuple

from playwright.sync_api import Page

HERE = "/p/entities"
BOSS = "boss@example.org"
NOBODY = ""
FORGET_DRAFTS = """() => Object.keys(localStorage).filter((key) => key.includes(":draft:"))
  .forEach((key) => localStorage.removeItem(key))"""


class Scene(NamedTuple):
    """A page, what is done on it before it is looked at, and who looks: NOBODY is somebody who is not signed in."""

    name: str
    path: str
    steps: Callable[[Page], object] = lambda _: None
    email: str = BOSS


def visit(page: Page, scene: Scene) -> None:
    """Show a scene, from a page of the same console; what was drafted in another one is forgotten."""
    page.evaluate(FORGET_DRAFTS)
    answer = page.goto(scene.path)
    assert answer is not None
    assert answer.status < 500, f"{scene.name}: {answer.status}"
    scene.steps(page)
