"""Loads adapters beside those that serve: read and checked in a thread, copied into a slot between two steps."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from engine.adapters.files import AdapterRefused
from engine.adapters.loading import Adapter, AdapterReader
from engine.adapters.slots import AdapterSlots
from engine.messages import Slot

Answer = Callable[[str], None]


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
        elif self.slots.get(digest) is not None:
            # A roll-back right after a swap: the old adapter is still here, serving its last requests.
            self.slots.revive(digest)
            for waiting in self._unloads.pop(digest, []):
                waiting("the adapter was loaded again before its last request had finished")
            answer("")
        else:
            future = self._thread.submit(self.reader.read, digest, path)
            self._loads[digest] = Load(future, [answer])
            future.add_done_callback(lambda _: self._wake())

    def unload(self, digest: str, answer: Answer) -> None:
        """Drain `digest`. One that is not there is already unloaded."""
        if digest in self._loads:
            answer("this adapter is still loading")
        elif self.slots.get(digest) is None:
            answer("")
        else:
            self._unloads.setdefault(digest, []).append(answer)
            self.slots.drain(digest)

    def settle(self) -> list[str]:
        """Between two steps: install what has been read, answer what is over. Digests whose load ended, well or not."""
        self._answer_unloads()
        ended = [digest for digest, load in list(self._loads.items()) if self._try_install(digest, load)]
        self._answer_unloads()
        return ended

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
        if error is None:
            if not self.slots.make_room():
                return False
            self.slots.install(load.future.result())
        elif not isinstance(error, AdapterRefused):
            error = RuntimeError(f"loading failed: {type(error).__name__}: {error}")
        del self._loads[digest]
        for answer in load.answers:
            answer(str(error) if error else "")
        return True

    def _answer_unloads(self) -> None:
        for digest in [digest for digest in self._unloads if self.slots.get(digest) is None]:
            for answer in self._unloads.pop(digest):
                answer("")
