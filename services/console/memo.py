"""Figures that cost more than they change: computed once a while, shared by every page that shows them."""

import time
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class Memo(Generic[T]):
    """Values kept for `seconds`. Two threads that ask at once may both compute; the later answer stays."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._lock = Lock()
        self._kept: dict[Hashable, tuple[float, T]] = {}

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value kept under `key`, or a fresh one. What `compute` raises is raised and not kept."""
        with self._lock:
            found = self._kept.get(key)
        if found is not None and self._clock() < found[0]:
            return found[1]
        value = compute()
        now = self._clock()
        with self._lock:
            self._kept = {name: entry for name, entry in self._kept.items() if now < entry[0]}
            self._kept[key] = (now + self._seconds, value)
        return value
