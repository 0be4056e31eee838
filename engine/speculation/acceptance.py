"""How likely drafted tokens are to be accepted: decayed counts, a project's own leaning on everybody's.

A cell is a drafter's position together with how sure the drafter was; the counts of a cell forget, so that a project
whose traffic changes is believed soon.
"""

from collections import OrderedDict

DECAY, STRENGTH = 0.98, 8.0
MOST_PROJECTS = 256
POSITIONS = 8
MATCHES = (2, 4, 8, 16)
SHARES = (0.35, 0.6, 0.85, 0.995)
CHANCES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.82, 0.92, 0.97)


class Counts:
    """Accepted and tried, per cell, decayed at every trial."""

    __slots__ = ("accepted", "tried")

    def __init__(self, cells: int) -> None:
        self.accepted = [0.0] * cells
        self.tried = [0.0] * cells

    def learn(self, cell: int, accepted: bool) -> None:
        """One more trial of a cell."""
        self.accepted[cell] = DECAY * self.accepted[cell] + accepted
        self.tried[cell] = DECAY * self.tried[cell] + 1


class Acceptance:
    """One drafter's chances: a project's where it has been seen there, everybody's before that, else as drafted."""

    def __init__(self, cells: int) -> None:
        self._cells = cells
        self._all = Counts(cells)
        self._projects: OrderedDict[tuple[str, str], Counts] = OrderedDict()

    def project(self, namespace: str, digest: str = "") -> Counts:
        """The counts of one project, and for heads of their digest; the longest unused are dropped."""
        name = namespace, digest
        counts = self._projects.get(name)
        if counts is None:
            counts = self._projects[name] = Counts(self._cells)
            if len(self._projects) > MOST_PROJECTS:
                self._projects.popitem(last=False)
        else:
            self._projects.move_to_end(name)
        return counts

    def survival(self, own: Counts, cells: list[int], claims: list[float]) -> list[float]:
        """For each drafted token the probability that it and all before it are accepted. `claims` are the drafter's."""
        alive, chances = 1.0, []
        accepted, tried = self._all.accepted, self._all.tried
        for cell, claim in zip(cells, claims, strict=True):
            parent = (accepted[cell] + STRENGTH * claim) / (tried[cell] + STRENGTH)
            alive *= (own.accepted[cell] + STRENGTH * parent) / (own.tried[cell] + STRENGTH)
            chances.append(alive)
        return chances

    def learn(self, own: Counts, cell: int, accepted: bool) -> None:
        """A drafted token of this cell, all before it accepted, was accepted or not."""
        own.learn(cell, accepted)
        self._all.learn(cell, accepted)

    def forget(self, namespace: str) -> None:
        """Drop a project's counts."""
        for name in [name for name in self._projects if name[0] == namespace]:
            del self._projects[name]


def suffix_cells(match: int, shares: list[float]) -> list[int]:
    """Cells of a suffix draft: position, length of the match, share of the votes."""
    matched = _bucket(match, MATCHES)
    return [
        (min(place, POSITIONS - 1) * (len(MATCHES) + 1) + matched) * (len(SHARES) + 1) + _bucket(share, SHARES)
        for place, share in enumerate(shares)
    ]


def heads_cells(chances: list[float]) -> list[int]:
    """Cells of a heads draft: position and confidence."""
    return [
        min(place, POSITIONS - 1) * (len(CHANCES) + 1) + _bucket(chance, CHANCES)
        for place, chance in enumerate(chances)
    ]


def _bucket(value: float, edges: tuple[float, ...]) -> int:
    bucket = 0
    for edge in edges:
        if value < edge:
            break
        bucket += 1
    return bucket


SUFFIX_CELLS = POSITIONS * (len(MATCHES) + 1) * (len(SHARES) + 1)
HEADS_CELLS = POSITIONS * (len(CHANCES) + 1)
