"""The file a long measurement is written to, cell by cell, so that a run that was cut can be continued."""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]
IDENTITY = ("kind", "case", "server", "round", "shape", "concurrency", "qps")


class Results:
    """Settings and records in one JSON file; every change is on disk when the call returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path.exists() else {}
        self.runs: list[Record] = known.get("runs", [])
        self.records: list[Record] = known.get("records", [])
        self._have = set(map(identity, self.records))

    def begin(self, run: Record) -> None:
        """Note the setting of one more run that adds to this file."""
        self.runs.append(run)
        self._write()

    def add(self, record: Record) -> None:
        """Keep one record. What was measured before under the same identity stays, so nothing is measured twice."""
        if identity(record) not in self._have:
            self._have.add(identity(record))
            self.records.append(record)
            self._write()

    def has(self, **names: object) -> bool:
        """Whether a record of this identity was kept."""
        return identity(names) in self._have

    def having(self, kind: str, case: str, server: str, turn: int | None) -> set[tuple[str, int]]:
        """Shape and concurrency of the cells one round of one server has."""
        block = (kind, case, server, turn)
        return {(key[4], key[5]) for key in map(identity, self.records) if key[:4] == block}

    def has_overload(self, case: str, server: str, rate: float) -> bool:
        """Whether a lower rate of arrivals was already more than the server could answer."""
        asked = [r for r in self.records if (r["kind"], r["case"], r["server"]) == ("poisson", case, server)]
        return any(record["overloaded"] and record["qps"] < rate for record in asked)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n  ".join(json.dumps(record) for record in self.records)
        runs = ",\n  ".join(json.dumps(run) for run in self.runs)
        draft = self.path.with_name(f".{self.path.name}")
        draft.write_text(f'{{"runs": [\n  {runs}\n ],\n "records": [\n  {lines}\n ]}}\n')
        draft.replace(self.path)


def identity(record: Record) -> tuple[Any, ...]:
    """What makes a record the same measurement as another."""
    return tuple(record.get(name) for name in IDENTITY)
