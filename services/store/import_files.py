"""Reading files of examples: JSONL, CSV, Parquet. Hostile until proved otherwise: bounded, and every row on its own."""

import csv
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from services.errors import InvalidRequest, TooLarge

ROWS_MOST = 100_000
COLUMNS_MOST = 100
BYTES_MOST = 32 * 2**20
UNPACKED_MOST = 256 * 2**20
FORMATS = ("jsonl", "csv", "parquet")


class RowError(NamedTuple):
    """What is wrong with a row, counted from 1 without a heading."""

    row: int
    message: str


class Table(NamedTuple):
    """A file's rows as documents by column; a row that could not be read is a RowError in its place."""

    format: str
    columns: list[str]
    rows: list[dict[str, Any] | RowError]


def read(file_name: str, content: bytes) -> Table:
    """The whole file. Raises InvalidRequest, TooLarge for one that cannot be read at all."""
    kind = format_of(file_name)
    if len(content) > BYTES_MOST:
        raise TooLarge(f"the file has {len(content):,} bytes; imports end at {BYTES_MOST:,}")
    if not content.strip():
        raise InvalidRequest("the file is empty")
    rows: list[dict[str, Any] | RowError] = []
    columns: dict[str, None] = {}
    for row in {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}[kind](content):
        if len(rows) == ROWS_MOST:
            raise TooLarge(f"the file has more than {ROWS_MOST:,} rows; import it in parts")
        rows.append(row)
        if not isinstance(row, RowError):
            columns |= dict.fromkeys(row)
        if len(columns) > COLUMNS_MOST:
            raise InvalidRequest(f"the file has more than {COLUMNS_MOST} columns")
    return Table(kind, list(columns), rows)


def format_of(file_name: str) -> str:
    """By the name's ending. Raises InvalidRequest."""
    ending = PurePath(file_name).suffix.lower().lstrip(".")
    kind = {"ndjson": "jsonl", "json": "jsonl"}.get(ending, ending)
    if kind not in FORMATS:
        raise InvalidRequest(f"{file_name[-60:]!r} is no .jsonl, .csv or .parquet file")
    return kind


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the file is not UTF-8: byte {error.start:,}") from error


def _jsonl(content: bytes) -> Iterator[dict[str, Any] | RowError]:
    number = 0
    for line in _text(content).split("\n"):
        if not line.strip():
            continue
        number += 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield RowError(number, f"is not JSON: {str(error)[:100]}")
            continue
        yield row if isinstance(row, dict) else RowError(number, "is no JSON object")


def _csv(content: bytes) -> Iterator[dict[str, Any] | RowError]:
    reader = csv.reader(io.StringIO(_text(content), newline=""), strict=True)
    try:
        heading = next(reader)
    except StopIteration:
        raise InvalidRequest("the file is empty") from None
    except csv.Error as error:
        raise InvalidRequest(f"the heading cannot be read: {error}") from error
    if len(set(heading)) != len(heading) or not all(heading):
        raise InvalidRequest("the heading must name every column, each differently")
    number = 0
    while True:
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RowError(number, f"cannot be read, and nothing after it: {error}")
            return
        if not cells:  # a blank line, as at the end of many files
            number -= 1
            continue
        if len(cells) != len(heading):
            yield RowError(number, f"has {len(cells)} cells, the heading {len(heading)}")
            continue
        yield dict(zip(heading, cells, strict=True))


def _parquet(content: bytes) -> Iterator[dict[str, Any] | RowError]:
    """Read by a process of its own, `parquet_rows`."""
    with tempfile.TemporaryFile() as given:
        given.write(content)
        given.seek(0)
        reader = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("parquet_rows.py"))],
            stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert reader.stdout is not None
    assert reader.stderr is not None
    try:
        unpacked = 0
        names = reader.stdout.readline(UNPACKED_MOST)
        while line := reader.stdout.readline(UNPACKED_MOST):
            unpacked += len(line)
            if unpacked >= UNPACKED_MOST:
                raise TooLarge(f"the file unpacks to more than {UNPACKED_MOST:,} bytes; import it in parts")
            yield json.loads(line)
        if reader.wait() != 0 or not names:
            said = reader.stderr.read(1000).decode(errors="replace").strip() or "its reader ran out of memory or time"
            raise InvalidRequest(f"the Parquet file cannot be read: {said[:200]}")
    finally:
        reader.kill()
        reader.wait()
        reader.stdout.close()
        reader.stderr.close()


def plain(value: Any) -> Any:  # noqa: ANN401 - a document
    """A cell without the nulls that Parquet puts where other rows have fields."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
