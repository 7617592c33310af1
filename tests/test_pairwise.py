"""The tables of cases show each pair, and what they leave out is run by `-m full`."""

from itertools import combinations, product

import pytest
from pairwise import cases, pairwise

from litpeft.methods import METHODS


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (14, 3, 2), (25, 4, 7), (2, 2, 2, 5)])
def test_every_value_meets_every_value_of_each_other_axis(sizes: tuple[int, ...]) -> None:
    axes = [range(size) for size in sizes]
    table = pairwise(*axes)
    for first, second in combinations(range(len(axes)), 2):
        assert {(cell[first], cell[second]) for cell in table} == set(product(axes[first], axes[second]))
    largest = sorted(sizes)[-2:]
    assert largest[0] * largest[1] <= len(table) <= 1.5 * largest[0] * largest[1]
    assert pairwise(*axes) == table


def test_the_table_and_the_rest_are_the_product_and_a_new_method_is_in_it() -> None:
    axes = [*METHODS, "a new one"], ("32-true", "bf16-true", "bf16-mixed"), ("ddp", "fsdp")
    found = cases(*axes, marks=pytest.mark.slow)
    assert [case.values for case in found] == list(product(*axes))
    shown = [case.values for case in found if case.marks == (pytest.mark.slow,)]
    assert set(shown) == set(pairwise(*axes))
    assert {precision for name, precision, _ in shown if name == "a new one"} == set(axes[1])
    assert all(case.marks == (pytest.mark.full,) for case in found if case.values not in shown)


def test_what_another_test_shows_need_not_be_in_the_table() -> None:
    axes = "abcdefgh", range(4), range(7)
    elsewhere = [(letter, 2, number) for letter in "abcdefgh" for number in (0, 1)]
    table = pairwise(*axes, shown=elsewhere)
    for first, second in combinations(range(3), 2):
        found = {(cell[first], cell[second]) for cell in (*table, *elsewhere)}
        assert found == set(product(axes[first], axes[second]))
    assert len(table) < len(pairwise(*axes)) - 8
