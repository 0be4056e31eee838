"""What the speculation benchmark learns from: the applications' logged traffic, and heads trained on it."""

import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks.figures import STARTER
from benchmarks.speculation_world import Ask, World
from engine.digest import base_digest
from engine.speculation.manager import vocabulary_digest
from engine.text.tokenizer import Tokenizer
from examples.grammars.common import Split, stream
from examples.grammars.simulate import APPLICATIONS
from services.store.run_params import SpeculatorParams
from worker.training import artifact
from worker.training.heads import write_requests
from worker.training.spec import REPORT, HeadsSpec, Request
from worker.training.spec import encode as encode_spec

TEMPERATURE = 0.7
# Streams at once while traffic is made.
CROWD = 32


class Trained(NamedTuple):
    """Heads that were trained: their digest, seconds from the first row written to the artefact, and tau."""

    digest: str
    seconds: float
    tau: dict[str, float]


def prompts(application: str, split: Split, number: int, seed: int) -> list[list[int]]:
    """Token ids of prompts of one of the starter's applications."""
    tokenizer = Tokenizer.load(STARTER)
    examples = islice(stream(APPLICATIONS[application], split, seed), number)
    return [tokenizer.encode_chat(example.messages) for example in examples]


def traffic(work: Path, application: str, number: int, seed: int) -> list[Request]:
    """Logged requests of an application: its train prompts, answered by the starter, every other one at 0.7."""
    file = work / f"traffic-{application}-{number}-{seed}.json"
    if not file.exists():
        world = World(STARTER, work, kv_tokens=65536)
        asks = [
            Ask(prompt, application, temperature=TEMPERATURE * (index % 2), seed=index)
            for index, prompt in enumerate(prompts(application, "train", number, seed))
        ]
        told = world.run(asks, CROWD)
        world.close()
        logged = [Request(a.prompt, t.tokens, a.temperature, a.seed) for a, t in zip(asks, told, strict=True)]
        keep(file, logged)
    return msgspec.json.decode(file.read_bytes(), type=list[Request])


def trained(work: Path, name: str, logged: list[Request], seed: int) -> Trained:
    """Heads from these requests, by the trainer's own process and with the settings that a run gets by default."""
    file = work / f"heads-{name}-{len(logged)}-{seed}.json"
    if not file.exists():
        room = work / f"train-{name}-{len(logged)}-{seed}"
        (room / "out").mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        report = _train(room, logged, SpeculatorParams(seed=seed))
        built = artifact.describe_speculator(
            room / "out", base=base_digest(STARTER), vocabulary=vocabulary_digest(STARTER), adapter=None,
            report=report, params={"seed": seed},
        )  # fmt: skip
        artifact.publish(room / "out", built, work)
        seconds = time.perf_counter() - began
        keep(report_file(work, built.digest), report)
        keep(file, {"digest": built.digest, "seconds": seconds, "tau": report["tau"]})
    return Trained(**msgspec.json.decode(file.read_bytes()))


def report_file(work: Path, digest: str) -> Path:
    """Where the trainer's report on these heads is kept, for the gate."""
    return work / f"report-{digest}.json"


def keep(file: Path, value: object) -> None:
    """Write JSON whole or not at all: a run that is cut must not leave half a file to be believed."""
    draft = file.with_name(f".{file.name}")
    draft.write_bytes(msgspec.json.encode(value))
    draft.replace(file)


def _train(room: Path, logged: list[Request], params: SpeculatorParams) -> dict[str, Any]:
    """Run the trainer; the heads are then in `room`/out, its report is returned."""
    write_requests(room / "rows.jsonl", logged)
    chosen = params.model_dump(mode="json", exclude={"min_requests"})
    spec = HeadsSpec(
        model=str(STARTER), rows_file=str(room / "rows.jsonl"), out=str(room / "out"), precision="auto",
        parent=os.getpid(), **chosen,
    )  # fmt: skip
    (room / "spec.json").write_bytes(encode_spec(spec))
    command = [sys.executable, "-m", "worker.training.heads", "--spec", str(room / "spec.json")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"the trainer ended with {ran.returncode}: {(ran.stderr or ran.stdout)[-2000:]}")
    report: dict[str, Any] = msgspec.json.decode((room / "out" / REPORT).read_bytes())
    (room / "out" / REPORT).unlink()
    return report
