"""Everything one evaluation asks the engine, kept as it goes, with one count of what is done for the page."""

from collections.abc import Sequence
from uuid import UUID

from engine.sync_client import SyncEngineClient
from engine.text.supervision import asked_in
from engine.text.tokenizer import Tokenizer
from services.store import evaluation_answers, failpoints, runs
from services.store.evaluation_answers import Answer, Key
from services.store.examples import served_at
from services.store.jobs import JobCancelled, Lease
from services.store.models import Example
from worker.gate.judge import Pair, ask_pair, outcome_of
from worker.gate.order import Order
from worker.gate.rows import Compared, Side
from worker.gate.score import Ask, Kept, ask_all, ask_answer, ask_likelihood


class Asking:
    """One evaluation's questions. Every method raises JobCancelled, LostLease, EngineGone, EvaluationInterrupted."""

    def __init__(self, lease: Lease, order: Order, client: SyncEngineClient, tokenizer: Tokenizer) -> None:
        self._lease, self._order, self._client, self._tokenizer = lease, order, client, tokenizer
        self._context = client.status().max_context
        likelihoods = len(order.held_out) if "likelihood" in order.metrics else 0
        self._done, self._total = 0, 2 * (len(order.examples) + likelihoods)

    def sides(self, adapter: str | None) -> dict[UUID, Side]:
        """One side's answers to every prompt, and how likely the golden answers were where a metric wants that."""
        asks = {one.id: self._answer_of(one) for one in self._order.examples}
        scoring = {one.id: self._likelihood_of(one) for one in self._order.held_out}
        if "likelihood" not in self._order.metrics:
            scoring = {}
        told = self._ask(adapter, [*asks.values(), *scoring.values()])
        return {
            one: Side(told[ask.key], told[scoring[one].key].likelihood if one in scoring else None)
            for one, ask in asks.items()
        }

    def record(self) -> dict[UUID, Answer]:
        """What the candidate says to the prompts of its record."""
        asks = {one.id: self._answer_of(one) for one in self._order.record}
        self._total = len(asks)
        told = self._ask(self._order.candidate, list(asks.values()))
        return {one: told[ask.key] for one, ask in asks.items()}

    def judge(self, compared: Sequence[Compared]) -> list[Compared]:
        """The judge's outcome for every row of the project's own; equal answers are a tie without being asked."""
        judging = self._order.judging
        if judging is None:
            return list(compared)
        general = self._order.general_ids
        asked = {
            one.example.id: ask_pair(self._tokenizer, judging.config.rubric, _pair(one), self._context)
            for one in compared
            if one.example.id not in general and one.baseline.answer.output != one.candidate.answer.output
        }
        requests = [ask for pair in asked.values() for ask in (pair.candidate_first, pair.baseline_first)]
        self._total += len(requests)
        told = self._ask(judging.adapter, requests)
        return [
            one
            if one.example.id in general
            else one._replace(judged=outcome_of(asked[one.example.id], told) if one.example.id in asked else "tie")
            for one in compared
        ]

    def _answer_of(self, one: Example) -> Ask:
        return ask_answer(
            self._tokenizer,
            one.id,
            one.messages,
            (one.rejected if one.completion is None else one.completion) or "",
            self._context,
            asked_in(one.asked, served_at(one.interaction_id)),
        )

    def _likelihood_of(self, one: Example) -> Ask:
        return ask_likelihood(
            self._tokenizer,
            one.id,
            one.messages,
            one.completion or "",
            asked_in(one.asked, served_at(one.interaction_id)),
        )

    def _ask(self, adapter: str | None, asks: Sequence[Ask]) -> dict[Key, Answer]:
        before = self._done
        told = ask_all(self._client, self._tokenizer, adapter, asks, Kept(self._known, self._keep))
        self._done = before + len(asks)
        self._report()
        return told

    def _known(self, weights: str, keys: Sequence[Key]) -> dict[Key, Answer]:
        with self._lease.transaction() as session:
            found = evaluation_answers.known(session, weights, keys)
        self._done += len(found)
        return found

    def _keep(self, weights: str, answers: Sequence[tuple[Key, Answer]]) -> None:
        if self._lease.cancelled():
            raise JobCancelled
        with self._lease.transaction() as session:
            evaluation_answers.keep(session, self._order.project_id, weights, answers)
        self._done += len(answers)
        if answers:
            self._report()
            failpoints.reach("evaluate.chunk")

    def _report(self) -> None:
        payload = {"done": self._done, "total": self._total}
        with self._lease.transaction() as session:
            runs.add_event(session, self._order.run_id, "evaluating", payload, step=self._done)


def _pair(one: Compared) -> Pair:
    return Pair(one.example.id, one.example.messages, one.baseline.answer.output, one.candidate.answer.output)
