"""Builds a revision: judgements that stand → drafts → screens → an immutable, content-hashed set of examples."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.orm import Session

from services.errors import NotFound, Unprocessable
from services.settings import Settings
from services.store import datasets, examples, forms, imports, pii, pii_presidio, revisions, runs
from services.store.jobs import JobCancelled, JobFailed, Lease
from services.store.models import Project, Revision
from services.store.revisions import LeftOut
from worker.curation import authors, judged, pairs, screens

log = structlog.get_logger()


def build_job(lease: Lease, settings: Settings) -> None:  # noqa: ARG001 - every handler has these two
    """Handler of "dataset.build". With a `run_id`, the run gets the revision and goes on to training."""
    run_id = lease.payload.get("run_id")
    if run_id and not _begin(lease, UUID(run_id)):
        return
    try:
        with lease.sessions.begin() as session:
            revision = build_revision(session, UUID(lease.payload["project_id"]), lease.payload["dataset"])
            # Not before: a build takes long, and this keeps the heartbeat waiting, and whoever cancels the run.
            lease.hold(session)
            if run_id:
                run = runs.get(session, UUID(run_id))
                run.revision_id = revision.id
                runs.hand_over(session, run, "train", {"run_id": run_id})
            lease.succeed(session)
    except (Unprocessable, NotFound) as error:
        raise JobFailed(error.message) from error
    log.info("revision built", digest=revision.digest, train=revision.train_count, held_out=revision.held_out_count)


def _begin(lease: Lease, run_id: UUID) -> bool:
    """Whether the run still waits for its revision. Raises JobCancelled."""
    if lease.cancelled():
        raise JobCancelled
    with lease.transaction() as session:
        run = runs.get(session, run_id)
        waits = run.state in runs.UNFINISHED and run.revision_id is None
        if waits:
            runs.enter_phase(session, run, "building the revision")
    return waits


def build_revision(session: Session, project_id: UUID, dataset: str, *, now: datetime | None = None) -> Revision:
    """The revision of everything judged and imported so far; the existing one when nothing changed.

    `now` decides which weights are long retired. Raises Unprocessable when there is nothing to build from.
    """
    project = session.get(Project, project_id)
    if project is None:
        raise NotFound(f"no project {project_id}")
    config, moment = project.config, now or datetime.now(UTC)
    retired = pairs.retired_weights(session, project_id, moment, float(config.get("pair_days", pairs.PAIR_DAYS)))
    drafted = judged.draft_all(session, project_id, judged.read(session, project_id), retired)
    target = datasets.get_or_create(session, project_id, dataset)
    mode, finder = pii.mode_of(config), pii_presidio.finder_of(config)
    drafts = [examples.treated(draft, mode, finder) for draft in [*drafted.drafts, *imports.drafts(session, target.id)]]
    screened = screens.screen(drafts, screens.Limits.of(config))
    left_out = [*drafted.left_out, *screened.left_out]
    if not screened.kept:
        causes = "; ".join(f"{count} {cause}" for cause, count in sorted(_by_cause(left_out).items()))
        raise Unprocessable(f"no reviewed example to build from{f' ({causes})' if causes else ''}")
    report = _report(screened, left_out, drafted.pairs_left_out, mode)
    entries = examples.add_examples(session, project_id, screened.kept)
    return revisions.create(session, target, entries, report, left_out)


def _by_cause(left_out: Sequence[LeftOut]) -> dict[str, int]:
    return dict(Counter(one.cause for one in left_out))


def _report(
    screened: screens.Screened, left_out: Sequence[LeftOut], pairs_left_out: Counter[str], mode: pii.Mode
) -> dict[str, Any]:
    kept = screened.kept
    personal = Counter(kind for draft in kept for kind in draft.pii)
    return {
        "kept": dict(Counter(f"{draft.split}.{draft.source}" for draft in kept)),
        "forms": {form: sum(len(forms.rows_of(draft, form)) for draft in kept) for form in forms.FORMS},
        "left_out": _by_cause(left_out),
        "pairs_left_out": dict(pairs_left_out),
        "leaks": screened.leaks,
        "phrases": screened.phrases,
        "triggers": screened.triggers,
        "authors": authors.tell(kept),
        "pii": {"mode": mode, "rows": sum(bool(draft.pii) for draft in kept), "kinds": dict(personal)},
    }
