"""Sampling: the right distribution, and the same token for the same key in any company."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import chisquare

from engine.layers.sampler import Draw, Sampled, gumbel, invalid_sampling, most_likely, own_logprobs, sample
from engine.messages import Sampling
from engine.native.sampling import sample as native_sample
from tests.engine import plain_sampling

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0, 1.5])


def draws(count: int, **options: object) -> list[Draw]:
    return [Draw(Sampling(seed=seed, max_tokens=1, **options), 0, 7) for seed in range(count)]  # type: ignore[arg-type]


def frequencies(logits: torch.Tensor, count: int, **options: object) -> torch.Tensor:
    tokens = sample(logits.expand(count, -1), draws(count, **options)).token_ids
    return torch.bincount(torch.tensor(tokens), minlength=logits.numel())


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"temperature": 1.0, "top_k": 3}, [0, 7, 1]),
        ({"temperature": 2.0, "top_p": 0.6}, [0, 7, 1]),
        ({"temperature": 1.0, "top_k": 4, "top_p": 0.7}, [0, 7]),
        ({"temperature": 1.0, "min_p": 0.3}, [0, 7, 1]),
        ({"temperature": 2.0, "min_p": 0.3}, [0, 7, 1, 2, 3]),
        ({"temperature": 1.0, "min_p": 0.2, "top_k": 3, "top_p": 0.8}, [0, 7]),
    ],
)
def test_tokens_come_with_the_filtered_distributions_frequencies(options: dict[str, float], kept: list[int]) -> None:
    count = 40_000
    found = frequencies(LOGITS, count, **options)
    expected = torch.zeros(8, dtype=torch.float64)
    expected[kept] = (LOGITS[kept].double() / options["temperature"]).softmax(-1)
    assert found[expected == 0].sum() == 0
    assert chisquare(found[kept].numpy(), (expected[kept] * count).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("vocabulary", [7, 300, 1500])
def test_every_filter_together_draws_what_a_plain_loop_draws(vocabulary: int) -> None:
    logits = 3 * torch.randn(40, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    keyed = [
        Draw(
            Sampling(
                seed=row * 977,
                max_tokens=1,
                temperature=(0.0, 0.4, 1.0, 1.7)[row % 4],
                top_p=(1.0, 0.9, 0.35)[row % 3],
                top_k=(0, 5, 60, 1)[row // 4 % 4],
                min_p=(0.0, 0.02, 0.4)[row // 3 % 3],
            ),
            row % 5,
            row,
        )
        for row in range(40)
    ]
    sampled = sample(logits, keyed)
    plain = [plain_sampling.token(row, *draw[:3]) for row, draw in zip(logits.tolist(), keyed, strict=True)]
    assert sampled.token_ids == plain
    owns = [plain_sampling.logprob(row, token) for row, token in zip(logits.tolist(), plain, strict=True)]
    assert sampled.logprobs == pytest.approx(owns, abs=1e-5)
    assert own_logprobs(logits, plain) == pytest.approx(owns, abs=1e-5)


def test_min_p_keeps_exactly_the_tokens_above_its_share_of_the_best() -> None:
    shares = torch.tensor([0.5, 0.24, 0.26, 0.0])
    tokens = sample(shares.log().expand(300, -1), draws(300, min_p=0.5)).token_ids
    assert set(tokens) == {0, 2}


def test_most_likely_tokens_come_best_first_with_their_own_logprobs() -> None:
    rows = torch.stack([LOGITS, -LOGITS, LOGITS.round()])
    found = most_likely(rows, [3, 1, 8])
    assert [token for token, _ in found[0]] == [0, 7, 1]
    assert [token for token, _ in found[1]] == [6]
    assert [token for token, _ in found[2]] == [0, 7, 1, 2, 3, 4, 5, 6]
    for row, ranked in zip(rows.tolist(), found, strict=True):
        owns = [plain_sampling.logprob(row, token) for token, _ in ranked]
        assert [logprob for _, logprob in ranked] == pytest.approx(owns, abs=1e-5)


def test_more_top_logprobs_than_tokens_gives_every_token() -> None:
    assert len(most_likely(LOGITS[None], [20])[0]) == 8


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_poisoned_row_is_recognisable_and_leaves_the_others_alone(poison: float, options: dict[str, float]) -> None:
    healthy = LOGITS.expand(3, -1).clone()
    expected = sample(healthy, draws(3, **options))
    poisoned = healthy.clone()
    poisoned[1, 4] = poison
    found = sample(poisoned, draws(3, **options))
    assert not math.isfinite(found.logprobs[1])
    assert 0 <= found.token_ids[1] < 8
    for row in (0, 2):
        assert found.token_ids[row] == expected.token_ids[row]
        assert found.logprobs[row] == expected.logprobs[row]


def test_a_row_with_nothing_finite_is_recognisable() -> None:
    rows = torch.stack([LOGITS, torch.full((8,), -math.inf)])
    sampled = sample(rows, draws(2))
    assert math.isfinite(sampled.logprobs[0])
    assert not math.isfinite(sampled.logprobs[1])


def test_impossible_tokens_are_never_drawn_however_hot() -> None:
    masked = torch.full((500, 40), -math.inf)
    masked[:, [3, 17]] = torch.tensor([-30.0, 4.0])
    assert set(sample(masked, draws(500, temperature=100.0)).token_ids) == {3, 17}


def test_top_p_beyond_the_first_candidates_still_keeps_exactly_its_mass() -> None:
    logits = torch.linspace(0.0, 0.7, 4096).flip(0)[None]
    probabilities = logits[0].double().softmax(-1)
    allowed = int((probabilities.cumsum(-1) < 0.8).sum()) + 1
    tokens = sample(logits.expand(400, -1), draws(400, temperature=1.0, top_p=0.8)).token_ids
    assert max(tokens) < allowed
    assert max(tokens) > 0.9 * allowed


def test_greedy_takes_the_best_token_and_its_unfiltered_logprob() -> None:
    sampled = sample(LOGITS[None], draws(1, temperature=0.0, top_k=1))
    assert sampled.token_ids == [0]
    assert sampled.logprobs[0] == pytest.approx(LOGITS.log_softmax(-1)[0].item(), abs=1e-6)


def test_logprob_ignores_temperature_and_filters() -> None:
    sampled = sample(LOGITS[None], draws(1, temperature=0.3, top_k=2))
    assert sampled.logprobs[0] == pytest.approx(LOGITS.log_softmax(-1)[sampled.token_ids[0]].item(), abs=1e-6)


def test_a_row_draws_the_same_token_alone_and_in_a_mixed_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 600, generator=generator)
    options = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 9},
    ]
    mixed = [draw for row in range(3) for draw in (draws(4, **options[(row + 1) % 4])[row], *draws(3, **options[row]))]
    together = sample(logits, mixed).token_ids
    alone = [sample(logits[row : row + 1], [draw]).token_ids[0] for row, draw in enumerate(mixed)]
    assert together == alone


@pytest.mark.parametrize("field", ["seed", "choice", "position"])
def test_noise_changes_with_every_part_of_its_key(field: str) -> None:
    flat = torch.zeros(400, 50)
    parts = {"seed": 1, "choice": 0, "position": 3}
    rows = [parts | {field: value} for value in range(400)]
    keyed = [Draw(Sampling(seed=row["seed"], max_tokens=1), row["choice"], row["position"]) for row in rows]
    counts = torch.bincount(torch.tensor(sample(flat, keyed).token_ids), minlength=50)
    assert chisquare(counts.numpy()).pvalue > 1e-4


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel(torch.full((100_000,), 12345), torch.arange(100_000))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.05)
    assert noise.min() > -3.2
    assert noise.max() < 22.9


def test_seeds_of_any_size_and_sign_are_taken() -> None:
    for seed in (-1, 0, 2**63, 2**64 - 1):
        assert sample(LOGITS[None], [Draw(Sampling(seed=seed, max_tokens=1), 0, 0)]).token_ids[0] < 8


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logit_bias": {3: 101.0}}, "logit_bias"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "token -1"),
        ({"logit_bias": {8: 1.0}}, "token 8"),
    ],
)
def test_senseless_parameters_are_named(options: dict[str, object], complaint: str) -> None:
    sampling = Sampling(**({"seed": 0, "max_tokens": 1} | options))  # type: ignore[arg-type]
    assert complaint in invalid_sampling(sampling, vocab_size=8)


def test_every_parameter_at_its_ends_is_taken() -> None:
    for options in (
        {"temperature": 0.0, "min_p": 0.0, "presence_penalty": -2.0, "repetition_penalty": 0.01, "top_p": 1e-9},
        {"temperature": 100.0, "min_p": 1.0, "frequency_penalty": 2.0, "repetition_penalty": 100.0, "top_logprobs": 20},
        {"logit_bias": {0: -100.0, 7: 100.0}, "min_tokens": 5, "top_k": 10**9},
    ):
        assert invalid_sampling(Sampling(seed=0, max_tokens=5, **options), vocab_size=8) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize("draw_tokens", [sample, native_sample])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_place_behind_a_draft_that_did_not_come_changes_no_other(
    temperature: float, draw_tokens: Callable[..., Sampled]
) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    plain = draws(6, temperature=temperature)
    tokens = sample(logits, plain).token_ids
    drafted = [None, tokens[0], tokens[1] + 1, tokens[2], None, tokens[4]]
    found = draw_tokens(logits, [draw._replace(behind=behind) for draw, behind in zip(plain, drafted, strict=True)])
    kept = [0, 1, 4, 5]
    assert [found.token_ids[place] for place in kept] == [tokens[place] for place in kept]
    assert all(map(math.isfinite, found.logprobs))
