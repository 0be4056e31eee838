"""Examples that every kind of run can use, and a training of them without Postgres."""

import os
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from engine.digest import base_digest
from engine.text.tokenizer import Tokenizer
from services.store.models import Example
from tests.training.tiny import TEMPLATE
from worker.training.parting import write_lines
from worker.training.preflight import check
from worker.training.rows import AnyRow, arranged
from worker.training.spec import Spec

SPACE = UUID(int=7)
QUICK: dict[str, Any] = {
    "rank": 4, "alpha": 8.0, "lr": 0.01, "epochs": 4.0, "max_steps": 0, "batch_size": 4, "warmup": 0.1, "seed": 3,
    "targets": ["q_proj", "v_proj"],
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
WITH_TOOLS = "{% if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}" + TEMPLATE


def corrected(count: int) -> list[Example]:
    """Answers that were corrected: right and wrong for every kind."""
    return [
        Example(
            id=uuid5(SPACE, str(index)), split="train", kind="preference", source="corrected", group_key=f"g{index}",
            messages=[{"role": "user", "content": f"say number {index}"}], completion=f"the answer is {index}",
            rejected=f"say {index} please", interaction_id=None, pii=[],
        )
        for index in range(count)
    ]  # fmt: skip


def rows_of(kind: str, model: Path, count: int = 20) -> list[AnyRow]:
    ready = check(Tokenizer.load(model), corrected(count), [], {}, 64, kind)
    assert ready.reasons == []
    return ready.rows


def make_spec(kind: str, model: Path, work: Path, **changes: Any) -> Spec:  # noqa: ANN401
    """A training of this kind in `work`, its rows written."""
    work.mkdir(parents=True, exist_ok=True)
    rows = rows_of(kind, model)
    write_lines(work / "rows.jsonl", arranged(rows, 3, QUICK["batch_size"]))
    return Spec(
        model=str(model), base=base_digest(model), rows_file=str(work / "rows.jsonl"), out=str(work / "adapter"),
        parent=os.getpid(), device="cpu", kind=kind, **(QUICK | changes),
    )  # fmt: skip
