"""engine.speculation.suffix in C++: the same drafts. One call for all rows, with buffers made once."""

import ctypes
import secrets
import struct
from array import array
from collections.abc import Sequence
from functools import cache

from engine.layers.sampler import MASK
from engine.native.build import library
from engine.native.library import Pointer
from engine.speculation.suffix import LONGEST, NOTHING, Ask, Proposal, Rivals

# SuffixRow of suffix.h: own, corpus; Draw's seed, choice, position, temperature, top_p, min_p, top_k; most, fresh,
# drawn, unused.
ROW = struct.Struct("=QQQqqfffiiiii")
LEAST_ROWS = 16
# Own tokens that wait for the next proposal, at most.
MOST_FRESH = 1024


class Text:
    """The newest tokens of a text and their index, in C++. Where memory runs out it stays as small as it is.

    An own text takes its tokens in when it is next drafted from, so that a step costs one call.
    """

    def __init__(self, capacity: int, *, own: bool) -> None:
        self.fresh: list[int] = []
        self._most_fresh = MOST_FRESH if own else 0
        # Kept: modules may be gone by the time that the last texts are.
        self._native = _functions()
        # 0: there was no memory for it; it then stays empty.
        self.handle: int = self._native.whet_suffix_open(capacity, _secret()) or 0

    def __len__(self) -> int:
        self._take_in()
        return int(self._native.whet_suffix_tokens(self.handle)) if self.handle else 0

    @property
    def bytes(self) -> int:
        """What it occupies."""
        self._take_in()
        return int(self._native.whet_suffix_bytes(self.handle)) if self.handle else 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens at the end; the oldest go where there is no room."""
        self.fresh += tokens
        if len(self.fresh) > self._most_fresh:
            self._take_in()

    def close(self) -> None:
        """Free it; nothing is found in it any more."""
        handle, self.handle, self.fresh = self.handle, 0, []
        if handle:
            self._native.whet_suffix_close(handle)

    def __del__(self) -> None:
        if getattr(self, "handle", 0):
            self.close()

    def _take_in(self) -> None:
        tokens, self.fresh = array("i", self.fresh), []
        if self.handle and tokens:
            self._native.whet_suffix_extend(self.handle, tokens.buffer_info()[0], len(tokens))


class Buffers:
    """What a call reads and writes, for so many rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.asked = bytearray(ROW.size * rows)
        self.tokens, self.shares = array("i", bytes(4 * LONGEST * rows)), array("d", bytes(8 * LONGEST * rows))
        self.counts, self.matches = array("i", bytes(4 * rows)), array("i", bytes(4 * rows))
        asked = (ctypes.c_char * len(self.asked)).from_buffer(self.asked)
        self.rivals = array("i", bytes(8 * rows))
        written = (self.tokens, self.shares, self.counts, self.matches, self.rivals)
        self.read = ctypes.addressof(asked)
        self.written = tuple(each.buffer_info()[0] for each in written)


_buffers: list[Buffers] = []


def propose(asks: Sequence[Ask]) -> list[Proposal]:
    """One draft per row; see engine.speculation.corpora.propose."""
    if not _buffers or _buffers[0].rows < len(asks):
        _buffers[:] = [Buffers(max(LEAST_ROWS, 2 * len(asks)))]
    buffers = _buffers[0]
    able = [ask for ask in asks if ask.own.handle]
    fresh: list[int] = []
    for at, ask in enumerate(able):
        _write(buffers.asked, at * ROW.size, ask)
        if ask.own.fresh:
            fresh += ask.own.fresh
            ask.own.fresh = []
    given = array("i", fresh)
    _functions().whet_suffix_propose(buffers.read, len(able), given.buffer_info()[0], *buffers.written)
    found = _read(buffers, len(able))
    if len(able) == len(asks):
        return found
    rest = iter(found)
    return [next(rest) if ask.own.handle else NOTHING for ask in asks]


def _write(asked: bytearray, at: int, ask: Ask) -> None:
    own, corpus, draw, most, drawn = ask
    seed, choice, position, temperature = 0, 0, 0, 0.0
    if draw is not None and draw.sampling.temperature > 0:
        seed, temperature = draw.sampling.seed & MASK, 1.0
        choice, position = draw.choice, draw.position
    theirs = corpus.handle if corpus is not None else 0
    drawn = drawn and temperature > 0
    ROW.pack_into(
        asked, at, own.handle, theirs, seed, choice, position, temperature, 1.0, 0.0, 0, most, len(own.fresh), drawn, 0
    )


def _read(buffers: Buffers, rows: int) -> list[Proposal]:
    """What the call wrote; lists are made once for all rows, which is most of the time here."""
    counts = buffers.counts[:rows].tolist()
    total = sum(counts)
    tokens, shares = buffers.tokens[:total].tolist(), buffers.shares[:total].tolist()
    matches, rivals = buffers.matches[:rows].tolist(), buffers.rivals[: 2 * rows].tolist()
    proposals = []
    first = 0
    for row, count in enumerate(counts):
        end = first + count
        plain, drawn = rivals[2 * row], rivals[2 * row + 1]
        known = None if plain == drawn else Rivals(plain, drawn)
        proposals.append(Proposal(tokens[first:end], matches[row], shares[first:end], known))
        first = end
    return proposals


@cache
def _secret() -> int:
    """The key of this process's hashes: whoever writes prompts must not be able to make them collide."""
    return secrets.randbits(64)


@cache
def _functions() -> ctypes.CDLL:
    native = library()
    native.whet_suffix_open.restype = Pointer
    native.whet_suffix_open.argtypes = [ctypes.c_int64, ctypes.c_uint64]
    native.whet_suffix_close.restype = None
    native.whet_suffix_close.argtypes = [Pointer]
    native.whet_suffix_extend.restype = None
    native.whet_suffix_extend.argtypes = [Pointer, Pointer, ctypes.c_int]
    native.whet_suffix_tokens.restype = ctypes.c_int64
    native.whet_suffix_tokens.argtypes = [Pointer]
    native.whet_suffix_bytes.restype = ctypes.c_int64
    native.whet_suffix_bytes.argtypes = [Pointer]
    native.whet_suffix_propose.restype = None
    native.whet_suffix_propose.argtypes = [Pointer, ctypes.c_int, *[Pointer] * 6]
    return native
