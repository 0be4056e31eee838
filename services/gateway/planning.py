"""From a checked request to what the engine is asked and what the log will hold."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec

from engine.messages import Generate, Sampling, Status
from engine.text.tokenizer import Tokenizer
from services.errors import InvalidRequest
from services.gateway.access import Target
from services.gateway.bodies import Ask
from services.gateway.spool_format import Admitted
from services.store.base import uuid7

DEFAULT_MAX_TOKENS = 256
# No tokenizer in use packs more characters into a token than this: longer prompts are refused without tokenizing.
MOST_CHARACTERS_A_TOKEN = 64
LONG_PROMPT_CHARACTERS = 20_000
SEED_RANGE = 2**63


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything decided before the first token. One Generate and one log record for each of `n` choices."""

    ask: Ask
    target: Target
    prompt: list[int]
    sampling: Sampling
    ids: tuple[UUID, ...]
    started: float
    admitted: Admitted

    @property
    def parameters(self) -> dict[str, Any]:
        return self.admitted.parameters

    def record(self, choice: int) -> Admitted:
        """The log's first record of one choice."""
        return msgspec.structs.replace(
            self.admitted, id=self.ids[choice], parameters={**self.admitted.parameters, "choice": choice}
        )

    def message(self, choice: int) -> Generate:
        """What the engine is asked for one choice; the adapter is filled in by whoever knows it is loaded."""
        return Generate(
            id=self.ids[choice].hex,
            prompt=self.prompt,
            sampling=self.sampling,
            namespace=self.admitted.namespace,
            cache_salt=self.admitted.namespace,
            choice=choice,
        )


async def make_plan(
    ask: Ask, target: Target, key_id: UUID, tokenizer: Tokenizer, engine: Status, started: float
) -> Plan:
    """Tokenize and fix every effective parameter. `started` is the request's arrival (time.perf_counter).

    Raises InvalidRequest for a prompt that the template refuses or that leaves no room in the context.
    """
    characters = _characters(ask)
    if characters > engine.max_context * MOST_CHARACTERS_A_TOKEN:
        raise _too_long(f"more than {characters // MOST_CHARACTERS_A_TOKEN}", None, engine.max_context)
    if characters > LONG_PROMPT_CHARACTERS:
        prompt = await asyncio.to_thread(_encode, ask, tokenizer)
    else:
        prompt = _encode(ask, tokenizer)
    sampling = _sampling(ask, target, prompt, tokenizer, engine.max_context)
    ids = tuple(uuid7() for _ in range(ask.n))
    admitted = _admitted(ask, target, key_id, tokenizer, engine, prompt, sampling, ids[0])
    return Plan(
        ask=ask, target=target, prompt=prompt, sampling=sampling, ids=ids, started=started, admitted=admitted
    )  # fmt: skip


def _characters(ask: Ask) -> int:
    if ask.prompt is None:
        return sum(len(message["content"]) for message in ask.messages)
    return len(ask.prompt)


def _encode(ask: Ask, tokenizer: Tokenizer) -> list[int]:
    try:
        if ask.prompt is None:
            prompt = tokenizer.encode_chat(ask.messages)
        elif isinstance(ask.prompt, str):
            prompt = tokenizer.encode(ask.prompt, add_special_tokens=True)
        else:
            prompt = ask.prompt
    except ValueError as error:
        raise InvalidRequest(str(error), param="messages" if ask.prompt is None else "prompt") from error
    if not prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if isinstance(ask.prompt, list) and not 0 <= min(prompt) <= max(prompt) < tokenizer.vocab_size:
        raise InvalidRequest(f"token ids must be from 0 to {tokenizer.vocab_size - 1}", param="prompt")
    return prompt


def _sampling(ask: Ask, target: Target, prompt: list[int], tokenizer: Tokenizer, context: int) -> Sampling:
    room = context - len(prompt)
    wanted = ask.max_tokens
    if room < 1 or (wanted is not None and wanted > room):
        raise _too_long(str(len(prompt)), wanted, context)
    default = target.project.config.get("max_tokens_default", DEFAULT_MAX_TOKENS)
    seed = secrets.randbelow(SEED_RANGE) if ask.seed is None else ask.seed % SEED_RANGE
    return Sampling(
        temperature=ask.temperature,
        top_p=ask.top_p,
        top_k=ask.top_k,
        seed=seed,
        max_tokens=min(int(default), room) if wanted is None else wanted,
        stop_token_ids=() if ask.ignore_eos else tokenizer.eos_ids,
    )


def _too_long(length: str, wanted: int | None, context: int) -> InvalidRequest:
    and_wanted = "" if wanted is None else f" and asks for {wanted} more"
    return InvalidRequest(
        f"the prompt has {length} tokens{and_wanted}; the context holds {context}",
        code="context_length_exceeded",
    )


def _admitted(
    ask: Ask, target: Target, key_id: UUID, tokenizer: Tokenizer, engine: Status,
    prompt: list[int], sampling: Sampling, interaction_id: UUID,
) -> Admitted:  # fmt: skip
    project, extra = target.project, ask.extra
    messages = ask.messages if ask.prompt is None else [{"role": "prompt", "content": _prompt_text(ask, tokenizer)}]
    parameters = msgspec.to_builtins(sampling) | {
        "stop": list(ask.stop), "n": ask.n, "model": ask.model, "max_tokens_given": ask.max_tokens,
        "seed_given": ask.seed is not None, "ignore_eos": ask.ignore_eos,
    }  # fmt: skip
    return Admitted(
        id=interaction_id,
        project_id=project.id,
        api_key_id=key_id,
        endpoint=ask.endpoint,
        stream=ask.stream,
        adapter_digest=target.candidates[0],
        base_digest=engine.base,
        generation=project.generation,
        namespace=project.id.hex,
        session_key=extra.session,
        end_user=ask.user,
        group_key=extra.group or extra.session or ask.user or _group_of(messages),
        tags=dict(extra.tags),
        config_hash=project.config_hash,
        started_at=time.time(),
        messages=messages,
        parameters=parameters,
        prompt_token_ids=prompt,
        prompt_hash=_hash(prompt),
        template_hash=tokenizer.template_digest,
        tokenizer_hash=tokenizer.digest,
        retrieved=extra.retrieved,
    )


def _prompt_text(ask: Ask, tokenizer: Tokenizer) -> str:
    if isinstance(ask.prompt, list):
        return tokenizer.decode(ask.prompt, skip_special_tokens=False)
    return ask.prompt or ""


def _group_of(messages: Sequence[dict[str, Any]]) -> str:
    """Equal prompts belong together when the app says nothing else: they must not straddle the held-out split."""
    return f"prompt:{_hash(messages)[:32]}"


def _hash(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()
