"""How far a prompt is from everything reviewed: by the engine's vectors, or by MinHash over word triples (Broder 1997).

Prompts of one application share their template, so there is no fixed distance that is far. A prompt is novel when it
is further from the nearest reviewed one than 19 in 20 reviewed prompts are from their own nearest, by the same measure:
where all prompts are unlike each other, none is more novel than the rest.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 3
SLOTS = 64
MOST_CHARACTERS = 20_000
# Prompts compared at once.
CHUNK = 64
LEAST_REVIEWED = 50
FAR = 0.95

# P is prompts, R reviewed prompts, S slots of a sketch, D dimensions of a vector.
Sketches = NDArray[np.uint32]
Vectors = NDArray[np.float32]
_random = np.random.default_rng(0x77686574)
_FACTORS: NDArray[np.uint64] = _random.integers(1 << 62, size=(SLOTS, 1), dtype=np.uint64) | np.uint64(1)
_OFFSETS: NDArray[np.uint64] = _random.integers(1 << 62, size=(SLOTS, 1), dtype=np.uint64)


def sketch(messages: Sequence[dict[str, Any]]) -> Sketches:
    """[S]: two prompts agree in as many slots as their sets of word triples overlap."""
    said = " ".join(_text(message.get("content")) for message in messages if message.get("role") != "system")
    words = said[:MOST_CHARACTERS].lower().split()
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    shingles = {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(count)}
    hashed = np.array([zlib.crc32(shingle.encode("utf-8", "replace")) for shingle in shingles], dtype=np.uint64)
    mixed = (_FACTORS * hashed + _OFFSETS) >> np.uint64(32)  # multiply-shift; wrapping is meant
    smallest: Sketches = mixed.min(axis=1).astype(np.uint32)
    return smallest


def _text(content: object) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def novel(prompts_PS: Sketches, reviewed_RS: Sketches) -> NDArray[np.bool_]:
    """[P] which prompts are further from all reviewed ones than those are from each other. None with few reviewed."""
    if len(reviewed_RS) < LEAST_REVIEWED or not len(prompts_PS):
        return np.zeros(len(prompts_PS), dtype=bool)
    own_R = _nearest(reviewed_RS, reviewed_RS, apart=True)
    return _nearest(prompts_PS, reviewed_RS) > np.quantile(own_R, FAR)


def novel_by_meaning(prompts_PD: Vectors, reviewed_RD: Vectors) -> NDArray[np.bool_]:
    """[P] as `novel`, by the angle between vectors of length 1."""
    if len(reviewed_RD) < LEAST_REVIEWED or not len(prompts_PD):
        return np.zeros(len(prompts_PD), dtype=bool)
    alike_RR = reviewed_RD @ reviewed_RD.T
    np.fill_diagonal(alike_RR, -1.0)
    usual = np.quantile(alike_RR.max(axis=1), 1 - FAR)
    far: NDArray[np.bool_] = (prompts_PD @ reviewed_RD.T).max(axis=1) < usual
    return far


def _nearest(prompts_PS: Sketches, reviewed_RS: Sketches, *, apart: bool = False) -> NDArray[np.float64]:
    """[P] 1 - the share of slots in common with the nearest; `apart` leaves out each one itself."""
    nearest = np.empty(len(prompts_PS))
    for start in range(0, len(prompts_PS), CHUNK):
        common_PR = (prompts_PS[start : start + CHUNK, None, :] == reviewed_RS[None, :, :]).sum(axis=2)
        if apart:
            rows = np.arange(len(common_PR))
            common_PR[rows, start + rows] = -1
        nearest[start : start + CHUNK] = 1 - common_PR.max(axis=1) / SLOTS
    return nearest
