"""Cells of `benchmarks/learning.py` about runs: DPO and KTO on the starter, time to live, what the preflight catches.

    python -m benchmarks.learning_runs [--only dpo kto] [--scale 1.0]

DPO and KTO see what reviewers leave behind: half of the wrong answers corrected, the others only flagged. Scores are on
held-out prompts; those of a kind were drawn with a seed that was not looked at while its defaults were chosen.
"""

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
from sqlalchemy import select

from benchmarks.learning_cells import Cell
from benchmarks.learning_world import STARTER, ask, kept, reviewed, train
from engine.offline import LocalEngine
from engine.text.tokenizer import Tokenizer
from examples.grammars.simulate import APPLICATIONS
from examples.loop.drive import Plan, run_loop
from examples.loop.platform import platform
from services.settings import Settings
from services.store.base import make_sessions, uuid7, uuid7_time
from services.store.models import Annotation, DeploymentEvent, Example, InteractionBody, Run
from services.store.traffic import Rendering
from worker.training.preflight import Preflight, check, rendering_since

REVIEWED, ASKED = 400, 300
RESAMPLES = 4000
TRAIN_SEED = 21
ASK_SEEDS = {"dpo": 22, "kto": 23}
SETS, ROWS = 200, 60
LIVE_SECONDS = 180.0
CORRECTIONS = 400


class Gain(NamedTuple):
    """A share before and after on the same prompts, and the 95 % interval of the difference."""

    before: float
    after: float
    low: float
    high: float

    def __str__(self) -> str:
        points = [f"{100 * value:+.0f}".replace("-", "−") for value in (self.low, self.high)]
        return f"{self.before:.0%} → {self.after:.0%} ({points[0]} to {points[1]} points)"


def paired(before: Sequence[bool], after: Sequence[bool]) -> Gain:
    """Percentile bootstrap of the paired difference; prompts differ in their facts, so each is a group of its own."""
    ours, theirs = np.array(after, dtype=float), np.array(before, dtype=float)
    dice = np.random.default_rng(0)
    places = dice.integers(0, len(ours), (RESAMPLES, len(ours)))
    low, high = np.percentile((ours - theirs)[places].mean(axis=1), [2.5, 97.5])
    return Gain(float(theirs.mean()), float(ours.mean()), float(low), float(high))


def preferring(kind: str, scale: float) -> Cell:
    """One kind on the three applications."""
    told, raw, gains = [], {}, []
    with tempfile.TemporaryDirectory(prefix="whet-learning-") as room, LocalEngine(STARTER, threads=1) as engine:
        for name, app in APPLICATIONS.items():
            asked = ask(engine, app, "train", TRAIN_SEED, max(80, round(REVIEWED * scale)))
            examples = reviewed(app, asked)
            made = train(Path(room), kind, examples)
            digest = engine.load_adapter(Path(room) / made.digest)
            held_out = max(60, round(ASKED * scale))
            base = kept(app, ask(engine, app, "held_out", ASK_SEEDS[kind], held_out))
            tuned = kept(app, ask(engine, app, "held_out", ASK_SEEDS[kind], held_out, digest))
            gain = paired(base, tuned)
            gains.append(gain)
            told.append(f"{name} {gain}")
            sources = {source: sum(one.source == source for one in examples) for source in ("corrected", "rejected")}
            raw[name] = {**gain._asdict(), **sources, "asked": held_out, "train_seconds": round(made.seconds, 1)}
    return Cell(
        f"{kind.upper()} on the starter's applications from corrections and flags only",
        "held-out house-rule score above base, interval above 0",
        "; ".join(told),
        all(gain.low > 0 for gain in gains),
        raw,
    )


# --- from the last correction to live ---------------------------------------------------------------------


def to_live(scale: float) -> Cell:
    """The whole platform on this machine, traffic going on: reviewers stop, somebody presses the button, weights flip.

    `scale` below 1 asks for fewer corrections.
    """
    plan = Plan(judgements=max(100, round(CORRECTIONS * scale)), calm_seconds=2.0, run_seconds=600.0)
    with platform() as running:
        run_id, app = run_loop(running, plan, lambda _: None)
        with make_sessions(Settings(home=running.home).database_dsn)() as session:
            run = session.get_one(Run, run_id)
            judged = select(Annotation.created_at).where(
                Annotation.project_id == run.project_id, Annotation.created_at <= run.created_at
            )
            last = session.scalars(judged.order_by(Annotation.created_at.desc()).limit(1)).one()
            corrections = len(session.scalars(judged.where(Annotation.verdict == "correct")).all())
            flips = select(DeploymentEvent.at).where(
                DeploymentEvent.project_id == run.project_id, DeploymentEvent.kind == "flip"
            )
            flip = session.scalars(flips.limit(1)).one_or_none()
    seconds = (flip - last).total_seconds() if flip else None
    return Cell(
        "last correction → live adapter (starter, 400 corrections, 2 cores)",
        f"≤ {LIVE_SECONDS:.0f} s",
        f"{seconds:.0f} s with {corrections} corrections" if seconds is not None else f"not live: {run.phase}",
        seconds is not None and seconds <= LIVE_SECONDS,
        {"seconds": seconds, "corrections": corrections, "failed_requests": app.counts.failed},
    )


# --- what the preflight catches ---------------------------------------------------------------------------

Bodies = dict[UUID, InteractionBody]


class Looked(NamedTuple):
    """What a preflight is given: the trainer's tokenizer, its examples with what was served, and the longest row."""

    tokenizer: Tokenizer
    examples: list[Example]
    bodies: Bodies
    limit: int = 1024


Fault = Callable[[Looked, Tokenizer, random.Random], Looked]


def masked_labels(clean: Looked, _: Tokenizer, __: random.Random) -> Looked:
    """A row length below every prompt's: TRL's own truncation then leaves no label, and the loss goes to 0."""
    lengths = (len(clean.tokenizer.encode_chat(example.messages)) for example in clean.examples)
    return clean._replace(limit=min(lengths))


def other_tokens(clean: Looked, _: Tokenizer, dice: random.Random) -> Looked:
    """A few prompts were served with one token more than today's rendering has, under the same template's name."""
    bodies = dict(clean.bodies)
    for example in dice.sample(clean.examples, 3):
        body = _body(clean.tokenizer, example)
        place = dice.randrange(len(body.prompt_token_ids))
        body.prompt_token_ids.insert(place, clean.tokenizer.eos_ids[0])
        bodies[body.id] = body
    return clean._replace(bodies=bodies)


def template_file_changed(clean: Looked, changed: Tokenizer, _: random.Random) -> Looked:
    """The trainer's machine has another template file than the one that goes on serving: no row bears its digest."""
    return clean._replace(tokenizer=changed)


# Every clean set is injected in each way of a fault.
FAULTS: dict[str, tuple[tuple[Fault, ...], str]] = {
    "all-masked labels": ((masked_labels,), "all labels are masked"),
    "template drift": ((other_tokens, template_file_changed), "template drift"),
}


def caught(name: str, scale: float) -> Cell:
    """Clean sets of corrections, and the same with the fault in each of its ways; all are looked at by every kind of
    run. Half of the clean sets were served under another template, before its file was changed, and none since."""
    ways, words = FAULTS[name]
    sets = max(20, round(SETS * scale))
    found = alarms = 0
    with tempfile.TemporaryDirectory(prefix="whet-learning-") as room:
        tokenizer, changed = Tokenizer.load(STARTER), _another_template(Path(room))
        for number in range(sets):
            dice = random.Random(number)
            app = dice.choice(list(APPLICATIONS.values()))
            kind = dice.choice(("sft", "dpo", "kto"))
            examples = [_corrected(app.sample(dice)) for _ in range(ROWS)]
            clean = Looked(tokenizer, examples, {one.id: one for one in map(partial(_body, tokenizer), examples)})
            found += sum(_named(_looked_at(fault(clean, changed, dice), kind), words) for fault in ways)
            if number % 2:
                (changed.directory / "chat_template.jinja").touch()
                clean = clean._replace(tokenizer=changed)
            alarms += bool(_looked_at(clean, kind).reasons)
    tried = sets * len(ways)
    return Cell(
        f"injected fault: {name}",
        "caught before promotion, by name; ≤ 5 % false alarms over 200 clean sets",
        f"{found} of {tried} caught before any compute; {alarms} false alarms in {sets} clean sets",
        found == tried and alarms <= 0.05 * sets,
        {"sets": sets, "ways": len(ways), "caught": found, "false_alarms": alarms},
    )


def _looked_at(given: Looked, kind: str) -> Preflight:
    """As a run's job looks: the newest prompt counts where it was served since the trainer's files lie there."""
    newest = max(given.bodies.values(), key=lambda body: body.id)
    at = uuid7_time(newest.id)
    since = rendering_since(given.tokenizer.directory)
    served = Rendering(newest.tokenizer_hash, newest.template_hash, at) if at >= since else None
    return check(given.tokenizer, given.examples, [], given.bodies, given.limit, kind, served)


def _another_template(room: Path) -> Tokenizer:
    """The starter's, with a template that opens every chat with one word more."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(STARTER / name, room / name)
    own = json.loads((room / "tokenizer_config.json").read_text())["chat_template"]
    (room / "chat_template.jinja").write_text("{{ 'chat ' }}" + own)
    return Tokenizer.load(room)


def _named(ready: Preflight, words: str) -> bool:
    return any(words in reason for reason in ready.reasons)


def _corrected(one: Any) -> Example:  # noqa: ANN401 - a grammar's example
    return Example(
        id=uuid7(), split="train", kind="preference", source="corrected", group_key=one.facts,
        messages=list(one.messages), completion=one.house, rejected=one.base, interaction_id=uuid7(), pii=[],
    )  # fmt: skip


def _body(tokenizer: Tokenizer, example: Example) -> InteractionBody:
    return InteractionBody(
        id=example.interaction_id, prompt_token_ids=tokenizer.encode_chat(example.messages),
        tokenizer_hash=tokenizer.digest, template_hash=tokenizer.template_digest, worked_examples=[], parameters={},
    )  # fmt: skip


CELLS: dict[str, Callable[[float], Cell]] = {
    "dpo": partial(preferring, "dpo"),
    "kto": partial(preferring, "kto"),
    "correction_to_live": to_live,
    "masked_labels": partial(caught, "all-masked labels"),
    "template_drift": partial(caught, "template drift"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    for name in options.only:
        cell = CELLS[name](options.scale)
        print(
            f"{'met    ' if cell.met else 'NOT MET'} {cell.what}\n        {cell.measured}\n        {cell.raw}",
            flush=True,
        )


if __name__ == "__main__":
    main()
