"""The side of an interaction, train or held out: decided once, before anything is labelled, and never again.

A prompt that nearly repeats an earlier one goes where that one went, a group (session, user, template) stays where it
began, and what is new in both goes by a hash of its group. When a prompt's group is on one side and its near-duplicates
are on the other it goes to training, where a build leaves it out: no gate ever sees it twice.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

import numpy as np
from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.orm import Session
from sqlalchemy.sql.expression import literal
from sqlalchemy.types import BigInteger

from services.store.base import uuid7
from services.store.copying import among
from services.store.models import InteractionBody, PromptCluster, SplitGroup
from worker.curation.duplicates import THRESHOLD, Messages, Prompt, Sketch, Sketches, shingles

# An estimate from 64 permutations strays by 0.03: looser than the build's exact bar, which has the last word.
ESTIMATED_THRESHOLD = THRESHOLD - 0.05
# Beyond this many a cluster is a template rather than a question; only exact repeats still join.
MEMBERS_MOST = 20


class Chosen(NamedTuple):
    """An interaction chosen for review."""

    interaction_id: UUID
    group_key: str


class _Known(NamedTuple):
    cluster_id: UUID
    fingerprint: int
    sketch: Sketch
    split: str


def split_of(project_id: UUID, group_key: str, held_out_share: float) -> str:
    """The side of a group nothing is known about."""
    hashed = hashlib.sha256(f"split/{project_id}/{group_key}".encode()).digest()
    return "held_out" if int.from_bytes(hashed[:8]) < held_out_share * 2**64 else "train"


def assign(session: Session, project_id: UUID, chosen: Sequence[Chosen], held_out_share: float) -> dict[UUID, str]:
    """The side of every interaction. What was assigned before stays; what is new is remembered.

    The result depends on the order of the interactions' ids only. Callers hold the project's lock.
    """
    prompts = _prompts(session, [one.interaction_id for one in chosen])
    groups = _groups(session, project_id, sorted({one.group_key for one in chosen}))
    clusters = _Clusters(session, project_id, prompts)
    sides: dict[UUID, str] = {}
    for one in sorted(chosen, key=lambda each: each.interaction_id):
        prompt = prompts.get(one.interaction_id)
        near = clusters.find(prompt) if prompt else None
        group = groups.get(one.group_key)
        fresh = split_of(project_id, one.group_key, held_out_share)
        side = _side(near.split if near else None, group, fresh)
        sides[one.interaction_id] = side
        groups.setdefault(one.group_key, side)
        if prompt and near is None:
            clusters.begin(prompt, side)
    clusters.store()
    _remember(session, project_id, {one.group_key: groups[one.group_key] for one in chosen})
    return sides


def _side(near: str | None, group: str | None, fresh: str) -> str:
    """Where the prompt's near-duplicates and its group are; "train" when they are apart."""
    if near is None or group is None:
        return near or group or fresh
    return near if near == group else "train"


def _prompts(session: Session, ids: Sequence[UUID]) -> dict[UUID, Prompt]:
    rows = session.execute(select(InteractionBody.id, InteractionBody.messages).where(among(InteractionBody.id, ids)))
    return {interaction_id: prompt_of(messages) for interaction_id, messages in rows}


def prompt_of(messages: Messages) -> Prompt:
    return Prompt(shingles(messages))


def _groups(session: Session, project_id: UUID, keys: Sequence[str]) -> dict[str, str]:
    wanted = select(SplitGroup.group_key, SplitGroup.split).where(
        SplitGroup.project_id == project_id, among(SplitGroup.group_key, keys)
    )
    return {row.group_key: row.split for row in session.execute(wanted)}


def _remember(session: Session, project_id: UUID, groups: dict[str, str]) -> None:
    if groups:
        rows = [{"project_id": project_id, "group_key": key, "split": split} for key, split in sorted(groups.items())]
        session.execute(insert(SplitGroup).on_conflict_do_nothing(), rows)


class _Clusters:
    """The clusters a batch of prompts may join, and those it begins."""

    def __init__(self, session: Session, project_id: UUID, prompts: dict[UUID, Prompt]) -> None:
        self._session = session
        self._project_id = project_id
        self._open: list[_Known] = []
        self._sketches = Sketches()
        self._equal: dict[int, _Known] = {}
        self._members: dict[UUID, int] = {}
        self._joined: dict[UUID, int] = {}
        self._begun: list[dict[str, object]] = []
        self._load(sorted({band for prompt in prompts.values() for band in prompt.bands}))

    def _load(self, bands: Sequence[int]) -> None:
        stored = select(PromptCluster).where(
            PromptCluster.project_id == self._project_id,
            PromptCluster.bands.op("&&")(literal(list(bands), ARRAY(BigInteger))),
        )
        for row in self._session.scalars(stored.order_by(PromptCluster.id)):
            known = _Known(row.id, row.fingerprint, np.frombuffer(row.sketch, dtype="<u4"), row.split)
            self._add(known, row.bands, row.members)

    def _add(self, known: _Known, bands: Sequence[int], members: int) -> None:
        self._equal.setdefault(known.fingerprint, known)
        self._members[known.cluster_id] = members
        if members < MEMBERS_MOST:
            self._open.append(known)
            self._sketches.add(known.sketch, bands)

    def find(self, prompt: Prompt) -> _Known | None:
        """The cluster that an equal prompt began, or the oldest of those like it, which has one more member then."""
        found = self._equal.get(prompt.fingerprint)
        if found is None:
            found = self._near(prompt)
            if found is not None:
                # A full one of its own: whoever asks this again finds it, when the other takes no more.
                self.begin(prompt, found.split, members=MEMBERS_MOST)
        if found is not None:
            self._members[found.cluster_id] += 1
            self._joined[found.cluster_id] = self._joined.get(found.cluster_id, 0) + 1
        return found

    def _near(self, prompt: Prompt) -> _Known | None:
        near = self._sketches.likeliest(prompt.sketch, prompt.bands)
        places = sorted(one.place for one in near if one.similarity >= ESTIMATED_THRESHOLD)
        alike = (self._open[place] for place in places)
        return next((one for one in alike if self._members[one.cluster_id] < MEMBERS_MOST), None)

    def begin(self, prompt: Prompt, split: str, members: int = 1) -> None:
        """A cluster of its own, whose side every repeat to come shares, and near-duplicates while it is not full."""
        known = _Known(uuid7(), prompt.fingerprint, prompt.sketch, split)
        sketch = prompt.sketch.astype("<u4").tobytes()
        self._begun.append(
            {
                "id": known.cluster_id, "project_id": self._project_id, "split": split, "sketch": sketch,
                "bands": list(prompt.bands), "fingerprint": prompt.fingerprint,
            }
        )  # fmt: skip
        self._add(known, prompt.bands, members)

    def store(self) -> None:
        begun = {row["id"] for row in self._begun}
        if self._begun:
            rows = [row | {"members": self._members[row["id"]]} for row in self._begun]  # type: ignore[index]
            self._session.execute(insert(PromptCluster), rows)
        for cluster_id, count in sorted(self._joined.items()):
            if cluster_id not in begun:
                grown = update(PromptCluster).where(PromptCluster.id == cluster_id)
                self._session.execute(grown.values(members=PromptCluster.members + count))
