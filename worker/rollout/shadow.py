"""Shadow: prompts of live traffic asked again of a candidate, at batch priority; nobody sees the answers.

They land in the log with origin `shadow`, which no sample, estimate, trigger, corpus or training reads. What stands
beside the live answer is kept in figures, and the sampler takes pairs that differ for its strategy "disagreement".
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from statistics import NormalDist, fmean
from typing import Any, NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.client import Completion
from engine.messages import Finished, Generate, logged_grammar, logged_sampling
from engine.sync_client import SyncEngineClient
from engine.text.stops import StopStrings
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import failpoints, trials
from services.store.base import uuid7
from services.store.erasure_cover import is_erased
from services.store.jobs import JobCancelled, Lease
from services.store.models import Interaction, InteractionBody, Project, Rollout, ShadowAnswer
from services.store.pages import first_id
from services.store.refusals import refuses
from services.store.rollout_config import RolloutConfig
from services.store.shadow_answers import Pair, figures, stands
from worker.rollout import checks
from worker.rollout.sequence import heavier

BATCH = 32
AT_ONCE = 8
CONNECT_SECONDS = 30.0
ANSWER_SECONDS = 120.0
# What was asked longer ago may no longer be what apps ask.
RECENT = timedelta(days=7)
ANSWERED = ("stop", "length")
# Endings that another attempt may mend.
PASSING = ("adapter_not_loaded", "overloaded", "deadline", "internal")
# One look at a number fixed beforehand: an ordinary one-sided 95 % bound.
BOUND = NormalDist().inv_cdf(0.95)

log = structlog.get_logger()


class ShadowInterrupted(RuntimeError):
    """The engine could not answer everything this time; the job is worth another attempt."""


class Compared(NamedTuple):
    """Whether the candidate may serve somebody, why, and the figures of both."""

    passed: bool
    reason: str
    evidence: dict[str, Any]


class Prompt(NamedTuple):
    """A logged request and its answer."""

    interaction: Interaction
    body: InteractionBody


def shadow_job(lease: Lease, settings: Settings) -> None:
    """Handler of "shadow": a batch of prompts. What is answered twice by two attempts is kept once.

    Raises EngineGone, ShadowInterrupted; another attempt goes on.
    """
    rollout_id = UUID(lease.payload["rollout_id"])
    with lease.sessions() as session:
        rollout = session.get_one(Rollout, rollout_id)
        if rollout.stage != "shadow":
            return
        project = session.get_one(Project, rollout.project_id)
        prompts = to_ask(session, rollout, limit=BATCH)
    if not prompts:
        return
    tokenizer = Tokenizer.load(settings.model_path)
    with SyncEngineClient(settings.engine_socket, connect_seconds=CONNECT_SECONDS) as client:
        client.load_adapter(rollout.digest, str(settings.artifacts / rollout.digest))
        completions = client.generate_many([_request(one, rollout) for one in prompts], concurrency=AT_ONCE)
    both = zip(prompts, completions, strict=True)
    answered = [(prompt, completion) for prompt, completion in both if not _passes(completion.finished, rollout.digest)]
    failpoints.reach("shadow.answered")
    if lease.cancelled():
        raise JobCancelled
    with lease.transaction() as session:
        there = still_there(session, rollout, prompts)
        for prompt, completion in answered:
            if prompt.interaction.id in there:
                _keep(session, rollout, project, prompt, completion, tokenizer)
        if len(answered) == len(prompts):
            lease.succeed(session)
    log.info("shadow answers", rollout=str(rollout_id), answered=len(answered))
    if len(answered) < len(prompts):
        raise ShadowInterrupted(f"the engine could not answer {len(prompts) - len(answered)} of {len(prompts)} prompts")


def to_ask(session: Session, rollout: Rollout, *, limit: int) -> list[Prompt]:
    """The newest live answers of what serves that can be asked again: one choice, no tools, not asked yet."""
    asked = select(ShadowAnswer.interaction_id).where(
        ShadowAnswer.rollout_id == rollout.id, ShadowAnswer.interaction_id == Interaction.id
    )
    since = first_id(datetime.now(UTC) - RECENT)
    rows = session.execute(
        select(Interaction, InteractionBody)
        .join(InteractionBody, InteractionBody.id == Interaction.id)
        .where(
            Interaction.project_id == rollout.project_id,
            Interaction.id >= since,
            InteractionBody.id >= since,
            Interaction.origin == "live",
            Interaction.finish_reason.in_(ANSWERED),
            Interaction.adapter_digest.is_not_distinct_from(rollout.baseline_digest),
            InteractionBody.prompt_token_ids != [],
            InteractionBody.parameters.has_key("max_tokens"),
            ~InteractionBody.parameters.has_key("tools"),
            InteractionBody.parameters["model"].as_string().not_like("%@%"),
            ~asked.exists(),
            ~is_erased(rollout.project_id),
        )
        .order_by(Interaction.id.desc())
        .limit(limit)
    )
    return [Prompt(row[0], row[1]) for row in rows]


def still_there(session: Session, rollout: Rollout, prompts: Sequence[Prompt]) -> set[UUID]:
    """Those of the prompts that nobody has erased meanwhile, nor asked to.

    Held until the transaction ends: an erasure that comes later deletes them only then, and sees what was made of them.
    """
    query = select(Interaction.id).where(
        Interaction.id.in_([one.interaction.id for one in prompts]), ~is_erased(rollout.project_id)
    )
    return set(session.scalars(query.with_for_update(read=True, key_share=True, skip_locked=True, of=Interaction)))


def judge(compared: Sequence[Pair], config: RolloutConfig) -> Compared:
    """Once, when all are there: refused when more of its answers fail than of those that were served, and it shows."""
    worse = [float(stands(pair.live)) - float(stands(pair.candidate)) for pair in compared]
    mean = fmean(worse)
    evidence = figures(compared)
    told = f"{_points(mean)} points more of its {len(worse)} answers fail"
    if mean > config.shadow.most_worse and _evident(compared, worse):
        return Compared(False, f"the shadow comparison: {told} than of those that were served", evidence)
    return Compared(True, f"the shadow comparison is fine: {told}", evidence)


def _passes(finished: Finished, digest: str) -> bool:
    """Whether the engine had no time for it, or answered with other weights: no fault of the candidate."""
    if finished.reason == "error":
        return finished.code in PASSING
    return finished.reason == "cancelled" or finished.adapter != digest


def _evident(compared: Sequence[Pair], worse: Sequence[float]) -> bool:
    """Whether chance explains the loss poorly. A user's answers stand or fall together, so users are the units; one
    more that wins everything and one that loses everything keep a few who agree from being proof."""
    by_unit: defaultdict[str, list[float]] = defaultdict(list)
    for pair, one in zip(compared, worse, strict=True):
        by_unit[pair.unit].append(one)
    usual = len(worse) / len(by_unit)
    units: list[tuple[float, float]] = [(sum(lost), len(lost)) for lost in by_unit.values()]
    units += [(usual, usual), (-usual, usual)]
    total = sum(size for _, size in units)
    mean = sum(lost for lost, _ in units) / total
    squares = sum((lost - mean * size) ** 2 for lost, size in units)
    error = math.sqrt(squares * len(units) / (len(units) - 1)) / total
    return mean > heavier(BOUND, len(units) - 1) * error


def _request(prompt: Prompt, rollout: Rollout) -> Generate:
    """Exactly what the app asked, of other weights."""
    given = prompt.body.parameters
    namespace = prompt.interaction.namespace
    return Generate(
        id=f"shadow-{rollout.id.hex}-{prompt.interaction.id.hex}",
        prompt=prompt.body.prompt_token_ids,
        sampling=logged_sampling(given),
        adapter=rollout.digest,
        namespace=namespace,
        cache_salt=namespace,
        priority="batch",
        choice=int(given.get("choice", 0)),
        grammar=logged_grammar(given),
        share="shadow",
        deadline_seconds=ANSWER_SECONDS,
        learn=False,
    )


def _keep(
    session: Session,
    rollout: Rollout,
    project: Project,
    prompt: Prompt,
    completion: Completion,
    tokenizer: Tokenizer,
) -> None:
    """The answer into the log, its figures beside those of the live one."""
    stops = StopStrings(prompt.body.parameters.get("stop", ()))
    output = stops.push(tokenizer.decode(completion.token_ids)).text + stops.flush()
    logged = _logged(rollout, prompt, completion, output)
    session.add_all(logged)
    config, schema = trials.config_of(rollout), project.config.get("response_schema")
    live = prompt.interaction
    candidate = logged.interaction
    session.add(
        ShadowAnswer(
            rollout_id=rollout.id, interaction_id=live.id, shadow_id=candidate.id,
            differs=output.strip() != prompt.body.output.strip(),
            live=_figures(live, prompt.body, config, schema),
            candidate=_figures(candidate, logged.body, config, schema),
        )
    )  # fmt: skip
    session.flush()


def _figures(
    row: Interaction, body: InteractionBody, config: RolloutConfig, schema: dict[str, Any] | None
) -> dict[str, Any]:
    answered = row.finish_reason in ANSWERED
    return {
        "error": not answered,
        "valid": checks.passes(body.output, body.parameters, config, schema) if answered else None,
        "refuses": refuses(body.output) if answered else None,
        "tokens": row.completion_tokens if answered else None,
        "logprob": row.mean_logprob,
        "latency": row.latency_ms,
    }


def _logged(rollout: Rollout, prompt: Prompt, completion: Completion, output: str) -> Prompt:
    """As the gateway would have logged it, of the same user and as of when they asked, so that an erasure finds it."""
    live, body, finished, now = prompt.interaction, prompt.body, completion.finished, datetime.now(UTC)
    identity, logprobs = uuid7(), completion.logprobs
    interaction = Interaction(
        id=identity, project_id=live.project_id, api_key_id=None, origin="shadow", arm="shadow",
        adapter_digest=finished.adapter, speculator_digest=None, base_digest=live.base_digest,
        generation=rollout.generation, namespace=live.namespace, endpoint=live.endpoint, stream=False,
        finish_reason=finished.reason, error=finished.error, prompt_tokens=finished.prompt_tokens,
        completion_tokens=len(completion.token_ids), cached_tokens=finished.cached_tokens,
        drafted_tokens=finished.drafted_tokens, accepted_tokens=finished.accepted_tokens, speculation=None,
        ttft_ms=1000 * finished.first_token_seconds, latency_ms=1000 * finished.total_seconds,
        mean_logprob=fmean(logprobs) if logprobs else None, min_logprob=min(logprobs, default=None),
        session_key=live.session_key, end_user=live.end_user, group_key=live.group_key,
        tags={"shadow_of": str(live.id)}, config_hash=live.config_hash,
        started_at=live.started_at, finished_at=now,
    )  # fmt: skip
    wide = InteractionBody(
        id=identity, project_id=live.project_id, messages=body.messages, parameters=body.parameters, output=output,
        prompt_token_ids=body.prompt_token_ids, token_ids=list(completion.token_ids),
        token_logprobs=[round(one, 5) for one in logprobs], prompt_hash=body.prompt_hash,
        template_hash=body.template_hash, tokenizer_hash=body.tokenizer_hash, retrieved=body.retrieved,
        worked_examples=body.worked_examples, spool_version=body.spool_version,
    )  # fmt: skip
    return Prompt(interaction, wide)


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")
