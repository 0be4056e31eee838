"""The forms for how candidates reach traffic and how the gate scores: their fields in words, read and shown again."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from services.console.wording import percent
from services.store import project_settings
from services.store.project_settings import OFF, Part
from services.store.rollout_config import SIGNALS

SECTIONS: Mapping[Part, Sequence[tuple[str, Sequence[str]]]] = {
    "rollout": (
        ("", ("mode", "share", "signal", "pattern", "harm", "shadow.requests", "freeze_after")),
        ("More of the comparison", ("benefit", "least_users", "least_requests", "score_range", "shadow.most_worse")),
        (
            f"Guardrails: what takes a candidate back whatever its signal says; “{OFF}” switches one off",
            (
                "guardrails.errors", "guardrails.latency", "guardrails.ttft", "guardrails.length",
                "guardrails.refusals", "guardrails.acceptance",
            ),
        ),
    ),
    "gate": (
        ("", ("metrics", "margin_points", "min_held_out", "margins")),
        ("Checks and forms that answers keep to", ("checks", "response_schema")),
        ("Judge", ("judge.model", "judge.rubric")),
    ),
}  # fmt: skip
LABELS: Mapping[str, str] = {
    "mode": "What passes the gate", "share": "Share of the users, in per cent", "signal": "What is compared",
    "pattern": "Pattern of a whole answer", "harm": "Harm that is ruled out",
    "shadow.requests": "Prompts answered in the shadow first", "freeze_after": "Roll-backs until a person looks",
    "benefit": "Gain that is asked for", "least_users": "Users of each arm at least",
    "least_requests": "Outcomes of each arm at least", "score_range": "Worst and best score",
    "shadow.most_worse": "More failures in the shadow, in per cent", "guardrails.errors": "More errors, in per cent",
    "guardrails.latency": "More slow answers, in per cent", "guardrails.ttft": "More late first tokens, in per cent",
    "guardrails.length": "Longer or shorter, in times", "guardrails.refusals": "More refusals, in per cent",
    "guardrails.acceptance": "Fewer drafts accepted, in per cent",
    "metrics": "Metrics, the deciding one first", "margin_points": "Margin in points",
    "min_held_out": "Groups of corrections at least", "margins": "Margins of single slices", "checks": "Checks",
    "response_schema": "Schema of answers", "judge.model": "Judge", "judge.rubric": "What makes an answer better",
}  # fmt: skip
HELP: Mapping[str, str] = {
    "mode": "Compared with what serves first, or not at all.",
    "share": "1 to 50: users whom a candidate serves while it is compared.",
    "signal": "What apps and end users say comes only if apps send it to POST /v1/feedback.",
    "pattern": "Where answers that keep to their form are compared: a regular expression, beside a request's own form.",
    "harm": "Promoted once it is shown not to be worse by more: 0.05 is 5 points. Log-probability: in nats.",
    "shadow.requests": "Live prompts answered again before anybody is served; 0 leaves the shadow out.",
    "freeze_after": "Automatic ones. This one counts at once, for a trial under way too.",
    "benefit": "Empty: no worse is enough. Else promoted only once shown to be better by this; 0.02 is 2 points.",
    "least_users": "Before the first decision.", "least_requests": "Before the first decision.",
    "score_range": "Of the scores that apps send, such as 1, 5.",
    "shadow.most_worse": "More of its answers may fail their checks than of those served.",
    "guardrails.errors": "Requests that end in an error.",
    "guardrails.latency": "Answers that take longer than 95 of 100 did before.",
    "guardrails.ttft": "First tokens later than 95 of 100 were before.",
    "guardrails.length": "Its answers may be so many times as long, or as short.",
    "guardrails.refusals": "Answers that begin as refusals do.", "guardrails.acceptance": "Of the tokens drafted.",
    "metrics": "exact_match, field_f1, json_valid, schema_valid, similarity, likelihood, checks or judge.",
    "margin_points": "0 to 100: how much worse a slice that was right may get.",
    "min_held_out": "Fewer than this decide nothing.",
    "margins": 'In points, as JSON by the slice\'s name: {"base-ability": 5}.',
    "checks": "As JSON: each has a name and one of must_match, must_not_match (patterns) and json_schema.",
    "response_schema": "A JSON schema, for the metric schema_valid. Live answers are held against it too.",
    "judge.model": "base, a project's slug or an adapter's digest. It decides only where metrics begin with judge.",
    "judge.rubric": "In words, for the judge. Empty: nobody judges.",
}  # fmt: skip
CHOICES: Mapping[str, Mapping[str, str]] = {
    "mode": {"canary": "serves a share of the users first", "direct": "serves everybody at once"},
    "signal": SIGNALS,
}
PERCENT = (
    "share", "shadow.most_worse", "guardrails.errors", "guardrails.latency", "guardrails.ttft", "guardrails.refusals",
    "guardrails.acceptance",
)  # fmt: skip
JSON_ROWS: Mapping[str, int] = {"margins": 2, "checks": 9, "response_schema": 9}
ROWS: Mapping[str, int] = {**JSON_ROWS, "judge.rubric": 4}
LISTS = ("metrics", "score_range")


class Setting(NamedTuple):
    """One field. `value` is what was chosen or typed, and empty where the default holds; `rows` makes it a text of so
    many lines; `told` says what applies to those who may not change it."""

    name: str
    label: str
    help: str
    default: str
    value: str
    choices: Mapping[str, str]
    rows: int
    error: str | None
    told: str


class Section(NamedTuple):
    """Fields that belong together."""

    title: str
    settings: list[Setting]


class Typed(NamedTuple):
    """What a form said: values by setting, None for the default, and words for what cannot be read."""

    values: dict[str, Any]
    wrong: dict[str, str]


def parse(part: Part, sent: Mapping[str, str]) -> Typed:
    """Each field that was sent; one that is empty or repeats the default is set back to it."""
    typed = Typed({}, {})
    defaults = project_settings.shown({}, part)
    for name, default in ((name, defaults[name]) for name in defaults if name in sent):
        text = sent[name].strip()
        try:
            typed.values[name] = None if text in ("", _text(name, default)) else _value(name, text)
        except ValueError as error:
            typed.wrong[name] = str(error)
    return typed


def wrong_with(config: Mapping[str, Any], part: Part, typed: Typed) -> dict[str, str]:
    """Words beside each field that cannot be stored as it was typed; "" is what is wrong beside them all."""
    found = project_settings.errors(config, part, typed.values)
    ranges = {name: _in_percent(name, said) for name, said in found.items()}
    return ranges | typed.wrong


def sections(
    config: Mapping[str, Any], part: Part, sent: Mapping[str, str] | None = None, wrong: Mapping[str, str] | None = None
) -> list[Section]:
    """The fields as they are, or as they were sent with what is wrong beside each."""
    standing, defaults = project_settings.shown(config, part), project_settings.shown({}, part)
    stored = {name: _text(name, value) for name, value in project_settings.chosen(config, part).items()}
    values = stored if sent is None else sent

    def made(name: str) -> Setting:
        return Setting(
            name, LABELS[name], HELP[name], _text(name, defaults[name]), values.get(name, ""), CHOICES.get(name, {}),
            ROWS.get(name, 0), (wrong or {}).get(name), _told(name, standing[name]),
        )  # fmt: skip

    return [Section(title, [made(name) for name in names]) for title, names in SECTIONS[part]]


def _value(name: str, text: str) -> Any:  # noqa: ANN401 - whatever is stored
    if name in PERCENT and text != OFF:
        return _share(text)
    if name in LISTS:
        return [one.strip() for one in text.split(",") if one.strip()]
    return _json(text) if name in JSON_ROWS else text


def _share(text: str) -> float:
    """Raises ValueError for what is no number, infinity included."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = math.inf
    if not math.isfinite(share):
        raise ValueError("this is no number")
    return round(share, 6)


def _json(text: str) -> Any:  # noqa: ANN401 - whatever JSON holds
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is no JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("this is nested too deep") from None


def _text(name: str, value: Any) -> str:  # noqa: ANN401 - whatever is stored
    """A value as a field shows it."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if name in JSON_ROWS:
        return json.dumps(value, indent=2, ensure_ascii=False)
    if name in LISTS:
        return ", ".join(_text("", one) for one in value)
    return f"{100 * value if name in PERCENT else value:.10g}"


def _told(name: str, value: Any) -> str:  # noqa: ANN401 - whatever is stored
    """A value as people read it who may not change it."""
    if name in CHOICES:
        return CHOICES[name][value]
    if name in PERCENT and value != OFF:
        return percent(value, 1).replace(".0 %", " %")
    return _text(name, value) or "none"


def _in_percent(name: str, said: str) -> str:
    """A bound in the unit of the field, for `Input should be less than or equal to 0.5`."""
    words, _, bound = said.rpartition(" ")
    try:
        return f"{words} {100 * float(bound):g}" if name in PERCENT else said
    except ValueError:
        return said
