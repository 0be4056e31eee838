"""The optimiser's loop over states in memory: AdamW, early stopping, a checkpoint from which a killed run goes on."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from worker.training.head_data import by_tokens, make_batch, places_of
from worker.training.head_model import Batch, Heads, drafts, lengths, loss, targets
from worker.training.process import Refused
from worker.training.spec import Request

WARMUP, CLIP, DECAY = 0.04, 1.0, 0.01
# Looks at the held-out answers, and how many in a row may find nothing better.
LOOKS, PATIENCE = 8, 3
CHECKPOINT_SECONDS = 10.0
JUDGED_TOKENS = 2048
CHECKPOINT = "heads.safetensors"
# The confidence: a logistic regression on what the finished heads draft.
CONFIDENCE_TOKENS, CONFIDENCE_STEPS, CONFIDENCE_LR, CONFIDENCE_DECAY = 24_000, 150, 0.02, 1e-3

Tell = Callable[[int, int, float, float | None, float], None]  # step, steps, loss, tau, tokens a second


@dataclass(frozen=True)
class Material:
    """Requests with their states, and the words that are drafted."""

    requests: Sequence[Request]
    states: Sequence[torch.Tensor]
    tokens_V: torch.Tensor
    places: torch.Tensor

    def drafting(self, tokens_V: torch.Tensor) -> "Material":
        """The same requests for heads with other words."""
        return replace(self, tokens_V=tokens_V, places=places_of(tokens_V, len(self.places)))

    def batch(self, indices: Sequence[int], *, keys: bool = False) -> Batch:
        return make_batch(
            [self.requests[i] for i in indices], [self.states[i] for i in indices], self.places, keys=keys
        )


@dataclass(frozen=True)
class Pace:
    """How long and how fast. `batch_tokens` are answer tokens a step."""

    lr: float
    epochs: float
    batch_tokens: int
    seed: int


class Loop:
    """One training. `checkpoint` is a directory, or None to keep nothing.

    `origin` names what the states and the first weights came from: base, adapter, champion. With other words or from
    elsewhere a checkpoint's weights would be of the same shape and mean something else.
    """

    def __init__(
        self, heads: Heads, material: Material, train: Sequence[int], stop: Sequence[int], pace: Pace,
        checkpoint: Path | None, origin: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.heads, self.material, self.train, self.stop, self.pace = heads, material, train, stop, pace
        self.sizes = [len(request.answer) for request in material.requests]
        self.optimizer = torch.optim.AdamW(heads.drafting(), lr=pace.lr, weight_decay=DECAY)
        self.steps = max(1, round(pace.epochs * len(by_tokens(list(train), self.sizes, pace.batch_tokens))))
        self.step, self.best, self.missed = 0, -1.0, 0
        self.kept = [parameter.detach().clone() for parameter in heads.drafting()]
        self._file = checkpoint / CHECKPOINT if checkpoint else None
        words = hashlib.sha256(json.dumps(material.tokens_V.tolist()).encode()).hexdigest()
        shape = list(heads.weight.shape)
        self._name = json.dumps([len(material.requests), sum(self.sizes), shape, vars(pace), words, list(origin)])
        self._saved = time.monotonic()

    def run(self, tell: Tell) -> None:
        """Train to the end, or until the held-out answers say so; the heads are then the best that were seen."""
        if not self._resume():
            self.best = self._tau()
        every = max(1, self.steps // LOOKS)
        moment, tokens, total, count = time.monotonic(), 0, 0.0, 0
        while self.step < self.steps and self.missed < PATIENCE:
            indices = self._indices()
            total, count = total + self._learn(indices), count + 1
            tokens += sum(self.sizes[i] for i in indices)
            looks = self.step % every == 0 or self.step == self.steps
            if looks or count % 20 == 0:
                tau = self._look() if looks else None
                now = time.monotonic()
                tell(self.step, self.steps, total / count, tau, tokens / max(now - moment, 1e-6))
                moment, tokens, total, count = now, 0, 0.0, 0
            self._save()
        with torch.no_grad():
            for parameter, kept in zip(self.heads.drafting(), self.kept, strict=True):
                parameter.copy_(kept)

    def _indices(self) -> list[int]:
        """The batch of this step: a function of seed and step alone, so that a resumed run goes on where it was."""
        passed = epoch = 0
        while True:
            order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.pace.seed + epoch))
            groups = by_tokens([self.train[i] for i in order], self.sizes, self.pace.batch_tokens)
            if self.step < passed + len(groups):
                return groups[self.step - passed]
            passed, epoch = passed + len(groups), epoch + 1

    def _learn(self, indices: Sequence[int]) -> float:
        rate = self.pace.lr * schedule(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.material.batch(indices)
        with torch.no_grad():
            target_TV = targets(self.heads.head_VE, batch.hidden_TE)
        value = loss(self.heads, batch, target_TV)
        if not math.isfinite(value.item()):
            raise Refused(f"the loss became {value.item()} at step {self.step}: lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(self.heads.drafting(), CLIP)
        self.optimizer.step()
        self.step += 1
        return value.item()

    def _look(self) -> float:
        tau = self._tau()
        if tau > self.best:
            self.best, self.missed = tau, 0
            self.kept = [parameter.detach().clone() for parameter in self.heads.drafting()]
        else:
            self.missed += 1
        return tau

    def _tau(self) -> float:
        shares = per_request(self.heads, self.material, self.stop)
        return 1 + sum(map(sum, shares)) / max(1, len(shares))

    def _save(self) -> None:
        if self._file is None or time.monotonic() - self._saved < CHECKPOINT_SECONDS:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{kind}.{i}": tensor.detach() for i, kind, tensor in self._tensors()}
        progress = {"name": self._name, "step": str(self.step), "best": repr(self.best), "missed": str(self.missed)}
        draft = self._file.with_suffix(".draft")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, metadata=progress)
        os.replace(draft, self._file)
        self._saved = time.monotonic()

    def _tensors(self) -> list[tuple[int, str, torch.Tensor]]:
        found = []
        for i, parameter in enumerate(self.heads.drafting()):
            state = self.optimizer.state[parameter]
            found += [(i, "now", parameter), (i, "best", self.kept[i])]
            found += [(i, "mean", state["exp_avg"]), (i, "square", state["exp_avg_sq"])]
        return found

    def _resume(self) -> bool:
        """Go on from the checkpoint of an attempt that trained the same on as much, if there is one."""
        if self._file is None or not self._file.exists():
            return False
        try:
            with safe_open(self._file, "pt") as file, torch.no_grad():
                known = file.metadata() or {}
                if known.get("name") != self._name:
                    return False
                for i, parameter in enumerate(self.heads.drafting()):
                    parameter.copy_(file.get_tensor(f"now.{i}"))
                    self.kept[i] = file.get_tensor(f"best.{i}")
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(known["step"])),
                        "exp_avg": file.get_tensor(f"mean.{i}"),
                        "exp_avg_sq": file.get_tensor(f"square.{i}"),
                    }
        except (SafetensorError, OSError):
            return False
        self.step, self.best, self.missed = int(known["step"]), float(known["best"]), int(known["missed"])
        return True


def schedule(step: int, steps: int) -> float:
    """Warm-up, then half a cosine; in (0, 1]."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def per_request(heads: Heads, material: Material, indices: Sequence[int], *, greedy: bool = False) -> list[list[float]]:
    """For each request the share of its places at which the first 1, 2 .. K drafts were all right, under its own noise
    (or greedily). One plus their sum is what a step yields."""
    found: list[list[float]] = []
    sizes = [len(request.answer) for request in material.requests]
    for group in by_tokens(list(indices), sizes, JUDGED_TOKENS):
        batch = material.batch(group, keys=not greedy)
        if greedy:
            batch.heat_T.zero_()
        lengths_T = lengths(heads, batch, material.tokens_V)
        for part in torch.split(lengths_T, [sizes[index] for index in group]):
            found.append([float((part > head + 1).float().mean()) for head in range(heads.count)])
    return found


def fit_confidence(heads: Heads, material: Material, indices: Sequence[int], seed: int) -> None:
    """Teach each head how sure to be: whether its draft matched what was logged, where all before it did."""
    batch = _sample(material, indices, seed)
    alive_T = torch.ones(len(batch.tokens_T), dtype=torch.bool)
    for head, drafted in enumerate(drafts(heads, batch, material.tokens_V)):
        asked_N = alive_T[drafted.rows_N]
        if int(asked_N.sum()) > 1:
            weight, bias = logistic(drafted.features_NF[asked_N], drafted.hit_N[asked_N].float())
            with torch.no_grad():
                heads.confidence[head].copy_(weight)
                heads.confidence_bias[head].copy_(bias)
        hit_T = torch.zeros_like(alive_T)
        hit_T[drafted.rows_N] = drafted.hit_N
        alive_T &= hit_T


def _sample(material: Material, indices: Sequence[int], seed: int) -> Batch:
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, tokens = [], 0
    for place in order:
        if tokens >= CONFIDENCE_TOKENS:
            break
        chosen.append(indices[place])
        tokens += len(material.requests[indices[place]].answer)
    return material.batch(chosen, keys=True)


def logistic(features_NF: torch.Tensor, hit_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [F] and bias of a logistic regression, by Adam on standardised features."""
    mean_F, spread_F = features_NF.mean(0), features_NF.std(0).clamp_min(1e-4)
    scaled_NF = (features_NF - mean_F) / spread_F
    weight = torch.zeros(features_NF.shape[1], requires_grad=True)
    bias = torch.logit(hit_N.mean().clamp(0.01, 0.99)).requires_grad_(True)
    optimizer = torch.optim.AdamW([weight, bias], lr=CONFIDENCE_LR, weight_decay=CONFIDENCE_DECAY)
    for _ in range(CONFIDENCE_STEPS):
        value = torch.nn.functional.binary_cross_entropy_with_logits(scaled_NF @ weight + bias, hit_N)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        optimizer.step()
    with torch.no_grad():
        plain_F = weight / spread_F
        return plain_F, bias - (plain_F * mean_F).sum()
