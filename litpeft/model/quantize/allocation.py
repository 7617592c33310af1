"""Which storage each matrix gets, so that the sum of costs is least within a budget of bytes.

This is a knapsack problem with one choice out of several for each item. A table over the bytes beyond the smallest
choices solves it exactly, in units of their greatest common divisor: sizes of layers are multiples of large powers of
two, so the table is short. Where it would be longer than LONGEST the unit is larger and sizes are rounded up: the
budget holds still, and the result is the best one among those that fit with a unit to spare for each matrix.
"""

import math
from collections.abc import Sequence

import torch

LONGEST = 1 << 17  # units of the budget


def least_costly(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Returns for each item the number of its choice, whose sizes add up to `budget` at most, at the least cost.

    `costs` and `sizes` are of each choice of each item. The smallest choices must fit.
    """
    spare = budget - sum(map(min, sizes))
    assert spare >= 0, "not even the smallest choices fit"
    extra = [[size - min(choices) for size in choices] for choices in sizes]
    spare = min(spare, sum(map(max, extra)))
    unit = max(math.gcd(*(size for choices in extra for size in choices)) or 1, -(-spare // LONGEST))
    length = spare // unit + 1
    best, taken = torch.zeros(length, dtype=torch.float64), []  # least cost of the items so far within n units
    for prices, choices in zip(costs, extra, strict=True):
        table = torch.full((len(choices), length), torch.inf, dtype=torch.float64)
        for row, price, size in zip(table, prices, choices, strict=True):
            units = -(-size // unit)
            if units < length:
                row[units:] = best[: length - units] + price
        best, choice = table.min(0)
        taken.append(choice)
    chosen, left = [], length - 1
    for choice, choices in zip(reversed(taken), reversed(extra), strict=True):
        chosen.append(int(choice[left]))
        left -= -(-choices[chosen[-1]] // unit)
    return chosen[::-1]
