"""What an answer is made of on its way from tokens to the client."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.text.stream import TextStream
from engine.text.tokenizer import Tokenizer
from engine.text.tools import CLOSE, OPEN, CallDelta, ToolCallParser, style_of
from services.gateway.planning import Plan, Planned


class Scored(NamedTuple):
    """Tokens and, for each, its log-probability (None for a prompt's first) and the likeliest tokens in its place."""

    token_ids: list[int]
    logprobs: list[float | None]
    top: list[list[tuple[int, float]]]


NOTHING = Scored([], [], [])


class Piece(NamedTuple):
    """What may be shown now: text, stretches of tool calls and, where log-probabilities are wanted, the tokens since
    the piece before."""

    text: str
    scored: Scored = NOTHING
    calls: Sequence[CallDelta] = ()


@dataclass
class Call:
    """A tool call the model made. `arguments` is JSON as the model wrote it."""

    name: str
    arguments: str = ""


def text_stream(plan: Plan, planned: Planned, tokenizer: Tokenizer) -> TextStream:
    """Tokens to text as the request wants it. Where tools may be called, the tags of calls show."""
    sampling = planned.sampling
    return TextStream(
        tokenizer,
        plan.ask.stop,
        ends=sampling.stop_token_ids,
        min_tokens=sampling.min_tokens,
        spell=tokenizer.control_ids(OPEN, CLOSE) if plan.ask.tools.shown else {},
    )


def call_parser(plan: Plan, tokenizer: Tokenizer) -> ToolCallParser | None:
    """What finds the calls in an answer; None when none may be made."""
    tools = plan.ask.tools
    if not tools.shown or tokenizer.template is None:
        return None
    style, forced = style_of(tokenizer.template.source), tools.forced is not None
    return ToolCallParser(style, tools.names, begun=forced and style == "hermes", most=tools.most)
