"""Embeddings, classification and reranking: the official client and plain HTTP, on a decoder and on an encoder."""

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from engine.text.pooling import vector_rules
from engine.text.tokenizer import Tokenizer
from services.gateway.pooling import normalised
from services.gateway.vectors import activated
from services.platform.postgres import PostgresServer
from tests.gateway.parts import World, eventually, make_world
from tests.gateway.tiny_model import write_tokenizer

TEXTS = ["one", "two words", "something a good deal longer than the others", "z"]


def write_encoder(directory: Path) -> None:
    """A random BERT with one score beside a tokenizer that marks the ends and segments of its texts."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    vocabulary = write_tokenizer(directory)
    file = directory / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    marks = [("<|bos|>", 1), ("<|end|>", 2)]
    tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|end|>", pair="<|bos|> $A <|end|> $B:1 <|end|>:1", special_tokens=marks
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(file))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128, initializer_range=0.3, id2label={0: "relevant"}, label2id={"relevant": 0},
    )  # fmt: skip
    (directory / "model.safetensors").unlink(missing_ok=True)
    BertForSequenceClassification(config).save_pretrained(directory)


@pytest.fixture(scope="module")
def encoder_world(postgres: PostgresServer) -> Iterator[World]:
    """A gateway whose base is an encoder with a head of one score."""
    with make_world(postgres, real_engine=True) as made:
        write_encoder(made.settings.model_path)
        made.start_engine()
        made.start_gateway()
        yield made


def embed(world: World, given: object, **fields: object) -> np.ndarray[Any, np.dtype[np.float64]]:
    response = world.post("/v1/embeddings", {"model": "entities", "input": given, **fields})
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return np.array([one["embedding"] for one in data])


def error(response: httpx.Response) -> dict[str, Any]:
    return response.json()["error"]


@pytest.mark.parametrize("base", ["real_world", "encoder_world"])
def test_the_official_client_gets_unit_vectors(base: str, request: pytest.FixtureRequest) -> None:
    world: World = request.getfixturevalue(base)
    # The client asks for base64 unless told otherwise.
    answer = world.openai().embeddings.create(model="entities", input=TEXTS)
    vectors = np.array([one.embedding for one in answer.data])
    assert vectors.shape == (4, 32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
    floats = world.openai().embeddings.create(model="entities", input=TEXTS, encoding_format="float")
    assert np.allclose(np.array([one.embedding for one in floats.data]), vectors, atol=1e-7)
    marks = 2 if base == "encoder_world" else 0
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(text) + marks for text in TEXTS)


@pytest.mark.parametrize("base", ["real_world", "encoder_world"])
def test_a_batch_gives_what_each_text_gives_alone(base: str, request: pytest.FixtureRequest) -> None:
    world: World = request.getfixturevalue(base)
    texts = [f"{'abc' * (index % 17)} number {index}" for index in range(64)]
    together = embed(world, texts)
    alone = np.concatenate([embed(world, text) for text in texts])
    assert np.abs(together - alone).max() < 1e-4


def test_token_ids_and_text_mean_the_same(real_world: World) -> None:
    ids = Tokenizer.load(real_world.settings.model_path).encode("hello")
    text = embed(real_world, "hello")
    assert np.array_equal(embed(real_world, ids), text)
    assert np.array_equal(embed(real_world, [ids, ids])[1:], text)


def test_an_encoder_embeds_by_the_mean_of_its_states(encoder_world: World) -> None:
    import torch
    from transformers import BertModel

    directory = encoder_world.settings.model_path
    ids = [1, *Tokenizer.load(directory).encode("hello there"), 2]
    with torch.inference_mode():
        mean = BertModel.from_pretrained(directory)(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
    expected = torch.nn.functional.normalize(mean, dim=0).numpy()
    assert np.abs(embed(encoder_world, "hello there")[0] - expected).max() < 1e-4


def test_fewer_dimensions_are_cut_and_normalised_again(world: World) -> None:
    whole, cut = embed(world, "hello hello")[0], embed(world, "hello hello", dimensions=3)[0]
    assert cut.shape == (3,)
    assert np.allclose(cut, whole[:3] / np.linalg.norm(whole[:3]), atol=1e-6)


def test_base64_is_little_endian_fp32(world: World) -> None:
    body = {"model": "entities", "input": "hello", "encoding_format": "base64"}
    packed = world.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(packed), "<f4"), embed(world, "hello")[0], atol=1e-7)


def test_classification_names_the_label_and_its_probability(encoder_world: World) -> None:
    body = {"model": "entities", "input": TEXTS}
    answer = encoder_world.post("/v1/classify", body).json()
    expected = cross_scores(encoder_world, [(text, None) for text in TEXTS])
    for index, one in enumerate(answer["data"]):
        assert (one["index"], one["label"], one["num_classes"]) == (index, "relevant", 1)
        assert abs(one["probs"][0] - expected[index]) < 1e-4
    assert answer["whet"] == {"adapter": None, "labels": ["relevant"], "activation": "sigmoid"}


def test_reranking_by_a_cross_encoder_joins_query_and_document(encoder_world: World) -> None:
    body = {"model": "entities", "query": "which one", "documents": [*TEXTS[:3], {"text": TEXTS[3]}], "top_n": 3}
    answer = encoder_world.post("/v1/rerank", body).json()
    expected = cross_scores(encoder_world, [("which one", text) for text in TEXTS])
    best = sorted(range(4), key=lambda index: -expected[index])[:3]
    assert [one["index"] for one in answer["results"]] == best
    for one in answer["results"]:
        assert abs(one["relevance_score"] - expected[one["index"]]) < 1e-4
        assert one["document"] == {"text": TEXTS[one["index"]]}
    assert answer["whet"]["method"] == "cross-encoder"


def cross_scores(world: World, texts: list[tuple[str, str | None]]) -> list[float]:
    """What transformers gives, with token types of the second segment."""
    import torch
    from transformers import BertForSequenceClassification

    tokenizer = Tokenizer.load(world.settings.model_path)
    model = BertForSequenceClassification.from_pretrained(world.settings.model_path).eval()
    scores = []
    for first, second in texts:
        ids = [1, *tokenizer.encode(first), 2]
        types = [0] * len(ids)
        if second is not None:
            tail = [*tokenizer.encode(second), 2]
            ids, types = ids + tail, types + [1] * len(tail)
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits
        scores.append(float(torch.sigmoid(logits)[0, 0]))
    return scores


def test_reranking_without_a_head_is_the_cosine_of_embeddings(real_world: World) -> None:
    body = {"model": "entities", "query": "one", "documents": TEXTS, "return_documents": False}
    answer = real_world.post("/v1/rerank", body).json()
    vectors = embed(real_world, TEXTS)
    cosines = vectors @ embed(real_world, "one")[0]
    assert [one["index"] for one in answer["results"]] == list(np.argsort(-cosines, kind="stable"))
    assert answer["results"][0]["index"] == 0
    assert answer["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-5)
    assert answer["results"][0].keys() == {"index", "relevance_score"}
    assert answer["whet"]["method"] == "embedding-cosine"


def test_classification_without_a_head_says_what_it_needs(real_world: World) -> None:
    response = real_world.post("/v1/classify", {"model": "entities", "input": "hi"})
    assert response.status_code == 400
    assert "sequence-classification head" in error(response)["message"]
    assert error(response)["code"] == "unsupported_model"


def test_an_encoder_refuses_chat_as_a_bad_request(encoder_world: World) -> None:
    with pytest.raises(openai.BadRequestError, match="encoder"):
        encoder_world.openai().completions.create(model="entities", prompt="hello", max_tokens=2)


@pytest.mark.parametrize("base", ["real_world", "encoder_world"])
@pytest.mark.parametrize("text", ["a" * 1100, "a" * 100_000, ["fine", "b" * 1100]])
def test_a_text_beyond_the_context_is_refused(base: str, text: object, request: pytest.FixtureRequest) -> None:
    world: World = request.getfixturevalue(base)
    response = world.post("/v1/embeddings", {"model": "entities", "input": text})
    assert response.status_code == 400
    assert error(response)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input[1]"),
        ("/v1/embeddings", {"input": [[1], []]}, "input[1]"),
        ("/v1/embeddings", {"input": [[1, 999_999]]}, "input[0]"),
        ("/v1/embeddings", {"input": [-1]}, "input"),
        ("/v1/embeddings", {"input": ["a", 1]}, "input[1]"),
        ("/v1/embeddings", {"input": [True]}, "input[0]"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "dimensions": 9}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "timeout": 0}, "timeout"),
        ("/v1/classify", {"input": []}, "input"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b", ""]}, "documents[1]"),
        ("/v1/rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents[0]"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
    ],
)
def test_what_cannot_be_answered_is_a_bad_request(
    world: World, path: str, fields: dict[str, object], param: str
) -> None:
    response = world.post(path, {"model": "entities", **fields})
    assert response.status_code == 400, response.text
    assert error(response)["param"] == param
    assert error(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/classify", "/v1/rerank"])
def test_a_key_without_the_scope_or_of_another_project_is_turned_away(world: World, path: str) -> None:
    body = {"model": "entities", "query": "a", "documents": ["b"]} if path == "/v1/rerank" else {
        "model": "entities", "input": "a"
    }  # fmt: skip
    assert world.post(path, body, key="app").status_code == 200
    assert world.post(path, body, key="feedback").status_code == 403
    assert world.post(path, body, key="other").status_code == 404
    assert httpx.post(world.url + path, json=body, timeout=30).status_code == 401


def test_a_projects_adapter_is_loaded_and_named_and_a_broken_one_falls_back(world: World) -> None:
    good, broken = world.add_adapter("entities", "e" * 64), world.add_adapter("entities", "f" * 64, works=False)

    def served() -> str | None:
        response = world.post("/v1/embeddings", {"model": "entities", "input": ["a", "b"]})
        assert response.status_code == 200, response.text
        return response.json()["whet"]["adapter"]

    try:
        world.deploy("entities", good)
        assert served() == good
        world.deploy("entities", broken, last_good=good)
        assert served() == good
    finally:
        world.deploy("entities", None)
    assert served() is None


def running(world: World) -> float:
    lines = world.get("/metrics", key="admin").text.splitlines()
    return float(next(line for line in lines if line.startswith("vllm:num_requests_running ")).split()[1])


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/embeddings", {"input": ["\x05"] * 3}),
        ("/v1/classify", {"input": ["\x05"] * 3}),
        ("/v1/rerank", {"query": "\x05", "documents": ["a", "b", "c"]}),
    ],
)
def test_vectors_nobody_waits_for_any_more_are_cancelled(world: World, path: str, fields: dict[str, object]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            world.url + path, json={"model": "entities", **fields}, headers=world.headers(),
            timeout=httpx.Timeout(10, read=0.5),
        )  # fmt: skip
    eventually(lambda: running(world) == 0, seconds=3)


def test_a_deadline_holds_for_all_texts_together_and_leaves_nothing_running(world: World) -> None:
    body = {"model": "entities", "input": ["fine", "\x05", "\x05"], "timeout": 1.0}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(world.post, "/v1/embeddings", body)
        eventually(lambda: running(world) == 2, seconds=3)
        response = answer.result(timeout=5)
    assert (response.status_code, error(response)["code"]) == (504, "deadline")
    eventually(lambda: running(world) == 0, seconds=3)


def test_vectors_are_counted_and_not_logged(world: World) -> None:
    def counted() -> dict[str, float]:
        lines = world.get("/metrics", key="admin").text.splitlines()
        return {
            name: float(line.rpartition(" ")[2]) for line in lines
            for name in ('vllm:prompt_tokens_total{model_name="entities"}',
                         'vllm:request_success_total{finished_reason="pooled",model_name="entities"}')
            if line.startswith(name)
        }  # fmt: skip

    embed(world, "hello")
    spool = sum(file.stat().st_size for file in world.settings.spool.rglob("*") if file.is_file())
    before = counted()
    embed(world, ["hello", "you"])
    after = counted()
    assert [after[name] - before[name] for name in after] == [8, 1]
    assert sum(file.stat().st_size for file in world.settings.spool.rglob("*") if file.is_file()) == spool


@pytest.mark.parametrize(
    ("problem", "scores", "name", "expected"),
    [
        (None, [[0.0, np.log(3)]], "softmax", [[0.25, 0.75]]),
        ("single_label_classification", [[1e4, 0.0]], "softmax", [[1.0, 0.0]]),
        ("multi_label_classification", [[0.0, np.log(3)]], "sigmoid", [[0.5, 0.75]]),
        (None, [[np.log(3)], [-1e4], [1e4]], "sigmoid", [[0.75], [0.0], [1.0]]),
        ("regression", [[-3.5]], "none", [[-3.5]]),
    ],
)
def test_scores_are_read_as_the_head_was_trained(
    problem: str | None, scores: list[list[float]], name: str, expected: list[list[float]]
) -> None:
    activation, values = activated(np.array(scores, dtype=np.float32), problem)
    assert activation == name
    assert np.allclose(values, expected, atol=1e-6)


def test_a_vector_of_zeros_stays_one() -> None:
    assert np.array_equal(normalised(np.zeros((1, 4), dtype=np.float32)), np.zeros((1, 4)))


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "first"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "first"),
        (None, "last"),
    ],
)
def test_the_models_own_pooling_is_taken(pooling: dict[str, object] | None, expected: str, tmp_path: Path) -> None:
    if pooling is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    assert vector_rules(tmp_path).how(encoder=False) == expected
    assert vector_rules(tmp_path).how(encoder=True) == (expected if pooling else "mean")


def test_pooling_and_modules_we_do_not_run_are_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    (first / "1_Pooling").mkdir(parents=True)
    (first / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    second.mkdir()
    (second / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(ValueError, match="pooling_mode_max_tokens"):
        vector_rules(first).how(encoder=True)
    with pytest.raises(ValueError, match="Dense"):
        vector_rules(second).how(encoder=True)
