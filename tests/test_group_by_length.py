"""Steps of rows of about the same length: every row once, exact when resumed, and the padding that is spared."""

import random

import pytest
from short_runs import QUIET, UNPACKED, assert_same, cut, resume, train

from litpeft.data.batches import GROUP, padding, plan_epoch
from litpeft.data.settings import Data


@pytest.mark.parametrize("rows", [1, 7, 800, 1003])
def test_steps_by_length_hold_every_row_once_and_follow_from_seed_and_epoch(rows: int) -> None:
    lengths = [random.Random(i).randint(2, 500) for i in range(rows)]
    plan = plan_epoch(rows, 8, 0, 3, lengths)
    assert sorted(i for step in plan for i in step) == list(range(rows))
    assert [len(step) for step in plan] == [8] * (rows // 8) + ([rows % 8] if rows % 8 else [])
    assert plan == plan_epoch(rows, 8, 0, 3, lengths)
    if rows > 8:
        assert len({str(plan_epoch(rows, 8, epoch, seed, lengths)) for epoch in (0, 1) for seed in (3, 4)}) == 4


def test_rows_of_a_step_are_neighbours_by_length_within_a_group() -> None:
    lengths = [random.Random(i).randint(2, 500) for i in range(8 * GROUP)]
    plan = plan_epoch(len(lengths), 8, 0, 0, lengths)
    ordered = sorted(lengths, reverse=True)
    assert sorted([lengths[i] for i in step] for step in plan) == sorted(
        ordered[at : at + 8] for at in range(0, len(ordered), 8)
    )
    firsts = [lengths[step[0]] for step in plan]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


def test_padding_is_counted_against_a_plain_loop() -> None:
    assert padding([[0, 1, 2], [3]], [10, 4, 7, 5], 2) == pytest.approx(1 - 26 / (20 + 7 + 5))
    lengths = [random.Random(i).randint(2, 500) for i in range(900)]
    grouped, plain = (padding(plan_epoch(900, 8, 0, 0, given), lengths, 4) for given in (lengths, None))
    assert grouped < 0.02 < 0.3 < plain


def test_a_run_by_length_tells_the_padding_and_resumes_exactly(tiny_folder, tmp_path, capsys) -> None:
    settings = UNPACKED | QUIET | {"data.group_by_length": True}
    whole = train(tiny_folder, tmp_path / "whole", settings)
    assert "by length   padding would be" in capsys.readouterr().out
    assert_same(resume(tiny_folder, cut(whole, 2, tmp_path / "cut"), settings), whole)


def test_it_is_used_only_where_rows_are_not_packed() -> None:
    with pytest.raises(ValueError, match="group_by_length is used only with packing false"):
        Data("rows.jsonl", group_by_length=True)
