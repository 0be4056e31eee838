"""Heads: refused by name, filled and emptied between steps, native equal to torch, drawn with the sampler's noise."""

import hashlib
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from engine.adapters.files import AdapterRefused
from engine.config import EngineConfig, Precision
from engine.digest import base_digest
from engine.layers.sampler import Draw, sample
from engine.messages import LoadCode, Sampling
from engine.models.registry import read_spec
from engine.native.drafting import NativeDrafter
from engine.runner.build import build_forward
from engine.runner.forward import Forward
from engine.speculation.heads import Ask, Guess, TorchDrafter
from engine.speculation.loading import HEADS, Limits, SpeculatorReader
from engine.speculation.manager import Speculators, vocabulary_digest
from engine.speculation.slots import SlotTensors
from tests.engine.conftest import SHAPE
from tests.engine.speculators import (
    Tensors,
    manifest_of,
    random_heads,
    random_speculator,
    write_speculator,
)

HIDDEN, TOKENS = SHAPE["hidden_size"], SHAPE["vocab_size"]
LIMITS = Limits(hidden=HIDDEN, tokens=TOKENS, heads=4, vocabulary=128)
GREEDY = Sampling(temperature=0.0, seed=0, max_tokens=1)
SAMPLED = [
    Sampling(temperature=0.7, seed=11, max_tokens=1),
    Sampling(temperature=1.3, seed=-5, max_tokens=1, top_p=0.8),
    Sampling(temperature=1.0, seed=2**63, max_tokens=1, top_k=5),
    Sampling(temperature=0.9, seed=4, max_tokens=1, min_p=0.1, top_k=40, top_p=0.9),
    GREEDY,
]

MakeSpeculators = Callable[..., Speculators]


@pytest.fixture
def make_speculators(model_dir: Path, artifacts: Path) -> Iterator[MakeSpeculators]:
    """Slots on the shared model, on the native path or on torch's; closed after the test."""
    made: list[tuple[Speculators, Forward]] = []

    def make(*, native: bool = True, precision: Precision = "fp32", slots: int = 2, threads: int = 1) -> Speculators:
        config = EngineConfig(
            model=model_dir, artifacts=artifacts, precision=precision, device="cpu", threads=threads, native=native,
            speculator_slots=slots, speculator_heads=LIMITS.heads, speculator_vocabulary=LIMITS.vocabulary,
        )  # fmt: skip
        forward = build_forward(config, read_spec(model_dir), blocks=8, positions=64)
        made.append((Speculators(forward, config, base_digest(model_dir), lambda: None), forward))
        return made[-1][0]

    yield make
    for speculators, forward in made:
        speculators.close()
        forward.close()


class Answers(list[tuple[str, bool, str]]):
    """What was answered: error, whether it may be tried again, the digest that serves."""

    def __call__(self, error: str, transient: bool = False, serving: str = "", code: LoadCode = "") -> None:
        assert (code == "too_large") == ("do not fit a slot" in error)
        self.append((error, transient, serving))


def load(speculators: Speculators, digest: str, *, replaces: str = "", path: str = "") -> tuple[str, bool, str]:
    """Load and settle; what was answered."""
    answers = Answers()
    speculators.load(digest, path or digest, replaces, answers)
    deadline = time.monotonic() + 30
    while not answers and time.monotonic() < deadline:
        speculators.settle()
        time.sleep(0.001)
    return answers[0]


def unload(speculators: Speculators, digest: str) -> str:
    answers = Answers()
    speculators.unload(digest, answers)
    return answers[0][0]


def asks_of(slots: list[int], samplings: list[Sampling], most: int = 4) -> list[Ask]:
    return [
        Ask(slot, (3 + 7 * index) % TOKENS, Draw(samplings[index % len(samplings)], index % 3, 20 + index), most)
        for index, slot in enumerate(slots)
    ]


def states(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed))


# --- artefacts ------------------------------------------------------------------------------------------------------


def broken(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = value

    return change


def put(name: str, make: Callable[[Tensors], torch.Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = make(tensors)

    return change


def drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


TENSOR_MISTAKES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "NaN": (broken("weight", float("nan")), "weight holds NaN or infinity"),
    "infinity": (broken("head", float("inf")), "head holds NaN or infinity"),
    "huge": (broken("head", 1e21), "head holds numbers beyond"),
    "NaN confidence": (broken("confidence", float("nan")), "confidence holds NaN"),
    "foreign token": (broken("tokens", TOKENS), f"vocabulary of {TOKENS}"),
    "negative token": (put("tokens", lambda t: t["tokens"] - 1), "outside this model's vocabulary"),
    "disorder": (put("tokens", lambda t: t["tokens"].flip(0)), "ascending order"),
    "twice": (put("tokens", lambda t: t["tokens"].clamp_min(1)), "ascending order"),
    "long tokens": (put("tokens", lambda t: t["tokens"].long()), "tokens has dtype I64, not I32"),
    "half": (put("head", lambda t: t["head"].half()), "head has dtype F16, not BF16 or F32"),
    "narrow head": (put("head", lambda t: t["head"][:, 1:].contiguous()), "head has shape"),
    "wrong condition": (put("condition", lambda t: t["condition"][:2].contiguous()), "condition has shape"),
    "extra": (put("lora", lambda t: t["bias"][:1].clone()), "'lora', which has no place"),
    "missing": (drop("confidence_bias"), "holds no confidence_bias"),
}


@pytest.fixture
def reader(model_dir: Path, artifacts: Path) -> SpeculatorReader:
    return SpeculatorReader(artifacts, base_digest(model_dir), vocabulary_digest(model_dir), LIMITS, torch.float32)


@pytest.mark.parametrize("mistake", TENSOR_MISTAKES)
def test_a_tensor_that_does_not_fit_is_refused_by_name(
    mistake: str, reader: SpeculatorReader, model_dir: Path, artifacts: Path
) -> None:
    change, reason = TENSOR_MISTAKES[mistake]
    tensors = random_heads(HIDDEN, list(range(100)))
    manifest = manifest_of(model_dir, tensors)
    change(tensors)
    digest = write_speculator(artifacts, manifest, tensors)
    with pytest.raises(AdapterRefused, match=reason):
        reader.read(digest, digest)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base": "0" * 64}, "another base model"),
        ({"vocabulary": "0" * 64}, "another tokenizer.json"),
        ({"kind": "adapter"}, "not a speculator"),
        ({"adapter": 7}, "whose states"),
        ({"shape": None}, "no shape"),
        ({"files": {HEADS: "0" * 64}}, "does not match the digest in the manifest"),
        ({"files": []}, "does not match the digest in the manifest"),
    ],
)
def test_a_manifest_for_something_else_is_refused(
    changes: dict[str, object], reason: str, reader: SpeculatorReader, model_dir: Path, artifacts: Path
) -> None:
    tensors = random_heads(HIDDEN, list(range(100)))
    digest = write_speculator(artifacts, manifest_of(model_dir, tensors) | changes, tensors)
    with pytest.raises(AdapterRefused, match=reason):
        reader.read(digest, digest)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"heads": 5}, "5 heads do not fit a slot of 4: .* raise --speculator-heads"),
        ({"vocabulary": 129}, "129 vocabulary do not fit a slot of 128: .* raise --speculator-vocabulary"),
        ({"heads": True}, "says heads is True"),
        ({"heads": 0}, "says heads is 0"),
        ({"hidden": HIDDEN + 1}, f"this base has {HIDDEN}"),
        ({"conditioning": "markov"}, "'markov' is not served, only none or hydra"),
        ({"conditioning": ["hydra"]}, "is not served"),
        ({"conditioning": "none"}, "'condition', which has no place"),
        ({"recurrent": 1}, "recurrent"),
        ({"vocabulary": 99}, "tokens has shape"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(
    changes: dict[str, object], reason: str, reader: SpeculatorReader, model_dir: Path, artifacts: Path
) -> None:
    tensors = random_heads(HIDDEN, list(range(100)))
    manifest = manifest_of(model_dir, tensors)
    manifest["shape"] |= changes
    digest = write_speculator(artifacts, manifest, tensors)
    with pytest.raises(AdapterRefused, match=reason):
        reader.read(digest, digest)


def cut(raw: bytes) -> bytes:
    return raw[:-4]


def huge_header(raw: bytes) -> bytes:
    return struct.pack("<Q", 1 << 40) + raw[8:]


def long_header(raw: bytes) -> bytes:
    text = b'{"__metadata__": {"x": "' + b"y" * (5 << 20) + b'"}}'
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cut, "not a valid safetensors file"),
        (huge_header, "truncated or not a safetensors file"),
        (long_header, "more than the|truncated or not"),
        (lambda raw: raw[:4], "truncated"),
        (lambda raw: raw[:8] + b"[" + raw[9:], "not valid JSON"),
    ],
)
def test_a_corrupt_file_is_refused(
    change: Callable[[bytes], bytes], reason: str, reader: SpeculatorReader, model_dir: Path, artifacts: Path
) -> None:
    tensors = random_heads(HIDDEN, list(range(100)))
    digest = write_speculator(artifacts, manifest_of(model_dir, tensors), change(save(tensors)))
    with pytest.raises(AdapterRefused, match=reason):
        reader.read(digest, digest)


def test_an_artefact_changed_after_it_was_named_is_refused(
    reader: SpeculatorReader, model_dir: Path, artifacts: Path
) -> None:
    digest = random_speculator(artifacts, model_dir)
    path = artifacts / digest / "manifest.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(AdapterRefused, match="the artefact was changed"):
        reader.read(digest, digest)
    path.unlink()
    with pytest.raises(AdapterRefused, match="cannot be read"):
        reader.read(digest, digest)


def test_a_refusal_leaves_the_heads_that_serve_alone(
    make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path
) -> None:
    speculators = make_speculators()
    good = random_speculator(artifacts, model_dir)
    assert load(speculators, good) == ("", False, good)
    ask = asks_of([speculators.slot(good, None)], SAMPLED)
    before = speculators.propose(states(1), ask)
    tensors = random_heads(HIDDEN, list(range(100)), seed=9)
    bad = write_speculator(artifacts, manifest_of(model_dir, tensors, base="0" * 64), tensors)
    error, transient, serving = load(speculators, bad, replaces=good)
    assert "another base" in error
    assert (transient, serving) == (False, good)
    assert speculators.propose(states(1), ask) == before
    assert load(speculators, "0" * 64, path="nowhere")[2] == ""
    large = random_speculator(artifacts, model_dir, heads=LIMITS.heads + 1)
    assert "raise --speculator-heads" in load(speculators, large, replaces=good)[0]


# --- slots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
def test_heads_in_a_used_slot_draft_as_in_a_fresh_one(
    native: bool, make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path
) -> None:
    large = random_speculator(artifacts, model_dir, seed=1)
    small = random_speculator(
        artifacts, model_dir, seed=2, heads=2, tokens=list(range(5, 60, 5)), conditioning="none", recurrent=False
    )
    expected = draft_alone(make_speculators(native=native), small)
    used = make_speculators(native=native, slots=1)
    first = draft_alone(used, large)
    assert draft_alone(used, small) == expected
    assert used.slot(large, None) == 0, "one slot holds one speculator"
    assert draft_alone(used, large) == first


def draft_alone(speculators: Speculators, digest: str) -> list[Guess]:
    assert load(speculators, digest)[2] == digest
    return speculators.propose(states(5), asks_of([speculators.slot(digest, None)] * 5, SAMPLED))


def test_requests_that_name_what_was_replaced_follow_and_find_their_way_back(
    make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path
) -> None:
    speculators = make_speculators()
    one, two, three = (random_speculator(artifacts, model_dir, seed=seed) for seed in range(3))
    load(speculators, one)
    place = speculators.slot(one, None)
    assert load(speculators, two, replaces=one) == ("", False, two)
    assert speculators.slot(one, None) == speculators.slot(two, None) == place
    assert speculators.digest(place) == two
    load(speculators, three, replaces=two)
    assert speculators.slot(one, None) == speculators.slot(three, None) == place
    load(speculators, one, replaces=three)
    assert [speculators.slot(digest, None) for digest in (one, two, three)] == [place] * 3
    assert [entry.digest for entry in speculators.table()] == [one]
    assert unload(speculators, one) == ""
    assert [speculators.slot(digest, None) for digest in (one, two, three)] == [0, 0, 0]
    assert speculators.propose(states(1), asks_of([place], [GREEDY])) == [Guess([], [])]


def test_loading_what_drafts_already_ends_what_it_replaces(
    make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path
) -> None:
    speculators = make_speculators()
    champion, canary = (random_speculator(artifacts, model_dir, seed=seed) for seed in range(2))
    load(speculators, champion)
    load(speculators, canary)
    assert speculators.slot(champion, None) != speculators.slot(canary, None)
    assert load(speculators, champion, replaces=canary) == ("", False, champion)
    assert speculators.slot(canary, None) == speculators.slot(champion, None)
    assert [entry.digest for entry in speculators.table()] == [champion]


def test_the_heads_nobody_named_for_longest_leave_when_there_is_no_room(
    make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path
) -> None:
    speculators = make_speculators(slots=2)
    one, two, three = (random_speculator(artifacts, model_dir, seed=seed) for seed in range(3))
    load(speculators, one)
    load(speculators, two)
    assert speculators.slot(one, None)
    load(speculators, three)
    assert speculators.slot(two, None) == 0
    assert {entry.digest for entry in speculators.table()} == {one, three}


def test_heads_of_another_adapter_are_not_used(
    make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path
) -> None:
    speculators = make_speculators()
    digest = random_speculator(artifacts, model_dir, adapter="a" * 64)
    load(speculators, digest)
    assert speculators.slot(digest, "a" * 64) == 1
    assert speculators.slot(digest, None) == speculators.slot(digest, "b" * 64) == speculators.slot(None, None) == 0
    assert speculators.table()[0].adapter == "a" * 64


def test_an_old_name_is_forgotten_in_the_end(
    make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.speculation.manager.MOST_ALIASES", 2)
    speculators = make_speculators()
    digest = random_speculator(artifacts, model_dir)
    for old in ("one", "two", "three"):
        load(speculators, digest, replaces=old)
    assert [bool(speculators.slot(old, None)) for old in ("one", "two", "three")] == [False, True, True]


def test_what_is_still_being_read_cannot_be_unloaded_and_answers_everyone_who_asked(
    make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speculators, gate = make_speculators(), threading.Event()
    read = SpeculatorReader.read

    def slow(reader: SpeculatorReader, digest: str, path: str) -> Any:  # noqa: ANN401  # as the original
        assert gate.wait(30)
        return read(reader, digest, path)

    monkeypatch.setattr(SpeculatorReader, "read", slow)
    digest = random_speculator(artifacts, model_dir)
    answers = Answers()
    for _ in range(2):
        speculators.load(digest, digest, "", answers)
    assert "still loading" in unload(speculators, digest)
    speculators.settle()
    assert not speculators.restless
    assert answers == []
    gate.set()
    deadline = time.monotonic() + 30
    while not speculators.restless and time.monotonic() < deadline:
        time.sleep(0.001)
    speculators.settle()
    assert answers == [("", False, digest)] * 2


# --- drafts ---------------------------------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"conditioning": "hydra", "recurrent": True, "seed": 1},
    {"conditioning": "hydra", "recurrent": False, "seed": 2, "tables": 1, "tokens": list(range(3, 120, 3)), "heads": 3},
    {"conditioning": "none", "recurrent": True, "seed": 3, "heads": 2},
    {"conditioning": "hydra", "recurrent": True, "seed": 5, "dtype": torch.bfloat16},
    {"conditioning": "none", "recurrent": False, "seed": 4, "tokens": [*range(40), *range(100, 160)]},
]


def both(
    make: MakeSpeculators, artifacts: Path, model: Path, threads: int = 1
) -> tuple[Speculators, Speculators, list[int]]:
    """The same speculators on both paths."""
    digests = [random_speculator(artifacts, model, **kind) for kind in KINDS]
    pair = [make(native=native, slots=len(KINDS), threads=threads) for native in (True, False)]
    for speculators in pair:
        assert all(load(speculators, digest)[2] == digest for digest in digests)
    return pair[0], pair[1], [pair[0].slot(digest, None) for digest in digests]


def assert_alike(some: list[Guess], others: list[Guess]) -> None:
    assert [guess.tokens for guess in some] == [guess.tokens for guess in others]
    for guess, other in zip(some, others, strict=True):
        assert guess.chances == pytest.approx(other.chances, abs=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_native_drafts_equal_torchs_for_rows_of_mixed_slots(
    threads: int, floor: float, make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path
) -> None:
    native, torchs, places = both(make_speculators, artifacts, model_dir, threads=threads)
    lengths: set[int] = set()
    slots = [places[0], places[2], 0, places[1], places[3], places[4], places[0]] * 5
    for seed in range(10):
        asks = asks_of(slots, SAMPLED)
        hidden = states(len(slots), seed)
        drafted = native.propose(hidden, asks, floor)
        assert_alike(drafted, torchs.propose(hidden, asks, floor))
        lengths |= {len(guess.tokens) for guess in drafted}
    assert lengths == ({0, 2, 3, 4} if not floor else {0, 1, 2, 3, 4})


def test_a_row_drafts_the_same_alone_and_in_company_and_no_more_than_it_asked(
    make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path
) -> None:
    native, _, places = both(make_speculators, artifacts, model_dir)
    asks = [ask._replace(most=1 + index % 4) for index, ask in enumerate(asks_of(places * 3, SAMPLED))]
    hidden = states(len(asks))
    together = native.propose(hidden, asks)
    for index, ask in enumerate(asks):
        assert_alike(native.propose(hidden[index : index + 1], [ask]), [together[index]])
        assert len(together[index].tokens) <= ask.most
    assert [len(guess.tokens) for guess in native.propose(hidden, [ask._replace(most=0) for ask in asks])] == [0] * len(
        asks
    )


def test_bf16_drafts_nearly_what_fp32_does(make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path) -> None:
    exact, _, places = both(make_speculators, artifacts, model_dir)
    digests = [exact.digest(place) for place in places]
    rough = make_speculators(precision="bf16", slots=len(KINDS))
    for digest in digests:
        load(rough, digest)
    asks, hidden = asks_of(places * 20, [GREEDY], 1), states(100)
    pairs = zip(exact.propose(hidden, asks), rough.propose(hidden, asks), strict=True)
    assert sum(one.tokens == other.tokens for one, other in pairs) >= 95


def test_a_row_stops_behind_the_token_that_makes_it_hopeless(
    make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path
) -> None:
    native, _, places = both(make_speculators, artifacts, model_dir)
    asks, hidden = asks_of([places[0]] * 40, SAMPLED), states(40)
    for whole, short in zip(native.propose(hidden, asks), native.propose(hidden, asks, 0.3), strict=True):
        survival = [torch.tensor(whole.chances[: length + 1]).prod().item() for length in range(4)]
        expected = next((length for length, chance in enumerate(survival, 1) if chance < 0.3), 4)
        assert short.tokens == whole.tokens[:expected]


def copying_heads(hidden: int, head_VE: torch.Tensor, tokens: list[int]) -> Tensors:
    """Heads whose state is the LM head's input, so that their logits are the model's own."""
    heads = 3
    return {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "weight": torch.zeros(heads, hidden, hidden),
        "bias": torch.zeros(heads, hidden),
        "head": head_VE[tokens].contiguous(),
        "confidence": torch.cat([torch.zeros(heads, hidden), torch.ones(heads, 1)], 1),
        "confidence_bias": torch.zeros(heads),
    }


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("sampling", SAMPLED)
def test_heads_that_know_the_models_logits_draft_what_the_sampler_draws(
    native: bool, sampling: Sampling, make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path
) -> None:
    words = list(range(7, 135))  # an offset: places in the pruned vocabulary are no token ids
    head_VE = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5)) * 2.5 * HIDDEN**-0.5
    tensors = copying_heads(HIDDEN, head_VE, words)
    speculators = make_speculators(native=native)
    digest = write_speculator(artifacts, manifest_of(model_dir, tensors, recurrent=False), tensors)
    load(speculators, digest)
    hidden = states(60)
    logits_RV = torch.full((60, TOKENS), float("-inf"))
    logits_RV[:, words] = hidden @ head_VE[words].T
    draws = [Draw(sampling, 1, 100 + 5 * row) for row in range(60)]
    guesses = speculators.propose(hidden, [Ask(1, 0, draw, 3) for draw in draws])
    for depth in range(3):
        drawn = sample(logits_RV, [draw._replace(position=draw.position + depth) for draw in draws])
        assert [guess.tokens[depth] for guess in guesses] == drawn.token_ids
        # This confidence is the sigmoid of the drafted token's log probability.
        expected = torch.sigmoid(torch.tensor(drawn.logprobs)).tolist()
        assert [guess.chances[depth] for guess in guesses] == pytest.approx(expected, abs=1e-3)
    assert len({tuple(guess.tokens) for guess in guesses}) > 20


@pytest.mark.parametrize("native", [True, False])
def test_states_that_are_not_finite_draft_something_hopeless(
    native: bool, make_speculators: MakeSpeculators, model_dir: Path, artifacts: Path
) -> None:
    speculators = make_speculators(native=native)
    digest = random_speculator(artifacts, model_dir)
    load(speculators, digest)
    hidden = states(3)
    hidden[0, 3], hidden[1, 5] = float("nan"), float("inf")
    asks = asks_of([1] * 3, SAMPLED)
    guesses = speculators.propose(hidden, asks)
    assert all(0 <= token < TOKENS for guess in guesses for token in guess.tokens)
    assert guesses[0].chances == [0.0] * 4
    assert_alike(guesses[2:], speculators.propose(hidden[2:], asks[2:]))


def test_each_path_drafts_with_its_own_code(make_speculators: MakeSpeculators) -> None:
    assert isinstance(make_speculators(native=True)._drafter, NativeDrafter)
    assert isinstance(make_speculators(native=False)._drafter, TorchDrafter)


def test_slot_tensors_stay_where_they_are_whatever_is_loaded(
    model_dir: Path, artifacts: Path, reader: SpeculatorReader
) -> None:
    tensors = SlotTensors(LIMITS, 2, torch.float32, torch.device("cpu"))
    digests = [random_speculator(artifacts, model_dir, **kind) for kind in KINDS[:2]]
    ready = [tensors.prepare(reader.read(digest, digest)) for digest in digests]
    tensors.fill(1, ready[0])
    before = {name: value.data_ptr() for name, value in vars(tensors).items() if isinstance(value, torch.Tensor)}
    tensors.fill(2, ready[1])
    tensors.fill(1, ready[1])
    assert before == {
        name: value.data_ptr() for name, value in vars(tensors).items() if isinstance(value, torch.Tensor)
    }
    assert len(before) > 8


def test_the_digest_names_the_manifest(model_dir: Path, artifacts: Path) -> None:
    digest = random_speculator(artifacts, model_dir)
    raw = (artifacts / digest / "manifest.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == digest
    assert json.loads(raw)["files"][HEADS] == hashlib.sha256((artifacts / digest / HEADS).read_bytes()).hexdigest()
