"""JSON schemas, regular expressions and Lark grammars to matchers, through llguidance.

What a caller may ask for is bounded in size, in nesting and in the work it may cause, so that a hostile schema costs
milliseconds and a sentence. Compiling takes up to some tenths of a second without the interpreter lock.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from engine.grammar.matcher import GrammarMatcher, summary, unpack
from engine.messages import Grammar

MAX_BYTES = 64 * 1024
MAX_DEPTH = 64
CACHED = 64
# Between the parts of a JSON text: a line break and an indent, but no endless blanks, which small models fall into.
WHITESPACE = r"(\r?\n)?[ \t]{0,40}"
OPENING, CLOSING = frozenset("([{"), frozenset(")]}")


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the last ones. Safe to share between threads."""

    def __init__(self, tokenizer_json: Path, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._path, self._vocab_size, self._eos_ids = tokenizer_json, vocab_size, eos_ids
        self._lock = Lock()
        self._tokenizer: LLTokenizer | None = None
        self._cache: OrderedDict[Grammar, GrammarMatcher] = OrderedDict()

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at its beginning, the caller's own. Raises ValueError with a sentence for a refused grammar."""
        with self._lock:
            known = self._cache.get(grammar)
            if known is not None:
                self._cache.move_to_end(grammar)
                return known.copy()
        check_size(grammar)
        matcher = self._build(grammar)
        with self._lock:
            self._cache[grammar] = matcher
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
            return matcher.copy()

    def known(self, grammar: Grammar) -> GrammarMatcher | None:
        """A matcher of a grammar that was compiled before, without waiting for whoever compiles now."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            matcher = self._cache.get(grammar)
            if matcher is None:
                return None
            self._cache.move_to_end(grammar)
            return matcher.copy()
        finally:
            self._lock.release()

    def _build(self, grammar: Grammar) -> GrammarMatcher:
        tokenizer = self._load()
        built = LLMatcher(tokenizer, _source(grammar), log_level=0, limits=_limits())
        if built.is_error():
            raise ValueError(f"the {_name(grammar)} cannot be used: {summary(built.get_error())}")
        matcher = GrammarMatcher(built, tokenizer.vocab_size)
        if not self._has_beginning(matcher):
            raise ValueError(f"the {_name(grammar)} cannot be used: it is too complex or admits no text at all")
        return matcher

    def _has_beginning(self, matcher: GrammarMatcher) -> bool:
        words_1W = np.zeros((1, matcher.words), dtype=np.uint32)
        matcher.fill(words_1W[0])
        return not matcher.error and bool(unpack(words_1W, self._vocab_size).any())

    def _load(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _read_tokenizer(self._path, self._eos_ids)
            return self._tokenizer


def check_size(grammar: Grammar) -> None:
    """Raises ValueError when a grammar's text is longer or nested deeper than is taken."""
    size = len(grammar.text.encode())
    if size > MAX_BYTES:
        raise ValueError(f"the {_name(grammar)} has {size} bytes; at most {MAX_BYTES} are taken")
    if _depth(grammar.text) > MAX_DEPTH:
        raise ValueError(f"the {_name(grammar)} is nested too deep; at most {MAX_DEPTH} levels of brackets are taken")


def _source(grammar: Grammar) -> str:
    if grammar.kind == "regex":
        # \d and \w mean ASCII, as in JSON schemas' patterns: an answer full of Tibetan digits surprises.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.text, 'dw')}/")
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    try:
        schema = json.loads(grammar.text)
    except ValueError as error:
        raise ValueError(f"the JSON schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ValueError("the JSON schema must be an object")  # noqa: TRY004 - the request is bad, not a type in our code
    # Parsed again by llguidance, which is stricter: no NaN. No schema may have unknown keywords ignored.
    try:
        return LLMatcher.grammar_from_json_schema(
            grammar.text, overrides={"whitespace_pattern": WHITESPACE, "lenient": False}
        )
    except ValueError as error:
        raise ValueError(f"the JSON schema is not JSON: {error}") from error


def _limits() -> LLParserLimits:
    """A compile within 50 ms of lexer work, a step within 15, and at most 40 MB of lexer states per answer."""
    return LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _read_tokenizer(path: Path, eos_ids: Sequence[int]) -> LLTokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError("the model has no tokenizer.json: answers cannot be constrained") from error
    try:
        return LLTokenizer(text, eos_token=list(eos_ids) or None)
    except ValueError as error:
        raise ValueError(f"the model's tokenizer cannot constrain answers: {summary(str(error))}") from error


def _depth(text: str) -> int:
    """Deepest nesting of brackets, quoted ones counted too: a bound, for parsers that recurse."""
    deepest = depth = 0
    for letter in text:
        if letter in OPENING:
            depth += 1
            deepest = max(deepest, depth)
        elif letter in CLOSING and depth:
            depth -= 1
    return deepest


def _name(grammar: Grammar) -> str:
    return {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}[grammar.kind]
