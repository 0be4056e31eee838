"""From a checked request to what the engine is asked and what the log will hold."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from engine.messages import Generate, Grammar, Sampling, Status
from engine.text.tokenizer import Tokenizer
from engine.text.tools import FORCED_PREFIX, argument_key, style_of
from services.errors import InvalidRequest
from services.gateway.access import Target
from services.gateway.bodies import CHAT, Ask
from services.gateway.chat import uses_tools
from services.gateway.sampling import SEED_RANGE, check_tokens
from services.gateway.spool_format import Admitted
from services.store.base import uuid7
from services.store.speculation import arm_of

DEFAULT_MAX_TOKENS = 256
# No tokenizer in use packs more characters into a token than this: longer prompts are refused without tokenizing.
MOST_CHARACTERS_A_TOKEN = 64
LONG_PROMPT_CHARACTERS = 20_000
NO_ID = UUID(int=0)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One choice: the `number`th answer to its prompt. `text` is the prompt as `echo` shows it.

    `speculator`, `speculate` and `learn` are the engine's `Generate`'s; `speculate` False is logged as well.
    """

    number: int
    prompt: list[int]
    text: str
    sampling: Sampling
    admitted: Admitted
    speculator: str | None
    speculate: bool
    learn: bool

    @property
    def id(self) -> UUID:
        return self.admitted.id


class Pinned(NamedTuple):
    """An approved answer that serves in the model's place: the pin, and the tokens that say it, its end included."""

    id: UUID
    token_ids: tuple[int, ...]


class Worked(NamedTuple):
    """A correction that is placed in the prompt: its example, the user's turn, the answer."""

    id: UUID
    shown: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything decided before the first token: one choice, with one Generate and one log record, for each answer."""

    ask: Ask
    target: Target
    choices: tuple[Planned, ...]
    grammar: Grammar | None
    share: str
    started: float
    pin: Pinned | None = None
    worked: tuple[Worked, ...] = ()

    @property
    def ids(self) -> tuple[UUID, ...]:
        """The interactions, one for each choice."""
        return tuple(choice.id for choice in self.choices)

    def message(self, index: int) -> Generate:
        """What the engine is asked for one choice; the adapter is filled in by whoever knows it is loaded."""
        planned, ask = self.choices[index], self.ask
        return Generate(
            id=planned.id.hex,
            prompt=planned.prompt,
            sampling=planned.sampling,
            namespace=planned.admitted.namespace,
            cache_salt=planned.admitted.namespace,
            priority=ask.priority,
            choice=planned.number,
            grammar=self.grammar,
            share=self.share,
            deadline_seconds=ask.timeout or 0.0,
            prompt_logprobs=ask.echo and ask.logprobs,
            speculator=planned.speculator,
            speculate=planned.speculate,
            learn=planned.learn,
        )


class Prompt(NamedTuple):
    """Token ids, and the text they stand for."""

    ids: list[int]
    text: str


async def make_plan(
    ask: Ask,
    target: Target,
    key_id: UUID,
    tokenizer: Tokenizer,
    engine: Status,
    started: float,
    worked: tuple[Worked, ...] = (),
) -> Plan:
    """Tokenize and fix every effective parameter. `started` is the request's arrival (time.perf_counter). `worked`
    examples stand in the prompt and are logged by their ids; the logged messages stay the app's.

    Raises InvalidRequest for a prompt that the template refuses or that leaves no room in the context.
    """
    check_tokens(ask.sampling, tokenizer.vocab_size)
    characters = max(_characters(ask))
    if characters > engine.max_context * MOST_CHARACTERS_A_TOKEN:
        raise _too_long(ask, f"more than {characters // MOST_CHARACTERS_A_TOKEN}", engine.max_context)
    if sum(_characters(ask)) > LONG_PROMPT_CHARACTERS:
        prompts = await asyncio.to_thread(_encode, ask, tokenizer, worked)
    else:
        prompts = _encode(ask, tokenizer, worked)
    seed = secrets.randbelow(SEED_RANGE) if ask.seed is None else ask.seed % SEED_RANGE
    grammar = _grammar(ask, tokenizer)
    choices: list[Planned] = []
    for prompt in prompts:
        sampling = _sampling(ask, target, prompt.ids, tokenizer, engine.max_context, seed)
        admitted = _admitted(ask, target, key_id, tokenizer, engine, prompt, sampling, grammar)
        if worked:
            admitted = msgspec.structs.replace(admitted, worked_examples=[str(one.id) for one in worked])
        choices += [_planned(number, prompt, sampling, admitted, target) for number in range(ask.n)]
    return Plan(
        ask=ask, target=target, choices=tuple(choices), grammar=grammar, share=key_id.hex, started=started,
        worked=worked,
    )  # fmt: skip


def _planned(number: int, prompt: Prompt, sampling: Sampling, admitted: Admitted, target: Target) -> Planned:
    parameters = {**admitted.parameters, "choice": number}
    mine = msgspec.structs.replace(admitted, id=uuid7(), parameters=parameters)
    project = target.project
    # What the live traffic says next is not learned from answers of weights that do not serve it.
    arm = arm_of(mine.id, project.speculation, project.heads)
    return Planned(
        number=number, prompt=prompt.ids, text=prompt.text, sampling=sampling, admitted=mine,
        # Heads read the states of the adapter that is live, so a candidate drafts without.
        speculator=None if target.pinned or target.arm == "canary" else project.heads.of(arm),
        speculate=arm != "baseline",
        learn=not target.pinned,
    )  # fmt: skip


def _characters(ask: Ask) -> list[int]:
    """How long each prompt is, roughly: tools and calls count as they are logged."""
    if ask.endpoint != CHAT:
        return [len(prompt) for prompt in ask.prompts]
    spoken = sum(len(message["content"]) for message in ask.messages)
    called = [message["tool_calls"] for message in ask.messages if "tool_calls" in message]
    return [spoken + (len(msgspec.json.encode((ask.tools.shown, called))) if ask.tools.shown or called else 0)]


def _encode(ask: Ask, tokenizer: Tokenizer, worked: Sequence[Worked]) -> list[Prompt]:
    prompts = (
        [_chat(ask, tokenizer, worked)] if ask.endpoint == CHAT else [_plain(one, tokenizer) for one in ask.prompts]
    )
    if not all(prompt.ids for prompt in prompts):
        raise InvalidRequest("the prompt is empty", param="prompt")
    return prompts


def _plain(prompt: str | list[int], tokenizer: Tokenizer) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(tokenizer.encode(prompt, add_special_tokens=True), prompt)
    if not 0 <= min(prompt) <= max(prompt) < tokenizer.vocab_size:
        raise InvalidRequest(f"token ids must be from 0 to {tokenizer.vocab_size - 1}", param="prompt")
    return Prompt(prompt, tokenizer.decode(prompt, skip_special_tokens=False))


def _chat(ask: Ask, tokenizer: Tokenizer, worked: Sequence[Worked]) -> Prompt:
    ids = encode_chat(placed(ask.messages, worked), ask.tools.shown, tokenizer)
    if ask.tools.forced is not None:
        ids += tokenizer.encode(FORCED_PREFIX[style_of(_template(tokenizer))])
    return Prompt(ids, "")


def placed(messages: list[dict[str, Any]], worked: Sequence[Worked]) -> list[dict[str, Any]]:
    """The chat with each example as two turns of its own, a user's and the answer, behind the system's first turns."""
    start = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns = [
        {"role": role, "content": content}
        for one in worked
        for role, content in (("user", one.shown), ("assistant", one.completion))
    ]
    return [*messages[:start], *turns, *messages[start:]]


def encode_chat(
    messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]], tokenizer: Tokenizer, *, answer: bool = True
) -> list[int]:
    """Token ids of a chat in the model's template; `answer` opens the assistant's turn. Raises InvalidRequest."""
    knows_tools = tokenizer.template is not None and tokenizer.template.knows_tools
    if (tools or uses_tools(messages)) and not knows_tools:
        raise InvalidRequest("this model's chat template knows no tools", param="tools", code="unsupported_parameter")
    try:
        return tokenizer.encode_chat(messages, add_generation_prompt=answer, tools=tools or None)
    except ValueError as error:
        raise InvalidRequest(str(error), param="messages") from error


def _template(tokenizer: Tokenizer) -> str:
    return tokenizer.template.source if tokenizer.template else ""


def _grammar(ask: Ask, tokenizer: Tokenizer) -> Grammar | None:
    if ask.tools.forced is None:
        return ask.grammar
    return ask.tools.forced.grammar(argument_key(_template(tokenizer)))


def _sampling(ask: Ask, target: Target, prompt: list[int], tokenizer: Tokenizer, context: int, seed: int) -> Sampling:
    room = context - len(prompt)
    wanted = ask.max_tokens
    if room < 1 or (wanted is not None and wanted > room):
        raise _too_long(ask, str(len(prompt)), context)
    default = min(int(target.project.config.get("max_tokens_default", DEFAULT_MAX_TOKENS)), room)
    # The engine always makes a token; where none was asked for, it is dropped.
    limit = default if wanted is None else max(1, wanted)
    if ask.sampling.min_tokens > limit:
        raise InvalidRequest(f"min_tokens must be at most max_tokens ({limit})", param="min_tokens")
    ends = () if ask.ignore_eos else tokenizer.eos_ids
    return msgspec.structs.replace(
        ask.sampling, seed=seed, max_tokens=limit, stop_token_ids=(*ends, *ask.sampling.stop_token_ids)
    )


def _too_long(ask: Ask, length: str, context: int) -> InvalidRequest:
    and_wanted = "" if not ask.max_tokens else f" and asks for {str(ask.max_tokens)[:80]} more"
    return InvalidRequest(
        f"the prompt has {length} tokens{and_wanted}; the context holds {context}",
        code="context_length_exceeded",
        param="messages" if ask.endpoint == CHAT else "prompt",
    )


def _admitted(
    ask: Ask, target: Target, key_id: UUID, tokenizer: Tokenizer, engine: Status,
    prompt: Prompt, sampling: Sampling, grammar: Grammar | None,
) -> Admitted:  # fmt: skip
    """The log's first record of a prompt's choices; each gets an id of its own."""
    project, extra = target.project, ask.extra
    messages = ask.messages or [{"role": "prompt", "content": prompt.text}]
    parameters = msgspec.to_builtins(sampling) | {
        "stop": list(ask.stop), "n": ask.n, "model": ask.model, "max_tokens_given": ask.max_tokens,
        "seed_given": ask.seed is not None, "ignore_eos": ask.ignore_eos, "priority": ask.priority,
        "logprobs": ask.logprobs, "echo": ask.echo, "timeout": ask.timeout,
    }  # fmt: skip
    if grammar is not None:
        parameters["grammar"] = msgspec.to_builtins(grammar)
    if ask.tools.shown:
        parameters["tools"] = list(ask.tools.shown)
    parameters |= ask.tools.said
    return Admitted(
        id=NO_ID,
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
        prompt_token_ids=prompt.ids,
        prompt_hash=_hash(prompt.ids),
        template_hash=tokenizer.template_digest,
        tokenizer_hash=tokenizer.digest,
        retrieved=extra.retrieved,
        arm=target.arm,
    )


def _group_of(messages: Sequence[dict[str, Any]]) -> str:
    """Equal prompts belong together when the app says nothing else: they must not straddle the held-out split."""
    return f"prompt:{_hash(messages)[:32]}"


def _hash(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()
