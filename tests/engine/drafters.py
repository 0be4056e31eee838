"""Drafters that know the answers, nearly know them, or mean harm. All obey the one rule: at most `most` tokens."""

import random
from collections.abc import Sequence as Many

from engine.sequence import Sequence
from tests.engine.lossless import Answer, Drafter


class Oracle:
    """Knows what requests answer, by their id; drafts it, or spoils it."""

    def __init__(self, answers: dict[str, Answer], vocabulary: int, seed: int = 0) -> None:
        self._answers, self._vocabulary = answers, vocabulary
        self._dice = random.Random(seed)

    def right(self, sequence: Sequence, most: int) -> list[int]:
        """What will come, and nonsense behind its end."""
        rest = self._answers[sequence.request.id].tokens[sequence.produced :][:most]
        return rest + self.nonsense(sequence, most - len(rest))

    def wrong(self, sequence: Sequence, most: int) -> list[int]:
        """Never what will come."""
        return [(token + 1) % self._vocabulary for token in self.right(sequence, most)]

    def nonsense(self, sequence: Sequence, most: int) -> list[int]:
        """Any tokens."""
        return [self._dice.randrange(self._vocabulary) for _ in range(most)]

    def runner_up(self, sequence: Sequence, most: int) -> list[int]:
        """The likeliest tokens but one: plausible, and wrong wherever the likeliest is drawn."""
        tops = self._answers[sequence.request.id].top[sequence.produced :][:most]
        return [top[1][0] for top in tops]

    def partly(self, sequence: Sequence, most: int) -> list[int]:
        """Right as far as chance wills, then wrong; sometimes nothing at all."""
        right = self._dice.randint(0, most)
        draft = self.right(sequence, most)
        return (draft[:right] + self.wrong(sequence, most)[right:])[: self._dice.randint(0, most)]

    def fork(self, sequence: Sequence, most: int) -> tuple[list[int], list[int]]:
        """Two drafts that part somewhere; either may be the longer right one."""
        draft, lie = self.right(sequence, most), self.wrong(sequence, most)
        first, second = (self._dice.randint(0, most) for _ in range(2))
        return draft[:first] + lie[first:], draft[:second] + lie[second:]

    def stopping(self, stops: Many[int]) -> Drafter:
        """Right, but with a stop token wherever chance wills."""

        def draft(sequence: Sequence, most: int) -> list[int]:
            tokens = self.right(sequence, most)
            for place in range(len(tokens)):
                if self._dice.random() < 0.3:
                    tokens[place] = self._dice.choice(list(stops))
            return tokens

        return draft

    def meddling(self, stops: Many[int]) -> Drafter:
        """Anything harmful, another in every step: stops, repeats, all at once, reversed, unspoken ids, too early."""

        def draft(sequence: Sequence, most: int) -> list[int]:
            right = self.right(sequence, most)
            return self._dice.choice(
                [
                    lambda: right,
                    lambda: right[::-1],
                    lambda: right[1:],
                    lambda: [next(iter(stops))] * most,
                    lambda: right[: most // 2] + [self._vocabulary - 1] * (most - most // 2),
                    lambda: sequence.tokens[-most:],
                    lambda: [sequence.tokens[-1]] * most,
                    lambda: [0] * most,
                    lambda: self.stopping(stops)(sequence, most),
                    list,
                ]
            )()

        return draft


def at_most(length: int, drafter: Drafter) -> Drafter:
    """The beginnings of another's drafts."""
    return lambda sequence, most: drafter(sequence, min(most, length))


def pair(oracle: Oracle) -> tuple[Drafter, Drafter]:
    """Two drafters that part from each other at chance: the second one's draft belongs to the first one's."""
    kept: dict[Sequence, list[int]] = {}

    def first(sequence: Sequence, most: int) -> list[int]:
        one, kept[sequence] = oracle.fork(sequence, most)
        return one

    return first, lambda sequence, _: kept.pop(sequence)
