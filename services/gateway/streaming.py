"""Answering: streams of server-sent events and whole bodies, both ended at once when the client is gone."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.errors import WhetError
from services.gateway import rendering
from services.gateway.generation import Choice, Parts
from services.gateway.pieces import Piece
from services.gateway.planning import Plan

CLIENT_GONE_STATUS = 499

log = structlog.get_logger()
T = TypeVar("T")


class ClientGone(Exception):
    """Nobody reads the answer any more."""


async def answer(request: Request, plan: Plan, parts: Parts) -> Response:
    """Run a plan and answer it as the client asked. Raises WhetError before anything was sent."""
    choices = [Choice(plan, index, parts) for index in range(len(plan.choices))]
    try:
        if plan.ask.stream:
            await unless_gone(request.receive, _all([choice.open() for choice in choices], choices))
            return EventStream(plan, choices, parts)
        await unless_gone(request.receive, _all([choice.run() for choice in choices], choices))
    except ClientGone:
        return Response(status_code=CLIENT_GONE_STATUS)
    body = rendering.whole(plan, choices, parts.tokenizer)
    headers = rendering.headers(plan, choices[0], parts.spool.durability)
    return Response(body, media_type="application/json", headers=headers)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects; then raises ClientGone."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _all(works: Sequence[Coroutine[Any, Any, None]], choices: Sequence[Choice]) -> None:
    """All or nothing: the first failure ends the other choices too."""
    if len(works) == 1:
        await works[0]
        return
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for choice in choices:
            await choice.abandon()
        raise


class EventStream(Response):
    """A stream whose choices are open: nothing can go wrong any more that still has a status to answer with."""

    def __init__(self, plan: Plan, choices: Sequence[Choice], parts: Parts) -> None:
        headers = rendering.headers(plan, choices[0], parts.spool.durability)
        super().__init__(None, media_type="text/event-stream", headers=headers | {"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._plan = plan
        self._choices = choices
        self._writers = [rendering.ChunkWriter(choice, parts.tokenizer) for choice in choices]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except (ClientGone, OSError):
            log.debug("client_gone", request_id=scope.get("request_id"))
        finally:
            for choice in self._choices:
                await choice.abandon()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            for writer in self._writers:
                if first := writer.first():
                    await send(_body(first))
            await (self._send_one(send) if len(self._choices) == 1 else self._send_several(send))
            if self._plan.ask.include_usage:
                await send(_body(rendering.usage_chunk(self._plan, self._choices)))
            last = rendering.DONE
        except WhetError as error:
            # The status has left already; OpenAI's clients raise on an event that carries an error.
            log.warning("stream_failed", interaction=str(self._plan.ids[0]), error=error.message)
            last = rendering.event(error.body())
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send_one(self, send: Send) -> None:
        """The token path: nothing between the choice and the socket but this loop."""
        writer = self._writers[0]
        async with aclosing(self._choices[0].pieces()) as pieces:
            async for piece in pieces:
                await send(_body(writer.piece(piece)))
        await send(_body(writer.ending()))

    async def _send_several(self, send: Send) -> None:
        async with aclosing(_interleaved(self._choices)) as pieces:
            async for index, piece in pieces:
                writer = self._writers[index]
                await send(_body(writer.ending() if piece is None else writer.piece(piece)))


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def _interleaved(choices: Sequence[Choice]) -> AsyncGenerator[tuple[int, Piece | None]]:
    """Pieces with their choice's index as they come, None when that choice has ended. The first failure is raised and
    ends the others. A slow reader makes the choices wait: their tokens then come together."""
    inbox: asyncio.Queue[tuple[int, Piece | None] | Exception] = asyncio.Queue(len(choices))

    async def forward(choice: Choice) -> None:
        try:
            async with aclosing(choice.pieces()) as pieces:
                async for piece in pieces:
                    await inbox.put((choice.index, piece))
            await inbox.put((choice.index, None))
        except Exception as error:
            await inbox.put(error)

    tasks = [asyncio.create_task(forward(choice)) for choice in choices]
    try:
        left = len(tasks)
        while left:
            item = await inbox.get()
            if isinstance(item, Exception):
                raise item
            left -= item[1] is None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
