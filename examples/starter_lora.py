"""Teach the starter model an application's house rules with a LoRA, through the same libraries as the platform."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from examples.grammars.common import Message


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyper-parameters that teach the starter model a house rule from a few hundred corrections."""

    rank: int = 16
    alpha: int = 32
    learning_rate: float = 2e-3
    epochs: int = 3
    batch_size: int = 8
    schedule: str = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    seed: int = 7

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def training_rows(prompts: Sequence[Sequence[Message]], corrections: Sequence[str]) -> Dataset:
    """Conversational prompt and completion columns; TRL then supervises the completion and its end token only."""
    rows = [
        {"prompt": list(prompt), "completion": [{"role": "assistant", "content": correction}]}
        for prompt, correction in zip(prompts, corrections, strict=True)
    ]
    return Dataset.from_list(rows)


def train_lora(base: Path, rows: Dataset, recipe: Recipe, work: Path) -> Any:  # noqa: ANN401 - a PEFT model
    """The base model in `base` with a freshly trained adapter; `work` holds the trainer's files."""
    settings = SFTConfig(
        output_dir=str(work),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        max_length=1024,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        logging_steps=25,
        disable_tqdm=True,
    )
    adapter = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
        args=settings,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=adapter,
    )
    trainer.train()
    return trainer.model
