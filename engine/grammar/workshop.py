"""Compiles grammars beside the step loop, in one thread; the sequences that need them wait meanwhile.

Shares take turns, so that nobody waits behind all the grammars of another. One compiled before is at hand at once.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
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


class Orders:
    """Sequences whose grammars are to be compiled, by share. Used by two threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._shares: OrderedDict[str, dict[Sequence, Future[GrammarMatcher]]] = OrderedDict()

    def add(self, sequence: Sequence, future: Future[GrammarMatcher]) -> None:
        """Line up behind the others of the same share."""
        with self._lock:
            self._shares.setdefault(sequence.request.share, {})[sequence] = future

    def discard(self, sequence: Sequence) -> None:
        """Leave the line, if the sequence still stands in it."""
        with self._lock:
            line = self._shares.get(sequence.request.share, {})
            if line.pop(sequence, None) is not None and not line:
                del self._shares[sequence.request.share]

    def take(self) -> tuple[Sequence, Future[GrammarMatcher]] | None:
        """The oldest of the share whose turn it is; None when there is nothing left to do."""
        with self._lock:
            if not self._shares:
                return None
            share, line = self._shares.popitem(last=False)
            sequence = next(iter(line))
            future = line.pop(sequence)
            if line:
                self._shares[share] = line
            return sequence, future


class GrammarWorkshop:
    """All methods belong to the engine's thread; only compiling happens elsewhere."""

    def __init__(self, model: Path, vocab_size: int, wake: Callable[[], None]) -> None:
        self._model, self._vocab_size, self._wake = model, vocab_size, wake
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-compiler")
        self._compiler: GrammarCompiler | None = None
        self._orders = Orders()
        self._waiting: dict[Sequence, Future[GrammarMatcher]] = {}

    def order(self, sequence: Sequence, grammar: Grammar) -> None:
        """Have the sequence's grammar compiled; `finished` will hand it back, at once if it is known."""
        future: Future[GrammarMatcher] = Future()
        self._waiting[sequence] = future
        known = self._compiler.known(grammar) if self._compiler is not None else None
        if known is not None:
            future.set_result(known)
        else:
            self._orders.add(sequence, future)
            self._thread.submit(self._work)

    def discard(self, sequence: Sequence) -> None:
        """The sequence ended before its grammar was ready, or never needed one."""
        if self._waiting.pop(sequence, None) is not None:
            self._orders.discard(sequence)

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

    def _work(self) -> None:
        """Compile whose turn it is: as many calls as orders, but not each for the order that caused it."""
        order = self._orders.take()
        if order is None:
            return
        sequence, future = order
        try:
            assert sequence.request.grammar is not None, "only constrained sequences are ordered"
            future.set_result(self._compile(sequence.request.grammar))
        except BaseException as error:
            future.set_exception(error)
        self._wake()

    def _compile(self, grammar: Grammar) -> GrammarMatcher:
        # Only this thread makes the compiler. Most engines never compile a grammar and need no tokenizer.
        if self._compiler is None:
            ends = Tokenizer.load(self._model).eos_ids
            self._compiler = GrammarCompiler(self._model / "tokenizer.json", self._vocab_size, ends)
        return self._compiler.compile(grammar)
