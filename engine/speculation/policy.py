"""How many drafted tokens of which rows a step verifies: as many as make the whole batch's tokens per second rise.

Candidates of all rows are taken in order of their survival probability, the surest first; within a row survival never
rises, so what is taken of a row is the beginning of its draft. (DSpark's first algorithm, with a measured cost table.)
"""

from collections.abc import Sequence as Many

# What drafting must promise over not drafting before a batch that did not draft begins to.
HYSTERESIS = 1.05


def lengths(
    survivals: Many[list[float]], base_tokens: int, base_expected: int, costs: list[float], *, drafting: bool
) -> list[int]:
    """How many drafted tokens of each row to verify.

    `survivals[i][j]` is the probability that row i's drafted tokens 0 .. j are all accepted. Without drafts the step
    computes `base_tokens` and yields `base_expected`; `costs` are seconds by tokens. `drafting`: the last step drafted.
    """
    room = len(costs) - 1 - base_tokens
    if room <= 0:
        return [0] * len(survivals)
    if len(survivals) == 1:
        return [_alone(survivals[0], base_tokens, base_expected, costs, room, drafting)]
    order = sorted(
        ((-chance, row, place) for row, chances in enumerate(survivals) for place, chance in enumerate(chances)),
    )
    plain = base_expected / costs[base_tokens]
    best, taken, expected = plain * (1.0 if drafting else HYSTERESIS), 0, float(base_expected)
    for count, (chance, _, _) in enumerate(order[:room], start=1):
        expected -= chance
        rate = expected / costs[base_tokens + count]
        if rate > best:
            best, taken = rate, count
    chosen = [0] * len(survivals)
    for _, row, _ in order[:taken]:
        chosen[row] += 1
    return chosen


def _alone(
    chances: list[float], base_tokens: int, base_expected: int, costs: list[float], room: int, drafting: bool
) -> int:
    """The same for one row, which needs no order."""
    best = base_expected / costs[base_tokens] * (1.0 if drafting else HYSTERESIS)
    taken, expected = 0, float(base_expected)
    for count, chance in enumerate(chances[:room], start=1):
        expected += chance
        rate = expected / costs[base_tokens + count]
        if rate > best:
            best, taken = rate, count
    return taken


def least_chance(base_tokens: int, base_expected: int, costs: list[float]) -> float:
    """The probability below which one more token in this batch costs more than it brings; above 1: none can pay."""
    if base_tokens + 1 >= len(costs):
        return 2.0
    # Costs rise in steps, so look a little further than one token.
    ahead = min(4, len(costs) - 1 - base_tokens)
    rise = (costs[base_tokens + ahead] - costs[base_tokens]) / ahead
    return rise * base_expected / costs[base_tokens]


def branch_pays(gain: float, extra: int, tokens: int, expected: float, costs: list[float]) -> bool:
    """Whether verifying a second draft beside the first raises the batch's rate: `gain` tokens for `extra` computed."""
    if tokens + extra >= len(costs):
        return False
    return (expected + gain) / costs[tokens + extra] > expected / costs[tokens] * HYSTERESIS
