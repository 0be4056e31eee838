"""A project's settings as forms and commands change them: key by key, and checked as the whole configuration is.

`rollout` is the configuration's key of that name; `gate` is what an evaluation reads of it. Names are flat:
`shadow.requests` is a key within a key.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import ValidationError
from sqlalchemy.orm import Session

from services.errors import InvalidRequest
from services.store import audit, projects
from services.store.models import Project
from services.store.project_config import ProjectConfig
from services.store.rollout_config import RolloutConfig, read_rollout

Part = Literal["rollout", "gate"]
# The keys of the gate, and what it does where a project says nothing: `worker.gate.order` and `worker.gate.decide` have
# the figures, which the store may not import; a test compares them.
GATE: Mapping[str, Any] = {
    "metrics": ["exact_match"], "margin_points": 3.0, "margins": None, "min_held_out": 30, "checks": None,
    "judge": {"model": "base", "rubric": None}, "response_schema": None,
}  # fmt: skip
HOLDERS = ("shadow", "guardrails", "judge")
# A guardrail that is switched off; null sets a key back to its default, as it does everywhere.
OFF = "off"


def shown(config: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """Every setting by its flat name, with the defaults where nobody chose."""
    if part == "rollout":
        return _flat(read_rollout(config).model_dump(mode="json"))
    return _flat(GATE) | _flat(_stored(config, part))


def chosen(config: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """The settings that somebody chose, by their flat names."""
    return _flat(_stored(config, part))


def change(session: Session, project: Project, part: Part, changes: Mapping[str, Any], actor: str) -> dict[str, Any]:
    """Change the settings named, None sets one back; all of them as they are then. What changed is in the audit log.

    Raises InvalidRequest naming a setting that is unknown or out of range; then nothing has changed.
    """
    session.refresh(project, with_for_update=True)
    before = chosen(project.config, part)
    projects.configure(session, project, _applied(project.config, part, changes))
    after = chosen(project.config, part)
    changed = {name: after.get(name) for name in {**before, **after} if before.get(name) != after.get(name)}
    if changed:
        detail = {"config": {part: changed} if part == "rollout" else changed}
        audit.record(session, actor, "project.configure", f"project:{project.id}", detail)
    return shown(project.config, part)


def errors(config: Mapping[str, Any], part: Part, changes: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with each setting once it is changed, by flat name; "" is what no setting of the part is to blame
    for. Empty when `change` would do it."""
    whole = {**config, **_applied(config, part, changes)}
    try:
        ProjectConfig.model_validate({key: value for key, value in whole.items() if value is not None})
    except ValidationError as error:
        names = shown({}, part)
        return dict(_blamed(names, part, one["loc"], one["msg"]) for one in reversed(error.errors()))
    return {}


def _blamed(names: Iterable[str], part: Part, place: tuple[int | str, ...], message: str) -> tuple[str, str]:
    """(setting, words) of an error. What is wrong inside a value is told with where it is."""
    path = place[1:] if part == "rollout" and place[:1] == ("rollout",) else place
    said = message.removeprefix("Value error, ")
    for length in (2, 1):
        name = ".".join(map(str, path[:length]))
        within = [f"number {step + 1}" if isinstance(step, int) else step for step in path[length:]]
        if name in names:
            return name, ": ".join([*within, said])
    whole = next((name for name in names if path and name.startswith(f"{path[0]}.")), "")
    return whole, said if whole else f"{'.'.join(map(str, place))}: {said}"


def _stored(config: Mapping[str, Any], part: Part) -> dict[str, Any]:
    if part == "gate":
        return {key: config[key] for key in GATE if key in config}
    stored = config.get("rollout")
    known = stored if isinstance(stored, dict) else {}
    return {key: value for key, value in known.items() if key in RolloutConfig.model_fields}


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        if key in HOLDERS and isinstance(value, dict):
            found |= {f"{key}.{name}": _told(key, one) for name, one in value.items()}
        else:
            found[key] = value
    return found


def _told(holder: str, value: object) -> object:
    return OFF if holder == "guardrails" and value is None else value


def _applied(config: Mapping[str, Any], part: Part, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's own keys as they will be, None for one that goes."""
    made = _stored(config, part)
    for name, value in changes.items():
        outer, _, inner = name.partition(".")
        if part == "gate" and outer not in GATE:
            known = ", ".join(GATE)
            raise InvalidRequest(f"the gate has no setting {name} (known: {known})", param=f"config.{name}")
        made[outer] = _within(made.get(outer), outer, inner, value) if inner else value
    kept = {key: value for key, value in made.items() if value is not None}
    return {"rollout": kept or None} if part == "rollout" else {key: kept.get(key) for key in GATE}


def _within(held: object, outer: str, inner: str, value: Any) -> dict[str, Any] | None:  # noqa: ANN401 - whatever JSON holds
    """A key's own keys with one of them changed; None when none is left."""
    made = dict(held) if isinstance(held, dict) else {}
    made.pop(inner, None)
    if value is not None:
        made[inner] = None if outer == "guardrails" and value == OFF else value
    return made or None
