"""A thousand adapter swaps under load, over HTTP: gateway, log, Postgres and engine as processes on this machine.

Every swap is what a rollout does: load the next adapter beside the old, flip the deployment row, wait until the gateway
serves it, free the old one when its last request has ended. Blocks of swaps alternate with control blocks of as many
seconds without any, so that pauses are compared within one run. Each answer is compared, token by token of its text,
with what a fresh engine says under the adapter that the answer's header names.
"""

import hashlib
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from benchmarks.adapters import write_adapter
from benchmarks.figures import STARTER
from benchmarks.gateway import database
from benchmarks.landed import missing
from benchmarks.learning_cells import Cell
from engine.client import EngineRefused
from engine.messages import Generate, Sampling
from engine.offline import LocalEngine
from engine.sync_client import SyncEngineClient
from engine.text.tokenizer import Tokenizer
from examples.grammars.common import stream
from examples.grammars.simulate import APPLICATIONS
from services.store import deployments
from services.store.models import Artifact
from tests.gateway.parts import World, make_world

SWAPS, BLOCK = 1000, 25
ADAPTERS, RANK, SCALE = 6, 8, 0.3
PROMPTS, TOKENS, STREAMS = 24, 64, 4
# Half of the prompts are answered greedily, the others drawn with a seed of their own.
TEMPERATURE = 0.7
PROJECT = "entities"
WARM_SWAPS = 50
FLAT_MB = 5.0
# What the suffix drafter remembers is bounded, but at its default of a million tokens it is still filling
# when the last swap is over. It is full before the first one that counts, so that whatever else grows is seen.
SUFFIX_TOKENS = 1 << 14
FULL_SECONDS = 120.0
FREE_SECONDS = 30.0


class Ask(NamedTuple):
    """One prompt, as an app sends it."""

    messages: list[dict[str, str]]
    temperature: float
    seed: int


class Heard(NamedTuple):
    """One stream: `gap` is the longest pause between two chunks, all times in seconds of one clock."""

    ask: int
    adapter: str
    text: str
    began: float
    ended: float
    gap: float
    failure: str = ""
    id: str = ""


def swaps(scale: float) -> Cell:
    """The line of the table; `scale` shortens it."""
    wanted = max(2, round(SWAPS * scale))
    asks = _asks()
    with tempfile.TemporaryDirectory(prefix="whet-bench-") as directory:
        made = [write_adapter(Path(directory), STARTER, RANK, seed, SCALE) for seed in range(ADAPTERS)]
        right = _references(made, asks)
        with _platform(made) as (world, digests):
            warm, blocks = _measure(world, digests, asks, wanted)
            whole = [one.id for heard in (warm, *(block.heard for block in blocks)) for one in heard if not one.failure]
            lost = len(missing(world.sessions, whole))
    return _judge(blocks, right, wanted, lost)


def _asks() -> list[Ask]:
    examples = itertools.islice(stream(APPLICATIONS[PROJECT], "train", 7), PROMPTS)
    return [
        Ask([dict(message) for message in example.messages], TEMPERATURE if number % 2 else 0.0, number)
        for number, example in enumerate(examples)
    ]


def _references(made: Sequence[Path], asks: Sequence[Ask]) -> dict[tuple[str, int], str]:
    """What a fresh engine, with nobody else on it, says to each prompt under each adapter. fp32 promises equal bits."""
    tokenizer = Tokenizer.load(STARTER)
    said = {}
    for directory in made:
        with LocalEngine(STARTER, precision="fp32", speculation=False) as engine:
            digest = engine.load_adapter(directory)
            requests = [_request(tokenizer, ask, digest, number) for number, ask in enumerate(asks)]
            for number, one in enumerate(engine.generate(requests)):
                said[digest, number] = tokenizer.decode(one.token_ids)
    # Where two adapters say the same, a token from the wrong one would not be seen.
    for number in range(len(asks)):
        if len({said[key] for key in said if key[1] == number}) < len(made):
            raise RuntimeError(f"prompt {number} does not tell the adapters apart: raise SCALE")
    return said


def _request(tokenizer: Tokenizer, ask: Ask, digest: str, number: int) -> Generate:
    sampling = Sampling(
        temperature=ask.temperature, seed=ask.seed, max_tokens=TOKENS, stop_token_ids=tuple(tokenizer.eos_ids)
    )
    return Generate(id=str(number), prompt=tokenizer.encode_chat(ask.messages), sampling=sampling, adapter=digest)


@contextmanager
def _platform(made: Sequence[Path]) -> Iterator[tuple[World, list[str]]]:
    """A database, the engine on the starter, gateway and shipper; the adapters as artefacts of the project."""
    with (
        database() as postgres,
        make_world(postgres, real_engine=True, WHET_MODEL="starter", WHET_SUFFIX_TOKENS=str(SUFFIX_TOKENS)) as world,
    ):
        digests = []
        for directory in made:
            manifest = (directory / "manifest.json").read_bytes()
            digest = hashlib.sha256(manifest).hexdigest()
            place = world.settings.artifacts / digest
            place.mkdir(parents=True)
            for file in directory.iterdir():
                (place / file.name).write_bytes(file.read_bytes())
            with world.sessions.begin() as session:
                session.add(
                    Artifact(
                        digest=digest, kind="adapter", project_id=world.projects[PROJECT], state="staged",
                        base_digest=json.loads(manifest)["base"], manifest=json.loads(manifest),
                    )
                )  # fmt: skip
            digests.append(digest)
        world.start_engine()
        world.start_shipper()
        world.start_gateway()
        yield world, digests


class Block(NamedTuple):
    """What was heard during a block, when each swap began and ended in it, and the engine's memory after it."""

    heard: list[Heard]
    swapped: list[tuple[float, float]]
    memory_mb: float


def _measure(world: World, digests: Sequence[str], asks: Sequence[Ask], wanted: int) -> tuple[list[Heard], list[Block]]:
    """What was heard while it warmed up, and the blocks."""
    engine = psutil.Process(world.processes[0].pid)
    order = itertools.cycle(digests)
    blocks = []
    with SyncEngineClient(world.settings.engine_socket) as client:
        _swap(world, client, next(order), None)

        def warming() -> None:
            for _ in range(min(WARM_SWAPS, wanted)):
                _swap_next(world, client, order)
            _await_full(client)

        warm = _load(world, asks, warming)
        for start in range(0, wanted, BLOCK):
            count = min(BLOCK, wanted - start)
            swapped: list[tuple[float, float]] = []

            def swapping(count: int = count, swapped: list[tuple[float, float]] = swapped) -> None:
                swapped.extend(_swap_next(world, client, order) for _ in range(count))

            began = time.perf_counter()
            heard = _load(world, asks, swapping)
            took = time.perf_counter() - began
            blocks.append(Block(heard, swapped, engine.memory_info().rss / 1e6))
            blocks.append(Block(_load(world, asks, lambda took=took: time.sleep(took)), [], 0.0))  # type: ignore[misc]
    return warm, blocks


def _await_full(client: SyncEngineClient) -> None:
    """Until the project's corpus has no room left. Raises RuntimeError when traffic does not fill it."""
    deadline = time.monotonic() + FULL_SECONDS
    while not any(corpus.tokens >= SUFFIX_TOKENS for corpus in client.status().corpora):
        if time.monotonic() > deadline:
            raise RuntimeError("the suffix corpus does not fill: its growth would pass for that of swaps")
        time.sleep(0.2)


def _swap_next(world: World, client: SyncEngineClient, order: Iterator[str]) -> tuple[float, float]:
    began = time.perf_counter()
    with world.sessions.begin() as session:
        old = deployments.get(session, world.projects[PROJECT]).active_digest
    _swap(world, client, next(order), old)
    return began, time.perf_counter()


def _swap(world: World, client: SyncEngineClient, digest: str, old: str | None) -> None:
    client.load_adapter(digest, str(world.settings.artifacts / digest))
    with world.sessions.begin() as session:
        deployment = deployments.get(session, world.projects[PROJECT])
        deployments.advance(session, digest, "staged")
        deployments.flip(
            session, world.projects[PROJECT], expected_generation=deployment.generation, digest=digest,
            actor="benchmark", reason="a swap under load",
        )  # fmt: skip
    while world.get(f"/v1/models/{PROJECT}").json()["whet"]["adapter"] != digest:
        time.sleep(0.002)
    if old is not None:
        _free(client, old)


def _free(client: SyncEngineClient, digest: str) -> None:
    """As reconciliation does: a request that came late has it loaded again, then it is freed at the next look."""
    deadline = time.monotonic() + FREE_SECONDS
    while True:
        try:
            return client.unload_adapter(digest, seconds=FREE_SECONDS)
        except EngineRefused:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _load(world: World, asks: Sequence[Ask], meanwhile: Callable[[], object]) -> list[Heard]:
    """Streams, one after the other on each of a few connections, for as long as `meanwhile` takes."""
    done = threading.Event()
    heard: list[Heard] = []
    turns = itertools.count()

    def app() -> None:
        with httpx.Client(base_url=world.url, headers=world.headers(), timeout=60) as client:
            while not done.is_set():
                number = next(turns) % len(asks)
                heard.append(_hear(client, asks[number], number))

    apps = [threading.Thread(target=app) for _ in range(STREAMS)]
    for one in apps:
        one.start()
    try:
        meanwhile()
    finally:
        done.set()
        for one in apps:
            one.join()
    return heard


def _hear(client: httpx.Client, ask: Ask, number: int) -> Heard:
    body = {
        "model": PROJECT, "messages": ask.messages, "temperature": ask.temperature, "seed": ask.seed,
        "max_tokens": TOKENS, "stream": True,
    }  # fmt: skip
    began = last = time.perf_counter()
    gap, text, ended, adapter, name = 0.0, "", "", "", ""
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            adapter = answer.headers.get("x-whet-adapter", "")
            if answer.status_code != 200:
                return Heard(number, adapter, "", began, began, 0.0, answer.read().decode())
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    now = time.perf_counter()
                    gap, last = (max(gap, now - last) if text else 0.0), now
                    chunk = json.loads(line[6:])
                    name = chunk.get("id", name)
                    if "error" in chunk:
                        return Heard(number, adapter, text, began, now, gap, str(chunk["error"]))
                    text += chunk["choices"][0]["delta"].get("content") or "" if chunk["choices"] else ""
                ended = line or ended
    except httpx.HTTPError as error:
        return Heard(number, adapter, text, began, time.perf_counter(), gap, repr(error))
    cut = "" if ended == "data: [DONE]" else "the stream was cut"
    return Heard(number, adapter, text, began, last, gap, cut, name)


def _judge(blocks: Sequence[Block], right: Mapping[tuple[str, int], str], wanted: int, lost: int) -> Cell:
    heard = [one for block in blocks for one in block.heard]
    swapped = [moment for block in blocks for moment in block.swapped]
    failed = [one for one in heard if one.failure]
    wrong = sum(one.text != right[one.adapter, one.ask] for one in heard if not one.failure)
    near = [one.gap for block in blocks if block.swapped for one in block.heard if _overlaps(one, block.swapped)]
    control = [one.gap for block in blocks if not block.swapped for one in block.heard]
    p99, p99_control = _p99_ms(near), _p99_ms(control)
    memory = [block.memory_mb for block in blocks if block.memory_mb]
    late = memory[len(memory) * 3 // 4]
    took = sorted(1000 * (end - begin) for begin, end in swapped)
    raw = {
        "swaps": len(swapped), "requests": len(heard), "failed": len(failed),
        "failures": [one.failure for one in failed[:5]], "wrong": wrong,
        "not_logged": lost, "overlapping_streams": len(near), "control_streams": len(control),
        "p99_gap_ms": p99, "p99_gap_control_ms": p99_control,
        "swap_ms": {"p50": statistics.median(took), "most": took[-1]},
        "engine_mb": [round(one, 1) for one in memory],
    }  # fmt: skip
    measured = (
        f"{len(swapped):,} swaps, {len(heard):,} streams: {len(failed)} failed, {wrong} with wrong tokens, {lost} not "
        f"logged; p99 of longest gaps {p99:.1f} ms, control {p99_control:.1f} ms; engine {memory[0]:.0f} MB after the "
        f"first {BLOCK} swaps, {late:.0f} after three quarters, {memory[-1]:.0f} MB after the last"
    )
    met = (
        len(swapped) >= wanted and not failed and not wrong and not lost
        and p99 - p99_control < 50 and memory[-1] - memory[0] < FLAT_MB
    )  # fmt: skip
    return Cell(
        "adapter swaps under load (starter, fp32, 4 streams)",
        "1,000 swaps: 0 failed requests, 0 tokens from wrong weights, p99 longest gap - control < 50 ms, memory flat",
        measured, met, raw,
    )  # fmt: skip


def _overlaps(one: Heard, swapped: Sequence[tuple[float, float]]) -> bool:
    return any(one.began <= end and begin <= one.ended for begin, end in swapped)


def _p99_ms(gaps: Sequence[float]) -> float:
    return 1000 * statistics.quantiles(gaps, n=100)[98] if len(gaps) > 1 else 0.0


CELLS: dict[str, Callable[[float], Cell]] = {"swaps": swaps}
