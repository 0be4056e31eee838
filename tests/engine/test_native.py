"""The C++ path against the torch path it replaces: the same numbers, in any company and on any number of threads."""

import os
import platform
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.config import EngineConfig, Precision
from engine.layers import sampler
from engine.layers.sampler import Draw
from engine.messages import Sampling
from engine.models.registry import read_spec
from engine.native import build, decoder, sampling
from engine.native.build import NoNative
from engine.native.decoder import unsupported
from engine.native.library import functions
from engine.native.weights import interleave, quantize
from engine.runner.build import build_forward
from engine.runner.forward import Forward
from engine.scheduling.scheduler import Row
from tests.engine.conftest import EngineMaker, ModelMaker
from tests.engine.families import CASES, write_model

BLOCKS, CONTEXT = 96, 256
# Sizes that are no multiple of a panel: 40 gate outputs, 101 words.
ODD = {
    "intermediate_size": 40,
    "vocab_size": 101,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
STEPS = [[37, 1, 20], [1, 5, 1], [1, 1, 16], [8, 1, 1]]


@dataclass(eq=False)
class Text:
    """What a forward reads of a sequence."""

    tokens: list[int]
    table: NDArray[np.int64]
    slot: int = 0
    computed: int = 0


Make = Callable[..., Forward]


@pytest.fixture
def make_forward() -> Iterator[Make]:
    """Builds forwards and releases their threads after the test."""
    made: list[Forward] = []

    def make(
        directory: Path,
        *,
        precision: Precision = "fp32",
        native: bool = True,
        threads: int = 1,
        slots: int = 0,
        rank: int = 16,
    ) -> Forward:
        config = EngineConfig(
            model=directory,
            artifacts=directory,
            precision=precision,
            device="cpu",
            adapter_rank=rank,
            threads=threads,
            native=native,
        )
        forward = build_forward(config, read_spec(directory), blocks=BLOCKS, positions=CONTEXT)
        assert forward.kernels.startswith("native" if native else "torch")
        if slots:
            forward.add_slots(slots, rank)
        made.append(forward)
        return forward

    yield make
    for forward in made:
        forward.close()


def texts(vocabulary: int, slots: Sequence[int] = (0, 0, 0)) -> list[Text]:
    """Three sequences with pages that lie in no order."""
    generator = np.random.default_rng(7)
    pages = generator.permutation(np.arange(1, BLOCKS + 1)).reshape(-1, 16)
    return [
        Text(generator.integers(0, vocabulary, 80).tolist(), pages[index].astype(np.int64), slot)
        for index, slot in enumerate(slots)
    ]


@torch.inference_mode()
def advance(forward: Forward, rows: Sequence[tuple[Text, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One step; head inputs and logits of every token."""
    total = sum(length for _, length in rows)
    hidden, logits = forward.run([Row(text, length) for text, length in rows], range(total), logits=True)  # type: ignore[arg-type]
    for text, length in rows:
        text.computed += length
    return hidden.float().clone(), logits.float().clone()


def play(forward: Forward, slots: Sequence[int] = (0, 0, 0)) -> list[torch.Tensor]:
    """Every step of STEPS; head inputs and logits, one after the other."""
    found: list[torch.Tensor] = []
    several = texts(forward.spec.vocab_size, slots)
    for lengths in STEPS:
        found += advance(forward, list(zip(several, lengths, strict=True)))
    return found


def furthest(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.architecture.endswith("CausalLM")])
def test_every_architecture_gives_the_torch_paths_states_and_logits(
    name: str, tmp_path: Path, make_forward: Make
) -> None:
    write_model(tmp_path, CASES[name])
    found, expected = (play(make_forward(tmp_path, native=native)) for native in (True, False))
    assert furthest(found, expected) < 1e-4


def test_sizes_that_fill_no_panel_are_padded_without_a_trace(make_model: ModelMaker, make_forward: Make) -> None:
    directory = make_model(**ODD)
    found, expected = (play(make_forward(directory, native=native)) for native in (True, False))
    assert found[1].shape[1] == 101
    assert furthest(found, expected) < 1e-4


PRECISIONS: list[Precision] = ["fp32", "bf16", "int8"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_rows_numbers_do_not_depend_on_its_company_or_the_threads(
    precision: Precision, model_dir: Path, make_forward: Make
) -> None:
    alone = make_forward(model_dir, precision=precision)
    text = texts(160)[0]
    expected = torch.cat([advance(alone, [(text, lengths[0])])[1] for lengths in STEPS])
    for threads in (1, 2, 3):
        crowd, several = make_forward(model_dir, precision=precision, threads=threads), texts(160)
        found = [advance(crowd, list(zip(several, lengths, strict=True)))[1][: lengths[0]] for lengths in STEPS]
        assert torch.equal(torch.cat(found), expected), f"{threads} threads"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cut", [1, 2, 3, 5, 7, 13, 16, 17, 31, 33, 61])
def test_chunks_of_any_size_give_the_same_bits(
    precision: Precision, cut: int, model_dir: Path, make_forward: Make
) -> None:
    whole, chunked = texts(160)[0], texts(160)[0]
    forward = make_forward(model_dir, precision=precision)
    expected = advance(forward, [(whole, 61)])[1]
    found = [advance(forward, [(chunked, min(cut, 61 - at))])[1] for at in range(0, 61, cut)]
    assert torch.equal(torch.cat(found), expected)


def test_only_the_wanted_tokens_come_back_and_all_are_cached(model_dir: Path, make_forward: Make) -> None:
    forward = make_forward(model_dir)
    everything, few = texts(160), texts(160)
    expected = advance(forward, [(text, 20) for text in everything])[1]
    rows = [Row(text, 20) for text in few]  # type: ignore[arg-type]
    found = forward.run(rows, [19, 39, 45], logits=True).logits_RV.clone()
    assert torch.equal(found, expected[[19, 39, 45]])
    nothing = forward.run([Row(everything[0], 1)], [], logits=False)  # type: ignore[arg-type]
    assert nothing.hidden_RE.shape == (0, 64)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize(("precision", "share"), [("bf16", 0.02), ("int8", 0.06)])
def test_lower_precisions_stay_close_to_fp32(
    precision: Precision, share: float, odd: bool, make_model: ModelMaker, make_forward: Make
) -> None:
    directory = make_model(**(ODD if odd else {}))
    expected = play(make_forward(directory, native=False))
    found = play(make_forward(directory, precision=precision))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < share * b.norm()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_mixtures_run_in_lower_precisions(precision: Precision, tmp_path: Path, make_forward: Make) -> None:
    write_model(tmp_path, CASES["qwen3_moe"])
    expected, found = play(make_forward(tmp_path, native=False)), play(make_forward(tmp_path, precision=precision))
    # A token whose experts are nearly tied may choose others: most must stay close, not all.
    distance = torch.cat(
        [(a - b).norm(dim=1) / b.norm(dim=1) for a, b in zip(found[1::2], expected[1::2], strict=True)]
    )
    assert distance.median() < 0.1


def fill(forward: Forward, seed: int, slot: int, rank: int) -> None:
    """The same random adapter for whichever forward; B is block-diagonal over the parts of a fused projection."""
    spec, generator = forward.spec, torch.Generator().manual_seed(seed)
    kv, wide, narrow = spec.kv_heads * spec.head_dim, spec.intermediate_size, spec.hidden_size
    shapes = {"qkv": (narrow, [spec.attention_size, kv, kv]), "o": (spec.attention_size, [narrow])}
    shapes |= {"gate_up": (narrow, [wide, wide]), "down": (wide, [narrow])}
    places = [(layer, name, *shapes[name]) for layer in range(spec.layers) for name in shapes]
    for layer, name, width, parts in [*places, (None, "head", narrow, [spec.vocab_size])]:
        a = torch.randn(rank * len(parts), width, generator=generator) * 0.1
        blocks = [torch.randn(rank, part, generator=generator) * 0.1 for part in parts]
        b: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        forward.fill(slot, layer, name, a, b)


@pytest.mark.parametrize("ranks", [(4, 16), (1, 8), (3, 256)])
def test_rows_with_different_adapters_share_a_step(ranks: tuple[int, int], model_dir: Path, make_forward: Make) -> None:
    found: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    for native, into in ((True, found), (False, expected)):
        forward = make_forward(model_dir, native=native, slots=3, rank=256)
        fill(forward, 1, 1, ranks[0])
        fill(forward, 2, 3, ranks[1])
        into += play(forward, (0, 1, 3))
    assert furthest(found, expected) < 1e-4
    assert furthest(found, play(make_forward(model_dir))) > 0.01


def test_a_slot_filled_again_forgets_the_adapter_before(model_dir: Path, make_forward: Make) -> None:
    used, fresh = make_forward(model_dir, slots=2), make_forward(model_dir, slots=2)
    fill(used, 1, 1, 16)
    fill(used, 2, 1, 4)
    fill(fresh, 2, 1, 4)
    assert furthest(play(used, (0, 1, 1)), play(fresh, (0, 1, 1))) == 0


def test_logits_of_states_equal_those_of_the_step(model_dir: Path, make_forward: Make) -> None:
    forward = make_forward(model_dir, slots=2)
    fill(forward, 1, 1, 8)
    hidden, logits = advance(forward, list(zip(texts(160, (0, 1, 1)), STEPS[0], strict=True)))
    assert torch.equal(forward.logits(hidden, [0] * 37 + [1] * 21), logits)


@pytest.mark.parametrize("vocabulary", [50, 2160])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0}, {}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05},
        {"temperature": 1.3, "top_k": 50, "top_p": 0.8}, {"temperature": 1e-9}, {"temperature": 3.0, "top_p": 0.99},
        {"top_k": 1}, {"top_p": 1e-6}, {"top_k": 2**32 + 1},
    ],
)  # fmt: skip
def test_sampling_draws_the_reference_samplers_tokens(options: dict[str, float], vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(40, vocabulary + 3, generator=generator) * 3)[:, :vocabulary]
    # Equal logits and forbidden tokens are the corners of every filter.
    logits[:10] = logits[:10].round()
    logits[10:20, ::2] = float("-inf")
    draws = [Draw(Sampling(seed=row * 7919, max_tokens=1, **options), row % 3, row) for row in range(40)]  # type: ignore[arg-type]
    found, expected = sampling.sample(logits, draws), sampler.sample(logits, draws)
    assert sampling.available()
    assert found.token_ids == expected.token_ids
    assert np.allclose(found.logprobs, expected.logprobs, atol=1e-4)


def test_a_poisoned_row_is_visible_and_alone() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    logits[0, 3], logits[1, 5], logits[2] = float("nan"), float("inf"), float("-inf")
    draws = [Draw(Sampling(seed=1, max_tokens=1), 0, 1)] * 4
    found = sampling.sample(logits, draws)
    assert not np.isfinite(found.logprobs[:3]).any()
    assert found.token_ids[3] == sampler.sample(logits[3:], draws[3:]).token_ids[0]


def test_sequences_without_the_tokens_of_their_row_are_refused(model_dir: Path, make_forward: Make) -> None:
    forward, text = make_forward(model_dir), texts(160)[0]
    with pytest.raises(ValueError, match="up to 512 tokens that its sequences have"):
        forward.run([Row(text, 81)], [80], logits=True)  # type: ignore[arg-type]


def test_states_of_impossible_tokens_and_chunks_are_refused(model_dir: Path, make_engine: EngineMaker) -> None:
    engine = make_engine(model_dir)
    for token_ids in ([5, 10**9], [5, -1]):
        with pytest.raises(ValueError, match="between 0 and 159"):
            engine.hidden_states(token_ids)
    for chunks in ([2], [1, 3], [4, -1], [600]):
        with pytest.raises(ValueError, match="must add up to 3"):
            engine.hidden_states([5, 6, 7], chunks=chunks)
    assert engine.hidden_states([5, 6, 7], chunks=[1, 2]).shape == (3, 64)


def test_switched_off_the_plain_sampler_draws(
    model_dir: Path, make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "functions", lambda: pytest.fail("the native sampler was asked"))
    engine = make_engine(model_dir, native=False)
    done = engine.generate([[5, 6, 7]], Sampling(seed=1, max_tokens=3))
    assert done[0].finished.reason == "length"


def test_int8_rows_keep_their_largest_weight_and_lose_at_most_half_a_step() -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    weight[5] = 0
    rounded, scale = quantize(weight)
    assert int(rounded.abs().amax()) == 127
    assert ((rounded * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


def test_interleaving_alternates_gate_and_up_panels() -> None:
    gate_up = torch.arange(64).reshape(64, 1)
    assert interleave(gate_up).squeeze(1).tolist() == [*range(16), *range(32, 48), *range(16, 32), *range(48, 64)]


def test_models_it_cannot_run_are_named(tmp_path: Path, make_model: ModelMaker) -> None:
    assert "multiples of 16" in unsupported(read_spec(make_model(hidden_size=40)), 8)
    assert "ranks above" in unsupported(read_spec(make_model()), 1024)
    assert not unsupported(read_spec(make_model()), 64)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache directory without a library, in which building starts anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
def test_a_cpu_with_narrower_vectors_gives_the_torch_paths_states_too(
    no_library: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path, make_forward: Make
) -> None:
    wide = "avx512f" in Path("/proc/cpuinfo").read_text()
    below = "-march=x86-64-v3" if wide else "-march=x86-64-v2"
    flags = tuple(below if flag == "-march=native" else flag for flag in build.FLAGS)
    expected = play(make_forward(model_dir, native=False))
    monkeypatch.setattr(build, "FLAGS", flags)
    narrow = functions.__wrapped__()
    assert narrow.whet_instructions(1) == (b"avx2" if wide else b"generic")
    monkeypatch.setattr(decoder, "functions", lambda: narrow)
    assert furthest(play(make_forward(model_dir)), expected) < 1e-4
    precisions: list[tuple[Precision, float]] = [("bf16", 0.02), ("int8", 0.06)]
    for precision, share in precisions:
        found = play(make_forward(model_dir, precision=precision))
        assert all((a - b).norm() < share * b.norm() for a, b in zip(found, expected, strict=True)), precision


@pytest.mark.skipif("amx_bf16" not in Path("/proc/cpuinfo").read_text(), reason="this CPU has no matrix tiles")
def test_where_tiles_are_refused_vectors_give_what_tiles_give(
    no_library: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path, make_forward: Make
) -> None:
    precisions: list[Precision] = ["bf16", "int8"]
    tiled = [make_forward(model_dir, precision=precision) for precision in precisions]
    if any("amx" not in forward.kernels for forward in tiled):
        pytest.skip("tiles are refused here already")
    expected = [play(forward) for forward in tiled]
    monkeypatch.setenv("WHET_NO_TILES", "1")
    # Another build, as one process loads a library once.
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DWITHOUT_TILES"))
    build.library.cache_clear()
    vectors = functions.__wrapped__()
    monkeypatch.setattr(decoder, "functions", lambda: vectors)
    for precision, states in zip(precisions, expected, strict=True):
        plain = make_forward(model_dir, precision=precision)
        assert "amx" not in plain.kernels
        assert all((a - b).norm() < 0.01 * b.norm() for a, b in zip(play(plain), states, strict=True)), precision


def test_without_a_compiler_torch_serves_and_int8_is_refused(
    no_library: Path, monkeypatch: pytest.MonkeyPatch, model_dir: Path, make_engine: EngineMaker,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("CXX", "/bin/false")
    engine = make_engine(model_dir)
    assert engine.core.status("x").kernels == "torch"
    assert "could not build the native path" in capfd.readouterr().err
    with pytest.raises(ValueError, match="int8 needs the native CPU path"):
        make_engine(model_dir, precision="int8")
    assert not list((no_library / "whet").iterdir())


def test_a_place_where_nothing_can_be_built_is_named(no_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (no_library / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_library / "file"))
    with pytest.raises(NoNative, match="set XDG_CACHE_HOME"):
        build.library()
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_library / "open"))
    (no_library / "open").mkdir(mode=0o777)
    os.chmod(no_library / "open", 0o777)
    with pytest.raises(NoNative, match="others may replace"):
        build.library()


def test_a_cache_directory_others_may_write_to_is_refused(no_library: Path) -> None:
    (no_library / "whet").mkdir()
    os.chmod(no_library / "whet", 0o777)
    with pytest.raises(NoNative, match="chmod 700"):
        build.library()


def test_the_library_is_built_once_and_ours_alone(no_library: Path) -> None:
    build.library()
    (built,) = (no_library / "whet").iterdir()
    first = built.stat()
    build.library.cache_clear()
    build.library()
    assert built.stat().st_mtime_ns == first.st_mtime_ns
    assert stat.S_IMODE(first.st_mode) == 0o700
