"""What somebody types into the search box, as a vector from the engine that serves: one loop in one thread."""

import asyncio
import math
import struct
import threading
import time
from dataclasses import dataclass, field
from uuid import UUID, uuid4

from engine.client import EngineClient, EngineGone, PoolFailed
from engine.messages import Pool, Pooling
from engine.text.pooling import search_model, vector_rules
from engine.text.tokenizer import Tokenizer
from services.errors import Unavailable
from services.settings import Settings
from services.store.search import Meaning

# People wait for it, and are then shown what the words find.
SECONDS = 2.0
# How long an engine that was not there is taken to be away, so that not every search waits for it.
AWAY_SECONDS = 5.0
TOKENS = 256
AWAY = "the engine cannot be reached"


@dataclass
class Embedder:
    """Connects when first asked. Safe to call from any thread."""

    settings: Settings
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _loop: asyncio.AbstractEventLoop | None = None
    _client: EngineClient | None = None
    _tokenizer: Tokenizer | None = None
    _how: Pooling = "mean"
    _base: tuple[int | None, str] | None = None
    _away_until: float = 0.0

    def embed(self, text: str, project_id: UUID) -> Meaning:
        """The vector of a text, of length 1. Raises Unavailable with the reason in words."""
        if time.monotonic() < self._away_until:
            raise Unavailable(AWAY)
        try:
            loop = self._started()
            return asyncio.run_coroutine_threadsafe(self._embed(text, project_id), loop).result(SECONDS + 1)
        except (EngineGone, TimeoutError) as error:
            self._away_until = time.monotonic() + AWAY_SECONDS
            raise Unavailable(AWAY) from error
        except (PoolFailed, ValueError) as error:
            raise Unavailable(str(error)) from error

    def close(self) -> None:
        """End the thread; what is in flight fails."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._let_go(), loop).result(5)
            loop.call_soon_threadsafe(loop.stop)

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._tokenizer is None:
                self._how = vector_rules(self.settings.model_path).for_search()
                self._tokenizer = Tokenizer.load(self.settings.model_path)
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="embedder", daemon=True).start()
            return self._loop

    async def _embed(self, text: str, project_id: UUID) -> Meaning:
        if self._client is None:
            self._client = EngineClient(self.settings.engine_socket, connect_seconds=0.5)
        assert self._tokenizer is not None
        ids = (self._tokenizer.encode(text, add_special_tokens=True) or self._tokenizer.encode(" "))[:TOKENS]
        async with asyncio.timeout(SECONDS):
            base = await self._served(self._client)
            pooled = await self._client.pool(
                Pool(
                    id=uuid4().hex, prompt=ids, how=self._how, namespace=project_id.hex, cache_salt=project_id.hex,
                    share="console",
                )
            )  # fmt: skip
        values = struct.unpack(f"<{len(pooled.vector) // 4}f", pooled.vector)
        length = math.sqrt(sum(value * value for value in values))
        if not math.isfinite(length) or length == 0:
            raise ValueError("the model gave a vector that says nothing")
        return Meaning([value / length for value in values], search_model(base, self._how))

    async def _served(self, client: EngineClient) -> str:
        """The base model's digest, asked once for each start of the engine."""
        if self._base is None or self._base[0] != client.epoch:
            status = await client.status()
            self._base = (status.epoch, status.base)
        return self._base[1]

    async def _let_go(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None
