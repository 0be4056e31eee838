"""How likely a model finds the right answers of groups it was not trained on, alike for every kind of run.

A loss would do for one kind and one beta. Nats a token of the right answers can be compared between any two candidates.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

BATCH = 16
Row = dict[str, list[int]]


class Measured(NamedTuple):
    """Nats a token of the right answers; the share of pairs whose better answer is the likelier, None without pairs."""

    loss: float
    preferred: float | None


def read(file: str) -> list[Row]:
    """The rows of a validation file, less those without a right answer, which say nothing; none for ""."""
    lines = Path(file).read_text(encoding="utf-8").splitlines() if file else []
    return [row for line in lines if "good_ids" in (row := json.loads(line))]


def measure(model: Any, rows: Sequence[Row]) -> Measured:  # noqa: ANN401 - a transformers or PEFT model
    """Leaves the model in the mode it was in."""
    was_training = model.training
    model.eval()
    good = [(row["prompt_ids"], row["good_ids"]) for row in rows]
    bad = [(row["prompt_ids"], row["bad_ids"]) for row in rows if "bad_ids" in row]
    likely = _log_likelihoods(model, [*good, *bad])
    model.train(was_training)
    right = likely[: len(good)]
    paired = [likely[place] for place, row in enumerate(rows) if "bad_ids" in row]
    tokens = sum(len(answer) for _, answer in good)
    preferred = sum(ours > theirs for ours, theirs in zip(paired, likely[len(good) :], strict=True))
    return Measured(-sum(right) / max(tokens, 1), preferred / len(bad) if bad else None)


def _log_likelihoods(model: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:  # noqa: ANN401
    """Of each answer after its prompt, in nats."""
    import torch

    found = []
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long, device=model.device)
        mask, said = torch.zeros_like(ids), torch.zeros_like(ids)
        for place, (prompt, answer) in enumerate(batch):
            whole = len(prompt) + len(answer)
            ids[place, :whole] = torch.tensor([*prompt, *answer])
            mask[place, :whole], said[place, len(prompt) : whole] = 1, 1
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        each = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        found += (each * said[:, 1:]).sum(-1).tolist()
    return found
