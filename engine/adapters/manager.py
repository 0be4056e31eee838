"""Loads adapters beside those that serve: read and checked in a thread, copied into a slot between two steps."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from engine.adapters.files import AdapterRefused, AdapterUnreadable
from engine.adapters.loading import Adapter, AdapterReader
from engine.adapters.slots import AdapterSlots
from engine.messages import Slot


class Answer(Protocol):
    """Hears how a command went: why it failed, "" when it took effect; `transient` failures may be tried again."""

    def __call__(self, error: str, transient: bool = False) -> None: ...


@dataclass
class Load:
    """One adapter on its way in: being read, then waiting for a slot. `answers` hear the outcome, "" when ready."""

    future: Future[Adapter]
    answers: list[Answer] = field(default_factory=list)


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
            future = self._thread.submit(self.reader.read, digest, path)
            self._loads[digest] = Load(future, [answer])
            future.add_done_callback(lambda _: self._wake())

    def unload(self, digest: str, answer: Answer) -> None:
        """Drain `digest`. One that is not there is already unloaded."""
        if digest in self._loads:
            answer("this adapter is still loading", transient=True)
        elif self.slots.get(digest) is None:
            answer("")
        else:
            self._unloads.setdefault(digest, []).append(answer)
            self.slots.drain(digest)

    def settle(self) -> Iterator[str]:
        """Between two steps: install what has been read, answer what is over. Digests whose load ended, well or not.

        Each is named before the next is installed: once its requests refer to it, it cannot be evicted for the next.
        """
        if self._unloads:
            self._answer_unloads()
        for digest, load in list(self._loads.items()):
            if self._try_install(digest, load):
                yield digest
        if self._unloads:
            self._answer_unloads()

    def table(self) -> list[Slot]:
        """All adapters and their states, for Status."""
        return self.slots.table(list(self._loads))

    def close(self) -> None:
        """Let the reading thread end."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _try_install(self, digest: str, load: Load) -> bool:
        if not load.future.done():
            return False
        error = load.future.exception()
        if error is None and not self._install(digest, load):
            return False
        del self._loads[digest]
        # Only a refusal says something about the artefact; whatever else went wrong may go well the next time.
        transient = isinstance(error, AdapterUnreadable) or not isinstance(error, AdapterRefused | None)
        if transient and not isinstance(error, AdapterUnreadable):
            error = RuntimeError(f"loading failed: {type(error).__name__}: {error}")
        for answer in load.answers:
            answer(str(error) if error else "", transient)
        return True

    def _install(self, digest: str, load: Load) -> bool:
        """Whether the adapter is in a slot now. First come, first served: nobody is overtaken for long."""
        if self.slots.get(digest) is not None:
            if next(iter(self._loads)) != digest:
                return False
            self._revive(digest)
        elif not self.slots.make_room():
            return False
        else:
            self.slots.install(load.future.result())
        return True

    def _revive(self, digest: str) -> None:
        self.slots.revive(digest)
        for waiting in self._unloads.pop(digest, []):
            waiting("the adapter was loaded again before its last request had finished")

    def _answer_unloads(self) -> None:
        for digest in [digest for digest in self._unloads if self.slots.get(digest) is None]:
            for answer in self._unloads.pop(digest):
                answer("")
