"""How long a revision of N judged answers takes on one core: `python -m benchmarks.revision [ROWS]`.

Rows are made by COPY in a throw-away Postgres: prompts of a template with their own words, a fifth held out, half
corrected, three reviewers. Everything the worker does in "dataset.build" is timed, its commit included.
"""

import os
import random
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import text

from migrations.run import upgrade
from services.platform.accounts import server_account
from services.platform.paths import prepare_home, temporary_home
from services.platform.postgres import PostgresServer
from services.platform.process import Guarded
from services.store import datasets, partitions, projects, revision_diff, revisions
from services.store.base import Base, Sessions, make_sessions, uuid7
from services.store.copying import copy_rows
from services.store.models import UserAccount
from worker.curation.build import build_revision

ROWS = 50_000
WORDS = [
    f"{first}{last}" for first in ("al", "be", "cor", "du", "em", "fa") for last in ("na", "rik", "sto", "vi", "xu")
]
CHUNK = 5000


def main() -> None:
    """Print one line of figures."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    with temporary_home("whet-bench-") as home:
        prepare_home(home, home / "run", server_account())
        server = PostgresServer(home / "postgres", home / "run", server_account(), durable=False)
        running = Guarded(server.part(), home / "postgres.log")
        try:
            running.wait_ready()
            url = server.create_database("bench")
            upgrade(url)
            measure(make_sessions(url), rows)
        finally:
            running.stop()


def measure(sessions: Sessions, rows: int) -> None:
    """Fill the database, build twice (the second build finds the first's revision), rebuild."""
    project_id = fill(sessions, rows)
    took = []
    for _ in range(2):
        began = time.monotonic()
        with sessions.begin() as session:
            revision = build_revision(session, project_id, "golden")
        took.append(time.monotonic() - began)
    began = time.monotonic()
    with sessions() as session:
        assert revisions.rebuild(session, revision.id).digest == revision.digest
    rebuilt = time.monotonic() - began
    began = time.monotonic()
    with sessions.begin() as session:
        empty = revisions.create(session, datasets.get(session, project_id, "golden"), [], {})
        changes = len(revision_diff.explain(session, empty, revision).changes)
    explained = time.monotonic() - began
    kept = revision.train_count + revision.held_out_count
    print(
        f"{rows:,} judged answers, {kept:,} in the revision: built in {took[0]:.1f} s, built again unchanged in "
        f"{took[1]:.1f} s, rebuilt from its manifest in {rebuilt:.1f} s, {changes:,} changes explained in "
        f"{explained:.1f} s"
    )
    sessions.kw["bind"].dispose()


def fill(sessions: Sessions, rows: int) -> UUID:
    """A project with `rows` judged answers; its id."""
    dice = random.Random(5)
    with sessions.begin() as session:
        partitions.ensure(session, since=datetime.now(UTC) - timedelta(days=1))
        project = projects.create(session, "bench")
        people = [UserAccount(email=f"{name}@example.org", name=name) for name in ("ada", "grace", "edsger")]
        session.add_all(people)
        session.flush()
        reviewers, project_id = [person.id for person in people], project.id
    for start in range(0, rows, CHUNK):
        world = list(_answers(dice, project_id, reviewers, min(CHUNK, rows - start)))
        with sessions.begin() as session:
            for place, (name, columns) in enumerate(COLUMNS.items()):
                made = [row for answer in world for row in answer[place]]
                copy_rows(session, Base.metadata.tables[name], columns.split(), made)
        print(f"\r{start + len(world):,} of {rows:,} rows made", end="", file=sys.stderr)
    print(file=sys.stderr)
    with sessions.begin() as session:
        session.execute(text("ANALYZE"))  # as the server itself does, a minute later
    return project_id


COLUMNS = {
    "interaction": "id project_id origin base_digest generation namespace endpoint stream finish_reason prompt_tokens "
    "completion_tokens cached_tokens drafted_tokens accepted_tokens group_key config_hash started_at",
    "interaction_body": "id messages parameters output prompt_token_ids token_ids token_logprobs prompt_hash "
    "template_hash tokenizer_hash spool_version",
    "review_item": "id project_id interaction_id strategy window stratum_size priority order_hash split group_key "
    "overlap_target state",
    "annotation": "id project_id review_item_id interaction_id author_id idempotency_key verdict correction tags "
    "assisted",
}
Answer = tuple[list[tuple[object, ...]], ...]


def _answers(dice: random.Random, project_id: UUID, reviewers: list[UUID], count: int) -> Iterator[Answer]:
    """One answer's rows of each table at a time."""
    for _ in range(count):
        interaction_id, item_id, now = uuid7(), uuid7(), datetime.now(UTC)
        words = " ".join(dice.choices(WORDS, k=60))
        said, better = (" ".join(dice.choices(WORDS, k=40)) for _ in range(2))
        messages = [
            {"role": "system", "content": "You list every entity of a note as JSON, once each, in the text's order."},
            {"role": "user", "content": f"List the entities of this note, please. Note: {words}."},
        ]
        split = "held_out" if dice.random() < 0.2 else "train"
        judges = dice.sample(reviewers, 2 if split == "held_out" else 1)
        verdict = dice.choices(["correct", "accept", "reject"], [5, 4, 1])[0]
        interaction = (
            interaction_id, project_id, "live", "base", 1, "n", "/v1/chat/completions", False, "stop", 90, 60, 0, 0, 0,
            str(interaction_id), "c", now,
        )  # fmt: skip
        body = (interaction_id, messages, {}, said, [1] * 90, [2] * 60, [-0.5] * 60, "p", "t", "k", 1)
        item = (
            item_id, project_id, interaction_id, "uniform", "w", 1, 0, "h", split, str(interaction_id), len(judges),
            "done",
        )  # fmt: skip
        notes = [
            (
                uuid7(), project_id, item_id, interaction_id, judge, str(uuid7()), verdict,
                better if verdict == "correct" else None, [], False,
            )
            for judge in judges
        ]  # fmt: skip
        yield [interaction], [body], [item], notes


if __name__ == "__main__":
    main()
