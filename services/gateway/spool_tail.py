"""Reading what gateways spooled: one `Tail` for each gateway process's directory.

Its place is kept in `shipped.json`: `resume`, where reading starts again after a restart (the oldest interaction
without an ending), and `seen`, up to where everything was read. Reading twice is harmless: landing is idempotent.
"""

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import structlog

from services.gateway.log_spool import LOCK_NAME, QUARANTINE
from services.gateway.spool_format import (
    Admitted,
    Final,
    Position,
    interrupted,
    read_segment,
    segment_numbers,
    segment_path,
)
from services.store.failpoints import reach

PLACE_NAME = "shipped.json"
BEGINNING = Position(1, 0)

log = structlog.get_logger()


@dataclass
class Damage:
    """What could not be read back: records cut by a death, segments with a bad checksum, and the bytes behind both."""

    torn_records: int = 0
    bad_segments: int = 0
    lost_bytes: int = 0

    def add(self, other: "Damage") -> None:
        """Count the other's too."""
        self.torn_records += other.torn_records
        self.bad_segments += other.bad_segments
        self.lost_bytes += other.lost_bytes


class Ended(NamedTuple):
    """An interaction whose both records are known."""

    admitted: Admitted
    final: Final


class Tail:
    """One gateway process's spool, read once from front to back.

    What `read` returns stays `unlanded`, and is returned again, until the caller has landed it and calls `keep_place`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.unlanded: list[Ended] = []
        self.orphans: list[Final] = []
        self.damage = Damage()
        self.drained = False
        self._pending: dict[UUID, tuple[Position, Admitted]] = {}
        self._place, self._seen_before = _load_place(directory / PLACE_NAME)

    def read(self, limit: int) -> list[Ended]:
        """Interactions that ended, from about `limit` bytes of log; empty when there is nothing new.

        Once the gateway is dead and everything is read, `drained` is set and what never ended comes as interrupted.
        """
        if self.unlanded:
            return self.unlanded
        # Asked before reading: what is closed now cannot grow behind the reader's back.
        dead = is_dead(self.directory)
        numbers = segment_numbers(self.directory)
        last = numbers[-1] if numbers else 0
        if numbers and self._place.segment < numbers[0]:
            self._place = Position(numbers[0], 0)
        while not self.unlanded and self._place.segment <= last:
            if self._read_on(limit, closed=dead or self._place.segment < last):
                continue
            if self._place.segment == last:
                break
            self._place = Position(self._place.segment + 1, 0)
        if dead and not self.unlanded:
            self.drained = True
            self.unlanded = [Ended(admitted, interrupted(admitted)) for _, admitted in self._pending.values()]
        return self.unlanded

    @property
    def place(self) -> Position:
        """Up to where everything was read."""
        return self._place

    def unended(self) -> list[Admitted]:
        """Interactions that have begun and not ended, as far as it was read."""
        return [admitted for _, admitted in self._pending.values()]

    def keep_place(self) -> None:
        """What was read has landed: remember that across a crash, and drop segments nobody needs any more."""
        self.unlanded = []
        resume = min((place for place, _ in self._pending.values()), default=self._place)
        _save_place(self.directory / PLACE_NAME, resume, self._place)
        reach("shipper.placed")
        for number in segment_numbers(self.directory):
            if number < resume.segment:
                segment_path(self.directory, number).unlink()

    def remove(self) -> None:
        """Delete a drained directory. The place goes last: without it, half a directory would be read anew."""
        for number in segment_numbers(self.directory):
            segment_path(self.directory, number).unlink()
        for name in (LOCK_NAME, PLACE_NAME):
            (self.directory / name).unlink(missing_ok=True)
        self.directory.rmdir()

    def _read_on(self, limit: int, *, closed: bool) -> bool:
        """Read one portion of the current segment. Returns whether the place moved."""
        path = segment_path(self.directory, self._place.segment)
        if not path.exists():
            return False
        portion = read_segment(path, self._place.offset, limit)
        for offset, record in portion.records:
            self._take(Position(self._place.segment, offset), record)
        moved = portion.offset > self._place.offset
        self._place = Position(self._place.segment, portion.offset)
        if closed and portion.tail != "end":
            self._skip_damage(path, portion.tail)
            return True
        return moved

    def _take(self, place: Position, record: Admitted | Final) -> None:
        if isinstance(record, Admitted):
            self._pending[record.id] = (place, record)
            return
        _, admitted = self._pending.pop(record.id, (place, None))
        if admitted is not None:
            self.unlanded.append(Ended(admitted, record))
        elif place >= self._seen_before:
            self.orphans.append(record)

    def _skip_damage(self, path: Path, tail: str) -> None:
        """Nothing behind a bad record can be trusted, its length least of all: keep a copy, say so, read on."""
        size = path.stat().st_size
        lost = size - self._place.offset
        torn = tail == "incomplete"
        self.damage.add(Damage(torn_records=int(torn), bad_segments=int(not torn), lost_bytes=lost))
        if not torn:
            kept = self.directory.parent / QUARANTINE / f"{self.directory.name}-{path.name}"
            kept.parent.mkdir(mode=0o700, exist_ok=True)
            shutil.copyfile(path, kept)
        event = "log_record_torn" if torn else "log_segment_damaged"
        log.error(event, segment=str(path), offset=self._place.offset, lost_bytes=lost)
        self._place = Position(self._place.segment, size)


def is_dead(directory: Path) -> bool:
    """Whether the gateway that wrote here is gone: it holds the lock for life, and the kernel lets go for it."""
    try:
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _load_place(path: Path) -> tuple[Position, Position]:
    if not path.exists():
        return BEGINNING, BEGINNING
    saved = json.loads(path.read_text())
    return Position(*saved["resume"]), Position(*saved["seen"])


def _save_place(path: Path, resume: Position, seen: Position) -> None:
    draft = path.with_suffix(".draft")
    with draft.open("w") as file:
        json.dump({"resume": resume, "seen": seen}, file)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
