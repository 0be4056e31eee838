"""Does the engine that is about to serve an artefact answer as the worker recorded? Anything else is not the weights
that were judged."""

from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.client import Completion
from engine.messages import Generate, Sampling
from engine.sync_client import SyncEngineClient
from engine.text.supervision import NOTHING, Asked, answer_ids, asked_in, prompt_ids, said_text
from engine.text.tokenizer import Tokenizer
from services.store.examples import served_at
from services.store.models import Evaluation, EvaluationRow, Example

GOLDEN_PROMPTS = 8
# Float sums depend on what else is in a batch, so a near-tie may turn one greedy answer; wrong weights turn most.
MISMATCHES_ALLOWED = 1
# A recorded text may have been cut into other tokens than its own encoding; the margin lets it end by itself.
SPARE_TOKENS = 16


class Unanswered(RuntimeError):
    """The engine had no answer this time; that says nothing about the artefact, so it is worth another attempt."""


class GoldenPrompt(NamedTuple):
    """A held-out prompt and what the candidate said to it when it was judged."""

    messages: list[dict[str, Any]]
    output: str
    asked: Asked = NOTHING


class Comparison(NamedTuple):
    """How many golden prompts were asked, and which came back different."""

    asked: int
    differing: list[int]

    @property
    def passed(self) -> bool:
        return self.asked > 0 and len(self.differing) <= min(MISMATCHES_ALLOWED, self.asked - 1)

    def evidence(self) -> dict[str, Any]:
        """For the deployment event."""
        return {"golden_prompts": self.asked, "differing": len(self.differing)}


def golden_prompts(
    session: Session, digest: str, *, run_id: UUID | None, limit: int = GOLDEN_PROMPTS
) -> list[GoldenPrompt]:
    """From the latest decided evaluation of the artefact. Rows where it differs from its baseline come first: they
    would show the base, or an old adapter, answering under its name."""
    evaluation = (
        select(Evaluation.id)
        .where(Evaluation.candidate_digest == digest, Evaluation.decision != "undecided")
        .order_by(Evaluation.id.desc())
        .limit(1)
    )
    if run_id is not None:
        evaluation = evaluation.where(Evaluation.run_id == run_id)
    # What the engine refused then it refuses again: that says nothing of the weights.
    answered = EvaluationRow.details["candidate"]["finish"].as_string().is_distinct_from("error")
    rows = session.execute(
        select(Example.messages, Example.asked, Example.interaction_id, EvaluationRow.candidate_output)
        .join(Example, Example.id == EvaluationRow.example_id)
        .where(EvaluationRow.evaluation_id == evaluation.scalar_subquery(), answered)
        .order_by(EvaluationRow.candidate_output == EvaluationRow.baseline_output, EvaluationRow.example_id)
        .limit(limit)
    )
    return [
        GoldenPrompt(row.messages, row.candidate_output, asked_in(row.asked, served_at(row.interaction_id)))
        for row in rows
    ]


def compare(client: SyncEngineClient, tokenizer: Tokenizer, digest: str, prompts: list[GoldenPrompt]) -> Comparison:
    """Ask every golden prompt greedily. Raises EngineGone, and Unanswered when the engine gave errors for answers."""
    requests = [request_of(tokenizer, digest, index, prompt) for index, prompt in enumerate(prompts)]
    differing = []
    for index, completion in enumerate(client.generate_many(requests)):
        if completion.finished.reason == "error":
            raise Unanswered(f"the engine could not answer a golden prompt: {completion.finished.error}")
        if completion.finished.adapter != digest or not _same(tokenizer, completion, prompts[index]):
            differing.append(index)
    return Comparison(len(prompts), differing)


def _same(tokenizer: Tokenizer, completion: Completion, prompt: GoldenPrompt) -> bool:
    """The recorded text, or one that goes on after it because the budget there was smaller."""
    text, recorded = said_text(tokenizer, completion.token_ids, prompt.asked), prompt.output
    return text == recorded or (completion.finished.reason == "length" and text.startswith(recorded) and recorded != "")


def request_of(tokenizer: Tokenizer, digest: str, index: int, prompt: GoldenPrompt) -> Generate:
    """Greedily, at batch priority, as when it was judged."""
    budget = len(answer_ids(tokenizer, prompt.output, prompt.asked)) + SPARE_TOKENS
    return Generate(
        id=f"verify-{digest[:12]}-{index}",
        prompt=prompt_ids(tokenizer, prompt.messages, prompt.asked),
        sampling=Sampling(temperature=0.0, seed=0, max_tokens=budget, stop_token_ids=tokenizer.eos_ids),
        adapter=digest,
        grammar=prompt.asked.grammar,
        namespace="verify",
        priority="batch",
        learn=False,
    )
