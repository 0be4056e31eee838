"""Requests for adapters that are still being loaded."""

from engine.sequence import Sequence


class Parking:
    """Sequences by the digest they wait for, in the order they came."""

    def __init__(self) -> None:
        self._parked: dict[str, dict[Sequence, None]] = {}

    def enter(self, digest: str, sequence: Sequence) -> None:
        """Wait for a digest."""
        self._parked.setdefault(digest, {})[sequence] = None

    def leave(self, sequence: Sequence) -> None:
        """A sequence ended, perhaps while it waited here."""
        digest = sequence.request.adapter
        if digest in self._parked:
            self._parked[digest].pop(sequence, None)
            if not self._parked[digest]:
                del self._parked[digest]

    def release(self, digest: str) -> list[Sequence]:
        """Everyone who waited for this digest."""
        return list(self._parked.pop(digest, ()))
