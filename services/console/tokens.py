"""Output tokens with their probabilities, for the tint that shows where the model hesitated."""

from dataclasses import dataclass, field
from threading import Lock

import structlog
from fastapi import Request

from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store.models import InteractionBody

log = structlog.get_logger()
Pieces = list[tuple[str, float]]


@dataclass
class TokenReader:
    """Reads tokens of the model this home serves; loads its tokenizer once, when first asked."""

    settings: Settings
    _tokenizer: Tokenizer | None = None
    _failed: bool = False
    _lock: Lock = field(default_factory=Lock)

    def pieces(self, body: InteractionBody) -> Pieces | None:
        """(text, natural log probability) a token, or None when another tokenizer made them."""
        tokenizer = self.tokenizer()
        if tokenizer is None or tokenizer.digest != body.tokenizer_hash or not body.token_ids:
            return None
        if len(body.token_ids) != len(body.token_logprobs):
            return None
        ends, reader = frozenset(tokenizer.eos_ids), Detokenizer(tokenizer.backend)
        made: Pieces = []
        for token_id, logprob in zip(body.token_ids, body.token_logprobs, strict=True):
            made.append((reader.push(token_id) if token_id not in ends else "", float(logprob)))
        made.append((reader.flush(), 0.0))
        shown = [piece for piece in made if piece[0]]
        return shown if "".join(text for text, _ in shown).startswith(body.output) else None

    def tokenizer(self) -> Tokenizer | None:
        """The served model's; None when this machine has it not."""
        with self._lock:
            if self._tokenizer is None and not self._failed:
                try:
                    self._tokenizer = Tokenizer.load(self.settings.model_path)
                except ValueError as error:  # pages work without the tint
                    log.warning("tokenizer_missing", error=str(error))
                    self._failed = True
            return self._tokenizer


def token_pieces(request: Request, body: InteractionBody) -> Pieces | None:
    """The pieces for one interaction."""
    reader: TokenReader = request.app.state.token_reader
    return reader.pieces(body)
