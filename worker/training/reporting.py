"""Callbacks of the trainer: what it tells the worker while it works, and the marks of its whole checkpoints."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from worker.training import checkpoints, validation
from worker.training.process import Refused
from worker.training.spec import Progress, Report, Validated

VALIDATIONS = 8
Tell = Callable[[Report], None]


def reporting(tell: Tell, steps: int) -> Any:  # noqa: ANN401 - transformers ships no types
    """Turns the trainer's logs into Progress reports."""
    from transformers import TrainerCallback

    class Reporting(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.tokens, self.moment = 0.0, time.monotonic()
            self.first, self.began = 0, self.moment

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
            self.first, self.began = state.global_step, time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:  # noqa: ANN401, ARG002
            if "loss" not in logs:
                return
            now, tokens = time.monotonic(), float(logs.get("num_tokens", self.tokens))
            rate = max(0.0, tokens - self.tokens) / max(now - self.moment, 1e-6)
            self.moment, self.tokens = now, tokens
            _require_finite(logs, state.global_step)
            each = (now - self.began) / max(1, state.global_step - self.first)
            tell(_progress(logs, state.global_step, steps, rate, (steps - state.global_step) * each))

    return Reporting()


def _require_finite(logs: dict[str, Any], step: int) -> None:
    if not math.isfinite(logs["loss"]):
        raise Refused(f"the loss became {logs['loss']} at step {step}: lower the learning rate")


def _progress(logs: dict[str, Any], step: int, steps: int, rate: float, eta: float) -> Progress:
    def figure(name: str) -> float | None:
        return float(logs[name]) if name in logs else None

    return Progress(
        step=step,
        steps=steps,
        loss=float(logs["loss"]),
        lr=float(logs["learning_rate"]),
        grad_norm=figure("grad_norm"),
        tokens_per_second=rate,
        memory_mb=memory_mb(),
        accuracy=figure("mean_token_accuracy"),
        margin=figure("rewards/margins"),
        preferred=figure("rewards/accuracies"),
        kl=figure("kl"),
        eta=eta,
    )


def validating(tell: Tell, rows: Sequence[validation.Row], steps: int) -> Any:  # noqa: ANN401
    """Measures the validation rows a few times, the last time at the end."""
    from transformers import TrainerCallback

    every = max(1, math.ceil(steps / VALIDATIONS))

    class Validating(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
            if rows and (state.global_step % every == 0 or state.global_step == steps):
                found = validation.measure(model, rows)
                tell(Validated(step=state.global_step, loss=found.loss, preferred=found.preferred))

    return Validating()


def marking(fingerprint: str) -> Any:  # noqa: ANN401
    """Marks each checkpoint whole once everything of it is written."""
    from transformers import TrainerCallback

    class Marking(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
            if state.is_world_process_zero:
                written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                checkpoints.mark(written, state.global_step, fingerprint)

    return Marking()


def memory_mb() -> float:
    """The device's peak on CUDA, else this process's resident set."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20
