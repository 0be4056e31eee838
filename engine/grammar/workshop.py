"""Compiles grammars beside the step loop, in one thread; the sequences that need them wait meanwhile."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from engine.grammar.compile import GrammarCompiler
from engine.grammar.matcher import GrammarMatcher
from engine.messages import Grammar
from engine.sequence import Sequence
from engine.text.tokenizer import Tokenizer


class Outcome(NamedTuple):
    """A sequence that need not wait any more: its matcher, or why there is none."""

    sequence: Sequence
    matcher: GrammarMatcher | None
    # The caller's fault, as a sentence.
    refusal: str
    # Ours.
    failure: str


class GrammarWorkshop:
    """All methods belong to the engine's thread; only compiling happens elsewhere."""

    def __init__(self, model: Path, vocab_size: int, wake: Callable[[], None]) -> None:
        self._model, self._vocab_size, self._wake = model, vocab_size, wake
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-compiler")
        self._compiler: GrammarCompiler | None = None
        self._waiting: dict[Sequence, Future[GrammarMatcher]] = {}

    def order(self, sequence: Sequence, grammar: Grammar) -> None:
        """Have the sequence's grammar compiled; `finished` will hand it back."""
        future = self._thread.submit(self._compile, grammar)
        self._waiting[sequence] = future
        future.add_done_callback(lambda _: self._wake())

    def discard(self, sequence: Sequence) -> None:
        """The sequence ended before its grammar was ready, or never needed one."""
        future = self._waiting.pop(sequence, None)
        if future is not None:
            future.cancel()

    def finished(self) -> Iterator[Outcome]:
        """Sequences whose grammar is ready or refused; each is named once."""
        for sequence, future in list(self._waiting.items()):
            if not future.done():
                continue
            del self._waiting[sequence]
            error = future.exception()
            if error is None:
                yield Outcome(sequence, future.result(), "", "")
            elif isinstance(error, ValueError):
                yield Outcome(sequence, None, str(error), "")
            else:
                yield Outcome(sequence, None, "", f"the grammar failed: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> GrammarMatcher:
        # Only this thread comes here. Most engines never compile a grammar and need no tokenizer.
        if self._compiler is None:
            ends = Tokenizer.load(self._model).eos_ids
            self._compiler = GrammarCompiler(self._model / "tokenizer.json", self._vocab_size, ends)
        return self._compiler.compile(grammar)
