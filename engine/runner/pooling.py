"""One vector from the hidden states of a prompt, which arrive in chunks, in order, one step after another.

Suffixes: T tokens of a chunk, E hidden size, N the vector's length (E, or the number of labels).
"""

import torch

from engine.layers.score import ScoreHead
from engine.messages import Pool, Pooling

HOW: tuple[Pooling, ...] = ("last", "mean", "first", "classify")


class Pooler:
    """Pools the final (normalised) hidden states of one prompt of `length` tokens. Holds one vector, never the states.

    `last`, `first` and `mean` give E numbers; `classify` the head's raw scores of the last token, which is where
    decoders with a classification head are trained to decide. Raises ValueError for `classify` without a `head`.
    """

    def __init__(self, length: int, how: Pooling, head: ScoreHead | None = None, slot: int = 0) -> None:
        if how not in HOW:
            raise ValueError(f"pooling {how!r} is not one of {', '.join(HOW)}")
        if how == "classify" and head is None:
            raise ValueError("this model has no classification head")
        self.length, self.how = length, how
        self._head, self._slot = head, slot
        self._next = 0
        self._kept_E: torch.Tensor | None = None

    @torch.inference_mode()
    def add(self, hidden_TE: torch.Tensor, start: int | None = None) -> None:
        """Take the next chunk; `start` is the position of its first token when it is not simply the next one.

        A chunk that starts at an earlier position begins anew there (the prompt was preempted and is computed again).
        One that skips tokens (they were cached) is only possible for `last` and `classify`.
        """
        start = self._next if start is None else start
        if start > self._next and self.how in ("mean", "first"):
            raise ValueError(f"{self.how} pooling needs every token, but {self._next} .. {start - 1} never came")
        if start < self._next:
            assert start == 0 or self.how in ("last", "classify"), "a sum cannot be taken back in part"
            self._kept_E = None
        self._next = start + len(hidden_TE)
        assert self._next <= self.length, "more hidden states than the prompt has tokens"
        if self.how == "mean":
            sum_E = hidden_TE.float().sum(dim=0)
            self._kept_E = sum_E if self._kept_E is None else self._kept_E + sum_E
        elif self.how != "first" or self._kept_E is None:
            # A copy: a view would keep the whole step's states, and their buffer is used again.
            self._kept_E = hidden_TE[0 if self.how == "first" else -1].to(torch.float32, copy=True)

    @property
    def complete(self) -> bool:
        """Whether the last token's state has come."""
        return self._next == self.length

    @torch.inference_mode()
    def vector(self) -> torch.Tensor:
        """The result [N], fp32 on CPU. Only when complete."""
        assert self.complete, "pooling before the prompt's last token"
        assert self._kept_E is not None
        if self.how == "classify":
            assert self._head is not None
            return self._head(self._kept_E, self._slot).cpu()
        return (self._kept_E / self.length if self.how == "mean" else self._kept_E).cpu()

    def finish(self) -> bytes:
        """The result as `Pooled.vector` carries it: little-endian fp32."""
        return vector_bytes(self.vector())


def readable(request: Pool, pad_token: int | None) -> list[int]:
    """The prompt without padding at its end, where a head is asked: heads read the last token that is none."""
    end = len(request.prompt)
    while request.how == "classify" and end > 1 and request.prompt[end - 1] == pad_token:
        end -= 1
    return request.prompt[:end]


def vector_bytes(vector_N: torch.Tensor) -> bytes:
    """Little-endian fp32 bytes of a vector."""
    return vector_N.float().cpu().numpy().astype("<f4").tobytes()
