"""Figures, times and texts as people read them."""

from datetime import UTC, datetime, timedelta

import pytest

from services.console import wording


def marked(text: str, words: str) -> list[str]:
    return [piece.text for piece in wording.excerpt(text, words) if piece.hit]


def test_what_was_sought_is_marked_as_the_search_finds_it() -> None:
    text = "In Oslo people met; peoples of the Institute, or in part."
    assert marked(text, "people") == ["people", "peoples"]
    assert marked(text, "in") == ["In", "in"]  # two letters begin too many words
    assert marked(text, "people or oslo -part") == ["Oslo", "people", "peoples"]
    assert marked(text, "") == []
    assert "".join(piece.text for piece in wording.excerpt(text, "in people")) == text


@pytest.mark.parametrize(
    ("left", "said"),
    [(-5, "in 1 min"), (90, "in 2 min"), (5399, "in 90 min"), (5400, "in 2 h"), (86_400, "in 24 h"),
     (3 * 86_400, "in 3 d")],
)  # fmt: skip
def test_how_long_until_is_said_coarsely(left: int, said: str) -> None:
    now = datetime.now(UTC)
    assert wording.until(now + timedelta(seconds=left), now) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(["infer", "train"], "infer train"), (True, "yes"), (None, "nothing"), (0, "0"), (1.5, "1.5"), ("é", "é"),
     ({"a": ["é"]}, '{"a": ["é"]}'), ([], "")],
)  # fmt: skip
def test_a_value_of_the_audit_log_reads_as_words(value: object, said: str) -> None:
    assert wording.plain(value) == said
