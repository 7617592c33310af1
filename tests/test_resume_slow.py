"""The many cases: a resume after every step of every method, and fifty kills at random instants."""

import itertools
from pathlib import Path

import pytest
from short_runs import LONG, UNPACKED, Settings, assert_same, cut, kills, resume, train

from litpeft.methods import METHODS

pytestmark = pytest.mark.slow

DROPOUT = {"lora", "qlora"}
LAYOUTS: dict[str, Settings] = {
    "packed": {"train.micro_tokens": 2048},
    "packed, accumulated": {},
    "alone": UNPACKED | {"train.micro_batch_size": 4},
    "alone, accumulated": UNPACKED | {"train.micro_batch_size": 1},
}
CASES = [(m, d, lay) for m, d, lay in itertools.product(METHODS, (0.0, 0.1), LAYOUTS) if m in DROPOUT or not d]


@pytest.mark.parametrize(("method", "dropout", "layout"), CASES)
def test_a_run_resumed_after_every_step_is_the_same_run(method, dropout, layout, tiny_folder, tmp_path) -> None:
    settings = LAYOUTS[layout] | ({"method.dropout": dropout} if method in DROPOUT else {}) | {"train.epochs": 4}
    whole = train(tiny_folder, tmp_path / "whole", settings, method)
    for step in range(1, 8):
        assert_same(resume(tiny_folder, cut(whole, step, tmp_path / f"after-{step}"), settings, method), whole)


@pytest.mark.parametrize(("method", "number"), [("lora", 20), ("full", 15), ("adapter", 15)])
def test_a_run_killed_again_and_again_is_lost_in_no_part(method: str, number: int, tiny_folder, tmp_path: Path) -> None:
    whole = train(tiny_folder, tmp_path / "whole", LONG, method)
    kills(tiny_folder, whole, tmp_path, number, LONG, method, seed=1)
