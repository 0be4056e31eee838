"""How other processes talk to the engine under asyncio; `engine.sync_client` does it for workers. No torch.

Nothing here waits on a dead engine. A closed connection, a changed epoch or a long silence fails whatever was in
flight with `EngineGone`; a request made while the engine is away fails after `connect_seconds`.
"""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from engine.messages import (
    Cancel,
    Done,
    Finished,
    Forget,
    FromEngine,
    Generate,
    GetStatus,
    Learn,
    LoadAdapter,
    LoadCode,
    LoadSpeculator,
    Pool,
    Pooled,
    PromptLogprobs,
    Status,
    ToEngine,
    Tokens,
    UnloadAdapter,
    UnloadSpeculator,
    decode_from_engine,
    encode,
)

HEARTBEAT_SECONDS = 0.5
STATUS_SECONDS = 30.0


class EngineGone(ConnectionError):
    """The engine died, restarted or cannot be reached: the request was lost and may be tried again."""


class EngineRefused(RuntimeError):
    """The engine answered a load, an unload, Learn or Forget with an error; what served before still serves.

    A `transient` one says nothing about the artefact (a file could not be read just now): try again, condemn nothing.
    Nor does the `code` "too_large": it is about the engine's settings.
    """

    def __init__(self, reason: str, *, transient: bool = False, code: LoadCode = "") -> None:
        super().__init__(reason)
        self.transient = transient
        self.code = code


class PoolFailed(RuntimeError):
    """The engine ended a Pool with an error; `finished` says which."""

    def __init__(self, finished: Finished) -> None:
        super().__init__(finished.error or f"the request was {finished.reason}")
        self.finished = finished


@dataclass(frozen=True)
class Completion:
    """Everything one request produced. `logprobs[i]` belongs to `token_ids[i]`, and `prompt_logprobs[i]`, where asked
    for, to the prompt's token i + 1."""

    token_ids: list[int]
    logprobs: list[float]
    finished: Finished
    prompt_logprobs: list[float] = field(default_factory=list)


Inbox = asyncio.Queue[FromEngine | EngineGone]
Command = LoadAdapter | UnloadAdapter | LoadSpeculator | UnloadSpeculator | Learn | Forget


class EngineClient:
    """One connection to one engine, for any number of concurrent requests on one event loop.

    Construct it inside the running loop. `silence_seconds` is how long a living connection may stay mute (the engine
    answers heartbeats between steps) before its requests are failed; a death is noticed at once by the closed socket.
    """

    def __init__(self, address: str, *, connect_seconds: float = 2.0, silence_seconds: float = 60.0) -> None:
        self.address = address
        self.epoch: int | None = None
        self._connect_seconds = connect_seconds
        self._silence_ticks_allowed = max(2, round(silence_seconds / HEARTBEAT_SECONDS))
        self._silent_ticks = 0
        self._inboxes: dict[str, Inbox] = {}
        self._connected = asyncio.Event()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # Without IMMEDIATE, requests made while the engine is away would queue up and run after they were given up.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)
        self._tasks = [asyncio.create_task(body()) for body in (self._receive, self._watch, self._heartbeat)]

    @property
    def connected(self) -> bool:
        """Whether an engine is at the other end now."""
        return self._connected.is_set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Fail what is in flight and release the sockets."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_all("the client was closed")
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._context.term()

    async def generate(self, message: Generate) -> AsyncGenerator[Tokens | PromptLogprobs | Finished]:
        """Tokens as they come (those that came meanwhile in one), then exactly one Finished; PromptLogprobs before them
        where asked for. Closing the generator early cancels the request.

        Use it in `contextlib.aclosing`: leaving `async for` alone does not close a generator at once.
        Raises EngineGone when the engine is away or goes away; ValueError when `message.id` is already in flight.
        """
        inbox = self._open(message.id)
        finished = False
        waiting: deque[FromEngine | EngineGone] = deque()
        try:
            await self._send(message)
            while not finished:
                reply = await self._next_joined(inbox, waiting)
                if not isinstance(reply, Tokens | PromptLogprobs | Finished):
                    raise EngineGone(f"the engine answered {message.id} with a {type(reply).__name__}")
                if isinstance(reply, Finished):
                    # Before the yield, since few consumers ask again after the last reply.
                    finished = True
                    self._inboxes.pop(message.id)
                yield reply
        finally:
            if not finished:
                # After a silence too: an engine that comes back must not go on with what was given up.
                self._inboxes.pop(message.id)
                self._cancel(message.id)

    async def complete(self, message: Generate) -> Completion:
        """Run one request to its end."""
        token_ids: list[int] = []
        logprobs: list[float] = []
        prompt_logprobs: list[float] = []
        async for reply in self.generate(message):
            if isinstance(reply, Finished):
                return Completion(token_ids, logprobs, reply, prompt_logprobs)
            if isinstance(reply, PromptLogprobs):
                prompt_logprobs = reply.logprobs
            if isinstance(reply, Tokens):
                token_ids += reply.token_ids
                logprobs += reply.logprobs
        raise AssertionError("generate ended without Finished")

    async def pool(self, message: Pool) -> Pooled:
        """One prompt's vector. Cancelling the call cancels the request.

        Raises PoolFailed with the reason, EngineGone, and ValueError when `message.id` is already in flight.
        """
        inbox = self._open(message.id)
        answered = False
        try:
            await self._send(message)
            reply = await self._next(inbox)
            answered = True
        finally:
            del self._inboxes[message.id]
            if not answered:
                self._cancel(message.id)
        if isinstance(reply, Finished):
            raise PoolFailed(reply)
        if not isinstance(reply, Pooled):
            raise EngineGone(f"the engine answered {message.id} with a {type(reply).__name__}")
        return reply

    async def load_adapter(self, digest: str, path: str) -> None:
        """Return once `digest` is ready to serve. Raises EngineRefused with the reason, or EngineGone."""
        await self._command(LoadAdapter(id=_fresh_id(), digest=digest, path=path))

    async def unload_adapter(self, digest: str, *, seconds: float | None = None) -> None:
        """Return once the slot is free, which waits for the digest's running requests. Raises EngineRefused.

        Raises TimeoutError after `seconds`; the engine then frees the slot when the last of those requests ends.
        """
        async with asyncio.timeout(seconds):
            await self._command(UnloadAdapter(id=_fresh_id(), digest=digest))

    async def load_speculator(self, digest: str, path: str, replaces: str = "") -> str:
        """Return the digest that drafts in the slot once `digest` is loaded, in the place of `replaces` where named.

        Raises EngineRefused with the reason; what drafted before still does. Raises EngineGone.
        """
        done = await self._command(LoadSpeculator(id=_fresh_id(), digest=digest, path=path, replaces=replaces))
        return done.serving

    async def unload_speculator(self, digest: str) -> None:
        """Stop drafting with `digest`; its requests go on without. Raises EngineRefused or EngineGone."""
        await self._command(UnloadSpeculator(id=_fresh_id(), digest=digest))

    async def learn(self, namespace: str, responses: list[list[int]]) -> None:
        """Add past responses (token ids, oldest first) to a namespace's suffix corpus. Raises EngineRefused."""
        await self._command(Learn(id=_fresh_id(), namespace=namespace, responses=responses))

    async def forget(self, namespace: str) -> None:
        """Drop everything the engine keeps for a namespace."""
        await self._command(Forget(id=_fresh_id(), namespace=namespace))

    async def status(self, *, seconds: float = STATUS_SECONDS) -> Status:
        """The engine's state now. Raises EngineGone when it cannot be reached or does not answer within `seconds`."""
        reply = await self._ask(GetStatus(id=_fresh_id()), seconds)
        if not isinstance(reply, Status):
            raise EngineGone(f"the engine answered a status request with a {type(reply).__name__}")
        return reply

    async def _command(self, message: Command) -> Done:
        reply = await self._ask(message, None)
        if not isinstance(reply, Done):
            raise EngineGone(f"the engine answered a command with a {type(reply).__name__}")
        if reply.error:
            raise EngineRefused(reply.error, transient=reply.transient, code=reply.code)
        return reply

    async def _ask(self, message: GetStatus | Command, seconds: float | None) -> FromEngine:
        inbox = self._open(message.id)
        try:
            await self._send(message)
            return await asyncio.wait_for(self._next(inbox), seconds)
        except TimeoutError as error:
            raise EngineGone(f"the engine at {self.address} did not answer within {seconds:g} s") from error
        finally:
            del self._inboxes[message.id]

    def _open(self, request_id: str) -> Inbox:
        if request_id in self._inboxes:
            raise ValueError(f"request id {request_id!r} is already in flight")
        inbox: Inbox = asyncio.Queue()
        self._inboxes[request_id] = inbox
        return inbox

    async def _next(self, inbox: Inbox) -> FromEngine:
        reply = await inbox.get()
        if isinstance(reply, EngineGone):
            raise reply
        return reply

    async def _next_joined(self, inbox: Inbox, waiting: deque[FromEngine | EngineGone]) -> FromEngine:
        """The next reply; tokens that queued up behind a slow reader come together. `waiting` keeps what came after."""
        reply = waiting.popleft() if waiting else await inbox.get()
        while isinstance(reply, Tokens) and not inbox.empty():
            following = inbox.get_nowait()
            if not isinstance(following, Tokens):
                waiting.append(following)
                break
            reply = _joined(reply, following)
        if isinstance(reply, EngineGone):
            raise reply
        return reply

    async def _send(self, message: ToEngine) -> None:
        try:
            await asyncio.wait_for(self._connected.wait(), self._connect_seconds)
            await self._socket.send(encode(message), zmq.DONTWAIT)
        except (TimeoutError, zmq.Again) as error:
            raise EngineGone(f"no engine answers at {self.address}") from error

    def _cancel(self, request_id: str) -> None:
        """Called while unwinding, so it must not await: zmq.asyncio sends at once when it can."""
        if self.connected and not self._socket.closed:
            sent = asyncio.ensure_future(self._socket.send(encode(Cancel(id=request_id)), zmq.DONTWAIT))
            sent.add_done_callback(_read_result)

    async def _receive(self) -> None:
        while True:
            for frame in await self._socket.recv_multipart():
                self._silent_ticks = 0
                try:
                    message = decode_from_engine(frame)
                except msgspec.DecodeError as error:
                    self._fail_all(f"the engine speaks another protocol: {error}")
                    continue
                self._notice_epoch(message.epoch)
                if message.id in self._inboxes:
                    self._inboxes[message.id].put_nowait(message)

    def _notice_epoch(self, epoch: int) -> None:
        if self.epoch is not None and epoch != self.epoch:
            self._fail_all("the engine restarted")
        self.epoch = epoch

    async def _watch(self) -> None:
        while True:
            event = (await recv_monitor_message(self._monitor))["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._silent_ticks = 0
                self._connected.set()
            elif event == zmq.EVENT_DISCONNECTED:
                self._connected.clear()
                self.epoch = None
                self._fail_all("the engine went away")

    async def _heartbeat(self) -> None:
        """Counts mute ticks, not seconds: a loop that was itself asleep (a worker between calls) is no engine fault."""
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            if not self.connected or not self._inboxes:
                self._silent_ticks = 0
                continue
            self._silent_ticks += 1
            if self._silent_ticks > self._silence_ticks_allowed:
                self._fail_all("the engine has stopped answering")
            with suppress(zmq.Again):
                await self._socket.send(encode(GetStatus(id="heartbeat")), zmq.DONTWAIT)

    def _fail_all(self, reason: str) -> None:
        for inbox in self._inboxes.values():
            inbox.put_nowait(EngineGone(f"{reason} ({self.address})"))


def _joined(first: Tokens, second: Tokens) -> Tokens:
    return msgspec.structs.replace(
        first,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        top=first.top + second.top,
        steps=first.steps + second.steps,
        drafts=first.drafts + second.drafts,
        # Heads may be swapped between two steps: the later ones are what the request drafts with now.
        speculator=second.speculator or first.speculator,
    )


def _fresh_id() -> str:
    return uuid.uuid4().hex


def _read_result(future: asyncio.Future[zmq.MessageTracker | None]) -> None:
    """A Cancel that cannot be sent went to an engine that is gone, and the request with it."""
    if not future.cancelled():
        future.exception()
