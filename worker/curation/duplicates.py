"""Near-duplicates across the splits: MinHash finds the pairs, exact Jaccard on the shingles decides.

Prompts of one application share their template, so the bar is high (0.95 of word 5-grams): a changed name in a
thirty-word prompt is another prompt, a changed comma in a long one is not.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE_WORDS = 5
THRESHOLD = 0.95
PERMUTATIONS = 64

Messages = Sequence[dict[str, Any]]


def shingles(messages: Messages) -> frozenset[str]:
    """Word 5-grams of what the user side said; a shorter text is one shingle."""
    said = [_text(message.get("content")) for message in messages if message.get("role") != "system"]
    words = " ".join(said).lower().split()
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(" ".join(words[start : start + SHINGLE_WORDS]) for start in range(count))


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def near_duplicates(train: Sequence[Messages], held_out: Iterable[Messages]) -> set[int]:
    """Indices of the training prompts that a held-out prompt nearly repeats."""
    from datasketch import MinHashLSH  # drags in scipy: half a second that only a build should pay

    grams = [shingles(messages) for messages in train]
    index = MinHashLSH(threshold=THRESHOLD - 0.1, num_perm=PERMUTATIONS)
    with index.insertion_session() as insertion:
        for position, gram in enumerate(grams):
            insertion.insert(str(position), _sketch(gram))
    found: set[int] = set()
    for gram in {shingles(messages) for messages in held_out}:
        nominated = (int(key) for key in index.query(_sketch(gram)))
        found.update(position for position in nominated if _jaccard(gram, grams[position]) >= THRESHOLD)
    return found


def _sketch(gram: frozenset[str]) -> "MinHash":
    from datasketch import MinHash

    sketch = MinHash(num_perm=PERMUTATIONS)
    sketch.update_batch([shingle.encode() for shingle in gram])
    return sketch


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
