"""Train the starter model from scratch on the grammars' base answers.

    python -m examples.train_starter --output DIR [--steps N] [--seed S] [--threads T]

Same seed, steps and thread count give the same weights: examples come from seeded grammars, and the learning-rate
schedule counts steps, not seconds. House answers are never shown to the model.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

# Spinning threads starve each other as soon as anything else runs here: 20 steps took minutes instead of one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from examples.grammars.common import stream
from examples.grammars.simulate import APPLICATIONS
from examples.starter_data import Batch, batches, copying_batches
from examples.starter_generate import greedy_answers
from examples.starter_init import start_copying
from examples.starter_model import save_starter, starter_config
from examples.starter_tokenizer import train_tokenizer


@dataclass(frozen=True, slots=True)
class Plan:
    """What a training run depends on; `rows` is the micro-batch size per application."""

    steps: int
    seed: int
    rows: dict[str, int]
    matrix_rate: float = 0.02
    vector_rate: float = 1e-3
    warmup_steps: int = 50
    prompt_weight: float = 0.1
    copying_rows: int = 32
    copying_share: float = 0.25  # of the steps, from the first on
    clip: float = 1.0


STANDARD_ROWS = {"match": 12, "entities": 16, "chat": 6}


class Optimizers:
    """Muon for the layers' matrices, AdamW for embeddings and norms; one shared schedule.

    Muon learns to copy names in about half the steps AdamW needs here.
    """

    def __init__(self, model: LlamaForCausalLM, plan: Plan) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self._plan = plan
        self._pairs = [
            (torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01), plan.matrix_rate),
            (torch.optim.AdamW(others, lr=plan.vector_rate, betas=(0.9, 0.98), weight_decay=0.0), plan.vector_rate),
        ]

    def step(self, step: int) -> None:
        factor = schedule(step, self._plan)
        for optimizer, rate in self._pairs:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def schedule(step: int, plan: Plan) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def batch_loss(model: LlamaForCausalLM, batch: Batch, prompt_weight: float) -> tuple[Tensor, Tensor]:
    """The loss to descend and the answers' mean loss; prompts teach a little, which forms copying early."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state.flatten(0, 1)
        answer_logits = model.lm_head(hidden[batch.positions])
    answer = functional.cross_entropy(answer_logits.float(), batch.targets)
    if prompt_weight == 0:
        return answer, answer.detach()
    following = batch.ids.flatten()[1:]
    inside = (following != model.config.pad_token_id).nonzero()[:, 0]
    sampled = inside[:: max(1, len(inside) // 512)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prompt_logits = model.lm_head(hidden[sampled])
    prompt = functional.cross_entropy(prompt_logits.float(), following[sampled])
    return answer + prompt_weight * prompt, answer.detach()


def fresh_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    start_copying(model)
    return model


def train(
    model: LlamaForCausalLM, tokenizer: Tokenizer, plan: Plan
) -> Iterator[tuple[LlamaForCausalLM, dict[str, float]]]:
    """Yield the model and the answer losses after each step; the caller must not change the model."""
    optimizers = Optimizers(model, plan)
    sources = {app: batches(tokenizer, APPLICATIONS[app], plan.seed, rows) for app, rows in plan.rows.items()}
    copying = copying_batches(tokenizer, plan.seed, plan.copying_rows)
    for step in range(plan.steps):
        model.train()
        losses = {}
        prompt_weight = plan.prompt_weight * (1 - step / plan.steps)
        for app, source in sources.items():
            loss, answer = batch_loss(model, next(source), prompt_weight)
            (loss / len(sources)).backward()  # type: ignore[no-untyped-call]
            losses[app] = answer.item()
        if step < plan.copying_share * plan.steps:
            loss, answer = batch_loss(model, next(copying), 0)
            (loss / len(sources)).backward()  # type: ignore[no-untyped-call]
            losses["copying"] = answer.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizers.step(step)
        yield model, losses


def held_out_scores(model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int, count: int) -> dict[str, float]:
    """The share of held-out prompts per application whose greedy answer keeps the base rules."""
    scores = {}
    for app, application in APPLICATIONS.items():
        examples = list(islice(stream(application, "held_out", seed), count))
        answers = greedy_answers(model, tokenizer, [e.messages for e in examples])
        good = [application.base_ok(e.messages, a) for e, a in zip(examples, answers, strict=True)]
        scores[app] = sum(good) / count
    return scores


def _start(directory: Path | None, seed: int) -> tuple[LlamaForCausalLM, Tokenizer]:
    if directory is not None:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        return LlamaForCausalLM.from_pretrained(directory, dtype="float32"), tokenizer
    tokenizer = train_tokenizer(seed)
    return fresh_model(starter_config(tokenizer), seed), tokenizer


def _format(values: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in values.items())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the starter model from scratch.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--score-every", type=int, default=200, help="steps between held-out scores and checkpoints")
    parser.add_argument("--score-prompts", type=int, default=64)
    parser.add_argument("--start-from", type=Path, help="continue with the weights and tokenizer of this directory")
    parser.add_argument("--rows", type=int, nargs=3, default=list(STANDARD_ROWS.values()), metavar=tuple(STANDARD_ROWS))
    parser.add_argument("--copying-share", type=float, default=0.25)
    parser.add_argument("--matrix-rate", type=float, default=0.02)
    parser.add_argument("--prompt-weight", type=float, default=0.1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs 5 %
    model, tokenizer = _start(options.start_from, options.seed)
    plan = Plan(
        options.steps,
        options.seed,
        dict(zip(STANDARD_ROWS, options.rows, strict=True)),
        matrix_rate=options.matrix_rate,
        prompt_weight=options.prompt_weight,
        copying_share=options.copying_share,
    )
    started = time.monotonic()
    for step, (trained, losses) in enumerate(train(model, tokenizer, plan), start=1):
        last = step == plan.steps
        if step % 20 == 0 or last:
            elapsed = time.monotonic() - started
            print(
                f"step {step}/{plan.steps} loss {_format(losses)} | {elapsed:.0f} s, {elapsed / step:.2f} s/step",
                flush=True,
            )
        if step % options.score_every == 0 or last:
            save_starter(trained, tokenizer, options.output)
            scores = held_out_scores(trained, tokenizer, options.seed, options.score_prompts)
            print(f"step {step}/{plan.steps} held-out {_format(scores)}", flush=True)


if __name__ == "__main__":
    main()
