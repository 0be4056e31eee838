"""TRL's trainer for each kind of run, given rows that are token ids already.

TRL 1.16's traps, read in its source: gradient checkpointing is on by default, learning rates are a thousandth of what
an adapter needs, fully masked rows are dropped silently, DPO and KTO tokenise what they are given whatever it is, and
KTO takes rows in their order because each brings the answer it is compared with.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worker.training.checkpoints import TRAINER
from worker.training.loading import bf16_pays
from worker.training.process import Refused
from worker.training.spec import Spec

REPORTS = 50
CONFIRMED_ROWS = 64
KEPT_CHECKPOINTS = 2  # the one being written, and the last that is whole
Columns = dict[str, Any]


def make(
    spec: Spec,
    model: Any,  # noqa: ANN401 - transformers, PEFT and TRL ship no types
    tokenizer: Any,  # noqa: ANN401
    rows: Sequence[Columns],
    callbacks: Sequence[Any],
    *,
    on_gpu: bool,
) -> Any:  # noqa: ANN401
    """The trainer. Raises Refused when it would train on something else than `rows`."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback

    adapter = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=0.0, target_modules=sorted(spec.targets),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    kind, settings = _classes(spec)
    trainer = kind(
        model=model,
        args=settings(**_common(spec, len(rows), on_gpu=on_gpu), **_own(spec)),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    confirm(trainer, rows)
    return trainer


def _classes(spec: Spec) -> tuple[Any, Any]:
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    def as_they_are(_self: object, dataset: Any, *_: object) -> Any:  # noqa: ANN401
        """In the place of TRL's tokenisation: the rows are the serving engine's own ids."""
        return dataset

    class PairsAsTheyAre(DPOTrainer):  # type: ignore[misc]
        _prepare_dataset = as_they_are

    class MarksAsTheyAre(KTOTrainer):  # type: ignore[misc]
        _prepare_dataset = as_they_are

        def compute_loss(self, model: Any, inputs: Columns, *args: Any, **named: Any) -> Any:  # noqa: ANN401
            with _outputs_learned_from(model) as seen:
                loss = super().compute_loss(model, inputs, *args, **named)
            return loss + spec.sft_weight * imitation(seen[-1].log_probs, inputs) if seen and spec.sft_weight else loss

    return {
        "sft": (SFTTrainer, SFTConfig), "dpo": (PairsAsTheyAre, DPOConfig), "kto": (MarksAsTheyAre, KTOConfig),
    }[spec.kind]  # fmt: skip


def imitation(log_probs: Any, batch: Columns) -> Any:  # noqa: ANN401
    """Nats a token of a batch's answers marked right; 0 when it has none. TRL's DPO calls this the loss "sft", its KTO
    lacks it. `log_probs` [rows, tokens − 1]."""
    right = batch["label"].bool().to(log_probs.device)
    learned = batch["completion_mask"].to(log_probs.device)[right, 1:].bool()
    return -log_probs[right][learned].mean() if right.any() else 0.0


@contextmanager
def _outputs_learned_from(model: Any) -> Iterator[list[Any]]:  # noqa: ANN401
    """What the model's forward passes return while gradients are kept."""
    import torch

    seen: list[Any] = []
    hook = model.register_forward_hook(lambda *call: seen.append(call[-1]) if torch.is_grad_enabled() else None)
    try:
        yield seen
    finally:
        hook.remove()


def _common(spec: Spec, rows: int, *, on_gpu: bool) -> Columns:
    steps = planned_steps(rows, spec)
    saving = {"save_strategy": "no"} if not spec.checkpoint_steps else {
        "save_strategy": "steps", "save_steps": spec.checkpoint_steps, "save_total_limit": KEPT_CHECKPOINTS,
    }  # fmt: skip
    return {
        "output_dir": str(Path(spec.out).parent / TRAINER),
        "num_train_epochs": spec.epochs,
        "max_steps": steps,
        "per_device_train_batch_size": spec.batch_size,
        "learning_rate": spec.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(spec.warmup * steps),
        "weight_decay": 0.0,
        "seed": spec.seed,
        "bf16": bf16_pays(on_gpu=on_gpu),
        "use_cpu": not on_gpu,
        "gradient_checkpointing": False,
        "max_length": None,
        "dataloader_pin_memory": on_gpu,
        "report_to": "none",
        "logging_steps": max(1, steps // REPORTS),
        "logging_first_step": True,
        "disable_tqdm": True,
        **saving,
    }


def _own(spec: Spec) -> Columns:
    """What only one kind is told. What the base says of each answer is computed once, not in every epoch."""
    if spec.kind == "sft":
        return {"dataset_kwargs": {"skip_prepare_dataset": True}}
    # TRL keeps what it computed in a file of each rank's own, which the others do not find.
    alone = spec.devices == 1
    if spec.kind == "kto":
        marks = {"desirable_weight": spec.good_weight, "undesirable_weight": spec.bad_weight}
        return {"beta": spec.beta, "precompute_ref_log_probs": alone, **marks}
    # "robust" is the sigmoid loss when nothing is believed to be the wrong way round.
    losses = ["robust"] + (["sft"] if spec.sft_weight else [])
    weights = [1.0] + ([spec.sft_weight] if spec.sft_weight else [])
    return {
        "beta": spec.beta, "precompute_ref_log_probs": alone, "label_smoothing": spec.label_smoothing,
        "loss_type": losses, "loss_weights": weights,
    }  # fmt: skip


def planned_steps(rows: int, spec: Spec) -> int:
    """Optimiser steps of the whole run."""
    batch = spec.batch_size * spec.devices
    steps = max(1, math.ceil(spec.epochs * math.ceil(rows / batch)))
    return min(steps, spec.max_steps) if spec.max_steps else steps


def confirm(trainer: Any, rows: Sequence[Columns]) -> None:  # noqa: ANN401
    """The trainer's own collator must give back the ids and masks of the rows. Raises Refused."""
    if len(trainer.train_dataset) != len(rows):
        raise Refused(f"{len(rows)} rows went in, {len(trainer.train_dataset)} would be trained")
    for row in rows[:CONFIRMED_ROWS]:
        batch = trainer.data_collator([dict(row)])
        if _seen(batch) != _meant(row):
            raise Refused("the trainer would train on other tokens or labels than the rows say")
        if not any(any(learned) for _, learned in _meant(row)):
            raise Refused("all labels of a row are masked: nothing would be learned from it")


def _meant(row: Columns) -> list[tuple[list[int], list[bool]]]:
    """Each sequence of a row, and which of its tokens are learned."""
    if "labels" in row:
        return [(row["input_ids"], [label != -100 for label in row["labels"]])]
    names = ("chosen_ids", "rejected_ids") if "chosen_ids" in row else ("completion_ids",)
    prompt = row["prompt_ids"]
    return [([*prompt, *row[name]], [False] * len(prompt) + [True] * len(row[name])) for name in names]


def _seen(batch: Any) -> list[tuple[list[int], list[bool]]]:  # noqa: ANN401
    """The same, read out of a collated batch without its padding."""
    seen = []
    for place, ids in enumerate(batch["input_ids"]):
        kept = batch["attention_mask"][place].bool() if "attention_mask" in batch else ids >= 0
        learned = batch["labels"][place] != -100 if "labels" in batch else batch["completion_mask"][place].bool()
        seen.append((ids[kept].tolist(), learned[kept].tolist()))
    return seen
