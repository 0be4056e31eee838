"""Worked examples on a request's path: the question's vector from the engine, the nearest corrections from memory.

Whatever goes wrong or takes too long, the request is served without them: they are a help and never a condition.
"""

import asyncio
from collections.abc import Sequence
from uuid import UUID

import numpy as np
import structlog

from engine.client import EngineGone, PoolFailed
from engine.messages import Pool, Status
from engine.text.tokenizer import Tokenizer
from services.errors import InvalidRequest
from services.gateway.engine_link import EngineLink
from services.gateway.instant import SMALLEST, Shelf, Vectors
from services.gateway.planning import Plan, Worked, make_plan
from services.store.base import uuid7
from services.store.instant_config import WorkedConfig, read_worked
from services.store.pin_key import CHAT
from services.store.worked import question_of, read_tokens

# What a template may add around two turns.
TURN_TOKENS = 16

log = structlog.get_logger()


async def applied(
    plan: Plan, shelf: Shelf, key_id: UUID, tokenizer: Tokenizer, engine: Status, link: EngineLink
) -> Plan:
    """The plan with the nearest corrections in its prompt; the same plan where there are none, or no room for them.

    Nothing is placed for `slug@digest`, which asks what certain weights say, nor beside tools.
    """
    config = read_worked(plan.target.project.config)
    ask = plan.ask
    question = question_of(ask.messages) if ask.endpoint == CHAT else None
    fitting = config.enabled and plan.pin is None and not plan.target.pinned and not ask.tools.shown
    if not fitting or question is None or shelf.base != engine.base:
        return plan
    vector = await question_vector(plan, read_tokens(tokenizer, question), link, config.deadline_ms / 1000)
    chosen = () if vector is None else nearest(shelf, vector, config, tokenizer)
    if not chosen:
        return plan
    try:
        return await make_plan(ask, plan.target, key_id, tokenizer, engine, plan.started, chosen)
    except InvalidRequest:
        # The context has no room for both.
        return plan


async def question_vector(plan: Plan, prompt: list[int], link: EngineLink, seconds: float) -> Vectors | None:
    """The question as the corrections' vectors were made; None when it does not come within `seconds`."""
    namespace = plan.target.project.id.hex
    message = Pool(
        id=uuid7().hex, prompt=prompt, how="mean", namespace=namespace, cache_salt=namespace, share=plan.share,
        deadline_seconds=seconds,
    )  # fmt: skip
    try:
        async with asyncio.timeout(seconds):
            reply = await link.client.pool(message)
    except (TimeoutError, EngineGone, PoolFailed) as error:
        log.debug("no_worked_examples", reason=str(error) or "too slow")
        return None
    vector = np.frombuffer(reply.vector, dtype="<f4").astype(np.float32)
    return vector if np.isfinite(vector).all() else None


def nearest(shelf: Shelf, vector: Vectors, config: WorkedConfig, tokenizer: Tokenizer) -> tuple[Worked, ...]:
    """At most `most` corrections within the token budget and the least similarity, the nearest last: what stands
    closest to the question says most."""
    if not len(shelf.ids) or shelf.vectors.shape[1] != len(vector):
        return ()
    cosines = shelf.vectors @ (vector / max(float(np.linalg.norm(vector)), float(SMALLEST)))
    chosen: list[Worked] = []
    left = config.tokens
    for place in np.argsort(-cosines, kind="stable")[: 4 * config.most].tolist():
        if cosines[place] < config.similarity or len(chosen) == config.most:
            break
        size = _tokens(tokenizer, (shelf.shown[place], shelf.completions[place]))
        if size <= left:
            chosen.append(Worked(shelf.ids[place], shelf.shown[place], shelf.completions[place]))
            left -= size
    return tuple(reversed(chosen))


def _tokens(tokenizer: Tokenizer, turns: Sequence[str]) -> int:
    return sum(len(tokenizer.encode_plain(turn)) + TURN_TOKENS for turn in turns)
