"""Which examples a run trains on: its revision's, some older ones, less the groups that only measure."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from services.errors import NotFound
from services.store import replay
from services.store.jobs import JobFailed
from services.store.models import Example, Run
from services.store.run_params import TrainParams
from worker.training.rows import AnyRow, usable

# Fewer groups are worth more as training data than as a measure.
LEAST_GROUPS = 60
# A sweep decides by its validation rows.
SWEEP_SHARE = 0.2


class Drawn(NamedTuple):
    """Older examples, and what the page says of them."""

    examples: list[Example]
    told: dict[str, Any]


class Parts(NamedTuple):
    """Rows to train on, and rows of other groups to measure by."""

    trained: list[AnyRow]
    held_back: list[AnyRow]


def sum_usable(kind: str, examples: Sequence[Example]) -> int:
    """How many examples a run of this kind can use."""
    return sum(usable(kind, example) for example in examples)


def draw(session: Session, run: Run, params: TrainParams, own: int) -> Drawn:
    """Older examples so that they are `params.replay` of all, as far as there are any; once drawn, the same again.

    Raises JobFailed when the data set to replay is not there.
    """
    wanted = math.ceil(own * params.replay / (1 - params.replay)) if params.replay else 0
    drawn_before = "replay" in (run.preflight or {})
    if wanted and not drawn_before:
        try:
            replay.keep(session, run.id, replay.pool(session, run, params.replay_from, limit=wanted))
        except NotFound as error:
            raise JobFailed(f"replay_from: {error.message}") from error
    found = replay.kept(session, run.id)
    share = len(found) / (own + len(found)) if found else 0.0
    return Drawn(found, {"wanted": wanted, "drawn": len(found), "share": round(share, 4), "from": params.replay_from})


def parted(rows: Sequence[AnyRow], groups: Mapping[str, str], params: TrainParams) -> Parts:
    """Hold back a share of the groups. The side of a group is a hash of it: more data moves nobody across."""
    share = max(params.validation, SWEEP_SHARE) if params.sweep > 1 else params.validation
    if not share or len({groups[row.example_id] for row in rows}) < LEAST_GROUPS:
        return Parts(list(rows), [])
    aside = [_draw(groups[row.example_id]) < share for row in rows]
    return Parts(
        [row for row, out in zip(rows, aside, strict=True) if not out],
        [row for row, out in zip(rows, aside, strict=True) if out],
    )


def _draw(group: str) -> float:
    """Uniform in [0, 1), apart from the split's own hash."""
    return int.from_bytes(hashlib.sha256(f"validation:{group}".encode()).digest()[:8]) / 2**64


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
