"""What changes logits before sampling, against the plain loops; and what a sequence keeps, in every order of events."""

import math
import random
from collections.abc import Sequence as Many
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.layers.penalties import Counts, Edits, bias_, penalise_
from engine.layers.sampler import Sampled
from engine.messages import Generate, Sampling
from engine.offline import LocalEngine
from engine.runner.sampling import Place, accepted, complete, draw_at
from engine.sequence import Sequence
from tests.engine import plain_sampling
from tests.engine.conftest import EngineMaker

VOCABULARY = 50
PROMPT = [4, 9, 9, 30]


def sequence(sampling: Sampling, answer: Many[int] = (), prompt: Many[int] = PROMPT, choice: int = 0) -> Sequence:
    made = Sequence(b"", Generate(id="r", prompt=list(prompt), sampling=sampling, choice=choice), 0, 10_000)
    for token in answer:
        made.accept(token, 0.0)
        accepted(made, token)
    return made


def sampling(**options: object) -> Sampling:
    return Sampling(**({"seed": 5, "max_tokens": 99, "temperature": 0.9} | options))  # type: ignore[arg-type]


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


KINDS: list[dict[str, object]] = [
    {},
    {"presence_penalty": 1.3},
    {"frequency_penalty": -0.7},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "presence_penalty": -1.0, "frequency_penalty": 0.4},
    {"logit_bias": {3: 4.0, 9: -100.0, 49: 2.5}},
    {"logit_bias": {7: 6.0}, "repetition_penalty": 1.4, "top_k": 12},
    {"min_tokens": 4, "stop_token_ids": (2, 7, 999)},
    {"temperature": 0.0, "presence_penalty": 2.0, "logit_bias": {1: 1.0}, "top_logprobs": 4},
    {"top_p": 0.7, "min_p": 0.05, "frequency_penalty": 1.1, "top_logprobs": 2},
    {"top_logprobs": 20},
]


def expected_token(place: Place, row: list[float]) -> int:
    request = place.sequence.request
    answer = place.sequence.tokens[len(request.prompt) :] + list(place.drafted)
    left = plain_sampling.edited(row, request.sampling, request.prompt, answer)
    return plain_sampling.token(left, request.sampling, request.choice, len(request.prompt) + len(answer))


def test_mixed_rows_draw_what_the_plain_loop_draws_and_report_the_models_own_logprobs() -> None:
    generator = random.Random(3)
    for trial in range(12):
        places = [
            Place(sequence(sampling(seed=trial, **kind), generator.choices(range(VOCABULARY), k=index % 7)))
            for index, kind in enumerate(KINDS)
        ]
        logits = logits_of(len(places), trial)
        before = logits.tolist()
        drawn = draw_at(places, logits)
        assert drawn.token_ids == [expected_token(place, row) for place, row in zip(places, before, strict=True)]
        owns = [plain_sampling.logprob(row, token) for row, token in zip(before, drawn.token_ids, strict=True)]
        assert drawn.logprobs == pytest.approx(owns, abs=1e-5)
        assert list(drawn.faults) == [None] * len(places)
        for place, row, top in zip(places, before, drawn.top, strict=True):
            ranked = sorted(range(VOCABULARY), key=lambda token, row=row: -row[token])
            assert [token for token, _ in top] == ranked[: place.sequence.request.sampling.top_logprobs]
            assert all(logprob == pytest.approx(plain_sampling.logprob(row, token), abs=1e-5) for token, logprob in top)


def test_every_logit_is_edited_as_in_the_plain_loop_and_no_other_rows() -> None:
    generator = random.Random(8)
    asked = [sampling(**kind) for kind in KINDS if "min_tokens" not in kind]
    answers = [generator.choices(range(VOCABULARY), k=15) for _ in asked]
    edits = [Edits(one, PROMPT) for one in asked]
    for edit, answer in zip(edits, answers, strict=True):
        edit.follow([*PROMPT, *answer])
    logits = logits_of(len(asked))
    expected = [
        plain_sampling.edited(row, one, PROMPT, answer)
        for row, one, answer in zip(logits.tolist(), asked, answers, strict=True)
    ]
    bias_(logits, list(enumerate(edits)))
    penalise_(
        logits, [(row, edit.counts.marks(asked[row])) for row, edit in enumerate(edits) if edit.counts is not None]
    )
    assert torch.allclose(logits, torch.tensor(expected), atol=1e-4)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_drafted_position_draws_what_it_draws_once_the_draft_is_accepted(kind: int) -> None:
    options, favoured = KINDS[kind], (7, 9, 7, 1)
    ahead = sequence(sampling(**options), [3, 7])
    logits = logits_of(len(favoured) + 1)
    for count, token in enumerate(favoured):
        logits[count, token] += 9
    alone: list[Sampled] = []
    for count in range(len(favoured) + 1):
        there = sequence(sampling(**options), [3, 7, *(each.token_ids[0] for each in alone)])
        alone.append(draw_at([Place(there)], logits[count : count + 1].clone()))
    # Places behind a token that is not drawn mean nothing, so what is drafted is what comes.
    draft = tuple(each.token_ids[0] for each in alone[:-1])
    together = draw_at([Place(ahead, draft[:count]) for count in range(len(draft) + 1)], logits.clone())
    assert together.token_ids == [each.token_ids[0] for each in alone]
    assert together.top == [each.top[0] for each in alone]
    assert ahead.tokens == [*PROMPT, 3, 7]
    assert draw_at([Place(ahead)], logits[:1].clone()).token_ids == together.token_ids[:1]


@given(
    prompt=st.lists(st.integers(0, 9), max_size=6),
    moves=st.lists(st.one_of(st.integers(0, 9), st.just("pop")), max_size=200),
)
@settings(max_examples=60, deadline=None)
def test_counts_are_right_after_any_pushes_and_pops(prompt: list[int], moves: list[int | str]) -> None:
    counts, answer = Counts(prompt), []
    for move in moves:
        if isinstance(move, int):
            counts.push(move)
            answer.append(move)
        elif answer:
            counts.pop()
            answer.pop()
    marks = counts.marks(sampling())
    found = dict(zip(marks.tokens_N.tolist(), marks.counts_N.tolist(), strict=True))
    assert found == {token: answer.count(token) for token in (*prompt, *answer)}


def test_marks_of_a_draft_leave_the_counts_as_they_were() -> None:
    counts = Counts([1, 2])
    counts.push(5)
    ahead = counts.marks(sampling(), [5, 6])
    assert dict(zip(ahead.tokens_N.tolist(), ahead.counts_N.tolist(), strict=True)) == {1: 0, 2: 0, 5: 2, 6: 1}
    now = counts.marks(sampling())
    assert dict(zip(now.tokens_N.tolist(), now.counts_N.tolist(), strict=True)) == {1: 0, 2: 0, 5: 1}


def test_edits_taken_back_equal_edits_never_made() -> None:
    options = sampling(frequency_penalty=1.0, repetition_penalty=1.2)
    edits, fresh = Edits(options, PROMPT), Edits(options, PROMPT)
    edits.follow([*PROMPT, 8, 8, 3])
    edits.rollback(2)
    fresh.follow([*PROMPT, 8])
    assert edits.counts is not None
    assert fresh.counts is not None
    assert edits.counts.answer == fresh.counts.answer
    assert edits.counts.marks(options).counts_N.tolist() == fresh.counts.marks(options).counts_N.tolist()


def test_state_that_was_lost_is_made_again_from_the_tokens() -> None:
    options = sampling(presence_penalty=2.0, repetition_penalty=1.7)
    kept, lost = sequence(options, [3, 3, 8]), sequence(options, [3, 3, 8])
    logits = logits_of(1)
    draw_at([Place(kept)], logits.clone())
    for one in (kept, lost):
        one.accept(12, 0.0)
        accepted(one, 12)
    lost.penalties = None
    assert draw_at([Place(kept)], logits.clone()).token_ids == draw_at([Place(lost)], logits.clone()).token_ids
    assert isinstance(kept.penalties, Edits)
    assert isinstance(lost.penalties, Edits)
    assert kept.penalties.counts is not None
    assert lost.penalties.counts is not None
    assert kept.penalties.counts.answer == lost.penalties.counts.answer == [3, 3, 8, 12]


def test_no_stop_token_is_drawn_before_min_tokens_and_every_one_after() -> None:
    options = sampling(temperature=0.0, min_tokens=3, stop_token_ids=(6, 7))
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [6, 7, 11]] = torch.tensor([9.0, 8.0, 1.0])
    drawn = [draw_at([Place(sequence(options, [1] * count))], logits.clone()).token_ids[0] for count in range(5)]
    assert drawn == [11, 11, 11, 6, 6]
    one = sequence(options, [1])
    assert draw_at([Place(one, (11,) * count) for count in range(3)], logits.repeat(3, 1)).token_ids == [11, 11, 6]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("neighbour", KINDS[:6])
def test_a_row_that_is_not_finite_fails_alone(poison: float, neighbour: dict[str, object]) -> None:
    places = [Place(sequence(sampling(**options), [3])) for options in (neighbour, {"presence_penalty": 1.0}, {})]
    logits = logits_of(3)
    expected = draw_at(places, logits.clone())
    for row in (1, 2):
        poisoned = logits.clone()
        poisoned[row, 40] = poison
        drawn = draw_at(places, poisoned)
        faults = [fault.code if fault else "" for fault in drawn.faults]
        assert faults == ["internal" if index == row else "" for index in range(3)]
        assert [token for index, token in enumerate(drawn.token_ids) if index != row] == [
            token for index, token in enumerate(expected.token_ids) if index != row
        ]


def test_rows_that_need_nothing_keep_no_state_and_never_end_by_themselves() -> None:
    plain = sequence(sampling(), [1, 2])
    draw_at([Place(plain)], logits_of(1))
    assert plain.penalties is None
    assert not complete(plain)


def test_greedy_answers_of_the_engine_follow_the_penalties_of_a_plain_loop(engine: LocalEngine) -> None:
    options = Sampling(
        seed=0,
        max_tokens=16,
        temperature=0.0,
        presence_penalty=0.6,
        frequency_penalty=0.3,
        repetition_penalty=1.3,
        logit_bias={11: 0.8, 5: -100.0},
        min_tokens=10,
        stop_token_ids=(3, 17, 40),
        top_logprobs=3,
    )
    prompt = [1, 20, 30, 40]
    completion = engine.generate([prompt], options)[0]
    answer: list[int] = []
    for token in completion.token_ids:
        row = engine.logits(prompt + answer)[-1].tolist()
        left = plain_sampling.edited(row, options, prompt, answer)
        assert token == plain_sampling.token(left, options, 0, len(prompt) + len(answer))
        answer.append(token)
    assert len(answer) >= 10


def test_preempted_answers_keep_their_penalties(model_dir: Path, make_engine: EngineMaker) -> None:
    requests = [
        Generate(
            id=str(row),
            prompt=[1, 20 + row, 30, 40],
            sampling=sampling(
                seed=row, max_tokens=90, repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.5
            ),
        )
        for row in range(8)
    ]
    roomy, tight = make_engine(model_dir), make_engine(model_dir, kv_tokens=256)
    alone = [roomy.generate([request])[0].token_ids for request in requests]
    for request in requests:
        tight.core.submit(b"c", request)
    sequences = list(tight.core._sequences.values())
    while tight.core.step():
        continue
    assert sum(one.preemptions for one in sequences) > 0
    assert [one.tokens[4:] for one in sequences] == alone
