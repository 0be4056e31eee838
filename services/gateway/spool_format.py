"""What a spool segment holds: `length | crc32 | JSON`, two records for each interaction, and how to read them back.

`Admitted` is written when the request is accepted, `Final` before its last chunk leaves; the shipper joins them by id.
"""

import struct
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import UUID

import msgspec

# 2: endings tell what was drafted. Endings of version 1 say nothing of it, and are read as such.
VERSION = 2
HEADER = struct.Struct("<II")
LARGEST_RECORD = 64 << 20
SEGMENT_SUFFIX = ".log"


class Admitted(msgspec.Struct, tag="admitted", frozen=True, kw_only=True):
    """Everything known of an interaction before its first token. `started_at` is seconds since the epoch."""

    id: UUID
    project_id: UUID
    api_key_id: UUID | None
    endpoint: str
    stream: bool
    adapter_digest: str | None
    base_digest: str
    generation: int
    namespace: str
    session_key: str | None
    end_user: str | None
    group_key: str
    tags: dict[str, Any]
    config_hash: str
    started_at: float
    messages: list[dict[str, Any]]
    parameters: dict[str, Any]
    prompt_token_ids: list[int]
    prompt_hash: str
    template_hash: str
    tokenizer_hash: str
    retrieved: list[Any]
    # Records written before there were others say nothing of it.
    origin: Literal["live", "pinned"] = "live"
    worked_examples: list[str] = []
    arm: str = "active"
    version: int = VERSION


class Final(msgspec.Struct, tag="final", frozen=True, kw_only=True):
    """How it ended. `adapter_digest` and `speculator_digest` are what really served and drafted; `finished_at` is
    seconds since the epoch or unknown. `speculated` False: of the baseline; `speculation`: see `speculating`."""

    id: UUID
    adapter_digest: str | None
    finish_reason: str
    error: str | None = None
    output: str = ""
    token_ids: list[int] = []
    token_logprobs: list[float | None] = []
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    speculated: bool = True
    speculation: dict[str, Any] | None = None
    speculator_digest: str | None = None
    ttft_ms: float | None = None
    latency_ms: float | None = None
    longest_gap_ms: float | None = None
    mean_logprob: float | None = None
    min_logprob: float | None = None
    finished_at: float | None = None


Record = Admitted | Final
_encode = msgspec.json.Encoder().encode
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def frame(record: Record) -> bytes:
    """The bytes of one record as they stand in a segment."""
    payload = _encode(record)
    return HEADER.pack(len(payload), zlib.crc32(payload)) + payload


class Position(NamedTuple):
    """A place in one gateway process's spool; ordered."""

    segment: int
    offset: int


class Read(NamedTuple):
    """Records with the offset where each begins, and where reading stopped.

    `tail` says what stands there: nothing, the beginning of a record that may still grow, or bytes that are no record.
    """

    records: list[tuple[int, Record]]
    offset: int
    tail: Literal["end", "incomplete", "corrupt"]


def segment_path(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}{SEGMENT_SUFFIX}"


def segment_numbers(directory: Path) -> list[int]:
    """The segments a directory holds, oldest first."""
    return sorted(int(path.stem) for path in directory.glob(f"*{SEGMENT_SUFFIX}") if path.stem.isdigit())


def read_segment(path: Path, offset: int, limit: int) -> Read:
    """Whole records from `offset`, about `limit` bytes of them (at least one record if there is one)."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(limit)
        if len(data) == limit:
            data += file.read(_missing(data))
        at_end = not file.read(1)
    return _parse(data, offset, at_end)


def _missing(data: bytes) -> int:
    """How many more bytes complete the first record, should the limit have cut it."""
    if len(data) < HEADER.size:
        return 0
    length, _ = HEADER.unpack_from(data)
    return max(0, min(int(length), LARGEST_RECORD) + HEADER.size - len(data))


def _parse(data: bytes, base: int, at_end: bool) -> Read:
    records: list[tuple[int, Record]] = []
    place = 0
    while len(data) - place >= HEADER.size:
        length, crc = HEADER.unpack_from(data, place)
        end = place + HEADER.size + length
        if length > LARGEST_RECORD:
            return Read(records, base + place, "corrupt")
        if end > len(data):
            break
        payload = data[place + HEADER.size : end]
        record = _checked(payload, crc)
        if record is None:
            return Read(records, base + place, "corrupt")
        records.append((base + place, record))
        place = end
    # A record cut by the read limit, not by the end of the file, is merely for the next read.
    unfinished = place < len(data) and at_end
    return Read(records, base + place, "incomplete" if unfinished else "end")


def _checked(payload: bytes, crc: int) -> Record | None:
    if zlib.crc32(payload) != crc:
        return None
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, RecursionError):
        return None


def interrupted(admitted: Admitted) -> Final:
    """The ending of an interaction whose gateway died before it could write one."""
    return Final(
        id=admitted.id,
        adapter_digest=admitted.adapter_digest,
        finish_reason="interrupted",
        error="the gateway stopped before the answer was complete",
        prompt_tokens=len(admitted.prompt_token_ids),
    )


def to_row(admitted: Admitted, final: Final) -> dict[str, object]:
    """Column values of `interaction` and `interaction_body`. Postgres text cannot hold NUL, so it becomes U+FFFD."""
    row = msgspec.structs.asdict(admitted) | msgspec.structs.asdict(final)
    row |= {
        "spool_version": row.pop("version"),
        "started_at": _moment(admitted.started_at),
        "finished_at": _moment(final.finished_at),
    }
    return {name: without_nul(value) for name, value in row.items()}


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def without_nul(value: object) -> object:
    """The value with every NUL character in it, keys of documents included, replaced."""
    if isinstance(value, str):
        return value.replace("\0", "\ufffd") if "\0" in value else value
    if isinstance(value, Mapping):
        return {without_nul(key): without_nul(item) for key, item in value.items()}
    if isinstance(value, list) and value and not isinstance(value[0], int | float):
        return [without_nul(item) for item in value]
    return value
