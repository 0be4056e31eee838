"""Near-duplicates of prompts: MinHash finds the candidates, exact Jaccard on the shingles decides.

Prompts of one application share their template, so the bar is high (0.95 of word 5-grams): a changed name in a
thirty-word prompt is another prompt, a changed comma in a long one is not. Where many prompts are compared at once,
shingles that half of them share are the template's and count for nothing.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE_WORDS = 5
WORDS_MOST = 5000  # of the end, where prompts of one template differ
THRESHOLD = 0.95
PERMUTATIONS = 64
BANDS = 8  # of 8 rows each: a pair as similar as THRESHOLD shares a band in 9,998 of 10,000 cases
CANDIDATES_MOST = 64
TEMPLATE_PROMPTS, TEMPLATE_SHARE = 50, 0.5

Messages = Sequence[dict[str, Any]]
Grams = frozenset[int]
Sketch = NDArray[np.uint32]


class Nearest(NamedTuple):
    """The most similar prompt of an index, by its place there."""

    place: int
    similarity: float


def shingles(messages: Messages) -> Grams:
    """Hashes of the word 5-grams of what the user side said; a shorter text is one shingle."""
    said = [_text(message.get("content")) for message in messages if message.get("role") != "system"]
    words = " ".join(said).lower().split()[-WORDS_MOST:]
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(crc32(" ".join(words[start : start + SHINGLE_WORDS]).encode()) for start in range(count))


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def without_template(prompts: Sequence[Grams]) -> list[Grams]:
    """The prompts without the shingles that half of them share; one that is nothing else stays whole."""
    if len(prompts) < TEMPLATE_PROMPTS:
        return list(prompts)
    counted = Counter(gram for grams in prompts for gram in grams)
    shared = {gram for gram, count in counted.items() if count > TEMPLATE_SHARE * len(prompts)}
    return [grams - shared or grams for grams in prompts] if shared else list(prompts)


class Prompt:
    """A prompt as it is compared; its sketch is made when first asked for."""

    def __init__(self, grams: Grams) -> None:
        self.grams = grams

    @cached_property
    def sketch(self) -> Sketch:
        """MinHash values, by which similarity can be estimated when the shingles are gone."""
        made = _empty_sketch().copy()
        made.update_batch(list(self.grams))
        values: Sketch = np.asarray(made.hashvalues, dtype=np.uint32)
        return values

    @cached_property
    def fingerprint(self) -> int:
        """Equal for prompts of the same shingles only, as a signed 64-bit integer."""
        listed = np.sort(np.fromiter(self.grams, dtype="<u4", count=len(self.grams)))
        return int.from_bytes(blake2b(listed.tobytes(), digest_size=8).digest(), signed=True)

    @cached_property
    def bands(self) -> tuple[int, ...]:
        """Keys of which near-duplicates share one, as signed 64-bit integers."""
        rows = self.sketch.astype("<u4").reshape(BANDS, -1)
        digests = (blake2b(bytes([place]) + row.tobytes(), digest_size=8).digest() for place, row in enumerate(rows))
        return tuple(int.from_bytes(digest, signed=True) for digest in digests)


@cache
def _empty_sketch() -> "MinHash":
    """Drawing permutations takes longer than a sketch; datasketch loads scipy, for which only curation should pay."""
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, hashfunc=_as_it_is)


def _as_it_is(value: int) -> int:
    return value


class Index:
    """Prompts to find near-duplicates in."""

    def __init__(self, prompts: Iterable[Prompt] = ()) -> None:
        self._prompts: list[Prompt] = []
        self._sketches = Sketches()
        self._first: dict[Grams, int] = {}
        for prompt in prompts:
            self.add(prompt)

    def add(self, prompt: Prompt) -> None:
        """It takes the next place."""
        self._first.setdefault(prompt.grams, len(self._prompts))
        self._prompts.append(prompt)
        self._sketches.add(prompt.sketch, prompt.bands)

    @property
    def size(self) -> int:
        return len(self._prompts)

    def nearest(self, prompt: Prompt, threshold: float = THRESHOLD) -> Nearest | None:
        """The near-duplicate most like it, the earliest of equals. Below THRESHOLD bands miss some: 4 in 100 at 0.87.

        Of many that share a band, the CANDIDATES_MOST that the sketches say are most alike are compared exactly.
        """
        equal = self._first.get(prompt.grams)
        if equal is not None:
            return Nearest(equal, 1.0)
        places = [one.place for one in self._sketches.likeliest(prompt.sketch, prompt.bands)]
        similar = [Nearest(place, jaccard(prompt.grams, self._prompts[place].grams)) for place in places]
        found = max(similar, key=lambda one: (one.similarity, -one.place), default=None)
        return found if found is not None and found.similarity >= threshold else None


class Sketches:
    """MinHash values by place, found through their bands."""

    def __init__(self) -> None:
        self._rows: NDArray[np.uint32] = np.empty((64, PERMUTATIONS), dtype=np.uint32)
        self._by_band: dict[int, list[int]] = {}
        self._size = 0

    def add(self, sketch: Sketch, bands: Iterable[int]) -> None:
        """It takes the next place."""
        if self._size == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[self._size] = sketch
        for band in bands:
            self._by_band.setdefault(band, []).append(self._size)
        self._size += 1

    def likeliest(self, sketch: Sketch, bands: Iterable[int]) -> list[Nearest]:
        """At most CANDIDATES_MOST that share a band, most alike by the sketches first, the earliest of equals first."""
        places = np.array(sorted({place for band in bands for place in self._by_band.get(band, ())}), dtype=np.intp)
        if not len(places):
            return []
        alike = np.count_nonzero(self._rows[places] == sketch, axis=1)
        order = np.argsort(-alike, kind="stable")[:CANDIDATES_MOST]
        return [Nearest(int(places[one]), int(alike[one]) / PERMUTATIONS) for one in order]


def jaccard(one: Grams, other: Grams) -> float:
    return len(one & other) / len(one | other)
