"""The many cases: a resume after every step of every method, and fifty kills at random instants."""

import itertools
from dataclasses import fields
from pathlib import Path

import pytest
from pairwise import pairwise
from short_runs import LONG, UNPACKED, Settings, assert_same, cut, kills, resume, train

from litpeft.methods import METHODS, method_class

LAYOUTS: dict[str, Settings] = {
    "packed": {"train.micro_tokens": 2048},
    "packed, accumulated": {},
    "alone": UNPACKED | {"train.micro_batch_size": 4},
    "alone, accumulated": UNPACKED | {"train.micro_batch_size": 1},
}
STEPS = range(1, 8)
WITH_DROPOUT = [f"{name}, dropout" for name in METHODS if "dropout" in [f.name for f in fields(method_class(name))]]
# Where a method has dropout the table has it on: that restores all that a run without it does, and the draws besides.
SHOWN = [*WITH_DROPOUT, *(name for name in METHODS if f"{name}, dropout" not in WITH_DROPOUT)]
CUT = {name: 1 + i % 2 for i, name in enumerate(METHODS)}  # as in test_resume.py
IN_TEST_RESUME = [(shown, "packed, accumulated", CUT[shown.partition(", ")[0]]) for shown in SHOWN]


def cases() -> list:
    """Returns what to resume: the steps of the pairwise table, and the others, which only `-m full` runs."""
    table, found = pairwise(SHOWN, LAYOUTS, STEPS, shown=IN_TEST_RESUME), []
    for method, layout in itertools.product([*METHODS, *WITH_DROPOUT], LAYOUTS):
        shown = [step for step in STEPS if (method, layout, step) in table]
        for steps, mark in ((shown, pytest.mark.slow), ([s for s in STEPS if s not in shown], pytest.mark.full)):
            if steps:
                found.append(pytest.param(method, layout, steps, marks=mark, id=f"{method}-{layout}-{steps}"))
    return found


@pytest.mark.parametrize(("method", "layout", "steps"), cases())
def test_a_run_resumed_after_any_step_is_the_same_run(method, layout, steps, tiny_folder, tmp_path) -> None:
    name, _, dropout = method.partition(", ")
    settings = LAYOUTS[layout] | ({"method.dropout": 0.1} if dropout else {}) | {"train.epochs": 4}
    whole = train(tiny_folder, tmp_path / "whole", settings, name)
    for step in steps:
        assert_same(resume(tiny_folder, cut(whole, step, tmp_path / f"after-{step}"), settings, name), whole)


ADAPTER = pytest.param("adapter", 15, marks=pytest.mark.full)  # it saves as lora does
LORA, FULL = (pytest.param(*case, marks=pytest.mark.slow) for case in (("lora", 20), ("full", 15)))


@pytest.mark.parametrize(("method", "number"), [LORA, FULL, ADAPTER])
def test_a_run_killed_again_and_again_is_lost_in_no_part(method: str, number: int, tiny_folder, tmp_path: Path) -> None:
    whole = train(tiny_folder, tmp_path / "whole", LONG, method)
    kills(tiny_folder, whole, tmp_path, number, LONG, method, seed=1)
