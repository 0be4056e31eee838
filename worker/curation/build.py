"""Builds a revision: judgements that stand → drafts → screens → an immutable, content-hashed set of examples."""

from collections import Counter
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.orm import Session

from services.errors import NotFound, Unprocessable
from services.settings import Settings
from services.store import datasets, runs
from services.store.datasets import Draft, canonical
from services.store.jobs import JobFailed, Lease
from services.store.models import Project, Revision
from worker.curation import judged
from worker.curation.duplicates import near_duplicates

ACCEPTED_SHARE = 0.3

log = structlog.get_logger()


def build_job(lease: Lease, settings: Settings) -> None:  # noqa: ARG001 - every handler has these two
    """Handler of "dataset.build". With a `run_id`, the run gets the revision and goes on to training."""
    run_id = lease.payload.get("run_id")
    if run_id and lease.cancelled():
        with lease.transaction() as session:
            runs.finish(session, runs.get(session, UUID(run_id)), "cancelled", "cancelled")
        return
    try:
        with lease.transaction() as session:
            if run_id:
                runs.enter_phase(session, runs.get(session, UUID(run_id)), "building the revision")
            revision = build_revision(session, UUID(lease.payload["project_id"]), lease.payload["dataset"])
            if run_id:
                run = runs.get(session, UUID(run_id))
                run.revision_id = revision.id
                runs.hand_over(session, run, "train", {"run_id": run_id})
    except (Unprocessable, NotFound) as error:
        raise JobFailed(error.message) from error
    log.info("revision built", digest=revision.digest, train=revision.train_count, held_out=revision.held_out_count)


def build_revision(session: Session, project_id: UUID, dataset: str) -> Revision:
    """The revision of everything judged so far; the existing one when nothing changed.

    Raises Unprocessable when there is nothing to build from.
    """
    project = session.get(Project, project_id)
    if project is None:
        raise NotFound(f"no project {project_id}")
    drafted = judged.draft_all(session, project_id, judged.read(session, project_id))
    share = float(project.config.get("accepted_share", ACCEPTED_SHARE))
    left_out = drafted.left_out
    kept = _screen(drafted.drafts, share, left_out)
    if not kept:
        causes = "; ".join(f"{count} {cause}" for cause, count in sorted(left_out.items()))
        raise Unprocessable(f"no reviewed example to build from{f' ({causes})' if causes else ''}")
    target = datasets.get_or_create(session, project_id, dataset)
    return datasets.create_revision(
        session, target, datasets.add_examples(session, project_id, kept), _report(kept, left_out)
    )


def _screen(drafts: Sequence[Draft], accepted_share: float, left_out: Counter[str]) -> list[Draft]:
    """Drop duplicates, training copies of held-out prompts, and accepted answers beyond their share."""
    unique = _without_duplicates(drafts, left_out)
    held_out = [draft for draft in unique if draft.split == "held_out"]
    train = [draft for draft in unique if draft.split == "train"]
    leaked = near_duplicates([draft.messages for draft in train], [draft.messages for draft in held_out])
    left_out["nearly repeats a held-out prompt"] += len(leaked)
    train = [draft for position, draft in enumerate(train) if position not in leaked]
    return held_out + _cap_accepted(train, accepted_share, left_out)


def _without_duplicates(drafts: Sequence[Draft], left_out: Counter[str]) -> list[Draft]:
    """One example per split for the same prompt and answer; the oldest interaction stays."""
    seen: dict[tuple[str, bytes], Draft] = {}
    for draft in drafts:
        key = (draft.split, canonical([draft.messages, draft.completion]))
        if key in seen:
            left_out["repeats another example"] += 1
        else:
            seen[key] = draft
    return list(seen.values())


def _cap_accepted(train: Sequence[Draft], share: float, left_out: Counter[str]) -> list[Draft]:
    """A model taught mostly by its own answers stops learning. Who stays is decided by hash, so a rebuild agrees."""
    accepted = sorted((d for d in train if d.source == "accepted"), key=lambda draft: draft.content_hash)
    others = [draft for draft in train if draft.source != "accepted"]
    allowed = len(accepted) if share >= 1 else int(share / (1 - share) * len(others))
    left_out["accepted beyond their share"] += max(0, len(accepted) - allowed)
    return others + accepted[:allowed]


def _report(kept: Sequence[Draft], left_out: Counter[str]) -> dict[str, Any]:
    counted = Counter(f"{draft.split}.{draft.source}" for draft in kept)
    return {"kept": dict(counted), "left_out": {cause: count for cause, count in left_out.items() if count}}
