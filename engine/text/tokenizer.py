"""Tokenizer and chat template of a model directory, without transformers (which would drag torch into the gateway)."""

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from engine.text.template import ChatTemplate, Message, Tools


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for letters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Safe to share between threads; loading takes about 20 ms."""

    directory: Path
    backend: tokenizers.Tokenizer
    literal: tokenizers.Tokenizer
    eos_ids: tuple[int, ...]
    digest: str
    template: ChatTemplate | None

    @classmethod
    def load(cls, directory: Path | str) -> Self:
        """Read tokenizer.json and what stands beside it. Raises ValueError when the directory holds no tokenizer."""
        root = Path(directory)
        try:
            raw = (root / "tokenizer.json").read_bytes()
        except OSError as error:
            raise ValueError(f"{root} holds no readable tokenizer.json") from error
        text = raw.decode()
        backend = tokenizers.Tokenizer.from_str(text)
        literal = tokenizers.Tokenizer.from_str(text)
        literal.encode_special_tokens = True
        for one in (backend, literal):
            # Files of embedding models ask for both; lengths are checked, and batches padded, where they are known.
            one.no_truncation()
            one.no_padding()
        options = _json(root / "tokenizer_config.json")
        made = cls(
            directory=root,
            backend=backend,
            literal=literal,
            eos_ids=_eos_ids(root, options, backend),
            digest=hashlib.sha256(raw).hexdigest(),
            template=ChatTemplate.load(root, options),
        )
        # Reading the vocabulary takes long enough to hold up every stream, were it left to the first request.
        for name in ("special_ids", "byte_level", "_control_tokens"):
            getattr(made, name)
        return made

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def template_digest(self) -> str:
        """SHA-256 of the chat template; empty when the model has none."""
        return self.template.digest if self.template else ""

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that decode to nothing."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def control_ids(self, *names: str) -> dict[int, str]:
        """Those of the names that are control tokens here, which decoding leaves out, by id."""
        found = {self.backend.token_to_id(name): name for name in names}
        return {token_id: name for token_id, name in found.items() if token_id in self.special_ids}

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a plain text. Special tokens spelled out in `text` become control tokens: see encode_chat."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of hostile text: special tokens spelled out in it are encoded letter by letter."""
        return self.literal.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a complete list of ids; for a stream use TextStream."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def render(self, messages: list[Message], *, add_generation_prompt: bool = True, tools: Tools | None = None) -> str:
        """The chat as the model's template writes it. Raises ValueError when there is no template or it refuses."""
        return self._template().render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def encode_chat(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Tools | None = None,
        at: datetime | None = None,
    ) -> list[int]:
        """Token ids of a chat, equal to transformers' `apply_chat_template`, except that control tokens spelled out
        inside a message or a tool stay plain text: nobody forges a turn by typing one. `at` is when it was asked."""
        pieces = self._template().render_pieces(messages, self._control_tokens, add_generation_prompt, tools, at)
        ids: list[int] = []
        for piece in pieces:
            ids += self.encode_plain(piece.text) if piece.literal else self.encode(piece.text)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, which need not be whole characters; control tokens as they are spelled."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            return bytes(map(BYTE_OF.__getitem__, token)) if BYTE_OF.keys() >= set(token) else token.encode()
        if token_id in self.backend.get_added_tokens_decoder():
            return token.encode()
        byte = BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()

    @cached_property
    def byte_level(self) -> bool:
        """Whether a text is nothing but the bytes of its tokens, whatever stands beside them."""
        decoder = json.loads(self.backend.to_str())["decoder"]
        return bool(decoder) and decoder["type"] == "ByteLevel"

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        added = self.backend.get_added_tokens_decoder().values()
        return tuple(sorted((token.content for token in added if token.special), key=len, reverse=True))

    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise ValueError(f"{self.directory.name} has no chat template: use plain completions")
        return self.template


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")  # noqa: TRY004 - the file is bad, not a type in our code
    return content


def _eos_ids(root: Path, options: dict[str, Any], backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Every id that ends a turn: generation_config names them best, then config, then the tokenizer's own."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _json(root / name).get("eos_token_id")
        found += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    token = options.get("eos_token")
    token_id = backend.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
    found += [token_id] if token_id is not None else []
    return tuple(dict.fromkeys(found))
