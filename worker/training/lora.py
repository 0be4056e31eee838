"""The trainer process: `python -m worker.training.lora --spec spec.json`. LoRA by PEFT, the loop by TRL.

Rows come as token ids with what is learned of them, so nothing here renders, truncates or masks. Reports go to the
original stdout, everything libraries print goes to stderr. The process dies with its worker.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from worker.training import checkpoints, launch, sweep, trainers, validation
from worker.training.loading import load, on_cuda, require_quantizer
from worker.training.process import Refused, refusing, serve
from worker.training.reporting import marking, reporting, validating
from worker.training.spec import ReferenceRow, Report, Spec, Stage, decode_spec

Columns = list[dict[str, Any]]
Tell = Callable[[Report], None]


def main() -> int:
    parser = argparse.ArgumentParser(description="Train one LoRA adapter as a job's child process.")
    parser.add_argument("--spec", type=Path, required=True)
    file = parser.parse_args().spec
    spec = decode_spec(file.read_bytes())
    if launch.is_wanted(spec):
        return refusing(lambda: launch.become(spec, file))
    return serve(launch.parent_of(spec), launch.only_first(lambda report: train(spec, report)))


def train(spec: Spec, report: Tell) -> None:
    """Load, confirm, try the candidates of a sweep, train, save into `spec.out`. Raises Refused."""
    from transformers import AutoTokenizer

    require_quantizer(spec.quantize)
    on_gpu = on_cuda(spec)
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    compared = confirm(spec.reference, tokenizer)
    passed_over = len(spec.reference) - compared
    report(Stage(name="confirmed", detail={"prompts": compared, "passed_over": passed_over}))
    rows = [json.loads(line) for line in Path(spec.rows_file).read_text(encoding="utf-8").splitlines()]
    held_back = validation.read(spec.validation_file)
    chosen = swept(spec, tokenizer, rows, held_back, report, on_gpu=on_gpu)
    _train_once(chosen, tokenizer, rows, held_back, report, on_gpu=on_gpu)


def _train_once(
    spec: Spec,
    tokenizer: Any,  # noqa: ANN401 - transformers ships no types
    rows: Columns,
    held_back: list[validation.Row],
    report: Tell,
    *,
    on_gpu: bool,
) -> None:
    steps = trainers.planned_steps(len(rows), spec)
    callbacks = [reporting(report, steps), validating(report, held_back, steps), marking(spec.fingerprint)]
    model = load(spec, longest(rows), on_gpu=on_gpu)
    trainer = trainers.make(spec, model, tokenizer, rows, callbacks, on_gpu=on_gpu)
    report(Stage(name="loaded", detail={"rows": len(rows), "device": "cuda" if on_gpu else "cpu"}))
    if spec.resume:
        report(Stage(name="resumed", detail={"checkpoint": Path(spec.resume).name}))
    result = trainer.train(resume_from_checkpoint=spec.resume or None)
    loss = next((line["loss"] for line in reversed(trainer.state.log_history) if "loss" in line), math.nan)
    require_learned(spec, loss)
    if trainer.is_world_process_zero():
        save(trainer.model, Path(spec.out), spec.base)
    report(Stage(name="saved", detail={"loss": loss, "steps": result.global_step}))


def require_learned(spec: Spec, loss: float) -> None:
    """Raises Refused for a loss that says nothing was learned. With pairs believed to be the wrong way, it may fall
    below 0."""
    if not math.isfinite(loss) or (loss <= 0 and not spec.label_smoothing):
        raise Refused(f"the training loss is {loss}: nothing was learned")


def swept(
    spec: Spec,
    tokenizer: Any,  # noqa: ANN401
    rows: Columns,
    held_back: list[validation.Row],
    report: Tell,
    *,
    on_gpu: bool,
) -> Spec:
    """The spec with the best candidate's values; as it is when no sweep was asked for. Raises Refused."""
    if spec.sweep < 2 or spec.resume:  # a checkpoint is of the training that follows the sweep
        found = checkpoints.decided(Path(spec.out).parent) if spec.resume else None
        return msgspec.structs.replace(spec, **(found or {}))
    if not held_back:
        raise Refused("there are too few groups to hold some back: a sweep has nothing to compare its candidates on")

    def trial(tried: Spec, steps: int) -> validation.Measured:
        plain = msgspec.structs.replace(tried, max_steps=steps, checkpoint_steps=0)
        model = load(plain, longest(rows), on_gpu=on_gpu)
        trainer = trainers.make(plain, model, tokenizer, rows, [], on_gpu=on_gpu)
        trainer.train()
        return validation.measure(trainer.model, held_back)

    work = Path(spec.out).parent
    changes = sweep.halve(
        spec, lambda one: trainers.planned_steps(len(rows), one), trial, report, work / checkpoints.TRIALS
    )
    (work / checkpoints.DECIDED).write_text(json.dumps(changes), encoding="utf-8")
    report(Stage(name="swept", detail={"candidates": spec.sweep, "chosen": changes}))
    return msgspec.structs.replace(spec, **changes)


def longest(rows: Columns) -> int:
    """Tokens of the longest sequence."""
    return max(len(row.get("input_ids") or [*row["prompt_ids"], *_longest_answer(row)]) for row in rows)


def _longest_answer(row: dict[str, Any]) -> list[int]:
    names = ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")
    return max((row[name] for name in names if name in row), key=len)


def confirm(reference: Sequence[ReferenceRow], tokenizer: Any) -> int:  # noqa: ANN401 - transformers ships no types
    """Two renderers that share no code must agree on the token ids, or one of them is wrong. Raises Refused.

    How many were compared: rows that spell a special token are passed over.
    """
    compared = 0
    for row in reference:
        said = json.dumps([row.messages, row.tools], ensure_ascii=False)
        if any(token in said for token in tokenizer.all_special_tokens):
            continue  # serving keeps a typed control token as plain text; transformers does not
        with _as_of(row.at):
            ids = tokenizer.apply_chat_template(
                row.messages, tools=row.tools or None, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        if list(ids) != row.ids:
            raise Refused("transformers renders a prompt to other token ids than the serving engine: template drift")
        compared += 1
    return compared


@contextmanager
def _as_of(at: datetime | None) -> Iterator[None]:
    """Sets the clock that transformers lets templates read; it hands them nothing of ours that can be called."""
    from transformers.utils import chat_template_utils

    clock = chat_template_utils.datetime
    chat_template_utils.datetime = SimpleNamespace(now=lambda: at.astimezone() if at else clock.now())
    try:
        yield
    finally:
        chat_template_utils.datetime = clock


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
