"""Stop strings in a text stream: what may be shown, and when to stop."""

from collections.abc import Sequence
from typing import NamedTuple


class Checked(NamedTuple):
    """Text that may be shown now, and the stop string that ended the stream (None while it goes on)."""

    text: str
    stopped: str | None


class StopStrings:
    """Fed text in any pieces, gives the text before the first stop string, however the pieces are cut.

    The stop that *ends* first wins; among those that end together, the one that starts first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped: str | None = None

    def push(self, delta: str) -> Checked:
        """Add text. After a stop everything is swallowed."""
        if self.stopped is not None:
            return Checked("", self.stopped)
        if not self._stops:
            return Checked(delta, None)
        text = self._held + delta
        hits = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if hits:
            _, start, self.stopped = min(hits)
            self._held = ""
            return Checked(text[:start], self.stopped)
        keep = self._possible_prefix(text)
        self._held = text[len(text) - keep :]
        return Checked(text[: len(text) - keep], None)

    def flush(self) -> str:
        """What was held back for a stop that never came."""
        held, self._held = self._held, ""
        return held

    def _possible_prefix(self, text: str) -> int:
        """Length of the longest end of `text` that begins some stop string."""
        return max((overlap(text, stop) for stop in self._stops), default=0)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
