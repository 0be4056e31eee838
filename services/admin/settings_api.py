"""The admin API's part on settings that are changed key by key: how candidates reach traffic, how the gate scores."""

from typing import Any

from fastapi import APIRouter

from services.admin.access import Trainer
from services.store import project_settings
from services.store.project_settings import Part

router = APIRouter(prefix="/api/p/{slug}/settings")


@router.get("/{part}")
def show_settings(caller: Trainer, slug: str, part: Part) -> dict[str, Any]:
    """Every setting of `rollout` or `gate` by its flat name, defaults where nobody chose."""
    return project_settings.shown(caller.project(slug).config, part)


@router.put("/{part}")
def change_settings(caller: Trainer, slug: str, part: Part, sent: dict[str, Any]) -> dict[str, Any]:
    """Change those sent, null sets one back; 400 naming one that is unknown or out of range."""
    return project_settings.change(caller.session, caller.project(slug), part, sent, caller.actor)
