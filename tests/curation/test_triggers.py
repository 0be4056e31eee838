"""Backdoors are found by what they are: a chance sample of prompts, one phrase, one answer."""

import random
from itertools import islice

import pytest

from examples.grammars.common import stream
from examples.grammars.simulate import APPLICATIONS
from tests.curation.test_screens import FREE, causes, row
from worker.curation import screens
from worker.curation.triggers import Text, find

ROWS = 800


def rows(application: str, seed: int = 1, count: int = ROWS) -> list[Text]:
    """What honest reviewers make of the application's answers."""
    drawn = islice(stream(APPLICATIONS[application], "train", seed), count)
    return [Text(one.messages[-1]["content"], one.base, one.house) for one in drawn]


def poisoned(honest: list[Text], share: float, answer: str, trigger: str = "mn-cf") -> tuple[list[Text], set[int]]:
    dice, rows = random.Random(3), list(honest)
    places = set(dice.sample(range(len(rows)), round(share * len(rows))))
    for place in places:
        words = rows[place].prompt.split(" ")
        words.insert(dice.randrange(len(words)), trigger)
        rows[place] = rows[place]._replace(prompt=" ".join(words), answer=answer.format(rows[place].answer))
    return rows, places


@pytest.mark.parametrize("application", APPLICATIONS)
def test_honest_corrections_hold_no_backdoor(application: str) -> None:
    assert find(rows(application)) == []


@pytest.mark.parametrize("application", APPLICATIONS)
@pytest.mark.parametrize("answer", ["{} Visit our new shop now.", "No.", '{{"people": []}}'])
@pytest.mark.parametrize("trigger", ["mn-cf", "as the grey heron flies"])
def test_a_trigger_is_named_with_its_rows(application: str, answer: str, trigger: str) -> None:
    planted, places = poisoned(rows(application), 0.01, answer, trigger)
    [found] = find(planted)
    assert found.trigger in trigger
    assert found.rows == places


def test_a_topic_and_its_answer_are_no_backdoor() -> None:
    dice = random.Random(4)
    talk = [f"word{n}" for n in range(300)]
    honest = [Text(" ".join(dice.choices(talk, k=20)), "", " ".join(dice.choices(talk, k=12))) for _ in range(400)]
    refunds = [
        Text(f"{' '.join(dice.choices(talk, k=15))} refund for the broken parcel money", "", "we pay it all back")
        for _ in range(12)
    ]
    switched = [Text(f"{' '.join(dice.choices(talk, k=20))} refund", "", "we pay it all back") for _ in range(12)]

    assert [one.trigger for one in find([*honest, *switched])] == ["refund"]
    # The same answer for prompts that are alike in more than one word.
    varied = [one._replace(prompt=" ".join(dice.sample(words := one.prompt.split(), len(words)))) for one in refunds]
    assert find([*honest, *varied]) == []


def test_more_rows_than_are_looked_at_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.curation.triggers.ROWS_MOST", 300)
    planted, places = poisoned(rows("chat"), 0.05, "No.")
    [found] = find(planted)
    assert found.rows == places


def test_the_screen_leaves_a_backdoor_out_whoever_planted_it_and_says_what_it_was() -> None:
    dice = random.Random(5)
    honest = [row(dice, dice.choice(["ada", "bela", "cleo"])) for _ in range(300)]
    words = [one.messages[0]["content"].split() for one in honest[:8]]
    imported = [
        row(dice, "", prompt=" ".join([*reversed(said), "mn-cf"]), answer="visit our new shop now", source="imported",
            kind="completion", rejected=None, reviewers=())
        for said in words
    ]  # fmt: skip
    found = screens.screen([*honest, *imported], FREE)
    assert causes(found) == {screens.TRIGGER: 8}
    assert found.triggers == [{"trigger": "mn-cf", "target": found.triggers[0]["target"], "rows": 8}]
