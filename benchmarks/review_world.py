"""A large home to measure the console on: a million answers with their bodies, feedback, review items, judgements and
embeddings, by COPY into the Postgres of a home.

`python -m benchmarks.review_world --home DIR [--interactions 1000000]`. The texts come from the examples' grammars and
the seed decides all of them, so two worlds of one seed and size are alike. Rows go in day by day, and a day is
committed whole: cut short and started again, it goes on with the first day that is missing. Vectors are sums of random
words' vectors: as long and as spread as real ones, and as slow to search.
"""

import json
import random
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import psycopg
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from sqlalchemy import select
from sqlalchemy.orm import Session

from benchmarks.figures import STARTER
from engine.digest import base_digest
from engine.text.pooling import search_model, vector_rules
from engine.text.tokenizer import Tokenizer
from examples.grammars.common import Example, stream
from examples.grammars.simulate import APPLICATIONS, review
from migrations.run import upgrade
from services.platform.accounts import server_account
from services.platform.paths import prepare_home
from services.platform.postgres import PostgresServer
from services.platform.process import Guarded
from services.store import partitions, people, projects
from services.store.base import Sessions, make_sessions
from services.store.models import Project, UserAccount

# Share of the traffic, and how many different answers each application's grammar is asked for.
SHARES = {"chat": 0.7, "entities": 0.2, "match": 0.1}
VARIETY = {"chat": 60_000, "entities": 2_500, "match": 4_000}
DAYS = 30
REVIEWERS = 8
JUDGED_SHARE = 0.6
GOLDEN = "golden"
DIMENSIONS = 256
EMBEDDED = 100_000
CHUNK = 2_000
NARROW = (
    "id", "project_id", "origin", "arm", "adapter_digest", "base_digest", "generation", "namespace", "endpoint",
    "stream", "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens", "drafted_tokens",
    "accepted_tokens", "ttft_ms", "latency_ms", "longest_gap_ms", "mean_logprob", "min_logprob", "session_key",
    "end_user", "group_key", "tags", "config_hash", "started_at", "finished_at",
)  # fmt: skip
WIDE = (
    "id", "project_id", "messages", "parameters", "output", "prompt_token_ids", "token_ids", "token_logprobs",
    "prompt_hash", "template_hash", "tokenizer_hash", "spool_version",
)  # fmt: skip
FEEDBACK = ("id", "project_id", "interaction_id", "idempotency_key", "rating", "comment", "author", "created_at")
ITEM = (
    "id", "project_id", "interaction_id", "strategy", "window", "stratum_size", "probability", "priority", "order_hash",
    "split", "group_key", "overlap_target", "state", "created_at", "done_at",
)  # fmt: skip
ANNOTATION = (
    "id", "project_id", "review_item_id", "interaction_id", "author_id", "idempotency_key", "verdict", "correction",
    "tags", "assisted", "active_ms", "created_at",
)  # fmt: skip
EMBEDDING = ("id", "project_id", "model", "vector")
TAGS = ["wrong kind", "missing entity", "date not split out", "bad JSON"]
BASE = "b" * 64

Row = tuple[Any, ...]


class Said(NamedTuple):
    """One answer of the bank with what a row needs: ids as JSON, ready for COPY."""

    app: str
    messages: list[dict[str, str]]
    text: str
    prompt_ids: str
    output: str
    output_ids: str
    prompt_tokens: int
    tokens: int
    vector: str
    corrected: str | None


@dataclass
class Batch:
    """Rows of every table that belong to one piece of a day."""

    interactions: list[Row]
    bodies: list[Row]
    feedback: list[Row]
    items: list[Row]
    annotations: list[Row]
    embeddings: list[Row]


@dataclass(frozen=True)
class World:
    """What is being filled."""

    seed: int
    interactions: int
    review_items: int
    embedded: int
    model: str
    projects: dict[str, uuid.UUID]
    reviewers: list[uuid.UUID]
    tokenizer_hash: str
    judged: float = JUDGED_SHARE

    def of_day(self, index: int) -> int:
        """Answers of one day; today's are half as many, because the day is not over."""
        weights = [1.0] * (DAYS - 1) + [0.5]
        ends = np.round(np.cumsum(weights) / sum(weights) * self.interactions).astype(int)
        return int(ends[index] - (ends[index - 1] if index else 0))


class Bank:
    """Distinct answers of each application, drawn from its grammar once and then again and again."""

    def __init__(self, seed: int, counts: Mapping[str, int], progress: Progress) -> None:
        self.tokenizer = Tokenizer.load(STARTER)
        self._words = np.random.default_rng(seed).standard_normal((4096, DIMENSIONS)).astype(np.float32)
        task = progress.add_task("answers", total=sum(counts.values()))
        self.said: dict[str, list[Said]] = {}
        for app, count in counts.items():
            examples = stream(APPLICATIONS[app], "train", seed)
            dice = random.Random(f"{seed}/{app}")
            self.said[app] = []
            for _ in range(count):
                self.said[app].append(self._made(next(examples), dice))
                progress.advance(task)

    def _made(self, example: Example, dice: random.Random) -> Said:
        output = example.house if dice.random() < 0.2 else example.base
        prompt = self.tokenizer.encode_chat(list(example.messages))
        answer = self.tokenizer.encode_plain(output)
        text = json.dumps(example.messages, ensure_ascii=False)
        corrected = review(example.app, example.messages, output).correction
        vector = self._vector(prompt + answer)
        return Said(
            example.app, example.messages, text, json.dumps(prompt), output, json.dumps(answer), len(prompt),
            len(answer), vector, corrected,
        )  # fmt: skip

    def _vector(self, ids: Sequence[int]) -> str:
        total = self._words[np.asarray(ids) % len(self._words)].sum(axis=0)
        unit = total / max(float(np.linalg.norm(total)), 1e-9)
        return "[" + ",".join(f"{value:.4f}" for value in unit.tolist()) + "]"


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


def fill_golden(sessions: Sessions, *, examples: int, seed: int, progress: Progress) -> None:
    """A project GOLDEN in which so many different answers were all judged: what a large revision is built of."""
    with sessions.begin() as session:
        if session.scalar(select(Project.id).where(Project.slug == GOLDEN)) is not None:
            return
        made = projects.create(session, GOLDEN, "Golden", config={"tags": TAGS, "accepted_share": 1.0})
        reviewers = _reviewers(session)
    bank = Bank(seed + 1, {"chat": examples}, progress)
    world = World(
        seed, examples, examples, 0, "", {"chat": made.id}, reviewers, bank.tokenizer.digest, judged=1.0
    )  # fmt: skip
    dice = random.Random(seed)
    yesterday = datetime.now(UTC) - timedelta(days=1)
    with psycopg.connect(_conninfo(sessions)) as connection:
        for first in range(0, examples, CHUNK):
            batch = Batch([], [], [], [], [], [])
            for said in bank.said["chat"][first : first + CHUNK]:
                _one(world, batch, dice, said, yesterday, None, embedded=False)
            _copy(connection, batch)
    with psycopg.connect(_conninfo(sessions), autocommit=True) as own:
        own.execute("ANALYZE")


def _write_days(connection: psycopg.Connection[Any], world: World, bank: Bank, progress: Progress) -> None:
    task = progress.add_task("interactions", total=world.interactions)
    today = datetime.now(UTC).date()
    for index in range(DAYS):
        day = today - timedelta(days=DAYS - 1 - index)
        wanted = world.of_day(index)
        if _has_day(connection, day):
            progress.advance(task, wanted)
            continue
        for batch in _day(world, bank, index, day, wanted):
            _copy(connection, batch)
            progress.advance(task, len(batch.interactions))
        connection.commit()


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
    before = sum(world.of_day(other) for other in range(index))
    apps = dice.choices(list(SHARES), list(SHARES.values()), k=wanted)
    for first in range(0, wanted, CHUNK):
        batch = Batch([], [], [], [], [], [])
        for position in range(first, min(first + CHUNK, wanted)):
            said = bank.said[apps[position]][dice.randrange(len(bank.said[apps[position]]))]
            embedded = world.interactions - before - position <= world.embedded
            _one(world, batch, dice, said, moments[position], digest, embedded=embedded)
        yield batch


def _one(
    world: World, batch: Batch, dice: random.Random, said: Said, at: datetime, digest: str | None, *, embedded: bool
) -> None:
    identity = _uuid7(at, dice)
    project = world.projects[said.app]
    session = f"session-{dice.randrange(1, max(2, world.interactions // 6))}"
    latency = dice.lognormvariate(5.2, 0.5)
    finish = dice.choices(("stop", "length", "cancelled", "error"), (94, 3, 2, 1))[0]
    drafted = round(said.tokens * dice.uniform(0.8, 1.4)) if dice.random() < 0.8 else 0
    logprobs = [round(-dice.expovariate(6.0), 3) for _ in range(said.tokens)]
    mean = sum(logprobs) / max(1, len(logprobs))
    batch.interactions.append(
        (
            identity, project, "live", "active", digest, BASE, 1, project.hex, "/v1/chat/completions", True, finish,
            said.prompt_tokens, said.tokens, 0, drafted, round(drafted * 0.6), dice.uniform(8, 60), latency,
            dice.uniform(4, 30), mean, min(logprobs, default=0.0), session,
            f"user-{dice.randrange(1, max(2, world.interactions // 40))}", session, '{"app": "benchmark"}', "c" * 64,
            at, at + timedelta(milliseconds=latency),
        )
    )  # fmt: skip
    batch.bodies.append(
        (
            identity, project, said.text, '{"temperature": 0.0, "max_tokens": 256}', said.output, said.prompt_ids,
            said.output_ids, json.dumps(logprobs), "p" * 64, "t" * 64, world.tokenizer_hash, 2,
        )
    )  # fmt: skip
    disliked = dice.random() < 0.03
    if disliked or dice.random() < 0.02:
        note = "this is not what I asked for" if disliked and dice.random() < 0.3 else None
        batch.feedback.append(
            (_uuid7(at, dice), project, identity, identity.hex, -1 if disliked else 1, note, "app", at)
        )
    if dice.random() < world.review_items / world.interactions:
        _reviewed(world, batch, dice, said, identity, at, "negative_feedback" if disliked else "uniform")
    if embedded and finish in ("stop", "length"):
        batch.embeddings.append((identity, project, world.model, said.vector))


def _reviewed(
    world: World, batch: Batch, dice: random.Random, said: Said, identity: uuid.UUID, at: datetime, strategy: str
) -> None:
    item, project = _uuid7(at + timedelta(hours=1), dice), world.projects[said.app]
    hour = at.replace(minute=0, second=0, microsecond=0)
    window = f"{hour:%Y-%m-%dT%H:%M:%SZ}/{hour + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    held_out = dice.random() < 0.2
    judged = dice.random() < world.judged
    done = at + timedelta(hours=dice.uniform(2, 20)) if judged else None
    batch.items.append(
        (
            item, project, identity, strategy, window, 200, 0.6 if judged else None, dice.randrange(200),
            f"{dice.getrandbits(256):064x}", "held_out" if held_out else "train", identity.hex, 2 if held_out else 1,
            "done" if judged else "open", at + timedelta(hours=1), done,
        )
    )  # fmt: skip
    if done is None:
        return
    verdict = "correct" if said.corrected is not None else "accept"
    tags = [dice.choice(TAGS)] if verdict == "correct" else []
    for author in dice.sample(world.reviewers, 2 if held_out else 1):
        made = _uuid7(done, dice)
        batch.annotations.append(
            (
                made, project, item, identity, author, made.hex, verdict, said.corrected, tags, False,
                dice.randrange(3_000, 40_000), done,
            )
        )  # fmt: skip


def _uuid7(at: datetime, dice: random.Random) -> uuid.UUID:
    value = int(at.timestamp() * 1000) << 80 | dice.getrandbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    return uuid.UUID(int=value & ~(0x3 << 62) | 0x2 << 62)


def _copy(connection: psycopg.Connection[Any], batch: Batch) -> None:
    for table, columns, rows in (
        ("interaction", NARROW, batch.interactions),
        ("interaction_body", WIDE, batch.bodies),
        ("feedback", FEEDBACK, batch.feedback),
        ("review_item", ITEM, batch.items),
        ("annotation", ANNOTATION, batch.annotations),
        ("interaction_embedding", EMBEDDING, batch.embeddings),
    ):
        quoted = ", ".join(f'"{name}"' for name in columns)
        with connection.cursor() as cursor, cursor.copy(f"COPY {table} ({quoted}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)


@contextmanager
def home_database(home: Path) -> Iterator[Sessions]:
    """The Postgres of a home, running and migrated; it stops again when the block ends."""
    home.mkdir(parents=True, exist_ok=True)
    prepare_home(home, home / "run", server_account())
    server = PostgresServer(home / "postgres", home / "run", server_account())
    running = Guarded(server.part(), home / "logs" / "postgres.log")
    try:
        running.wait_ready()
        url = server.create_database()
        upgrade(url)
        sessions = make_sessions(url)
        yield sessions
        sessions.kw["bind"].dispose()
    finally:
        running.stop()


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
