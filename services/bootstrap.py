"""The first start, repeatable: partitions, projects, an administrator, keys, and a fresh sign-in link.

`python -m services.bootstrap` prints what the first screen needs as one line of JSON.
"""

import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from services.platform.paths import make_directories
from services.settings import Settings
from services.store import audit, keys, partitions, people, projects
from services.store.base import make_sessions
from services.store.models import SCOPES

ADMIN_EMAIL = "admin@localhost"
ACTOR = "whet up"


@dataclass(frozen=True)
class Starting:
    """A project as the first start makes it: what reviewers read beside an answer, and the tags they may give."""

    name: str
    guidelines: str = ""
    tags: tuple[str, ...] = ()


# The applications' grammars live in `examples`, which production code never imports.
STARTER_PROJECTS = {
    "match": Starting(
        name="Preference matching",
        guidelines="Does the offer suit the person, and why? The answer says whether it is a match, what the person "
        "wants and what the offer gives, and closes by naming the deciding criterion.",
        tags=("wrong verdict", "wrong criterion", "criterion not named", "wrong value", "invented"),
    ),
    "entities": Starting(
        name="Named entities",
        guidelines='JSON with the keys people, organisations, places, other and dates. Dates never go under "other": '
        "they have their own key and stand there as in the text.",
        tags=("missing entity", "wrong kind", "date not split out", "date changed", "invented", "not JSON"),
    ),
    "chat": Starting(
        name="Support desk",
        guidelines="One answer, right under the policy, polite and short. It cites the policy it follows by number.",
        tags=("wrong ruling", "no policy number", "wrong policy number", "unhelpful", "invented"),
    ),
}


@dataclass(frozen=True)
class Credentials:
    """What the CLI and the demo use; kept in `<home>/credentials.json`, readable by its owner only."""

    gateway_url: str
    console_url: str
    app_key: str
    admin_key: str


@dataclass(frozen=True)
class FirstScreen:
    """What `whet up` prints. `sign_in_url` works once."""

    sign_in_url: str
    app_key: str
    gateway_url: str
    console_url: str
    projects: list[str]


def bootstrap(settings: Settings) -> FirstScreen:
    """Bring the database and the home to a usable state; what exists already is kept as it is."""
    make_directories(settings.home)
    sessions = make_sessions(settings.database_dsn)
    with sessions.begin() as session:
        partitions.ensure(session)
        ensure_projects(session, settings.model)
        token = make_administrator(session)
        credentials = ensure_credentials(session, settings)
        slugs = projects.slugs(session)
    # After the commit: a file with keys that were rolled back would lock its reader out.
    write_credentials(settings.home / "credentials.json", credentials)
    sessions.kw["bind"].dispose()
    return FirstScreen(
        sign_in_url=f"{settings.console_url}/sign-in/{token}",
        app_key=credentials.app_key,
        gateway_url=settings.gateway_url,
        console_url=settings.console_url,
        projects=slugs,
    )


def ensure_projects(session: Session, model: str) -> None:
    """The starter model's three applications, or one project named after any other model."""
    existing = set(projects.slugs(session))
    wanted = STARTER_PROJECTS if model == "starter" else {slug_of(model): Starting(name=Path(model).name)}
    for slug, starting in wanted.items():
        if slug not in existing:
            config = {"guidelines": starting.guidelines, "tags": list(starting.tags)}
            made = projects.create(session, slug, starting.name, config=config)
            audit.record(session, ACTOR, "project.create", f"project:{made.id}", {"slug": slug})


def slug_of(model: str) -> str:
    """A project slug from a model id or path: its last part, lower case, hyphens for everything else."""
    slug = re.sub(r"[^a-z0-9]+", "-", Path(model).name.lower()).strip("-")[:63].strip("-")
    return slug or "model"


def make_administrator(session: Session) -> str:
    """The token of a one-time sign-in link for the administrator, whose account is made at the first start."""
    user = people.create_user(session, email=ADMIN_EMAIL, name="Administrator")
    if people.role_on(session, user.id, None) is None:
        people.grant(session, user.id, "admin")
    return people.make_sign_in_link(session, user.id)


def ensure_credentials(session: Session, settings: Settings) -> Credentials:
    """The keys of the last start while they still work, else new ones; with the addresses of this start."""
    known = read_credentials(settings.home / "credentials.json")
    pepper = keys.load_pepper(settings)

    def working(plaintext: str, name: str, scopes: tuple[str, ...]) -> str:
        if plaintext and keys.find(session, pepper, plaintext) is not None:
            return plaintext
        key, made = keys.create(session, pepper=pepper, name=name, scopes=scopes)
        audit.record(session, ACTOR, "key.create", f"key:{key.prefix}", {"name": name, "scopes": list(scopes)})
        return made

    return Credentials(
        gateway_url=settings.gateway_url,
        console_url=settings.console_url,
        app_key=working(known.get("app_key", ""), "first app", ("infer", "feedback")),
        admin_key=working(known.get("admin_key", ""), "whet CLI", SCOPES),
    )


def read_credentials(path: Path) -> dict[str, str]:
    """What an earlier start wrote; empty when there is none."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: delete it, and the next start makes new keys")  # noqa: TRY004 - file content
    return {str(name): str(value) for name, value in found.items()}


def write_credentials(path: Path, credentials: Credentials) -> None:
    """Replace the file at once, never readable by others."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(credentials), file, indent=2)
    draft.replace(path)


if __name__ == "__main__":
    json.dump(asdict(bootstrap(Settings())), sys.stdout)
