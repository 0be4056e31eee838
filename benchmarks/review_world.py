"""A large home to measure the console on: a million answers with their bodies, feedback, review items, judgements and
embeddings, by COPY into the Postgres of a home.

`python -m benchmarks.review_world --home DIR [--interactions 1000000]`. The texts come from the examples' grammars and
the seed decides all of them, so two worlds of one seed and size are alike. Rows go in day by day, and a day is
committed whole: cut short and started again, it goes on with the first day that is missing. Vectors are sums of random
words' vectors: as long and as spread as real ones, and as slow to search.
"""

import random
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psycopg
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from sqlalchemy import select
from sqlalchemy.orm import Session

from benchmarks.figures import STARTER
from benchmarks.review_bank import Bank
from benchmarks.review_platform import home_database
from benchmarks.review_rows import TAGS, Batch, World, add, copy
from engine.digest import base_digest
from engine.text.pooling import search_model, vector_rules
from examples.grammars.simulate import APPLICATIONS
from services.store import partitions, people, projects
from services.store.base import Sessions
from services.store.models import Project, ReviewItem, UserAccount

# Share of the traffic, and how many different answers each application's grammar is asked for.
SHARES = {"chat": 0.7, "entities": 0.2, "match": 0.1}
VARIETY = {"chat": 60_000, "entities": 2_500, "match": 4_000}
DAYS = 30
REVIEWERS = 8
# All judged: one where builds are measured and rolled back, one that keeps its revision for the pages to show.
GOLDEN, TAUGHT = "golden", "taught"
EMBEDDED = 100_000
CHUNK = 2_000


def fill(sessions: Sessions, *, interactions: int, review_items: int, seed: int, progress: Progress) -> World:
    """Bring a migrated database to this size; days that are there already are left as they are."""
    share = min(1.0, interactions / 200_000)
    bank = Bank(seed, {app: max(50, round(count * share)) for app, count in VARIETY.items()}, progress)
    with sessions.begin() as session:
        first = datetime.now(UTC) - timedelta(days=DAYS)
        partitions.ensure(session, since=first)
        world = World(
            seed, interactions, review_items, min(EMBEDDED, interactions),
            search_model(base_digest(STARTER), vector_rules(STARTER).for_search()),
            {app: _project(session, app).id for app in SHARES}, _reviewers(session), bank.tokenizer.digest,
        )  # fmt: skip
    connection = psycopg.connect(_conninfo(sessions))
    with connection:
        _write_days(connection, world, bank, progress)
    with psycopg.connect(_conninfo(sessions), autocommit=True) as own:
        task = progress.add_task("statistics", total=None)
        own.execute("VACUUM ANALYZE")
        progress.update(task, total=1, completed=1)
    return world


def _conninfo(sessions: Sessions) -> str:
    url = sessions.kw["bind"].url.render_as_string(hide_password=False)
    return str(url).replace("postgresql+psycopg://", "postgresql://", 1)


def _project(session: Session, app: str) -> Project:
    found = session.scalar(select(Project).where(Project.slug == app))
    config = {"tags": TAGS, "guidelines": APPLICATIONS[app].house_rule}
    return found or projects.create(session, app, app.capitalize(), config=config)


def _reviewers(session: Session) -> list[uuid.UUID]:
    made = []
    for number in range(REVIEWERS):
        email = reviewer_email(number)
        user = session.scalar(select(UserAccount).where(UserAccount.email == email))
        if user is None:
            user = people.create_user(session, email=email, name=f"Reviewer {number}")
            people.grant(session, user.id, "reviewer", None)
        made.append(user.id)
    return made


def reviewer_email(number: int) -> str:
    """Who reviews in this world, 0 to REVIEWERS - 1."""
    return f"reviewer{number}@example.org"


def fill_golden(sessions: Sessions, *, slug: str = GOLDEN, examples: int, seed: int, progress: Progress) -> None:
    """A project in which so many different answers were all judged: what a large revision is built of."""
    with sessions.begin() as session:
        found = session.scalar(select(Project).where(Project.slug == slug))
        config = {"tags": TAGS, "accepted_share": 1.0}
        made = found or projects.create(session, slug, slug.capitalize(), config=config)
        if session.scalar(select(ReviewItem.id).where(ReviewItem.project_id == made.id).limit(1)) is not None:
            return
        reviewers = _reviewers(session)
    bank = Bank(seed + 1, {"chat": examples}, progress)
    world = World(
        seed, examples, examples, 0, "", {"chat": made.id}, reviewers, bank.tokenizer.digest, judged=1.0
    )  # fmt: skip
    dice = random.Random(seed)
    yesterday = datetime.now(UTC) - timedelta(days=1)
    with psycopg.connect(_conninfo(sessions)) as connection:
        for first in range(0, examples, CHUNK):
            batch = Batch()
            for said in bank.said["chat"][first : first + CHUNK]:
                add(world, batch, dice, said, yesterday, None, embedded=False)
            copy(connection, batch)
    with psycopg.connect(_conninfo(sessions), autocommit=True) as own:
        own.execute("ANALYZE")


def _write_days(connection: psycopg.Connection[Any], world: World, bank: Bank, progress: Progress) -> None:
    task = progress.add_task("interactions", total=world.interactions)
    today = datetime.now(UTC).date()
    for index in range(DAYS):
        day = today - timedelta(days=DAYS - 1 - index)
        wanted = _of_day(world, index)
        if _has_day(connection, day):
            progress.advance(task, wanted)
            continue
        for batch in _day(world, bank, index, day, wanted):
            copy(connection, batch)
            progress.advance(task, len(batch.interactions))
        connection.commit()


def _of_day(world: World, index: int) -> int:
    """Answers of one day; today's are half as many, because the day is not over."""
    weights = [1.0] * (DAYS - 1) + [0.5]
    ends = np.round(np.cumsum(weights) / sum(weights) * world.interactions).astype(int)
    return int(ends[index] - (ends[index - 1] if index else 0))


def _has_day(connection: psycopg.Connection[Any], day: date) -> bool:
    low, high = partitions.bound(day), partitions.bound(day + timedelta(days=1))
    found = connection.execute("SELECT 1 FROM interaction WHERE id >= %s AND id < %s LIMIT 1", (low, high)).fetchone()
    return found is not None


def _day(world: World, bank: Bank, index: int, day: date, wanted: int) -> Iterator[Batch]:
    """One day's rows in order of time, its weights the newest adapter of its week."""
    dice = random.Random(f"{world.seed}/{index}")
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    length = min(timedelta(days=1), datetime.now(UTC) - start)
    moments = sorted(start + length * dice.random() for _ in range(wanted))
    digest = None if index < DAYS // 4 else f"{index * 4 // DAYS:x}" * 64
    before = sum(_of_day(world, other) for other in range(index))
    apps = dice.choices(list(SHARES), list(SHARES.values()), k=wanted)
    for first in range(0, wanted, CHUNK):
        batch = Batch()
        for position in range(first, min(first + CHUNK, wanted)):
            said = bank.said[apps[position]][dice.randrange(len(bank.said[apps[position]]))]
            embedded = world.interactions - before - position <= world.embedded
            add(world, batch, dice, said, moments[position], digest, embedded=embedded)
        yield batch


def bars() -> Progress:
    """How far it is, and how long it will take."""
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )


def main(
    home: Annotated[Path, typer.Option(help="The home whose Postgres is filled; made when it is not there.")],
    interactions: Annotated[int, typer.Option(min=100, help="How many answers.")] = 1_000_000,
    review_items: Annotated[int, typer.Option(min=0, help="How many of them were chosen for review.")] = 50_000,
    seed: Annotated[int, typer.Option(help="Worlds of one seed and size are alike.")] = 1,
) -> None:
    """Fill a home with a large, plausible log."""
    with home_database(home) as sessions, bars() as progress:
        fill(
            sessions, interactions=interactions, review_items=min(review_items, interactions), seed=seed,
            progress=progress,
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
