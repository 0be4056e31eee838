"""What drafting earns a project, as its pages show it: figures, drawings, and sentences for what is not known yet."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from fastapi import Request
from sqlalchemy import select

from services.console import charts
from services.console.access import Here
from services.console.memo import Memo
from services.store import drafts, speed
from services.store.models import Deployment, Run
from services.store.runs import UNFINISHED
from services.store.speculation import SpeculationConfig, read_config
from services.store.speculators import heads_of
from services.store.speed import LEAST_COMPARED, LEAST_TOKENS, Gain, Rate, Speed

# Positions of a draft that are drawn; few drafts are longer, and what they hold counts in the mean.
POSITIONS = 12


class Figures(NamedTuple):
    """What costs queries over the log, kept for a while."""

    speed: Speed
    drafting: drafts.Drafting
    response_tokens: int


def context(request: Request, here: Here) -> dict[str, Any]:
    """Everything `speed.html` uses."""
    config = read_config(here.project.config)
    memo: Memo[Figures] = request.app.state.figures
    latest = _latest_run(here)
    figures = memo.get((here.project.id, config.first_tokens), lambda: _figures(here, config))
    seen = figures.speed.window
    since, until = seen.since.timestamp(), seen.until.timestamp()
    return {
        "speed": figures.speed,
        "drafting": figures.drafting,
        "speculation": config,
        "in_words": in_words(figures.speed, config),
        "plot": charts.bands([_readings(figures.speed, side) for side in ("drafted", "plain")], since, until),
        "choices": charts.columns([_shares(choice) for choice in figures.drafting.choices], since, until),
        "lengths": charts.bands([_lengths(figures.drafting)], since, until, width=320, height=170),
        "positions": POSITIONS,
        "response_tokens": figures.response_tokens,
        "head_run": latest,
        "next_heads": when_heads_come(config, figures.response_tokens, latest, in_use=_in_use(here)),
    }


def gain_of(request: Request, here: Here, project_id: UUID) -> Gain | None:
    """How much faster a project is for drafting, for its row on the home page."""
    memo: Memo[Gain | None] = request.app.state.gains
    compute: Callable[[], Gain | None] = lambda: speed.measure(here.session, project_id).gain  # noqa: E731
    return memo.get(project_id, compute)


def in_words(measured: Speed, config: SpeculationConfig) -> str:
    """What the plot says, in a sentence or two."""
    gain, drafted, plain = measured.gain, measured.drafted, measured.plain
    if not config.enabled:
        return "Speculation is switched off for this project: its answers are decoded token by token."
    if gain is None or drafted is None or plain is None:
        return _not_yet(measured, config)
    span = f"95 % interval {gain.low:.2f} to {gain.high:.2f}"
    rates = f"{drafted.value:,.0f} against {plain.value:,.0f} tokens a second for each stream"
    if gain.low > 1:
        return f"Answers are decoded {gain.times:.2f} times as fast as without drafts ({span}): {rates}."
    if gain.high < 1:
        return f"Drafting slows this project down, to {gain.times:.2f} of the speed without ({span}): {rates}."
    return f"No difference to decoding without drafts is shown yet: {gain.times:.2f} times as fast ({span}), {rates}."


BECAME = {
    "canary": "are being tried", "live": "are live", "retired": "were retired", "rolled back": "were rolled back",
    "quarantined": "were quarantined",
}  # fmt: skip


def when_heads_come(config: SpeculationConfig, tokens: int, latest: Run | None, *, in_use: bool = False) -> str:
    """What has to happen before heads draft, while the window has no draft of theirs."""
    if in_use:
        return "Heads are in use; their first drafts show here with the next answers."
    if latest is not None and latest.state in UNFINISHED:
        return "Heads are being trained now."
    if tokens < config.first_tokens:
        begin = "Heads train themselves" if config.automatic else "Heads are worth training"
        return (
            f"{begin} after {config.first_tokens:,} response tokens; {tokens:,} so far. "
            "Until then the suffix drafter learns from each answer."
        )
    if not config.automatic:
        return "There is enough to train heads on; in this project that happens only when somebody asks."
    if latest is None:
        return "There is enough to train heads on: the first ones are started within minutes."
    became = BECAME.get(latest.phase)
    last = f"The heads trained last {became}." if became else f"The last training ended {latest.phase}."
    return (
        f"{last} Heads are trained again once response tokens have grown by "
        f"{100 * (config.growth - 1):.0f} %, when traffic drifts, or when the adapter changes."
    )


def _not_yet(measured: Speed, config: SpeculationConfig) -> str:
    if measured.drafted is None and measured.plain is None:
        return f"The plot begins with the first answer of {LEAST_TOKENS} tokens or more."
    if config.baseline_share == 0:
        return "Nothing to compare with: this project serves no baseline (its baseline_share is 0)."
    if measured.compared >= LEAST_COMPARED:
        return f"Not known yet: it takes {LEAST_COMPARED} answers with drafts to compare."
    every = round(1 / config.baseline_share)
    return (
        f"Not known yet: one answer in {every:,} is served without drafts, to measure by, and "
        f"{measured.compared} of the {LEAST_COMPARED} that it takes are there."
    )


def _figures(here: Here, config: SpeculationConfig) -> Figures:
    measured = speed.measure(here.session, here.project.id)
    return Figures(
        measured,
        drafts.drafting(here.session, here.project.id, measured.window),
        drafts.response_tokens(here.session, here.project.id, config.first_tokens),
    )


def _readings(measured: Speed, side: str) -> list[charts.Reading]:
    readings = []
    for span in measured.spans:
        rate: Rate | None = getattr(span, side)
        if rate is not None:
            low, high = (rate.value if end is None else end for end in (rate.low, rate.high))
            # A span of two answers may be anywhere: its band must not flatten everybody else's.
            high = min(high, 2 * rate.value)
            readings.append(charts.Reading(span.at.timestamp(), rate.value, low, high, rate.answers))
    return readings


def _shares(choice: drafts.Choice) -> Sequence[float]:
    return (choice.suffix, choice.heads, choice.none) if choice.steps else ()


def _lengths(drafting: drafts.Drafting) -> list[charts.Reading]:
    return [
        charts.Reading(choice.at.timestamp(), choice.length, choice.length, choice.length, choice.steps)
        for choice in drafting.choices
        if choice.length is not None
    ]


def _in_use(here: Here) -> bool:
    deployment = here.session.get(Deployment, here.project.id)
    return deployment is not None and any(heads_of(deployment)[:2])


def _latest_run(here: Here) -> Run | None:
    query = select(Run).where(Run.project_id == here.project.id, Run.kind == "speculator")
    return here.session.scalar(query.order_by(Run.created_at.desc(), Run.id.desc()).limit(1))
