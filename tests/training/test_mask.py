"""The mask that the console draws is the row that the trainer trains."""

from pathlib import Path
from uuid import uuid4

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import Grammar
from engine.text.supervision import asked_in, mask_pieces, said_text, supervise, turn_end
from engine.text.tokenizer import Tokenizer
from services.console.mask import masks
from services.console.tokens import TokenReader
from services.settings import Settings
from services.store.examples import beside
from services.store.models import Example
from tests.training.kinds import TOOLS, WITH_TOOLS
from tests.training.tiny import make_model
from worker.gate.score import ask_answer, ask_likelihood
from worker.rollout.verify import GoldenPrompt, request_of
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


def test_training_gate_golden_prompt_and_mask_show_the_tools_that_were_offered(tmp_path: Path) -> None:
    file = make_model(tmp_path, template=WITH_TOOLS, context=512) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    tags = ["<tool_call>", "</tool_call>"]
    backend.add_special_tokens([tokenizers.AddedToken(tag, special=True) for tag in tags])
    backend.save(str(file))
    tokenizer = Tokenizer.load(tmp_path)
    called = f'<tool_call>{{"name": "weather"}}</tool_call>{tokenizer.token_bytes(tokenizer.eos_ids[0]).decode()}'
    parameters = {"tools": TOOLS, "tool_choice": "required", "grammar": {"kind": "regex", "text": "[a-z]+"}}
    example = Example(
        id=uuid4(), messages=[{"role": "user", "content": "Where?"}], kind="completion", source="corrected",
        completion=called.removesuffix("<|im_end|>"), asked=beside(parameters),
    )  # fmt: skip
    served = [*tokenizer.encode_chat(example.messages, tools=TOOLS), *tokenizer.encode("<tool_call>\n")]
    asked, golden = asked_in(example.asked), example.completion or ""

    [trained] = make_rows(tokenizer, [example])
    answer = ask_answer(tokenizer, example.id, example.messages, golden, 512, asked)
    likelihood = ask_likelihood(tokenizer, example.id, example.messages, golden, asked)
    verified = request_of(tokenizer, "ab" * 32, 0, GoldenPrompt(example.messages, golden, asked))
    [mask] = masks(TokenReader(Settings(home=tmp_path, model=str(tmp_path))), [example])

    assert trained.prompt == answer.token_ids == verified.prompt == served
    assert likelihood.token_ids == [*served, *trained.answers[0]]
    assert answer.grammar == verified.grammar == Grammar(kind="regex", text="[a-z]+")
    assert backend.token_to_id(tags[0]) in trained.answers[0]
    assert said_text(tokenizer, trained.answers[0], asked) == golden
    assert "".join(piece.text for piece in mask.pieces).endswith(called)
    assert beside({"tools": TOOLS, "tool_choice": "auto"}) == {"tools": TOOLS}
    assert beside({"tool_choice": "none"}) is None
