"""Where a person's words are kept: every text of every table, and what an erasure does about it.

A test compares this with the database's own catalogue: a table or column of text that is named nowhere here fails it.
Tables and columns that a database does not have (yet) are passed over.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

By = Literal["interaction", "example"]


@dataclass(frozen=True)
class Gone:
    """Rows are deleted: those whose `key`, the first of these columns that there is, names an erased row."""

    by: By
    key: tuple[str, ...]


@dataclass(frozen=True)
class Emptied:
    """Rows stay, because others count on them; these columns become the given SQL, those are kept for the reason."""

    by: By
    key: tuple[str, ...]
    to: Mapping[str, str]
    kept: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """Nothing of it is anybody's prompt or answer."""

    why: str


Place = Gone | Emptied | Kept

OURS = "a word of Whet's own"
IDS = "ids of rows"
SCORES = "numbers"
# In this order: what is found through an example or an interaction goes before it.
PLACES: Mapping[str, Place] = {
    "example_embedding": Gone("example", ("example_id",)),
    "evaluation_answer": Gone("example", ("example_id",)),
    "evaluation_row": Emptied(
        "example",
        ("example_id",),
        {"baseline_output": "''", "candidate_output": "''", "group_key": "'erased'"},
        {"slice": OURS, "baseline_scores": SCORES, "candidate_scores": SCORES, "details": OURS},
    ),
    # The hash stays readable behind its mark: an old revision's manifest, and so its digest, can still be made.
    "example": Emptied(
        "example",
        ("id",),
        {
            # With the row's id: another copy of the same text, built meanwhile, is erased under the same hash.
            "content_hash": "CASE WHEN starts_with(content_hash, 'erased:') THEN content_hash "
            "ELSE 'erased:' || content_hash || ':' || id END",
            "messages": "'[]'",
            "completion": "NULL",
            "rejected": "NULL",
            "asked": "NULL",
            "group_key": "'erased'",
        },
        {
            "kind": OURS,
            "source": OURS,
            "split": OURS,
            "slice": OURS,
            "annotation_ids": IDS,
            "reviewers": IDS,
            "pii": OURS,
        },
    ),
    "pin": Gone("interaction", ("interaction_id",)),
    "feedback": Gone("interaction", ("interaction_id",)),
    "annotation": Emptied(
        "interaction",
        ("interaction_id",),
        {
            "correction": "NULL",
            "comment": "NULL",
            "spans": "'[]'",
            "tags": "'{}'",
            "idempotency_key": "CASE WHEN verdict = 'undo' THEN idempotency_key ELSE 'erased:' || id END",
        },
        {"verdict": OURS, "preference": OURS},
    ),
    "review_item": Emptied(
        "interaction",
        ("interaction_id",),
        {
            "state": "'withdrawn'",
            "group_key": "'erased:' || id",
            "lease_user_id": "NULL",
            "lease_token": "NULL",
            "lease_expires_at": "NULL",
            "alternative": "NULL",
            "gold": "NULL",
        },
        {"strategy": OURS, "window": OURS, "order_hash": "a hash of an id", "split": OURS},
    ),
    "shadow_answer": Gone("interaction", ("interaction_id",)),
    "interaction_embedding": Gone("interaction", ("interaction_id", "id")),
    "bulk_change": Gone("interaction", ("interaction_id",)),
    "interaction_body": Gone("interaction", ("id",)),
    "interaction": Gone("interaction", ("id",)),
    # What happened to finished jobs may quote a row; `erasure_traces.forget_quotes` empties that for the whole project.
    "job": Kept("ids, counts, why a person ordered one; errors and log tails of finished jobs are emptied"),
    "saved_view": Kept("searches people keep; `erasure_traces.forget_typed` deletes those that name the subject"),
    "bulk_action": Kept("searches of leads; `erasure_traces.forget_typed` empties those that name the subject"),
    "dataset_import": Kept("names of files; `erasure_traces.forget_typed` deletes previews that name the subject"),
    "split_group": Kept("groups and their side; `erasure_traces.forget_typed` deletes the subject's"),
    "prompt_cluster": Kept("hashes"),
    "revision_left_out": Kept("causes in our words"),
    "run": Kept("parameters and counts; errors of finished runs are emptied"),
    "run_event": Kept("losses, phases and reasons in our words; what a trainer printed is emptied"),
    "evaluation": Kept("figures and reasons in our words, and why an operator overrode them"),
    "dataset": Kept("a name that a lead chose"),
    "revision": Kept("digests and counts; `erasure_traces.forget_typed` drops phrases that a screen quoted"),
    "revision_example": Kept("hashes"),
    "artifact": Kept("digests and parameters"),
    "deployment": Kept("digests"),
    "deployment_event": Kept("digests, and reasons that operators wrote"),
    "webhook": Kept("addresses that operators wrote, and names of events"),
    "webhook_delivery": Kept("ids, decisions in our words, and reasons that operators wrote"),
    "rollout": Kept("digests, figures and reasons in our words or an operator's"),
    "rollout_count": Kept("counts by a salted hash of the user, deleted when the canary ends"),
    "engine_report": Kept("digests and an engine's address"),
    "audit_event": Kept("who did what; a chain of hashes that must not change, in which nobody's text is put"),
    "erasure_request": Kept("the subject's name until it is done, then a hash; counts"),
    "log_spool": Kept("machines of ours"),
    "erasure_spool": Kept("ids and counts"),
    "erased_row": Kept("ids of rows, until the erasure is done"),
    "project": Kept("configuration that leads write"),
    "api_key": Kept("names and hashes of keys"),
    "user_account": Kept("people who work here, not those who are served"),
    "membership": Kept("roles of those people"),
    "invitation": Kept("people who work here"),
    "user_identity": Kept("people who work here"),
    "review_keys": Kept("keys of the review page"),
    "sign_in_link": Kept("hashes"),
    "session": Kept("hashes"),
    "alembic_version": Kept("the schema's version"),
}
