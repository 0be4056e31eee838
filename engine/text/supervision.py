"""A chat and its answer as the tokens a model is trained on: what it is shown, and what it is asked to say.

The trainer makes its rows with this and the console draws its mask with it, so the picture is the training.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from engine.messages import Grammar, logged_grammar
from engine.text.detokenizer import Detokenizer
from engine.text.stream import TextStream
from engine.text.tokenizer import Tokenizer
from engine.text.tools import CLOSE, FORCED_PREFIX, OPEN, style_of


@dataclass(frozen=True)
class Supervised:
    """The prompt as the engine is given it, the answer, the end token, nothing after it. The last two are learned."""

    prompt: list[int]
    answer: list[int]
    end: int


class Asked(NamedTuple):
    """What a request said beside its messages: the tools it offered, whether one had to be called and by which grammar,
    and when it came: some templates print the day."""

    tools: tuple[dict[str, Any], ...] = ()
    forced: bool = False
    grammar: Grammar | None = None
    at: datetime | None = None


NOTHING = Asked()


def asked_in(kept: Mapping[str, Any] | None, at: datetime | None = None) -> Asked:
    """From what an example keeps of its request, and when that came."""
    said = kept or {}
    return Asked(tuple(said.get("tools") or ()), bool(said.get("forced")), logged_grammar(said), at)


class MaskPiece(NamedTuple):
    """A token as text, and whether the model learns to say it. A character cut in two belongs to its last token."""

    text: str
    learned: bool


def turn_end(tokenizer: Tokenizer) -> int:
    """The token with which the template ends an answer. Raises ValueError unless the engine stops at it.

    Supervising anything else would teach the model to go on where the engine has stopped listening, or never to stop.
    """
    asked: list[dict[str, Any]] = [{"role": "user", "content": "a"}]
    prompt = tokenizer.encode_chat(asked)
    whole = tokenizer.encode_chat([*asked, {"role": "assistant", "content": "b"}], add_generation_prompt=False)
    said = [*prompt, *tokenizer.encode_plain("b")]
    if whole[: len(said)] != said:
        raise ValueError("the chat template writes a finished answer differently from the prompt that asks for it")
    after = whole[len(said) : len(said) + 1]
    if not after or after[0] not in tokenizer.eos_ids:
        raise ValueError(f"the chat template ends an answer with token {after}, at which the engine does not stop")
    return after[0]


def supervise(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], answer: str, end: int, asked: Asked = NOTHING
) -> Supervised:
    """`end` is `turn_end`'s. Raises ValueError when the template refuses the chat."""
    return Supervised(prompt_ids(tokenizer, messages, asked), answer_ids(tokenizer, answer, asked), end)


def prompt_ids(tokenizer: Tokenizer, messages: list[dict[str, Any]], asked: Asked = NOTHING) -> list[int]:
    """The prompt as the gateway gives it to the engine. Raises ValueError when the template refuses the chat."""
    ids = tokenizer.encode_chat(messages, tools=asked.tools or None, at=asked.at)
    if asked.forced:
        ids += tokenizer.encode(FORCED_PREFIX[style_of(tokenizer.template.source if tokenizer.template else "")])
    return ids


def answer_ids(tokenizer: Tokenizer, answer: str, asked: Asked = NOTHING) -> list[int]:
    """An answer's tokens. Where tools may be called, the tags of a call are the control tokens the model has for them;
    any other control token that somebody typed stays text."""
    tags = {name: token for token, name in _tags(tokenizer, asked).items()}
    if not tags:
        return tokenizer.encode_plain(answer)
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, tags))})", answer):
        ids += [tags[piece]] if piece in tags else tokenizer.encode_plain(piece) if piece else []
    return ids


def said_text(tokenizer: Tokenizer, token_ids: list[int], asked: Asked = NOTHING) -> str:
    """A whole answer as the log would hold it: where tools may be called, the tags of a call show."""
    tags = _tags(tokenizer, asked)
    if not tags:
        return tokenizer.decode(token_ids)
    stream = TextStream(tokenizer, spell=tags)
    return stream.push(token_ids) + stream.flush()


def _tags(tokenizer: Tokenizer, asked: Asked) -> dict[int, str]:
    return tokenizer.control_ids(OPEN, CLOSE) if asked.tools else {}


def mask_pieces(tokenizer: Tokenizer, row: Supervised) -> list[MaskPiece]:
    """Every token of the row in order, control tokens as they are spelled."""
    return [
        *(MaskPiece(text, False) for text in _texts(tokenizer, row.prompt)),
        *(MaskPiece(text, True) for text in _texts(tokenizer, [*row.answer, row.end])),
    ]


def _texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    reader, made = Detokenizer(tokenizer.backend), list[str]()
    for token_id in ids:
        if token_id in tokenizer.special_ids:
            made += [reader.flush(), tokenizer.token_bytes(token_id).decode(errors="replace")]
            reader = Detokenizer(tokenizer.backend)
        else:
            made.append(reader.push(token_id))
    return [text for text in [*made, reader.flush()] if text]
