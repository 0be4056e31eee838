"""`SyncEngineClient`: the engine's client for code without an event loop (workers). No torch."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

from engine.client import Completion, EngineClient, EngineGone, PoolFailed
from engine.messages import Generate, Pool, Pooled, Status

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class SyncEngineClient:
    """The same client for code without an event loop: a private loop that runs only inside a call. One thread."""

    def __init__(self, address: str, *, connect_seconds: float = 5.0, silence_seconds: float = 60.0) -> None:
        self._runner = asyncio.Runner()

        async def connect() -> EngineClient:
            return EngineClient(address, connect_seconds=connect_seconds, silence_seconds=silence_seconds)

        self._client = self._runner.run(connect())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the connection and the loop."""
        self._runner.run(self._client.close())
        self._runner.close()

    def generate(self, message: Generate) -> Completion:
        """Run one request to its end. Raises EngineGone."""
        return self._runner.run(self._client.complete(message))

    def generate_many(self, messages: Sequence[Generate], *, concurrency: int = 64) -> list[Completion]:
        """Run all, at most `concurrency` at once, answers in the order asked. The first EngineGone cancels the rest."""
        return self._runner.run(_all(self._client.complete, messages, concurrency))

    def pool(self, message: Pool) -> Pooled:
        """One prompt's vector. Raises PoolFailed or EngineGone."""
        return self._runner.run(self._client.pool(message))

    def pool_many(self, messages: Sequence[Pool], *, concurrency: int = 64) -> list[Pooled]:
        """As generate_many; the first PoolFailed or EngineGone cancels the rest."""
        return self._runner.run(_all(self._client.pool, messages, concurrency))

    def load_adapter(self, digest: str, path: str) -> None:
        """See EngineClient.load_adapter."""
        self._runner.run(self._client.load_adapter(digest, path))

    def unload_adapter(self, digest: str, *, seconds: float | None = None) -> None:
        """See EngineClient.unload_adapter."""
        self._runner.run(self._client.unload_adapter(digest, seconds=seconds))

    def load_speculator(self, digest: str, path: str, replaces: str = "") -> str:
        """See EngineClient.load_speculator."""
        return self._runner.run(self._client.load_speculator(digest, path, replaces))

    def unload_speculator(self, digest: str) -> None:
        """See EngineClient.unload_speculator."""
        self._runner.run(self._client.unload_speculator(digest))

    def learn(self, namespace: str, responses: list[list[int]]) -> None:
        """See EngineClient.learn."""
        self._runner.run(self._client.learn(namespace, responses))

    def forget(self, namespace: str) -> None:
        """See EngineClient.forget."""
        self._runner.run(self._client.forget(namespace))

    def status(self) -> Status:
        """See EngineClient.status."""
        return self._runner.run(self._client.status())


async def _all(run: Callable[[Asked], Awaitable[Answer]], messages: Sequence[Asked], concurrency: int) -> list[Answer]:
    """Answers in the order asked; the first failure cancels the rest and is raised bare."""
    gate = asyncio.Semaphore(concurrency)

    async def one(message: Asked) -> Answer:
        async with gate:
            return await run(message)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(message)) for message in messages]
    except* (EngineGone, PoolFailed) as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
