"""What is chosen of the rows and in which order: as with lists of rows in earlier versions, but held in arrays."""

import gc
import random
import shutil
import tempfile
import tracemalloc
from dataclasses import replace
from itertools import groupby, product

import numpy as np
import pytest
from short_runs import QUIET, assert_same, cut, resume, train

from litpeft.data.batches import GROUP, plan_epoch
from litpeft.data.formats.turn import Turn
from litpeft.data.report import Report
from litpeft.data.rows import Row
from litpeft.data.settings import Data
from litpeft.data.sources import Source, repeated, split
from litpeft.data.store import Descriptor, Rows, RowWriter
from litpeft.data.tokenise import chosen_rows
from litpeft.train import preparation
from litpeft.train.budget import Budget
from litpeft.train.ending import chosen
from litpeft.train.resume import rows_sha256, rows_text_sha256
from litpeft.train.settings import Base, Finetune, Train, Validation

TURNS = [Turn("user", "q"), Turn("assistant", "a")]


def written(rows: list[Row], files: list[int] | None = None) -> Rows:
    with tempfile.TemporaryFile() as handle:
        writer = RowWriter(handle)
        for number, row in enumerate(rows):
            writer.add([row], number, files[number] if files else 0)
        return Rows(Descriptor(handle), writer.index)


def row(ids: list[int], trained: list[bool] | None = None, source: str = "rows.jsonl:1") -> Row:
    trained = trained or [False] * (len(ids) - 1) + [True]
    return Row(ids, trained, trained.index(True), source, TURNS)


def some_rows(count: int) -> list[Row]:
    chance = random.Random(count)
    return [row([chance.randrange(4) for _ in range(chance.randint(2, 6))]) for _ in range(count)]


@pytest.mark.parametrize(("rows", "share", "seed"), [*product([0, 1, 2, 9, 300], [0.0, 0.01, 0.3, 0.99], [0, 5])])
def test_the_rows_held_out_are_those_of_a_list(rows: int, share: float, seed: int) -> None:
    expected: set[int] = set()
    if share > 0 and rows > 1:
        count = min(max(1, round(share * rows)), rows - 1)
        expected = set(random.Random(seed).sample(range(rows), count))
    assert np.flatnonzero(split(rows, share, seed)).tolist() == sorted(expected)


def test_the_weights_of_files_repeat_the_rows_of_a_list() -> None:
    weights, files = [2.5, 2.5, 0.5, 1.0], [0] * 5 + [1] * 4 + [2] * 9 + [3] * 2
    rows = written([row([1, 2, number]) for number in range(len(files))], files)
    expected = []
    for weight, group in groupby(range(len(files)), key=lambda at: weights[files[at]]):
        places = list(group)
        whole, part = divmod(weight, 1)
        more = set(random.Random(3).sample(range(len(places)), round(part * len(places))))
        expected += [at for i, at in enumerate(places) for _ in range(int(whole) + (i in more))]
    sources = [Source(f"{number}.jsonl", weight) for number, weight in enumerate(weights)]
    data = Data("rows", validation_split=0.0, seed=3)
    found = chosen_rows(rows, sources, True, len(rows), data, Report("chatml", 99))
    assert [one.ids[2] for one in found.train] == expected
    assert repeated(4, 3.0, 0).tolist() == [3] * 4


@pytest.mark.parametrize(("rows", "batch_size"), [*product([1, 7, 8, 900], [1, 3, 8])])
def test_a_plan_is_that_of_a_list(rows: int, batch_size: int) -> None:
    lengths = [random.Random(i).randint(2, 30) for i in range(rows)]
    for epoch, by_length in product((0, 2), (False, True)):
        order, chance = list(range(rows)), random.Random(f"6 {epoch}")
        chance.shuffle(order)
        if by_length:
            groups = (order[start : start + GROUP * batch_size] for start in range(0, rows, GROUP * batch_size))
            order = [number for group in groups for number in sorted(group, key=lambda i: -lengths[i])]
        steps = [order[start : start + batch_size] for start in range(0, rows, batch_size)]
        if by_length:
            last = [steps.pop()] if rows % batch_size else []
            chance.shuffle(steps)
            steps += last
        plan = plan_epoch(rows, batch_size, epoch, 6, np.array(lengths) if by_length else None)
        assert list(plan) == steps
        assert (len(plan), plan[-1], plan == steps, plan == steps[1:]) == (len(steps), steps[-1], True, False)


def test_rows_that_are_measured_at_the_end_are_those_of_a_list() -> None:
    rows = written(some_rows(60)).where(np.repeat(np.arange(60), 2))
    numbers = list(range(0, 120, 2))
    random.Random("4 rows").shuffle(numbers)
    assert chosen(rows, 4, 0.0, 7) == numbers[:7]
    assert chosen(rows, 4, 0.0, 999) == numbers
    lengths, count, tokens = [len(rows[at].ids) for at in numbers], 0, 50
    while sum(lengths[: count + 1]) <= tokens:
        count += 1
    assert 4 < count < 60
    assert chosen(rows, 4, float(tokens), "auto") == numbers[:count]


@pytest.mark.parametrize("validation", [Validation(), Validation(metric="exact"), Validation(max_rows=5)])
def test_a_budget_is_that_of_a_list(validation: Validation) -> None:
    rows, held_out = some_rows(90), some_rows(40)
    settings = Finetune(Base("base"), Data("rows"), "out", Train(), validation)
    for steps in (1, 12, 400, 90_000):
        expected = Budget.of(settings, [len(one.ids) for one in rows], held_out, steps)
        assert Budget.of(settings, written(rows).column("tokens"), written(held_out), steps) == expected


def test_rows_that_begin_with_some_tokens_are_counted() -> None:
    rows = some_rows(200)
    for ids in ([1, 1], [2], [0, 3, 2]):
        assert written(rows).begin_with(ids) == sum(one.ids[: len(ids)] == ids for one in rows) > 0


def test_the_sha256_of_rows_is_that_of_their_tokens_and_masks_in_order() -> None:
    rows, held_out = some_rows(20), some_rows(5)
    same = [row(one.ids, one.trained, f"moved/rows.jsonl:{i}") for i, one in enumerate(rows)]
    assert rows_sha256(written(same), written(held_out)) == rows_sha256(written(rows), written(held_out))
    first, second = row([1, 2, 3, 4]), row([5, 6])
    others = [
        [first, second],
        [second, first],
        [first],
        [row([1, 2, 3, 9]), second],
        [row([1, 2, 3, 4], [False, False, True, True]), second],
        [replace(first, weights=[0.0, 0.5, 1.0, 1.0]), second],
        [replace(first, weights=[0.0, 0.25, 1.0, 1.0]), second],
        [row([1, 2, 3]), row([4, 5, 6])],
        [row([1, 2, 3, 4, 5, 6])],
    ]
    taken = [rows_sha256(written(one), written([])) for one in others]
    taken += [rows_sha256(written([first]), written([second])), rows_sha256(written([]), written([first, second]))]
    assert len(set(taken)) == len(taken)


def test_a_run_of_an_earlier_version_goes_on_to_the_same_end(tiny_folder, tmp_path, monkeypatch, capsys) -> None:
    whole = train(tiny_folder, tmp_path / "whole", QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "rows_sha256", rows_text_sha256)  # what that version took for the rows
        old = train(tiny_folder, tmp_path / "old", QUIET)
    run = resume(tiny_folder, cut(old, 2, tmp_path / "cut"), QUIET)
    assert_same(run, whole)
    changed = shutil.copytree(tmp_path / "data", tmp_path / "changed")
    path = changed / "train.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(SystemExit) as error:
        resume(tiny_folder, cut(old, 2, tmp_path / "again"), QUIET | {"data.path": changed})
    assert error.value.code == 2
    assert "the run began with other rows" in capsys.readouterr().err


def test_rows_hold_a_few_numbers_each_while_a_run_is_planned() -> None:
    count, rows = 6000, some_rows(50)
    with tempfile.TemporaryFile() as handle:
        gc.collect()
        tracemalloc.start()
        writer = RowWriter(handle)
        for number in range(count):
            writer.add([rows[number % 50]], number, 0)
        data = chosen_rows(
            Rows(Descriptor(handle), writer.index), [Source("a", 2.0)], False, count, Data("a"), Report("chatml", 99)
        )
        train, held_out = data.train, data.validation
        settings = Finetune(Base("base"), Data("rows"), "out")
        kept = Budget.of(settings, train.column("tokens"), held_out, 10**9), plan_epoch(len(train), 8, 0, 0)
        assert kept[0].rows == 300
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert held < 60 * count  # bytes: 38 in the index, 8 in the two orders, 8 in the plan, and some spare room
    assert peak < 130 * count
