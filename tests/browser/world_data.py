"""What is found, changed at once, imported, pinned and erased, and a queue with a history."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from unittest.mock import patch

from playwright.sync_api import Page
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.console.embedder import Embedder
from services.store import bulk, datasets, embeddings, imports, saved_views
from services.store.bulk import Selection
from services.store.models import BulkAction, Interaction, Project, Revision, UserAccount
from services.store.search import Meaning, Search
from tests.browser.scene import BOSS, HERE, Scene
from tests.console import seed, seed_instant, seed_queue
from worker.curation.bulk import step

MODEL = "world/mean"
GOOD = b"prompt,completion\n" + b"".join(
    b'Text: %s was seen in Oslo.,"{""people"": [""%s""]}"\n' % (name, name)
    for name in (b"Anna Reed", b"Ivy Stone", b"Grace Moss")
)
BAD = b"prompt,completion\nText: Anna Reed was seen in Oslo.,\nText: Ivy Stone lives in Bergen.,{}\n"
LIST = f"{HERE}/interactions"


@contextmanager
def meaning() -> Iterator[None]:
    """An engine's vectors for what is typed into the search box, while this is entered: there is no engine here."""
    with patch.object(Embedder, "embed", lambda *_: Meaning([1.0, 0.0], MODEL)):
        yield


def build(session: Session, project: Project) -> list[Scene]:
    """Fill a project that is lived in, and say what there is to see."""
    boss = seed.person(session, BOSS, "admin").user
    seed_queue.queued(session, seed.project(session, "desk", "Support desk"), windows=20)
    golden = datasets.get(session, project.id, "golden")
    good, bad = (
        imports.begin(session, golden, name, content, BOSS)
        for name, content in (("corrections-of-last-year.csv", GOOD), ("broken.csv", BAD))
    )
    _immediate(session, project)
    action, failed = _bulk(session, project, boss)
    _searches(session, project, boss)
    digest = session.scalars(select(Revision.digest).order_by(Revision.id.desc()).limit(1)).one()
    revision = f"{HERE}/datasets/golden/{digest}"
    return [
        Scene("queue", "/p/desk/queue"),
        Scene("queue-young", "/p/young/queue"),
        Scene("datasets-young", "/p/young/datasets"),
        Scene("revision-mask", f"{revision}?view=mask"),
        Scene("revision-diff", f"{revision}/diff"),
        Scene("import", f"{HERE}/datasets/golden/import"),
        Scene("import-preview", f"{HERE}/datasets/golden/imports/{good.id}"),
        Scene("import-refused", f"{HERE}/datasets/golden/imports/{bad.id}"),
        Scene("pins", f"{HERE}/pins"),
        Scene("pins-young", "/p/young/pins"),
        Scene("erasure", f"{HERE}/erasure"),
        Scene("erasure-preview", f"{HERE}/erasure", _asked),
        Scene("erasure-young", "/p/young/erasure"),
        Scene("runs-young", "/p/young/runs"),
        Scene("interactions-words", f"{LIST}?q=report&mode=words&finish=stop"),
        Scene("interactions-meaning", f"{LIST}?q=news+about+mergers&mode=meaning"),
        Scene("interactions-ticked", LIST, _ticked),
        Scene("interactions-save", f"{LIST}?finish=length", _pressed("Save this view")),
        Scene("interactions-export", LIST, _pressed("Export")),
        Scene("bulk", f"{LIST}/bulk"),
        Scene("bulk-young", "/p/young/interactions/bulk"),
        Scene("bulk-preview", f"{LIST}/bulk?do=tag&tagged=checked&scope=all&finish=stop"),
        Scene("bulk-action", f"{LIST}/bulk/{action.id}"),
        Scene("bulk-action-failed", f"{LIST}/bulk/{failed.id}"),
    ]


def _immediate(session: Session, project: Project) -> None:
    """Pins that serve, were learned and withdrawn; erasures under way, failed and done."""
    project.config = project.config | {"pinned_answers": {"enabled": True}}
    answer = '{"people": ["Anna Reed"], "places": ["Oslo"], "organisations": [], "dates": ["2021-03-04"]}'
    seed_instant.pinned(session, project, answer)
    seed_instant.pinned(session, project, answer, state="learned", learned_digest="c" * 64)
    gone = {"state": "withdrawn", "reason": "the date was wrong", "withdrawn_by": "lea@example.org"}
    seed_instant.pinned(session, project, answer, **gone)
    seed_instant.erased(session, project, "customer-4711")
    seed_instant.erased(session, project, "session-of-somebody-with-a-long-name", kind="session", state="failed")
    counts = {"counts": {"interaction": 12, "interaction_body": 12, "feedback": 3}, "tainted": ["d" * 64]}
    seed_instant.erased(
        session, project, "sha256:" + "e" * 64, state="done", progress=counts, certificate={"format": 1, "hash": "0"}
    )


def _bulk(session: Session, project: Project, boss: UserAccount) -> tuple[BulkAction, BulkAction]:
    ids = list(session.scalars(select(Interaction.id).where(Interaction.project_id == project.id).limit(3)))
    chosen = Selection.frozen(Search(), ids)
    done = bulk.start(session, project.id, boss.id, "tag", {"name": "checked", "value": "yes"}, chosen, 3)
    while step(session, done.id):
        pass
    failed = bulk.start(session, project.id, boss.id, "withdraw", {}, chosen, 3)
    failed.state, failed.error, failed.seen = "failed", "finding these answers takes too long.", 1
    failed.changed, failed.finished_at = 1, datetime.now(UTC) - timedelta(minutes=4)
    session.flush()
    return done, failed


def _searches(session: Session, project: Project, boss: UserAccount) -> None:
    saved_views.save(session, project.id, boss.id, "Cut short", "finish=length", shared=True)
    saved_views.save(
        session, project.id, boss.id, "Thumbs down this week", "feedback=negative&window=week", shared=False
    )
    ids = list(session.scalars(select(Interaction.id).where(Interaction.project_id == project.id).limit(30)))
    vectors = {one: [0.99 - place / 100, 0.1] for place, one in enumerate(ids)}
    embeddings.add(session, project.id, MODEL, vectors)


def _pressed(name: str) -> Callable[[Page], object]:
    return lambda page: page.get_by_role("button", name=name, exact=True).first.click()


def _ticked(page: Page) -> None:
    for key in ("j", "x", "j", "x"):
        page.keyboard.press(key)
    page.locator("[data-bulk-do]").select_option("tag")


def _asked(page: Page) -> None:
    page.get_by_label("Kind").select_option("session")
    page.get_by_label("Name, as the app sent it").fill("session-3")
    page.get_by_role("button", name="Show what there is").click()
    page.locator("input[name=confirmed]").wait_for()
