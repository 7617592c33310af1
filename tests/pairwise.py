"""Tables of cases in which every value of an axis meets every value of each other axis at least once."""

from collections.abc import Iterable
from itertools import combinations, product

import pytest

Cell = tuple[object, ...]


def pairs(cell: Cell) -> set[tuple]:
    """Returns the pairs of values of two axes that a cell shows."""
    return set(combinations(enumerate(cell), 2))


def pairwise(*axes: Iterable[object], shown: Iterable[Cell] = ()) -> list[Cell]:
    """Returns the cells of the table: each is the cell of the product that shows most of the pairs not yet shown.

    `shown` are cells that another test shows.
    """
    cells = {cell: pairs(cell) for cell in product(*axes)}
    left = set().union(*cells.values()).difference(*map(pairs, shown))
    table = []
    while left:
        table.append(max(cells, key=lambda cell: len(left & cells[cell])))
        left -= cells[table[-1]]
    return table


def cases(*axes: Iterable[object], marks: tuple | pytest.MarkDecorator = ()) -> list:
    """Returns the product for parametrize: the table with `marks`, and the rest, which only `-m full` runs."""
    table, cells = pairwise(*map(list, axes)), product(*axes)
    return [pytest.param(*cell, marks=marks if cell in table else pytest.mark.full) for cell in cells]
