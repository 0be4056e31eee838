"""Patterns of strangers: searched in bounded time, or refused with a sentence."""

import time
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.patterns import LONGEST_TEXT, flaw, found

DICE = Random(1)
AS, MIXED = "a" * LONGEST_TEXT + "!", "".join(DICE.choice("ab") for _ in range(LONGEST_TEXT))


HOSTILE = ["(a+)+$", "(a|aa)+$", "(a*)*b", "(.*)*c", "[ab]{0,100}[ab]{0,2}c", "[ab]*a[ab]{100}c", r"(\w{1,50}){1,4}$"]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_that_hang_other_engines_are_searched_quickly(pattern: str) -> None:
    began = time.perf_counter()

    found(pattern, AS)
    found(pattern, MIXED)

    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("(?=a)b", "look-around"),
        (r"(a)\1", "backreferences"),
        ("(", "unclosed group"),
        ("a{1000}", "multiply to 200"),
        ("(a{50}){50}", "multiply to 200"),
        ("a{2,}{3,}{99}", "multiply to 200"),
        ("x" * 301, "at most 300"),
    ],
)
def test_what_cannot_be_searched_safely_is_refused_with_why(pattern: str, sentence: str) -> None:
    assert sentence in (flaw(pattern) or "")
    with pytest.raises(ValueError, match=sentence):
        found(pattern, "a")


def test_a_pattern_is_looked_for_anywhere_in_the_text() -> None:
    assert found(r"policy \d+", "By policy 14 you may.")
    assert not found(r"^policy", "By policy 14 you may.")
    assert found("\\{2021,\\}", "{2021,}")


@given(st.text(alphabet="ab\ud800\x00é", max_size=20), st.text(alphabet="ab(){}[]*+?|^$.\\,0123456789", max_size=20))
def test_no_text_and_no_pattern_raises_anything_else(text: str, pattern: str) -> None:
    if flaw(pattern) is None:
        assert found(pattern, text) in (True, False)
