"""Everything that can be known wrong before any compute: drifted prompts, rows that teach nothing, leaked prompts.

A run whose labels are all masked trains to loss 0 and "succeeds" (trl#6668); a truncated row teaches to stop
mid-sentence. Such rows are listed and left out, and when they are many the run is refused.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.text.supervision import prompt_ids
from engine.text.tokenizer import Tokenizer
from services.store.examples import digest_of
from services.store.models import Example
from services.store.traffic import Rendering
from worker.training.rows import AnyRow, Bodies, Marked, Pair, asked_of, make_rows, usable

MOST_REFUSED_SHARE = 0.1
LISTED = 100
RENDERING_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Preflight:
    """`rows` may be trained unless `reasons` is not empty; `report` is what the run's page shows."""

    rows: list[AnyRow]
    report: dict[str, Any]
    reasons: list[str] = field(default_factory=list)


def check(
    tokenizer: Tokenizer,
    train: Sequence[Example],
    held_out: Sequence[Example],
    bodies: Bodies,
    max_length: int,
    kind: str = "sft",
    served: Rendering | None = None,
) -> Preflight:
    """Look at everything. `bodies` holds the logged originals that still exist, by interaction id; `served` is what the
    newest prompt was rendered by, where one was served since this tokenizer's files lie here.
    """
    examples = [example for example in train if usable(kind, example)]
    try:
        rows = make_rows(tokenizer, examples, bodies, kind)
    except ValueError as error:
        return Preflight([], {"verdict": "refused", "reasons": [str(error)]}, [str(error)])
    limit = min(max_length, context_length(tokenizer.directory))
    causes = [_refusal(row, limit) for row in rows]
    kept = [row for row, cause in zip(rows, causes, strict=True) if cause is None]
    refused = [(row.example_id, cause) for row, cause in zip(rows, causes, strict=True) if cause is not None]
    template = compare_with_log(tokenizer, [*examples, *held_out], bodies)
    leaked = leakage(examples, held_out)
    masked = sum(_is_masked(row, limit) for row in rows)
    reasons = [
        *_row_reasons(len(rows), [cause for _, cause in refused], masked), *_kind_reasons(kind, kept),
        *_template_reasons(template), *_serving_reasons(template, served), *_leak_reasons(leaked),
    ]  # fmt: skip
    report = {
        "verdict": "refused" if reasons else "ok",
        "reasons": reasons,
        "rows": len(rows),
        "rows_trained": len(kept),
        "not_for_this_kind": len(train) - len(examples),
        "refused": dict(Counter(cause for _, cause in refused)),
        "refused_rows": [{"example": key, "cause": cause} for key, cause in refused[:LISTED]],
        "no_label": masked,
        "max_length": limit,
        "supervised_tokens": histogram([sum(map(len, row.answers)) for row in kept]),
        "longest_row": max((_length(row) for row in kept), default=0),
        "template": template,
        "leakage": leaked,
        **_marks(kept),
    }
    return Preflight(kept, report, reasons)


def _refusal(row: AnyRow, limit: int) -> str | None:
    if any(len(answer) < 2 for answer in row.answers):
        return "nothing to learn: the answer is empty"
    if len(row.prompt) >= limit:
        return "the prompt alone is too long"
    if _length(row) > limit:
        return "the answer would be truncated"
    if isinstance(row, Pair) and row.chosen == row.rejected:
        return "both answers of the pair are the same"
    return None


def _length(row: AnyRow) -> int:
    return len(row.prompt) + max(map(len, row.answers))


def _is_masked(row: AnyRow, limit: int) -> bool:
    """Whether nothing of the row would be learned: no label is left within `limit`."""
    return len(row.prompt) >= limit or all(len(answer) < 2 for answer in row.answers)


def _marks(rows: Sequence[AnyRow]) -> dict[str, Any]:
    """How many answers are marked right and wrong, where that is what is learned."""
    marks = [row.good for row in rows if isinstance(row, Marked)]
    return {"marked": {"right": sum(marks), "wrong": len(marks) - sum(marks)}} if marks else {}


def _kind_reasons(kind: str, rows: Sequence[AnyRow]) -> list[str]:
    """What a kind cannot do without."""
    marks = {row.good for row in rows if isinstance(row, Marked)}
    if kind == "kto" and len(marks) == 1:
        return [f"every answer is marked {'right' if marks == {True} else 'wrong'}: kto learns from both"]
    return []


def context_length(directory: Path) -> int:
    """Positions the model has, from its config.json; unlimited when it does not say."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return int(config.get("max_position_embeddings", 2**31))


def histogram(lengths: Sequence[int]) -> dict[str, Any]:
    """Supervised tokens a row: sum, smallest, largest, and rows per bucket (upper bounds)."""
    if not lengths:
        return {"sum": 0, "least": 0, "most": 0, "buckets": {}}
    counted = Counter(
        next((f"<={edge}" for edge in BUCKETS if length <= edge), f">{BUCKETS[-1]}") for length in lengths
    )
    return {"sum": sum(lengths), "least": min(lengths), "most": max(lengths), "buckets": dict(counted)}


def compare_with_log(tokenizer: Tokenizer, examples: Sequence[Example], bodies: Bodies) -> dict[str, Any]:
    """Render every prompt again and compare with the ids the engine was given when it was served.

    Only prompts logged under today's tokenizer and template can be compared; the others are counted, and so are those
    whose personal data was masked since.
    """
    equal, other, masked, different = 0, 0, 0, []
    for example in examples:
        body = bodies.get(example.interaction_id) if example.interaction_id else None
        if body is None:
            continue
        same_model = (body.tokenizer_hash, body.template_hash) == (tokenizer.digest, tokenizer.template_digest)
        if not same_model or body.worked_examples:
            other += 1
        elif example.pii and body.messages != example.messages:
            masked += 1
        elif prompt_ids(tokenizer, example.messages, asked_of(example, bodies)) == body.prompt_token_ids:
            equal += 1
        else:
            different.append(str(example.id))
    return {
        "tokenizer": tokenizer.digest,
        "template": tokenizer.template_digest,
        "equal_to_served": equal,
        "served_under_another": other,
        "masked": masked,
        "differing": len(different),
        "different": different[:LISTED],
    }


def rendering_since(directory: Path) -> datetime:
    """When the files that render prompts came to lie in the directory as they are. What was served before says nothing
    about them: it may have been served by those they replaced. Not by mtime, which copies keep."""
    files = [file for file in map(directory.joinpath, RENDERING_FILES) if file.exists()]
    return datetime.fromtimestamp(max(file.stat().st_ctime for file in files), UTC)


def leakage(train: Sequence[Example], held_out: Sequence[Example]) -> dict[str, Any]:
    """Prompts and groups on both sides of the split."""
    prompts = {digest_of(example.messages) for example in held_out}
    groups = {example.group_key for example in held_out}
    return {
        "prompts": sum(digest_of(example.messages) in prompts for example in train),
        "groups": len(groups & {example.group_key for example in train}),
    }


def _row_reasons(total: int, causes: Sequence[str], masked: int) -> list[str]:
    if total == 0:
        return ["the revision has no training rows"]
    if len(causes) < total and len(causes) <= MOST_REFUSED_SHARE * total:
        return []
    told = ", ".join(f"{count} × {cause}" for cause, count in Counter(causes).items())
    named = f"all labels are masked in {masked} of them: " if masked else ""
    return [f"{len(causes)} of {total} training rows cannot be trained on: {named}{told}"]


def _template_reasons(template: Mapping[str, Any]) -> list[str]:
    if template["differing"]:
        said = f"{template['differing']} prompts no longer render to the token ids that were served"
        return [f"template drift: {said}"]
    return []


def _serving_reasons(template: Mapping[str, Any], served: Rendering | None) -> list[str]:
    if served is None:
        return []
    names = {"tokenizer": "tokenizer", "template": "chat template"}
    other = [words for name, words in names.items() if getattr(served, name) != template[name]]
    if not other:
        return []
    what, when = " and ".join(other), f"{served.at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    return [f"template drift: another {what} than the trainer's rendered what was served last, at {when}"]


def _leak_reasons(leaked: Mapping[str, int]) -> list[str]:
    if leaked["prompts"] or leaked["groups"]:
        said = f"{leaked['prompts']} prompts and {leaked['groups']} groups are on both sides of the split"
        return [f"leak of held-out rows: {said}"]
    return []
