"""Erased rows in exports below a home: files are written again without them, all others stay as they are.

Every row of an export names its example's hash or its interaction's id, so rows are found exactly: in JSON lines, CSV
and Parquet. A file of another kind cannot be searched; it is left alone and named on the certificate.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from services.store.erasure_cover import Subject
from worker.erasure import progress

NAMING = ("example", "id", "interaction_id")
NAMED = frozenset(NAMING)
MANIFEST = "manifest.json"
Row = dict[str, Any]


class Gone(NamedTuple):
    """What is erased: hashes and ids that rows may name, and what `subject` asked or said until `asked_at`."""

    names: frozenset[str]
    subject: Subject
    asked_at: str

    def left_of(self, row: Row) -> Row | None:
        """The row without what is erased; None when nothing is left."""
        if any(str(row.get(name, "")) in self.names for name in NAMING) or self._asked(row):
            return None
        said = _document(row.get("feedback"))
        kept = [one for one in said if not self._said(one)] if isinstance(said, list) else said
        if kept == said:
            return row
        return {**row, "feedback": kept if isinstance(row["feedback"], list) else json.dumps(kept) if kept else ""}

    def _asked(self, row: Row) -> bool:
        name = row.get("end_user" if self.subject.kind == "end_user" else "session_key")
        # A sheet's cell that would be a formula begins with an apostrophe.
        return name in (self.subject.name, f"'{self.subject.name}") and _until(row.get("started_at"), self.asked_at)

    def _said(self, opinion: object) -> bool:
        author = opinion.get("author") if isinstance(opinion, dict) else None
        return self.subject.kind == "end_user" and author == self.subject.name


class Cleaned(NamedTuple):
    """How many files were written again, how many rows they lost or lost something of, and what was not searched."""

    rewritten: int
    rows: int
    not_searched: list[str]


def clean(directory: Path, gone: Gone) -> Cleaned:
    """Everything below a directory, which need not exist. Files keep their rows' order."""
    rewritten, rows, not_searched = 0, 0, []
    for path in sorted(directory.rglob("*")) if directory.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            continue
        write = None if path.is_symlink() else WRITERS.get(path.suffix.lower())
        if path.name == MANIFEST:
            continue
        try:
            changed = write(path, gone) if write else None
        except (ValueError, csv.Error, OSError):
            changed = None
        if changed is None:
            not_searched.append(str(path.relative_to(directory)))
        elif changed:
            rewritten, rows = rewritten + 1, rows + changed
            _correct_manifest(path, changed)
    return Cleaned(rewritten, rows, not_searched)


def _jsonl(path: Path, gone: Gone) -> int:
    """Raises ValueError for a line that is no JSON object."""

    def lines() -> Iterator[tuple[bytes | None, bool]]:
        with path.open("rb") as file:
            for line in file:
                row = json.loads(line) if line.strip() else {}
                if not isinstance(row, dict) or not NAMED.intersection(row or NAMED):
                    raise ValueError("a line that names no row of Whet's")
                left = gone.left_of(row)
                yield _json_line(left, line, row), left is not row

    return _written(path, lines)


def _json_line(left: Row | None, line: bytes, row: Row) -> bytes | None:
    if left is None:
        return None
    return line if left is row else json.dumps(left, ensure_ascii=False).encode() + b"\n"


def _csv(path: Path, gone: Gone) -> int:
    """Raises csv.Error, ValueError."""
    csv.field_size_limit(2**31 - 1)  # an exported cell may hold a whole chat

    def lines() -> Iterator[tuple[bytes | None, bool]]:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            heading = list(reader.fieldnames or [])
            if not NAMED.intersection(heading):
                raise ValueError("no column names the rows")
            yield _csv_line(heading), False
            for row in reader:
                left = gone.left_of(row)
                yield _csv_line([left[name] for name in heading]) if left else None, left is not row

    return _written(path, lines)


def _csv_line(cells: list[Any]) -> bytes:
    written: list[str] = []
    csv.writer(_Lines(written)).writerow(cells)
    return "".join(written).encode()


class _Lines:
    """A file that is a list."""

    def __init__(self, into: list[str]) -> None:
        self._into = into

    def write(self, text: str) -> int:
        self._into.append(text)
        return len(text)


def _written(path: Path, lines: Callable[[], Iterable[tuple[bytes | None, bool]]]) -> int:
    """Write a draft of what is left and put it in the file's place; nothing, when nothing is erased."""
    changed = sum(differs for _, differs in lines())
    if changed:
        draft = path.with_name(f".{path.name}.draft")
        with draft.open("wb") as file:
            file.writelines(line for line, _ in lines() if line)
        _replace(draft, path)
    return changed


def _parquet(path: Path, gone: Gone) -> int:
    """Raises ValueError (Arrow's errors are), OSError."""
    import pyarrow as pa  # a second of loading that only Parquet should pay
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    naming = [name for name in NAMING if name in table.column_names]
    if not naming:
        raise ValueError("no column names the rows")
    cells = table.select(naming).to_pylist()
    kept = [not any(str(cell.get(name, "")) in gone.names for name in naming) for cell in cells]
    if all(kept):
        return 0
    draft = path.with_name(f".{path.name}.draft")
    pq.write_table(table.filter(pa.array(kept)), draft)
    _replace(draft, path)
    return kept.count(False)


def _replace(draft: Path, path: Path) -> None:
    draft.chmod(path.stat().st_mode & 0o777)
    draft.replace(path)


def _correct_manifest(path: Path, changed: int) -> None:
    """What stands beside a file says how many rows it has."""
    beside = path.with_name(MANIFEST)
    if path.suffix != ".jsonl" or not beside.is_file():
        return
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
        found["rows"][path.stem] -= changed
    except (ValueError, TypeError, KeyError):
        return
    draft = beside.with_name(f".{MANIFEST}.draft")
    draft.write_text(json.dumps({**found, "erased": found.get("erased", 0) + changed}, indent=2) + "\n")
    _replace(draft, beside)


def _document(value: object) -> object:
    if not isinstance(value, str) or not value:
        return value
    try:
        return json.loads(value)
    except ValueError:
        return None


def _until(moment: object, asked_at: str) -> bool:
    """A row that does not say when is taken for an old one."""
    try:
        return progress.utc(str(moment)) <= asked_at
    except ValueError:
        return True


WRITERS: dict[str, Callable[[Path, Gone], int]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
