"""How a base model's texts become vectors, as its own files say (sentence-transformers' layout, config.json)."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engine.messages import Pooling

# sentence-transformers' switches, of which exactly one is on, and its newer single word.
SWITCHES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
WORDS: dict[str, Pooling] = {"cls": "first", "mean": "mean", "lasttoken": "last"}
RUN_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class VectorRules:
    """`pooling` is None where the model says nothing; `refusal` why its vectors cannot be made, or empty."""

    pooling: Pooling | None
    refusal: str
    problem_type: str | None

    def how(self, encoder: bool) -> Pooling:
        """The pooling to ask for. Raises ValueError when the model wants one the engine does not do."""
        if self.refusal:
            raise ValueError(self.refusal)
        return self.pooling or ("mean" if encoder else "last")

    def for_search(self) -> Pooling:
        """As `how`; a model that says nothing was not made for vectors, and the mean of its states is its best one."""
        if self.refusal:
            raise ValueError(self.refusal)
        return self.pooling or "mean"


@cache
def vector_rules(directory: Path) -> VectorRules:
    """Read once for each model directory."""
    config, pooling = _json(directory / "config.json"), _json(directory / "1_Pooling" / "config.json")
    problem = config.get("problem_type") if isinstance(config, dict) else None
    modules = _json(directory / "modules.json")
    kinds = [str(one.get("type", "")).rpartition(".")[2] for one in modules or [] if isinstance(one, dict)]
    odd = sorted(set(kinds) - set(RUN_MODULES))
    if odd:
        return VectorRules(None, f"the base model's embeddings need a {odd[0]} module, which is not run", problem)
    if not pooling:
        return VectorRules(None, "", problem)
    wanted = _wanted(pooling)
    known = {**SWITCHES, **WORDS}
    if len(wanted) != 1 or wanted[0] not in known:
        named = ", ".join(wanted) or "none"
        return VectorRules(None, f"the base model pools by {named}; supported: {', '.join(WORDS)}", problem)
    return VectorRules(known[wanted[0]], "", problem)


def _wanted(pooling: dict[str, Any]) -> list[str]:
    word = pooling.get("pooling_mode")
    if isinstance(word, str):
        return [word]
    return [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]


def _json(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def search_model(base: str, how: Pooling) -> str:
    """What vectors are comparable by: the base model's digest and the pooling. Adapters come and go, so none."""
    return f"{base[:16]}/{how}"
