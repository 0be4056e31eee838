"""Sampling: the right distribution, and the same token for the same key in any company."""

import pytest
import torch
from scipy.stats import chisquare

from engine.layers.sampler import Draw, gumbel, invalid_sampling, sample
from engine.messages import Sampling

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
    ],
)
def test_tokens_come_with_the_filtered_distributions_frequencies(options: dict[str, float], kept: list[int]) -> None:
    count = 40_000
    found = frequencies(LOGITS, count, **options)
    expected = torch.zeros(8, dtype=torch.float64)
    expected[kept] = (LOGITS[kept].double() / options["temperature"]).softmax(-1)
    assert found[expected == 0].sum() == 0
    assert chisquare(found[kept].numpy(), (expected[kept] * count).numpy()).pvalue > 1e-4


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
    ],
)
def test_senseless_parameters_are_named(options: dict[str, float], complaint: str) -> None:
    assert complaint in invalid_sampling(Sampling(**({"seed": 0, "max_tokens": 1} | options)))  # type: ignore[arg-type]
