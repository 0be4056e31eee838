"""Who meets a candidate: a share of the users, the same ones as long as it is on trial, drawn anew for the next."""

import hashlib
from uuid import UUID

import msgspec

from services.gateway.access import Target
from services.gateway.bodies import Ask


def placed(target: Target, ask: Ask, key_id: UUID) -> Target:
    """The target with its arm, where a candidate is on trial. `slug@digest` asks for certain weights and gets them.

    A candidate that an engine cannot load is passed over for what serves everybody else; the log says so.
    """
    trial = target.project.trial
    if trial is None or target.pinned:
        return target
    unit = unit_of(ask, key_id)
    if unit is None:
        return target
    if draw(trial.salt, unit) >= trial.share:
        return target._replace(arm="control")
    return target._replace(candidates=tuple(dict.fromkeys((trial.digest, *target.candidates))), arm="canary")


def unit_of(ask: Ask, key_id: UUID) -> str | None:
    """Whom a request belongs to: its end user, else its session, else its key and what it is about. None for several
    prompts of nobody in particular, which are about as many things.

    `services.store.rollout_counts` adds requests up by the same.
    """
    if ask.user is not None:
        return f"u:{ask.user}"
    if ask.extra.session is not None:
        return f"s:{ask.extra.session}"
    if ask.extra.group is None and len(ask.prompts) > 1:
        return None
    about = ask.extra.group or hashlib.sha256(msgspec.json.encode(ask.messages or ask.prompts)).hexdigest()
    return f"k:{key_id}:{about}"


def draw(salt: str, unit: str) -> float:
    """Uniform in [0, 1), fixed by both."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{unit}".encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64
