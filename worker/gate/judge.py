"""A judge: a served model that is shown two answers in both orders, and is believed where both say the same.

Models favour the answer they see first (Zheng et al., "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena", 2023),
so a preference that turns with the order is none. Whether the judge is any good is measured on rows that people have
judged (Cohen's kappa), and told beside its figures.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple
from uuid import UUID

from engine.messages import Grammar
from engine.text.tokenizer import Tokenizer
from services.store.evaluation_answers import Answer, Key
from services.store.forms import text_of
from worker.gate.score import Ask

Outcome = Literal["win", "tie", "loss"]
CHOICES = Grammar(kind="regex", text="A|B|tie")
ANSWER_TOKENS = 8
LONGEST_SHOWN = 8000
ASKED = """Compare two answers to the same request.

What makes an answer better: {rubric}

Request:
{request}

Answer A:
{first}

Answer B:
{second}

Reply with A, B or tie, and nothing else."""


class Pair(NamedTuple):
    """Two different answers to one example's prompt."""

    example_id: UUID
    messages: list[Any]
    baseline: str
    candidate: str


class Asked(NamedTuple):
    """Both orders of a pair: the candidate shown first, then the baseline."""

    pair: Pair
    candidate_first: Ask
    baseline_first: Ask


class Agreement(NamedTuple):
    """How a judge compares with people, on rows where they judged both outputs; `kappa` is None where undefined."""

    rows: int
    same: int
    kappa: float | None


def ask_pair(tokenizer: Tokenizer, rubric: str, pair: Pair, context: int) -> Asked:
    """Two requests; one that does not fit the context is refused by the engine and says nothing."""

    def ask(first: str, second: str) -> Ask:
        request = "\n".join(f"{one.get('role', 'user')}: {text_of(one.get('content'))}" for one in pair.messages)
        shown = [text[:LONGEST_SHOWN] for text in (request, first, second)]
        text = ASKED.format(rubric=rubric, request=shown[0], first=shown[1], second=shown[2])
        token_ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        return Ask(pair.example_id, token_ids, max(1, min(ANSWER_TOKENS, context - len(token_ids))), grammar=CHOICES)

    return Asked(pair, ask(pair.candidate, pair.baseline), ask(pair.baseline, pair.candidate))


def outcome_of(asked: Asked, answers: Mapping[Key, Answer]) -> str:
    """ "win", "tie" or "loss" of the candidate where both orders agree, "inconsistent" where they do not, "unsaid"
    where an order has no answer."""
    first, second = (answers[one.key].output.strip() for one in (asked.candidate_first, asked.baseline_first))
    told: dict[tuple[str, str], str] = {("A", "B"): "win", ("B", "A"): "loss", ("tie", "tie"): "tie"}
    return told.get((first, second), "inconsistent" if first and second else "unsaid")


def scores_of(outcome: str) -> tuple[float, float]:
    """Baseline's and candidate's score by the judge's outcome."""
    return {"win": (0.0, 1.0), "loss": (1.0, 0.0)}.get(outcome, (0.5, 0.5))


def agreement(told: Sequence[tuple[Outcome, Outcome]]) -> Agreement:
    """Cohen's kappa of (person's, judge's) outcomes (Cohen 1960, doi 10.1177/001316446002000104)."""
    rows, same = len(told), sum(person == judge for person, judge in told)
    if not rows:
        return Agreement(0, 0, None)
    people, judges = Counter(person for person, _ in told), Counter(judge for _, judge in told)
    chance = sum(people[outcome] * judges[outcome] for outcome in ("win", "tie", "loss")) / rows**2
    return Agreement(rows, same, None if chance == 1 else (same / rows - chance) / (1 - chance))
