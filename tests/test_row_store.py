"""Rows in a file: what is read back is what was written, and memory holds the index alone."""

import gc
import json
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from chat_samples import write_folder

from litpeft.core.errors import ResourceError
from litpeft.data import tokenise
from litpeft.data.formats.turn import PLAIN, Turn
from litpeft.data.rows import Row
from litpeft.data.settings import Data
from litpeft.data.store import Descriptor, Rows, RowWriter
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer

CALL = {"type": "function", "function": {"name": "add", "arguments": {"numbers": [1, 2]}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CHAT = [
    Turn("user", "1 + 2 = ? \u2028 \U0001f600", input="sums", tools=(TOOL,)),
    Turn("assistant", "", train=False, calls=(CALL,)),
    Turn("tool", "3", more=(("name", "add"), ("tool_call_id", "7"))),
]


def written(rows: list[list[Row]]) -> Rows:
    with tempfile.TemporaryFile() as handle:
        writer = RowWriter(handle)
        for number, pieces in enumerate(rows):
            writer.add(pieces, number, 0)
        return Rows(Descriptor(handle), writer.index)


def test_a_row_is_read_as_it_was_written() -> None:
    chat = Row([5, 70_000, 0], [False, True, True], 1, "a \udcff/rows.jsonl:12", CHAT, False)
    pieces = [Row([1, 2], [False, True], 1, "b:1", [Turn(PLAIN, "text")]) for _ in range(3)]
    rows = written([[chat], pieces])
    assert list(rows) == [chat, *pieces]
    assert rows[-1] == rows[1:][2] == pieces[2]
    assert list(rows[0].turns) == CHAT
    assert rows.column("tokens").tolist() == [3, 2, 2, 2]
    assert rows.column("trained").tolist() == [2, 1, 1, 1]
    assert rows.column("plain").tolist() == [False, True, True, True]
    assert rows.column("example").tolist() == [0, 1, 1, 1]
    assert list(rows.where(rows.column("plain"))[:1]) == pieces[:1]
    with pytest.raises(IndexError):
        rows[4]


def test_a_file_that_becomes_shorter_is_an_error_of_the_user(tmp_path) -> None:
    with open(tmp_path / "rows", "w+b") as handle:
        writer = RowWriter(handle)
        writer.add([Row([1, 2], [False, True], 1, "b:1", CHAT)], 0, 0)
        rows = Rows(Descriptor(handle), writer.index)
        handle.truncate(10)
        with pytest.raises(ResourceError, match="was cut while it was read"):
            rows[0]


def test_memory_does_not_grow_with_the_rows_but_by_their_index(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tokenise, "CHUNK", 40)
    template = ChatTemplate(Tokenizer.load(write_folder(tmp_path, "chatml")))
    held = []
    for count in (80, 80, 480):  # the first warms up
        path = Path(tmp_path / f"{count}.jsonl")
        path.write_text(
            "".join(json.dumps({"prompt": f"{i}", "completion": "word " * 40}) + "\n" for i in range(count))
        )
        tracemalloc.start()
        data = tokenise.load_dataset(Data(str(path), cache=False), template.tokenizer, template, 512)
        assert sum(len(row.ids) for row in data.train) == data.report.train.tokens
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert held[2] - held[1] < 400 * 100  # bytes; the tokens of a row alone are 170 numbers
