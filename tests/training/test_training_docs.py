"""docs/training.md says the defaults that the code has."""

import re
from pathlib import Path

from pydantic import BaseModel

from services.store.run_params import KINDS, DpoParams, KtoParams, SftParams
from services.store.train_when import TrainWhen

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return "every linear layer"
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else "–"


def parameters() -> dict[str, tuple[str, str]]:
    """Each parameter with its defaults by kind, when they differ, and its meaning."""
    table: dict[str, tuple[str, str]] = {}
    kinds: dict[str, type[BaseModel]] = {"sft": SftParams, "dpo": DpoParams, "kto": KtoParams}
    for name in dict.fromkeys(name for kind in kinds.values() for name in kind.model_fields):
        having = {
            kind: shown(one.model_fields[name].default) for kind, one in kinds.items() if name in one.model_fields
        }
        same = len(having) == 3 and len(set(having.values())) == 1
        told = having["sft"] if same else ", ".join(f"{kind} {value}" for kind, value in having.items())
        meaning = next(one.model_fields[name].description for one in kinds.values() if name in one.model_fields)
        table[name] = (told, meaning or "")
    return table


def triggers() -> dict[str, tuple[str, str]]:
    return {name: (shown(field.default), field.description or "") for name, field in TrainWhen.model_fields.items()}


def rows(table: dict[str, tuple[str, str]]) -> str:
    return "\n".join(f"| `{name}` | {default} | {meaning} |" for name, (default, meaning) in table.items())


def test_the_table_of_parameters_is_the_code_s() -> None:
    found = re.findall(r"^\| `([a-z_]+)` \| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE)
    told = {name: (default, meaning) for name, default, meaning in found if name not in KINDS}
    assert told == parameters() | triggers()
