"""The trainer process: `python -m worker.training.lora --spec spec.json`. LoRA by PEFT, the loop by TRL.

Rows come as token ids with labels, so nothing here renders, truncates or masks. Reports go to the original stdout,
everything libraries print goes to stderr. The process dies with its worker.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from worker.training.process import Refused, serve
from worker.training.spec import Progress, Report, Spec, Stage, decode_spec

REPORTS = 50
EAGER_TOKENS = 512


def main() -> int:
    parser = argparse.ArgumentParser(description="Train one LoRA adapter as a job's child process.")
    parser.add_argument("--spec", type=Path, required=True)
    spec = decode_spec(parser.parse_args().spec.read_bytes())
    return serve(spec.parent, lambda report: train(spec, report))


def train(spec: Spec, report: Callable[[Report], None]) -> None:
    """Load, confirm, train, save into `spec.out`. Raises Refused."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    _confirm(spec, tokenizer)
    report(Stage(name="confirmed", detail={"prompts": len(spec.reference)}))
    rows = [json.loads(line) for line in Path(spec.rows_file).read_text(encoding="utf-8").splitlines()]
    on_gpu = spec.device != "cpu" and torch.cuda.is_available()
    if spec.device == "cuda" and not on_gpu:
        raise Refused("WHET_DEVICE is cuda, but torch sees no CUDA device")
    dtype = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
    longest = max(len(row["input_ids"]) for row in rows)
    model = AutoModelForCausalLM.from_pretrained(
        spec.model, dtype=dtype, attn_implementation=_attention(longest, on_gpu=on_gpu)
    )
    trainer = _trainer(spec, model, tokenizer, Dataset.from_list(rows), report, on_gpu=on_gpu)
    if len(trainer.train_dataset) != len(rows):  # TRL drops rows it finds fully masked, silently
        raise Refused(f"{len(rows)} rows went in, {len(trainer.train_dataset)} would be trained")
    report(Stage(name="loaded", detail={"rows": len(rows), "device": "cuda" if on_gpu else "cpu"}))
    result = trainer.train()
    if not math.isfinite(result.training_loss) or result.training_loss <= 0:
        raise Refused(f"the training loss is {result.training_loss}: nothing was learned")
    save(trainer.model, Path(spec.out), spec.base)
    report(Stage(name="saved", detail={"loss": result.training_loss, "steps": result.global_step}))


def _confirm(spec: Spec, tokenizer: Any) -> None:  # noqa: ANN401 - transformers ships no types
    """Two renderers that share no code must agree on the token ids, or one of them is wrong."""
    for row in spec.reference:
        if any(token in json.dumps(row.messages, ensure_ascii=False) for token in tokenizer.all_special_tokens):
            continue  # serving keeps a typed control token as plain text; transformers does not
        ids = tokenizer.apply_chat_template(row.messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        if list(ids) != row.ids:
            raise Refused("transformers renders a prompt to other token ids than the serving engine: template drift")


def _trainer(
    spec: Spec,
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    rows: Any,  # noqa: ANN401
    report: Callable[[Report], None],
    *,
    on_gpu: bool,
) -> Any:  # noqa: ANN401
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    steps = planned_steps(len(rows), spec)
    settings = SFTConfig(
        output_dir=str(Path(spec.out).parent / "trainer"),
        num_train_epochs=spec.epochs,
        max_steps=steps,
        per_device_train_batch_size=spec.batch_size,
        learning_rate=spec.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(spec.warmup * steps),
        weight_decay=0.0,
        seed=spec.seed,
        bf16=_bf16_pays(on_gpu),
        use_cpu=not on_gpu,
        gradient_checkpointing=False,  # TRL 1.16 turns it on: a third more compute to save memory nobody lacks
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        dataloader_pin_memory=on_gpu,
        save_strategy="no",
        report_to="none",
        logging_steps=max(1, steps // REPORTS),
        logging_first_step=True,
        disable_tqdm=True,
    )
    adapter = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=0.0,
        target_modules=sorted(spec.targets),
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[_reporting(report, steps)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def planned_steps(rows: int, spec: Spec) -> int:
    """Optimiser steps of the whole run."""
    steps = max(1, math.ceil(spec.epochs * math.ceil(rows / spec.batch_size)))
    return min(steps, spec.max_steps) if spec.max_steps else steps


def _attention(longest: int, *, on_gpu: bool) -> str:
    """On CPU the plain kernel took 0.31 s of processor time a step of 8 x 150 tokens, torch's fused one 0.40; it needs
    memory for the square of the length, though."""
    return "sdpa" if on_gpu or longest > EAGER_TOKENS else "eager"


def _bf16_pays(on_gpu: bool) -> bool:
    """On CPUs without the instructions bf16 is emulated, slower than fp32."""
    import torch

    if on_gpu:
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _reporting(report: Callable[[Report], None], steps: int) -> Any:  # noqa: ANN401
    """A callback that turns the trainer's logs into Progress reports."""
    from transformers import TrainerCallback

    class Reporting(TrainerCallback):  # type: ignore[misc] # transformers ships no types
        def __init__(self) -> None:
            self.tokens = 0.0
            self.moment = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:  # noqa: ANN401, ARG002
            if "loss" not in logs:
                return
            now, tokens = time.monotonic(), float(logs.get("num_tokens", self.tokens))
            rate = (tokens - self.tokens) / max(now - self.moment, 1e-6)
            self.moment, self.tokens = now, tokens
            if not math.isfinite(logs["loss"]):
                raise Refused(f"the loss became {logs['loss']} at step {state.global_step}: lower the learning rate")
            report(
                Progress(
                    step=state.global_step,
                    steps=steps,
                    loss=float(logs["loss"]),
                    lr=float(logs["learning_rate"]),
                    grad_norm=float(logs["grad_norm"]) if "grad_norm" in logs else None,
                    tokens_per_second=rate,
                    memory_mb=_memory_mb(),
                    accuracy=logs.get("mean_token_accuracy"),
                )
            )

    return Reporting()


def _memory_mb() -> float:
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20


def save(model: Any, directory: Path, base: str) -> None:  # noqa: ANN401
    """PEFT's two files, with nothing in them that depends on this machine or on the order of a set."""
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(directory, safe_serialization=True)
    config_file = directory / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
