"""The engine inside this process: for tests, training and benchmarks. The same scheduler, runner and slots."""

import hashlib
import sys
import time
from collections.abc import Sequence as Many
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from engine.adapters.files import MANIFEST, AdapterRefused
from engine.client import Completion, PoolFailed
from engine.config import Device, EngineConfig, Precision
from engine.core import Engine
from engine.messages import Finished, FromEngine, Generate, Pool, Pooled, Pooling, Sampling, Tokens
from engine.models.spec import UnsupportedModel
from engine.scheduling.scheduler import Row
from engine.sequence import Sequence
from engine.start import make_engine

CLIENT = b"offline"
# Between two looks at a grammar or an adapter that another thread prepares.
PAUSE_SECONDS = 0.001


class LocalEngine:
    """One model, driven synchronously. Not thread-safe; close it, or use it in `with`."""

    def __init__(
        self,
        model: Path | str,
        *,
        precision: Precision = "auto",
        device: Device = "auto",
        threads: int = 0,
        kv_tokens: int = 32768,
        max_context: int = 0,
        max_running: int = 64,
        step_tokens: int = 512,
        adapter_slots: int = 8,
        adapter_rank: int = 32,
        pack: bool = True,
        native: bool = True,
        speculation: bool = True,
    ) -> None:
        config = EngineConfig(
            model=Path(model),
            artifacts=Path(model),
            precision=precision,
            device=device,
            threads=threads,
            kv_tokens=kv_tokens,
            max_context=max_context,
            max_running=max_running,
            step_tokens=step_tokens,
            adapter_slots=adapter_slots,
            adapter_rank=adapter_rank,
            pack=pack,
            native=native,
            speculation=speculation,
            # Whoever submits here waits for the answers: nobody has to be sent away.
            max_waiting=sys.maxsize,
        )
        self._engine = make_engine(config)
        self._ids = count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let the engine's thread end."""
        self._engine.close()

    @property
    def core(self) -> Engine:
        """The engine of a decoder. Raises UnsupportedModel when the model is an encoder, which only embeds."""
        if not isinstance(self._engine, Engine):
            raise UnsupportedModel("this model is an encoder: it has embed, and nothing else")
        return self._engine

    def generate(
        self, requests: Many[Generate | list[int]], sampling: Sampling | None = None, adapter: str | None = None
    ) -> list[Completion]:
        """Run all to their end, batched, answers in order. Bare prompts take `sampling` and `adapter`."""
        asked = [self._request(request, sampling, adapter) for request in requests]
        for request in asked:
            self.core.submit(CLIENT, request)
        while self.core.in_flight:
            if not self.core.step():
                time.sleep(PAUSE_SECONDS)
        done = collect(self.core)
        return [done[request.id] for request in asked]

    def embed(self, prompts: Many[list[int]], how: Pooling = "mean", adapter: str | None = None) -> torch.Tensor:
        """One vector per prompt, [prompts, hidden], or with `classify` raw scores [prompts, labels]; fp32, batched.

        Not normalised. Raises PoolFailed for a prompt that cannot be pooled.
        """
        asked = [Pool(id=f"pool-{next(self._ids)}", prompt=prompt, how=how, adapter=adapter) for prompt in prompts]
        for request in asked:
            self._engine.submit_pool(CLIENT, request)
        while self._engine.step():
            continue
        answers = {message.id: message for _, message in self._engine.outbox}
        self._engine.outbox = []
        return torch.stack([_vector(answers[request.id]) for request in asked]) if asked else torch.empty(0, 0)

    def load_adapter(self, directory: Path | str) -> str:
        """Load an artefact directory now; returns its digest. Raises AdapterRefused."""
        path = Path(directory).absolute()
        manifest = path / MANIFEST
        if not manifest.is_file():
            raise AdapterRefused(f"{path.name} holds no {MANIFEST}")
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        slots = self.core.adapters.slots
        if slots.ready(digest):
            return digest
        adapter = replace(self.core.adapters.reader, root=path.parent).read(digest, path.name)
        if not slots.make_room():
            raise AdapterRefused("every slot is in use")
        slots.install(adapter)
        return digest

    def hidden_states(
        self, token_ids: list[int], adapter: str | None = None, chunks: Many[int] | None = None
    ) -> torch.Tensor:
        """The LM head's input [tokens, hidden]; `chunks` says how many tokens each step takes."""
        chunks = list(chunks or self._default_chunks(len(token_ids)))
        budget = self.core.config.step_tokens
        if sum(chunks) != len(token_ids) or not all(0 < chunk <= budget for chunk in chunks):
            raise ValueError(f"chunks of 1 to {budget} tokens must add up to {len(token_ids)}, not {chunks}")
        sequence = self._alone(token_ids, adapter)
        scheduler = self.core.scheduler
        parts = []
        for chunk in chunks:
            scheduled = scheduler.schedule()[0]
            parts.append(self.core.runner.hidden([Row(scheduled.sequence, chunk)]))
            sequence.computed += chunk
        scheduler.remove(sequence)
        if adapter is not None:
            self.core.adapters.slots.release(adapter)
        return torch.cat(parts)

    @torch.inference_mode()
    def logits(self, token_ids: list[int], adapter: str | None = None, chunks: Many[int] | None = None) -> torch.Tensor:
        """Logits [tokens, vocabulary] as fp32."""
        hidden = self.hidden_states(token_ids, adapter, chunks)
        resident = self.core.adapters.slots.get(adapter) if adapter is not None else None
        slot = resident.slot if resident else 0
        return self.core.forward.logits(hidden, [slot] * len(token_ids)).float()

    def _request(self, request: Generate | list[int], sampling: Sampling | None, adapter: str | None) -> Generate:
        if isinstance(request, Generate):
            return request
        if sampling is None:
            raise ValueError("bare prompts need sampling parameters")
        return Generate(id=f"local-{next(self._ids)}", prompt=request, sampling=sampling, adapter=adapter)

    def _alone(self, token_ids: list[int], adapter: str | None) -> Sequence:
        """A running sequence for these tokens; nothing else may be running."""
        assert not self.core.busy, "hidden states are computed between generations"
        if not 0 < len(token_ids) <= self.core.max_context:
            raise ValueError(f"between 1 and {self.core.max_context} tokens, not {len(token_ids)}")
        if not 0 <= min(token_ids) <= max(token_ids) < self.core.forward.spec.vocab_size:
            raise ValueError(f"token ids must lie between 0 and {self.core.forward.spec.vocab_size - 1}")
        sampling = Sampling(temperature=0.0, seed=0, max_tokens=1)
        # Asking for the prompt's log-probabilities keeps cached blocks away: every token's state is wanted here.
        request = Generate(
            id=f"hidden-{next(self._ids)}", prompt=token_ids, sampling=sampling, adapter=adapter, prompt_logprobs=True
        )
        sequence = Sequence(CLIENT, request, arrival=next(self._ids), limit=self.core.max_context)
        if adapter is not None:
            sequence.slot = self.core.adapters.slots.acquire(adapter)
        self.core.scheduler.add(sequence)
        return sequence

    def _default_chunks(self, tokens: int) -> list[int]:
        budget = self.core.config.step_tokens
        return [budget] * (tokens // budget) + ([tokens % budget] if tokens % budget else [])


def _vector(answer: FromEngine) -> torch.Tensor:
    if isinstance(answer, Finished):
        raise PoolFailed(answer)
    assert isinstance(answer, Pooled), "a Pool is answered by Pooled or Finished"
    return torch.frombuffer(bytearray(answer.vector), dtype=torch.float32)


def collect(core: Engine) -> dict[str, Completion]:
    """Empty the outbox into one completion per request that ended."""
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[float]] = {}
    done: dict[str, Completion] = {}
    for _, message in core.outbox:
        if isinstance(message, Tokens):
            tokens.setdefault(message.id, []).extend(message.token_ids)
            logprobs.setdefault(message.id, []).extend(message.logprobs)
        elif isinstance(message, Finished):
            done[message.id] = Completion(tokens.pop(message.id, []), logprobs.pop(message.id, []), message)
    core.outbox = []
    return done
