"""What a trainer writes to stderr, for the run's page: a few plain lines, whatever a library or a row put there."""

import re
from pathlib import Path

# The first lines say what a library warns of; of a trainer that dies, the end is kept as well.
MOST_LINES = 30
LONGEST_LINE = 400
MORE = "more follows and is not kept here"
_CHUNK = 1 << 16
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class Follower:
    """Reads a file that another process appends to. `lines` returns what is new, as long as few enough came before."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = 0
        self._left = MOST_LINES

    def lines(self) -> list[str]:
        """Whole lines since the last call, of 64 KiB at most; empty ones are passed over. Then once `MORE`, and then
        nothing."""
        if self._left < 0:
            return []
        with self._file.open("rb") as file:
            file.seek(self._offset)
            chunk = file.read(_CHUNK)
        # A chunk without an end of line is a part of an endless one.
        length = chunk.rfind(b"\n") + 1 or (len(chunk) if len(chunk) == _CHUNK else 0)
        self._offset += length
        found = [line for line in map(_shown, chunk[:length].decode(errors="replace").split("\n")) if line]
        told, self._left = found[: self._left], self._left - len(found)
        return [*told, MORE] if self._left < 0 else told


def plain(text: str) -> str:
    """Without colours and without what a terminal would obey, a page would turn round or Postgres refuses (NUL)."""
    return "".join(
        one if one.isprintable() or one in "\n\t" else "�" for one in _COLOUR.sub("", text).replace("\r", "\n")
    )


def _shown(line: str) -> str:
    """A line as a terminal would leave it: a bar that is drawn over and over is its last state."""
    return plain(line.rstrip().rpartition("\r")[2])[:LONGEST_LINE]
