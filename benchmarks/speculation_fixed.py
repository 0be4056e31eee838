"""Policies that always do the same: what the adaptive one is measured against."""

from collections.abc import Sequence as Many

from engine.messages import Drafter
from engine.speculation.policy import Batch, Policy
from engine.speculation.tries import Try


class Fixed:
    """One drafter, always so many tokens; None drafts nothing."""

    branches = False

    def __init__(self, drafter: Drafter | None, length: int) -> None:
        self.drafter, self.length = drafter, length
        # Neither a busy machine nor a drafter out of luck keeps a fixed choice from drafting.
        self.eager = drafter is not None

    def select(
        self,
        tries: Many[Many[Try]],
        batch: Batch,
        *,
        drafting: bool,  # noqa: ARG002 - a Policy's
    ) -> list[tuple[Try | None, int]]:
        """See Policy."""
        chosen = [next((one for one in each if one.drafter == self.drafter), None) for each in tries]
        room = batch.room // max(1, len(tries))
        return [(one, min(self.length, room, len(one.tokens)) if one else 0) for one in chosen]


def arms() -> dict[str, Policy]:
    """Every fixed choice by its name."""
    found: dict[str, Policy] = {"none": Fixed(None, 0)}
    found |= {f"suffix {length}": Fixed("suffix", length) for length in (2, 4, 8, 16)}
    return found | {f"heads {length}": Fixed("heads", length) for length in (1, 2, 4)}
