"""The starter's applications as a training's world: answers, what reviewers said of them, a trainer, a score.

The platform's own code makes the rows, checks them and trains; only Postgres is left out.
"""

import os
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple
from uuid import UUID, uuid5

from engine.digest import base_digest
from engine.messages import Sampling
from engine.offline import LocalEngine
from engine.text.tokenizer import Tokenizer
from examples.grammars.common import Application, Message, stream
from examples.grammars.simulate import review
from services.store.models import Example
from services.store.run_params import TrainParams, checked
from worker.training import artifact, child
from worker.training.parting import parted, write_lines
from worker.training.preflight import check
from worker.training.rows import arranged
from worker.training.spec import Report, Spec

STARTER = Path("engine/starter")
NAMES = UUID(int=0x1EA61)
Side = Literal["train", "held_out"]


class Asked(NamedTuple):
    """Prompts and what the model said to each."""

    prompts: list[list[Message]]
    answers: list[str]


class Trained(NamedTuple):
    """An adapter's directory, what the trainer reported and how long it took, in seconds."""

    digest: str
    reports: list[Report]
    seconds: float


def ask(engine: LocalEngine, app: Application, side: Side, seed: int, count: int, adapter: str | None = None) -> Asked:
    """Greedy answers to `count` distinct prompts of one side of the application's own split."""
    prompts: dict[str, list[Message]] = {}
    for one in stream(app, side, seed):
        prompts.setdefault(one.facts, one.messages)
        if len(prompts) == count:
            break
    chats = list(prompts.values())
    tokenizer = Tokenizer.load(STARTER)
    sampling = Sampling(temperature=0.0, seed=0, max_tokens=160, stop_token_ids=tokenizer.eos_ids)
    done = engine.generate([tokenizer.encode_chat(list(chat)) for chat in chats], sampling, adapter)
    return Asked(chats, [tokenizer.decode(one.token_ids) for one in done])


def reviewed(app: Application, asked: Asked, *, corrected_share: float = 0.5) -> list[Example]:
    """What reviewers make of the answers: right ones accepted, of the wrong ones a share corrected, the others only
    flagged as wrong."""
    made = []
    for place, (messages, answer) in enumerate(zip(asked.prompts, asked.answers, strict=True)):
        verdict, correction = review(app.name, messages, answer)
        name = app.facts_key(messages)
        if verdict == "accept":
            made.append(_example(name, messages, "completion", "accepted", answer, None))
        elif (place * 0.6180339887) % 1 < corrected_share:
            made.append(_example(name, messages, "preference", "corrected", correction, answer))
        else:
            made.append(_example(name, messages, "unpaired", "rejected", None, answer))
    return made


def _example(
    name: str, messages: Sequence[Message], kind: str, source: str, good: str | None, bad: str | None
) -> Example:
    return Example(
        id=uuid5(NAMES, name), split="train", kind=kind, source=source, group_key=name, messages=list(messages),
        completion=good, rejected=bad, interaction_id=None, pii=[],
    )  # fmt: skip


def train(room: Path, kind: str, examples: Sequence[Example], **params: Any) -> Trained:  # noqa: ANN401
    """A training as a run makes it, in the trainer's own process. Raises RuntimeError when it is refused."""
    chosen = checked(kind, params)
    assert isinstance(chosen, TrainParams)
    ready = check(Tokenizer.load(STARTER), examples, [], {}, chosen.max_length, kind)
    if ready.reasons:
        raise RuntimeError("; ".join(ready.reasons))
    groups = {str(one.id): one.group_key for one in examples}
    parts = parted(ready.rows, groups, chosen)
    reports: list[Report] = []
    with TemporaryDirectory(dir=room) as directory:
        work = Path(directory)
        write_lines(work / "rows.jsonl", arranged(parts.trained, chosen.seed, chosen.batch_size))
        write_lines(work / "validation.jsonl", [row.validation() for row in parts.held_back])
        told = chosen.model_dump(mode="json", exclude={"max_length", "replay", "replay_from", "validation"})
        spec = Spec(
            model=str(STARTER.absolute()), base=base_digest(STARTER), rows_file=str(work / "rows.jsonl"),
            validation_file=str(work / "validation.jsonl") if parts.held_back else "", out=str(work / "adapter"),
            parent=os.getpid(), device="cpu", kind=kind, **told,
        )  # fmt: skip
        began = time.monotonic()
        child.run(spec, work, on_report=reports.append, stop=lambda: False)
        seconds = time.monotonic() - began
        built = artifact.describe(
            work / "adapter", base=spec.base, project=NAMES, run=NAMES, revision="", params=told, kind=kind
        )
        artifact.publish(work / "adapter", built, room)
    return Trained(built.digest, reports, seconds)


def kept(app: Application, asked: Asked) -> list[bool]:
    """Whether each answer follows the house rules."""
    return [app.house_ok(messages, answer) for messages, answer in zip(asked.prompts, asked.answers, strict=True)]


def first(items: Sequence[Any], count: int) -> list[Any]:
    return list(islice(items, count))
