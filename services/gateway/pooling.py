"""Many prompts to the engine for vectors, all of one request under the same weights."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.client import EngineGone, EngineRefused, PoolFailed
from engine.messages import Pool, Pooled
from services.errors import NO_SLOT, Overloaded, WhetError
from services.gateway.engine_link import LOADS, EngineLink, fallen_back, gone, refusal, shortened

# How many prompts of one request are with the engine at once: enough to fill its steps, few enough to leave room.
AT_ONCE = 128
SMALLEST = np.finfo(np.float32).tiny

Vectors = NDArray[np.floating[Any]]


class Prompt(NamedTuple):
    """Token ids; `pair_start` is the first of a pair's second text where the model tells them apart, else 0."""

    ids: list[int]
    pair_start: int = 0


class Batch(NamedTuple):
    """One vector per prompt [prompts, size], whose weights made them, and how many tokens were read."""

    vectors: Vectors
    adapter: str | None
    tokens: int


async def pool_all(
    link: EngineLink, prompts: Sequence[Prompt], shared: Pool, candidates: Sequence[str | None]
) -> Batch:
    """Vectors of all prompts under the first candidate that serves. `shared` gives what all of them have in common.

    Raises WhetError: the first refusal ends all.
    """
    failure: WhetError | None = None
    began = time.monotonic()
    for adapter in candidates:
        common = msgspec.structs.replace(shared, adapter=adapter)
        try:
            replies = await _run(link, [_message(common, prompt) for prompt in prompts], began)
        except EngineRefused as error:
            failure = fallen_back(adapter, shared.id, error)
        except EngineGone as error:
            raise gone() from error
        else:
            return Batch(_matrix(replies), adapter, sum(reply.prompt_tokens for reply in replies))
    assert failure is not None, "there is always a candidate"
    raise failure


def _message(common: Pool, prompt: Prompt) -> Pool:
    return msgspec.structs.replace(common, id=uuid4().hex, prompt=prompt.ids, pair_start=prompt.pair_start)


async def _run(link: EngineLink, messages: Sequence[Pool], began: float) -> list[Pooled]:
    """Answers in order; the first failure cancels the rest and is raised bare."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(message: Pool) -> Pooled:
        async with gate:
            return await _one(link, message, began)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(message)) for message in messages]
    except* (WhetError, EngineRefused, EngineGone) as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def _one(link: EngineLink, message: Pool, began: float) -> Pooled:
    """One answer, loading the adapter where it is missing. Raises WhetError, EngineRefused or EngineGone."""
    for _ in range(LOADS + 1):
        try:
            return await link.client.pool(shortened(message, began))
        except PoolFailed as error:
            if error.finished.code != "adapter_not_loaded":
                raise refusal(error.finished) from error
        assert message.adapter is not None, "the base model is always loaded"
        await link.load(message.adapter)
    raise Overloaded(NO_SLOT)


def _matrix(replies: Sequence[Pooled]) -> Vectors:
    vectors = np.stack([np.frombuffer(reply.vector, dtype="<f4") for reply in replies]).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise WhetError("the model gave a vector that is not finite", code="engine_error")
    return vectors


def normalised(vectors: Vectors, dimensions: int | None = None) -> Vectors:
    """Every row cut to its first `dimensions` numbers, then of length one; a row of zeros stays as it is."""
    cut = vectors if dimensions is None else vectors[:, :dimensions]
    lengths = np.sqrt(np.square(cut).sum(axis=1, keepdims=True))
    unit: Vectors = cut / np.maximum(lengths, SMALLEST)
    return unit
