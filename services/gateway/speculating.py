"""What an answer's drafts were worth, added up from the engine's replies: for the log, the API and the metrics."""

from typing import Any

from engine.messages import Draft, Drafter, Tokens


class DrafterCounts:
    """One drafter's verified drafts in one answer.

    At each position: how often a drafted token was tried, that is when all before it were accepted and the answer went
    on, and how often it was accepted. `lengths[n]` counts the drafts of n tokens; `won` those that tokens
    were emitted from.
    """

    def __init__(self) -> None:
        self.drafts = 0
        self.won = 0
        self.tried: list[int] = []
        self.accepted: list[int] = []
        self.lengths: list[int] = []

    @property
    def drafted_tokens(self) -> int:
        return sum(length * count for length, count in enumerate(self.lengths))

    def add(self, draft: Draft) -> None:
        """Count one more verified draft."""
        self.drafts += 1
        self.won += draft.won
        _lengthen(self.lengths, draft.drafted + 1)
        self.lengths[draft.drafted] += 1
        tried = draft.accepted if draft.ended else min(draft.accepted + 1, draft.drafted)
        _lengthen(self.tried, tried)
        _lengthen(self.accepted, tried)
        for position in range(tried):
            self.tried[position] += 1
            self.accepted[position] += position < draft.accepted


class Speculating:
    """The drafts of one answer so far. It needs no ending from the engine, so it is right where the gateway ends one.

    `drafted_tokens` counts every draft's, a twin's too; `accepted_tokens` those of them that stand in the answer.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        # The digest of the heads that drafted last.
        self.speculator: str | None = None
        self.by_drafter: dict[Drafter, DrafterCounts] = {}

    def add(self, reply: Tokens, used: int) -> None:
        """Count a reply of which the answer keeps the first `used` tokens."""
        self.steps += reply.steps
        self.speculator = reply.speculator or self.speculator
        if not reply.drafts:
            return
        for draft in reply.drafts:
            self.by_drafter.setdefault(draft.drafter, DrafterCounts()).add(draft)
            self.drafted_tokens += draft.drafted
        accepted = sum(draft.accepted for draft in reply.drafts if draft.won)
        # Each step but the last brought a token of its own. Where the answer is cut, what lies behind does not count.
        self.accepted_tokens += min(accepted, max(0, used - reply.steps + 1))

    def document(self) -> dict[str, Any] | None:
        """`interaction.speculation`; None when nothing was drafted."""
        if not self.by_drafter:
            return None
        return {"steps": self.steps, **{name: vars(counts) for name, counts in sorted(self.by_drafter.items())}}


def _lengthen(counts: list[int], length: int) -> None:
    counts.extend([0] * (length - len(counts)))
