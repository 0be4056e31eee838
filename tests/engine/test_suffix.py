"""The suffix drafter: what it drafts, whose text it drafts from, and how much it may keep."""

import pytest

from engine.speculation.corpora import Corpora, propose
from engine.speculation.suffix import Proposal


def greedy(corpora: Corpora, namespace: str, prompt: list[int], most: int = 8) -> Proposal:
    memory = corpora.open(namespace, prompt)
    (proposal,) = propose([memory], [None], [most])
    memory.close()
    return proposal


@pytest.fixture
def corpora() -> Corpora:
    return Corpora()


def test_a_request_drafts_from_its_own_prompt(corpora: Corpora) -> None:
    assert greedy(corpora, "a", [5, 6, 7, 8, 9, 1, 5, 6, 7], most=2) == Proposal([8, 9], 3, [1.0, 1.0])


def test_a_request_drafts_from_the_answers_of_its_namespace(corpora: Corpora) -> None:
    corpora.learn("a", [5, 6, 7, 8, 9, 2])
    assert greedy(corpora, "a", [0, 5, 6, 7]) == Proposal([8, 9, 2], 3, [1.0, 1.0, 1.0])
    assert greedy(corpora, "b", [0, 5, 6, 7]) == Proposal([], 0, [])
