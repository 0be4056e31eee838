"""Erasure in the log spool: records that were shipped stay in their segment until it is full, so they are overwritten.

In place and with the same length, by an ending that says nothing: readers skip it, and the gateway, which only ever
appends, never notices. Only records that the shipper has read are touched.
"""

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID
from zlib import crc32

import msgspec

from services.gateway.log_spool import QUARANTINE
from services.gateway.spool_format import (
    HEADER,
    Admitted,
    Final,
    Position,
    read_segment,
    segment_numbers,
    segment_path,
)

PORTION = 1 << 20


class Matcher(NamedTuple):
    """What belongs to the subject: records that `covers` says so of, and endings that `known` finds among ids."""

    covers: Callable[[Admitted], bool]
    known: Callable[[Collection[UUID]], set[UUID]]


class _Found(NamedTuple):
    place: Position
    size: int
    record: Admitted | Final


def scrub(directory: Path, until: Position, matcher: Matcher) -> int:
    """Overwrite the subject's records before `until`; returns how many."""
    found = list(_records(directory, until))
    mine = {one.record.id for one in found if isinstance(one.record, Admitted) and matcher.covers(one.record)}
    begun = {one.record.id for one in found if isinstance(one.record, Admitted)}
    # Their beginning went with an earlier segment.
    mine |= matcher.known([one.record.id for one in found if one.record.id not in begun])
    erased = [one for one in found if one.record.id in mine and not _is_blank(one.record)]
    for one in erased:
        _overwrite(segment_path(directory, one.place.segment), one)
    return len(erased)


def _records(directory: Path, until: Position) -> list[_Found]:
    found: list[_Found] = []
    for number in segment_numbers(directory):
        path, offset = segment_path(directory, number), 0
        while Position(number, offset) < until and path.exists():
            portion = read_segment(path, offset, PORTION)
            ends = [start for start, _ in portion.records[1:]] + [portion.offset]
            found += [
                _Found(Position(number, start), end - start, record)
                for (start, record), end in zip(portion.records, ends, strict=True)
                if Position(number, start) < until
            ]
            if portion.offset == offset:
                break
            offset = portion.offset
    return found


def _is_blank(record: Admitted | Final) -> bool:
    return isinstance(record, Final) and record.finish_reason == "erased"


def _overwrite(path: Path, one: _Found) -> None:
    blank = msgspec.json.encode(
        {"type": "final", "id": one.record.id, "adapter_digest": None, "finish_reason": "erased"}
    )
    payload = blank.ljust(one.size - HEADER.size)
    assert len(payload) + HEADER.size == one.size, "every record is longer than an ending that says nothing"
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, HEADER.pack(len(payload), crc32(payload)) + payload, one.place.offset)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def scrub_quarantine(spool: Path, kind: str, name: str, matcher: Matcher) -> int:
    """Drop the subject's rows among those set aside, and copies of damaged segments that name the subject."""
    field = "end_user" if kind == "end_user" else "session_key"
    named = json.dumps({field: name}, ensure_ascii=False, separators=(",", ":"))[1:-1].encode()
    dropped = 0
    for path in sorted((spool / QUARANTINE).glob("*.log")):
        if named in path.read_bytes():
            path.unlink()
            dropped += 1
    rows = spool / QUARANTINE / "rows.jsonl"
    if rows.exists():
        lines = rows.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if not _belongs(line, field, name, matcher)]
        if len(kept) < len(lines):
            draft = rows.with_suffix(".draft")
            draft.write_bytes(b"".join(kept))
            draft.chmod(0o600)
            draft.rename(rows)
            dropped += len(lines) - len(kept)
    return dropped


def _belongs(line: bytes, field: str, name: str, matcher: Matcher) -> bool:
    try:
        row = json.loads(line)["row"]
    except (ValueError, TypeError, KeyError):
        return name.encode() in line
    parts: list[Any] = row if isinstance(row, list) else [row]
    fields = [part for part in parts if isinstance(part, dict)]
    if any(part.get(field) == name for part in fields):
        return True
    ids = {UUID(str(part["id"])) for part in fields if _is_id(part.get("id"))}
    return bool(ids and matcher.known(ids))


def _is_id(value: object) -> bool:
    try:
        UUID(str(value))
    except ValueError:
        return False
    return True
