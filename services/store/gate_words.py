"""What a gate's figures show, in words: no more than its slices' verdicts say."""

from collections.abc import Mapping
from typing import Any

from services.store.evaluation_config import BASE_ABILITY, TARGET
from services.store.models import Evaluation


def verdict(name: str, row: Mapping[str, Any]) -> str:
    """What a slice's interval says: better, kept, weak, worse, or short of what it had to show."""
    if name == TARGET:
        return "better" if row["low"] > 0 else "not shown"
    margin = row.get("margin")
    if margin is None or row["low"] > -margin:
        return "kept"
    return "worse" if row.get("harmed") else "weak" if row.get("weak") else "at risk"


def shown(summary: Mapping[str, Any]) -> str:
    """What a pass rests on: "better on what was corrected; within the margin on accepted; …"."""
    slices: Mapping[str, Mapping[str, Any]] = summary.get("slices") or {}
    found = {name: verdict(name, row) for name, row in sorted(slices.items())}
    kept = [name for name, said in found.items() if said == "kept"]
    weak = [name for name, said in found.items() if said == "weak"]
    parts = ["better on what was corrected"]
    if kept:
        parts.append(f"within the margin on {' and '.join(kept)}")
    if weak:
        parts.append(f"no evident harm on {' and '.join(weak)}, with too few rows to say more")
    if BASE_ABILITY not in found:
        parts.append("general ability unknown")
    return "; ".join(parts)


def headline(evaluation: Evaluation) -> str:
    """The decision in one line."""
    if evaluation.decision == "promote":
        return f"Passed the gate: {shown(evaluation.summary)}"
    return "Refused by the gate, let through by a person" if evaluation.overridden_by else "Refused: what served stays"


def passage(evaluation: Evaluation | None, candidate: str) -> str:
    """How a `candidate`, in words, came by the gate, for the history of what is deployed."""
    if evaluation is None or not evaluation.overridden_by:
        return f"{candidate} passed the gate"
    return f"the gate refused {candidate}; {evaluation.overridden_by} let it through: {evaluation.override_reason}"
