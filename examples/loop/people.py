"""The app that sends traffic and the reviewers that correct it, over the same HTTP that real ones use."""

import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
from openai import OpenAI, OpenAIError, omit
from openai.types.chat import ChatCompletionMessageParam

from examples.grammars.common import Example, Message, stream
from examples.grammars.simulate import APPLICATIONS, review

MAX_TOKENS = 200


@dataclass
class Counts:
    """What one side saw with its own eyes, to be compared with the rows in Postgres. `answered` are the ids of answers
    received whole."""

    sent: int = 0
    failed: int = 0
    reviewed: int = 0
    corrected: int = 0
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    answered: list[str] = field(default_factory=list)


class App:
    """Clients of one application, streaming distinct prompts at `rate` requests a second until told to stop.

    `rate` may be changed at any time. A paced app leaves the processor to the trainer, as real traffic mostly does.
    """

    def __init__(
        self, gateway_url: str, key: str, application: str, *, clients: int, rate: float, seed: int = 0
    ) -> None:
        self.counts = Counts()
        self.rate = rate
        self._next = time.monotonic()
        self._application = application
        self._prompts = stream(APPLICATIONS[application], "train", seed)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._open = threading.Event()
        self._open.set()
        self._busy = 0
        self._openai = OpenAI(base_url=f"{gateway_url}/v1", api_key=key, max_retries=0, timeout=60)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(clients)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let every client finish the request it is in."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        self._openai.close()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """No traffic meanwhile, once the requests in flight have ended."""
        self._open.clear()
        deadline = time.monotonic() + 60
        while self._busy and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield
        finally:
            self._open.set()

    def ask(self, messages: list[Message], user: str | None = None) -> str:
        """One streamed request; counted, and raised again when it fails. `user` is logged with it."""
        typed = cast(list[ChatCompletionMessageParam], messages)
        try:
            chunks = self._openai.chat.completions.create(
                model=self._application, messages=typed, stream=True, temperature=0, max_tokens=MAX_TOKENS,
                user=user if user is not None else omit,
            )  # fmt: skip
            received = list(chunks)
            if not received:
                raise OpenAIError("an empty stream")
        except (OpenAIError, httpx.HTTPError) as error:
            with self._lock:
                self.counts.sent += 1
                self.counts.failed += 1
                self.counts.errors.append(f"{type(error).__name__}: {error}")
            raise
        with self._lock:
            self.counts.sent += 1
            self.counts.answered.append(received[0].id)
        return "".join(chunk.choices[0].delta.content or "" for chunk in received if chunk.choices)

    def _work(self) -> None:
        for example in self._examples():
            try:
                self.ask(example.messages)
            except (OpenAIError, httpx.HTTPError):
                time.sleep(0.5)
            finally:
                with self._lock:
                    self._busy -= 1

    def _examples(self) -> Iterator[Example]:
        while not self._stop.is_set():
            with self._lock:
                example = next(self._prompts)
                due = max(self._next, time.monotonic())
                self._next = due + 1 / self.rate
            self._stop.wait(due - time.monotonic())
            self._enter()
            yield example

    def _enter(self) -> None:
        """Wait while it is to be quiet; who is counted as busy before the door shuts is waited for."""
        while True:
            self._open.wait()
            with self._lock:
                self._busy += 1
                if self._open.is_set():
                    return
                self._busy -= 1


class Reviewer:
    """One signed-in reviewer who judges what the queue hands out as the application's oracle would."""

    def __init__(self, console_url: str, sign_in_path: str, project: str, application: str) -> None:
        self.counts = Counts()
        self._project = project
        self._application = application
        self._http = httpx.Client(base_url=console_url, timeout=30, headers={"Origin": console_url})
        self._http.post(sign_in_path, follow_redirects=True).raise_for_status()

    def close(self) -> None:
        self._http.close()

    def work(self, stop: threading.Event) -> None:
        """Lease, judge, submit until the queue stays empty for three seconds or `stop` is set."""
        idle_since = time.monotonic()
        while not stop.is_set() and time.monotonic() - idle_since < 3:
            items = self.lease()
            for item in items:
                self.judge(item)
            if items:
                idle_since = time.monotonic()
            else:
                time.sleep(0.3)

    def lease(self) -> list[dict[str, Any]]:
        answer = self._http.post(f"/p/{self._project}/review/lease", json={})
        answer.raise_for_status()
        items: list[dict[str, Any]] = answer.json()["items"]
        return items

    def judge(self, item: dict[str, Any]) -> None:
        """Submit a judgement; a lease lost to a slow machine is someone else's item now, not an error."""
        verdict, said = self._say(item)
        body = said | {"tags": [], "lease_token": item["lease_token"], "idempotency_key": str(uuid.uuid4())}
        answer = self._http.post(f"/p/{self._project}/review/items/{item['id']}/annotations", json=body)
        if answer.status_code == httpx.codes.CONFLICT:
            return
        answer.raise_for_status()
        self.counts.reviewed += 1
        self.counts.corrected += verdict == "correct"

    def _say(self, item: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The verdict, and the part of the body that says it."""
        if item["pair"]:
            good = [review(self._application, item["messages"], text).verdict == "accept" for text in item["pair"]]
            side = "tie" if good[0] == good[1] else "left" if good[0] else "right"
            return "prefer", {"verdict": "prefer", "preference": side}
        verdict = review(self._application, item["messages"], item["output"])
        return verdict.verdict, {"verdict": verdict.verdict, "correction": verdict.correction}
