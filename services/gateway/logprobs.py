"""Log-probabilities as OpenAI's two endpoints write them."""

import codecs
from typing import Any

from engine.text.tokenizer import Tokenizer
from services.gateway.generation import Choice
from services.gateway.pieces import Scored

# JSON knows no infinity; OpenAI writes this for a token that could not be drawn.
LOWEST = -9999.0


def chat_logprobs(scored: Scored, tokenizer: Tokenizer) -> dict[str, Any]:
    """`choices[].logprobs` of a chat; `bytes` are the token's own, whole characters or not."""
    content = [
        _entry(token_id, value, tokenizer)
        | {"top_logprobs": [_entry(other, logprob, tokenizer) for other, logprob in likeliest]}
        for token_id, value, likeliest in zip(*scored, strict=True)
    ]
    return {"content": content, "refusal": None}


def _entry(token_id: int, logprob: float | None, tokenizer: Tokenizer) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(token_id)
    return {
        "token": spelled.decode(errors="replace"),
        "logprob": None if logprob is None else max(logprob, LOWEST),
        "bytes": list(spelled),
    }


class TextLogprobs:
    """`choices[].logprobs` of a plain completion, whole or in pieces: offsets count on from piece to piece."""

    def __init__(self, choice: Choice, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._with_top = choice.plan.ask.sampling.top_logprobs > 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        if choice.plan.ask.echo:
            # Control tokens that the tokenizer put before the prompt's text lie before its beginning.
            spelled = b"".join(map(tokenizer.token_bytes, choice.planned.prompt)).decode(errors="replace")
            self._offset = len(choice.planned.text) - len(spelled)

    def write(self, scored: Scored) -> dict[str, Any]:
        """The object for the next tokens."""
        offsets: list[int] = []
        for token_id in scored.token_ids:
            offsets.append(max(0, self._offset))
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return {
            "tokens": [self._text(token_id) for token_id in scored.token_ids],
            "token_logprobs": [None if value is None else max(value, LOWEST) for value in scored.logprobs],
            "top_logprobs": self._top(scored) if self._with_top else None,
            "text_offset": offsets,
        }

    def _top(self, scored: Scored) -> list[dict[str, float] | None]:
        """The likeliest tokens and the chosen one; nothing for a prompt's first token, which nothing precedes."""
        listed: list[dict[str, float] | None] = []
        for token_id, value, likeliest in zip(*scored, strict=True):
            if value is None:
                listed.append(None)
                continue
            texts = {self._text(token_id): max(value, LOWEST)}
            for other, logprob in likeliest:
                texts.setdefault(self._text(other), max(logprob, LOWEST))
            listed.append(texts)
        return listed

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")
