"""Rows that are read while the run trains: all of them once an epoch, and the same ones after a resume."""

import copy
import gc
import json
import time
import tracemalloc
import weakref
from itertools import islice
from pathlib import Path

import pytest
from chat_samples import write_folder
from conftest import make_folder, write_rows
from ranks import Result
from ranks import run as run_ranks
from short_runs import QUIET, assert_same, cut, resume, train, words

from litpeft.core.errors import DataError
from litpeft.data import tokenise
from litpeft.data.settings import Data
from litpeft.data.streaming import Stream, load_stream
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenise import load_dataset
from litpeft.data.tokenizer import Tokenizer

STREAMED = {"data.streaming": True, "data.window": 4, "train.batch_size": 3, "train.epochs": 1, "train.max_steps": 5}


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> ChatTemplate:
    return ChatTemplate(Tokenizer.load(write_folder(tmp_path_factory.mktemp("chatml"), "chatml")))


def write(path: Path, count: int, first: int = 0, **more: object) -> str:
    rows = [{"prompt": f"What is {i}?", "completion": "x" * (1 + i % 50)} | more for i in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    """Two files of rows, of which some are cut into pieces and one cannot be used."""
    there = tmp_path_factory.mktemp("rows")
    paths = write(there / "a.jsonl", 23), write(there / "b.jsonl", 14, 23, weight=0.3)
    with open(paths[0], "a") as handle:
        handle.write('{"prompt": "no answer"}\n')
    how = {"validation_split": 0.0, "bad_rows": "skip", "max_length": 70, "overlong": "split", "cache": False}
    return Data(paths, **how, streaming=True, window=6)


def stream_of(data: Data, template: ChatTemplate) -> Stream:
    return load_stream(data, template, 512)[1]


def taken(stream: Stream, batch_size: int, step: int, known: list, count: int) -> list:
    return [
        (epoch, [(r.source, r.ids, r.weights) for r in rows])
        for epoch, rows in islice(stream.steps(batch_size, step, known), count)
    ]


def test_an_epoch_of_a_stream_holds_the_rows_of_the_files_once_in_an_order_of_its_own(data, template) -> None:
    whole = load_dataset(data, template.tokenizer, template, 512)
    expected = sorted((row.source, row.ids, row.weights) for row in whole.train)
    steps = taken(stream := stream_of(data, template), 5, 0, [], 3 * -(-len(expected) // 5))
    epochs = [[row for at, rows in steps if at == epoch for row in rows] for epoch in range(3)]
    assert all(sorted(rows) == expected for rows in epochs)
    assert len({str(rows) for rows in [expected, *epochs]}) == 4
    assert [bad.where for bad in stream.report.rejected] == [bad.where for bad in whole.rejected]
    assert [len(rows) for at, rows in steps if at == 0] == [5] * (len(expected) // 5) + [len(expected) % 5]
    other = Data(**{**vars(data), "seed": 1})
    assert taken(stream_of(other, template), 5, 0, [], 4) != steps[:4]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_a_stream_goes_on_from_any_step_as_if_it_had_not_stopped(batch_size, data, template) -> None:
    known, whole, snapshots = [], [], []
    for epoch, rows in islice(stream_of(data, template).steps(batch_size, 0, known), 2 + 130 // batch_size):
        whole.append((epoch, [(row.source, row.ids, row.weights) for row in rows]))
        snapshots.append(copy.deepcopy(known))
    assert whole[-1][0] >= 1
    for step in sorted({1, 2, 5, len(whole) // 2, len(whole) - 1} & set(range(1, len(whole)))):
        again = taken(stream_of(data, template), batch_size, step, snapshots[step - 1], len(whole) - step)
        assert again == whole[step:], step


def test_a_row_that_cannot_be_used_is_told_with_its_line_where_the_stream_comes_to_it(tmp_path, template) -> None:
    path = Path(write(tmp_path / "rows.jsonl", 9))
    path.write_text(path.read_text() + '{"prompt": "q", "completion": 3}\n')
    steps = stream_of(Data(str(path), None, 0.0, streaming=True, window=5), template).steps(5, 0, [])
    assert len(next(steps)[1]) == 5
    with pytest.raises(DataError, match="completion must be a string") as error:
        next(steps)
    assert error.value.where == f"{path}:10"


def test_files_that_changed_are_an_error_and_not_other_rows(tmp_path, template) -> None:
    path = write(tmp_path / "rows.jsonl", 9)
    stream, known = stream_of(Data(path, None, 0.0, streaming=True, window=5), template), []
    next(stream.steps(2, 0, known))
    write(tmp_path / "rows.jsonl", 3)
    with pytest.raises(DataError, match="window 1 has 3 rows, and had 5 when the run read it"):
        next(stream.steps(2, 1, known))


def test_the_memory_of_a_stream_is_that_of_a_window(tmp_path, template, monkeypatch) -> None:
    monkeypatch.setattr(tokenise, "CHUNK", 20)
    held, ours = [], tracemalloc.Filter(True, "*/litpeft/data/*", all_frames=True)
    table = tracemalloc.Filter(False, weakref.__file__)  # of all finalizers of the process, which doubles at times
    for count in (40, 40, 1040):  # the first warms up
        stream = stream_of(Data(write(tmp_path / "r.jsonl", count), None, 0.0, streaming=True, window=40), template)
        tracemalloc.start(6)  # frames of each
        steps = stream.steps(8, 0, [])
        assert sum(len(next(steps)[1]) for _ in range(count // 8)) == count
        sizes = []
        for _ in range(10):  # until the thread that reads the next window has done so
            gc.collect()
            snapshot = tracemalloc.take_snapshot().filter_traces([ours, table])  # not what other tests left running
            sizes.append(sum(trace.size for trace in snapshot.traces))
            time.sleep(0.1)
        held.append(min(sizes))
        tracemalloc.stop()
    assert held[2] - held[1] < 1000 * 20  # bytes


def test_a_streamed_run_resumed_after_any_step_is_the_same_run(tiny_folder, tmp_path) -> None:
    whole = train(tiny_folder, tmp_path / "whole", STREAMED)
    for step in (1, 3):  # between two windows, and in the second epoch
        run = resume(tiny_folder, cut(whole, step, tmp_path / f"after-{step}"), STREAMED)
        assert_same(run, whole)


def test_rows_that_a_stream_leaves_out_are_listed_once_whatever_was_read_twice(tiny_folder, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    path = write_rows(tmp_path / "mine") / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(['{"instruction": "a"}', *lines, '{"instruction": "b"}']) + "\n")
    settings = STREAMED | QUIET | {"data.bad_rows": "skip", "data.path": path.parent}
    whole = train(tiny_folder, tmp_path / "whole", settings)
    run = resume(tiny_folder, cut(whole, 1, tmp_path / "again"), settings)
    for out in (whole, run):
        rejected = [json.loads(line)["where"] for line in (out / "rejected.jsonl").read_text().splitlines()]
        assert rejected == [f"{path}:1", f"{path}:{len(lines) + 2}"]


def test_two_ranks_take_the_rows_of_one(tmp_path) -> None:
    make_folder(tmp_path / "base")
    settings = STREAMED | QUIET | {"base.precision": "64-true"}
    alone = train(tmp_path / "base", tmp_path / "one", settings)
    argv = words(tmp_path / "base", tmp_path / "two", settings)
    code, said = run_ranks(tmp_path / "log", *argv)
    assert code == 0, said
    assert Result.of(tmp_path / "two").apart(Result.of(alone)) < 1e-9


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train.max_steps": "null"}, "data.streaming true needs train.max_steps"),
        ({"train.epochs": 2}, "does not use train.epochs"),
        ({"data.streaming": False}, "data.window is used only with data.streaming true"),
        ({"data.path": '{"rows.jsonl": 2}'}, "takes no weights in data.path"),
        ({"data.path": "FILE"}, "name a file of held-out rows with data.validation_path"),
    ],
)
def test_settings_that_a_stream_cannot_follow_are_refused(settings, told, tiny_folder, tmp_path, capsys) -> None:
    if settings.get("data.path") == "FILE":
        settings = {"data.path": write_rows(tmp_path) / "train.jsonl"}
    with pytest.raises(SystemExit) as error:
        train(tiny_folder, tmp_path / "run", STREAMED | settings)
    assert error.value.code in (2, 3)
    assert told in capsys.readouterr().err
