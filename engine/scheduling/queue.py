"""Who is next. Interactive before batch; inside a priority those who were interrupted, then the share served least.

A share (a key, usually) is charged a token for each of its prompts' tokens that must be computed and for each one
generated. One that comes back after a pause starts level with the least served of those at work, or where it stood
if that is worse: neither saving up nor pausing pays.
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Collection, Iterator
from itertools import islice, zip_longest

from engine.sequence import PRIORITY_RANK, Sequence, by_rank


class Line:
    """One share's waiting sequences, oldest first. `members` counts those that run, too."""

    __slots__ = ("members", "served", "share", "waiting")

    def __init__(self, share: str) -> None:
        self.share = share
        self.served = 0
        self.members = 0
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()


class Queue:
    """Sequences that wait, and what every share has been served."""

    def __init__(self) -> None:
        self._lines: list[dict[str, Line]] = [{} for _ in PRIORITY_RANK]
        self._interrupted: list[list[Sequence]] = [[] for _ in PRIORITY_RANK]
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for interrupted, lines in zip(self._interrupted, self._lines, strict=True):
            yield from interrupted
            for line in lines.values():
                yield from line.waiting

    def enter(self, sequence: Sequence) -> None:
        """Queue a new sequence; it is a member of its share until it leaves."""
        lines = self._lines[sequence.rank[0]]
        line = lines.setdefault(sequence.request.share, Line(sequence.request.share))
        if not line.members:
            line.served = max(line.served, self._floor(lines) or 0)
        line.members += 1
        line.waiting[sequence] = None
        self._count += 1

    def interrupt(self, sequence: Sequence) -> None:
        """Queue a member again that was running; it goes on before newcomers begin."""
        insort(self._interrupted[sequence.rank[0]], sequence, key=by_rank)
        self._count += 1

    def take(self, sequence: Sequence) -> None:
        """A waiting member begins to run."""
        interrupted = self._interrupted[sequence.rank[0]]
        if sequence in interrupted:
            interrupted.remove(sequence)
        else:
            del self._line(sequence).waiting[sequence]
        self._count -= 1

    def leave(self, sequence: Sequence) -> None:
        """A member that does not wait (any more) ends."""
        line = self._line(sequence)
        line.members -= 1
        if not line.members:
            self._prune(self._lines[sequence.rank[0]])

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """Count computed tokens against a member's share."""
        self._line(sequence).served += tokens

    def head(self, held: Collection[Sequence] = ()) -> Sequence | None:
        """The most deserving sequence that is not held back for the moment."""
        for interrupted, lines in zip(self._interrupted, self._lines, strict=True):
            for sequence in interrupted:
                if sequence not in held:
                    return sequence
            firsts = [
                (line.served, first.arrival, first)
                for line in lines.values()
                if (first := next((each for each in line.waiting if each not in held), None)) is not None
            ]
            if firsts:
                return min(firsts)[2]
        return None

    def front(self, most: int) -> list[Sequence]:
        """Up to `most` that wait: by priority, the interrupted first, then the shares in turn."""
        found: list[Sequence] = []
        for interrupted, lines in zip(self._interrupted, self._lines, strict=True):
            rounds = zip_longest(*(line.waiting for line in lines.values() if line.waiting))
            found += interrupted
            found += islice((each for turn in rounds for each in turn if each is not None), most)
        return found[:most]

    def _line(self, sequence: Sequence) -> Line:
        return self._lines[sequence.rank[0]][sequence.request.share]

    def _floor(self, lines: dict[str, Line]) -> int | None:
        """What the least served of the shares at work was served."""
        return min((line.served for line in lines.values() if line.members), default=None)

    def _prune(self, lines: dict[str, Line]) -> None:
        """Forget shares at rest that would start level with the others anyway."""
        floor = self._floor(lines)
        for line in [line for line in lines.values() if not line.members]:
            if floor is None or line.served <= floor:
                del lines[line.share]
