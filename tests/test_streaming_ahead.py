"""The next window of a stream is made while the run trains: errors arrive in their place, and nothing is left over."""

import json
import threading
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from threading import Event

import pytest
from conftest import write_rows
from short_runs import QUIET, assert_same, newest, resume, train

from litpeft.core.errors import DataError
from litpeft.data.ahead import one_ahead, while_wanted
from litpeft.data.batches import bin_pack
from litpeft.data.settings import Data
from litpeft.data.streaming import load_stream
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer

STREAMED = QUIET | {"data.streaming": True, "data.window": 4, "train.batch_size": 3, "train.epochs": 1}
STREAMED |= {"train.max_steps": 5, "checkpoint.interval": 0}
SKIP = {"data.bad_rows": "skip", "resume_changed": '["data.*"]'}


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("rows")]


def test_an_item_is_made_while_the_one_before_it_is_used() -> None:
    begun = [Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for number, event in enumerate(begun):
            event.set()
            yield number

    for number in one_ahead(items(), Event()):
        assert all(event.wait(60) for event in begun[: number + 2])
        assert not any(event.is_set() for event in begun[number + 2 :])
    assert number == 3
    assert threads() == []


def test_an_error_is_raised_where_its_item_is_due() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise DataError("no more", where="rows.jsonl:3")

    found = one_ahead(items(), Event())
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(DataError, match="no more"):
        next(found)
    assert threads() == []


def test_an_item_that_takes_forever_is_given_up_where_nobody_wants_it() -> None:
    stop = Event()

    def endless() -> Iterator[int]:
        yield sum(while_wanted([0, 1], stop))
        yield sum(while_wanted(count(), stop))

    found = one_ahead(endless(), stop)
    assert next(found) == 1
    assert len(threads()) == 1
    found.close()
    assert threads() == []


def rows_with_a_bad_one(folder: Path, at: int, count: int = 12) -> Path:
    folder.mkdir()
    rows = [json.dumps({"instruction": f"Say {i}", "output": str(i) * 3}) for i in range(count)]
    rows[at] = '{"instruction": "no answer"}'
    path = folder / "many.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_rows_that_are_left_out_are_told_when_the_stream_comes_to_them(tiny_folder, tmp_path) -> None:
    template = ChatTemplate(Tokenizer.load(tiny_folder))
    data = Data(str(rows_with_a_bad_one(tmp_path / "rows", 9)), None, 0.0, bad_rows="skip", streaming=True, window=4)
    stream = load_stream(data, template, 512)[1]
    steps = stream.steps(4, 0, [])
    told = [(next(steps)[0], len(stream.report.rejected)) for _ in range(4)]
    assert told == [(0, 0), (0, 0), (0, 1), (1, 1)]
    assert len(threads()) == 1
    steps.close()
    assert threads() == []


def test_a_bad_row_after_the_last_window_is_told_too(tiny_folder, tmp_path) -> None:
    template = ChatTemplate(Tokenizer.load(tiny_folder))
    path = rows_with_a_bad_one(tmp_path / "rows", 8, 9)  # behind two whole windows
    stream = load_stream(Data(str(path), None, 0.0, bad_rows="skip", streaming=True, window=4), template, 512)[1]
    steps = list(islice(stream.steps(4, 0, []), 3))
    assert [epoch for epoch, _ in steps] == [0, 0, 1]
    assert [bad.where for bad in stream.report.rejected] == [f"{path}:9"]
    steps = load_stream(Data(str(path), None, 0.0, streaming=True, window=4), template, 512)[1].steps(4, 0, [])
    assert len(list(islice(steps, 2))) == 2
    with pytest.raises(DataError, match="output is missing") as error:
        next(steps)
    assert error.value.where == f"{path}:9"


def test_steps_by_length_are_refused_by_name_where_rows_are_streamed() -> None:
    with pytest.raises(ValueError, match="group_by_length is used only with packing false and streaming false"):
        Data("rows.jsonl", streaming=True, packing=False, group_by_length=True)


def test_the_first_window_is_not_tokenised_twice_by_a_run_that_begins(tiny_folder, tmp_path) -> None:
    template = ChatTemplate(Tokenizer.load(tiny_folder))
    path = rows_with_a_bad_one(tmp_path / "rows", 11)
    data = Data(str(path), None, 0.0, bad_rows="skip", streaming=True, window=4)
    expected = [[row.ids for row in rows] for _, rows in islice(load_stream(data, template, 512)[1].steps(4, 0, []), 6)]
    stream = load_stream(data, template, 512)[1]
    lines = path.read_text().splitlines()
    path.write_text("\n".join(['{"instruction": "x", "output": "y"}', *lines[1:]]) + "\n")
    found = [[row.ids for row in rows] for _, rows in islice(stream.steps(4, 0, []), 6)]
    assert found[:3] == expected[:3]
    assert found[3:] != expected[3:]  # the second epoch reads it again


def test_the_packing_of_the_first_window_is_told(tiny_folder, tmp_path, capsys) -> None:
    path = rows_with_a_bad_one(tmp_path / "rows", 11)
    held_out = write_rows(tmp_path) / "validation.jsonl"
    settings = STREAMED | {
        "data.path": path,
        "data.validation_path": held_out,
        "train.micro_tokens": 70,
        "dry_run": True,
    }
    train(tiny_folder, tmp_path / "run", settings)
    template = ChatTemplate(Tokenizer.load(tiny_folder))
    rows = load_stream(Data(str(path), None, 0.0, streaming=True, window=4), template, 512)[0].train
    lengths = [len(row.ids) for row in rows]  # of steps of 3 rows and 1
    passes = [bins for step in (lengths[:3], lengths[3:]) for bins in bin_pack(step, 70)]
    fill = sum(lengths) / (70 * len(passes))
    assert f"fill {fill:.1%} of passes of 70 tokens" in capsys.readouterr().out


def test_a_bad_row_ends_a_run_with_a_checkpoint_from_which_it_goes_on_without_the_row(
    tiny_folder, tmp_path, capsys
) -> None:
    path = rows_with_a_bad_one(tmp_path / "rows", 9)
    settings = STREAMED | {"data.path": path, "data.validation_path": write_rows(tmp_path) / "validation.jsonl"}
    whole = train(tiny_folder, tmp_path / "whole", settings | {"data.bad_rows": "skip"})
    rejected = [json.loads(line) for line in (whole / "rejected.jsonl").read_text().splitlines()]
    assert [one["where"] for one in rejected] == [f"{path}:10"]
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        train(tiny_folder, out, settings)
    assert error.value.code == 3
    said = capsys.readouterr().err
    assert f"error: {path}:10: output is missing" in said
    assert "step 2 is saved, and --resume true goes on from there, with --resume_changed '[\"data.*\"]'" in said
    assert newest(out).step == 2
    assert not (out / "final").exists()
    assert threads() == []
    with pytest.raises(SystemExit):
        resume(tiny_folder, out, settings)  # the row is still there
    assert "step 2 is saved" in capsys.readouterr().err
    assert_same(resume(tiny_folder, out, settings | SKIP), whole)
