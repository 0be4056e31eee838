"""The trainer of speculator heads: `python -m worker.training.heads --spec spec.json`, or `train` in this process.

States come from the engine itself, teacher-forced over logged prompts and answers, and live in memory only; targets
are made from them on the fly. So nothing is generated again and nothing of the traffic is written twice.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import msgspec
import torch

from engine.adapters.files import AdapterRefused
from engine.config import Device, Precision
from engine.offline import LocalEngine
from engine.speculation.loading import Speculator
from engine.states import Answered, answer_states
from worker.training import head_files
from worker.training.choosing import Split, choose, costs, split
from worker.training.head_data import effective_head, frequent, places_of
from worker.training.head_loop import Loop, Material, Pace, fit_confidence, per_request
from worker.training.head_model import Heads
from worker.training.head_timing import drafting_ms
from worker.training.process import Refused, serve
from worker.training.spec import REPORT, HeadsProgress, HeadsSpec, Report, Request, Stage, decode_heads_spec

# States kept in memory; the oldest requests that do not fit are not trained on.
STATES_BYTES = 1 << 30
LEAST_REQUESTS = 16
TELL_SECONDS = 2.0
KV_TOKENS = 32768

Tell = Callable[[Report], None]


def main() -> int:
    """The process's exit status."""
    parser = argparse.ArgumentParser(description="Train speculator heads as a job's child process.")
    parser.add_argument("--spec", type=Path, required=True)
    spec = decode_heads_spec(parser.parse_args().spec.read_bytes())

    def work(report: Tell) -> None:
        torch.set_num_threads(1)
        train(spec, report)

    return serve(spec.parent, work)


def read_requests(file: Path) -> list[Request]:
    """The logged requests, oldest first."""
    decode = msgspec.json.Decoder(Request).decode
    return [decode(line) for line in file.read_bytes().splitlines() if line]


def write_requests(file: Path, requests: Sequence[Request]) -> None:
    """What `train` reads."""
    file.write_bytes(b"".join(msgspec.json.encode(request) + b"\n" for request in requests))


def train(spec: HeadsSpec, report: Tell = lambda _: None) -> dict[str, Any]:
    """Train heads and write them and report.json into `spec.out`; returns the report. Raises Refused.

    The report: `tau` {"greedy", "shared"}, `incumbent_tau` or None, `held_out` (a row per judged request with the mean
    tokens a step under the candidate and the incumbent), `survival` by head of both, `drafting_ms` of both, `shape`,
    `requests`, `tokens`.
    """
    torch.manual_seed(spec.seed)
    requests = _chosen(spec)
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise Refused("WHET_DEVICE is cuda, but torch sees no CUDA device")
    with _engine(spec) as engine:
        requests = _fitting(engine, requests, report)
        parts = split(len(requests))
        material, head = _material(engine, spec, requests, parts, report)
        found = _train(spec, engine, material, head, parts, report)
    (Path(spec.out) / REPORT).write_text(json.dumps(found), encoding="utf-8")
    report(Stage(name="saved", detail={"tau": found["tau"], "steps": found["steps"]}))
    return found


def _train(
    spec: HeadsSpec, engine: LocalEngine, material: Material, head: torch.Tensor, parts: Split, report: Tell
) -> dict[str, Any]:
    """The heads into `spec.out`, and the report."""
    champion = _champion(spec, head, report)
    heads = Heads(head[material.tokens_V], spec.heads, conditioning=spec.conditioning, recurrent=RECURRENT)
    warm = champion is not None and head_files.warm_start(heads, material.tokens_V, champion, len(head))
    report(Stage(name="loaded", detail={"requests": len(material.requests), "warm_start": warm}))
    pace = Pace(spec.lr, spec.epochs, spec.batch_tokens, spec.seed)
    checkpoint = Path(spec.checkpoint) if spec.checkpoint else None
    origin = (engine.core.base, spec.adapter, spec.champion)
    loop = Loop(heads, material, parts.train, parts.stop, pace, checkpoint, origin)
    loop.run(_teller(report))
    # Rounded first: the confidence is about the heads that will draft.
    head_files.save(heads, material.tokens_V, Path(spec.out))
    fit_confidence(heads, material, parts.train, spec.seed)
    head_files.save(heads, material.tokens_V, Path(spec.out))
    found = _measured(engine, heads, champion, material, parts)
    return found | {
        "requests": len(material.requests), "tokens": _tokens(material.requests), "steps": loop.step,
        "warm_start": warm,
    }  # fmt: skip


# Whether a head starts from the state of the one before it; the ablation in benchmarks/results/heads.md says no.
RECURRENT = False


def _chosen(spec: HeadsSpec) -> list[Request]:
    """What is trained on, within the token budget."""
    logged = [each for each in read_requests(Path(spec.rows_file)) if each.prompt and len(each.answer) > 1]
    sizes = [len(each.prompt) + len(each.answer) for each in logged]
    return [logged[index] for index in choose(costs(sizes, spec.max_tokens), spec.max_tokens, spec.seed)]


def _fitting(engine: LocalEngine, chosen: list[Request], report: Tell) -> list[Request]:
    """Those that the context and memory hold, the newest. Raises Refused when that is too little."""
    longest, state = engine.core.max_context, 4 * engine.core.forward.spec.hidden_size
    readable = [each for each in chosen if len(each.prompt) + len(each.answer) - 1 <= longest]
    room, first = STATES_BYTES // state, len(readable)
    while first and len(readable[first - 1].answer) <= room:
        first -= 1
        room -= len(readable[first].answer)
    requests = readable[first:]
    if len(requests) < len(chosen):
        left_out = {"longer_than_the_context": len(chosen) - len(readable), "beyond_memory": first}
        report(Stage(name="left out", detail=left_out))
    if len(requests) < LEAST_REQUESTS:
        where = "within budget, context and memory"
        raise Refused(f"{len(requests)} logged requests {where}; heads need {LEAST_REQUESTS} at least")
    return requests


def _tokens(requests: Sequence[Request]) -> int:
    return sum(len(request.answer) for request in requests)


def _engine(spec: HeadsSpec) -> LocalEngine:
    return LocalEngine(
        spec.model,
        precision=cast(Precision, spec.precision),
        device=cast(Device, spec.device),
        threads=1,
        kv_tokens=KV_TOKENS,
        adapter_slots=2,
        adapter_rank=spec.adapter_rank,
        speculation=False,
    )


def _material(
    engine: LocalEngine, spec: HeadsSpec, requests: list[Request], parts: Split, report: Tell
) -> tuple[Material, torch.Tensor]:
    """States of all requests, and the LM head [vocabulary, E] as the adapter leaves it."""
    core = engine.core
    adapter = engine.load_adapter(spec.adapter) if spec.adapter else None
    resident = core.adapters.slots.get(adapter) if adapter else None
    slot, hidden = resident.slot if resident else 0, core.forward.spec.hidden_size

    def logits(states: torch.Tensor) -> torch.Tensor:
        return core.forward.logits(states.to(core.forward.device), [slot] * len(states)).float().cpu()

    with torch.no_grad():
        head = effective_head(logits, hidden)
    states = _states(engine, requests, adapter, report)
    answers = (requests[index].answer for index in parts.train)
    tokens_V = frequent(answers, spec.vocabulary, len(head))
    return Material(requests, states, tokens_V, places_of(tokens_V, len(head))), head


def _states(engine: LocalEngine, requests: list[Request], adapter: str | None, report: Tell) -> list[torch.Tensor]:
    found: list[torch.Tensor] = [torch.empty(0)] * len(requests)
    total, done, began = sum(len(each.prompt) + len(each.answer) for each in requests), 0, time.monotonic()
    told = began
    rows = (Answered(request.prompt, request.answer) for request in requests)
    for index, hidden_NE in answer_states(engine.core, rows, adapter):
        found[index] = hidden_NE
        done += len(requests[index].prompt) + len(requests[index].answer)
        now = time.monotonic()
        if now - told > TELL_SECONDS:
            told = now
            rate = done / (now - began)
            report(Stage(name="states", detail={"tokens": done, "of": total, "tokens_per_second": round(rate)}))
    return found


def _champion(spec: HeadsSpec, head: torch.Tensor, report: Tell) -> Speculator | None:
    """The heads that draft now; None when there are none, or when they are not for this base any more."""
    if not spec.champion:
        return None
    try:
        return head_files.read(Path(spec.champion), Path(spec.model), head.shape[1], len(head))
    except AdapterRefused as error:
        report(Stage(name="no champion", detail={"reason": str(error)}))
        return None


def _teller(report: Tell) -> Callable[[int, int, float, float | None, float], None]:
    began = time.monotonic()
    first: list[int] = []

    def tell(step: int, steps: int, loss: float, tau: float | None, rate: float) -> None:
        first.append(step)
        pace = (time.monotonic() - began) / max(1, step - first[0] + 1)
        eta = (steps - step) * pace
        report(HeadsProgress(step=step, steps=steps, loss=loss, tau=tau, tokens_per_second=rate, eta=eta))

    return tell


def _measured(
    engine: LocalEngine, heads: Heads, champion: Speculator | None, material: Material, parts: Split
) -> dict[str, Any]:
    """Candidate and incumbent on the requests that neither the training nor the stopping has seen."""
    ours, theirs = _judged(heads, material, parts.judge), None
    if champion is not None:
        words = material.drafting(champion.tokens_V.long())
        theirs = _judged(head_files.as_heads(champion), words, parts.judge)
    timed: dict[str, Any] = {
        "candidate": drafting_ms(engine.core.forward, head_files.as_speculator(heads, material.tokens_V))
    }
    timed["incumbent"] = drafting_ms(engine.core.forward, champion) if champion else None
    rows = [
        {
            "group": material.requests[index].group,
            "tokens": len(material.requests[index].answer),
            "temperature": material.requests[index].temperature,
            "candidate": ours["values"][place],
            "incumbent": theirs["values"][place] if theirs else None,
        }
        for place, index in enumerate(parts.judge)
    ]
    shape = {
        "heads": heads.count, "hidden": heads.weight.shape[1], "vocabulary": len(material.tokens_V),
        "conditioning": "none" if heads.condition is None else "hydra", "recurrent": heads.recurrent,
    }  # fmt: skip
    return {
        "tau": ours["tau"], "incumbent_tau": theirs["tau"] if theirs else None, "held_out": rows, "shape": shape,
        "survival": {"candidate": ours["survival"], "incumbent": theirs["survival"] if theirs else None},
        "drafting_ms": timed,
    }  # fmt: skip


def _judged(heads: Heads, material: Material, indices: Sequence[int]) -> dict[str, Any]:
    shared = per_request(heads, material, indices)
    greedy = per_request(heads, material, indices, greedy=True)
    survival = [_mean(column) for column in zip(*shared, strict=True)]
    tau = {"greedy": 1 + _mean([sum(shares) for shares in greedy]), "shared": 1 + sum(survival)}
    values = [1 + sum(shares) for shares in shared]
    return {"values": values, "tau": tau, "survival": survival}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


if __name__ == "__main__":
    sys.exit(main())
