"""Bodies of /v1/embeddings, /v1/classify and /v1/rerank, checked; unknown fields are refused as everywhere."""

from typing import Any, Literal, TypeVar

import msgspec

from engine.messages import Priority
from services.errors import InvalidRequest
from services.gateway.bodies import LONGEST_TIMEOUT, SHORTEST_TIMEOUT, Label, decode
from services.gateway.sampling import within

# OpenAI's limit.
MOST_INPUTS = 2048
Text = str | list[int]
Body = TypeVar("Body", bound="VectorBody")


class VectorBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all three take. `timeout` (seconds) and `priority` are as for completions."""

    model: str
    timeout: float | None = None
    priority: Priority | None = None
    user: Label | None = None


class EmbeddingBody(VectorBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class ClassifyBody(VectorBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    input: str | list[Any]


class RerankBody(VectorBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    query: str
    documents: list[str | dict[str, Any]]
    top_n: int | None = None
    return_documents: bool | None = None


_embedding: msgspec.json.Decoder[EmbeddingBody] = msgspec.json.Decoder(EmbeddingBody)
_classify: msgspec.json.Decoder[ClassifyBody] = msgspec.json.Decoder(ClassifyBody)
_rerank: msgspec.json.Decoder[RerankBody] = msgspec.json.Decoder(RerankBody)


def parse_embedding(raw: bytes) -> EmbeddingBody:
    """Raises InvalidRequest."""
    body = _common(decode(_embedding, raw))
    within("dimensions", body.dimensions, 1, None)
    return body


def parse_classify(raw: bytes) -> ClassifyBody:
    """Raises InvalidRequest."""
    return _common(decode(_classify, raw))


def parse_rerank(raw: bytes) -> RerankBody:
    """Raises InvalidRequest."""
    body = _common(decode(_rerank, raw))
    within("top_n", body.top_n, 1, None)
    if not body.query:
        raise InvalidRequest("query must not be empty", param="query")
    if not 0 < len(body.documents) <= MOST_INPUTS:
        raise InvalidRequest(f"documents takes 1 to {MOST_INPUTS} texts", param="documents")
    return body


def documents_of(body: RerankBody) -> list[str]:
    """The documents' texts; each is a string or an object with one under `text`. Raises InvalidRequest."""
    texts = [document if isinstance(document, str) else document.get("text") for document in body.documents]
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise InvalidRequest(f"documents[{index}] must be a text that is not empty", param=f"documents[{index}]")
    return [str(text) for text in texts]


def texts_of(given: str | list[Any], vocabulary: int) -> list[Text]:
    """One text or many, as strings or token ids below `vocabulary`. Raises InvalidRequest."""
    texts: list[Any] = [given] if isinstance(given, str) or _is_tokens(given) else given
    if not 0 < len(texts) <= MOST_INPUTS:
        raise InvalidRequest(f"input takes 1 to {MOST_INPUTS} texts", param="input")
    for index, text in enumerate(texts):
        _check_text(text, "input" if text is given else f"input[{index}]", vocabulary)
    return texts


def _check_text(text: object, where: str, vocabulary: int) -> None:
    if not isinstance(text, str) and not _is_tokens(text):
        raise InvalidRequest(f"{where} must be a text or a list of token ids", param=where)
    if not text:
        raise InvalidRequest(f"{where} must not be empty", param=where)
    if isinstance(text, list) and not 0 <= min(text) <= max(text) < vocabulary:
        raise InvalidRequest(f"{where}: token ids must be from 0 to {vocabulary - 1}", param=where)


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _common(body: Body) -> Body:
    within("timeout", body.timeout, SHORTEST_TIMEOUT, LONGEST_TIMEOUT)
    return body
