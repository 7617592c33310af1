"""CSV and TSV: a header with the names of the columns, then the rows. A quoted cell may have line breaks."""

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import BinaryIO

from litpeft.core.errors import DataError, counted, quoted
from litpeft.data.readers.bytes import not_utf8, refuse_binary
from litpeft.data.readers.record import Record
from litpeft.data.readers.table import checked_names

SEPARATORS = ",;\t|"  # of a .csv file: the first of them that its header has
LONGEST = 1 << 30  # characters of a cell


def read_tsv(handle: BinaryIO, place: str) -> Iterator[Record]:
    """Yields the rows of a table whose cells are separated by tabs."""
    return read(handle, place, "\t")


def read(handle: BinaryIO, place: str, separator: str = "") -> Iterator[Record]:
    """Yields the rows, those with a problem too; raises DataError where a quote makes all later rows uncertain."""
    refuse_binary(handle, place, "CSV")
    csv.field_size_limit(LONGEST)
    head = handle.readline()
    if said := re.fullmatch(rb"sep=([,;|\t])\s*", head, re.IGNORECASE):  # Excel writes and reads such a line
        separator, head = said[1].decode(), b"\n"
    separator = separator or next((one for one in SEPARATORS if one.encode() in head), ",")
    names: list[str] = []
    for first, cells, problem in _rows(chain([head], handle), separator, place):
        where = f"{place}:{first}"
        if not names:
            if problem:
                raise DataError(problem, where=where)
            names = checked_names(cells, where)
            continue
        if not problem and len(cells) != len(names):
            problem = f"it has {counted(len(cells), 'cell')}, the header {len(names)}"
        yield Record(where, None if problem else dict(zip(names, cells, strict=True)), problem)


def _rows(lines: Iterable[bytes], separator: str, place: str) -> Iterator[tuple[int, list[str], str]]:
    """Yields of each row that is not blank the line on which it begins, its cells, and its problem or ""."""
    bad: list[str] = []

    def decoded() -> Iterator[str]:
        for number, line in enumerate(lines, 1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                bad.append(f'{not_utf8(error, number)}, which Excel calls "CSV UTF-8"')
                yield line.decode(errors="replace")

    reader = csv.reader(decoded(), delimiter=separator, strict=True)
    while True:
        first = reader.line_num + 1
        bad.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            what = f"a quoted cell is wrong: {error}"
            if "end of data" in str(error):
                what = "a quote opens in this row and is not closed"
            hint = "a quote inside a quoted cell is written twice"
            if "new-line character" in str(error):
                what = "a line ends in a carriage return (\\r) alone, as programs for an old Mac write it"
                hint = "save it with line ends of Unix (\\n) or Windows (\\r\\n)"
            raise DataError(what, where=f"{place}:{first}", hint=hint) from None
        if cells is None:
            return
        nul = next((f"the cell {quoted(cell[:40])} holds a NUL character" for cell in cells if "\0" in cell), "")
        if cells:
            yield first, cells, bad[0] if bad else nul
