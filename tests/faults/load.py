"""Clients that never stop asking, and remember exactly what was acknowledged to them."""

import asyncio
import json
import threading
from dataclasses import dataclass, field
from typing import Self

import httpx

CLIENTS = 8


@dataclass
class Acknowledged:
    """Answers whose end reached the client, by interaction id, and how many requests failed on the way."""

    texts: dict[str, str] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    failed: int = 0

    def add(self, interaction_id: str, text: str) -> None:
        if interaction_id in self.texts:
            self.repeated.append(interaction_id)
        self.texts[interaction_id] = text


class Load:
    """Runs in a thread of its own between `with` and its end."""

    def __init__(self, url: str, key: str, *, max_tokens: int = 12, clients: int = CLIENTS) -> None:
        self.seen = Acknowledged()
        self._url = f"{url}/v1/chat/completions"
        self._headers = {"authorization": f"Bearer {key}"}
        self._max_tokens = max_tokens
        self._clients = clients
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(timeout=30)

    async def _run(self) -> None:
        async with httpx.AsyncClient(headers=self._headers, timeout=30) as client:
            await asyncio.gather(*(self._ask_forever(client, index) for index in range(self._clients)))

    async def _ask_forever(self, client: httpx.AsyncClient, index: int) -> None:
        count = 0
        while not self._stopping.is_set():
            count += 1
            body = {
                "model": "entities", "messages": [{"role": "user", "content": f"{index} {count}"}],
                "max_tokens": self._max_tokens, "user": f"client-{index}", "stream": index % 2 == 0,
            }  # fmt: skip
            try:
                answer = await (self._stream(client, body) if body["stream"] else self._whole(client, body))
            except httpx.TransportError:
                answer = None
            if answer is None:
                self.seen.failed += 1
                await asyncio.sleep(0.05)
            else:
                self.seen.add(*answer)

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, object]) -> tuple[str, str] | None:
        """The answer as soon as its last chunk has come, whatever happens to the connection afterwards."""
        text = ""
        async with client.stream("POST", self._url, json=body) as response:
            if response.status_code != 200:
                return None
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return None
                choice = event["choices"][0]
                text += choice["delta"].get("content") or ""
                if choice["finish_reason"]:
                    return response.headers["x-whet-interaction-id"], text
        return None

    async def _whole(self, client: httpx.AsyncClient, body: dict[str, object]) -> tuple[str, str] | None:
        response = await client.post(self._url, json=body)
        if response.status_code != 200:
            return None
        return response.headers["x-whet-interaction-id"], response.json()["choices"][0]["message"]["content"]
