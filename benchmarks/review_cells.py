"""What is measured of the console: each function one cell, times in milliseconds as a client sees them."""

import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import httpx
import numpy as np
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from benchmarks.review_platform import Served, ids_on
from benchmarks.review_world import REVIEWERS, reviewer_email
from services.store.base import Base, Sessions
from services.store.models import Dataset, Interaction, InteractionBody, Project, Revision
from worker.curation.build import build_revision

SLUG = "chat"
# Warms the process, and nothing that is kept for SLUG.
OTHER = "match"
FILTERS = (
    "feedback=negative", "feedback=none", "verdict=correct", "verdict=waiting", "verdict=skip", "split=held_out",
    "finish=error", "user=user-77", "session=session-1234", "tag=app", "drafted=no", "window=day",
    "window=week&feedback=positive",
)  # fmt: skip
# Nothing fits, or only what is weeks old, and no index knows: the list stops looking and says how far it came.
RARE = ("digest=base", "tag=nothing", "confidence=low", "origin=cached")
# How long a simulated reviewer looks at an item: shorter than any person.
LOOK_SECONDS = 0.25
# The page takes no verdict of an item that was shown for less.
SEEN_MS = 300

Cell = dict[str, Any]


def summary(times: Sequence[float], **more: object) -> Cell:
    """Median, 95th percentile and the slowest, in ms."""
    p50, p95 = np.percentile(times, [50, 95])
    return {"n": len(times), "p50": round(float(p50), 1), "p95": round(float(p95), 1),
            "max": round(max(times), 1), **more}  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    """Milliseconds it takes."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


# --- search -----------------------------------------------------------------------------------------------


def searches(sessions: Sessions, count: int, seed: int) -> list[str]:
    """What people type, made of answers in the log: a word, several, a phrase, a beginning, a word nobody said."""
    dice = random.Random(seed)
    with sessions() as session:
        project = session.scalars(select(Project).where(Project.slug == SLUG)).one()
        texts = session.scalars(
            select(InteractionBody.output).where(InteractionBody.project_id == project.id).limit(2000)
        ).all()
    made = []
    for number in range(count):
        words = [word.strip('.,;:"') for word in dice.choice(texts).split() if word.strip('.,;:"').isalnum()]
        start = dice.randrange(max(1, len(words) - 4))
        kind = number % 6
        made.append(
            (
                dice.choice(words), " ".join(dice.sample(words, 2)), " ".join(dice.sample(words, 3)),
                f'"{" ".join(words[start : start + 3])}"', dice.choice(words)[:4], f"zz{dice.randrange(10**6)}",
            )[kind]
        )  # fmt: skip
    return made


def search(served: Served, sessions: Sessions, mode: str, count: int, **filters: str) -> Cell:
    """First pages of the interactions list by one mode, over HTTP."""
    times, shown, note = [], [], 0
    with served.client(reviewer_email(0)) as client:
        for words in searches(sessions, count, seed=len(mode)):
            began = time.perf_counter()
            answer = client.get(f"/p/{SLUG}/interactions", params={"q": words, "mode": mode, **filters})
            times.append((time.perf_counter() - began) * 1000)
            answer.raise_for_status()
            shown.append(ids_on(answer.text))
            note += "Searched by words alone" in answer.text
    assert not note, f"{note} searches by {mode} fell back to words"
    return summary(times, shown=float(np.mean(shown)))


# --- pages ------------------------------------------------------------------------------------------------


def page(served: Served, path: str, count: int, slug: str = SLUG) -> Cell:
    """One page again and again; `first` is with no figure kept by the console, though not the first page it makes."""
    with served.client(reviewer_email(0)) as client:
        client.get(f"/p/{OTHER}{path if slug == SLUG else '/datasets'}").raise_for_status()
        times = [timed(lambda: client.get(f"/p/{slug}{path}").raise_for_status()) for _ in range(count)]
    return summary(times, first=round(times[0], 1))


def filtered(served: Served, filters: Sequence[str], count: int) -> Cell:
    """The list narrowed without words, by each of `filters` in turn; `slowest` says which took longest."""
    taken: dict[str, list[float]] = {}
    with served.client(reviewer_email(0)) as client:
        for number in range(count):
            chosen = filters[number % len(filters)]
            spent = timed(lambda chosen=chosen: client.get(f"/p/{SLUG}/interactions?{chosen}").raise_for_status())
            taken.setdefault(chosen, []).append(spent)
    slowest = max(taken, key=lambda name: max(taken[name]))
    return summary([one for times in taken.values() for one in times], slowest=slowest)


def one_page(served: Served, sessions: Sessions, count: int) -> Cell:
    """Pages of single interactions, drawn from the whole log."""
    dice = random.Random(1)
    with sessions() as session:
        project = session.scalars(select(Project).where(Project.slug == SLUG)).one()
        own = select(Interaction.id).where(Interaction.project_id == project.id).limit(1)
        oldest, newest = (session.scalars(own.order_by(key)).one() for key in (Interaction.id, Interaction.id.desc()))
        ids = [_near(session, project.id, uuid.UUID(int=dice.randrange(oldest.int, newest.int))) for _ in range(count)]
    with served.client(reviewer_email(0)) as client:
        client.get(f"/p/{SLUG}/interactions/{newest}").raise_for_status()
        return summary([timed(lambda one=one: client.get(f"/p/{SLUG}/interactions/{one}").raise_for_status())
                        for one in ids])  # fmt: skip


def _near(session: Session, project_id: uuid.UUID, point: uuid.UUID) -> uuid.UUID:
    found = select(Interaction.id).where(Interaction.project_id == project_id, Interaction.id <= point)
    return session.scalars(found.order_by(Interaction.id.desc()).limit(1)).one()


# --- review -----------------------------------------------------------------------------------------------


def submits(served: Served, each: int) -> Cell:
    """Judgements of eight people at once, each over a connection of their own."""
    times: list[float] = []
    errors: list[str] = []
    gate = threading.Barrier(REVIEWERS)

    def judge(number: int) -> None:
        with served.client(reviewer_email(number)) as client:
            gate.wait()
            done = 0
            while done < each:
                leased = client.post(f"/p/{SLUG}/review/lease", json={"count": 5}).json()["items"]
                if not leased:
                    return
                for item in leased:
                    time.sleep(LOOK_SECONDS)
                    times.append(timed(lambda item=item: _submit(client, item, errors)))
                    done += 1

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(REVIEWERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[:3]
    return summary(times, reviewers=REVIEWERS)


def _submit(client: httpx.Client, item: dict[str, Any], errors: list[str]) -> None:
    sent = {"verdict": "accept", "lease_token": item["lease_token"], "idempotency_key": uuid.uuid4().hex}
    answer = client.post(f"/p/{SLUG}/review/items/{item['id']}/annotations", json=sent)
    if answer.status_code != 201:
        errors.append(f"{answer.status_code}: {answer.text[:200]}")


class Felt(NamedTuple):
    """What one person at one browser waits for."""

    next_item: Cell
    first_load: Cell


ANSWER = "[data-response]:not(:empty)"
# From the key to the frame in which the next answer is painted.
WAIT_FOR_NEXT = """
() => new Promise((resolve) => {
  const shown = document.querySelector("[data-response]");
  const before = shown.textContent;
  let began = 0;
  document.addEventListener("keydown", (event) => { if (event.key === "Enter") began ||= performance.now(); },
    { capture: true });
  const look = () => {
    if (began && shown.textContent !== before)
      requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - began)));
    else requestAnimationFrame(look);
  };
  look();
  window.ready = true;
})
"""


def felt(served: Served, items: int, loads: int) -> Felt:
    """The review page in a real browser: from Enter to the next answer on the screen, and from nothing to the first."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_chromium(), args=["--no-sandbox"])
        context, page = _signed_in(browser, served)
        moves = []
        for _ in range(items):
            page.wait_for_timeout(SEEN_MS)
            waiting = page.evaluate_handle(f"window.next = ({WAIT_FOR_NEXT})(); 0")
            waiting.dispose()
            page.keyboard.press("a")
            page.keyboard.press("Enter")
            moves.append(float(page.evaluate("window.next")))
        state = context.storage_state()
        context.close()
        first = [_load(browser, served, state) for _ in range(loads)]
        browser.close()
    return Felt(summary(moves), summary(first))


def _signed_in(browser: Browser, served: Served) -> tuple[BrowserContext, Page]:
    context = browser.new_context(base_url=served.url, viewport={"width": 1280, "height": 720})
    page = context.new_page()
    page.goto(served.link(reviewer_email(REVIEWERS - 1)))
    page.get_by_role("button", name="Sign in").press("Enter")
    page.wait_for_url(f"{served.url}/")
    page.goto(f"/p/{SLUG}/review")
    page.locator(ANSWER).wait_for()
    return context, page


def _load(browser: Browser, served: Served, state: Any) -> float:  # noqa: ANN401 - Playwright's own
    """A fresh context has nothing in its cache."""
    context = browser.new_context(base_url=served.url, storage_state=state)
    page = context.new_page()
    page.goto(f"/p/{SLUG}/review", wait_until="commit")
    page.locator(ANSWER).wait_for()
    taken = float(page.evaluate("performance.now()"))
    context.close()
    return taken


# --- golden data ------------------------------------------------------------------------------------------


def build(sessions: Sessions, slug: str) -> Cell:
    """One revision of everything judged in a project; rolled back, so that it can be measured again."""
    with sessions() as session:
        project = session.scalars(select(Project).where(Project.slug == slug)).one()
        began = time.perf_counter()
        revision = build_revision(session, project.id, "measured")
        seconds = time.perf_counter() - began
        examples = revision.train_count + revision.held_out_count
        session.rollback()
    return {"seconds": round(seconds, 1), "examples": examples}


def kept_revision(sessions: Sessions, slug: str) -> str:
    """The address of a project's newest revision, behind the project's; built when it has none."""
    with sessions.begin() as session:
        project = session.scalars(select(Project).where(Project.slug == slug)).one()
        own = select(Revision.digest).join(Dataset, Dataset.id == Revision.dataset_id)
        newest = own.where(Dataset.project_id == project.id).order_by(Revision.id.desc()).limit(1)
        digest = session.scalar(newest) or build_revision(session, project.id, "golden").digest
        return f"/datasets/golden/{digest}"


def rows(sessions: Sessions) -> dict[str, int]:
    """What the database held."""
    names = ("interaction", "review_item", "annotation", "interaction_embedding")
    with sessions() as session:
        return {name: session.scalar(select(func.count()).select_from(Base.metadata.tables[name])) or 0
                for name in names}  # fmt: skip


def _chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        raise FileNotFoundError("measuring what a reviewer feels takes a Chromium; none is installed")
    return found
