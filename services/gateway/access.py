"""Who asks, and which weights they mean."""

import hmac
from collections.abc import Sequence
from typing import NamedTuple

from starlette.requests import Request

from services.errors import Forbidden, NotFound, Unauthenticated, Unavailable
from services.gateway.snapshot import KnownKey, KnownProject, Snapshot
from services.store import keys

SHOWN_MODELS = 20


class Target(NamedTuple):
    """A project and the adapters to try for it, best first; None stands for the base model.

    `pinned`: the caller named the artefact, so this is not the project's ordinary traffic. `arm` is "canary" or
    "control" while a candidate is on trial.
    """

    project: KnownProject
    candidates: tuple[str | None, ...]
    pinned: bool = False
    arm: str = "active"


def authenticate(request: Request, snapshot: Snapshot, pepper: bytes, scope: str) -> KnownKey:
    """The caller's key. Raises Unauthenticated, Forbidden without `scope`, Unavailable while keys are unknown."""
    plaintext = _bearer(request)
    if not snapshot.usable:
        raise Unavailable("the gateway has no current knowledge of API keys: the database is away")
    prefix = keys.prefix_of(plaintext)
    key = snapshot.keys.get(prefix) if prefix else None
    # An unknown id is compared too, so that timing does not tell which ids exist.
    given = keys.digest(pepper, plaintext)
    valid = hmac.compare_digest(given, key.hash if key else bytes(len(given)))
    if key is None or not valid or key.expired:
        raise Unauthenticated("this API key is unknown, expired or revoked")
    if scope not in key.scopes:
        raise Forbidden(f"this API key lacks the scope {scope!r}; it has {', '.join(sorted(key.scopes))}")
    return key


def _bearer(request: Request) -> str:
    scheme, _, plaintext = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not plaintext.strip():
        raise Unauthenticated("send an API key as `Authorization: Bearer wh_…`")
    return plaintext.strip()


def visible(snapshot: Snapshot, key: KnownKey) -> list[KnownProject]:
    """The projects a key may use, by slug."""
    return [
        project
        for _, project in sorted(snapshot.projects.items())
        if key.project_id is None or key.project_id == project.id
    ]


def resolve(snapshot: Snapshot, key: KnownKey, model: str) -> Target:
    """What `model` means to this key. Raises NotFound naming what the key may use.

    A slug means what the project serves now, then what was good last, then the base; `slug@digest` means that artefact
    and nothing else.
    """
    slug, pinned, digest = model.partition("@")
    project = find_project(snapshot, key, slug)
    if not pinned:
        return Target(project, tuple(dict.fromkeys((project.active, project.last_good, None))))
    if digest not in project.artifacts:
        raise NotFound(f"project {slug!r} has no artefact {digest[:80]!r}", code="model_not_found", param="model")
    return Target(project, (digest,), pinned=True)


def find_project(snapshot: Snapshot, key: KnownKey, slug: str) -> KnownProject:
    """A project by slug, as far as the key can see. Raises NotFound."""
    project = snapshot.projects.get(slug)
    if project is None or key.project_id not in (None, project.id):
        known = [project.slug for project in visible(snapshot, key)]
        raise NotFound(f"there is no model {slug[:80]!r}; {_listed(known)}", code="model_not_found", param="model")
    return project


def _listed(known: Sequence[str]) -> str:
    if not known:
        return "this key can use none yet"
    more = f" and {len(known) - SHOWN_MODELS} more" if len(known) > SHOWN_MODELS else ""
    return f"this key can use {', '.join(known[:SHOWN_MODELS])}{more}"
