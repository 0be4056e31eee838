"""What adapter_config.json says about the arithmetic: rank and scaling of every module, as PEFT would apply them."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from engine.adapters.files import CONFIG, AdapterRefused

# Keys whose value matters here or is mere description; any other key must be empty, or it asks for what we do not do.
MATTERING = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias"}
DESCRIBING = {
    "task_type", "target_modules", "lora_dropout", "base_model_name_or_path", "revision", "inference_mode",
    "init_lora_weights", "auto_mapping", "peft_version", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")
# What PEFT stores whole for classifiers; a base has one of them at most.
HEADS = {"score", "classifier"}
REASONS = {
    "use_dora": "DoRA rescales the base's own weights: train plain LoRA or rsLoRA, or merge it into the base",
    "target_parameters": "LoRA on mixture-of-experts weights is not served: leave the experts out",
}
MAX_ALPHA = 1e9
# Patterns come from outside. Without groups, matching one takes a module name's length to the power of its quantifiers
# at most; with three that is a tenth of a millisecond, so there may be many names but not many of these.
MAX_PATTERNS, MAX_PATTERN, MAX_QUANTIFIERS = 1024, 200, 3
NAME_LENGTH = 40
MAX_WORK = 10 * NAME_LENGTH**MAX_QUANTIFIERS

Value = TypeVar("Value")


class Patterns(Generic[Value]):
    """Values of modules: of the first pattern that matches the end of the name, as PEFT's get_pattern_key picks it."""

    def __init__(self, patterns: Mapping[re.Pattern[str], Value], default: Value) -> None:
        self._patterns, self._default = patterns, default
        self._known: dict[str, Value] = {}

    def of(self, module: str) -> Value:
        """A module's value; each is looked for once."""
        if module not in self._known:
            found = (value for pattern, value in self._patterns.items() if pattern.match(module))
            self._known[module] = next(found, self._default)
        return self._known[module]


@dataclass(frozen=True)
class Recipe:
    """Ranks and scalings by module name, such as `model.layers.3.mlp.up_proj`."""

    ranks: Patterns[int]
    alphas: Patterns[float]
    rslora: bool
    own_head: bool

    def rank_of(self, module: str) -> int:
        """The inner size of the module's two matrices."""
        return self.ranks.of(module)

    def scaling_of(self, module: str) -> float:
        """What the product of its matrices is multiplied by."""
        rank, alpha = self.ranks.of(module), self.alphas.of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_recipe(config: Mapping[str, Any], max_rank: int, *, classifier: bool) -> Recipe:
    """Check everything. Anything that would change the arithmetic in a way we do not do is refused by name."""
    if config.get("peft_type") != "LORA":
        raise AdapterRefused(f"peft_type {config.get('peft_type')!r} is not supported; supported: LORA")
    if config.get("bias", "none") != "none":
        raise AdapterRefused(f"bias {config['bias']!r} is not supported; train with bias='none'")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise AdapterRefused(f"init_lora_weights {config['init_lora_weights']!r} changes the base weights")
    _refuse_odd(config)
    rank, alpha = _rank(config.get("r"), max_rank), _alpha(config.get("lora_alpha"))
    return Recipe(
        ranks=Patterns(_patterns(config, "rank_pattern", lambda value: _rank(value, max_rank)), rank),
        alphas=Patterns(_patterns(config, "alpha_pattern", _alpha), alpha),
        rslora=bool(config.get("use_rslora")),
        own_head=_own_head(config.get("modules_to_save"), classifier),
    )


def _refuse_odd(config: Mapping[str, Any]) -> None:
    odd = sorted(k for k, value in config.items() if k not in MATTERING | DESCRIBING and value not in _neutral(k))
    for key in odd:
        if key in REASONS:
            raise AdapterRefused(f"{CONFIG} sets {key}: {REASONS[key]}")
    if odd:
        raise AdapterRefused(f"{CONFIG} uses {', '.join(odd)}, which the engine does not support")


def _neutral(key: str) -> tuple[object, ...]:
    """Values under which an unknown key asks for nothing."""
    special = {"megatron_core": ("megatron.core",), "qalora_group_size": (16,)}
    return (None, False, [], {}, *special.get(key, ()))


def _rank(rank: object, max_rank: int) -> int:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterRefused(f"rank {rank!r} is not a positive number")
    if rank > max_rank:
        raise AdapterRefused(f"rank {rank} is above the {max_rank} this engine was started with: see --adapter-rank")
    return rank


def _alpha(alpha: object) -> float:
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < MAX_ALPHA:
        raise AdapterRefused(f"lora_alpha {alpha!r} is not a number")
    return float(alpha)


def _own_head(saved: object, classifier: bool) -> bool:
    """Whether a whole classification head comes with the adapter."""
    if saved in (None, []):
        return False
    if not isinstance(saved, list) or not set(map(str, saved)) <= HEADS or not classifier:
        allowed = "only the classification head can be" if classifier else "this base has no head that could be"
        raise AdapterRefused(f"modules_to_save {saved!r} is not supported: {allowed} replaced by an adapter")
    return True


def _patterns(
    config: Mapping[str, Any], name: str, check: Callable[[object], Value]
) -> Mapping[re.Pattern[str], Value]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        raise AdapterRefused(f"{name} must map at most {MAX_PATTERNS} module names to numbers")
    compiled = {_compiled(pattern, name): check(value) for pattern, value in patterns.items()}
    if sum(NAME_LENGTH ** _quantifiers(pattern) for pattern in patterns) > MAX_WORK:
        raise AdapterRefused(f"{name} has too many patterns with * + ?; use module names or simple patterns")
    return compiled


def _compiled(pattern: str, name: str) -> re.Pattern[str]:
    harmless = len(pattern) <= MAX_PATTERN and not re.search(r"[(){}]", pattern)
    try:
        if harmless and _quantifiers(pattern) <= MAX_QUANTIFIERS:
            return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise AdapterRefused(
            f"{name} has the key {pattern[:80]!r}: {error}; use module names or simple patterns"
        ) from error
    raise AdapterRefused(f"{name} has the key {pattern[:80]!r}; use module names or simple patterns")


def _quantifiers(pattern: str) -> int:
    return len(re.findall(r"[*+?]", pattern))
