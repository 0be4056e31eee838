"""The first start makes what is missing; the second changes nothing but the sign-in link."""

import json
import stat

import pytest
from sqlalchemy import func, select

from services.bootstrap import bootstrap, slug_of
from services.settings import Settings
from services.store import keys
from services.store.base import Sessions
from services.store.models import ApiKey, Deployment, Membership, Project, UserAccount


def counts(sessions: Sessions) -> dict[str, int]:
    with sessions() as session:
        tables = (Project, Deployment, ApiKey, UserAccount, Membership)
        return {table.__tablename__: session.scalar(select(func.count()).select_from(table)) or 0 for table in tables}


def test_the_first_start_makes_a_platform_somebody_can_use(settings: Settings, sessions: Sessions) -> None:
    screen = bootstrap(settings)
    path = settings.home / "credentials.json"
    written = json.loads(path.read_text())
    with sessions() as session:
        pepper = keys.load_pepper(settings)
        app, admin = (keys.find(session, pepper, written[name]) for name in ("app_key", "admin_key"))
        generations = session.execute(select(Deployment.generation, Deployment.active_digest)).all()
        guidelines = session.scalars(select(Project.config["guidelines"].astext)).all()
    assert screen.projects == ["chat", "entities", "match"]
    assert screen.app_key == written["app_key"]
    assert app is not None
    assert app.scopes == ["feedback", "infer"]
    assert admin is not None
    assert "admin" in admin.scopes
    assert generations == [(1, None)] * 3
    assert all(guidelines)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert screen.sign_in_url.startswith(f"{settings.console_url}/sign-in/")


def test_the_second_start_keeps_keys_projects_and_people(settings: Settings, sessions: Sessions) -> None:
    first = bootstrap(settings)
    before = counts(sessions)
    with sessions.begin() as session:
        session.scalars(select(Project).where(Project.slug == "chat")).one().config = {"guidelines": "ours"}
    second = bootstrap(settings)
    assert counts(sessions) == before
    assert second.app_key == first.app_key
    assert second.sign_in_url != first.sign_in_url
    with sessions() as session:
        assert session.scalars(select(Project).where(Project.slug == "chat")).one().config == {"guidelines": "ours"}


def test_keys_that_stopped_working_are_replaced(settings: Settings, sessions: Sessions) -> None:
    first = bootstrap(settings)
    with sessions.begin() as session:
        found = keys.find(session, keys.load_pepper(settings), first.app_key)
        assert found is not None
        keys.revoke(session, found.id)
    second = bootstrap(settings)
    assert second.app_key != first.app_key
    assert json.loads((settings.home / "credentials.json").read_text())["app_key"] == second.app_key


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2-5-0-5b-instruct"),
        ("/models/Tiny_Llama/", "tiny-llama"),
        ("___", "model"),
        ("x" * 80, "x" * 63),
    ],
)
def test_another_model_gives_its_name_to_a_project(model: str, slug: str) -> None:
    assert slug_of(model) == slug
