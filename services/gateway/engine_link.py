"""The gateway's hold on the engine: what it serves, loading adapters on demand, and falling back when one is broken."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import structlog

from engine.client import EngineClient, EngineGone, EngineRefused
from engine.messages import Finished, Generate, Pool, PromptLogprobs, Status, Tokens
from services.errors import NO_SLOT, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, WhetError

WATCH_SECONDS = 0.25
# How often a connected engine is asked how it is. It answers between two steps, and a step of a large model on a CPU
# can take seconds: one mute for longer than SILENT is worth a look, one mute for longer than WEDGED serves nobody.
ASK_SECONDS = 1.0
SILENT_SECONDS = 5.0
WEDGED_SECONDS = 30.0
# What a metrics scrape and a first request wait for an answer.
LOOK_SECONDS = 1.0
DESCRIBE_SECONDS = 5.0
SHORTEST_DEADLINE = 0.001
# How long a digest that would not load is left alone: every request trying it again would stall them all.
BROKEN_SECONDS = 10.0
# How often one request loads its adapter, when others take the slot before it can begin.
LOADS = 3

log = structlog.get_logger()
Reply = Tokens | PromptLogprobs | Finished
Replies = AsyncGenerator[Reply]
Asked = TypeVar("Asked", Generate, Pool)


class Opened(NamedTuple):
    """A request the engine has begun: which adapter serves it, its first reply, and the rest."""

    adapter: str | None
    first: Reply
    rest: Replies


class EngineLink:
    """One engine seen from one event loop."""

    def __init__(self, client: EngineClient, artifacts: Path) -> None:
        self.client = client
        self._artifacts = artifacts
        self._status: Status | None = None
        self._asked = self._heard = 0.0
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._broken: dict[str, float] = {}
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow the engine's comings and goings."""
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Let go; what is in flight fails."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        await self.client.close()

    @property
    def known(self) -> Status | None:
        """What the engine said of itself since it (re)started; None while it is away."""
        return self._status if self.client.connected else None

    @property
    def silent_seconds(self) -> float:
        """How long a connected engine has not answered; a little over a second is usual."""
        return time.monotonic() - self._heard

    async def look(self) -> Status | None:
        """What the engine is now, or was last where it does not answer at once; None while it is away or wedged."""
        if self.client.connected:
            await self._refresh(LOOK_SECONDS)
        return None if self.silent_seconds > WEDGED_SECONDS else self.known

    async def describe(self) -> Status:
        """The engine's base model and limits. Raises Unavailable while it is away."""
        if self.known is None:
            await self._refresh(DESCRIBE_SECONDS)
        if self._status is None:
            raise gone()
        return self._status

    async def open(self, message: Generate, candidates: Sequence[str | None]) -> Opened:
        """Begin a request on the first candidate that serves: the active adapter, then what to fall back to.

        Raises WhetError when none does. No token has been produced by a candidate that was passed over.
        """
        failure: WhetError | None = None
        began = time.monotonic()
        for adapter in candidates:
            try:
                return await self._begin(msgspec.structs.replace(message, adapter=adapter), began)
            except EngineRefused as error:
                failure = fallen_back(adapter, message.id, error)
            except EngineGone as error:
                raise gone() from error
        assert failure is not None, "there is always a candidate"
        raise failure

    async def _begin(self, message: Generate, began: float) -> Opened:
        opened = await self._first(shortened(message, began))
        for _ in range(LOADS):
            if not _unloaded(opened.first):
                return opened
            await opened.rest.aclose()
            assert message.adapter is not None, "the base model is always loaded"
            await self.load(message.adapter)
            opened = await self._first(shortened(message, began))
        if not _unloaded(opened.first):
            return opened
        await opened.rest.aclose()
        # Nothing is wrong with the artefact, so older weights must not answer in its place.
        raise Unavailable(NO_SLOT, code="overloaded")

    async def _first(self, message: Generate) -> Opened:
        replies = self.client.generate(message)
        return Opened(message.adapter, await anext(replies), replies)

    async def load(self, digest: str) -> None:
        """Bring an adapter into the engine, once however many ask. Raises EngineRefused or EngineGone."""
        if time.monotonic() < self._broken.get(digest, 0.0):
            raise EngineRefused("it did not load a moment ago")
        if digest not in self._loads:
            task = asyncio.create_task(self.client.load_adapter(digest, str(self._artifacts / digest)))
            self._loads[digest] = task
            task.add_done_callback(lambda done: self._loaded(digest, done))
        # Shielded: the first asker's client may leave, and the others still wait for the load.
        await asyncio.shield(self._loads[digest])

    def _loaded(self, digest: str, task: asyncio.Task[None]) -> None:
        del self._loads[digest]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, EngineRefused) and not error.transient:
            self._broken[digest] = time.monotonic() + BROKEN_SECONDS
        elif error is None:
            self._broken.pop(digest, None)
            log.info("adapter_loaded", digest=digest)

    async def _watch(self) -> None:
        while True:
            if not self.client.connected:
                self._status = None
            elif self._status is None or self._status.epoch != self.client.epoch or self._due:
                await self._refresh(WEDGED_SECONDS)
            await asyncio.sleep(WATCH_SECONDS)

    @property
    def _due(self) -> bool:
        return time.monotonic() - self._asked >= ASK_SECONDS

    async def _refresh(self, seconds: float) -> None:
        self._asked = time.monotonic()
        try:
            status = await self.client.status(seconds=seconds)
        except EngineGone:
            # One that is there and mute keeps what is known of it; `silent_seconds` tells.
            if not self.client.connected:
                self._status = None
            return
        if self._status is None or self._status.epoch != status.epoch:
            # A restarted engine may read what the old one could not.
            self._broken.clear()
        self._status, self._heard = status, time.monotonic()


def shortened(message: Asked, began: float) -> Asked:
    """The message with what is left of its deadline since `began` (time.monotonic): loading an adapter counts too."""
    if not message.deadline_seconds:
        return message
    left = message.deadline_seconds - (time.monotonic() - began)
    # 0 would mean that it has none.
    return msgspec.structs.replace(message, deadline_seconds=max(SHORTEST_DEADLINE, left))


def fallen_back(adapter: str | None, request_id: str, error: EngineRefused) -> Unavailable:
    """What a caller hears when nothing serves in the place of an adapter that is broken.

    Raises Unavailable at once when nothing is wrong with the artefact: older weights must not answer in its place.
    """
    if error.transient:
        raise Unavailable(f"adapter {adapter} cannot be loaded now: {error}", code="adapter_unavailable") from error
    log.error("adapter_falls_back", alarm=True, digest=adapter, request=request_id, error=str(error))
    return Unavailable(f"adapter {adapter} cannot be loaded: {error}", code="adapter_unavailable")


def gone() -> Unavailable:
    """What a caller hears while the engine is away."""
    return Unavailable("the engine is away or restarting; try again", code="engine_unavailable")


def refusal(finished: Finished) -> WhetError:
    """What a caller hears when the engine ended a request with an error."""
    sentence = finished.error or "the engine failed"
    match finished.code:
        case "prompt_too_long":
            return InvalidRequest(sentence, code="context_length_exceeded")
        case "invalid_request":
            return InvalidRequest(sentence)
        case "unsupported":
            return InvalidRequest(sentence, code="unsupported_parameter")
        case "overloaded":
            return Overloaded(sentence, retry_after=max(1.0, finished.retry_after_seconds))
        case "deadline":
            return DeadlineExceeded(sentence)
    return WhetError(sentence, code="engine_error")


def _unloaded(reply: Reply) -> bool:
    return isinstance(reply, Finished) and reply.code == "adapter_not_loaded"
