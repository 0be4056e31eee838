"""Answers of one adapter to the held-out prompts, straight from the engine: no pin, cache, example or log is near."""

from collections.abc import Callable, Sequence
from typing import NamedTuple
from uuid import UUID, uuid4

from engine.client import Completion
from engine.messages import Generate, Sampling
from engine.sync_client import SyncEngineClient
from engine.text.tokenizer import Tokenizer

CHUNK = 32
SPARE_TOKENS = 32
# What another attempt may mend; the rest is the prompt's own fault and an empty answer on both sides.
PASSING = ("adapter_not_loaded", "overloaded", "internal")


class EvaluationInterrupted(RuntimeError):
    """The engine could not answer this time; the job is worth another attempt."""


class Prompt(NamedTuple):
    """A held-out example as the engine is asked: token ids, and how many tokens the answer may take."""

    example_id: UUID
    token_ids: list[int]
    max_tokens: int


def make_prompt(
    tokenizer: Tokenizer, example_id: UUID, messages: list[dict[str, object]], golden: str, context: int
) -> Prompt:
    """Twice the golden answer's length and some: enough to be right, not enough to ramble at others' cost."""
    token_ids = tokenizer.encode_chat(messages)
    budget = 2 * len(tokenizer.encode_plain(golden)) + SPARE_TOKENS
    return Prompt(example_id, token_ids, max(1, min(budget, context - len(token_ids))))


def answer_all(
    client: SyncEngineClient,
    tokenizer: Tokenizer,
    adapter: str | None,
    prompts: Sequence[Prompt],
    on_chunk: Callable[[int], None],
) -> dict[UUID, str]:
    """Greedy answers at batch priority. `on_chunk` hears how many are done and may raise to stop.

    Raises EngineGone, EvaluationInterrupted.
    """
    answers: dict[UUID, str] = {}
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        completions = client.generate_many([_request(tokenizer, adapter, prompt) for prompt in chunk])
        for prompt, completion in zip(chunk, completions, strict=True):
            answers[prompt.example_id] = _text(tokenizer, adapter, completion)
        on_chunk(len(answers))
    return answers


def _request(tokenizer: Tokenizer, adapter: str | None, prompt: Prompt) -> Generate:
    return Generate(
        id=f"evaluate-{uuid4().hex}",
        prompt=prompt.token_ids,
        sampling=Sampling(temperature=0.0, seed=0, max_tokens=prompt.max_tokens, stop_token_ids=tokenizer.eos_ids),
        adapter=adapter,
        namespace="evaluation",
        cache_salt="evaluation",
        priority="batch",
        learn=False,
    )


def _text(tokenizer: Tokenizer, adapter: str | None, completion: Completion) -> str:
    finished = completion.finished
    if finished.reason in ("error", "cancelled"):
        if finished.code in PASSING or finished.reason == "cancelled":
            raise EvaluationInterrupted(f"the engine could not answer: {finished.error or finished.reason}")
        return ""
    if finished.adapter != adapter:
        raise EvaluationInterrupted(f"asked {adapter or 'the base'}, but {finished.adapter or 'the base'} answered")
    return tokenizer.decode(completion.token_ids)
