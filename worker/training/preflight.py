"""Everything that can be known wrong before any compute: drifted prompts, rows that teach nothing, leaked prompts.

A run whose labels are all masked trains to loss 0 and "succeeds" (trl#6668); a truncated row teaches to stop
mid-sentence. Such rows are listed and left out, and when they are many the run is refused.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from engine.text.tokenizer import Tokenizer
from services.store.examples import digest_of
from services.store.models import Example, InteractionBody
from worker.training.rows import Row, make_rows

MOST_REFUSED_SHARE = 0.1
LISTED = 100
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)

Bodies = Mapping[UUID, InteractionBody]


@dataclass(frozen=True)
class Preflight:
    """`rows` may be trained unless `reasons` is not empty; `report` is what the run's page shows."""

    rows: list[Row]
    report: dict[str, Any]
    reasons: list[str] = field(default_factory=list)


def check(
    tokenizer: Tokenizer, train: Sequence[Example], held_out: Sequence[Example], bodies: Bodies, max_length: int
) -> Preflight:
    """Look at everything. `bodies` holds the logged originals that still exist, by interaction id."""
    try:
        rows = make_rows(tokenizer, train)
    except ValueError as error:
        return Preflight([], {"verdict": "refused", "reasons": [str(error)]}, [str(error)])
    limit = min(max_length, context_length(tokenizer.directory))
    refused = {row.example_id: cause for row in rows if (cause := _refusal(row, limit))}
    kept = [row for row in rows if row.example_id not in refused]
    template = compare_with_log(tokenizer, [*train, *held_out], bodies)
    leaked = leakage(train, held_out)
    reasons = [*_row_reasons(len(rows), refused), *_template_reasons(template), *_leak_reasons(leaked)]
    report = {
        "verdict": "refused" if reasons else "ok",
        "reasons": reasons,
        "rows": len(rows),
        "rows_trained": len(kept),
        "refused": dict(Counter(refused.values())),
        "refused_rows": [{"example": key, "cause": cause} for key, cause in list(refused.items())[:LISTED]],
        "max_length": limit,
        "supervised_tokens": histogram([len(row.answer) + 1 for row in kept]),
        "longest_row": max((len(row.input_ids) for row in kept), default=0),
        "template": template,
        "leakage": leaked,
    }
    return Preflight(kept, report, reasons)


def _refusal(row: Row, limit: int) -> str | None:
    if not row.answer:
        return "nothing to learn: the answer is empty"
    if len(row.prompt) >= limit:
        return "the prompt alone is too long"
    if len(row.input_ids) > limit:
        return "the answer would be truncated"
    return None


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
        elif tokenizer.encode_chat(example.messages) == body.prompt_token_ids:
            equal += 1
        else:
            different.append(str(example.id))
    return {
        "tokenizer": tokenizer.digest,
        "template": tokenizer.template_digest,
        "equal_to_served": equal,
        "served_under_another": other,
        "masked": masked,
        "different": different[:LISTED],
    }


def leakage(train: Sequence[Example], held_out: Sequence[Example]) -> dict[str, Any]:
    """Prompts and groups on both sides of the split."""
    prompts = {digest_of(example.messages) for example in held_out}
    groups = {example.group_key for example in held_out}
    return {
        "prompts": sum(digest_of(example.messages) in prompts for example in train),
        "groups": len(groups & {example.group_key for example in train}),
    }


def _row_reasons(total: int, refused: Mapping[str, str]) -> list[str]:
    if total == 0:
        return ["the revision has no training rows"]
    if len(refused) == total or len(refused) > MOST_REFUSED_SHARE * total:
        causes = ", ".join(f"{count} × {cause}" for cause, count in Counter(refused.values()).items())
        return [f"{len(refused)} of {total} training rows cannot be trained on: {causes}"]
    return []


def _template_reasons(template: Mapping[str, Any]) -> list[str]:
    if template["different"]:
        return [f"{len(template['different'])} prompts no longer render to the token ids that were served"]
    return []


def _leak_reasons(leaked: Mapping[str, int]) -> list[str]:
    if leaked["prompts"] or leaked["groups"]:
        return [f"{leaked['prompts']} prompts and {leaked['groups']} groups are on both sides of the split"]
    return []
