"""The form that starts a run: its kinds, their parameters with defaults, and what is wrong beside each field."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from services.store.models import Project, Revision
from services.store.run_params import KINDS, PARAMS, configured, errors_of
from services.store.train_when import TrainWhen

# Shown at once; the others are behind "More".
USUAL = (
    "lr", "epochs", "batch_size", "beta", "sft_weight", "good_weight", "bad_weight", "sweep", "heads", "vocabulary",
    "max_tokens",
)  # fmt: skip
TOLD: Mapping[str, tuple[str, str]] = {
    "sft": ("Imitate", "Answers that people wrote or accepted are imitated word by word. The first thing to try."),
    "dpo": ("Prefer", "Corrections and preferences are pairs: the better answer becomes likelier than the worse one."),
    "kto": ("Flag", "Single answers marked right or wrong. Flags without a correction teach here, and only here."),
    "speculator": ("Heads", "Heads draft tokens ahead, trained on the log. Answers stay the same and come faster."),
}
LABELS: Mapping[str, str] = {
    "lr": "learning rate", "sft_weight": "weight of imitating", "good_weight": "weight of right answers",
    "bad_weight": "weight of wrong answers", "sweep": "candidates in a sweep", "max_length": "longest row",
    "targets": "layers", "max_steps": "most steps", "replay": "share replayed", "replay_from": "replay from",
    "validation": "share that only measures", "checkpoint_steps": "steps between checkpoints",
    "quantize": "base in few bits", "devices": "GPUs at once", "max_tokens": "tokens read at most",
    "min_requests": "requests to begin with", "examples": "new answers", "every_hours": "hours between runs",
    "daily_at": "once a day", "drift_points": "points of drift", "min_minutes": "least minutes between",
}  # fmt: skip
FORMS: Mapping[str, str] = {"sft": "prompt-completion", "dpo": "preference", "kto": "unpaired"}


class FormField(NamedTuple):
    """A parameter as the form shows it. `choices` makes it a list; `error` is what was wrong with what was sent."""

    name: str
    label: str
    help: str
    default: str
    value: str
    choices: tuple[str, ...]
    error: str | None


class RunForm(NamedTuple):
    """Everything the template needs."""

    kind: str
    usual: list[FormField]
    more: list[FormField]
    material: int | None
    general: str | None

    @property
    def opened(self) -> bool:
        """Whether something was said or is wrong among the parameters behind "More"."""
        return any(field.error or field.value for field in self.more)


def parse(kind: str, sent: Mapping[str, str]) -> dict[str, Any]:
    """The parameters that were filled in; those left empty take their defaults."""
    names = PARAMS[kind].model_fields
    filled = {name: value.strip() for name, value in sent.items() if name in names and value.strip()}
    return {name: _value(names[name], value) for name, value in filled.items()}


def _value(field: FieldInfo, text: str) -> Any:  # noqa: ANN401 - pydantic says what it is
    if get_origin(field.annotation) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def make(
    project: Project, kind: str, sent: Mapping[str, str], revision: Revision | None, general: str | None = None
) -> RunForm:
    """The form of a kind, filled with what was sent."""
    project_says = configured(kind, project.config)
    wrong = errors_of(PARAMS[kind], {**project_says, **parse(kind, sent)}) if sent else {}
    fields = _fields(PARAMS[kind], project_says, sent, wrong)
    return RunForm(
        kind,
        sorted((one for one in fields if one.name in USUAL), key=lambda one: USUAL.index(one.name)),
        [one for one in fields if one.name not in USUAL],
        _material(kind, revision),
        general,
    )


def triggers(project: Project, sent: Mapping[str, str] | None = None) -> list[FormField]:
    """When runs begin by themselves, as it is or as it was sent."""
    stored = {name: _shown(value) for name, value in (project.config.get("train_when") or {}).items()}
    if sent is None:
        return _fields(TrainWhen, {}, stored, {})
    said = {name: value for name, value in filled(sent).items() if value is not None}
    return _fields(TrainWhen, {}, sent, errors_of(TrainWhen, said))


def filled(sent: Mapping[str, str]) -> dict[str, str | None]:
    """Each trigger as it was sent, None for one that was left empty."""
    return {name: sent.get(name, "").strip() or None for name in TrainWhen.model_fields}


def _fields(
    model: type[BaseModel], before: Mapping[str, Any], sent: Mapping[str, str], wrong: Mapping[str, str]
) -> list[FormField]:
    return [
        FormField(
            name, LABELS.get(name, name.replace("_", " ")), field.description or "",
            _shown(before.get(name, field.default)), sent.get(name, ""), _choices(field), wrong.get(name),
        )
        for name, field in model.model_fields.items()
    ]  # fmt: skip


def _material(kind: str, revision: Revision | None) -> int | None:
    """Rows of this kind in the newest revision, both parts of the split; None where that is not known."""
    forms = (revision.report.get("forms") or {}) if revision is not None else {}
    return forms.get(FORMS.get(kind, ""))


def _choices(field: FieldInfo) -> tuple[str, ...]:
    choices = get_args(field.annotation)
    return tuple(choices) if choices and all(isinstance(one, str) for one in choices) else ()


def _shown(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def ordered(kind: str, params: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, label, value) of a run's parameters as the form orders them; JSON keeps no order."""
    names = [name for name in PARAMS[kind].model_fields if name in params]
    names += [name for name in params if name not in names]
    return [(name, LABELS.get(name, name.replace("_", " ")), _shown(params[name]) or "–") for name in names]


def kinds() -> list[tuple[str, str, str]]:
    """(kind, word, sentence) of each."""
    return [(kind, *TOLD[kind]) for kind in KINDS]
