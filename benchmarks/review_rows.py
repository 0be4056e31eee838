"""The rows of the large world: an answer with its body, what people said of it, its place in the queue and its
judgements, and COPY to bring them in."""

import json
import random
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import psycopg

from benchmarks.review_bank import Said

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
JUDGED_SHARE = 0.6

Row = tuple[Any, ...]


@dataclass
class Batch:
    """Rows of every table that belong to one piece of a day."""

    interactions: list[Row] = field(default_factory=list)
    bodies: list[Row] = field(default_factory=list)
    feedback: list[Row] = field(default_factory=list)
    items: list[Row] = field(default_factory=list)
    annotations: list[Row] = field(default_factory=list)
    embeddings: list[Row] = field(default_factory=list)


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


def add(
    world: World, batch: Batch, dice: random.Random, said: Said, at: datetime, digest: str | None, *, embedded: bool
) -> None:
    """One answer given at that moment with these weights, in the tables it touches."""
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


def copy(connection: psycopg.Connection[Any], batch: Batch) -> None:
    """Into the transaction that is open."""
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
