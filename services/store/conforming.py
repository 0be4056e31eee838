"""Does a text keep to the format its request asked for? A person's correction need not, and must then not be served."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark


def conforms(grammar: Mapping[str, Any] | None, text: str) -> bool:
    """Whether `text` is a whole answer under the grammar as it is logged; anything is where there is none.

    Bytes are matched, not tokens, so no model is needed; what takes too much work counts as not conforming.
    """
    if not grammar:
        return True
    try:
        source = _source(str(grammar["kind"]), str(grammar["text"]))
        matcher = LLMatcher(_bytes(), source, log_level=0, limits=_limits())
    except ValueError:
        return False
    read = not matcher.is_error() and matcher.consume_tokens(list(text.encode()))
    return bool(read) and matcher.is_accepting()


def _source(kind: str, text: str) -> str:
    if kind == "regex":
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, 'dw')}/")
    if kind == "lark":
        return LLMatcher.grammar_from_lark(text)
    # People write blanks where the engine would not: the format is the same.
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": r"[ \t\r\n]*", "lenient": False})


@cache
def _bytes() -> LLTokenizer:
    return LLTokenizer("byte")


def _limits() -> LLParserLimits:
    return LLParserLimits(max_items_in_row=2000, initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000)
