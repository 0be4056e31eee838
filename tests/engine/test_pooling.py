"""Vectors instead of tokens: encoders and pooled decoder states, equal to transformers, alone and in batches."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.client import PoolFailed
from engine.config import EngineConfig
from engine.encoding import EncoderEngine
from engine.layers.score import ScoreHead
from engine.messages import Done, Finished, Generate, LoadAdapter, Pool, Pooled, Sampling
from engine.models.encoder import Prompt
from engine.models.encoder_spec import read_encoder_spec
from engine.models.spec import UnsupportedModel
from engine.runner.pooling import Pooler
from engine.start import make_engine
from engine.sync_client import SyncEngineClient
from tests.engine.serving import served

SMALL = {
    "vocab_size": 120, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 66, "initializer_range": 0.3, "pad_token_id": 1, "num_labels": 3,
}  # fmt: skip
DISTIL = {
    "vocab_size": 120, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": 1, "num_labels": 3,
}  # fmt: skip
MODERN = SMALL | {"cls_token_id": 2, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "local_attention": 8}
SHAPES = {"Bert": SMALL, "Roberta": SMALL, "XLMRoberta": SMALL, "DistilBert": DISTIL, "ModernBert": MODERN}
PROMPTS = [[5, 6, 7], list(range(10, 60)), [9], [4, 8, 15, 16, 23, 42] * 3]
EncoderMaker = Callable[..., Path]


@pytest.fixture(scope="module")
def make_encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderMaker:
    """Writes a random encoder of a family, once: `Model`, or `ForSequenceClassification`."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, kind: str = "Model") -> Path:
        if (family, kind) not in made:
            torch.manual_seed(len(made))
            config = getattr(transformers, f"{family}Config")(**SHAPES[family])
            model = getattr(transformers, family + kind)(config)
            made[family, kind] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family, kind])
        return made[family, kind]

    return make


def engine_on(directory: Path, **options: object) -> EncoderEngine:
    config = EngineConfig(
        model=directory, artifacts=directory, **{"precision": "fp32", "device": "cpu", "threads": 1} | options
    )
    engine = make_engine(config)
    assert isinstance(engine, EncoderEngine)
    return engine


def ask(engine: EncoderEngine, prompts: list[list[int]], how: str = "mean", **fields: object) -> list[torch.Tensor]:
    """Every prompt's vector, asked for at once."""
    for index, prompt in enumerate(prompts):
        engine.submit_pool(b"c", Pool(id=str(index), prompt=prompt, how=how, **fields))
    while engine.step():
        continue
    answers = {message.id: message for _, message in engine.outbox}
    engine.outbox = []
    assert all(isinstance(answer, Pooled) for answer in answers.values()), answers
    return [torch.from_numpy(np.frombuffer(answers[str(index)].vector, "<f4").copy()) for index in range(len(prompts))]


@torch.inference_mode()
def expected_states(directory: Path, family: str, prompt: list[int]) -> torch.Tensor:
    model = getattr(transformers, f"{family}Model").from_pretrained(directory, dtype=torch.float32).eval()
    return model(input_ids=torch.tensor([prompt])).last_hidden_state[0]


@torch.inference_mode()
def expected_scores(directory: Path, family: str, prompt: list[int], **inputs: torch.Tensor) -> torch.Tensor:
    kind = getattr(transformers, f"{family}ForSequenceClassification")
    return kind.from_pretrained(directory, dtype=torch.float32).eval()(torch.tensor([prompt]), **inputs).logits[0]


@pytest.mark.parametrize("family", SHAPES)
def test_embeddings_equal_transformers_in_a_padded_batch(family: str, make_encoder: EncoderMaker) -> None:
    directory = make_encoder(family)
    engine = engine_on(directory)
    picks = {"mean": lambda x: x.mean(dim=0), "first": lambda x: x[0], "last": lambda x: x[-1]}
    for how, pick in picks.items():
        vectors = ask(engine, PROMPTS, how)
        for prompt, vector in zip(PROMPTS, vectors, strict=True):
            assert (vector - pick(expected_states(directory, family, prompt))).abs().max() < 1e-4


@pytest.mark.parametrize("family", SHAPES)
def test_classification_scores_equal_transformers(family: str, make_encoder: EncoderMaker) -> None:
    directory = make_encoder(family, "ForSequenceClassification")
    scores = ask(engine_on(directory), PROMPTS, "classify")
    for prompt, score in zip(PROMPTS, scores, strict=True):
        assert (score - expected_scores(directory, family, prompt)).abs().max() < 1e-4


def test_the_second_segment_of_a_pair_has_its_own_token_type(make_encoder: EncoderMaker) -> None:
    directory = make_encoder("Bert", "ForSequenceClassification")
    engine, prompt = engine_on(directory), list(range(20, 32))
    types = torch.tensor([[0] * 5 + [1] * 7])
    paired = ask(engine, [prompt], "classify", pair_start=5)[0]
    assert (paired - expected_scores(directory, "Bert", prompt, token_type_ids=types)).abs().max() < 1e-4
    assert (paired - ask(engine, [prompt], "classify")[0]).abs().max() > 1e-3


def test_a_classifier_also_embeds(make_encoder: EncoderMaker) -> None:
    directory = make_encoder("Roberta", "ForSequenceClassification")
    vector = ask(engine_on(directory), [PROMPTS[1]], "mean")[0]
    assert (vector - expected_states(directory, "Roberta", PROMPTS[1]).mean(dim=0)).abs().max() < 1e-4


def test_steps_stay_within_their_tokens_and_take_like_lengths_together(
    make_encoder: EncoderMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(make_encoder("Bert"), step_tokens=64)
    batches: list[list[int]] = []
    compute = engine._compute
    monkeypatch.setattr(
        engine, "_compute", lambda asked: batches.append([len(one.prompt) for one in asked]) or compute(asked)
    )
    ask(engine, [[7] * length for length in (3, 60, 4, 58, 3, 12, 4)])
    assert batches == [[3, 3, 4, 4, 12], [60], [58]]


def test_bf16_is_close(make_encoder: EncoderMaker) -> None:
    directory = make_encoder("Bert")
    vector = ask(engine_on(directory, precision="bf16"), [PROMPTS[1]], "mean")[0]
    exact = expected_states(directory, "Bert", PROMPTS[1]).mean(dim=0)
    assert torch.nn.functional.cosine_similarity(vector, exact, dim=0) > 0.999
    assert (vector - exact).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": []}, "invalid_request"),
        ({"prompt": [5] * 65}, "prompt_too_long"),
        ({"prompt": [120]}, "invalid_request"),
        ({"prompt": [-1]}, "invalid_request"),
        ({"prompt": [5], "pair_start": 2}, "invalid_request"),
        ({"prompt": [5], "how": "classify"}, "unsupported"),
        ({"prompt": [5], "adapter": "a" * 64}, "unsupported"),
        ({"prompt": [5], "deadline_seconds": float("nan")}, "invalid_request"),
        ({"prompt": [5], "deadline_seconds": -1.0}, "invalid_request"),
    ],
)
def test_what_cannot_be_pooled_is_refused_with_its_code(
    fields: dict[str, object], code: str, make_encoder: EncoderMaker
) -> None:
    engine = engine_on(make_encoder("Roberta"))
    engine.submit_pool(b"c", Pool(id="a", **fields))
    [(client, ending)] = engine.outbox
    assert isinstance(ending, Finished)
    assert (client, ending.id, ending.reason, ending.code) == (b"c", "a", "error", code)
    assert ending.error
    assert not engine.busy


def test_an_encoder_refuses_to_generate_and_to_load_adapters(make_encoder: EncoderMaker) -> None:
    engine = engine_on(make_encoder("Bert"))
    engine.submit(b"c", Generate(id="g", prompt=[5], sampling=Sampling(seed=0, max_tokens=1)))
    engine.load_adapter(b"c", LoadAdapter(id="l", digest="d", path="p"))
    (_, ending), (_, done) = engine.outbox
    assert isinstance(ending, Finished)
    assert isinstance(done, Done)
    assert ending.code == "unsupported"
    assert "decoder models only" in done.error


def test_priority_cancels_and_deadlines_are_heeded(make_encoder: EncoderMaker) -> None:
    engine = engine_on(make_encoder("Bert"), max_running=1)
    engine.submit_pool(b"c", Pool(id="late", prompt=[5], deadline_seconds=1e-9))
    engine.submit_pool(b"c", Pool(id="batch", prompt=[5], priority="batch"))
    engine.submit_pool(b"c", Pool(id="unwanted", prompt=[5]))
    engine.submit_pool(b"gone", Pool(id="gone", prompt=[5]))
    engine.submit_pool(b"c", Pool(id="now", prompt=[5]))
    engine.cancel(b"c", "unwanted")
    engine.cancel_client(b"gone")
    while engine.step():
        continue
    endings = [(message.id, getattr(message, "reason", "pooled"), getattr(message, "code", ""))
               for _, message in engine.outbox]  # fmt: skip
    assert endings == [
        ("unwanted", "cancelled", ""), ("late", "error", "deadline"), ("now", "pooled", ""), ("batch", "pooled", ""),
    ]  # fmt: skip


def ask_for(engine: EncoderEngine, share: str, count: int) -> None:
    for index in range(count):
        engine.submit_pool(b"c", Pool(id=f"{share} {index}", prompt=[5, 6, 7], share=share))


def test_shares_get_like_parts_of_every_batch_and_turns_at_beginning_one(make_encoder: EncoderMaker) -> None:
    for most, ended in ((1, ["busy 0", "new 0", "busy 1", "new 1"]), (4, ["busy 0", "busy 1", "new 0", "new 1"])):
        engine = engine_on(make_encoder("Bert"), max_running=most)
        ask_for(engine, "busy", 20)
        ask_for(engine, "new", 2)
        for _ in range(4 // most):
            engine.step()
        assert sorted(message.id for _, message in engine.outbox) == sorted(ended)
        engine.step()
        assert {message.id[:4] for _, message in engine.outbox[4:]} == {"busy"}


def test_one_share_cannot_fill_an_encoders_queue_and_is_told_when_to_return(make_encoder: EncoderMaker) -> None:
    engine = engine_on(make_encoder("Bert"), max_waiting=8)
    ask_for(engine, "greedy", 7)
    ask_for(engine, "other", 2)
    (_, refused) = engine.outbox[0]
    assert [message.id for _, message in engine.outbox] == ["greedy 6"]
    assert isinstance(refused, Finished)
    assert refused.code == "overloaded"
    while engine.step():
        continue
    engine.outbox = []
    ask_for(engine, "greedy", 7)
    (_, refused) = engine.outbox[0]
    assert isinstance(refused, Finished)
    assert 1 <= refused.retry_after_seconds <= 60


def test_a_step_that_fails_answers_its_requests_and_the_engine_goes_on(
    make_encoder: EncoderMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(make_encoder("Bert"))
    with monkeypatch.context() as broken:
        broken.setattr(engine.encoder, "hidden", lambda _: 1 / 0)
        engine.submit_pool(b"c", Pool(id="a", prompt=[5]))
        engine.step()
    [(_, ending)] = engine.outbox
    assert isinstance(ending, Finished)
    assert ending.code == "internal"
    engine.outbox = []
    assert len(ask(engine, [[5]])) == 1


def test_states_that_are_not_finite_are_an_error_of_their_request_alone(
    make_encoder: EncoderMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on(make_encoder("Bert"))
    exact = engine.encoder.hidden

    def poisoned(prompts: list[Prompt]) -> list[torch.Tensor]:
        return [states * float("nan") if len(states) == 2 else states for states in exact(prompts)]

    monkeypatch.setattr(engine.encoder, "hidden", poisoned)
    for index in range(3):
        engine.submit_pool(b"c", Pool(id=str(index), prompt=[5] * (index + 1)))
    engine.step()
    codes = {message.id: getattr(message, "code", "pooled") for _, message in engine.outbox}
    assert codes == {"0": "pooled", "1": "internal", "2": "pooled"}


def test_weights_that_are_missing_or_pickled_are_refused(make_encoder: EncoderMaker, tmp_path: Path) -> None:
    source = make_encoder("Bert")
    config = (source / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    weights = load_file(source / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="safetensors"):
        engine_on(tmp_path)
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"encoder\.layer\.1\.output\.dense\.weight is missing"):
        engine_on(tmp_path)


def test_a_decoder_is_not_taken_for_an_encoder(model_dir: Path) -> None:
    assert read_encoder_spec(model_dir) is None


def test_an_encoder_process_pools_and_refuses_over_the_wire(make_encoder: EncoderMaker, tmp_path: Path) -> None:
    directory = make_encoder("DistilBert", "ForSequenceClassification")
    with served(directory, tmp_path) as server, SyncEngineClient(server.address) as client:
        answers = client.pool_many([Pool(id=str(i), prompt=[i + 2] * (i + 1), how="classify") for i in range(20)])
        for index in (0, 7, 19):
            exact = expected_scores(directory, "DistilBert", [index + 2] * (index + 1))
            assert np.abs(np.frombuffer(answers[index].vector, "<f4") - exact.numpy()).max() < 1e-4
            assert answers[index].prompt_tokens == index + 1
        with pytest.raises(PoolFailed, match="the prompt is empty") as failed:
            client.pool(Pool(id="e", prompt=[]))
        assert failed.value.finished.code == "invalid_request"
        done = client.generate(Generate(id="g", prompt=[5], sampling=Sampling(seed=0, max_tokens=1)))
        assert done.finished.code == "unsupported"
        client.forget("anything")
        assert client.status().slots_total == 0


STATES = torch.linspace(-2, 3, 40).reshape(10, 4)


@pytest.mark.parametrize("sizes", [[10], [1] * 10, [3, 6, 1]])
@pytest.mark.parametrize(("how", "exact"), [("last", STATES[-1]), ("first", STATES[0]), ("mean", STATES.mean(dim=0))])
def test_chunks_pool_to_the_same_vector(how: str, exact: torch.Tensor, sizes: list[int]) -> None:
    pooler = Pooler(10, how)
    for chunk in STATES.split(sizes):
        assert not pooler.complete
        pooler.add(chunk)
    assert torch.allclose(torch.from_numpy(np.frombuffer(pooler.finish(), "<f4").copy()), exact, atol=1e-6)


@pytest.mark.parametrize(("how", "kept"), [("last", STATES[-1]), ("first", STATES[0])])
def test_a_pooled_state_outlives_the_steps_buffer(how: str, kept: torch.Tensor) -> None:
    pooler, buffer = Pooler(10, how), STATES.clone()
    pooler.add(buffer)
    buffer.zero_()
    assert torch.equal(pooler.vector(), kept)


def test_a_preempted_prompt_begins_anew_and_a_cached_beginning_only_suits_the_last_state() -> None:
    mean = Pooler(10, "mean")
    mean.add(STATES[:6], start=0)
    mean.add(STATES[:10], start=0)
    assert torch.allclose(mean.vector(), STATES.mean(dim=0))
    last = Pooler(10, "last")
    last.add(STATES[8:], start=8)
    assert torch.equal(last.vector(), STATES[-1])
    with pytest.raises(ValueError, match="needs every token"):
        Pooler(10, "mean").add(STATES[8:], start=8)


def test_a_slot_without_its_own_head_uses_the_bases() -> None:
    base, own = torch.eye(2, 4), torch.full((2, 4), 2.0)
    head = ScoreHead(base)
    head.add_slots(2)
    head.fill(1, own)
    head.fill(2, None)
    pooled = {}
    for slot in range(3):
        pooler = Pooler(10, "classify", head, slot)
        pooler.add(STATES)
        pooled[slot] = pooler.vector()
    assert torch.allclose(pooled[0], STATES[-1, :2])
    assert torch.equal(pooled[2], pooled[0])
    assert torch.allclose(pooled[1], own @ STATES[-1])
    head.fill(1, None)
    assert torch.equal(head(STATES[-1], 1), pooled[0])
