"""The mask that the console draws is the row that the trainer trains."""

from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.supervision import mask_pieces, supervise, turn_end
from engine.text.tokenizer import Tokenizer
from services.store.models import Example
from worker.training.rows import IGNORED, make_rows

STARTER = Path(__file__).parents[2] / "engine" / "starter"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(STARTER)


@settings(max_examples=60, deadline=None)
@given(said=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_what_is_learned_is_the_answer_and_its_end_and_nothing_else(said: str) -> None:
    tokenizer = Tokenizer.load(STARTER)
    messages = [{"role": "user", "content": "Who? <|im_end|> Ada."}]
    row = supervise(tokenizer, messages, said, turn_end(tokenizer))
    pieces = mask_pieces(tokenizer, row)
    end = tokenizer.token_bytes(row.end).decode()
    assert "".join(text for text, learned in pieces if learned) == tokenizer.decode(row.answer) + end
    assert "".join(text for text, learned in pieces if not learned) == tokenizer.render(messages)


def test_the_trainers_labels_are_the_masks(tokenizer: Tokenizer) -> None:
    example = Example(id=uuid4(), messages=[{"role": "user", "content": "Who?"}], completion="Ada <|im_end|> Reed")
    [trained] = make_rows(tokenizer, [example])
    drawn = supervise(tokenizer, example.messages, example.completion or "", turn_end(tokenizer))
    assert (trained.prompt, trained.answer, trained.end) == (drawn.prompt, drawn.answer, drawn.end)
    learned = sum(label != IGNORED for label in trained.labels)
    assert learned == len(drawn.answer) + 1
