"""JSON Lines: a row on each line, blank lines left out. Only \\n ends a line: U+2028 may stand inside a string."""

import json
from collections.abc import Iterator
from typing import BinaryIO

from litpeft.core.errors import DataError
from litpeft.data.readers.bytes import not_utf8, refuse_binary
from litpeft.data.readers.record import Record
from litpeft.data.readers.strict import StrictDecoder, skip


def read(handle: BinaryIO, place: str) -> Iterator[Record]:
    """Yields the rows, those with a problem too."""
    refuse_binary(handle, place, "JSON")
    decode = StrictDecoder()
    for number, raw in enumerate(handle, 1):
        where = f"{place}:{number}"
        try:
            text = raw.decode("utf-8").rstrip(" \t\r\n")
        except UnicodeDecodeError as error:
            yield Record(where, problem=not_utf8(error))
            continue
        if not text:
            continue
        if number == 1 and text.lstrip() == "[":
            hint = "one row stands on one line of a .jsonl file; a list of rows belongs into a .json file"
            raise DataError("this is a JSON list, not JSON Lines", where=where, hint=hint)
        if number == 1 and text.lstrip() == "{":
            hint = "one row stands on one line of a .jsonl file: `jq -c . OLD > NEW` writes them so"
            raise DataError("a JSON object spread over lines is not JSON Lines", where=where, hint=hint)
        try:
            value, end, flaw = decode(text, skip(text, 0))
            if not flaw and end < len(text):
                flaw = f"there is more after the end of the row, at column {skip(text, end) + 1}"
            yield Record(where, value, flaw)
        except json.JSONDecodeError as error:
            yield Record(where, problem=f"not JSON at column {error.colno}: {error.msg}")
        except ValueError as error:
            yield Record(where, problem=str(error))
