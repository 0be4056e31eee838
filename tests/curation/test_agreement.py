"""Krippendorff's alpha against the worked examples of his 2011 paper, and over judgements in Postgres."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.agreement import alpha, of_units
from tests.curation.world import World

# "." is a unit the judge did not see.
TWO_BINARY = ("0100000010", "1110010000")
TWO_NOMINAL = ("aabbdcccedda", "babbbccceddd")
FOUR_WITH_GAPS = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


def units(*judges: str) -> dict[tuple[str, ...], int]:
    columns = zip(*judges, strict=True)
    return dict(Counter(tuple(sorted(label for label in column if label != ".")) for column in columns))


@pytest.mark.parametrize(("judges", "value"), [(TWO_BINARY, 0.095), (TWO_NOMINAL, 0.692), (FOUR_WITH_GAPS, 0.743)])
def test_the_published_examples_come_out(judges: tuple[str, ...], value: float) -> None:
    found = of_units(units(*judges))
    assert found is not None
    assert round(found.value, 3) == value
    assert found.low < found.value < found.high


def test_where_alpha_is_not_defined_there_is_none() -> None:
    assert of_units({}) is None
    assert of_units({("accept",): 9}) is None
    assert of_units({("accept", "accept"): 9}) is None


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40))
def test_perfect_agreement_is_one_and_more_disagreement_is_never_better(ones: int, others: int, apart: int) -> None:
    perfect = of_units({("a", "a"): ones, ("b", "b"): others}, resamples=50)
    worse = of_units({("a", "a"): ones, ("b", "b"): others, ("a", "b"): apart}, resamples=50)
    assert perfect is not None
    assert worse is not None
    assert perfect.value == 1
    assert worse.low <= worse.value <= perfect.value


def test_only_standing_judgements_of_items_that_two_have_judged_count(world: World) -> None:
    for index in range(6):
        world.accepted(f"same {index}", "fine", "held_out")
        world.corrected(f"wrong {index}", "bad", "good", "held_out")
    apart = world.item(world.log("apart"), "held_out")
    world.judge(apart, "accept", reviewer=0)
    mistaken = world.judge(apart, "reject", reviewer=1)
    world.judge(world.item(world.log("alone")), "reject")

    with world.sessions() as session:
        before = alpha(session, world.project_id)
    world.undo(mistaken, 1)
    with world.sessions() as session:
        after = alpha(session, world.project_id)

    assert before is not None
    assert after is not None
    assert (before.items, before.judgements) == (13, 26)
    assert before.value < 1
    assert (after.items, after.value) == (12, 1.0)
