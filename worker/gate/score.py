"""Answers of named weights to held-out prompts, straight from the engine: no pin, cache, example or log is near.

What was answered is kept chunk by chunk, so a killed evaluation goes on where it was, and the next one finds the
incumbent's answers there: weights, prompt and sampling being the same, so is a greedy answer.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple
from uuid import UUID, uuid4

from engine.client import Completion
from engine.messages import Generate, Grammar, Sampling, Status
from engine.sync_client import SyncEngineClient
from engine.text.supervision import NOTHING, Asked, answer_ids, prompt_ids, said_text, supervise, turn_end
from engine.text.tokenizer import Tokenizer
from services.store.evaluation_answers import Answer, Key

CHUNK = 32
SPARE_TOKENS = 32
# What another attempt may mend; the rest is the prompt's own fault and an empty answer on both sides.
PASSING = ("adapter_not_loaded", "overloaded", "internal")
# Of these, what an engine says that others keep busy.
CROWDED = ("adapter_not_loaded", "overloaded")
# Changes when the same request would be asked in another way.
FORMAT = 1


class EvaluationInterrupted(RuntimeError):
    """The engine could not answer this time; the job is worth another attempt."""


class EngineCrowded(EvaluationInterrupted):
    """Others keep the engine or its adapter slots busy; there is room again when they are done."""


class Ask(NamedTuple):
    """One request about an example. With `scored_from`, nothing is generated: the prompt's own tokens from there on are
    scored instead."""

    example_id: UUID
    token_ids: list[int]
    max_tokens: int
    scored_from: int = 0
    grammar: Grammar | None = None
    asked: Asked = NOTHING

    @property
    def key(self) -> Key:
        grammar = "" if self.grammar is None else f"{self.grammar.kind} {self.grammar.text}"
        said = f"{FORMAT} {self.max_tokens} {self.scored_from} {grammar}\n{self.token_ids}"
        return Key(self.example_id, hashlib.sha256(said.encode()).hexdigest())


class Kept(NamedTuple):
    """Where answers are kept: `known` finds those there are, `keep` stores a chunk and may raise to stop."""

    known: Callable[[str, Sequence[Key]], dict[Key, Answer]]
    keep: Callable[[str, Sequence[tuple[Key, Answer]]], None]


def weights_of(status: Status, adapter: str | None) -> str:
    """What an answer hangs on besides the request: base, adapter, and how they are multiplied."""
    return f"{status.base}:{adapter or ''}:{status.dtype}:{status.kernels}"


def ask_answer(
    tokenizer: Tokenizer, example_id: UUID, messages: list[dict[str, object]], golden: str, context: int,
    asked: Asked = NOTHING,
) -> Ask:  # fmt: skip
    """Twice the golden answer's length and some: enough to be right, not enough to ramble at others' cost."""
    token_ids = prompt_ids(tokenizer, messages, asked)
    budget = 2 * len(answer_ids(tokenizer, golden, asked)) + SPARE_TOKENS
    limit = max(1, min(budget, context - len(token_ids)))
    return Ask(example_id, token_ids, limit, grammar=asked.grammar, asked=asked)


def ask_likelihood(
    tokenizer: Tokenizer, example_id: UUID, messages: list[dict[str, object]], golden: str, asked: Asked = NOTHING
) -> Ask:
    """How likely the golden answer and its end are, token by token, as training would see them."""
    row = supervise(tokenizer, messages, golden, turn_end(tokenizer), asked)
    return Ask(example_id, [*row.prompt, *row.answer, row.end], 1, scored_from=len(row.prompt))


def ask_all(
    client: SyncEngineClient, tokenizer: Tokenizer, adapter: str | None, asked: Sequence[Ask], kept: Kept
) -> dict[Key, Answer]:
    """Greedy answers at batch priority, those known already taken as they are. Raises EngineGone,
    EvaluationInterrupted, and whatever `kept.keep` raises to stop."""
    weights = weights_of(client.status(), adapter)
    answers = kept.known(weights, [ask.key for ask in asked])
    missing = [ask for ask in asked if ask.key not in answers]
    kept.keep(weights, [])
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        completions = client.generate_many([_request(tokenizer, adapter, ask) for ask in chunk])
        new = [
            (ask.key, _answer(tokenizer, adapter, ask, completion))
            for ask, completion in zip(chunk, completions, strict=True)
        ]
        kept.keep(weights, new)
        answers.update(new)
    return answers


def _request(tokenizer: Tokenizer, adapter: str | None, ask: Ask) -> Generate:
    return Generate(
        id=f"evaluate-{uuid4().hex}",
        prompt=ask.token_ids,
        sampling=Sampling(temperature=0.0, seed=0, max_tokens=ask.max_tokens, stop_token_ids=tokenizer.eos_ids),
        adapter=adapter,
        namespace="evaluation",
        cache_salt="evaluation",
        priority="batch",
        grammar=ask.grammar,
        prompt_logprobs=ask.scored_from > 0,
        learn=False,
    )


def _answer(tokenizer: Tokenizer, adapter: str | None, ask: Ask, completion: Completion) -> Answer:
    finished = completion.finished
    if finished.reason in ("error", "cancelled"):
        if finished.code in PASSING or finished.reason == "cancelled":
            kind = EngineCrowded if finished.code in CROWDED else EvaluationInterrupted
            raise kind(f"the engine could not answer: {finished.error or finished.reason}")
        return Answer("", "error", 0, 0.0 if ask.scored_from else None)
    if finished.adapter != adapter:
        raise EvaluationInterrupted(f"asked {adapter or 'the base'}, but {finished.adapter or 'the base'} answered")
    if ask.scored_from:
        return Answer("", finished.reason, 0, _likelihood(completion.prompt_logprobs[ask.scored_from - 1 :]))
    text = said_text(tokenizer, completion.token_ids, ask.asked)
    return Answer(text, finished.reason, len(completion.token_ids))


def _likelihood(logprobs: Sequence[float]) -> float:
    """The geometric mean of the tokens' probabilities: 1 / perplexity."""
    return min(1.0, math.exp(sum(logprobs) / len(logprobs))) if logprobs else 0.0
