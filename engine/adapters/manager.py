"""Loads adapters beside those that serve: read and checked in a thread, copied into a slot between two steps."""

import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from engine.adapters.files import AdapterRefused, momentary
from engine.adapters.loading import Adapter, AdapterReader
from engine.adapters.slots import AdapterSlots
from engine.messages import Slot

MAX_ERROR = 2000


class Answer(Protocol):
    """Hears how a command went: why it failed, "" when it took effect; `transient` failures may be tried again."""

    def __call__(self, error: str, transient: bool = False) -> None: ...


@dataclass
class Load:
    """One adapter on its way in: unread, being read, then waiting for a slot. `answers` hear how it ended."""

    path: str
    answers: list[Answer]
    future: Future[Adapter] | None = None

    @property
    def over(self) -> bool:
        """Whether it was read, well or not."""
        return self.future is not None and self.future.done()


class AdapterManager:
    """LoadAdapter and UnloadAdapter. All methods belong to the engine's thread; only reading happens elsewhere."""

    def __init__(self, reader: AdapterReader, slots: AdapterSlots, wake: Callable[[], None]) -> None:
        self.slots = slots
        self.reader = reader
        self._wake = wake
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-reader")
        self._loads: dict[str, Load] = {}
        self._unloads: dict[str, list[Answer]] = {}

    def loading(self, digest: str) -> bool:
        """Whether requests for it should wait rather than be refused."""
        return digest in self._loads

    def load(self, digest: str, path: str, answer: Answer) -> None:
        """Make `digest` ready. One that is ready or draining is answered at once; a second load joins the first."""
        if self.slots.ready(digest):
            answer("")
        elif digest in self._loads:
            self._loads[digest].answers.append(answer)
        elif self.slots.get(digest) is not None and not self._loads:
            # A roll-back right after a swap: the old adapter is still here, serving its last requests.
            self._revive(digest)
            answer("")
        else:
            # A draining adapter whose slot others wait for lines up behind them, or they would starve.
            self._loads[digest] = Load(path, [answer])
            self._read_ahead()

    def unload(self, digest: str, answer: Answer) -> None:
        """Drain `digest`. One that is not there is already unloaded."""
        if digest in self._loads:
            answer("this adapter is still loading", transient=True)
        elif self.slots.get(digest) is None:
            answer("")
        else:
            self._unloads.setdefault(digest, []).append(answer)
            self.slots.drain(digest)

    @property
    def restless(self) -> bool:
        """Whether `settle` would get on: an unload is over, or what was read failed or can have a slot."""
        if any(self.slots.get(digest) is None for digest in self._unloads):
            return True
        return any(load.over and self._can_end(digest, load) for digest, load in self._loads.items())

    def settle(self) -> Iterator[str]:
        """Between two steps: install what has been read, answer what is over. Digests whose load ended, well or not.

        Each is named before the next is installed: once its requests refer to it, it cannot be evicted for the next.
        """
        if self._unloads:
            self._answer_unloads()
        for digest, load in list(self._loads.items()):
            if self._try_install(digest, load):
                yield digest
        self._read_ahead()
        if self._unloads:
            self._answer_unloads()

    def table(self) -> list[Slot]:
        """All adapters and their states, for Status."""
        return self.slots.table(list(self._loads))

    def close(self) -> None:
        """Let the reading thread end."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self) -> None:
        """Read the next in line, but hold no more adapters in memory than there are slots for them."""
        held = sum(load.future is not None for load in self._loads.values())
        for digest, load in self._loads.items():
            if held >= self.slots.total:
                return
            if load.future is None:
                load.future = self._thread.submit(self.reader.read, digest, load.path)
                load.future.add_done_callback(lambda _: self._wake())
                held += 1

    def _try_install(self, digest: str, load: Load) -> bool:
        if load.future is None or not load.future.done():
            return False
        error, broken = load.future.exception(), False
        if error is None:
            try:
                if not self._install(digest, load.future.result()):
                    return False
            except Exception as failure:
                # The slot is free still, and the artefact was found good: the machine's fault.
                traceback.print_exc(file=sys.stderr)
                error, broken = failure, True
        del self._loads[digest]
        for answer in load.answers:
            answer(sentence(error), broken or (error is not None and momentary(error)))
        return True

    def _can_end(self, digest: str, load: Load) -> bool:
        """Whether a load that was read needs to wait no longer."""
        if load.future is None or load.future.exception() is not None:
            return True
        if self.slots.get(digest) is not None:
            return next(iter(self._loads)) == digest
        return self.slots.has_room

    def _install(self, digest: str, adapter: Adapter) -> bool:
        """Whether the adapter is in a slot now. First come, first served: nobody is overtaken for long."""
        if self.slots.get(digest) is not None:
            if next(iter(self._loads)) != digest:
                return False
            self._revive(digest)
        elif not self.slots.make_room():
            return False
        else:
            self.slots.install(adapter)
        return True

    def _revive(self, digest: str) -> None:
        self.slots.revive(digest)
        for waiting in self._unloads.pop(digest, []):
            waiting("the adapter was loaded again before its last request had finished")

    def _answer_unloads(self) -> None:
        for digest in [digest for digest in self._unloads if self.slots.get(digest) is None]:
            for answer in self._unloads.pop(digest):
                answer("")


def sentence(error: BaseException | None) -> str:
    """What is answered. It may quote the artefact, whose JSON can hold what no message can: half a surrogate pair."""
    if error is None:
        return ""
    text = str(error) if isinstance(error, AdapterRefused) else f"loading failed: {type(error).__name__}: {error}"
    return text[:MAX_ERROR].encode("utf-8", "replace").decode()
