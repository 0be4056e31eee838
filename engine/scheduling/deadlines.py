"""Requests that must have ended by a time, wherever they are."""

import heapq

from engine.sequence import Sequence


class Deadlines:
    """A heap of times. Requests that end earlier leave only a number in it, and not for long."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._open: dict[int, Sequence] = {}

    @property
    def next(self) -> float | None:
        """The earliest deadline on `time.perf_counter`'s clock; its request may have ended already."""
        return self._heap[0][0] if self._heap else None

    def enter(self, sequence: Sequence) -> None:
        """Watch a request, if it has a deadline."""
        seconds = sequence.request.deadline_seconds
        if seconds > 0:
            self._open[sequence.arrival] = sequence
            heapq.heappush(self._heap, (sequence.arrived + seconds, sequence.arrival))

    def leave(self, sequence: Sequence) -> None:
        """Stop watching a request that ended."""
        self._open.pop(sequence.arrival, None)
        if len(self._heap) > 2 * len(self._open) + 64:
            self._heap = [entry for entry in self._heap if entry[1] in self._open]
            heapq.heapify(self._heap)

    def due(self, now: float) -> list[Sequence]:
        """Requests whose time is over; each is named once."""
        over: list[Sequence] = []
        while self._heap and self._heap[0][0] <= now:
            sequence = self._open.pop(heapq.heappop(self._heap)[1], None)
            if sequence is not None:
                over.append(sequence)
        return over
