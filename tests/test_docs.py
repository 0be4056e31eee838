"""What README and docs name must exist: commands, make targets, endpoints, settings, files, the main path."""

import re
from pathlib import Path

import pytest
from starlette.routing import Route
from typer.main import get_command

from services.admin import api
from services.console import setup
from services.gateway.routes import ROUTES as gateway_routes
from services.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
README = (ROOT / "README.md").read_text()
UNPREFIXED = {"database_url": "DATABASE_URL", "redis_url": "REDIS_URL"}


def names(pattern: str) -> list[tuple[str, str]]:
    """(page, match) for every place any page matches the pattern."""
    found = {(page.name, match) for page in PAGES for match in re.findall(pattern, page.read_text())}
    return sorted(found)


def whet_commands() -> set[str]:
    from services.cli import app

    found: set[str] = set()
    for name, command in getattr(get_command(app), "commands", {}).items():
        found.add(name)
        found |= {f"{name} {sub}" for sub in getattr(command, "commands", {})}
    return found


def test_every_whet_command_named_in_the_docs_exists() -> None:
    verbs = "build|show|add|link|create|revoke|list|rotate|role|remove|disable|enable|delete|sessions|end|verify|export"
    named = names(rf"(?m)(?:^|`)whet ([a-z]+(?: (?:{verbs})\b)?)")
    assert len(named) > 10
    known = whet_commands()
    assert [(page, name) for page, name in named if name not in known] == []


def test_every_make_target_named_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = names(r"(?m)(?:^|`)make ([a-z]+)\b")
    assert named
    assert [(page, name) for page, name in named if name not in targets] == []


def test_the_settings_table_is_the_settings() -> None:
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| [^|]*\| ([^|]+?) \|$", README, re.MULTILINE))
    expected = {
        UNPREFIXED.get(name, f"WHET_{name.upper()}"): field.description for name, field in Settings.model_fields.items()
    }
    assert table == expected


def test_every_endpoint_named_in_the_docs_is_routed(routes: set[tuple[str, str]]) -> None:
    named = names(r"`((?:GET|POST|PATCH|PUT|DELETE) /[^\s`?]*)`")
    assert len(named) >= 4
    missing = [(page, name) for page, name in named if tuple(name.split(" ", 1)) not in routes]
    assert missing == []


@pytest.fixture(scope="module")
def routes() -> set[tuple[str, str]]:
    routers = [
        *(route for router in setup.ROUTERS for route in router.routes),
        *(route for part in (api.router, *api.PARTS) for route in part.routes),
    ]
    return {
        (method, route.path)
        for route in (*gateway_routes, *routers)
        if isinstance(route, Route)
        for method in route.methods or ()
    }


def test_every_file_named_in_the_docs_exists() -> None:
    named = names(r"[`(]((?:engine|services|worker|examples|tests|docs|benchmarks|migrations|web)/[\w./-]+)[`)]")
    assert len(named) > 10
    assert [(page, path) for page, path in named if not (ROOT / path).exists()] == []


def test_the_main_path_is_the_same_in_readme_and_map() -> None:
    rows = re.compile(r"^\| ([^|]+) \| (`[\w/.]+`) \|$", re.MULTILINE)
    in_readme = rows.findall(README.split("## The main path")[1].split("\n## ")[0])
    in_map = rows.findall((ROOT / "docs/architecture.md").read_text().split("## The main path")[1].split("\n## ")[0])
    assert len(in_map) >= 14
    assert in_readme == in_map
