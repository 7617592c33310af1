"""Files of every kind to rows: with their places, nothing lost, and nothing read otherwise than it is shown."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from litpeft.core.errors import DataError, UserError
from litpeft.data.readers import READERS, records
from litpeft.data.readers.bytes import _stdin
from litpeft.data.sources import Source, find, find_measured, repeated

ROWS = [
    {"question": "a, b", "answer": 'say "x"'},
    {"question": "two\nlines", "answer": "ü 🙂"},
    {"question": "", "answer": "c"},
]


def values(path: Path | str, documents: str = "file") -> dict[str, object]:
    """Returns the rows of a file by what stands behind its name in their places; problems as text."""
    return {
        record.where.removeprefix(f"{path}:"): record.problem or record.value for record in records(path, documents)
    }


# tables


def test_a_csv_keeps_true_line_numbers_whatever_its_cells_hold(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'\xef\xbb\xbfquestion, answer\r\n"a, b","say ""x"""\r\n\r\n"two\nlines",\xc3\xbc \xf0\x9f\x99\x82\r\n,c\r\n'
    )
    assert values(path) == dict(zip(("2", "4", "6"), ROWS, strict=True))


def test_whatever_a_csv_holds_every_row_comes_back_with_its_line(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "rows.csv"
    pieces = ["a", "b c", ",", '"', "\n", "\r\n", "ü", "🙂", "\u2028", ";", "\t", " ", ""]
    for _ in range(100):
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator=rng.choice(["\n", "\r\n"]))
        writer.writerow("xyz")
        want = {}
        for _ in range(rng.randint(1, 8)):
            row = ["".join(rng.choices(pieces, k=rng.randint(0, 6))) for _ in "xyz"]
            want[str(out.getvalue().count("\n") + 1)] = dict(zip("xyz", row, strict=True))
            writer.writerow(row)
        path.write_bytes(out.getvalue().encode())
        assert values(path) == want
        broken = bytearray(path.read_bytes())
        broken[rng.randrange(len(broken))] = rng.choice(b'"\xff\x00,\n')
        path.write_bytes(broken)
        with suppress(DataError):  # no other error
            values(path)


@pytest.mark.parametrize(
    ("name", "separator"), [("rows.tsv", "\t"), ("rows.csv", ";"), ("rows.csv", "\t"), ("rows.csv", "|")]
)
def test_other_separators_are_seen_from_the_header(tmp_path: Path, name: str, separator: str) -> None:
    (tmp_path / name).write_text(f"question{separator}answer\na, b{separator}c\n")
    assert values(tmp_path / name) == {"2": {"question": "a, b", "answer": "c"}}


def test_a_bad_row_of_a_csv_is_named_with_its_line_and_the_next_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\n1\n"2\n\xff",x\n3,y,z\n4,\x00\n5,ok\n')
    assert values(path) == {
        "2": "it has 1 cell, the header 2",
        "3": "not UTF-8 at byte 1 of line 4, where Windows-1252 has 'ÿ': save the file as UTF-8, "
        'which Excel calls "CSV UTF-8"',
        "5": "it has 3 cells, the header 2",
        "6": "the cell '\\x00' holds a NUL character",
        "7": {"a": "5", "b": "ok"},
    }


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a,b,a\n1,2,3\n", ":1: two columns are called 'a'"),
        (b"a,,b\n1,2,3\n", ":1: column 2 of 3 has no name"),
        (b'a,b\n1,2\n"3,4\n5,6\n', ":3: a quote opens in this row and is not closed"),
        (b'a,b\n1,2\n"3"x,4\n5,6\n', ":3: a quoted cell is wrong: ',' expected after '\"'"),
        (b"\xff\xfea\x00", ": the file is UTF-16, not CSV in UTF-8"),
        (b"\xff,b\n", ":1: not UTF-8 at byte 1 of line 1"),
        (b"a,b\r1,2\r3,4\r", ":1: a line ends in a carriage return (\\r) alone"),
    ],
)
def test_what_makes_all_rows_of_a_csv_uncertain_is_an_error(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        values(path)
    assert f"error: {path}{told}" in str(error.value)


def test_a_cell_may_be_long_and_hold_what_unicode_calls_a_line_end(tmp_path: Path) -> None:
    cell = "x" * 200_000 + "\u2028\x85"
    (tmp_path / "rows.csv").write_text(f"a,b\n{cell},y\n", encoding="utf-8")
    assert values(tmp_path / "rows.csv") == {"2": {"a": cell, "b": "y"}}


def test_a_workbook_is_read_sheet_by_sheet_as_it_is_shown(tmp_path: Path) -> None:
    import openpyxl

    book, path = openpyxl.Workbook(), tmp_path / "rows.xlsx"
    first, second = book.active, book.create_sheet("More")
    for row in (["question", "answer"], ["1 + 1?", 2], [None, None], ["half?", 0.5], ["when?", None]):
        first.append(row)
    first["B5"].value, first["B5"].number_format = 0.25, "0%"
    for row in ([], ["question", "note", "answer"], ["sure?", None, True], ["sum?", "x", "=1+1"], ["a", "b", "c", "d"]):
        second.append(row)
    for name, cell in (("Old", "left over"), ("Empty", None)):
        book.create_sheet(name).append([cell])
        book[name].sheet_state = "hidden"
    book.save(path)
    assert values(path) == {
        "Sheet:2": {"question": "1 + 1?", "answer": "2"},
        "Sheet:4": {"question": "half?", "answer": "0.5"},
        "Sheet:5": "cell B5 is a number shown as '0%': make it text, so that what is seen is what is learnt",
        "More:3": {"question": "sure?", "answer": "TRUE"},
        "More:4": "cell C4 is a formula without a value: save the workbook in a spreadsheet program",
        "More:5": "cell D5 stands in a column without a name: row 2 has the names of the columns",
        "Old": "the sheet is hidden: show it to train on its rows, or delete it",
    }
    (tmp_path / "no.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"no.xlsx: this is no workbook that openpyxl reads"):
        values(tmp_path / "no.xlsx")


def test_parquet_and_arrow_hold_texts_and_chats(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet

    rows = [{"messages": [{"role": "user", "content": f"{i}", "name": None}], "n": i} for i in range(2500)]
    table = arrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    for name, writer in (("file.arrow", arrow.ipc.new_file), ("stream.arrow", arrow.ipc.new_stream)):
        with writer(tmp_path / name, table.schema) as out:
            out.write_table(table)
    for name in ("rows.parquet", "file.arrow", "stream.arrow"):
        assert values(tmp_path / name) == {f"{i + 1}": row for i, row in enumerate(rows)}
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:300])
        with pytest.raises(DataError, match=f"{name}: this is no (Parquet|Arrow) file that pyarrow reads"):
            values(tmp_path / name)


def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="rows.parquet: reading it needs the package pyarrow") as error:
        values(tmp_path / "rows.parquet")
    assert error.value.hint == "pip install pyarrow"


# text, packed files, standard input


def test_plain_text_is_a_document_or_one_of_each_paragraph_or_line(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\nOne\r\n two\r\n\n\n\xc3\xbc\n")
    assert values(path) == {"2": {"text": "One\n two\n\n\nü"}}
    assert values(path, "paragraph") == {"2": {"text": "One\n two"}, "6": {"text": "ü"}}
    assert values(path, "line") == {"2": {"text": "One"}, "3": {"text": " two"}, "6": {"text": "ü"}}
    path.write_bytes(b"One\n\nbad \xff\n\nthree")
    assert values(path, "paragraph") == {
        "1": {"text": "One"},
        "3": "not UTF-8 at byte 5 of line 3, where Windows-1252 has 'ÿ': save the file as UTF-8",
        "5": {"text": "three"},
    }


PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_a_packed_file_is_unpacked_and_one_that_is_cut_off_loses_no_row_silently(tmp_path: Path, suffix: str) -> None:
    pack = pytest.importorskip("zstandard").ZstdCompressor().compress if suffix == ".zst" else PACK[suffix]
    lines = [json.dumps({"n": i, "text": "x" * (i % 97)}).encode() + b"\n" for i in range(300)]
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack(b"".join(lines[:200])) + pack(b"".join(lines[200:])))  # as `cat` joins two
    assert list(values(path).values()) == [json.loads(line) for line in lines]
    path.write_bytes(pack(b"".join(lines))[:-20])
    with pytest.raises(DataError, match=f"jsonl{suffix}: the packed file is damaged"):
        values(path)
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=f"jsonl{suffix}: "):
        values(path)


def test_standard_input_is_json_or_json_lines_and_can_be_read_twice(monkeypatch) -> None:
    for text in ('\n[{"a": 1},\n{"a": 2}]', '{"a": 1}\n{"a": 2}\n'):
        _stdin.cache_clear()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        found = [[(record.where, record.value) for record in records("-")] for _ in range(2)]
        first = 1 + text.startswith("\n")
        assert found == [[(f"standard input:{first}", {"a": 1}), (f"standard input:{first + 1}", {"a": 2})]] * 2
    _stdin.cache_clear()


# which files


def test_globs_lists_and_weights_name_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        (tmp_path / name).touch()
    a, b, c = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.csv"))
    assert find(f"{tmp_path}/*.jsonl", None)[0] == [Source(a), Source(b)]
    assert find((str(c), str(a)), None)[0] == [Source(c), Source(a)]
    assert find({str(c): 2.0, f"{tmp_path}/*.jsonl": 0.5}, str(a))[0] == [
        Source(c, 2.0),
        Source(a, 0.5),
        Source(b, 0.5),
    ]
    assert find_measured(f"{tmp_path}/[ab].jsonl") == [Source(a), Source(b)]
    with pytest.raises(UserError, match="no file matches"):
        find(f"{tmp_path}/*.tsv", None)
    with pytest.raises(UserError, match="names this file twice"):
        find((str(a), f"{tmp_path}/*.jsonl"), None)


def test_a_folder_may_hold_shards_or_files_of_one_kind(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"):
        (tmp_path / name).touch()
    train, held_out = find(str(tmp_path), None)
    assert [source.path.name[:11] for source in train] == ["train-00000", "train-00001"]
    assert [source.path.name[:10] for source in held_out] == ["validation"]
    (tmp_path / "train.csv").touch()
    with pytest.raises(UserError, match="several files could be meant: train-00000-of-00002.parquet, train-00001"):
        find(str(tmp_path), None)
    books = tmp_path / "books"
    books.mkdir()
    for name in ("one.txt", "two.txt", "README.txt", "test.txt"):
        (books / name).touch()
    assert [source.path.name for source in find(str(books), None)[0]] == ["one.txt", "two.txt"]
    (books / "rows.csv").touch()
    with pytest.raises(UserError, match="no file called train in it"):
        find(str(books), None)


def test_a_weight_repeats_rows_and_takes_a_share_of_them() -> None:
    assert repeated(10, 1.0, 0).tolist() == [1] * 10
    assert repeated(10, 2.0, 0).tolist() == [2] * 10
    assert sorted(repeated(10, 0.3, 0)) == [0] * 7 + [1] * 3
    more = repeated(10, 2.5, 1)
    assert sorted(more) == [2] * 5 + [3] * 5
    assert repeated(10, 2.5, 1).tolist() == more.tolist() != repeated(10, 2.5, 2).tolist()


def test_every_reader_is_in_the_tutorial() -> None:
    page = (Path(__file__).parent.parent / "tutorials" / "data.md").read_text()
    assert [ending for ending in READERS if f"`{ending}`" not in page] == []
