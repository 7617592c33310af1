"""A JSON list of rows. A syntax error is an error of the file: no later row can be found."""

import json
from collections.abc import Iterator
from typing import BinaryIO

from litpeft.core.errors import DataError, quoted, some
from litpeft.data.readers.bytes import not_utf8, refuse_binary
from litpeft.data.readers.record import Record
from litpeft.data.readers.strict import StrictDecoder, skip


def _no_list(decode: StrictDecoder, text: str, position: int, place: str) -> DataError:
    what, hint = "a .json file must be a list of rows: [{...}, {...}]", "if every line is a row, call the file .jsonl"
    try:
        value, end, _ = decode(text, position)
    except ValueError:
        return DataError(what, where=place, hint=hint)
    lists = [key for key in value if isinstance(value[key], list)] if isinstance(value, dict) else []
    if lists and skip(text, end) == len(text):
        what += f"; this is an object with the keys {some([quoted(key) for key in value])}"
        hint = f"write the list {quoted(lists[0])} alone to a file"
    return DataError(what, where=place, hint=hint)


def read(handle: BinaryIO, place: str) -> Iterator[Record]:
    """Yields the rows, those with a problem too."""
    refuse_binary(handle, place, "JSON")
    raw = handle.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(not_utf8(error), where=f"{place}:{line}") from None
    decode, position = StrictDecoder(), skip(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        raise _no_list(decode, text, position, place)

    def fault(what: str, position: int) -> DataError:
        return DataError(what, where=f"{place}:{text.count(chr(10), 0, position) + 1}")

    line, counted = 1, 0
    position = skip(text, position + 1)
    separator = "]" if text.startswith("]", position) else ","
    while separator == ",":
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end, flaw = decode(text, position)
        except json.JSONDecodeError as error:
            raise fault(f"not JSON at column {error.colno}: {error.msg}", error.pos) from None
        except ValueError as error:
            raise fault(str(error), position) from None
        yield Record(f"{place}:{line}", value, flaw)
        position = skip(text, end)
        separator = text[position : position + 1]
        if separator not in ("]", ","):
            raise fault(f"expected , or ] after a row, got {separator or 'the end'!r}", position)
        if separator == ",":
            position = skip(text, position + 1)
    rest = skip(text, position + 1)
    if rest < len(text):
        raise fault("there is more after the end of the list", rest)
