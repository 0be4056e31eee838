"""Pinned answers on a request's path: found in memory, then streamed, logged and counted like any answer.

An answer is served only where the request could have got it: whole, within its token limit, and as the tokens that
say it. Otherwise the model answers, as if nothing were pinned.
"""

from collections.abc import AsyncGenerator
from dataclasses import replace

import msgspec

from engine.messages import Finished, Tokens
from engine.text.tokenizer import Tokenizer
from services.gateway.engine_link import Opened, Reply
from services.gateway.instant import Board
from services.gateway.planning import Pinned, Plan
from services.store.instant_config import read_pins
from services.store.pin_key import key_of, seeded

# A client reads an answer as a stream of pieces; this many tokens come in one.
PIECE_TOKENS = 8


def applied(plan: Plan, board: Board | None, tokenizer: Tokenizer) -> Plan:
    """The plan, with the answer that is pinned to its request if there is one."""
    found = _find(plan, board, tokenizer) if board is not None else None
    if found is None:
        return plan
    (only,) = plan.choices
    parameters = {**only.admitted.parameters, "pin": str(found.id)}
    admitted = msgspec.structs.replace(
        only.admitted, origin="pinned", adapter_digest=None, parameters=parameters, arm="active"
    )  # fmt: skip
    return replace(plan, pin=found, choices=(replace(only, admitted=admitted, speculator=None),))


def _find(plan: Plan, board: Board, tokenizer: Tokenizer) -> Pinned | None:
    """`slug@digest` asks for certain weights, so nothing else may answer."""
    config = read_pins(plan.target.project.config)
    if not config.enabled or plan.target.pinned or len(plan.choices) != 1 or plan.ask.n != 1:
        return None
    (only,) = plan.choices
    parameters = only.admitted.parameters
    if seeded(parameters) and not config.seeded:
        return None
    key = key_of(only.admitted.endpoint, only.admitted.messages, parameters)
    pin = board.pins.get(key) if key is not None else None
    tokens = _tokens(tokenizer, pin.answer) if pin is not None else None
    if pin is None or tokens is None:
        return None
    said = (*tokens, *tokenizer.eos_ids[:1])
    limits = only.sampling
    return Pinned(pin.id, said) if limits.min_tokens <= len(tokens) and len(said) <= limits.max_tokens else None


def _tokens(tokenizer: Tokenizer, answer: str) -> tuple[int, ...] | None:
    """The answer as tokens, if the tokenizer can say it to the letter."""
    tokens = tokenizer.encode_plain(answer)
    return tuple(tokens) if tokenizer.decode(tokens) == answer else None


def opened(plan: Plan) -> Opened:
    """The answer in the form of the engine's replies, so that everything behind it is what it always is."""
    assert plan.pin is not None, "only a plan with a pinned answer"
    replies = _replies(plan.pin, plan.choices[0].id.hex)
    first, *rest = replies
    return Opened(None, first, _yielded(rest))


def _replies(pin: Pinned, request_id: str) -> list[Reply]:
    pieces: list[Reply] = [
        Tokens(epoch=0, id=request_id, token_ids=list(pin.token_ids[start : start + PIECE_TOKENS]), logprobs=[])
        for start in range(0, len(pin.token_ids), PIECE_TOKENS)
    ]
    return [*pieces, Finished(epoch=0, id=request_id, reason="stop")]


async def _yielded(replies: list[Reply]) -> AsyncGenerator[Reply]:
    for reply in replies:
        yield reply
