"""Answers that must have a form: they always have it, whatever the model says, and no grammar can do harm."""

import json
import re
import shutil
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.client import Completion
from engine.grammar.compile import GrammarCompiler
from engine.grammar.matcher import Lookahead, mask_
from engine.messages import Generate, Grammar, Sampling
from engine.offline import LocalEngine
from engine.runner.sampling import Place, accepted, complete, draw_at
from engine.sequence import Sequence
from tests.engine.conftest import EngineMaker, ModelMaker
from tests.engine.constraining import (
    EOS,
    KNOWN,
    PERSON,
    TOKENIZER,
    VOCABULARY,
    constrained,
    regex,
    run,
    schema,
    text_of,
)


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(TOKENIZER))


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, VOCABULARY, [EOS])


def test_random_hot_models_answer_json_that_its_schema_accepts(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer
) -> None:
    options = [
        {"temperature": 1.5},
        {"temperature": 1.5, "presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 2.0},
        {"temperature": 0.0},
        {"top_k": 1, "logit_bias": dict.fromkeys(range(3, 40), 100.0)},
        {"top_p": 0.1, "min_tokens": 300},
    ]
    sequences = [
        constrained(compiler.compile(schema(PERSON)), **{"seed": seed} | options[seed % len(options)])
        for seed in range(30)
    ]
    assert run(sequences) == ["stop"] * 30
    for sequence in sequences:
        jsonschema.validate(json.loads(text_of(backend, sequence)), PERSON)


@pytest.mark.parametrize("weights", ["starter", "random"])
def test_real_models_answer_valid_json_even_hot(
    weights: str,
    compiler: GrammarCompiler,
    backend: tokenizers.Tokenizer,
    make_model: ModelMaker,
    make_engine: EngineMaker,
) -> None:
    engine = make_engine(TOKENIZER.parent if weights == "starter" else make_model(vocab_size=VOCABULARY))
    sequences = [constrained(compiler.compile(schema(PERSON)), seed=seed, temperature=1.5) for seed in range(3)]

    def model(asked: list[Sequence]) -> torch.Tensor:
        return torch.stack([engine.logits(sequence.tokens)[-1] for sequence in asked])

    assert run(sequences, model=model) == ["stop"] * 3
    for sequence in sequences:
        jsonschema.validate(json.loads(text_of(backend, sequence)), PERSON)


@pytest.fixture(scope="module")
def speaking_model(make_model: ModelMaker) -> Path:
    """A random model with the starter's tokenizer."""
    directory = make_model(vocab_size=VOCABULARY, eos_token_id=EOS)
    shutil.copy(TOKENIZER, directory)
    return directory


def test_constrained_answers_of_an_engine_are_the_same_alone_and_in_a_crowd_that_is_preempted(
    speaking_model: Path, backend: tokenizers.Tokenizer, make_engine: EngineMaker
) -> None:
    requests = [
        Generate(
            id=str(row),
            choice=row % 3,
            prompt=[5, 6, 7],
            grammar=schema(PERSON) if row % 4 else None,
            sampling=Sampling(
                seed=row, max_tokens=150, temperature=1.5, stop_token_ids=(EOS,), presence_penalty=row % 2
            ),
        )
        for row in range(12)
    ]
    roomy, tight = make_engine(speaking_model), make_engine(speaking_model, kv_tokens=256)
    alone = [answered(roomy, request) for request in requests]
    for request in requests:
        tight.core.submit(b"c", request)
    sequences = list(tight.core._sequences.values())
    drain(tight)
    assert sum(one.preemptions for one in sequences) > 0
    assert [one.tokens[3:] for one in sequences] == [completion.token_ids for completion in alone]
    for request, completion in zip(requests, alone, strict=True):
        if request.grammar is not None:
            assert completion.finished.reason == "stop"
            jsonschema.validate(json.loads(backend.decode(completion.token_ids)), PERSON)


def test_an_engine_refuses_a_bad_grammar_and_goes_on(speaking_model: Path, make_engine: EngineMaker) -> None:
    engine, sampling = make_engine(speaking_model), Sampling(seed=0, max_tokens=9, stop_token_ids=(EOS,))
    bad, good = (
        answered(engine, Generate(id=pattern, prompt=[5], sampling=sampling, grammar=regex(pattern)))
        for pattern in ("a(b", "[0-9]{9}")
    )
    assert (bad.finished.reason, bad.finished.code, bad.token_ids) == ("error", "invalid_request", [])
    assert "unclosed group" in (bad.finished.error or "")
    # Complete with the last token it may have: that is an end, not a cut.
    assert good.finished.reason == "stop"


def answered(engine: LocalEngine, request: Generate) -> Completion:
    return engine.generate([request])[0]


def drain(engine: LocalEngine) -> None:
    """Step to the end; grammars are compiled in another thread meanwhile."""
    until = time.monotonic() + 60
    while engine.core.in_flight:
        assert time.monotonic() < until
        engine.core.step()


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{4}-\d{2}-\d{2}",
        r"(yes|no|maybe)",
        r"[A-Z][a-z]{0,9}( [A-Z][a-z]{0,9}){1,2}",
        r"(ab)*c|d{3}",
        r"ü+ß?",
        r"[\d/]{2}\w\W",
    ],
)
def test_answers_match_the_whole_regular_expression(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer, pattern: str
) -> None:
    sequences = [constrained(compiler.compile(regex(pattern)), seed=seed, temperature=1.5) for seed in range(8)]
    reasons = run(sequences)
    assert set(reasons) <= {"stop", "length"}
    assert reasons.count("stop") >= 6
    for sequence, reason in zip(sequences, reasons, strict=True):
        assert reason == "length" or re.fullmatch(pattern, text_of(backend, sequence), re.ASCII)


def test_answers_follow_a_lark_grammar(compiler: GrammarCompiler, backend: tokenizers.Tokenizer) -> None:
    grammar = Grammar(kind="lark", text='start: "sum " term ("+" term){1,3}\nterm: DIGITS\nDIGITS: /[1-9][0-9]{0,2}/')
    sequences = [constrained(compiler.compile(grammar), seed=seed) for seed in range(8)]
    assert run(sequences) == ["stop"] * 8
    for sequence in sequences:
        assert re.fullmatch(r"sum [1-9]\d{0,2}(\+[1-9]\d{0,2}){1,3}", text_of(backend, sequence))


LEAVES = st.one_of(
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-50, 50),
        st.integers(0, 99),
    ),
    st.builds(lambda longest: {"type": "string", "maxLength": longest}, st.integers(0, 6)),
    st.builds(
        lambda choices: {"enum": choices}, st.lists(st.text('aé"\\ {', max_size=4), min_size=1, max_size=4, unique=True)
    ),
    st.sampled_from(
        [{"type": "boolean"}, {"type": "null"}, {"const": {"a": [1, None]}}, {"type": "string", "format": "date"}]
    ),
)


def _objects(inner: st.SearchStrategy[dict[str, object]]) -> st.SearchStrategy[dict[str, object]]:
    properties = st.dictionaries(st.text('abß "', min_size=1, max_size=4), inner, max_size=3)
    return properties.flatmap(
        lambda found: st.builds(
            lambda required: {
                "type": "object",
                "properties": found,
                "required": required,
                "additionalProperties": False,
            },
            st.lists(st.sampled_from(sorted(found)), unique=True) if found else st.just([]),
        )
    )


def _arrays(inner: st.SearchStrategy[dict[str, object]]) -> st.SearchStrategy[dict[str, object]]:
    return st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3))


@given(
    content=st.recursive(LEAVES, lambda inner: st.one_of(_objects(inner), _arrays(inner)), max_leaves=5),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_simple_schema_is_obeyed(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer, content: dict[str, object], seed: int
) -> None:
    sequence = constrained(compiler.compile(schema(content)), seed=seed, temperature=1.3, max_tokens=2000)
    assert run([sequence], seed % 1000) == ["stop"]
    jsonschema.validate(json.loads(text_of(backend, sequence)), content)


def test_pretty_and_compact_json_are_both_admitted(compiler: GrammarCompiler, backend: tokenizers.Tokenizer) -> None:
    value = {"name": "Al", "age": 7, "tags": ["new", "vip"]}
    for text in (json.dumps(value), json.dumps(value, indent=4), json.dumps(value, separators=(",", ":"))):
        tokens = backend.encode(text).ids
        assert compiler.compile(schema(PERSON)).validate(tokens) == len(tokens)


def test_a_mask_admits_exactly_the_tokens_that_validate(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer
) -> None:
    matcher = compiler.compile(regex(r"[ab]{2,9}(c|\n)"))
    for token in backend.encode("ab").ids:
        matcher.accept(token)
    logits = torch.zeros(VOCABULARY)
    assert matcher.mask_(logits) == ""
    admitted = {token for token in range(KNOWN) if matcher.validate([token]) == 1}
    assert {token for token, logit in enumerate(logits.tolist()) if logit == 0} == admitted
    assert 0 < len(admitted) < 50


def test_the_end_is_admitted_only_where_the_grammar_may_end(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer
) -> None:
    matcher, other_stop = compiler.compile(regex("a{2,3}")), 1
    letter = backend.encode("a").ids[0]
    ends = []
    for _ in range(3):
        logits = torch.zeros(VOCABULARY)
        matcher.mask_(logits, (EOS, other_stop))
        ends.append([logits[EOS].item() == 0, logits[other_stop].item() == 0])
        matcher.accept(letter, (EOS, other_stop))
    assert ends == [[False, False], [False, False], [True, True]]
    assert matcher.complete


@pytest.mark.parametrize("stop", [EOS, 1])
def test_a_stop_token_completes_and_can_be_taken_back(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer, stop: int
) -> None:
    matcher = compiler.compile(regex("a{2,30}"))
    letters = backend.encode("aaa").ids
    for token in letters:
        assert matcher.accept(token, (stop,))
    assert not matcher.complete
    assert matcher.accept(stop, (stop,))
    assert matcher.complete
    assert matcher.validate([letters[0]], (stop,)) == 0
    matcher.rollback(1)
    assert not matcher.complete
    assert matcher.validate([letters[0]], (stop,)) == 1


def test_a_rolled_back_matcher_equals_one_that_never_went_ahead(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer
) -> None:
    ahead, fresh = compiler.compile(schema(PERSON)), compiler.compile(schema(PERSON))
    tokens = backend.encode('{"name": "Bo", "age": 12, "tags": []}').ids
    for token in tokens:
        assert ahead.accept(token)
    assert ahead.complete
    for count in (3, len(tokens) - 3):
        ahead.rollback(count)
    rows = torch.zeros(2, VOCABULARY)
    mask_(rows, [Lookahead(0, ahead, (), (EOS,), False), Lookahead(1, fresh, (), (EOS,), False)])
    assert torch.equal(rows[0], rows[1])
    assert not ahead.complete


@pytest.mark.parametrize("unknown", [KNOWN, VOCABULARY - 1, VOCABULARY, 2**40, -1])
def test_a_draft_of_ids_that_no_text_has_is_not_admitted_and_leaves_nothing_behind(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer, unknown: int
) -> None:
    matcher, fresh = compiler.compile(regex("ab{3}")), compiler.compile(regex("ab{3}"))
    letter = backend.encode("a").ids[0]
    assert matcher.validate([letter, unknown, letter]) == 1
    assert matcher.validate([letter, unknown], (unknown,)) == 1
    words_PW = np.zeros((2, matcher.words), dtype=np.uint32)
    assert not matcher.fill(words_PW[0], (letter, unknown))
    assert not matcher.error
    assert matcher.fill(words_PW[0], (letter,))
    assert fresh.fill(words_PW[1], (letter,))
    assert (words_PW[0] == words_PW[1]).all()


def test_drafts_are_validated_to_their_first_inadmissible_token(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer
) -> None:
    matcher = compiler.compile(regex("ab{3}"))
    letters = [backend.encode(letter).ids[0] for letter in "abxbb"]
    assert matcher.validate(letters) == 2
    spelled = [backend.encode(letter).ids[0] for letter in "abbb"]
    assert matcher.validate([*spelled, EOS], (EOS,)) == 5
    assert matcher.validate([*spelled[:3], EOS], (EOS,)) == 3
    assert matcher.validate([EOS], (EOS,)) == 0
    assert matcher.validate(spelled) == 4


def test_places_behind_a_draft_draw_what_they_draw_once_it_is_accepted(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer
) -> None:
    draft = tuple(backend.encode('{"name": "Bo", "age": 12').ids)
    ahead = constrained(compiler.compile(schema(PERSON)), presence_penalty=1.0)
    logits = torch.randn(len(draft) + 1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    # The draft comes: places behind one that did not are left out.
    logits[range(len(draft)), draft] += 40
    together = draw_at([Place(ahead, draft[:count]) for count in range(len(draft) + 1)], logits.clone())
    assert list(together.faults) == [None] * (len(draft) + 1)
    walking = constrained(compiler.compile(schema(PERSON)), presence_penalty=1.0)
    for count, token in enumerate(draft):
        alone = draw_at([Place(walking)], logits[count : count + 1].clone())
        assert alone.token_ids[0] == together.token_ids[count]
        walking.accept(token, 0.0)
        accepted(walking, token)
    assert draw_at([Place(walking)], logits[-1:].clone()).token_ids[0] == together.token_ids[-1]


def test_behind_a_draft_that_is_not_admitted_is_a_fault_of_that_place_alone(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer
) -> None:
    sequence = constrained(compiler.compile(regex("[0-9]{3}")))
    one, letter = backend.encode("1").ids[0], backend.encode("x").ids[0]
    places = [Place(sequence), Place(sequence, (letter,)), Place(sequence, (letter, one)), Place(sequence, (one, EOS))]
    drawn = draw_at(places, torch.randn(4, VOCABULARY))
    assert [fault is None for fault in drawn.faults] == [True, False, False, False]
    assert run([sequence]) == ["stop"]
    assert re.fullmatch("[0-9]{3}", backend.decode(sequence.tokens[2:]))


def test_rows_without_a_grammar_are_not_touched_by_their_neighbours(compiler: GrammarCompiler) -> None:
    free = Sequence(b"", Generate(id="f", prompt=[5], sampling=Sampling(seed=9, max_tokens=9)), 0, 10)
    logits = torch.randn(3, VOCABULARY)
    alone = draw_at([Place(free)], logits[1:2].clone())
    bound = [constrained(compiler.compile(regex("[0-9]{3}"))) for _ in range(2)]
    mixed = draw_at([Place(bound[0]), Place(free), Place(bound[1])], logits.clone())
    assert mixed.token_ids[1] == alone.token_ids[0]
    assert mixed.logprobs[1] == pytest.approx(alone.logprobs[0], abs=1e-6)


def test_reported_logprobs_are_the_models_own_not_the_grammars(compiler: GrammarCompiler) -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(4))
    own = logits[0].log_softmax(-1)
    sequence = constrained(compiler.compile(regex("(yes|no)")), top_logprobs=5)
    drawn = draw_at([Place(sequence)], logits)
    assert drawn.logprobs[0] == pytest.approx(own[drawn.token_ids[0]].item(), abs=1e-5)
    assert [token for token, _ in drawn.top[0]] == own.topk(5).indices.tolist()


def test_a_grammar_wins_over_min_tokens_where_only_the_end_is_left(compiler: GrammarCompiler) -> None:
    assert run([constrained(compiler.compile(regex("")), min_tokens=50)]) == ["stop"]


def test_min_tokens_delays_the_end_where_the_grammar_leaves_a_choice(compiler: GrammarCompiler) -> None:
    sequences = [
        constrained(compiler.compile(regex("a*")), min_tokens=20, seed=seed, logit_bias={EOS: 100.0})
        for seed in range(3)
    ]
    assert run(sequences) == ["stop"] * 3
    assert [sequence.produced for sequence in sequences] == [21] * 3


def test_a_token_taken_without_the_mask_ends_its_request_alone(
    compiler: GrammarCompiler, backend: tokenizers.Tokenizer
) -> None:
    wrong, right = (constrained(compiler.compile(regex("[0-9]{3}")), seed=seed) for seed in range(2))
    token = backend.encode("x").ids[0]
    wrong.accept(token, 0.0)
    accepted(wrong, token)
    assert not complete(wrong)
    drawn = draw_at([Place(wrong), Place(right)], torch.randn(2, VOCABULARY))
    assert drawn.faults[0] is not None
    assert drawn.faults[0].code == "internal"
    assert drawn.faults[1] is None


def test_a_grammar_that_becomes_too_complex_on_its_way_ends_the_request_with_the_reason(
    compiler: GrammarCompiler,
) -> None:
    reasons = run(
        [constrained(compiler.compile(regex("(?:a?){5000}a{5000}"))), constrained(compiler.compile(regex("ab")))]
    )
    assert "grammar cannot go on" in reasons[0]
    assert reasons[1] == "stop"
