"""Vectors over HTTP: /v1/embeddings, /v1/classify and /v1/rerank.

They are no interactions: nothing of them is logged, they are counted in the metrics.
"""

import asyncio
import base64
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.messages import Pool, Pooling, Status
from engine.text.pooling import VectorRules, vector_rules
from services.app import needs
from services.errors import DeadlineExceeded, InvalidRequest, WhetError
from services.gateway import access
from services.gateway.access import Target
from services.gateway.pooling import Batch, Prompt, Vectors, normalised, pool_all
from services.gateway.service import Gateway
from services.gateway.snapshot import KnownKey
from services.gateway.streaming import CLIENT_GONE_STATUS, ClientGone, unless_gone
from services.gateway.vector_bodies import (
    ClassifyBody,
    EmbeddingBody,
    RerankBody,
    Text,
    VectorBody,
    documents_of,
    parse_classify,
    parse_embedding,
    parse_rerank,
    texts_of,
)
from services.store.base import uuid7

# No tokenizer in use packs more characters into a token than this: longer texts are refused without tokenizing.
MOST_CHARACTERS_A_TOKEN = 64
NOTHING: Mapping[str, object] = MappingProxyType({})
NO_HEAD = (
    "classification needs a base model with a sequence-classification head (…ForSequenceClassification); "
    "this engine's base has none"
)
Body = TypeVar("Body", bound=VectorBody)


@dataclass(frozen=True)
class Asked:
    """One request on its way: who asks whom for what, and since when (time.perf_counter)."""

    gateway: Gateway
    key: KnownKey
    target: Target
    engine: Status
    body: VectorBody
    started: float

    @property
    def rules(self) -> VectorRules:
        """What the base model's files say about vectors."""
        return vector_rules(self.gateway.tokenizer.directory)

    @property
    def pooling(self) -> Pooling:
        """How to pool. Raises InvalidRequest when the model wants a pooling that the engine does not do."""
        try:
            return self.rules.how(self.engine.encoder)
        except ValueError as error:
            raise InvalidRequest(str(error), code="unsupported_model") from error

    async def pool(self, prompts: Sequence[Prompt], how: Pooling) -> Batch:
        """Vectors of the prompts, counted in the metrics. Raises WhetError, DeadlineExceeded for all at once."""
        project, parts, body = self.target.project, self.gateway.live, self.body
        shared = Pool(
            id=uuid7().hex,
            prompt=[],
            how=how,
            namespace=project.id.hex,
            cache_salt=project.id.hex,
            priority=body.priority or "interactive",
            share=self.key.id.hex,
            deadline_seconds=body.timeout or 0.0,
        )
        try:
            async with asyncio.timeout(body.timeout):
                batch = await pool_all(parts.link, prompts, shared, self.target.candidates)
        except TimeoutError as error:
            parts.metrics.finished.labels(project.slug, "error").inc()
            raise DeadlineExceeded(f"the vectors were not ready within {body.timeout:g} s") from error
        except WhetError:
            parts.metrics.finished.labels(project.slug, "error").inc()
            raise
        except asyncio.CancelledError:
            parts.metrics.finished.labels(project.slug, "cancelled").inc()
            raise
        parts.metrics.finished.labels(project.slug, "pooled").inc()
        parts.metrics.prompt_tokens.labels(project.slug).inc(batch.tokens)
        parts.metrics.latency.labels(project.slug).observe(time.perf_counter() - self.started)
        return batch

    async def encode(self, texts: Sequence[Text]) -> list[Prompt]:
        """Token ids, all within the context. Raises InvalidRequest."""
        self._fit(len(text) for text in texts)
        tokenizer = self.gateway.tokenizer

        def one(text: Text) -> Prompt:
            return Prompt(text if isinstance(text, list) else tokenizer.encode(text, add_special_tokens=True))

        return self._checked(await run_in_threadpool(lambda: [one(text) for text in texts]))

    async def encode_pairs(self, query: str, documents: Sequence[str]) -> list[Prompt]:
        """Query and document in one prompt each, as the model's tokenizer joins pairs. Raises InvalidRequest."""
        self._fit(len(query) + len(document) for document in documents)
        backend = self.gateway.tokenizer.backend

        def pair(document: str) -> Prompt:
            encoded = backend.encode(query, document)
            return Prompt(encoded.ids, encoded.type_ids.index(1) if 1 in encoded.type_ids else 0)

        return self._checked(await run_in_threadpool(lambda: [pair(document) for document in documents]))

    def _fit(self, characters: Iterable[int]) -> None:
        longest = max(characters)
        if longest > self.engine.max_context * MOST_CHARACTERS_A_TOKEN:
            raise self._too_long(f"more than {longest // MOST_CHARACTERS_A_TOKEN}")

    def _checked(self, prompts: list[Prompt]) -> list[Prompt]:
        for prompt in prompts:
            if len(prompt.ids) > self.engine.max_context:
                raise self._too_long(str(len(prompt.ids)))
        return prompts

    def _too_long(self, length: str) -> InvalidRequest:
        return InvalidRequest(
            f"a text has {length} tokens; the context holds {self.engine.max_context}", code="context_length_exceeded"
        )


@needs("infer")
async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: one vector of length 1 for each text."""
    return await _serve(request, parse_embedding, _embed)


@needs("infer")
async def classify(request: Request) -> Response:
    """POST /v1/classify: for each text the probability of every label."""
    return await _serve(request, parse_classify, _classify)


@needs("infer")
async def rerank(request: Request) -> Response:
    """POST /v1/rerank: documents by relevance to the query, the best first."""
    return await _serve(request, parse_rerank, _rerank)


async def _serve(
    request: Request, parse: Callable[[bytes], Body], work: Callable[[Asked, Body], Coroutine[Any, Any, Response]]
) -> Response:
    """The answer; the work is cancelled when the client disconnects."""
    started = time.perf_counter()
    key = _caller(request)
    body = parse(await request.body())
    asked = await _ask(request, key, body, started)
    try:
        return await unless_gone(request.receive, work(asked, body))
    except ClientGone:
        return Response(status_code=CLIENT_GONE_STATUS)


async def _embed(asked: Asked, body: EmbeddingBody) -> Response:
    texts = texts_of(body.input, asked.gateway.tokenizer.vocab_size)
    batch = await asked.pool(await asked.encode(texts), asked.pooling)
    size = batch.vectors.shape[1]
    if body.dimensions is not None and body.dimensions > size:
        raise InvalidRequest(f"dimensions must be at most {size}, the model's own", param="dimensions")
    rows = _written(normalised(batch.vectors, body.dimensions), body.encoding_format == "base64")
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    return _answer(asked, batch, {"object": "list", "data": data})


async def _classify(asked: Asked, body: ClassifyBody) -> Response:
    labels = asked.engine.labels
    if not labels:
        raise InvalidRequest(NO_HEAD, code="unsupported_model", param="model")
    texts = texts_of(body.input, asked.gateway.tokenizer.vocab_size)
    batch = await asked.pool(await asked.encode(texts), "classify")
    activation, probabilities = activated(batch.vectors, asked.rules.problem_type)
    data = [
        {"index": index, "label": labels[int(row.argmax())], "probs": row.tolist(), "num_classes": len(labels)}
        for index, row in enumerate(probabilities)
    ]
    said = {"labels": labels, "activation": activation}
    return _answer(asked, batch, {"id": f"classify-{uuid7().hex}", "object": "list", "data": data}, said)


async def _rerank(asked: Asked, body: RerankBody) -> Response:
    documents = documents_of(body)
    labels = asked.engine.labels
    if len(labels) > 1:
        sentence = f"reranking needs a head with one score, the base has {len(labels)}; or a base without a head"
        raise InvalidRequest(sentence, code="unsupported_model", param="model")
    if labels:
        method = "cross-encoder"
        batch = await asked.pool(await asked.encode_pairs(body.query, documents), "classify")
        relevance = _sigmoid(batch.vectors[:, 0])
    else:
        method = "embedding-cosine"
        prompts = await asked.encode([body.query, *documents])
        batch = await asked.pool(prompts, asked.pooling)
        vectors = normalised(batch.vectors)
        relevance = vectors[1:] @ vectors[0]
    answer = {"id": f"rerank-{uuid7().hex}", "results": _ranked(relevance, documents, body)}
    return _answer(asked, batch, answer, {"method": method})


def activated(scores: Vectors, problem_type: str | None) -> tuple[str, Vectors]:
    """Raw scores [texts, labels] as the head was trained to be read, and what was done to them."""
    if problem_type == "regression":
        return "none", scores
    if problem_type == "multi_label_classification" or scores.shape[1] == 1:
        return "sigmoid", _sigmoid(scores)
    exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
    return "softmax", exponents / exponents.sum(axis=1, keepdims=True)


def _sigmoid(scores: Vectors) -> Vectors:
    # Through tanh nothing overflows, however large a score is.
    half: Vectors = np.tanh(scores / 2)
    return (half + 1) / 2


def _ranked(relevance: Vectors, documents: Sequence[str], body: RerankBody) -> list[dict[str, object]]:
    """Best first, equals in the order given."""
    results: list[dict[str, object]] = []
    for index in np.argsort(-relevance, kind="stable")[: body.top_n].tolist():
        result: dict[str, object] = {"index": index, "relevance_score": float(relevance[index])}
        if body.return_documents is not False:
            result["document"] = {"text": documents[index]}
        results.append(result)
    return results


def _written(vectors: Vectors, as_base64: bool) -> list[object]:
    if not as_base64:
        return list(vectors.tolist())
    return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]


def _caller(request: Request) -> KnownKey:
    gateway: Gateway = request.app.state.gateway
    return access.authenticate(request, gateway.keeper.current, gateway.pepper, "infer")


async def _ask(request: Request, key: KnownKey, body: VectorBody, started: float) -> Asked:
    """Resolve the model. Raises NotFound, or Unavailable while the engine is away."""
    gateway: Gateway = request.app.state.gateway
    target = access.resolve(gateway.keeper.current, key, body.model)
    return Asked(gateway, key, target, await gateway.live.link.describe(), body, started)


def _answer(asked: Asked, batch: Batch, answer: Mapping[str, object], said: Mapping[str, object] = NOTHING) -> Response:
    """With what every answer has: the model, the tokens read, whose weights served."""
    whole = {
        **answer,
        "created": int(time.time()),
        "model": asked.body.model,
        "usage": {"prompt_tokens": batch.tokens, "total_tokens": batch.tokens},
        "whet": {"adapter": batch.adapter, **said},
    }
    return Response(msgspec.json.encode(whole), media_type="application/json")


ROUTES = [
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/v1/classify", classify, methods=["POST"]),
    Route("/v1/rerank", rerank, methods=["POST"]),
]
