"""A small world in Postgres: a project, its reviewers, logged interactions, what was said and judged about them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.store import projects, reviews
from services.store.base import Sessions, uuid7, uuid7_time
from services.store.models import Feedback, Interaction, InteractionBody, Project, ReviewItem, UserAccount


@dataclass
class World:
    """Everything a test of the learning side starts from."""

    sessions: Sessions
    project_id: UUID
    reviewers: list[UUID]
    interactions: list[UUID] = field(default_factory=list)

    def log(
        self,
        prompt: str,
        output: str = "an answer",
        *,
        at: datetime | None = None,
        group: str | None = None,
        messages: Sequence[dict[str, Any]] | None = None,
        **fields: object,
    ) -> UUID:
        """One served interaction with its body."""
        interaction_id = uuid7((at or datetime.now(UTC)).timestamp())
        values: dict[str, Any] = {
            "project_id": self.project_id, "origin": "live", "base_digest": "base", "generation": 1, "namespace": "n",
            "endpoint": "/v1/chat/completions", "stream": False, "finish_reason": "stop", "prompt_tokens": 3,
            "completion_tokens": 2, "cached_tokens": 0, "drafted_tokens": 0, "accepted_tokens": 0,
            "group_key": group or prompt, "config_hash": "c", "started_at": uuid7_time(interaction_id),
        }  # fmt: skip
        body: dict[str, Any] = {
            "messages": list(messages or [{"role": "user", "content": prompt}]), "output": output,
            "parameters": fields.pop("parameters", {}), "prompt_token_ids": fields.pop("prompt_token_ids", []),
            "token_ids": fields.pop("token_ids", []), "token_logprobs": [], "prompt_hash": "p",
            "template_hash": fields.pop("template_hash", "t"),
            "tokenizer_hash": fields.pop("tokenizer_hash", "k"), "spool_version": 1,
        }  # fmt: skip
        with self.sessions.begin() as session:
            session.add(Interaction(id=interaction_id, **(values | fields)))
            session.add(InteractionBody(id=interaction_id, **body))
        self.interactions.append(interaction_id)
        return interaction_id

    def dislike(self, interaction_id: UUID) -> None:
        with self.sessions.begin() as session:
            session.add(
                Feedback(
                    project_id=self.project_id, interaction_id=interaction_id, idempotency_key=uuid4().hex, rating=-1
                )
            )

    def item(self, interaction_id: UUID, split: str = "train", **fields: object) -> UUID:
        """A review item made by hand, for tests that start after sampling."""
        with self.sessions.begin() as session:
            logged = session.scalars(select(Interaction).where(Interaction.id == interaction_id)).one()
            values: dict[str, Any] = {
                "strategy": "uniform", "window": "w", "stratum_size": 1, "priority": 0, "order_hash": "h",
                "group_key": logged.group_key, "overlap_target": 2 if split == "held_out" else 1, "state": "open",
            }  # fmt: skip
            item = ReviewItem(
                project_id=self.project_id, interaction_id=interaction_id, split=split, **(values | fields)
            )
            session.add(item)
            session.flush()
            return item.id

    def judge(
        self, item_id: UUID, verdict: str, correction: str | None = None, reviewer: int = 0, comment: str | None = None
    ) -> UUID:
        """One reviewer's judgement, through the queue's own functions. A lead who decides a dispute comments on it."""
        user_id = self.reviewers[reviewer]
        with self.sessions.begin() as session:
            item = session.get_one(ReviewItem, item_id)
            item.lease_user_id, item.lease_token = user_id, uuid4()
            item.lease_expires_at = datetime.now(UTC) + timedelta(minutes=1)
            session.flush()
            judgement = reviews.Judgement(verdict, uuid4().hex, correction=correction, comment=comment)
            token = item.lease_token
            return reviews.submit(session, self.project_id, item_id, user_id, token, judgement).annotation.id

    def undo(self, annotation_id: UUID, reviewer: int = 0) -> None:
        with self.sessions.begin() as session:
            reviews.undo(session, self.project_id, self.reviewers[reviewer], annotation_id)

    def corrected(self, prompt: str, output: str, correction: str, split: str = "train", **log: object) -> UUID:
        """An interaction that everyone needed has corrected alike."""
        item_id = self.item(self.log(prompt, output, **log), split)
        for reviewer in range(2 if split == "held_out" else 1):
            self.judge(item_id, "correct", correction, reviewer)
        return item_id

    def accepted(self, prompt: str, output: str, split: str = "train", **log: object) -> UUID:
        """An interaction that everyone needed has accepted."""
        item_id = self.item(self.log(prompt, output, **log), split)
        for reviewer in range(2 if split == "held_out" else 1):
            self.judge(item_id, "accept", reviewer=reviewer)
        return item_id

    def project(self, session: Session) -> Project:
        return session.get_one(Project, self.project_id)

    def configure(self, **config: object) -> None:
        with self.sessions.begin() as session:
            self.project(session).config = config


def make_world(sessions: Sessions, slug: str = "support", **config: object) -> World:
    """A project with two reviewers."""
    with sessions.begin() as session:
        project = projects.create(session, slug, config=config)
        people = [UserAccount(email=f"{name}@{slug}.example.com", name=name) for name in ("ada", "bela")]
        session.add_all(people)
        session.flush()
        return World(sessions, project.id, [person.id for person in people])
