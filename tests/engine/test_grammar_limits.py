"""Hostile and costly grammars: refused with a sentence, or bounded in time at every step."""

import json
import time
from pathlib import Path
from threading import Thread

import pytest
import tokenizers
import torch

from engine.grammar.compile import CACHED, MAX_BYTES, MAX_DEPTH, GrammarCompiler
from engine.messages import Grammar
from tests.engine.constraining import (
    EOS,
    PERSON,
    TOKENIZER,
    VOCABULARY,
    constrained,
    regex,
    run,
    schema,
)


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(TOKENIZER))


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, VOCABULARY, [EOS])


HOSTILE: dict[str, Grammar] = {
    "deep": Grammar(kind="json_schema", text='{"items":' * 5000 + "{}" + "}" * 5000),
    "deeper than is taken": schema(json.loads('{"items":' * MAX_DEPTH + "{}" + "}" * MAX_DEPTH)),
    "long": schema({"enum": ["x" * MAX_BYTES]}),
    "impossible": schema({"enum": []}),
    "contradiction": schema({"type": "integer", "minimum": 5, "maximum": 2}),
    "not JSON": Grammar(kind="json_schema", text="{'type': 'object'}"),
    "not finite": Grammar(kind="json_schema", text='{"minimum": NaN}'),
    "not an object": Grammar(kind="json_schema", text="[]"),
    "wrong type": schema({"type": "person"}),
    "unknown keyword": schema({"type": "object", "x-guidance": {"lenient": True}, "not": {"type": "string"}}),
    "file": schema({"$ref": "file:///etc/hostname"}),
    "network": schema({"$ref": "http://127.0.0.1:9/schema"}),
    "dangling": schema({"$ref": "#/$defs/none"}),
    "product": schema(
        {"allOf": [{"anyOf": [{"required": [f"{row}-{column}"]} for column in range(8)]} for row in range(12)]}
    ),
    "reference to itself": schema({"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}),
    "bad pattern": schema({"type": "string", "pattern": "(?<=a)b"}),
    "unclosed": regex("a(b"),
    "nothing fits": regex(r"[^\s\S]"),
    "parentheses": regex("(" * 10_000 + ")" * 10_000),
    "dots": regex(".*" * 2000 + "x"),
    "empty": Grammar(kind="lark", text=""),
    "undefined": Grammar(kind="lark", text='start: "a" b'),
    "endless": Grammar(kind="lark", text="start: start"),
    "deep rule": Grammar(kind="lark", text="start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "import": Grammar(kind="lark", text="%import secrets.key\nstart: key"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_at_once_with_one_line(compiler: GrammarCompiler, name: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=r"^the (JSON schema|regular expression|grammar) ") as refusal:
        compiler.compile(HOSTILE[name])
    assert time.process_time() - began < 2
    assert len(str(refusal.value)) < 400
    assert "\n" not in str(refusal.value)


def doubling(depth: int) -> dict[str, object]:
    halves = {f"d{level}": {"allOf": [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(depth)}
    return {**halves, f"d{depth}": {}}


BOUNDED: dict[str, Grammar] = {
    "many choices": schema({"enum": [f"value {place}" for place in range(4000)]}),
    "recursive reference": schema({"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}}),
    "doubling references": schema({"$ref": "#/$defs/d0", "$defs": doubling(40)}),
    "nested repetition": regex("((a{1,1000}){1,1000}){1,1000}b"),
    "backtracking": regex("(x+x+)+y"),
    "long string": schema({"type": "string", "minLength": 10**7, "maxLength": 10**9}),
    "two thousand properties": schema({"type": "object", "properties": {f"p{place}": {} for place in range(2000)}}),
    "many items": schema({"type": "array", "minItems": 10**6, "items": {"type": "array", "maxItems": 10**6}}),
    "exponential automaton": regex(".*a.{40}"),
    "ambiguous": Grammar(kind="lark", text='start: x{0,500}\nx: "a" | "a" "a" | x x |'),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_costly_grammars_cost_bounded_time_to_compile_and_at_every_step(compiler: GrammarCompiler, name: str) -> None:
    began = time.process_time()
    sequence = constrained(compiler.compile(BOUNDED[name]), max_tokens=60, temperature=1.5)
    assert time.process_time() - began < 2
    began = time.process_time()
    assert run([sequence])[0]
    assert time.process_time() - began < 3


def test_compiled_grammars_are_kept_but_never_shared(compiler: GrammarCompiler, backend: tokenizers.Tokenizer) -> None:
    fresh = GrammarCompiler(TOKENIZER, VOCABULARY, [EOS])
    first = fresh.compile(regex("[0-9]{3}"))
    for token in backend.encode("123").ids:
        first.accept(token)
    second = fresh.compile(regex("[0-9]{3}"))
    assert first.complete
    assert not second.complete
    for place in range(2 * CACHED):
        fresh.compile(regex(f"a{{{place}}}"))
    assert len(fresh._cache) == CACHED


def test_threads_may_compile_while_answers_run(compiler: GrammarCompiler) -> None:
    failures: list[Exception] = []

    def compile_many(worker: int) -> None:
        try:
            for place in range(30):
                compiler.compile(schema({"type": "integer", "minimum": 0, "maximum": 100 * worker + place % 7}))
        except Exception as error:
            failures.append(error)

    threads = [Thread(target=compile_many, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    answers = run([constrained(compiler.compile(schema(PERSON)), seed=seed) for seed in range(4)])
    for thread in threads:
        thread.join()
    assert failures == []
    assert answers == ["stop"] * 4


@pytest.mark.parametrize("content", [None, "{}", "not JSON"])
def test_a_model_without_a_usable_tokenizer_refuses_grammars_clearly(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="constrain"):
        GrammarCompiler(path, VOCABULARY, [EOS]).compile(regex("a"))


def test_a_vocabulary_smaller_than_the_tokenizers_never_leads_outside_the_model(backend: tokenizers.Tokenizer) -> None:
    small = GrammarCompiler(TOKENIZER, 300, [EOS])
    matcher = small.compile(regex("[a-z ]{5}"))
    logits = torch.zeros(300)
    assert matcher.mask_(logits, (EOS, 5000)) == ""
    assert logits.max() == 0
