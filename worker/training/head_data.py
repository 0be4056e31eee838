"""What heads learn from: logged requests, the words worth drafting, and batches of states with what came after them.

Suffixes as in worker/training/head_model.py.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from engine.layers.sampler import Draw, row_keys
from engine.messages import Sampling
from worker.training.head_model import Batch
from worker.training.spec import Request

CPU = torch.device("cpu")


def frequent(answers: Iterable[Sequence[int]], most: int, vocabulary: int) -> torch.Tensor:
    """The `most` most frequent answer tokens [V], ascending; where fewer were ever said, the lowest ids fill up."""
    counts: Counter[int] = Counter()
    for answer in answers:
        counts.update(answer)
    chosen = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]
    missing = min(most, vocabulary) - len(chosen)
    known = set(chosen)
    spare = (token for token in range(vocabulary) if token not in known)
    return torch.tensor(sorted([*chosen, *(next(spare) for _ in range(missing))]))


def effective_head(logits: Callable[[torch.Tensor], torch.Tensor], hidden: int) -> torch.Tensor:
    """The LM head [vocabulary, E] with whatever an adapter adds to it, read off its logits of unit vectors."""
    return logits(torch.eye(hidden)).T.contiguous()


def make_batch(
    requests: Sequence[Request], states: Sequence[torch.Tensor], places: torch.Tensor, *, keys: bool = False
) -> Batch:
    """Requests and their states laid end to end. `places` maps every token id to its row of the pruned vocabulary.

    Noise keys are made only where asked for: training the drafts needs none.
    """
    sizes = [len(request.answer) for request in requests]
    tokens_T = torch.from_numpy(np.concatenate([request.answer for request in requests]))
    left = np.concatenate([np.arange(size - 1, -1, -1) for size in sizes])
    weight = np.repeat([1.0 / size for size in sizes], sizes)
    heat = np.repeat([request.temperature for request in requests], sizes)
    noise = np.concatenate([_keys(request) for request in requests]) if keys else np.zeros(0, dtype=np.int64)
    return Batch(
        hidden_TE=torch.cat(list(states)).float(),
        tokens_T=tokens_T,
        places_T=places[tokens_T],
        left_T=torch.from_numpy(left),
        weight_T=torch.from_numpy(weight).float(),
        keys_T=torch.from_numpy(noise),
        heat_T=torch.from_numpy(heat).float(),
    )


def _keys(request: Request) -> np.ndarray:
    """The sampler's key for each token of the answer, by its position in the whole text."""
    size, start = len(request.answer), len(request.prompt)
    if request.temperature <= 0:
        return np.zeros(size, dtype=np.int64)
    sampling = Sampling(temperature=request.temperature, seed=request.seed, max_tokens=1)
    return row_keys([Draw(sampling, request.choice, start + place) for place in range(size)], CPU).numpy()


def places_of(tokens_V: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """For every token id its row in `tokens_V`; V for those outside."""
    places = torch.full((vocabulary,), len(tokens_V))
    places[tokens_V] = torch.arange(len(tokens_V))
    return places


def by_tokens(requests: Sequence[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive indices in groups whose answers have about `budget` tokens, one request at least."""
    groups: list[list[int]] = []
    held = budget
    for index in requests:
        if held + sizes[index] > budget:
            groups.append([])
            held = 0
        groups[-1].append(index)
        held += sizes[index]
    return groups
