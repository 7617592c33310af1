"""Excel workbooks (.xlsx): every sheet is a table whose first row that is not blank has the names of the columns."""

from collections.abc import Iterator
from typing import Any, BinaryIO
from zipfile import BadZipFile

from litpeft.core.errors import DataError
from litpeft.core.extras import extra
from litpeft.data.readers.record import Record
from litpeft.data.readers.table import checked_names


def read(handle: BinaryIO, place: str) -> Iterator[Record]:
    """Yields the rows of all sheets, those with a problem too. Numbers become text; empty cells are left out."""
    openpyxl = extra("openpyxl")
    try:
        # twice: with the formulas, and with the values that they had when the workbook was saved
        books = [openpyxl.load_workbook(handle, read_only=True, data_only=values) for values in (True, False)]
    except (BadZipFile, KeyError, ValueError) as error:
        what = f"this is no workbook that openpyxl reads: {error}"
        raise DataError(what, where=place, hint="save it as .xlsx, or as .csv in UTF-8") from None
    for sheet, formulas in zip(*(book.worksheets for book in books), strict=True):
        where, names = f"{place}:{sheet.title}", {}
        if sheet.sheet_state != "visible":
            what = "the sheet is hidden: show it to train on its rows, or delete it"
            if any(cell.value not in (None, "") for cells in sheet.iter_rows() for cell in cells):
                yield Record(where, problem=what)
            continue
        for number, (cells, written) in enumerate(zip(sheet.iter_rows(), formulas.iter_rows(), strict=True), 1):
            filled = {at: cell for at, cell in enumerate(cells) if cell.value not in (None, "")}
            both = zip(cells, written, strict=True)
            lost = [cell for cell, formula in both if formula.data_type == "f" and cell.value is None]
            if not filled and not lost:
                continue
            if not names:
                titles = [str(filled[at].value) if at in filled else "" for at in range(max(filled, default=0) + 1)]
                names, top = dict(enumerate(checked_names(titles, f"{where}:{number}"))), number
                continue
            yield _record(f"{where}:{number}", names, filled, lost, top)


def _record(where: str, names: dict[int, str], filled: dict[int, Any], lost: list[Any], top: int) -> Record:
    if lost:
        what = f"cell {lost[0].coordinate} is a formula without a value: save the workbook in a spreadsheet program"
        return Record(where, problem=what)
    try:
        outside = next((cell.coordinate for at, cell in filled.items() if at not in names), None)
        if outside:
            raise ValueError(
                f"cell {outside} stands in a column without a name: row {top} has the names of the columns"
            )
        return Record(where, {names[at]: _text(cell) for at, cell in filled.items()})
    except ValueError as error:
        return Record(where, problem=str(error))


def _text(cell: Any) -> str:
    """Returns what a cell says; raises ValueError if the sheet shows it otherwise than it is stored."""
    value = cell.value
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if cell.data_type == "e":
        raise ValueError(f"cell {cell.coordinate} has the error {value}")
    if isinstance(value, str):
        return value
    plain = ("General", "@", "0") if isinstance(value, int) else ("General", "@")
    if cell.number_format not in plain or not isinstance(value, int | float):
        what = f"cell {cell.coordinate} is a number shown as {cell.number_format!r}"
        raise ValueError(f"{what}: make it text, so that what is seen is what is learnt")
    return str(value) if isinstance(value, int) else f"{value:.15g}"
